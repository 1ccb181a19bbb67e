"""Figures in the README and in docs/benchmarks.md are those of the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
_FILES = {
    "EPYC": "cpu-amd-epyc-family-26-2-cores.json",
    "Xeon": "cpu-intel-r-xeon-r-processor-family-6-2-cores.json",
}
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?(?![\w.]*\w)|\d+(?:\.\d+)?(?=x\b)")

_GPT, _LONG = "GPT-like, 4 layers of 256, T=256, batch 8", "GPT-like, 4 layers of 256, T=2048, batch 2"
_MLP, _CNN = "MLP 784-1024-1024-10, batch 256", "CNN with GroupNorm, 3x32x32, batch 64"
_ONE = "the paper's MLP, batch 1"
_WAYS = {"fused": "lipcore fused", "opacus": "Opacus ghost", "vmap": "vmap(grad)", "backpack": "BackPACK"}
Quote = tuple[str, str, str, str, str]


def _of(row: str, machine: str, figures: dict[str, str], key: str = "") -> list[Quote]:
    return [(row, figure, machine, name, key) for name, figure in figures.items()]


def _steps(row: str, model: str, machine: str, key: str = "", **figures: str) -> list[Quote]:
    names = {f"per-sample norms by {_WAYS.get(way, way)}: {model}": figure for way, figure in figures.items()}
    return _of(f"`PerSampleGradNorms`, {row}", machine, names, key)


_LIST, _ONE_TENSOR = "trajectory, 25e6 in 150 tensors", "trajectory, 1e7 in 1 tensor, f32, 1 thread"
_LARGE, _SMALL = "sample_norms, [64, 1048576], float32 (in memory)", "sample_norms, [256, 1024], bfloat16 (in cache)"
_SKETCH = "sketch, 1e8, f32, k = 4096, 1 thread"

#: Start of the row, figure as it is quoted, machine, name of the result, key of its details ("": what was measured).
QUOTES = [
    *_of("default `Monitor`, 310 us", "Xeon", {
        "Monitor on the paper's MLP, batch 1": "1.89",
        "Monitor on the paper's MLP, batch 1, read from the gradients": "1.36",
    }),
    *_of("default `Monitor`, small CNN", "Xeon", {"Monitor on a small CNN, batch 64": "1.09"}),
    *_steps("GPT", _GPT, "EPYC", lipcore="1.18", fused="0.90", opacus="1.61", vmap="1.10", loop="1.03"),
    *_steps("GPT", _GPT, "Xeon", lipcore="1.30", fused="1.10", opacus="1.67", vmap="1.34", loop="1.09"),
    *_steps("GPT", _GPT, "EPYC", "error", lipcore="9e-9", opacus="3e-6", loop="1e-5"),
    *_steps("the same", _LONG, "EPYC", lipcore="1.12", fused="0.97", opacus="3.9", vmap="1.06", loop="0.98"),
    *_steps("the same", _LONG, "Xeon", lipcore="1.20", fused="1.08", opacus="4.0", vmap="1.11", loop="1.00"),
    *_steps("the same", _LONG, "EPYC", "error", lipcore="6e-9", opacus="3e-4"),
    *_steps("MLP", _MLP, "EPYC", lipcore="1.05", opacus="1.10", backpack="1.08", loop="12", vmap="69"),
    *_steps("MLP", _MLP, "Xeon", lipcore="1.07", opacus="1.37", backpack="1.17", loop="29", vmap="106"),
    *_steps("MLP", _MLP, "Xeon", "error", lipcore="4e-8", backpack="4e-6"),
    *_steps("CNN", _CNN, "EPYC", lipcore="1.25", opacus="2.07", vmap="2.2", loop="1.6"),
    *_steps("CNN", _CNN, "Xeon", lipcore="1.28", opacus="1.81", vmap="1.94", loop="1.71"),
    *_steps("CNN", _CNN, "EPYC", "error", lipcore="4e-8"),
    *_steps("310 us", _ONE, "Xeon", lipcore="1.26", loop="1.5", opacus="3.9", vmap="4.5", backpack="5.3"),
    *_steps("310 us", _ONE, "Xeon", "error", lipcore="8e-9", backpack="3e-4"),
    *_of("peak memory", "Xeon", {
        f"per-sample norms by lipcore without proof: {_MLP}: peak memory of steps": "1.01",
        f"per-sample norms by lipcore: {_LONG}: peak memory of steps": "1.07",
        f"per-sample norms by lipcore: {_CNN}: peak memory of steps": "1.22",
        f"per-sample norms by Opacus ghost: {_MLP}: peak memory of steps": "1.01",
        f"per-sample norms by Opacus ghost: {_CNN}: peak memory of steps": "1.63",
    }),
    *_of("`Trajectory`, 25e6", "EPYC", {
        f"{_LIST}, 1 thread: against the eager loop": "7.2",
        f"{_LIST}, 1 thread: against the eager loop with buffers of its own": "4.2",
        f"{_LIST}, 1 thread: against _foreach": "16",
        f"{_LIST}, 2 threads: against the eager loop": "11",
        f"{_LIST}, 2 threads: against the eager loop with buffers of its own": "7.5",
        f"{_LIST}, 2 threads: against _foreach": "17",
        "trajectory, drift, 1e5 steps: error of the variance": "3e-7",
        "trajectory, drift, 1e6 steps: error of the variance": "1.5e-6",
        "trajectory, random walk, 1e7 steps: error of the path length, of the sum of norms": "1e-13",
    }),
    *_of("`Trajectory`, 1e7", "EPYC", {
        f"{_ONE_TENSOR}: share of the stream limit": "0.87",
        f"{_ONE_TENSOR}: against cockpit's UpdateSize and Distance": "10",
    }),
    *_of("`Trajectory.update()`", "EPYC", {"Trajectory.update, 10 tensors": "1.8"}),
    *_of('`Trajectory(mode="sketch")`', "EPYC", {
        f"{_SKETCH}: time over that of a plain read": "1.07",
        f"{_SKETCH}: against the textbook scatter": "4.5",
    }),
    *_of('`Trajectory(mode="updates")`', "EPYC", {
        "updates from AdamW's state, 25e6 in 150 tensors, 1 thread: against the trajectory step": "1.4"
    }),
    *_of("`sample_norms` [64", "EPYC", {f"{_LARGE}: against vector_norm": "1.3"}),
    *_of("`sample_norms` [64", "EPYC", {f"{_LARGE}: against vector_norm": "1e-5"}, "vector_norm_error"),
    *_of("`sample_norms` [256", "EPYC", {f"{_SMALL}: against vector_norm": "1.0"}),
    *_of("`sample_norms` [256", "EPYC", {f"{_SMALL}: against vector_norm": "3e-3"}, "vector_norm_error"),
    *_of("weight gradient", "EPYC", {
        "weight gradient with norms, T=1024, I=O=256, f32: time over torch.mm": "0.45",
        "weight gradient with norms, T=2048, I=O=1024, f32: time over torch.mm": "0.55",
    }),
]  # fmt: skip


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    folder = ROOT / "bench" / "results"
    if not folder.exists():
        pytest.skip("there is no bench folder")
    return {
        machine: {row["name"]: row for row in json.loads((folder / file).read_text(encoding="utf-8"))["rows"]}
        for machine, file in _FILES.items()
    }


def rows_of(page: Path) -> list[str]:
    return [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]


def rounds_to(number: float, figure: str) -> bool:
    """Whether the number, rounded to the figure's digits, is the figure."""
    digits, _, power = figure.partition("e")
    unit = 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))
    return abs(number - float(figure)) <= 0.5 * unit * (1 + 1e-9)


