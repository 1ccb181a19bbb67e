"""Ids of rows by the weighted pass alone, of any tensors in a graph: it knows nothing of layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lipcore import functional
from lipcore.capture.proof import BITS, BITS_OF_FLOAT16, MIXED, NO_GRADIENT, NOT_FINITE, Point, row_ids
from lipcore.capture.seeds import seeds_of
from lipcore.layers import Batch

B, T, F = 6, 4, 3
ORDER = torch.tensor([4, 0, 5, 1, 3, 2])
EACH = torch.arange(B).repeat_interleave(T)


def rows(gradient: Tensor) -> Tensor:
    """Of [..., F], every row."""
    return functional.sample_norms(gradient.reshape(-1, gradient.shape[-1])).square()


def ids_of(make: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor], dim: int = 0) -> list[int]:
    """The rows of make(x), x [B, T, F] or [T, B, F], when back() makes the output of it."""
    torch.manual_seed(0)
    x = torch.randn((B, T, F) if dim == 0 else (T, B, F), requires_grad=True)
    hidden = make(x * 1)
    output = back(hidden * 2)
    (found,) = row_ids(seeds_of(output, Batch(B, dim)), [Point(hidden.grad_fn, rows)])
    assert found is not None
    assert found.rounding == 0
    return found.ids.tolist()


def test_rows_of_samples() -> None:
    assert ids_of(lambda x: x.flatten(0, 1), lambda h: h.reshape(B, T, F)) == EACH.tolist()


def test_permuted_samples() -> None:
    assert ids_of(lambda x: x[ORDER], lambda h: h[ORDER.argsort()]) == ORDER.repeat_interleave(T).tolist()


def test_time_first() -> None:
    assert ids_of(lambda x: x * 1, lambda h: h, dim=1) == list(range(B)) * T
    assert ids_of(lambda x: x.transpose(0, 1), lambda h: h.transpose(0, 1)) == list(range(B)) * T


def test_windows() -> None:
    """[B, T] in windows of two positions, windows first."""

    def windows(x: Tensor) -> Tensor:
        return x.reshape(B, 2, 2, F).transpose(0, 1).reshape(2 * B, 2, F)

    found = ids_of(windows, lambda h: h.reshape(2, B, 2, F).transpose(0, 1).reshape(B, T, F))
    assert found == torch.arange(B).repeat_interleave(2).repeat(2).tolist()


def test_rows_sorted_by_expert() -> None:
    torch.manual_seed(1)
    order = torch.randint(3, (B * T,)).argsort(stable=True)
    found = ids_of(lambda x: x.reshape(-1, F)[order], lambda h: h[order.argsort()].reshape(B, T, F))
    assert found == EACH[order].tolist()


def test_rows_of_several_samples_and_of_none() -> None:
    def back(hidden: Tensor) -> Tensor:
        first, *others = hidden.unbind(1)
        return torch.stack([first + first.roll(1, 0), *others[:-1], others[-1] * 0], 1)

    found = torch.tensor(ids_of(lambda x: x * 1, back)).reshape(B, T)
    assert (found[:, 0] == MIXED).all()
    assert (found[:, 1:-1] == torch.arange(B)[:, None]).all()
    assert (found[:, -1] == NO_GRADIENT).all()


def test_rows_that_are_not_finite() -> None:
    scale = torch.ones(B, 1, 1)
    scale[2] = torch.inf
    found = torch.tensor(ids_of(lambda x: x * 1, lambda h: h * scale)).reshape(B, T)
    assert (found[2] == NOT_FINITE).all()
    assert (found[[0, 1, 3, 4, 5]] == torch.tensor([0, 1, 3, 4, 5])[:, None]).all()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 255, 256, 257, 5000])
@pytest.mark.parametrize("bits", [BITS, BITS_OF_FLOAT16])
def test_every_number_of_samples(size: int, bits: int) -> None:
    order = torch.randperm(size)
    hidden = torch.randn(size, 2, requires_grad=True) * 1
    points = [Point(hidden.grad_fn, rows)]
    (found,) = row_ids(seeds_of(hidden[order.argsort()] * 2, Batch(size)), points, bits=bits)
    assert found is not None
    assert torch.equal(found.ids, order)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nothing_is_rounded(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()).to(dtype) for _ in range(6)]
    x = torch.randn(40, 8, dtype=dtype)
    points = []
    for part in parts:
        x = part(x)
        points.append(Point(x.grad_fn, rows))
    bits = BITS_OF_FLOAT16 if dtype == torch.float16 else BITS
    for found in row_ids(seeds_of(x.softmax(-1), Batch(40)), points, bits=bits):
        assert found is not None
        assert found.rounding == 0
        assert found.ids.tolist() == list(range(40))


def test_no_parameter_gets_a_gradient_and_its_hooks_see_none() -> None:
    layer, seen = nn.Linear(4, 4), []
    layer.weight.register_hook(lambda grad: seen.append(grad))
    hidden = torch.tanh(layer(torch.randn(3, 4)))
    row_ids(seeds_of(layer(hidden), Batch(3)), [Point(hidden.grad_fn, rows)])
    assert layer.weight.grad is None
    assert not seen
