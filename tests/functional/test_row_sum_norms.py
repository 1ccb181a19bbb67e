"""row_sum_norms_sq, affine_norms_sq and their twins for channels first: biases and element-wise scales."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import CHUNK, FEW_SIZES, ODD_SIZES, row_cases, shape_id, thinned, triples, values
from devices import placed_as_it_is, sized
from few import few
from oracle import DTYPES, assert_close, eps_of, in_layout, same_bits
from torch import Tensor

from lipcore import functional
from lipcore.functional import reference

# Products and sums are float64. Sums cancel, so the error is relative to the sum of the absolute values.
PRECISION = {"eps": eps_of(torch.float64), "k": 450}
PAIRS = [*itertools.product(DTYPES, DTYPES)]

# (B, T, F): every size in every place, then more than one block of columns and more than one part of rows.
SIZES = thinned(triples(ODD_SIZES), triples(FEW_SIZES))
LARGE = [(1, 5, 2049), (1, 3 * CHUNK // 64 + 1, 64), (2, 40, 1025), (300, 9, 33), (3, CHUNK // 2 + 1, 3)]


def close(got, truth, scale):
    got = got.cpu()
    assert got.dtype == torch.float64
    assert not got.requires_grad
    assert_close(got, truth, scale=scale, **PRECISION)
    assert (got >= 0).all()


def magnitude(x):
    return x.detach().double().abs()


def check_rows(grad, x, offsets=None, place=lambda t: t):
    scale = reference.affine_norms_sq(magnitude(grad), magnitude(x), offsets=offsets)
    both = reference.affine_norms_sq(grad, x, offsets=offsets)
    grad, x, offsets = map(place, (grad, x, offsets))
    close(functional.affine_norms_sq(grad, x, offsets=offsets), both, scale)
    close(functional.row_sum_norms_sq(grad, x, offsets=offsets), both[0], scale[0])
    close(functional.row_sum_norms_sq(grad, offsets=offsets), both[1], scale[1])


def check_channels(grad, x, place=lambda t: t):
    scale = reference.channel_affine_norms_sq(magnitude(grad), magnitude(x))
    both = reference.channel_affine_norms_sq(grad, x)
    grad, x = map(place, (grad, x))
    close(functional.channel_affine_norms_sq(grad, x), both, scale)
    close(functional.channel_sum_norms_sq(grad, x), both[0], scale[0])
    close(functional.channel_sum_norms_sq(grad), both[1], scale[1])


@pytest.mark.parametrize(("size", "dtype"), SIZES)
def test_rows(size, dtype, isa):
    check_rows(values(size, DTYPES[dtype]), values(size, DTYPES[dtype], 1))


@pytest.mark.parametrize(("size", "dtype"), SIZES)
def test_channels(size, dtype, isa):
    check_channels(values(size, DTYPES[dtype]), values(size, DTYPES[dtype], 1))


@pytest.mark.parametrize("size", LARGE, ids=shape_id)
@pytest.mark.parametrize("layout", few(["contiguous", "transposed", "sliced"], 1))
def test_large(size, layout, two_threads):
    grad, x = (in_layout(values(size, torch.float32, seed), layout) for seed in (0, 1))
    check_rows(grad, x)
    check_channels(grad, x)


SHAPES = [(3,), (3, 5), (3, 4, 5), (2, 3, 5, 7), (2, 3, 1, 2, 5)]


@pytest.mark.parametrize(("shape", "dtype", "layout"), row_cases(SHAPES))
def test_layouts_of_rows(shape, dtype, layout, isa):
    grad, x = (in_layout(values(shape, dtype, seed), layout) for seed in (0, 1))
    check_rows(grad, x)
    check_rows(grad, values(shape, dtype, 2))


@pytest.mark.parametrize(("shape", "dtype", "layout"), row_cases(SHAPES[1:]))
def test_layouts_of_channels(shape, dtype, layout, isa):
    grad, x = (in_layout(values(shape, dtype, seed), layout) for seed in (0, 1))
    check_channels(grad, x)
    check_channels(grad, values(shape, dtype, 2))


@pytest.mark.parametrize(("grad_dtype", "x_dtype"), PAIRS)
def test_mixed_dtypes(grad_dtype, x_dtype, isa):
    grad, x = values((3, 17, 18), DTYPES[grad_dtype]), values((3, 17, 18), DTYPES[x_dtype], 1)
    check_rows(grad, x)
    check_channels(grad, x)


OFFSETS = {
    "one": [0, 23],
    "several": [0, 1, 8, 23],
    "empty ones": [0, 0, 5, 5, 5, 23, 23],
    "a document per row": [*range(24)],
}


@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize(
    ("integer", "dtype", "layout"),
    [
        *((torch.int64, "f32", layout) for layout in ("contiguous", "transposed", "sliced")),
        *((torch.int32, dtype, "sliced") for dtype in DTYPES),
    ],
)
def test_packed_documents(offsets, integer, dtype, layout, isa):
    grad, x = (in_layout(values((23, 17), DTYPES[dtype], seed), layout) for seed in (0, 1))
    check_rows(grad, x, torch.tensor(offsets, dtype=integer))


def test_packed_documents_are_what_single_ones_are(two_threads):
    grad, x = values((5000, 65), torch.float32), values((5000, 65), torch.float32, 1)
    offsets = torch.tensor([0, 3, 3, 4000, 5000])
    check_rows(grad, x, offsets)
    parts = [
        functional.affine_norms_sq(g[None], a[None])
        for g, a in zip(*(t.split([3, 0, 3997, 1000]) for t in (grad, x)), strict=True)
    ]
    torch.testing.assert_close(
        functional.affine_norms_sq(grad, x, offsets=offsets), torch.cat(parts, 1), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("size", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 2, 1)], ids=shape_id)
def test_nothing_with_the_strides_of_an_expanded_gradient(size):
    """As sum() sends it back."""
    grad = torch.ones(()).expand(size)
    check_rows(grad, torch.empty(size))
    check_channels(grad, torch.empty(size))
    check_rows(torch.empty(size).transpose(1, 2), grad.transpose(1, 2))


def test_nothing():
    check_rows(torch.empty(0, 3, 4), torch.empty(0, 3, 4))
    check_rows(torch.empty(2, 0, 4), torch.empty(2, 0, 4))
    check_rows(torch.empty(2, 3, 0), torch.empty(2, 3, 0))
    check_channels(torch.empty(0, 3, 4), torch.empty(0, 3, 4))
    check_channels(torch.empty(2, 0, 4), torch.empty(2, 0, 4))
    check_channels(torch.empty(2, 3, 0), torch.empty(2, 3, 0))
    assert functional.affine_norms_sq(torch.empty(0, 4), torch.empty(0, 4), offsets=torch.tensor([0])).shape == (2, 0)
    assert functional.row_sum_norms_sq(torch.empty(0, 4), offsets=torch.tensor([0, 0, 0])).tolist() == [0, 0]


@pytest.mark.parametrize("value", [1e-45, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_magnitudes(value, dtype, isa):
    grad = torch.full((2, 33, 17), value).to(DTYPES[dtype])
    grad[1, ::2] *= -1
    check_rows(grad, grad)
    check_channels(grad, grad)
    found = functional.affine_norms_sq(grad, grad)
    assert found.isfinite().all()
    assert (found[:, 0] > 0).all() or grad[0, 0, 0] == 0  # 1e-45 is 0 in bfloat16


def test_cancelling_terms(isa):
    """What is left of a sum that cancels to 1e-8 of its terms, which float32 sums lose."""
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(1, 512, 5, generator=generator).double()
    grad = torch.cat([terms, -terms * (1 + 1e-8)], 1)
    got, truth = functional.row_sum_norms_sq(grad), reference.row_sum_norms_sq(grad)
    torch.testing.assert_close(got, truth, rtol=1e-6, atol=0)
    narrow = torch.cat([terms.float(), -terms.float()], 1)
    narrow[0, 0, 0] += 1e-6
    truth = reference.row_sum_norms_sq(narrow)
    torch.testing.assert_close(functional.row_sum_norms_sq(narrow), truth, rtol=1e-6, atol=0)


def test_float64_products_that_leave_its_range(isa):
    """Finite input never becomes NaN: terms beyond float64's range that cancel."""
    grad = torch.tensor([[[1e200], [-1e200], [3.0]]], dtype=torch.float64)
    x = torch.tensor([[[1e200], [1e200], [1.0]]], dtype=torch.float64)
    assert functional.row_sum_norms_sq(grad, x).isfinite().all()
    found = functional.affine_norms_sq(grad, x)
    assert found[0].isfinite().all()
    assert found[1].tolist() == [9.0]
    largest = torch.tensor([[[1.7e308], [1.7e308], [-1.7e308], [-1.7e308]]], dtype=torch.float64)
    assert functional.row_sum_norms_sq(largest).tolist() == [0.0]
    assert functional.channel_sum_norms_sq(largest.transpose(1, 2)).tolist() == [0.0]


