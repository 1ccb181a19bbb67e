"""trajectory_step against the float64 specification: rows, new prev and deviation, for every dtype, layout and size."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CHUNK, FEW_LAYOUTS, FEW_STEP_LISTS, STEP_LISTS, thinned, values
from devices import sized
from oracle import DTYPES, LAYOUTS, assert_close, bits, eps_of, in_layout, same_bits

from lipcore import functional
from lipcore.functional import reference

COLUMNS = ("dw_sq", "m2_increment", "max_abs_dw", "weight_sq", "nonfinite")


def lists_of(shapes, dtype, device="cpu"):
    """params, prev, deviation that belong to a training run: a past and a small step."""
    prev = [values(s, dtype, 10 + i) for i, s in enumerate(shapes)]
    params = [
        (p.double() + 0.01 * values(s, torch.float64, 30 + i)).to(dtype)
        for i, (p, s) in enumerate(zip(prev, shapes, strict=True))
    ]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    deviation = [0.06 * values(s, wide, 20 + i) for i, s in enumerate(shapes)]
    return [[t.to(device) for t in tensors] for tensors in (params, prev, deviation)]


def naive_step(params, prev, deviation, count):
    """What one would write in torch: differences, products and sums in the working type."""
    rows = []
    for w, p, d in zip(params, prev, deviation, strict=True):
        w, p = w.detach().to(d.dtype), p.to(d.dtype)
        dw = w - p
        before = dw + d
        after = before - before / count
        largest = dw.abs().max() if dw.numel() else dw.sum()
        row = [dw.square().sum(), (before * after).sum(), largest, w.square().sum(), dw.sum() * 0]
        rows.append(torch.stack([v.double().cpu() for v in row]))
    return torch.stack(rows) if rows else torch.zeros(0, 5, dtype=torch.float64)


def check(params, prev, deviation, count):
    truth, new_prev, new_deviation = reference.trajectory_step(params, prev, deviation, count)
    naive = naive_step(params, prev, deviation, count)
    old = [d.clone() for d in deviation]
    moved = [(w.detach().double() - p.double()).abs() for w, p in zip(params, prev, strict=True)]
    before = [bits(t) for t in params]
    got = functional.trajectory_step(params, prev, deviation, count)
    assert got.dtype == torch.float64
    assert got.shape == (len(params), len(COLUMNS))
    assert all(torch.equal(a, bits(b)) for a, b in zip(before, params, strict=True)), "params written to"
    for i, (w, p, d) in enumerate(zip(params, prev, deviation, strict=True)):
        eps = eps_of(d.dtype)
        size = moved[i] + old[i].double().abs()
        scale = truth[i].cpu().abs().clone()
        scale[1] = size.square().sum()  # its factors cancel: at count 1 the truth is 0
        assert_close(got[i], truth[i], naive=naive[i], scale=scale, eps=eps)
        assert_close(d, new_deviation[i], scale=size, eps=eps)
        assert same_bits(p.to(w.dtype), w.detach().resolve_neg()), "prev is not bitwise the parameter"
        assert new_prev[i].shape == p.shape


@pytest.mark.parametrize("count", [1, 1000])
@pytest.mark.parametrize(("shapes", "dtype"), thinned(STEP_LISTS, FEW_STEP_LISTS))
def test_sizes(shapes, dtype, count, isa):
    check(*lists_of(STEP_LISTS[shapes], DTYPES[dtype]), count)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_on_cuda(dtype):
    for shapes in sized(STEP_LISTS, FEW_STEP_LISTS):
        for count in (1, 1000):
            check(*lists_of(STEP_LISTS[shapes], DTYPES[dtype], "cuda"), count)


@pytest.mark.parametrize(("layout", "dtype"), thinned(LAYOUTS, FEW_LAYOUTS))
def test_layouts_of_what_is_read(layout, dtype, isa):
    """params may have any strides; state stays as it lies."""
    params, prev, deviation = lists_of([(3, 5), (17,), (2, 3, 5, 7), (2, 3, 2, 3, 3)], DTYPES[dtype])
    params = [t if (other := in_layout(t, layout)) is None else other for t in params]
    check(params, prev, deviation, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["transposed", "channels_last", "offset"])
def test_layouts_of_the_state(layout, dtype, isa):
    """A dense parameter keeps its order of memory, and so does its state."""
    shapes = [(3, 5), (2, 3, 5, 7), (2, 3, 2, 3, 3), (4 * CHUNK // 64, 64)]
    params, prev, deviation = (
        [t if (other := in_layout(t, layout)) is None else other for t in tensors]
        for tensors in lists_of(shapes, DTYPES[dtype])
    )
    strides = [t.stride() for t in (*prev, *deviation)]
    check(params, prev, deviation, 3)
    assert strides == [t.stride() for t in (*prev, *deviation)]


@pytest.mark.parametrize(
    ("size", "dtype"), thinned([(1,), (17,), (CHUNK + 1,), (4 * CHUNK + 3,)], [(17,), (CHUNK + 1,)])
)
def test_non_finite_elements(dtype, size, isa):
    """They stand still; their tensor has a row of NaN but for the increment and their number, and the others are
    unaffected."""
    lists = lists_of([(5,), size, size, (5,)], DTYPES[dtype])
    params, prev, deviation = lists
    bad = {1: math.nan, 2: -math.inf}
    for i, value in bad.items():
        params[i][-1] = value
        params[i][0] = math.nan
    standing = [[t.clone() for t in tensors] for tensors in lists]
    standing[0] = [torch.where(w.isfinite(), w, p) for w, p in zip(params, prev, strict=True)]
    others = [[tensors[0].clone(), tensors[3].clone()] for tensors in lists]
    got = functional.trajectory_step(params, prev, deviation, 2)
    expected = functional.trajectory_step(*standing, 2)
    for i in bad:
        assert got[i, [0, 2, 3]].isnan().all()
        assert same_bits(got[i, 1], expected[i, 1])
        assert got[i, 4] == min(*size, 2)
        assert same_bits(prev[i], standing[1][i])
        assert same_bits(deviation[i], standing[2][i])
    assert same_bits(got[[0, 3]], functional.trajectory_step(*others, 2))
    assert same_bits(prev[0], params[0])
    assert same_bits(deviation[3], others[2][1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_of_float64(dtype, isa):
    """Squares of elements near the ends of the type's range neither overflow nor vanish."""
    info = torch.finfo(DTYPES[dtype])
    small, large = (info.tiny, info.max / 2) if dtype != "f64" else (1e-150, 1e150)
    for value in (small, large):
        w = torch.full((35,), value, dtype=DTYPES[dtype])
        state = [[torch.zeros_like(w)], [torch.zeros(35, dtype=torch.float64 if dtype == "f64" else None)]]
        got = functional.trajectory_step([w], *state, 1)[0]
        square = 35 * float(w[0]) ** 2
        expected = torch.tensor([square, 0, float(w[0]), square, 0], dtype=torch.float64)
        assert_close(got, expected, scale=torch.full_like(expected, square) + expected, eps=eps_of(torch.float64), k=40)


