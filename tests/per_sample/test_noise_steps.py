"""The compiled step of the noise scale: against its formula one place at a time, and against torch operations."""

from __future__ import annotations

import math

import pytest
import torch

from lipcore import _core
from lipcore.per_sample.noise.noise_scale import _on_device

_SAMPLES, _DECAY = 8, 0.9


def _pending(steps: int, places: int) -> list[torch.Tensor]:
    """Steps in which some places are not usable: NaN, infinite, negative, or overflowing."""
    torch.manual_seed(0)
    found = [torch.rand(2, places, dtype=torch.float64) + 0.5 for _ in range(steps)]
    for k, bad in enumerate((math.nan, math.inf, -1.0, 1.7e308)):
        if k < steps and k < places:
            found[k][k % 2, k] = bad
    return found


def _one_by_one(pending: list[torch.Tensor], ema: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    steps, ema = torch.zeros(len(pending), 3, ema.shape[1], dtype=torch.float64), ema.clone()
    for k, (mean, batch) in enumerate(pending):
        for p, (m, b) in enumerate(zip(mean.tolist(), batch.tolist(), strict=True)):
            noise = (m - b) * _SAMPLES / (_SAMPLES - 1)
            signal = b - noise / _SAMPLES
            if m >= 0 and b >= 0 and math.isfinite(signal) and math.isfinite(noise):
                steps[k, :, p] = torch.tensor([1, signal, noise], dtype=torch.float64)
                ema[:3, p] = _DECAY * ema[:3, p] + (1 - _DECAY) * steps[k, :, p]
                ema[3, p] += 1
    return steps, ema


@pytest.mark.parametrize("places", [0, 1, 5, 33])
@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_it_is_the_formula_and_what_torch_operations_give(steps: int, places: int) -> None:
    pending, ema = _pending(steps, places), torch.rand(4, places, dtype=torch.float64)
    wanted, wanted_ema = _one_by_one(pending, ema)
    if pending:
        for got, want in zip(_on_device(pending, _SAMPLES, _DECAY, ema), (wanted, wanted_ema), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
    out = torch.full((steps, 3, places), 7.0, dtype=torch.float64)
    _core.noise_steps(pending, _SAMPLES, _DECAY, ema, out)
    torch.testing.assert_close(out, wanted, rtol=1e-13, atol=0)
    torch.testing.assert_close(ema, wanted_ema, rtol=1e-13, atol=0)


def test_with_no_decay_the_average_is_the_last_step() -> None:
    pending, ema = _pending(3, 6), torch.zeros(4, 6, dtype=torch.float64)
    out = torch.empty(3, 3, 6, dtype=torch.float64)
    _core.noise_steps(pending, _SAMPLES, 0.0, ema, out)
    assert torch.equal(ema[:3, 5], out[-1, :, 5])


@pytest.mark.parametrize(
    ("argument", "wrong", "words"),
    [
        ("samples", 1, r"samples: expected 2 or more, got 1"),
        ("pending", [torch.ones(2, 4).double()], r"pending\[0\]: expected float64 \[2, 3\].*got \[2, 4\]"),
        ("pending", [torch.ones(2, 3)], r"pending\[0\]: expected float64"),
        ("pending", [torch.ones(3, 2).double().t()], r"pending\[0\]: expected float64"),
        ("ema", torch.zeros(3, 3).double(), r"ema: expected float64 \[4, places\].*got \[3, 3\]"),
        ("out", torch.zeros(2, 3, 3).double(), r"out: expected float64 \[1, 3, 3\].*got \[2, 3, 3\]"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(argument: str, wrong: object, words: str) -> None:
    ema, out = torch.zeros(4, 3).double(), torch.zeros(1, 3, 3).double()
    given = {"pending": [torch.ones(2, 3).double()], "samples": _SAMPLES, "decay": _DECAY, "ema": ema, "out": out}
    with pytest.raises(ValueError, match=words):
        _core.noise_steps(**given | {argument: wrong})
    assert not ema.any()
    assert not out.any()
