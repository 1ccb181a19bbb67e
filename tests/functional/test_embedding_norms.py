"""embedding_norms_sq: repeated tokens are added before squaring; tied_cross: the inner product with a tied head."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import CHUNK, FEW_SIZES, ODD_SIZES, row_cases, shape_id, thinned, triples, values
from devices import placed_as_it_is
from oracle import DTYPES, assert_close, eps_of, in_layout, same_bits

from lipcore import functional
from lipcore.functional import reference

# Sums are float64. They cancel, so the error is relative to the sum of the absolute values.
PRECISION = {"eps": eps_of(torch.float64), "k": 450}
PAIRS = [*itertools.product(DTYPES, DTYPES)]


def tokens(shape, vocabulary=11, seed=0):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed + math.prod(shape)))


def magnitude(x):
    return None if x is None else x.detach().double().abs()


def check(indices, grad, place=lambda t: t, **options):
    there = {key: place(value) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    found = functional.embedding_norms_sq(place(indices), place(grad), **there).cpu()
    truth = reference.embedding_norms_sq(indices, grad, **options)
    weights = magnitude(options.get("weights"))
    scale = reference.embedding_norms_sq(indices, magnitude(grad), **options | {"weights": weights})
    assert found.dtype == torch.float64
    assert not found.requires_grad
    assert_close(found, truth, scale=scale, **PRECISION)
    assert (found >= 0).all()


def check_cross(indices, e, x, g, **options):
    found = functional.tied_cross(indices, e, x, g, **options)
    truth = reference.tied_cross(indices, e, x, g, **options)
    assert found.dtype == torch.float64
    assert not found.requires_grad
    assert_close(found, truth, scale=reference.tied_cross(indices, *map(magnitude, (e, x, g)), **options), **PRECISION)


@pytest.mark.parametrize(("size", "dtype"), thinned(triples(ODD_SIZES), triples(FEW_SIZES)))  # (B, T, D)
def test_sizes(size, dtype, isa):
    grad = values(size, DTYPES[dtype])
    for vocabulary in (1, 3, 1000):
        check(tokens(size[:2], vocabulary), grad)


@pytest.mark.parametrize("size", [(1, 3000, 17), (3, 700, 129), (2, 5, CHUNK + 1), (400, 20, 33)], ids=shape_id)
@pytest.mark.parametrize("vocabulary", [2, 300, 10**12])
def test_large(size, vocabulary, two_threads):
    check(tokens(size[:2], vocabulary), values(size, torch.float32))


@pytest.mark.parametrize(("shape", "dtype", "layout"), row_cases([(3, 4, 5), (2, 3, 5, 7), (2, 3, 1, 2, 5)]))
def test_layouts(shape, dtype, layout, isa):
    grad = in_layout(values(shape, dtype), layout)
    indices, weights = tokens(shape[:-1]), values(shape[:-1], dtype, 1)
    check(indices, grad)
    check(in_layout(indices, "sliced"), grad, weights=in_layout(weights, layout) if layout == "sliced" else weights)


@pytest.mark.parametrize("size", triples(FEW_SIZES)[:8], ids=shape_id)
@pytest.mark.parametrize("padding_idx", [0, 2, -1, 10**6])
def test_padding(size, padding_idx, isa):
    check(tokens(size[:2], 3), values(size, torch.float32), padding_idx=padding_idx)


def test_only_padding():
    found = functional.embedding_norms_sq(torch.full((2, 5), 4), torch.ones(2, 5, 3), padding_idx=4)
    assert found.tolist() == [0, 0]


@pytest.mark.parametrize(("grad_dtype", "weight_dtype"), PAIRS)
def test_weights(grad_dtype, weight_dtype, isa):
    grad, weights = values((3, 17, 18), DTYPES[grad_dtype]), values((3, 17), DTYPES[weight_dtype], 1)
    for padding_idx in (None, 2):
        check(tokens((3, 17), 5), grad, weights=weights, padding_idx=padding_idx)


@pytest.mark.parametrize("offsets", [[0, 23], [0, 1, 8, 23], [0, 0, 5, 5, 5, 23, 23], [*range(24)]])
@pytest.mark.parametrize("integer", [torch.int64, torch.int32])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_packed_documents(offsets, integer, layout, isa):
    """The same token in two documents is two samples' business."""
    grad, indices = in_layout(values((23, 17), torch.float32), layout), tokens((23,), 4).to(integer)
    offsets = torch.tensor(offsets, dtype=integer)
    check(indices, grad, offsets=offsets)
    check(indices, grad, offsets=offsets, padding_idx=2, weights=values((23,), torch.float32, 1))