@pytest.mark.parametrize("quote", QUOTES, ids=lambda quote: f"{quote[2]}-{quote[3]}-{quote[4] or quote[1]}")
def test_figures_are_those_of_the_results(quote: Quote, results: dict[str, dict[str, Any]]) -> None:
    start, figure, machine, name, key = quote
    (row,) = (row for row in rows_of(PAGE) if row.startswith(f"| {start}"))
    assert figure in _NUMBER.findall(row), f"{figure} is not in: {row}"
    result = results[machine][name]
    assert rounds_to(result["details"][key] if key else result["measured"], figure), f"{figure}: {result['measured']}"


def test_numbers_of_the_readme_stand_on_the_page() -> None:
    page = {row.split(" | ")[0]: row for row in rows_of(PAGE)}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [row for row in text[text.index("## Speed") :].splitlines() if row.startswith("| ")][1:]
    assert len(rows) == 10
    for row in rows:
        first, *cells = row.split(" | ")
        assert first in page, f"{first} is no row of docs/benchmarks.md"
        assert not set(_NUMBER.findall(" ".join(cells))) - set(_NUMBER.findall(page[first])), row


@pytest.mark.parametrize("page", [ROOT / "README.md", PAGE], ids=lambda page: page.name)
def test_rows_of_speed_name_the_processor(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    starts = (
        "| default",
        "| `PerSampleGradNorms`, ",
        "| `Trajectory",
        "| peak",
        "| `sample_norms` [",
        "| weight gradient",
    )
    rows = [row for row in text.splitlines() if row.startswith(starts) and re.search(r"\d[.\d]*x|\d\.\d\d", row)]
    assert len(rows) >= 10
    assert all("CPU" in row for row in rows)
