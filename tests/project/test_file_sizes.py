"""Files of the package are short enough to be read in one go."""

from __future__ import annotations

from pathlib import Path

import lipcore

ROOT = Path(lipcore.__file__).parent
MOST = 400  #: lines of a file
#: Files that are longer, until they are split.
LONGER = {
    "lipschitz/metric.py",
    "metric/engine.py",
    "monitor/monitor.py",
    "tensor_stats/metric.py",
    "trajectory/metric.py",
}


def test_no_file_is_longer_than_can_be_read_in_one_go() -> None:
    lines = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in ROOT.rglob("*.py*")
        if path.suffix in (".py", ".pyi")
    }
    longer = {name: count for name, count in lines.items() if count > MOST}
    new = [f"{name} ({longer[name]} lines)" for name in sorted(longer.keys() - LONGER)]
    assert not new, f"to be split: {', '.join(new)}"
    short = sorted(LONGER - longer.keys())
    assert not short, f"to be taken off LONGER: {', '.join(short)}"
