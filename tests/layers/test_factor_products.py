"""Weighted sums, inner products and Gram matrices of every layer's factors against gradients of single samples."""

from __future__ import annotations

import pytest
import torch
from rule_cases import CASES
from rule_factors import factors_of, make
from rule_oracle import gradients
from test_layer_rules import SAMPLES, sampler
from test_layer_sharing import OFFSETS, PACKED, document, tied
from torch import Tensor

from lipcore import layers
from lipcore.layers import Batch, Dense, Outer, Sum, factor_indexed, factor_outer, factor_patches, factor_products
from lipcore.layers.factor_stacked import Stacked
from lipcore.layers.projections import projected

TOLERANCE = {torch.float64: 1e-12}


def check(factor: layers.Factor, truth: Tensor, tolerance: float) -> None:
    """All products of one parameter's gradients [B, *shape]; errors are measured by the lengths of what is
    multiplied."""
    samples = len(truth)
    torch.manual_seed(7)
    c, references = torch.randn(samples).double(), torch.randn(3, *truth.shape[1:]).double()
    flat = truth.flatten(1)
    lengths = flat.norm(dim=1) + 1e-30
    if samples:
        found = factor.weighted_sum(c)
        assert found.shape == truth.shape[1:]
        assert found.dtype in (torch.float32, torch.float64)
        error = (found.double() - torch.tensordot(c, truth, 1)).norm()
        assert error <= tolerance * (c.abs() * lengths).sum()
        error = (factor.projected_sum() - projected(truth.sum(0))).norm()
        assert error <= 10 * tolerance * lengths.sum()
    dots, gram = factor.dots(references), factor.gram()
    assert dots.dtype == gram.dtype == torch.float64
    assert (dots.shape, gram.shape) == ((3, samples), (samples, samples))
    wide, others = references.flatten(1), references.flatten(1).norm(dim=1)
    assert ((dots - wide @ flat.T).abs() <= tolerance * others[:, None] * lengths).all()
    assert ((gram - flat @ flat.T).abs() <= tolerance * lengths[:, None] * lengths).all()


