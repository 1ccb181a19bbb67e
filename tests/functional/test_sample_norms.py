"""sample_norms: row norms of [B, ...] to float64 accuracy, for every dtype, layout and size."""

from __future__ import annotations

import math

import pytest
import torch
from cases import LARGE_ROW_SHAPES, ROW_SHAPES, ROW_SIZES, row_cases, values
from oracle import DTYPES, LAYOUTS, assert_close, eps_of, in_layout, same_bits

from lipcore import functional
from lipcore.functional import reference

# Squares are taken and summed in float64 whatever the dtype, so the bound is float64's: 1e-13.
PRECISION = {"eps": eps_of(torch.float64), "k": 450}


def check(shape, dtype, layout, device="cpu"):
    x = in_layout(values(shape, dtype).to(device), layout)
    if x is None:
        return
    truth = reference.sample_norms(x)
    got = functional.sample_norms(x)
    assert got.dtype == torch.float64
    assert got.device == x.device
    assert not got.requires_grad
    assert_close(got, truth, **PRECISION)


@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    row_cases(ROW_SIZES, ["contiguous", "sliced"])
    + row_cases(ROW_SHAPES)
    + row_cases(LARGE_ROW_SHAPES, ["contiguous", "transposed", "sliced"]),
)
def test_rows(shape, dtype, layout, isa):
    check(shape, dtype, layout)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_on_cuda(dtype):
    layouts = dict.fromkeys(ROW_SIZES + ROW_SHAPES, LAYOUTS)
    # Not of equal elements: torch's sums of many, the truth here, are off by more than what is allowed.
    layouts |= {shape: ["contiguous", "transposed", "sliced"] for shape in LARGE_ROW_SHAPES}
    for shape in layouts:
        for layout in layouts[shape]:
            check(shape, DTYPES[dtype], layout, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_beats_the_naive_expression(dtype, isa):
    """The oracle's rule: never worse than torch in that dtype."""
    x = values((17, 4097), DTYPES[dtype])
    naive = torch.linalg.vector_norm(x, dim=1)
    assert_close(functional.sample_norms(x), reference.sample_norms(x), naive=naive, eps=eps_of(torch.float64), k=450)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(1e-24, "f32"), (1e-45, "f32"), (3e38, "f32"), (6e-8, "f16"), (65504.0, "f16"), (1e-38, "bf16"), (3e38, "bf16")]
    + [(v, "f64") for v in (1e-300, 5e-324, 1e-160, 1e300, 1.7e308)],
)
def test_squares_neither_overflow_nor_underflow(value, dtype, isa):
    x = torch.full((2, 19), value, dtype=DTYPES[dtype])
    x[1] = 0
    x[1, -1] = -value
    exact = float(x[0, 0])
    expected = torch.tensor([exact * math.sqrt(19), exact], dtype=torch.float64)
    step = 4 * eps_of(torch.float64) * expected + 5e-324  # one subnormal: nothing finer exists there
    assert_close(functional.sample_norms(x), expected, scale=step, eps=1, k=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 17, 131, 65539])
def test_non_finite_rows(dtype, size, isa):
    """NaN wins over infinity wherever they stand, and the other rows do not notice."""
    x = torch.ones(6, size, dtype=DTYPES[dtype])
    x[0, 0] = torch.nan
    x[1, -1] = -torch.inf
    x[2, 0], x[2, -1] = torch.inf, torch.nan
    x[3, 0], x[3, -1] = torch.nan, torch.inf
    x[4, size // 2] = torch.nan
    nan, root = math.nan, math.sqrt(size)
    expected = torch.tensor([nan, math.inf, nan, nan, nan, root], dtype=torch.float64)
    assert_close(functional.sample_norms(x), expected, **PRECISION)


def test_empty():
    assert functional.sample_norms(torch.empty(0, 3)).shape == (0,)
    assert functional.sample_norms(torch.empty(0)).shape == (0,)
    assert torch.equal(functional.sample_norms(torch.empty(5, 0, 2)), torch.zeros(5, dtype=torch.float64))


def test_out_is_written_and_returned():
    x, out = values((7, 65), torch.float32), torch.full((7,), torch.nan, dtype=torch.float64)
    assert functional.sample_norms(x, out=out) is out
    assert same_bits(out, functional.sample_norms(x))
    memory = torch.full((20,), 77.0, dtype=torch.float64)
    functional.sample_norms(x, out=memory[5:12])
    assert same_bits(memory[5:12], out)
    assert (memory[:5] == 77).all()
    assert (memory[12:] == 77).all()


def test_many_dimensions(isa):
    """Rows of 8 unmergeable dimensions are gathered; more are refused in words."""
    x = torch.randn(2, *[4] * 8)[(slice(None), *[slice(0, 3, 2)] * 8)]
    assert_close(functional.sample_norms(x), reference.sample_norms(x), **PRECISION)
    with pytest.raises(ValueError, match=r"^x: .*8 dimensions.*contiguous"):
        functional.sample_norms(torch.randn(1, *[3] * 9)[(slice(None), *[slice(0, 3, 2)] * 9)])


@pytest.mark.parametrize("kind", [torch.nn.Parameter, lambda t: torch.nn.Buffer(t), lambda t: t.requires_grad_()])
def test_plain_subclasses_are_tensors(kind):
    x = torch.randn(3, 4)
    assert same_bits(functional.sample_norms(kind(x.clone())), functional.sample_norms(x))


def test_a_subclass_without_dispatch_is_a_tensor():
    class Named(torch.Tensor):
        pass

    x = torch.randn(3, 4)
    assert same_bits(functional.sample_norms(x.as_subclass(Named)), functional.sample_norms(x))


def test_inference_mode():
    with torch.inference_mode():
        x = torch.ones(2, 4)
        assert functional.sample_norms(x).tolist() == [2, 2]


def test_inside_compiled_graphs():
    x = torch.randn(3, 5, requires_grad=True)
    compiled = torch.compile(lambda x: functional.sample_norms(x * 2), backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), reference.sample_norms(x * 2), **PRECISION)


def test_registered_operator():
    torch.library.opcheck(torch.ops.lipcore.sample_norms.default, (torch.randn(3, 5),))