def test_non_finite_values_stay_in_their_sample(isa):
    grad = torch.ones(4, 5, 3)
    grad[1, 4, 2], grad[2, 0, 0] = torch.nan, torch.inf
    for dtype in (torch.float32, torch.float64):
        found = functional.affine_norms_sq(grad.to(dtype), torch.ones(4, 5, 3, dtype=dtype))
        assert found[:, 1].isnan().all()
        assert found[:, 2].isinf().all()
        assert (found[:, [0, 3]] == 75).all()


def test_results_are_detached():
    grad = torch.ones(2, 3, 4, requires_grad=True) * 1
    assert functional.affine_norms_sq(grad, grad).grad_fn is None
    assert functional.channel_affine_norms_sq(torch.nn.Parameter(torch.ones(2, 3)), grad[..., 0]).grad_fn is None


ONES = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: functional.row_sum_norms_sq(torch.tensor(1.0)), r"^grad: expected shape \[B, \.\.\., F\].*0-dim"),
        (lambda: functional.row_sum_norms_sq(ONES, torch.ones(2, 3, 5)), r"^x: .*\[2, 3, 4\], got \[2, 3, 5\]"),
        (lambda: functional.affine_norms_sq(ONES, ONES[:, :1]), r"^x: expected the shape of grad"),
        (lambda: functional.affine_norms_sq(ONES, None), r"^x: .*None"),
        (lambda: functional.channel_affine_norms_sq(ONES, None), r"^x: .*None"),
        (lambda: functional.channel_sum_norms_sq(ONES[0, 0]), r"^grad: expected shape \[B, C, \*space\], got \[4\]"),
        (lambda: functional.channel_sum_norms_sq(ONES, ONES[:1]), r"^x: expected the shape of grad"),
        (lambda: functional.row_sum_norms_sq(ONES.long()), r"^grad: .*int64"),
        (lambda: functional.row_sum_norms_sq(ONES, ONES.long()), r"^x: .*int64"),
        (
            lambda: functional.row_sum_norms_sq(ONES, offsets=torch.tensor([0, 2])),
            r"^grad: expected packed rows \[N, F\]",
        ),
        (
            lambda: functional.row_sum_norms_sq(ONES[0], offsets=torch.tensor([0, 2])),
            r"^offsets: .*from 0 to .*3, got 0 to 2",
        ),
        (
            lambda: functional.row_sum_norms_sq(ONES[0], offsets=torch.tensor([1, 3])),
            r"^offsets: .*from 0 to .*3, got 1 to 3",
        ),
        (
            lambda: functional.row_sum_norms_sq(ONES[0], offsets=torch.tensor([0, 2, 1, 3])),
            r"^offsets: .*ascending.*2 before 1",
        ),
        (
            lambda: functional.row_sum_norms_sq(ONES[0], offsets=torch.tensor([[0, 3]])),
            r"^offsets: expected shape \[B \+ 1\]",
        ),
        (
            lambda: functional.row_sum_norms_sq(ONES[0], offsets=torch.tensor([]).long()),
            r"^offsets: expected shape \[B \+ 1\]",
        ),
        (
            lambda: functional.row_sum_norms_sq(ONES[0], offsets=torch.tensor([0.0, 3.0])),
            r"^offsets: expected an int64.*float32",
        ),
        (lambda: functional.row_sum_norms_sq(ONES[0], offsets=[0, 3]), r"^offsets: expected an int64.*list"),
    ],
)
def test_wrong_arguments(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call()


OPERATORS = {
    "row_sum_norms_sq": (torch.randn(3, 4, 5),),
    "affine_norms_sq": (torch.randn(3, 4, 5), torch.randn(3, 4, 5)),
    "channel_sum_norms_sq": (torch.randn(3, 4, 5), torch.randn(3, 4, 5)),
    "channel_affine_norms_sq": (torch.randn(3, 4, 5), torch.randn(3, 4, 5)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_registered_operators(name):
    torch.library.opcheck(getattr(torch.ops.lipcore, name).default, OPERATORS[name])


@pytest.mark.parametrize("name", OPERATORS)
def test_inside_compiled_graphs(name):
    function, arguments = getattr(functional, name), OPERATORS[name]
    compiled = torch.compile(lambda g, *x: function(g * 2, *x), backend="aot_eager", fullgraph=True)
    grad = arguments[0].clone().requires_grad_()
    assert same_bits(compiled(grad, *arguments[1:]), function(arguments[0] * 2, *arguments[1:]))


def test_packed_inside_compiled_graphs():
    grad, offsets = torch.randn(7, 3), torch.tensor([0, 2, 7])
    function = functional.row_sum_norms_sq
    compiled = torch.compile(lambda g, o: function(g, offsets=o), backend="aot_eager", fullgraph=True)
    assert same_bits(compiled(grad, offsets), function(grad, offsets=offsets))


LAYOUTS = [*itertools.product((False, True), repeat=4), "channels_last"]


def laid_out(layout: tuple[bool, ...] | str, value: float | None) -> Tensor:
    """[2, 3, 4, 5] of float64, expanded from size 1 where the layout says so; one value of it, or all it is expanded
    to, is `value`."""
    shape = (2, 3, 4, 5)
    if isinstance(layout, str):
        t = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
        t[0, 0, 0, 0] = t[0, 0, 0, 0] if value is None else value
        return t
    t = torch.randn([1 if one else size for one, size in zip(layout, shape, strict=True)], dtype=torch.float64)
    if value is not None:
        t[0, 0, 0, 0] = value
    return t.expand(shape)


@pytest.mark.parametrize("value", [None, math.inf, math.nan, 1e160])
def test_expanded_gradients_of_float64_whatever_comes_out(value: float | None) -> None:
    """Also where a result that is not finite is looked at a second time."""
    torch.manual_seed(0)
    for one, other in itertools.product(LAYOUTS, LAYOUTS):
        grad, x = laid_out(one, value), laid_out(other, None)
        shift, scale = grad.sum((2, 3)).square().sum(1), (grad * x).sum((2, 3)).square().sum(1)
        for found, truth in (
            (functional.channel_sum_norms_sq(grad), shift),
            (functional.channel_sum_norms_sq(grad, x), scale),
            (functional.channel_affine_norms_sq(grad, x), torch.stack([scale, shift])),
            (functional.affine_norms_sq(grad.movedim(1, -1), x.movedim(1, -1)), torch.stack([scale, shift])),
        ):
            assert torch.allclose(found, truth, rtol=1e-9, equal_nan=True), (one, other)


# ---- on a CUDA device

ON_A_DEVICE = [
    *itertools.product((2,), (1, 5, 17, 129, 300), (1, 3, 4, 65, 128, 260)),
    *((0, 3, 4), (2, 0, 4), (2, 3, 0), (1, 9, 5), (3, 9, 5)),
    *sized([(2, 5000, 9), (1, 9000, 257)], [(1, 4500, 9)]),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_on_cuda(dtype):
    """Fewer rows than warps, one piece, several; fewer columns than a quad, several blocks of them; long runs."""
    for size in ON_A_DEVICE[:: 1 if dtype == "f32" else 5]:
        grad, x = values(size, DTYPES[dtype]), values(size, DTYPES[dtype], 1)
        check_rows(grad, x, place=placed_as_it_is)
        check_channels(grad, x, place=placed_as_it_is)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_on_cuda(dtype):
    for shape in ((3,), (3, 8), (3, 140, 8), (2, 3, 5, 7), (2, 8, 4, 4, 8))[:: 1 if dtype == "f32" else 2]:
        for layout in ("contiguous", "transposed", "sliced", "expanded", "offset", "channels_last"):
            if layout == "channels_last" and len(shape) < 4:
                continue
            grad, x = (in_layout(values(shape, DTYPES[dtype], seed), layout) for seed in (0, 1))
            for other in (x, values(shape, DTYPES[dtype], 2)):
                check_rows(grad, other, place=placed_as_it_is)
                if len(shape) > 1:
                    check_channels(grad, other, place=placed_as_it_is)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_of_wider_rows_on_cuda(dtype):
    """Every row begins so that four elements can be read at once, but there is no memory behind the last one."""
    for columns in (1, 5, 6, 7, 130):
        long = [values((26 * 132 + columns,), DTYPES[dtype], seed) for seed in (0, 1)]
        check_rows(*(t.as_strided((3, 9, columns), (9 * 132, 132, 1)) for t in long), place=placed_as_it_is)


@pytest.mark.gpu
def test_mixed_dtypes_on_cuda():
    for grad_dtype, x_dtype in PAIRS:
        grad, x = values((3, 17, 18), DTYPES[grad_dtype]), values((3, 17, 18), DTYPES[x_dtype], 1)
        check_rows(grad, x, place=placed_as_it_is)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_documents_on_cuda(dtype):
    for offsets in ([0, 300], [0, 1, 128, 256, 300], [0, 0, 5, 5, 300, 300], [*range(30), 300], [0, 127, 300]):
        for layout in ("contiguous", "transposed", "sliced")[: 3 if dtype == "f32" else 1]:
            grad, x = (in_layout(values((300, 9), DTYPES[dtype], seed), layout) for seed in (0, 1))
            check_rows(grad, x, torch.tensor(offsets), place=placed_as_it_is)
    nothing = torch.empty(0, 4, dtype=DTYPES[dtype])
    check_rows(nothing, nothing, torch.tensor([0]), place=placed_as_it_is)
    check_rows(nothing, nothing, torch.tensor([0, 0, 0]), place=placed_as_it_is)
    from_the_host = torch.tensor([0, 2])
    assert functional.row_sum_norms_sq(torch.ones(2, 3).cuda(), offsets=from_the_host).tolist() == [12.0]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "offsets", [[1, 300], [0, 299], [0, 200, 100, 300], [0, 301, 300], [-5, 300], [0, 2**62, 300], [0, -(2**62), 300]]
)
def test_offsets_that_do_not_fit_give_nan_on_cuda(offsets):
    """Nobody can say so without waiting for the device."""
    grad = torch.ones(300, 5).cuda()
    found = functional.affine_norms_sq(grad, grad, offsets=torch.tensor(offsets).cuda())
    assert found.isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 2, 5), (3, 200, 140)])
