"""normalized_norms: r = ||delta|| / |dL/dyhat| per sample, and which samples have none."""

from __future__ import annotations

import math

import pytest
import torch
from cases import ROW_SHAPES, row_cases, values
from oracle import DTYPES, assert_close, eps_of, in_layout, same_bits

from lipcore import functional
from lipcore.functional import reference

PRECISION = {"eps": eps_of(torch.float64), "k": 450}


@pytest.mark.parametrize(
    ("shape", "dtype", "layout"), row_cases([*ROW_SHAPES, (65, 3), (65537, 2)], ["contiguous", "sliced"])
)
def test_rows(shape, dtype, layout, isa):
    delta = in_layout(values(shape, dtype), layout)
    output_grad = values(shape[:1], dtype, seed=1)  # some zeros among them
    r, skipped = functional.normalized_norms(delta, output_grad)
    truth, truly_skipped = reference.normalized_norms(delta, output_grad)
    assert r.dtype == torch.float64
    assert skipped.dtype == torch.int64
    assert skipped.shape == ()
    assert skipped == truly_skipped
    assert_close(r, truth, **PRECISION)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_on_cuda(dtype):
    for shape in [(0, 3), (1, 1), (7, 129), (65, 3, 5)]:
        delta, output_grad = (values(s, DTYPES[dtype], 1).cuda() for s in (shape, shape[:1]))
        r, skipped = functional.normalized_norms(delta, output_grad)
        truth, truly_skipped = reference.normalized_norms(delta, output_grad)
        assert skipped == truly_skipped
        assert_close(r, truth, **PRECISION)


@pytest.mark.parametrize(("shape", "dtype", "layout"), row_cases([(17,), (17, 1), (1, 17, 1, 1)]))
def test_layouts_of_the_output_gradient(shape, dtype, layout, isa):
    delta = values((17, 5), dtype)
    output_grad = in_layout(values(shape, dtype, 1), layout)
    r, skipped = functional.normalized_norms(delta, output_grad)
    truth, truly_skipped = reference.normalized_norms(delta, output_grad)
    assert skipped == truly_skipped
    assert_close(r, truth, **PRECISION)


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("shape", [(6,), (6, 1), (1, 6), (1, 6, 1), (2, 3), (3, 2, 1)])
def test_shapes_of_the_output_gradient(shape, step):
    """B values in any shape, taken in row-major order, or refused by name; never memory beside them."""
    delta = values((6, 4), torch.float32)
    output_grad = torch.arange(1.0, 1.0 + 6 * step)[::step].reshape(shape)
    try:
        r, _ = functional.normalized_norms(delta, output_grad)
    except ValueError as error:
        assert str(error).startswith("output_grad: ")  # noqa: PT017
        assert sum(n > 1 for n in shape) > 1, "one dimension of B values is what output_grad is"
    else:
        assert_close(r, reference.normalized_norms(delta, output_grad)[0], **PRECISION)


def test_which_samples_are_skipped(isa):
    tiny = 5e-324
    output_grad = torch.tensor([1.0, 0.0, -0.0, math.nan, math.inf, -math.inf, -2.0, tiny], dtype=torch.float64)
    delta = torch.full((8, 4), 1.0, dtype=torch.float64)
    delta[7] = tiny
    r, skipped = functional.normalized_norms(delta, output_grad)
    nan = math.nan
    assert_close(r, torch.tensor([2.0, nan, nan, nan, nan, nan, 1.0, 2.0], dtype=torch.float64), **PRECISION)
    assert skipped == 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_that_is_not_finite_stays_visible(dtype):
    """Only output_grad decides about skipping: a NaN in delta is a finding, not a sample without information."""
    delta = torch.tensor([[math.nan, 1.0], [math.inf, 1.0], [3.0, 4.0]], dtype=DTYPES[dtype])
    r, skipped = functional.normalized_norms(delta, torch.ones(3, dtype=DTYPES[dtype]))
    assert_close(r, torch.tensor([math.nan, math.inf, 5.0], dtype=torch.float64), **PRECISION)
    assert skipped == 0


@pytest.mark.parametrize("scale", [2.0**-1, 2.0**-20, -1.0, 2.0**16])
def test_a_scale_of_the_loss_cancels(scale):
    """Powers of two change no bit of r: mean reduction, a factor 1/2 and loss scaling make no difference."""
    delta, output_grad = values((33, 9), torch.float64), values((33,), torch.float64, 2)
    plain, scaled = (functional.normalized_norms(delta * c, output_grad * c) for c in (1.0, scale))
    assert same_bits(plain[0], scaled[0])
    assert plain[1] == scaled[1]


def test_saturated_logits():
    """A sigmoid at -55 passes gradients of 1e-24 on; their ratio must survive."""
    delta = torch.full((1, 16), 1e-24)
    r, skipped = functional.normalized_norms(delta, torch.tensor([1e-24]))
    assert skipped == 0
    assert_close(r, torch.tensor([4.0], dtype=torch.float64), **PRECISION)


def test_mixed_dtypes():
    delta, output_grad = values((7, 3), torch.bfloat16), values((7,), torch.float64, 1)
    r, skipped = functional.normalized_norms(delta, output_grad)
    truth, truly_skipped = reference.normalized_norms(delta, output_grad)
    assert skipped == truly_skipped
    assert_close(r, truth, **PRECISION)


def test_empty():
    r, skipped = functional.normalized_norms(torch.empty(0, 3), torch.empty(0))
    assert r.shape == (0,)
    assert skipped == 0
    r, skipped = functional.normalized_norms(torch.empty(2, 0), torch.tensor([0.0, 2.0]))
    assert r.isnan().tolist() == [True, False]
    assert r[1] == 0
    assert skipped == 1


def test_registered_operator():
    torch.library.opcheck(torch.ops.lipcore.normalized_norms.default, (torch.randn(3, 5), torch.ones(3)))