def test_out_is_written_and_returned():
    lists = lists_of([(5,), (3, 4)], torch.float32)
    again = [[t.clone() for t in tensors] for tensors in lists]
    out = torch.full((2, 5), math.nan, dtype=torch.float64)
    assert functional.trajectory_step(*lists, 2, out=out) is out
    assert same_bits(out, functional.trajectory_step(*again, 2))


def test_tuples_parameters_and_gradients():
    params, prev, deviation = lists_of([(5,), (3, 4)], torch.float32)
    twin = [t.clone() for t in prev], [t.clone() for t in deviation]
    a = functional.trajectory_step(tuple(map(torch.nn.Parameter, params)), tuple(prev), tuple(deviation), 2)
    assert not a.requires_grad
    assert same_bits(a, functional.trajectory_step(params, *twin, 2))


def test_params_may_share_memory_with_each_other():
    """Tied parameters are only read."""
    w = values((7,), torch.float32)
    state = [[torch.zeros(7) for _ in range(2)] for _ in range(2)]
    got = functional.trajectory_step([w, w], *state, 1)
    assert same_bits(got[0], got[1])


def test_steps_one_after_the_other_are_a_variance(isa):
    """From a start that counts: the increments add up to the squares around the mean, which is prev - deviation. Of
    weights of 1 that move by 1e-6 too, and by whole weights."""
    torch.manual_seed(0)
    for size in (1e-6, 1.0):
        points = (1 + size * torch.randn(60, 35).cumsum(0)).float()
        prev, deviation, m2 = [points[0].clone()], [torch.zeros(35)], 0.0
        for i, w in enumerate(points[1:]):
            m2 += float(functional.trajectory_step([w], prev, deviation, i + 2)[0, 1])
        centred = points.double() - points.double().mean(0)
        assert m2 == pytest.approx(float(centred.square().sum()), rel=1e-6)
        assert_close(deviation[0], centred[-1], scale=centred.abs().amax(0), eps=eps_of(torch.float32))
