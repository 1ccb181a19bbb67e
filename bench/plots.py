"""Draws trajectory-scaling.png from the committed results: python bench/plots.py [results.json]"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

_RESULTS = Path(__file__).parent / "results"
# Okabe and Ito's colours, told apart with any colour vision; markers and dashes tell them apart without.
_STYLES: dict[str, dict[str, Any]] = {
    "lipcore": {"color": "#0072B2", "marker": "o", "linewidth": 2.2, "zorder": 3},
    "eager": {"color": "#E69F00", "marker": "s"},
    "eager with buffers": {"color": "#D55E00", "marker": "v"},
    "foreach": {"color": "#CC79A7", "marker": "^"},
    "compile": {"color": "#009E73", "marker": "D"},
    "cockpit": {"color": "#56B4E9", "marker": "X"},
    "stream": {"color": "black", "linestyle": "--", "linewidth": 1.2},
}
_LABELS = {
    "eager": "eager loop",
    "foreach": "torch._foreach",
    "compile": "torch.compile",
    "cockpit": "cockpit, 2 of the numbers",
    "stream": "stream limit",
}

Panel = tuple[int, int]  # tensors, threads


def curves(rows: list[dict[str, Any]], dtype: str = "f32") -> dict[Panel, dict[str, list[tuple[int, float]]]]:
    """panel -> contender -> (parameters, seconds per step) in increasing order, of the rows that are about scaling."""
    found: dict[Panel, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        details = row["details"]
        if not {"elements", "tensors", "threads", "seconds"} <= set(details) or details["dtype"] != dtype:
            continue
        # lipcore was measured beside cockpit as well; its curve is the one beside the others.
        for name in ["cockpit"] if "cockpit" in details["seconds"] else details["seconds"]:
            panel = (details["tensors"], details["threads"])
            found[panel][name].append((details["elements"], details["seconds"][name]))
    return {panel: {name: sorted(points) for name, points in found[panel].items()} for panel in sorted(found)}


def draw(results: Path, target: Path) -> None:
    report = json.loads(results.read_text())
    panels = curves(report["rows"])
    if not panels:
        raise SystemExit(f"{results} has no scaling rows; `pytest bench/bench_trajectory_scaling.py` measures them")
    columns = sorted({threads for _, threads in panels})
    lines = sorted({tensors for tensors, _ in panels})
    size = (4.2 * len(columns), 3.1 * len(lines))
    figure, axes = plt.subplots(len(lines), len(columns), figsize=size, sharex=True, sharey=True, squeeze=False)
    shown = {}
    for (tensors, threads), contenders in panels.items():
        axis = axes[lines.index(tensors)][columns.index(threads)]
        for name, style in _STYLES.items():
            if name in contenders:
                x, y = zip(*contenders[name], strict=True)
                (shown[name],) = axis.loglog(x, y, markersize=4, **{"linewidth": 1.4, **style})
        axis.set_title(f"{tensors} tensor{'s' * (tensors > 1)}, {threads} thread{'s' * (threads > 1)}", fontsize=9)
        axis.grid(alpha=0.25, linewidth=0.5)
        axis.tick_params(labelsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("float32 parameters", fontsize=9)
    for line in axes:
        line[0].set_ylabel("seconds per step", fontsize=9)
    names = [name for name in _STYLES if name in shown]
    labels = [_LABELS.get(name, name) for name in names]
    machine = report["machine"]
    figure.suptitle(f"One trajectory step; {machine['cpu']}, torch {machine['torch']}", fontsize=10)
    figure.legend([shown[name] for name in names], labels, loc="lower center", ncol=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    # 48 colours of a palette are a third of the bytes, and the picture is in the repository.
    figure.savefig(target, dpi=90, metadata={"Software": None})
    plt.close(figure)
    with Image.open(target) as image:
        image.convert("RGB").quantize(48, dither=Image.Dither.NONE).save(target, optimize=True)


def main() -> None:
    given = [Path(argument) for argument in sys.argv[1:]] or sorted(_RESULTS.glob("cpu-*.json"))
    if len(given) != 1:
        raise SystemExit(f"expected one results file, got {', '.join(map(str, given)) or 'none'}; name it")
    target = given[0].parent / "trajectory-scaling.png"
    draw(given[0], target)
    print(f"{target}: {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
