"""Files of the package are short enough to be read in one go."""

from __future__ import annotations

from pathlib import Path

import lipcore

ROOT = Path(lipcore.__file__).parent
MOST = 400  #: lines of a file


def test_no_file_is_longer_than_can_be_read_in_one_go() -> None:
    lines = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in ROOT.rglob("*.py*")
        if path.suffix in (".py", ".pyi")
    }
    longer = [f"{name} ({count} lines)" for name, count in sorted(lines.items()) if count > MOST]
    assert not longer, f"to be split: {', '.join(longer)}"
