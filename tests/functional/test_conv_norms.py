"""conv_norms_sq against its specification: geometries, dtypes, layouts, methods, instruction sets and threads."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import FEW_LAYOUTS, FEW_SIZES, thinned
from devices import nothing_waits, placed_as_it_is
from oracle import DTYPES, LAYOUTS, assert_close, in_layout, same_bits
from torch import Tensor

from lipcore import functional as F
from lipcore.functional import reference
from lipcore.functional.convolution import conv_method

METHODS = ("direct", "gram", "portable")
EPS32 = 2.0**-23


@dataclass(frozen=True)
class Case:
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    inputs: int = 5
    outputs: int = 7
    samples: int = 3
    groups: int = 1
    options: dict[str, tuple[int, ...]] = field(default_factory=dict)
    cut: int = 0  #: positions that the gradient lacks, in the last dimension

    @property
    def geometry(self) -> dict[str, Any]:
        n = len(self.size)
        plain = {"stride": (1,) * n, "padding": (0,) * n, "dilation": (1,) * n}
        return {"kernel_size": self.kernel, "groups": self.groups, **plain, **self.options}

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
        g = self.geometry
        out = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(self.size, g["padding"], g["dilation"], self.kernel, g["stride"], strict=True)
        ]
        out[-1] -= self.cut
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.samples, self.inputs, *self.size, generator=generator)
        grad = torch.randn(self.samples, self.outputs, *out, generator=generator)
        return x.to(dtype), grad.to(dtype)


PLAIN = Case((6, 7), (3, 3), options={"padding": (1, 1)})
CASES = {
    "1d": Case((17,), (3,)),
    "1d, kernel 1": Case((65,), (1,)),
    "1d, long: several pieces": Case((2500,), (3,), inputs=2, options={"padding": (1,)}),
    "1d, one position": Case((3,), (3,)),
    "1d, stride over the kernel": Case((16,), (2,), options={"stride": (5,)}),
    "1d, depthwise": Case((129,), (4,), inputs=33, outputs=33, groups=33),
    "1d, depthwise, long": Case((1300,), (2,), inputs=17, outputs=17, groups=17),
    "2d": PLAIN,
    "2d, one channel": Case((7, 7), (3, 3), inputs=1, outputs=1),
    "2d, stride, dilation, padding": Case(
        (9, 8), (3, 2), options={"stride": (2, 3), "dilation": (2, 1), "padding": (2, 1)}
    ),
    "2d, padding beyond the image": Case((2, 3), (3, 3), options={"padding": (4, 3)}),
    "2d, groups": Case((5, 6), (2, 3), inputs=6, outputs=9, groups=3, options={"padding": (0, 1)}),
    "2d, groups with one input": Case((5, 5), (3, 3), inputs=3, outputs=63, groups=3),
    "2d, depthwise": Case((7, 5), (3, 3), inputs=20, outputs=20, groups=20, options={"padding": (1, 1)}),
    "2d, depthwise, multiplier": Case(
        (6, 6), (3, 3), inputs=5, outputs=10, groups=5, samples=9, options={"stride": (2, 2)}
    ),
    "2d, many channels, small map": Case((4, 4), (3, 3), inputs=65, outputs=63, options={"padding": (1, 1)}),
    "2d, many channels, 1x1 map": Case((1, 1), (1, 1), inputs=64, outputs=65),
    "2d, positions of two tiles": Case((10, 9), (2, 2), inputs=4, outputs=6, groups=2),
    "2d, fewer positions": Case((8, 9), (3, 3), options={"stride": (2, 2)}, cut=1),
    "2d, one sample: in parts": Case((5, 5), (3, 3), inputs=40, outputs=17, samples=1),
    "3d": Case((3, 4, 5), (2, 3, 3)),
    "3d, stride, dilation, padding": Case(
        (5, 4, 6), (2, 2, 3), options={"stride": (2, 1, 2), "dilation": (2, 1, 2), "padding": (1, 0, 2)}
    ),
    "3d, groups": Case((3, 3, 4), (1, 2, 3), inputs=4, outputs=6, groups=2),
    **{f"{n} inputs": Case((4, 3), (2, 2), inputs=n) for n in (2, 3, 7, 15, 16, 17)},
    **{f"{n} outputs": Case((4, 3), (2, 2), outputs=n) for n in (1, 2, 3, 15, 16, 17, 49, 64, 65, 129)},
    **{f"{n} samples": Case((4, 3), (2, 2), samples=n) for n in (1, 2, 7, 8, 17)},
}
#: Without the sizes beside these.
FEW = [name for name in CASES if name[1] == "d" or int(name.split()[0]) in FEW_SIZES]


def _assert_right(got: Tensor, case: Case, x: Tensor, grad: Tensor) -> None:
    _assert_near(got, *_truth(case, x, grad), torch.float64 in (x.dtype, grad.dtype))


def _truth(case: Case, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """What is right, and its scale: rounding errors of a sum of products are relative to the magnitudes' sum."""
    scale = reference.conv_norms_sq(x.abs(), grad.abs(), **case.geometry)
    return reference.conv_norms_sq(x, grad, **case.geometry), scale


