"""outer_norms_sq and outer_and_bias_norms_sq: layers that see one row per sample, many of them in one call."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import CHUNK, FEW_SIZES, ODD_SIZES, row_cases, shape_id, thinned, values
from oracle import DTYPES, assert_close, eps_of, in_layout, same_bits

from lipcore import functional
from lipcore.functional import reference

PRECISION = {"eps": eps_of(torch.float64), "k": 450}  # squares and sums are float64: 1e-13
PAIRS = [*itertools.product(DTYPES, DTYPES)]

# (B, inputs, outputs): every size in every place.
ALL, FEW = (
    [*[(3, n, 5) for n in sizes], *[(3, 5, n) for n in sizes], *[(n, 5, 3) for n in sizes]]
    for sizes in (ODD_SIZES, FEW_SIZES)
)


def check(x, grad):
    weight, bias = functional.outer_and_bias_norms_sq(x, grad)
    truth, bias_truth = reference.outer_and_bias_norms_sq(x, grad)
    for got in (weight, bias):
        assert got.dtype == torch.float64
        assert not got.requires_grad
    assert_close(weight, truth, **PRECISION)
    assert_close(bias, bias_truth, **PRECISION)
    assert same_bits(functional.outer_norms_sq(x, grad), weight)


@pytest.mark.parametrize(("size", "dtype"), thinned(ALL, FEW))
def test_sizes(size, dtype, isa):
    samples, inputs, outputs = size
    check([values((samples, inputs), DTYPES[dtype])], [values((samples, outputs), DTYPES[dtype], 1)])


@pytest.mark.parametrize(("shape", "dtype", "layout"), row_cases([(3, 17), (4, 3, 5), (2, 3, 5, 7)]))
def test_layouts(shape, dtype, layout, isa):
    """A sample's dimensions are flattened, whatever they are and however they lie in memory."""
    x, grad = in_layout(values(shape, dtype), layout), in_layout(values(shape, dtype, 1), layout)
    check([x, grad], [grad[:, :1], x])


@pytest.mark.parametrize(("x_dtype", "grad_dtype"), PAIRS)
def test_mixed_dtypes(x_dtype, grad_dtype, isa):
    check([values((7, 33), DTYPES[x_dtype])], [values((7, 18), DTYPES[grad_dtype], 1)])


@pytest.mark.parametrize("layers", [1, 2, 17, 150])
def test_many_layers(layers, isa):
    """In one call what single calls give, bit for bit; layers differ in width and dtype."""
    kinds = list(DTYPES.values())
    x = [values((5, 1 + 3 * i % 70), kinds[i % 4], i) for i in range(layers)]
    grad = [values((5, 1 + 5 * i % 90), kinds[i % 3], i + 1) for i in range(layers)]
    check(x, grad)
    single = [functional.outer_norms_sq([a], [g])[0] for a, g in zip(x, grad, strict=True)]
    assert same_bits(functional.outer_norms_sq(x, grad), torch.stack(single))


