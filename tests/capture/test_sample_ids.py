"""Whose rows a layer's gradient has: kept over several proofs, and norms given to the right samples by it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lipcore import functional
from lipcore.capture.proof import MIXED, NO_GRADIENT, NOT_FINITE, Point, row_ids
from lipcore.capture.sample_ids import SampleIds
from lipcore.capture.seeds import seeds_of
from lipcore.layers import Batch


def found(*ids: int, size: int = 3) -> SampleIds:
    return SampleIds(torch.tensor(ids), size)


def test_rows_in_order_and_permuted() -> None:
    ordered, permuted = found(0, 1, 2), found(2, 0, 1)
    assert ordered.in_order
    assert not permuted.in_order
    assert ordered.is_permutation
    assert permuted.is_permutation
    assert permuted.rows_of_samples(torch.tensor([20.0, 0.0, 10.0])).tolist() == [0, 10, 20]
    assert permuted.rows_of_samples(torch.tensor([[2, 0, 1], [5, 3, 4]])).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_several_rows_per_sample() -> None:
    rows = found(0, 1, 2, 0, 1, 2)
    assert rows.in_order
    assert rows.known
    assert not rows.is_permutation
    with pytest.raises(ValueError, match="6 of them are no permutation of 3 samples"):
        rows.rows_of_samples(torch.zeros(6))


@pytest.mark.parametrize("other", [MIXED, NO_GRADIENT, NOT_FINITE])
def test_rows_that_are_not_known(other: int) -> None:
    rows = found(0, other, 2)
    assert not rows.known
    assert not rows.in_order
    assert not rows.is_permutation
    assert rows.mixed is (other == MIXED)


@pytest.mark.parametrize("missing", [NO_GRADIENT, NOT_FINITE])
def test_a_later_proof_fills_what_an_earlier_one_left_open(missing: int) -> None:
    rows = found(2, missing, 1)
    rows.add(found(missing, 0, 1))
    assert rows.ids.tolist() == [2, 0, 1]
    assert rows.steady


def test_samples_that_move_from_pass_to_pass_are_not_steady() -> None:
    rows = found(2, 0, 1)
    rows.add(found(0, 1, 2))
    assert not rows.steady
    assert rows.ids.tolist() == [0, 1, 2]  # of the last proof
    rows.add(found(0, 1, 2))
    assert not rows.steady


def test_another_number_of_rows_is_another_finding() -> None:
    rows = found(2, 0, 1)
    rows.add(found(0, 1, 2, 0, 1, 2))
    assert not rows.steady
    assert len(rows.ids) == 6


def test_norms_of_moved_rows_are_those_of_the_samples() -> None:
    torch.manual_seed(0)
    first, last, x = nn.Linear(4, 6), nn.Linear(6, 1), torch.randn(5, 4)

    def loss(x: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.arange(len(x)).roll(2)
        hidden = first(x[order])
        return hidden, last(hidden.tanh()[order.argsort()])

    def rows(gradient: Tensor) -> Tensor:
        return functional.sample_norms(gradient).square()

    hidden, output = loss(x)
    (proved,) = row_ids(seeds_of(output, Batch(5)), [Point(hidden.grad_fn, rows)])
    assert proved is not None
    (gradient,) = torch.autograd.grad(output.square().sum(), hidden)
    expected = []
    for sample in x:
        hidden, output = loss(sample[None])
        expected.append(torch.autograd.grad(output.square().sum(), hidden)[0].double().norm())
    ids = SampleIds(proved.ids, 5)
    norms = functional.sample_norms(gradient)
    assert not torch.allclose(norms, torch.stack(expected))
    assert torch.allclose(ids.rows_of_samples(norms), torch.stack(expected), rtol=1e-6)