def _assert_near(got: Tensor, truth: Tensor, scale: Tensor, wide: bool) -> None:
    assert got.dtype == torch.float64
    assert not got.requires_grad
    assert_close(got, truth, scale=scale, eps=torch.finfo(torch.float64).eps if wide else EPS32, k=8)


@functools.cache
def _known(name: str, dtype: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A case's tensors and their truth, for every method and instruction set."""
    tensors = CASES[name].tensors(DTYPES[dtype])
    return *tensors, *_truth(CASES[name], *tensors)


def _assert_case(name: str, dtype: str, method: str | None) -> None:
    x, grad, truth, scale = _known(name, dtype)
    got = F.conv_norms_sq(x, grad, **CASES[name].geometry, method=method)
    _assert_near(got, truth, scale, dtype == "f64")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "dtype"), thinned(CASES, FEW))
def test_against_the_reference(name, dtype, method):
    _assert_case(name, dtype, method)


@pytest.mark.parametrize("name", CASES)
def test_the_chosen_method(name):
    _assert_case(name, "f32", None)


@pytest.mark.parametrize("method", METHODS[:2])
@pytest.mark.parametrize(("name", "dtype"), thinned(CASES, FEW, ["f32", "f64"]))
def test_instruction_sets(isa, name, dtype, method):
    _assert_case(name, dtype, method)


@pytest.mark.parametrize(("layout", "dtype"), thinned(LAYOUTS, FEW_LAYOUTS))
@pytest.mark.parametrize("name", ["1d", "2d", "2d, groups", "2d, depthwise", "3d"])
def test_layouts(name, dtype, layout):
    case = CASES[name]
    x, grad = (in_layout(t, layout) for t in case.tensors(DTYPES[dtype]))
    if x is None or grad is None:
        return
    truth = _truth(case, x.detach(), grad.detach())
    for method in METHODS:
        _assert_near(F.conv_norms_sq(x, grad, **case.geometry, method=method), *truth, dtype == "f64")


@pytest.mark.parametrize("method", METHODS)
def test_two_dtypes(method):
    x, grad = PLAIN.tensors(torch.float32)
    for a, g in ((x.bfloat16(), grad), (x, grad.half()), (x.double(), grad)):
        _assert_right(F.conv_norms_sq(a, g, **PLAIN.geometry, method=method), PLAIN, a, g)