@pytest.mark.parametrize("size", [(0, 3, 4), (2, 0, 4)], ids=str)
def test_nothing_with_the_strides_of_an_expanded_gradient(size):
    """As sum() sends it back."""
    check(torch.zeros(size[:2]).long(), torch.ones(()).expand(size))
    ids, x = torch.zeros(size[:2]).long(), torch.empty(size)
    found = functional.tied_cross(ids, torch.ones(()).expand(size), x, torch.ones(()).expand(*size[:2], 5))
    assert found.tolist() == [0] * size[0]


def test_nothing():
    check(torch.empty(0, 3).long(), torch.empty(0, 3, 4))
    check(torch.empty(2, 0).long(), torch.empty(2, 0, 4))
    check(torch.ones(2, 3).long(), torch.empty(2, 3, 0))
    empty = torch.empty(0).long()
    assert functional.embedding_norms_sq(empty, torch.empty(0, 4), offsets=torch.tensor([0])).shape == (0,)
    assert functional.embedding_norms_sq(empty, torch.empty(0, 4), offsets=torch.tensor([0, 0, 0])).tolist() == [0, 0]


def test_one_token_per_sample():
    check(tokens((5,)), values((5, 7), torch.float32))


@pytest.mark.parametrize("ids", [[0, 2**62, -(2**62), 2**62], [-1, -1, 1, -(2**63)], [2**32, 0, 2**33, 2**32]])
def test_any_integer_is_a_token(ids, isa):
    check(torch.tensor([ids]), values((1, 4, 5), torch.float32))


def test_repeated_tokens_are_added_before_squaring():
    grad = torch.tensor([[[1.0], [2.0], [4.0]]])
    assert functional.embedding_norms_sq(torch.tensor([[7, 7, 1]]), grad).item() == 9 + 16
    assert functional.embedding_norms_sq(torch.tensor([[7, 7, 7]]), grad).item() == 49
    opposite = torch.tensor([[[3.0], [-3.0]]])
    assert functional.embedding_norms_sq(torch.tensor([[5, 5]]), opposite).item() == 0


