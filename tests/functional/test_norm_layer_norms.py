"""norm_layer_norms_sq: scale and shift of norm layers, from the layer's input."""

from __future__ import annotations

import pytest
import torch
from cases import shape_id, values
from devices import placed_as_it_is
from oracle import DTYPES, assert_close, eps_of, in_layout

from lipcore import functional
from lipcore.functional import reference

SIZES = [(2, 3, 5), (1, 1, 16), (3, 64, 33), (2, 5, 1030), (1, 300, 2049), (20, 1, 17)]


def check(grad, x, *, eps=1e-5, center=True, offsets=None, place=lambda t: t):
    """xhat is float32 (float64 for float64), so that the error is relative to the terms."""
    made = {"eps": eps, "center": center, "offsets": offsets}
    truth = reference.norm_layer_norms_sq(grad, x, **made)
    apart = grad.detach().double().abs()
    scale = reference.norm_layer_norms_sq(apart, x, **made)  # of xhat's own signs: terms add up in the shift alone
    scale = torch.maximum(scale, reference.affine_norms_sq(apart, torch.ones_like(apart), offsets=offsets)[[1, 1]])
    got = functional.norm_layer_norms_sq(place(grad), place(x), **{**made, "offsets": place(offsets)})
    assert got.dtype == torch.float64
    digits = torch.float64 if grad.dtype == torch.float64 else torch.float32
    assert_close(got.cpu(), truth, scale=scale, eps=eps_of(digits), k=40)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=shape_id)
def test_rows(size, dtype, center, isa):
    check(values(size, DTYPES[dtype]), values(size, DTYPES[dtype], 1), center=center)


@pytest.mark.gpu
@pytest.mark.parametrize("center", [True, False])
def test_rows_on_a_device(center):
    place = lambda t: t if t is None else placed_as_it_is(t)  # noqa: E731
    check(values((2, 9, 33), torch.float32), values((2, 9, 33), torch.float32, 1), center=center, place=place)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "requires_grad", "imag_of_conjugate"])
def test_layouts(layout):
    grad, x = (in_layout(values((3, 9, 20), torch.float32, seed), layout) for seed in (0, 1))
    check(grad, x)


@pytest.mark.parametrize("center", [True, False])
def test_packed_documents(center, isa):
    grad, x = values((23, 17), torch.float32), values((23, 17), torch.float32, 1)
    check(grad, x, center=center, offsets=torch.tensor([0, 0, 1, 8, 23]))


def test_rows_far_from_zero_and_an_element_far_from_its_row(isa):
    """The mean is taken off before anything is rounded."""
    grad, far = values((2, 6, 40), torch.float32), values((2, 6, 40), torch.float32, 1) + 4096.1
    check(grad, far)
    far[:, :, 0] -= 30000.0
    check(grad, far)


def test_constant_rows_have_no_direction(isa):
    grad = values((2, 3, 20), torch.float32)
    x = torch.full((2, 3, 20), 0.1)
    found = functional.norm_layer_norms_sq(grad, x, eps=1e-5)
    assert (found[0] < 1e-6).all()
    assert functional.norm_layer_norms_sq(grad, torch.zeros(2, 3, 20), eps=0.0, center=False)[0].isnan().all()


def test_non_finite_values_stay_in_their_sample(isa):
    grad, x = values((4, 5, 20), torch.float32), values((4, 5, 20), torch.float32, 1)
    fine = functional.norm_layer_norms_sq(grad, x, eps=1e-5)
    x[1, 4, 2], grad[2, 0, 0] = torch.nan, torch.inf
    found = functional.norm_layer_norms_sq(grad, x, eps=1e-5)
    assert found[0, 1].isnan()
    assert not found[:, 2].isfinite().any()
    assert torch.equal(found[:, [0, 3]], fine[:, [0, 3]])
    assert found[1, 1] == fine[1, 1]


def test_gradients_that_leave_the_range_of_float64():
    grad = torch.full((1, 3, 4), 1e200, dtype=torch.float64)
    grad[0, 1] *= -2
    x = values((1, 3, 4), torch.float64)
    assert functional.norm_layer_norms_sq(grad, x, eps=1e-5)[1].tolist() == [0.0]


def test_any_number_of_threads_gives_the_same_bits(two_threads):
    grad, x = values((300, 9, 130), torch.float32), values((300, 9, 130), torch.float32, 1)
    two = functional.norm_layer_norms_sq(grad, x, eps=1e-5)
    torch.set_num_threads(1)
    assert torch.equal(functional.norm_layer_norms_sq(grad, x, eps=1e-5), two)


def test_nothing():
    for size in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        found = functional.norm_layer_norms_sq(torch.empty(size), torch.empty(size), eps=1e-5)
        assert found.shape == (2, size[0])
        assert not found.any()


ONES = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: functional.norm_layer_norms_sq(ONES, ONES, eps=-1.0), r"^eps: .*at least 0, got -1.0"),
        (lambda: functional.norm_layer_norms_sq(ONES, ONES, eps=float("nan")), r"^eps: .*got nan"),
        (lambda: functional.norm_layer_norms_sq(ONES, ONES.double(), eps=0.1), r"^x: expected the dtype of grad"),
        (lambda: functional.norm_layer_norms_sq(ONES, ONES[:1], eps=0.1), r"^x: expected the shape of grad"),
    ],
)
def test_what_cannot_be_used(call, words):
    with pytest.raises(ValueError, match=words):
        call()