@pytest.mark.parametrize("method", METHODS[:2])
@pytest.mark.parametrize("samples", [1, 3, 17])
@pytest.mark.parametrize("groups", [1, 16])
def test_threads_change_no_bit(isa, two_threads, samples, groups, method):
    case = Case((12, 12), (3, 3), inputs=32, outputs=32, samples=samples, groups=groups)
    x, grad = case.tensors(torch.float32)
    both = F.conv_norms_sq(x, grad, **case.geometry, method=method)
    torch.set_num_threads(1)
    assert same_bits(both, F.conv_norms_sq(x, grad, **case.geometry, method=method))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["1d", "2d", "2d, depthwise", "2d, many channels, small map"])
@pytest.mark.parametrize(("x_scale", "grad_scale"), [(1e-30, 1e-30), (1e30, 1e30), (1e30, 1e-30), (1.0, 1e-38)])
def test_magnitudes_that_float32_squares_cannot_hold(isa, name, x_scale, grad_scale, method):
    case = CASES[name]
    x, grad = case.tensors(torch.float32)
    x, grad = x * x_scale, grad * grad_scale
    x[1] = 0
    got = F.conv_norms_sq(x, grad, **case.geometry, method=method)
    truth = reference.conv_norms_sq(x, grad, **case.geometry)
    torch.testing.assert_close(got, truth, rtol=1e-5, atol=0)
    assert got[1] == 0