def run(name: str, dtype: torch.dtype, samples: int = SAMPLES, times: int = 1, noncontiguous: bool = False) -> None:
    case = CASES[name]
    made = [make(case, samples, dtype, noncontiguous) for _ in range(times)]
    module, calls = made[0][0], [(a, k) for _, a, k in made]
    batch = Batch(samples, case.batch_dim if case.own_dim else 0)
    factors, cotangents = factors_of(module, calls, batch, 1.0, noncontiguous)
    truth = gradients(module, calls, cotangents, sampler(case.batch_dim, samples), samples)
    assert factors.keys() == truth.keys()
    for key, factor in factors.items():
        assert samples == 0 or factor.shape == truth[key].shape[1:]
        check(factor, truth[key], TOLERANCE.get(dtype, 2e-5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["f64", "f32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_layer(name: str, dtype: torch.dtype) -> None:
    run(name, dtype)


@pytest.mark.parametrize("name", CASES)
def test_strided(name: str) -> None:
    run(name, torch.float32, noncontiguous=True)


@pytest.mark.parametrize("name", CASES)
def test_one_sample(name: str) -> None:
    run(name, torch.float32, samples=1)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.empty_batch])
def test_no_sample(name: str) -> None:
    run(name, torch.float32, samples=0)


@pytest.mark.parametrize("name", CASES)
def test_called_twice(name: str) -> None:
    run(name, torch.float64, times=2)


@pytest.mark.parametrize("name", CASES)
def test_in_slices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (factor_products, factor_outer, factor_patches, factor_indexed):
        monkeypatch.setattr(module, "CHUNK", 40)
    run(name, torch.float64)


@pytest.mark.parametrize("name", PACKED)
def test_packed_documents(name: str) -> None:
    module, inputs = PACKED[name][0]().double(), PACKED[name][1](9)
    x = inputs.double() if inputs.is_floating_point() else inputs
    calls = [((x,) * (1 + (name == "bilinear")), {})]
    factors, cotangents = factors_of(module, calls, Batch(4, offsets=OFFSETS))
    truth = gradients(module, calls, cotangents, document, 4)
    for key, factor in factors.items():
        check(factor, truth[key], 1e-12)


def test_rows_behind_the_last_document_belong_to_none() -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(9, 3).double(), torch.randn(9, 2).double()
    offsets = torch.tensor([0, 2, 6])
    for factor in (
        Outer(x, grad, offsets),
        layers.RowSum(grad, None, offsets),
        layers.Indexed(torch.randint(4, (9,)), grad, 4, offsets=offsets),
    ):
        check(factor, torch.stack([factor.dense(0), factor.dense(1)]), 1e-12)


@pytest.mark.parametrize("packed", [True, False])
def test_rows_of_which_each_meets_one_of_several_parts(packed: bool) -> None:
    torch.manual_seed(0)
    offsets = torch.tensor([0, 3, 3, 8, 9, 10, 11]) if packed else None
    shape = (12,) if packed else (6, 2)
    x, grad = torch.randn(*shape, 4).double(), torch.randn(*shape, 5).double()
    for pairs in (Outer(x, grad, offsets), layers.RowSum(grad, None, offsets)):
        factor = Stacked(pairs, 3)
        dense = torch.stack([factor.dense(0), factor.dense(1)])
        assert dense.shape == (2, 3, *pairs.shape)
        check(factor, dense, 1e-12)


@pytest.mark.parametrize("shape", [(), (7,), (5, 7), (3, 5, 7), (3, 5, 2, 2), (0, 3), (3, 0)])
def test_projections_are_those_of_one_linear_map_that_keeps_lengths(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    one, other = torch.randn(2, *shape).double()
    sum_of = projected(one) + projected(other)
    assert sum_of.dtype == torch.float64
    torch.testing.assert_close(projected(one + other), sum_of, rtol=0, atol=1e-12)
    for element in torch.eye(one.numel()).double():  # none is invisible
        assert (projected(element.reshape(shape)).abs() > 0.1).all()
    if one.numel() > 4:
        found = torch.stack([projected(each) for each in torch.randn(500, *shape).double()])
        assert 0.5 < float(found.square().mean() / one.numel()) < 2


@pytest.mark.parametrize(("tokens", "positions"), [(1, 1), (7, 7), (17, 3), (2, 0)])
def test_embedding_tied_to_a_head(tokens: int, positions: int) -> None:
    embedding, head = tied(tokens, positions)
    joined = embedding.join(head)
    assert isinstance(joined, layers.Tied)
    check(joined, torch.stack([joined.dense(b) for b in range(3)]), 1e-12)


def test_factors_without_a_closed_form() -> None:
    torch.manual_seed(0)
    x, g = torch.randn(3, 2, 4).double(), torch.randn(3, 2, 4).double()
    joined = Outer(x, g).join(Dense(torch.randn(3, 4, 4).double())).join(Outer(g, x))
    assert isinstance(joined, Sum)
    check(joined, torch.stack([joined.dense(b) for b in range(3)]), 1e-12)


class Own(layers.Factor):
    """A factor of a user's, with what a factor must have and nothing else."""

    def __init__(self, rows: Tensor) -> None:
        self._own = rows

    @property
    def samples(self) -> int:
        return len(self._own)

    def norms_sq(self) -> Tensor:
        return self._own.flatten(1).square().sum(1)

    def dense(self, sample: int) -> Tensor:
        return self._own[sample]


@pytest.mark.parametrize("samples", [0, 1, 3])
def test_a_factor_of_ones_own(samples: int) -> None:
    rows = torch.randn(samples, 2, 3).double()
    check(Own(rows), rows, 1e-12)
    if samples:
        check(layers.Blocks([Own(rows), Own(rows[:, :1])]), torch.cat([rows, rows[:, :1]], 1), 1e-12)


def test_both_ways_to_a_gram_of_sequences() -> None:
    torch.manual_seed(0)
    for tokens, features in ((2, 50), (50, 2)):
        factor = Outer(torch.randn(4, tokens, features).double(), torch.randn(4, tokens, features).double())
        check(factor, torch.stack([factor.dense(b) for b in range(4)]), 1e-12)