@pytest.mark.parametrize("transposed", [False, True])
def test_range_and_special_values_on_cuda(shape, transposed):
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    if transposed:
        grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
    for of_grad, of_x in ((1e200, 1e200), (1e300, 1e-300), (1e-200, 1e-200), (1e160, 1.0)):
        g, x = placed_as_it_is(grad * of_grad), placed_as_it_is(grad * of_x)
        found, truth = functional.affine_norms_sq(g, x).cpu(), functional.affine_norms_sq(grad * of_grad, grad * of_x)
        assert torch.allclose(found, truth, rtol=1e-11, atol=0)
        assert found.isfinite().sum() == truth.isfinite().sum()
    for dtype in DTYPES.values():
        bad = torch.ones(shape, dtype=dtype)
        bad[1, -1, -1], bad[2, 0, 0] = torch.nan, torch.inf
        if transposed:
            bad = bad.transpose(1, 2).contiguous().transpose(1, 2)
        found = functional.affine_norms_sq(placed_as_it_is(bad), torch.ones(shape, dtype=dtype).cuda()).cpu()
        assert found[:, 1].isnan().all()
        assert found[:, 2].isinf().all()
        assert (found[:, 0] == shape[2] * shape[1] ** 2).all()
    cancelling = torch.tensor([[[1e200], [-1e200], [3.0]]], dtype=torch.float64).cuda()
    found = functional.affine_norms_sq(cancelling, cancelling.abs()).cpu()
    assert found.isfinite().all()
    assert found[1].item() == 9.0
    largest = torch.tensor([[[1.7e308], [1.7e308], [-1.7e308], [-1.7e308]]], dtype=torch.float64).cuda()
    assert functional.row_sum_norms_sq(largest).tolist() == [0.0]


