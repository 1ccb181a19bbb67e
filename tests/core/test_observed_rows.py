"""Observed rows of values, their roots and ratios: moments and bins as a compiled distribution has them, on a device
and off it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from oracle import same_bits
from torch import Tensor

from lipcore import _core

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
CHUNK = 16384  # kCudaChunk
SPECIAL = [0.0, -0.0, 5e-324, 1e-40, 3.4e38, 3.5e38, 1.7e308, math.inf, -math.inf, math.nan, -1e-300]


def new(places: int, device: str) -> tuple[Tensor, Tensor]:
    rows = torch.zeros(places, _core.OBSERVED_COLUMNS, dtype=torch.float64, device=device)
    return rows, torch.zeros(places, _core.BINS, dtype=torch.int64, device=device)


def assert_observed(kept: tuple[Tensor, Tensor], streams: list[Tensor]) -> None:
    """What is kept per place is what a distribution has of these numbers, float64."""
    rows, bins = (tensor.cpu() for tensor in kept)
    for place, stream in enumerate(streams):
        expected = _core.Distribution()
        expected.observe_all(stream.double().contiguous())
        count, mean, m2, low, high, missing, invalid = rows[place].tolist()
        assert (count, missing, invalid) == (expected.count, expected.missing, expected.invalid)
        if count:
            assert (low, high) == (expected.min, expected.max)
        assert mean == pytest.approx(expected.mean, rel=1e-12)
        assert m2 == pytest.approx(expected.m2, rel=1e-9, abs=1e-25)
        used = bins[place].nonzero().flatten()
        assert torch.stack([used, bins[place, used]], 1).flatten().tolist() == expected.bins()


@DEVICES
@pytest.mark.parametrize("count", [1, 3, 255, 257, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_values(count: int, device: str) -> None:
    torch.manual_seed(count)
    kept, seen = new(3, device), [torch.empty(0)] * 3
    for _ in range(2):
        values = torch.exp(3 * torch.randn(3, count, dtype=torch.float64))
        values[1, ::3], values[2, 0] = math.nan, -1.0
        _core.observe_rows(values.to(device), _core.OBSERVE_VALUES, None, 0.0, *kept)
        seen = [torch.cat(pair) for pair in zip(seen, values, strict=True)]
        assert_observed(kept, seen)


@DEVICES
@pytest.mark.parametrize("what", ["values", "roots"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_strides_and_special_values(dtype: torch.dtype, what: str, device: str) -> None:
    torch.manual_seed(0)
    base = torch.cat([torch.rand(600) * 100, torch.tensor(SPECIAL)]).to(torch.float64)
    wide = torch.stack([base, base.flip(0)], 1).to(dtype)  # [B, 2]: read along its columns
    kept = new(2, device)
    chosen = _core.OBSERVE_VALUES if what == "values" else _core.OBSERVE_ROOTS
    _core.observe_rows(wide.to(device).t()[:, ::2], chosen, None, 0.0, *kept)
    numbers = wide.t()[:, ::2].double()
    assert_observed(kept, list(numbers if what == "values" else numbers.sqrt()))


@DEVICES
def test_ratios(device: str) -> None:
    """As the compiled distributions on the CPU take them in."""
    torch.manual_seed(0)
    numerators = torch.rand(3, 700, dtype=torch.float64)
    numerators[1, ::2] = math.nan
    gradient = torch.randn(700, dtype=torch.float64)
    gradient[:8] = torch.tensor([0.0, math.nan, math.inf, -math.inf, 1e-3, -1e-3, 9.9e-4, 5e-324])
    expected = [_core.Distribution() for _ in range(3)]
    _core.observe_ratios(numerators, gradient.unsqueeze(0), expected, 1e-3)
    kept = new(3, device)
    _core.observe_rows(numerators.to(device), _core.OBSERVE_RATIOS, gradient.to(device), 1e-3, *kept)
    usable = (gradient.abs() >= 1e-3) & gradient.isfinite()
    assert_observed(kept, list(torch.where(usable, numerators / gradient.abs(), math.nan)))
    assert [int(count) for count in kept[0][:, 0]] == [distribution.count for distribution in expected]
    assert [bins.sum().item() for bins in kept[1]] == [distribution.count for distribution in expected]


@DEVICES
def test_large_values_do_not_overflow(device: str) -> None:
    kept, values = new(1, device), torch.full((1, 2 * CHUNK), 1.5e308, dtype=torch.float64)
    _core.observe_rows(values.to(device), _core.OBSERVE_VALUES, None, 0.0, *kept)
    assert kept[0].cpu()[0, 1:3].tolist() == [1.5e308, 0]


@DEVICES
def test_nothing_to_observe(device: str) -> None:
    kept = new(2, device)
    _core.observe_rows(torch.zeros(2, 0, device=device), _core.OBSERVE_VALUES, None, 0.0, *kept)
    empty = new(0, device)
    _core.observe_rows(torch.zeros(0, 3, device=device), _core.OBSERVE_VALUES, None, 0.0, *empty)
    assert not any(bool(tensor.any()) for tensor in kept)


@pytest.mark.gpu
def test_a_thousand_replays_count() -> None:
    """What is kept is changed in place, so every replay of a captured observation is there in the end."""
    values = torch.rand(2, 3, dtype=torch.float64).cuda()
    kept, seen = new(2, "cuda"), []
    _core.observe_rows(values, _core.OBSERVE_ROOTS, None, 0.0, *kept)
    for tensor in kept:
        tensor.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _core.observe_rows(values, _core.OBSERVE_ROOTS, None, 0.0, *kept)
    for _ in range(1000):
        values.mul_(1.01)
        graph.replay()
        seen.append(values.cpu())
    assert_observed(kept, list(torch.cat(seen, 1).sqrt()))


@pytest.mark.gpu
def test_the_same_bits_every_time() -> None:
    values = torch.rand(3, 3 * CHUNK + 77, dtype=torch.float64).cuda()
    found = []
    for _ in range(2):
        kept = new(3, "cuda")
        _core.observe_rows(values, _core.OBSERVE_VALUES, None, 0.0, *kept)
        found.append(kept)
    for one, other in zip(*found, strict=True):
        assert same_bits(one.cpu(), other.cpu())


REFUSED: dict[str, tuple[Callable[[], tuple[object, ...]], str]] = {
    "values": (
        lambda: (torch.zeros(3), 0, None, 0.0, *new(3, "cpu")),
        r"^values: expected shape \[places, B\], got \[3\]",
    ),
    "rows": (lambda: (torch.zeros(3, 2), 0, None, 0.0, *new(2, "cpu")), r"^rows: .* \[3, 7\] .* got float64 \[2, 7\]"),
    "bins": (
        lambda: (torch.zeros(3, 2), 0, None, 0.0, new(3, "cpu")[0], new(2, "cpu")[1]),
        r"^bins: .* \[3, 32768\] .* got int64 \[2, 32768\]",
    ),
    "no gradient": (lambda: (torch.zeros(3, 2), 2, None, 0.0, *new(3, "cpu")), r"^gradient: .* float64 .* shape \[2\]"),
    "gradient": (
        lambda: (torch.zeros(3, 2), 2, torch.zeros(3).double(), 0.0, *new(3, "cpu")),
        r"^gradient: .* float64 .* shape \[2\]",
    ),
    "what": (lambda: (torch.zeros(3, 2), 3, None, 0.0, *new(3, "cpu")), r"^what: expected one of 0 to 2, got 3"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_refusals(which: str) -> None:
    arguments, words = REFUSED[which]
    with pytest.raises(ValueError, match=words):
        _core.observe_rows(*arguments())