@pytest.mark.parametrize("method", METHODS)
def test_float64_magnitudes(method):
    case = CASES["2d"]
    x, grad = case.tensors(torch.float64)
    for scale in (1e-80, 1e-140, 1e75):
        got = F.conv_norms_sq(x * scale, grad, **case.geometry, method=method)
        exact = reference.conv_norms_sq(x, grad, **case.geometry) * scale**2
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_samples_of_different_magnitude_in_one_batch(method):
    x, grad = PLAIN.tensors(torch.float32)
    factors = torch.tensor([1e-25, 1.0, 1e25]).reshape(3, 1, 1, 1)
    got = F.conv_norms_sq(x * factors, grad, **PLAIN.geometry, method=method)
    truth = reference.conv_norms_sq(x * factors, grad, **PLAIN.geometry)
    torch.testing.assert_close(got, truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("share", [1e-2, 1e-3, 1e-5])
def test_what_cancels_in_gram_is_done_again(isa, share):
    """All patches alike, gradients that add up to almost nothing: direct keeps the digits that Gram loses."""
    case = Case((4, 4), (1, 1), inputs=64, outputs=64)
    x, grad = case.tensors(torch.float32)
    x = x[:, :, :1, :1].expand_as(x)
    grad = grad - (1 - share) * grad.mean((2, 3), keepdim=True)
    truth = reference.conv_norms_sq(x, grad, **case.geometry)
    got = F.conv_norms_sq(x, grad, **case.geometry, method="gram")
    assert (got >= 0).all()
    torch.testing.assert_close(got, F.conv_norms_sq(x, grad, **case.geometry, method="direct"), rtol=1e-12, atol=0)
    # Float32 sums of gradients that cancel to this share of themselves.
    torch.testing.assert_close(got, truth, rtol=100 * EPS32 / share, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_not_finite_stays_visible(isa, method):
    x, grad = PLAIN.tensors(torch.float32)
    x[0, 0, 0, 0], grad[2, 0, 0, 0] = torch.nan, torch.inf
    got = F.conv_norms_sq(x, grad, **PLAIN.geometry, method=method)
    assert got[0].isnan()
    assert not got[2].isfinite()
    same = reference.conv_norms_sq(x[1:2], grad[1:2], **PLAIN.geometry)
    torch.testing.assert_close(got[1:2], same, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", [None, *METHODS])
@pytest.mark.parametrize(
    ("x_shape", "grad_shape"),
    [
        ((0, 5, 6), (0, 7, 6)),
        ((3, 0, 6), (3, 7, 6)),
        ((3, 5, 6), (3, 0, 6)),
        ((3, 5, 0), (3, 7, 0)),
        ((3, 5, 6), (3, 7, 0)),
    ],
)
def test_nothing_there_is_zero(x_shape, grad_shape, method):
    geometry = {"kernel_size": (3,), "stride": (1,), "padding": (1,), "dilation": (1,)}
    got = F.conv_norms_sq(torch.ones(x_shape), torch.ones(grad_shape), **geometry, method=method)
    assert got.dtype == torch.float64
    assert torch.equal(got, torch.zeros(x_shape[0], dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stride", [1, 2])
def test_transposed_convolution_is_this_with_exchanged_roles(method, stride):
    layer = torch.nn.ConvTranspose2d(4, 6, 3, stride=stride, padding=1, output_padding=stride - 1, groups=2, bias=False)
    x = torch.randn(3, 4, 5, 6)
    y = layer(x)
    upstream = torch.randn_like(y)
    got = F.conv_norms_sq(
        upstream, x, kernel_size=(3, 3), stride=(stride,) * 2, padding=(1, 1), dilation=(1, 1), groups=2, method=method
    )
    for b in range(3):
        (weight_grad,) = torch.autograd.grad((layer(x[b : b + 1]) * upstream[b : b + 1]).sum(), layer.weight)
        torch.testing.assert_close(got[b], weight_grad.double().square().sum(), rtol=1e-5, atol=0)


def test_repeated_calls_agree_bit_for_bit():
    small, large = (Case((n, n), (3, 3), inputs=17, outputs=33).tensors(torch.float32) for n in (5, 20))
    geometry = CASES["2d"].geometry
    for method in METHODS[:2]:
        first = F.conv_norms_sq(*_same_size(small), **geometry, method=method)
        F.conv_norms_sq(*_same_size(large), **geometry, method=method)  # other contents of the kept memory
        assert same_bits(first, F.conv_norms_sq(*_same_size(small), **geometry, method=method))


def _same_size(tensors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return tensors[0], tensors[1]


def test_inside_a_compiled_function():
    x, grad = PLAIN.tensors(torch.float32)

    def both(x: Tensor, grad: Tensor) -> Tensor:
        return F.conv_norms_sq(x * 2, grad, **PLAIN.geometry).sqrt()

    got = torch.compile(both, backend="aot_eager", fullgraph=True)(x, grad)
    torch.testing.assert_close(got, both(x, grad), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("x", "grad", "kernel", "method"),
    [
        ((64, 512, 4, 4), (64, 512, 4, 4), (3, 3), "gram"),
        ((64, 128, 8, 8), (64, 128, 8, 8), (3, 3), "gram"),
        ((64, 64, 16, 16), (64, 64, 16, 16), (3, 3), "direct"),
        ((64, 3, 32, 32), (64, 64, 32, 32), (3, 3), "direct"),
        ((64, 512, 1, 1), (64, 512, 1, 1), (1, 1), "gram"),
        ((1, 2, 2**40), (1, 2, 2**40), (2**40,), "direct"),
        ((1, 0, 4), (1, 3, 4), (3,), "direct"),
    ],
)
def test_choice(x, grad, kernel, method):
    assert conv_method(x, grad, kernel_size=kernel, padding=tuple(k // 2 for k in kernel)) == method


@pytest.mark.parametrize(
    ("x", "grad", "kernel", "groups", "method"),
    [
        ((64, 512, 7, 7), (64, 512, 7, 7), (3, 3), 1, "gram"),
        ((64, 64, 32, 32), (64, 128, 32, 32), (3, 3), 1, "direct"),
        ((64, 64, 8, 8), (64, 256, 8, 8), (1, 1), 1, "direct"),
        ((64, 64, 6, 6), (64, 256, 6, 6), (1, 1), 1, "direct"),  # a tile of 36 positions is not full enough
        ((64, 256, 6, 6), (64, 256, 6, 6), (1, 1), 1, "gram"),
        ((64, 256, 6, 6), (64, 256, 6, 6), (1, 1), 4, "direct"),
        ((64, 32, 2, 2), (64, 32, 2, 2), (3, 3), 32, "direct"),
        ((64, 512, 1), (64, 512, 1), (1,), 1, "gram"),
    ],
)
def test_choice_on_a_cuda_device(x, grad, kernel, groups, method):
    """As a Linear layer's that sees patches as tokens."""
    padding = tuple(k // 2 for k in kernel)
    found = conv_method(x, grad, kernel_size=kernel, padding=padding, groups=groups, device="cuda:0")
    assert found == method
    patch = x[1] // groups * math.prod(kernel)
    assert found == F.linear_method(math.prod(grad[2:]), patch, grad[1] // groups, device="cuda:0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_shape": [1, 2]}, r"^x_shape: expected \[B, C, \*space\], one to three .*got \[1, 2\]"),
        ({"x_shape": [1, 2, 4, 4, 4, 4]}, r"^x_shape: .*one to three spatial dimensions, got \[1, 2, 4, 4, 4, 4\]"),
        ({"grad_shape": [1, 2, 4]}, r"^grad_shape: expected \[B, O, \*space\] with the 2 .*got \[1, 2, 4\]"),
        ({"kernel_size": [1]}, r"^kernel_size: expected 2 integers, one per spatial dimension of x_shape, got \[1\]"),
        ({"padding": [0, 0, 0]}, r"^padding: expected 2 integers, one per .*got \[0, 0, 0\]"),
    ],
)
def test_a_choice_for_sizes_that_do_not_fit(change, message):
    sizes = {"x_shape": [1, 2, 4, 4], "grad_shape": [1, 2, 4, 4], "kernel_size": [1, 1], "padding": [0, 0]}
    with pytest.raises(ValueError, match=message):
        conv_method(**sizes | change)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "op"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 5)}, ValueError, r"x: expected \[B, C, \*space\].*got shape \[3, 5\]; x\.unsqueeze"),
        ({"x": torch.zeros(3, 5, 6, 7, dtype=torch.int64)}, TypeError, r"x: .*int64"),
        ({"grad": torch.zeros(3, 7, 6)}, ValueError, r"grad: expected \[3, O, \*space\].*got shape \[3, 7, 6\]; pass"),
        ({"grad": torch.zeros(2, 7, 6, 7)}, ValueError, r"grad: expected \[3, O, \*space\].*got shape \[2, 7, 6, 7\]"),
        (
            {"grad": torch.zeros(3, 7, 7, 7)},
            ValueError,
            r"grad: expected at most the \[6, 7\] positions.*\[3, 7, 7, 7\]",
        ),
        ({"kernel_size": (3,)}, ValueError, r"kernel_size: expected 2 integers.*got .*3"),
        ({"kernel_size": (0, 3)}, ValueError, r"kernel_size: expected integers of at least 1, got \[0, 3\]"),
        ({"stride": (0, 1)}, ValueError, r"stride: expected integers of at least 1, got \[0, 1\]"),
        ({"padding": (-1, 1)}, ValueError, r"padding: expected integers of at least 0, got \[-1, 1\]"),
        ({"dilation": (1, 1, 1)}, ValueError, r"dilation: expected 2 integers"),
        ({"groups": 2}, ValueError, r"groups: expected a divisor of the 5 channels of x, got 2"),
        ({"groups": 0}, ValueError, r"groups: expected a divisor"),
        ({"groups": 5}, ValueError, r"grad: .*O a multiple of 5 groups"),
        ({"method": "ghost"}, ValueError, r"method: expected 'gram', 'direct', 'portable' or None, got 'ghost'"),
    ],
)
def test_errors(change, error, message, traced):
    x, grad = PLAIN.tensors(torch.float32)
    arguments = {"x": x, "grad": grad, **PLAIN.geometry, **change}
    with pytest.raises(error, match=message):
        (torch.ops.lipcore.conv_norms_sq if traced else F.conv_norms_sq)(**arguments)


def test_what_is_no_tensor_is_refused():
    x, grad = PLAIN.tensors(torch.float32)
    with pytest.raises(TypeError, match="x: "):
        F.conv_norms_sq(x.tolist(), grad, **PLAIN.geometry)
    with pytest.raises(TypeError, match="grad: "):
        F.conv_norms_sq(x, None, **PLAIN.geometry)
    with pytest.raises(ValueError, match="kernel_size: expected 2 integers.*got 3"):
        F.conv_norms_sq(x, grad, **{**PLAIN.geometry, "kernel_size": 3})


# ---- on a CUDA device


def _assert_on_cuda(case: Case, x: Tensor, grad: Tensor, methods: Sequence[str] = METHODS[:2]) -> None:
    if grad[0, 0].numel() > 200:  # whose Gram matrices take the emulator half a minute
        methods = [method for method in methods if method != "gram"]
    there, truth = (placed_as_it_is(x), placed_as_it_is(grad)), _truth(case, x.detach(), grad.detach())
    for method in methods:
        got = F.conv_norms_sq(*there, **case.geometry, method=method)
        assert got.is_cuda
        _assert_near(got.cpu(), *truth, torch.float64 in (x.dtype, grad.dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_geometries_on_cuda(dtype):
    for name in CASES if dtype == "f32" else [n for n in FEW if n[1] == "d"][::3]:
        _assert_on_cuda(CASES[name], *CASES[name].tensors(DTYPES[dtype]))


@pytest.mark.gpu
def test_layouts_and_dtypes_on_cuda():
    for name in ("1d", "2d", "2d, groups", "3d"):
        for layout in ("transposed", "sliced", "expanded", "offset", "channels_last"):
            x, grad = (in_layout(t, layout) for t in CASES[name].tensors(torch.float32))
            if x is not None and grad is not None:
                _assert_on_cuda(CASES[name], x, grad)
    x, grad = PLAIN.tensors(torch.float32)
    for one, other in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float64, torch.float32)):
        _assert_on_cuda(PLAIN, x.to(one), grad.to(other))
    strided = Case((6, 7), (1, 1), outputs=3)
    x, grad = strided.tensors(torch.float32)
    _assert_on_cuda(strided, x.movedim(2, 3).contiguous().movedim(2, 3), grad)
    _assert_on_cuda(strided, x, grad.movedim(2, 3).contiguous().movedim(2, 3))


#: Channels of a pixel that may be copied eight at a time.
PIXELS = (
    Case((5, 4), (3, 2), inputs=8, outputs=5, samples=2, options={"padding": (2, 1), "dilation": (1, 2)}),
    Case((9, 8), (2, 2), inputs=32, outputs=10, samples=2, groups=2, options={"stride": (2, 1)}),
    Case((9, 9), (1, 1), inputs=24, outputs=9, samples=1, options={"padding": (1, 0)}),
    Case((4, 5), (2, 2), inputs=16, outputs=8, samples=2, groups=4),  # four of eight channels are another group's
)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_tensor_cores_on_cuda(dtype):
    """Positions, or channels, that are copied eight at a time, and patches that are not."""
    wide = Case((8, 8), (3, 3), inputs=9, outputs=70, samples=2, options={"padding": (1, 1)})
    point = Case((8, 8), (1, 1), inputs=16, outputs=24, samples=2)
    groups = Case((8, 8), (1, 1), inputs=8, outputs=8, samples=2, groups=2)
    for case in (wide, point, groups, *PIXELS):
        x, grad = case.tensors(DTYPES[dtype])
        _assert_on_cuda(case, x, grad)
        _assert_on_cuda(case, *(in_layout(t, "channels_last") for t in (x, grad)))


@pytest.mark.gpu
def test_layouts_change_no_bit_on_cuda():
    """Eight channels of a pixel at a time where they lie on 16 bytes, else one by one."""
    for case in PIXELS:
        x, grad = (t.cuda() for t in case.tensors(torch.bfloat16))
        pixels = x.to(memory_format=torch.channels_last)
        memory = torch.zeros(pixels.numel() + 4, dtype=x.dtype, device="cuda")
        moved = memory[4:].as_strided(x.shape, pixels.stride(), 4).copy_(x)
        gaps = x.new_zeros(*x.shape[:1], *x.shape[2:], x.shape[1] + 4).movedim(-1, 1)[:, :-4].copy_(x)
        for method in METHODS[:2]:
            expected = F.conv_norms_sq(x, grad, **case.geometry, method=method).cpu()
            for other in (pixels, moved, gaps):
                found = F.conv_norms_sq(other, grad, **case.geometry, method=method).cpu()
                assert same_bits(found, expected)


@pytest.mark.gpu
def test_range_and_special_values_on_cuda():
    x, grad = PLAIN.tensors(torch.float32)
    for x_scale, grad_scale in ((1e-30, 1e-30), (1e30, 1e30), (1e-38, 1e37), (0.0, 1.0)):
        _assert_on_cuda(PLAIN, x * x_scale, grad * grad_scale)
    x, grad = x.double(), grad.double()
    for x_scale, grad_scale in ((1e-200, 1e100), (1e200, 1e-200)):
        _assert_on_cuda(PLAIN, x * x_scale, grad * grad_scale)
    x[1, 0, 2, 3] = torch.nan
    assert F.conv_norms_sq(x.float().cuda(), grad.cuda(), **PLAIN.geometry).isnan().tolist() == [False, True, False]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_cancels_in_gram_is_done_again_on_cuda(dtype):
    """All patches alike, gradients of two groups that add up to nothing, or to almost nothing."""
    case = Case((4, 5), (2, 2), inputs=16, outputs=12, groups=2)
    x, grad = case.tensors(torch.float32)
    x = x[:, :, :1, :1].expand_as(x).to(dtype)
    for kept in (1e-2, 1e-4):
        _assert_on_cuda(case, x, (grad - (1 - kept) * grad.mean((2, 3), keepdim=True)).to(dtype))
    opposite = torch.cat([grad[..., :2], -grad[..., :2]], -1).to(dtype)
    found = F.conv_norms_sq(x.cuda(), opposite.cuda(), **case.geometry, method="gram")
    direct = F.conv_norms_sq(x.cuda(), opposite.cuda(), **case.geometry, method="direct")
    torch.testing.assert_close(found, direct, rtol=1e-12, atol=1e-9)


@pytest.mark.gpu
def test_the_chosen_method_on_cuda():
    """By the sizes of patches, with or without tensor cores: nothing waits."""
    wide = Case((5, 5), (1, 1), inputs=256, outputs=256)
    for case, method in ((wide, "gram"), (CASES["1d, depthwise"], "direct")):
        x, grad = (t.cuda() for t in case.tensors(torch.float32))
        g = case.geometry
        sizes = {key: g[key] for key in ("kernel_size", "padding", "groups")}
        assert conv_method(x.shape, grad.shape, **sizes, device=x.device) == method
        with nothing_waits():
            chosen, named = (F.conv_norms_sq(x, grad, **g, method=m) for m in (None, method))
        assert same_bits(chosen.cpu(), named.cpu())


@pytest.mark.gpu
def test_portable_on_cuda():
    x, grad = PLAIN.tensors(torch.float32)
    _assert_on_cuda(PLAIN, x, grad, ["portable"])


@pytest.mark.gpu
def test_races_on_cuda():
    """For the thread sanitizer."""
    _assert_on_cuda(PLAIN, *PLAIN.tensors(torch.float32))
    _assert_on_cuda(PLAIN, *PLAIN.tensors(torch.bfloat16))
    x, grad = PIXELS[0].tensors(torch.bfloat16)
    _assert_on_cuda(PIXELS[0], x.to(memory_format=torch.channels_last), grad)
