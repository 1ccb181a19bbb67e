"""The blocks of docs/loops.md that are marked "python trainers" run as they stand, with the trainers themselves."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "loops.md"
FENCE = re.compile(r"^```python trainers\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CALLBACK = re.compile(r"^```python trainers callback\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TRAINERS = ("accelerate", "transformers", "lightning")


def block(trainer: str) -> tuple[str, int]:
    """The block that imports this trainer, and its first line in the page."""
    text = PAGE.read_text(encoding="utf-8")
    found = [
        match
        for match in FENCE.finditer(text)
        if re.search(rf"^(import|from) {trainer}\b", match.group(1), re.MULTILINE)
    ]
    assert len(found) == 1, f"one block for {trainer}"
    return found[0].group(1), text.count("\n", 0, found[0].start(1))


def test_every_block_is_of_one_trainer() -> None:
    assert len(FENCE.findall(PAGE.read_text(encoding="utf-8"))) == len(TRAINERS)
    for trainer in TRAINERS:
        block(trainer)


@pytest.mark.ci
@pytest.mark.parametrize("number", range(2))
def test_a_callback_runs(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = PAGE.read_text(encoding="utf-8")
    found = list(CALLBACK.finditer(text))
    assert len(found) == 2
    source = found[number].group(1)
    for trainer in TRAINERS:
        if f"import {trainer}" in source:
            pytest.importorskip(trainer)
    monkeypatch.chdir(tmp_path)
    line = text.count("\n", 0, found[number].start(1))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        exec(compile("\n" * line + source, str(PAGE), "exec"), {"__name__": "__main__"})
    assert not [str(one.message) for one in told if "lipcore" in f"{one.message} {one.filename}"]


@pytest.mark.ci
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_block_runs(
    trainer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(trainer)
    source, line = block(trainer)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    code = compile("\n" * line + source, str(PAGE), "exec")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        exec(code, {"__name__": "__main__"})
    assert not [str(one.message) for one in told if "lipcore" in f"{one.message} {one.filename}"]
    printed = capsys.readouterr().out
    for key in (
        "trajectory/path_length.sum/total",
        "lipschitz/local_lipschitz",
        "per_sample_grad_norm/norm.mean/total",
    ):
        assert key in printed