@pytest.mark.parametrize("value", [1e-45, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_magnitudes(value, dtype, isa):
    grad = torch.full((2, 33, 17), value).to(DTYPES[dtype])
    indices = tokens((2, 33), 4)
    check(indices, grad)
    found = functional.embedding_norms_sq(indices, grad)
    assert found.isfinite().all()
    assert (found > 0).all() or grad[0, 0, 0] == 0  # 1e-45 is 0 in bfloat16
    assert functional.tied_cross(indices, grad, grad, grad[..., :5]).isfinite().all()


def test_float64_sums_that_leave_its_range(isa):
    """Finite input never becomes NaN, and an overflow on the way is none in the result."""
    largest = torch.tensor([[[1.7e308], [1.7e308], [-1.7e308], [-1.7e308]]], dtype=torch.float64)
    same = torch.zeros(1, 4, dtype=torch.int64)
    assert functional.embedding_norms_sq(same, largest).tolist() == [0.0]
    weights = torch.tensor([[1e200, 1e200, 1e200, 1e200]], dtype=torch.float64)
    assert functional.embedding_norms_sq(same, largest, weights=weights).tolist() == [0.0]
    ones = torch.ones(1, 4, 1, dtype=torch.float64)
    assert functional.tied_cross(same, largest, ones, ones).tolist() == [0.0]
    huge, tiny = ones * 1e250, ones * 1e-250
    found = functional.tied_cross(same, huge, huge, tiny * 1e-50)
    assert_close(found, torch.tensor([1.6e201], dtype=torch.float64), eps=eps_of(torch.float64), k=16)


def test_non_finite_values_stay_in_their_sample(isa):
    grad = torch.ones(4, 3, 2)
    grad[1, 2, 1], grad[2, 0, 0] = torch.nan, torch.inf
    for dtype in (torch.float32, torch.float64):
        found = functional.embedding_norms_sq(torch.tensor([[1, 1, 2]] * 4), grad.to(dtype))
        assert found[1].isnan()
        assert found[2].isinf()
        assert found[[0, 3]].tolist() == [10, 10]


# ---- tied to the head


def cross_sizes(sizes):
    """(B, T, S, D, V)"""
    return [
        *[(2, n, 3, 5, 7) for n in sizes],
        *[(2, 3, n, 5, 7) for n in sizes],
        *[(2, 3, 4, n, 7) for n in sizes],
        *[(n, 3, 4, 5, 7) for n in sizes],
        *[(2, 9, 4, 5, n) for n in sizes if n],
    ]


def cross_arguments(size, dtype):
    b, t, s, d, v = size
    dtypes = [DTYPES[dtype]] * 3
    shapes = (b, t, d), (b, s, d), (b, s, v)
    return tokens((b, t), v), *(
        values(shape, kind, i) for i, (shape, kind) in enumerate(zip(shapes, dtypes, strict=True))
    )


@pytest.mark.parametrize(("size", "dtype"), thinned(cross_sizes(ODD_SIZES), cross_sizes(FEW_SIZES)))
def test_cross_sizes(size, dtype, isa):
    check_cross(*cross_arguments(size, dtype))


@pytest.mark.parametrize("size", [(2, 129, 300, 33, 500), (1, 600, 257, 129, 50)], ids=shape_id)
def test_cross_large(size, two_threads):
    check_cross(*cross_arguments(size, "f32"), padding_idx=3)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded", "offset", "requires_grad"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_layouts(layout, dtype, isa):
    indices, *rest = cross_arguments((2, 5, 4, 6, 7), dtype)
    check_cross(in_layout(indices, "sliced"), *(in_layout(t, layout) for t in rest))


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_cross_mixed_dtypes(one, other, isa):
    indices, e, x, g = cross_arguments((2, 5, 4, 6, 7), one)
    check_cross(indices, e, x.to(DTYPES[other]), g)
    check_cross(indices, e.to(DTYPES[other]), x, g, padding_idx=1)


def test_cross_ignores_padding_outside_the_vocabulary():
    indices, e, x, g = cross_arguments((1, 5, 4, 6, 7), "f32")
    indices[0, 2] = -100
    with pytest.raises(ValueError, match=r"^indices: expected tokens in \[0, 7\).*got -100"):
        functional.tied_cross(indices, e, x, g)
    kept = torch.tensor([0, 1, 3, 4])
    found = functional.tied_cross(indices, e, x, g, padding_idx=-100)
    assert_close(found, reference.tied_cross(indices[:, kept], e[:, kept], x, g), eps=eps_of(torch.float64), k=450)


def test_tied_weight_against_autograd():
    """|E|^2 + |H|^2 + 2 <E, H> is the norm of the gradient that autograd makes of both uses."""
    torch.manual_seed(0)
    weight = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    indices = tokens((3, 6), 7)
    for b in range(3):
        embedded = weight[indices[b]]
        hidden = embedded.tanh()
        logits = hidden @ weight.T
        loss = torch.nn.functional.cross_entropy(logits, indices[b].roll(-1), reduction="sum")
        e, g = torch.autograd.grad(loss, [embedded, logits], retain_graph=True)
        (truth,) = torch.autograd.grad(loss, weight)
        ids, e, x, g = (t.detach()[None] for t in (indices[b], e, hidden, g))
        found = functional.embedding_norms_sq(ids, e) + functional.linear_norms_sq(x, g)
        found = found + 2 * functional.tied_cross(ids, e, x, g)
        torch.testing.assert_close(found, truth.square().sum().reshape(1), rtol=1e-12, atol=0)


IDS, GRAD = torch.ones(2, 3).long(), torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: functional.embedding_norms_sq(IDS.float(), GRAD), "^indices: expected an int64 or int32.*float32"),
        (lambda: functional.embedding_norms_sq(IDS.bool(), GRAD), "^indices: expected an int64 or int32.*bool"),
        (lambda: functional.embedding_norms_sq([[1]], GRAD), "^indices: expected an int64 or int32.*list"),
        (
            lambda: functional.embedding_norms_sq(torch.tensor(1), GRAD),
            r"^indices: expected shape \[B, \.\.\.\].*0-dim",
        ),
        (lambda: functional.embedding_norms_sq(IDS, GRAD[:, :2]), r"^grad: expected a row per token.*\[2, 2, 4\]"),
        (lambda: functional.embedding_norms_sq(IDS, GRAD[:1]), "^grad: expected a row per token"),
        (lambda: functional.embedding_norms_sq(IDS, GRAD[0, 0]), "^grad: expected a row per token"),
        (lambda: functional.embedding_norms_sq(IDS, GRAD.long()), "^grad: .*int64"),
        (lambda: functional.embedding_norms_sq(IDS, GRAD, weights=GRAD), r"^weights: expected the shape of indices"),
        (lambda: functional.embedding_norms_sq(IDS, GRAD, weights=IDS), r"^weights: .*int64"),
        (lambda: functional.embedding_norms_sq(IDS, GRAD, padding_idx=1.5), "^padding_idx: expected an integer"),
        (
            lambda: functional.embedding_norms_sq(IDS, GRAD, offsets=torch.tensor([0, 2])),
            r"^grad: .*packed rows \[N, F\]",
        ),
        (
            lambda: functional.embedding_norms_sq(IDS[0], GRAD[0], offsets=torch.tensor([0, 2])),
            "^offsets: .*got 0 to 2",
        ),
        (lambda: functional.embedding_norms_sq(IDS[0], GRAD[0], offsets=torch.tensor([0.0])), "^offsets: .*int64"),
        (lambda: functional.tied_cross(IDS, GRAD[:1], GRAD, GRAD), "^grad_embedding: expected a row per token"),
        (lambda: functional.tied_cross(IDS, GRAD, GRAD[:1], GRAD), r"^x: expected \[2, "),
        (lambda: functional.tied_cross(IDS, GRAD, GRAD[..., :3], GRAD), "^x: expected 4 features"),
        (lambda: functional.tied_cross(IDS, GRAD, GRAD, GRAD[:, :2]), r"^grad_head: expected \[2, 3, \.\.\.\]"),
        (lambda: functional.tied_cross(IDS * 4, GRAD, GRAD, GRAD), r"^indices: expected tokens in \[0, 4\).*got 4"),
        (lambda: functional.tied_cross(-IDS, GRAD, GRAD, GRAD), r"^indices: expected tokens in \[0, 4\).*got -1"),
        (lambda: functional.tied_cross(IDS.float(), GRAD, GRAD, GRAD), "^indices: .*float32"),
        (lambda: functional.tied_cross(IDS, GRAD, GRAD.long(), GRAD), "^x: .*int64"),
        (lambda: functional.tied_cross(IDS, GRAD, GRAD, GRAD, padding_idx="a"), "^padding_idx: expected an integer"),
    ],
)
def test_wrong_arguments(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call()


def test_registered_operators():
    torch.library.opcheck(torch.ops.lipcore.embedding_norms_sq.default, (IDS, torch.randn(2, 3, 4)))
    weighted = {"weights": torch.rand(2, 3), "padding_idx": 1}
    torch.library.opcheck(torch.ops.lipcore.embedding_norms_sq.default, (IDS, torch.randn(2, 3, 4)), weighted)
    torch.library.opcheck(torch.ops.lipcore.tied_cross.default, (IDS, *(torch.randn(2, 3, 4) for _ in range(3))))


def test_inside_compiled_graphs():
    ids, grad, weights = tokens((2, 5)), torch.randn(2, 5, 4, requires_grad=True), torch.rand(2, 5, requires_grad=True)
    function = functional.embedding_norms_sq
    compiled = torch.compile(
        lambda i, g, w: function(i, g * 2, weights=w, padding_idx=3), backend="aot_eager", fullgraph=True
    )
    assert same_bits(compiled(ids, grad, weights), function(ids, grad * 2, weights=weights, padding_idx=3))
    tied = functional.tied_cross
    compiled = torch.compile(lambda i, g: tied(i, g, g * 2, g, padding_idx=0), backend="aot_eager", fullgraph=True)
    assert same_bits(compiled(ids % 4, grad), tied(ids % 4, grad, grad * 2, grad, padding_idx=0))


# ---- on a CUDA device


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_on_cuda(dtype):
    sizes = [*itertools.product((1, 3), (1, 5, 33), (1, 3, 4, 129)), (0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 70, 260)]
    for size in sizes[:: 1 if dtype == "f32" else 7]:
        for vocabulary in (1, 4, 1000):
            check(tokens(size[:2], vocabulary), values(size, DTYPES[dtype]), place=placed_as_it_is)


@pytest.mark.gpu
def test_layouts_padding_and_weights_on_cuda():
    for dtype in DTYPES.values():
        for layout in ("contiguous", "transposed", "sliced", "expanded", "offset"):
            grad = in_layout(values((3, 5, 8), dtype), layout)
            weights = in_layout(values((3, 5), dtype, 1), layout)
            for padding_idx in (None, 2, -1):
                check(tokens((3, 5), 3), grad, place=placed_as_it_is, padding_idx=padding_idx)
                check(tokens((3, 5), 3).int(), grad, place=placed_as_it_is, padding_idx=padding_idx, weights=weights)
    check(tokens((2, 3, 5)), values((2, 3, 5, 7), torch.float32), place=placed_as_it_is)
    check(tokens((5,)), values((5, 7), torch.float32), place=placed_as_it_is)
    check(torch.full((2, 5), 4), torch.ones(2, 5, 3), place=placed_as_it_is, padding_idx=4)
    grad = values((2, 4 * 8 + 2), torch.float32).as_strided((2, 4, 8), (33, 8, 1))
    check(tokens((2, 4), 3), grad, place=placed_as_it_is)
    for ids in ([0, 2**62, -(2**62), 2**62], [-1, -1, 1, -(2**63)], [2**32, 0, 2**33, 2**32]):
        check(torch.tensor([ids]), values((1, 4, 5), torch.float32), place=placed_as_it_is)


@pytest.mark.gpu
@pytest.mark.parametrize("offsets", [[0, 23], [0, 1, 8, 23], [0, 0, 5, 5, 5, 23, 23], [*range(24)]])
def test_packed_documents_on_cuda(offsets):
    for layout in ("contiguous", "transposed", "sliced"):
        grad, indices = in_layout(values((23, 17), torch.float32), layout), tokens((23,), 4)
        check(indices, grad, place=placed_as_it_is, offsets=torch.tensor(offsets))
        options = {"padding_idx": 2, "weights": values((23,), torch.float32, 1), "offsets": torch.tensor(offsets)}
        check(indices, grad, place=placed_as_it_is, **options)


@pytest.mark.gpu
def test_nothing_and_offsets_that_do_not_fit_on_cuda():
    empty = torch.empty(0).long()
    for offsets in ([0], [0, 0, 0]):
        check(empty, torch.empty(0, 4), place=placed_as_it_is, offsets=torch.tensor(offsets))
    ids, grad = torch.zeros(9).long().cuda(), torch.ones(9, 2).cuda()
    for offsets in ([1, 9], [0, 8], [0, 6, 3, 9], [0, 2**62, 9], [0, -(2**62), 9]):
        assert functional.embedding_norms_sq(ids, grad, offsets=torch.tensor(offsets).cuda()).isnan().all()


@pytest.mark.gpu
def test_range_and_special_values_on_cuda():
    largest = torch.tensor([[[1.7e308], [1.7e308], [-1.7e308], [-1.7e308]]], dtype=torch.float64).cuda()
    same = torch.zeros(1, 4, dtype=torch.int64).cuda()
    assert functional.embedding_norms_sq(same, largest).tolist() == [0.0]
    weights = torch.full((1, 4), 1e200, dtype=torch.float64).cuda()
    assert functional.embedding_norms_sq(same, largest, weights=weights).tolist() == [0.0]
    grad = values((3, 9, 5), torch.float64)
    for scale, of_weights in ((1e160, None), (1e300, 1e-300), (1e-300, 1e300)):
        options = {} if of_weights is None else {"weights": values((3, 9), torch.float64, 1) * of_weights}
        truth = functional.embedding_norms_sq(tokens((3, 9), 4), grad * scale, **options)
        options = {key: value.cuda() for key, value in options.items()}
        found = functional.embedding_norms_sq(tokens((3, 9), 4).cuda(), (grad * scale).cuda(), **options).cpu()
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=0)
    for value in (1e-45, 3e38):
        check(tokens((2, 33), 4), torch.full((2, 33, 17), value), place=placed_as_it_is)
    grad = torch.ones(4, 3, 2)
    grad[1, 2, 1], grad[2, 0, 0] = torch.nan, torch.inf
    for dtype in DTYPES.values():
        found = functional.embedding_norms_sq(torch.tensor([[1, 1, 2]] * 4).cuda(), grad.to(dtype).cuda()).cpu()
        assert found[1].isnan()
        assert found[2].isinf()
        assert found[[0, 3]].tolist() == [10, 10]


@pytest.mark.gpu
def test_neither_alignment_nor_run_changes_a_bit_on_cuda():
    ids = tokens((3, 40), 7).cuda()
    for dtype in DTYPES.values():
        grad = values((3, 40, 12), dtype).cuda()
        expected = functional.embedding_norms_sq(ids, grad)
        for offset in (0, 1, 2, 3):
            moved = torch.empty(grad.numel() + offset, dtype=dtype, device=grad.device)[offset:].view_as(grad)
            assert same_bits(functional.embedding_norms_sq(ids, moved.copy_(grad)), expected)


@pytest.mark.gpu
def test_races_on_cuda():
    """For the thread sanitizer."""
    grad = values((3, 9, 5), torch.float64)
    check(tokens((3, 9), 4), grad, place=placed_as_it_is)
    check(tokens((9,), 4), grad[0], place=placed_as_it_is, offsets=torch.tensor([0, 2, 9]))
    assert functional.embedding_norms_sq(tokens((3, 9), 4).cuda(), (grad * 1e200).cuda()).cpu().isinf().all()