@pytest.mark.parametrize("size", [(3, CHUNK + 1, 5), (CHUNK // 4 + 1, 3, 2), (200, 300, 129)], ids=shape_id)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_large(size, layout, two_threads, isa):
    samples, inputs, outputs = size
    x = in_layout(values((samples, inputs), torch.float32), layout)
    grad = in_layout(values((samples, outputs), torch.bfloat16, 1), layout)
    check([x, x], [grad, grad])


def test_no_layers():
    assert functional.outer_norms_sq([], []).shape == (0, 0)
    weight, bias = functional.outer_and_bias_norms_sq([], [])
    assert weight.shape == bias.shape == (0, 0)


def test_no_samples_and_no_features():
    check([torch.empty(0, 3)], [torch.empty(0, 4)])
    check([torch.empty(2, 0)], [torch.ones(2, 4)])
    check([torch.ones(2)], [torch.ones(2)])


@pytest.mark.parametrize(("small", "large"), [(1e-30, 1e30), (1e-45, 3e38)])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_magnitudes(small, large, dtype, isa):
    """Squares of float32 values leave float32's range on both sides; the product of both norms does not here."""
    x = torch.tensor([small, large, small, large, 0.0]).unsqueeze(1).expand(5, 19).to(DTYPES[dtype])
    grad = torch.tensor([small, large, large, small, large]).unsqueeze(1).expand(5, 33).to(DTYPES[dtype])
    check([x], [grad])
    found = functional.outer_norms_sq([x], [grad])[0]
    assert (found[:4] > 0).all() or dtype == "bf16"  # 1e-45 is 0 in bfloat16
    assert found[4] == 0


def test_float64_squares_that_leave_its_range(isa):
    """1e200 and 1e-200 have no square, but their product has."""
    x, grad = (torch.full((1, n), value, dtype=torch.float64) for n, value in ((4, 1e200), (9, 1e-200)))
    assert_close(functional.outer_norms_sq([x], [grad]), torch.tensor([[36.0]]), eps=eps_of(torch.float64), k=16)


def test_non_finite_values_stay_in_their_sample(isa):
    x = torch.ones(4, 17)
    x[1, 16], x[2, 0] = torch.nan, torch.inf
    found = functional.outer_norms_sq([x], [torch.ones(4, 2)])[0]
    assert found[1].isnan()
    assert found[2].isinf()
    assert found[[0, 3]].tolist() == [34.0, 34.0]


@pytest.mark.parametrize("transform", [torch.nn.Parameter, lambda t: t.requires_grad_() * 1])
def test_results_are_detached(transform):
    found = functional.outer_norms_sq([transform(torch.ones(2, 3))], [transform(torch.ones(2, 3))])
    assert found.tolist() == [[9.0, 9.0]]
    assert found.grad_fn is None


@pytest.mark.parametrize(
    ("x", "grad", "words"),
    [
        ([torch.ones(2, 3)], [], "^grad: expected 1 tensors, one per tensor of x, got 0"),
        ([torch.ones(2, 3)], [torch.ones(3, 3)], r"^grad\[0\]: expected 2 samples.*got shape \[3, 3\]"),
        ([torch.ones(2, 3), torch.ones(4, 3)], [torch.ones(2, 3)] * 2, r"^x\[1\]: expected 2 samples"),
        ([torch.tensor(1.0)], [torch.tensor(1.0)], r"^x\[0\]: expected shape \[B, ...\].*0-dimensional"),
        ([torch.ones(2, 3)], [torch.tensor(1.0)], r"^grad\[0\]: expected shape \[B, ...\].*0-dimensional"),
        ([torch.ones(2, 3).long()], [torch.ones(2, 3)], r"^x\[0\].*int64"),
        ([torch.ones(2, 3)], [torch.ones(2, 3).long()], r"^grad\[0\].*int64"),
        (torch.ones(2, 3), [torch.ones(2, 3)], "^x: expected a list"),
        ([torch.ones(2, 3)], torch.ones(2, 3), "^grad: expected a list"),
        (None, None, "^x: expected a list"),
    ],
)
@pytest.mark.parametrize("function", [functional.outer_norms_sq, functional.outer_and_bias_norms_sq])
def test_wrong_arguments(function, x, grad, words):
    with pytest.raises((TypeError, ValueError), match=words):
        function(x, grad)


def test_inside_compiled_graphs():
    x, grad = torch.randn(3, 5, requires_grad=True), torch.randn(3, 2)
    for function in (functional.outer_norms_sq, functional.outer_and_bias_norms_sq):
        compiled = torch.compile(lambda x, g, f=function: f([x * 2, x], [g, g]), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, grad), function([x * 2, x], [grad, grad]), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["outer_norms_sq", "outer_and_bias_norms_sq"])
def test_registered_operators(name):
    operator = getattr(torch.ops.lipcore, name).default
    torch.library.opcheck(operator, ([torch.randn(3, 5), torch.randn(3, 2)], [torch.randn(3, 2), torch.randn(3, 1)]))