@pytest.mark.gpu
def test_neither_alignment_nor_run_changes_a_bit_on_cuda():
    for dtype in DTYPES.values():
        for shape in ((2, 37, 132), (3, 140, 8)):
            grad, x = values(shape, dtype).cuda(), values(shape, dtype, 1).cuda()
            expected = functional.affine_norms_sq(grad, x)
            assert same_bits(functional.affine_norms_sq(grad, x), expected)
            for offset in (1, 2, 3):
                moved = torch.empty(grad.numel() + offset, dtype=dtype, device=grad.device)[offset:].view_as(grad)
                assert same_bits(functional.affine_norms_sq(moved.copy_(grad), x), expected)


@pytest.mark.gpu
def test_captured_in_a_graph_on_cuda():
    grad, x = torch.ones(3, 300, 5).cuda(), torch.ones(3, 300, 5).cuda()
    out = functional.affine_norms_sq(grad, x)  # what a first call allocates
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = functional.affine_norms_sq(grad, x)
    for value in (2.0, 3.0):
        grad.fill_(value)
        graph.replay()
        assert out.cpu().unique().tolist() == [5 * (300 * value) ** 2]


@pytest.mark.gpu
def test_samples_that_are_not_aligned_on_cuda():
    for dtype in DTYPES.values():
        grad = values((2, 4 * 8 + 2), dtype).as_strided((2, 4, 8), (33, 8, 1))
        check_rows(grad, grad, place=placed_as_it_is)


@pytest.mark.gpu
def test_races_on_cuda():
    """One of each shape, for the thread sanitizer."""
    for size in ((2, 9, 5), (2, 130, 130)):
        grad, x = values(size, torch.float64), values(size, torch.float64, 1)
        check_rows(grad, x, place=placed_as_it_is)
        check_channels(grad, x, place=placed_as_it_is)
    check_rows(grad[0], x[0], torch.tensor([0, 1, 130]), place=placed_as_it_is)
    huge = placed_as_it_is(grad * 1e200)
    assert functional.affine_norms_sq(huge, huge).cpu().isinf().all()
