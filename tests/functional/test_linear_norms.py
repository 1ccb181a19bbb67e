"""Linear layers with several rows per sample: both ways of contracting, the fused weight gradient, the estimate."""

from __future__ import annotations

import doctest
import itertools
import math

import pytest
import torch
from cases import FEW_SIZES, thinned
from devices import placed_as_it_is
from emulated_core import emulator
from oracle import DTYPES, in_layout, same_bits
from torch import Tensor

from lipcore import _core, functional
from lipcore.functional import linear, reference

METHODS = (None, "gram", "direct")
EXACT = {"f32": 2e-6, "f64": 5e-14, "bf16": 2e-6, "f16": 2e-6}
ODD = (0, 1, 2, 3, 7, 15, 16, 17, 63, 64, 65, 129)
# (B, T, I, O): every size in every place, several blocks, and lengths over one panel.
SIZES = [
    *[(2, n, 5, 3) for n in ODD],
    *[(2, 5, n, 3) for n in ODD],
    *[(2, 5, 3, n) for n in ODD],
    (0, 3, 4, 5),
    (1, 300, 270, 33),
    (2, 530, 20, 290),
    (5, 33, 65, 129),
]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(b: int, t: int, i: int, o: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return randn(b, t, i, dtype=dtype), randn(b, t, o, seed=1, dtype=dtype)


def assert_near(got: Tensor, truth: Tensor, tolerance: float) -> None:
    assert got.dtype == torch.float64
    assert not got.requires_grad
    torch.testing.assert_close(got, truth, rtol=tolerance, atol=0)


FEW = [size for size in SIZES if size[0] != 2 or set(size[1:]) <= {5, 3, *FEW_SIZES}]


@pytest.mark.parametrize(("size", "dtype"), thinned(SIZES, FEW))
def test_sizes(size, dtype, isa):
    x, grad = pair(*size, dtype=DTYPES[dtype])
    truth = reference.linear_norms_sq(x, grad)
    tolerance = EXACT[dtype] * max(1, size[1] ** 0.5 / 4)
    for method in METHODS:
        assert_near(functional.linear_norms_sq(x, grad, method=method), truth, tolerance)
    total, norms = functional.linear_weight_grad(x, grad)
    assert_near(norms, truth, tolerance)
    assert total.dtype == x.dtype
    expected, _ = reference.linear_weight_grad(x, grad)
    theirs = (grad.flatten(0, -2).T @ x.flatten(0, -2)).double()
    error, their_error = ((t.double() - expected).abs().max() if t.numel() else 0.0 for t in (total, theirs))
    largest = expected.abs().max() if expected.numel() else 0.0
    rows = size[0] * size[1]
    assert error <= 2 * their_error + (4 + rows**0.5) * torch.finfo(x.dtype).eps * largest


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "offset", "requires_grad", "imag_of_conjugate"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_layouts(layout, dtype):
    x, grad = (in_layout(t, layout) for t in pair(3, 17, 19, 33, dtype=DTYPES[dtype]))
    if x is None:
        pytest.skip("this layout does not exist in this dtype")
    truth = reference.linear_norms_sq(x.detach(), grad.detach())
    for method in METHODS:
        assert_near(functional.linear_norms_sq(x, grad, method=method), truth, 4e-6)
    total, norms = functional.linear_weight_grad(x, grad)
    assert_near(norms, truth, 4e-6)
    tolerance = 1e-5 if dtype == "f32" else 1e-2
    expected = reference.linear_weight_grad(x.detach(), grad.detach())[0]
    torch.testing.assert_close(total.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("size", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)], ids=str)
def test_nothing_in_any_strides(size):
    x, grad = (in_layout(t, "transposed") for t in pair(*size))
    assert (functional.linear_norms_sq(x, grad) == 0).all()
    assert (functional.linear_weight_grad(x, grad)[1] == 0).all()


def test_more_dimensions_are_more_rows():
    x, grad = randn(2, 3, 4, 5), randn(2, 3, 4, 7, seed=1)
    flat = functional.linear_norms_sq(x.flatten(1, 2), grad.flatten(1, 2))
    assert same_bits(functional.linear_norms_sq(x, grad), flat)
    assert same_bits(
        functional.linear_norms_sq(x[:, 0, 0], grad[:, 0, 0]), functional.linear_norms_sq(x[:, 0, :1], grad[:, 0, :1])
    )


@pytest.mark.parametrize(("x_dtype", "grad_dtype"), [*itertools.permutations(DTYPES, 2)])
def test_mixed_dtypes(x_dtype, grad_dtype):
    x, grad = randn(3, 7, 9, dtype=DTYPES[x_dtype]), randn(3, 7, 5, seed=1, dtype=DTYPES[grad_dtype])
    assert_near(functional.linear_norms_sq(x, grad), reference.linear_norms_sq(x, grad), 2e-6)
    total, norms = functional.linear_weight_grad(x, grad)
    assert total.dtype == torch.promote_types(x.dtype, grad.dtype)
    assert_near(norms, reference.linear_norms_sq(x, grad), 2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offsets", [[0, 0, 5, 5, 40, 40], [0, 40], [0, 1, 2, 40], [0]], ids=str)
def test_packed_documents(offsets, dtype, isa):
    rows = offsets[-1]
    x, grad = randn(rows, 17, dtype=DTYPES[dtype]), randn(rows, 9, seed=1, dtype=DTYPES[dtype])
    starts = torch.tensor(offsets)
    truth, tolerance = reference.linear_norms_sq(x, grad, offsets=starts), 4 * EXACT[dtype]
    for method in METHODS:
        assert_near(functional.linear_norms_sq(x, grad, offsets=starts.int(), method=method), truth, tolerance)
    total, norms = functional.linear_weight_grad(x, grad, offsets=starts)
    assert_near(norms, truth, tolerance)
    expected = reference.linear_weight_grad(x, grad, offsets=starts)[0]
    tolerance = 4 * torch.finfo(x.dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(total.double(), expected, rtol=0, atol=max(tolerance, 1e-30))


def test_documents_longer_than_a_panel_and_shorter():
    offsets = torch.tensor([0, 10, 20, 400, 410, 411, 1200])
    x, grad = randn(1200, 70), randn(1200, 50, seed=1)
    total, norms = functional.linear_weight_grad(x, grad, offsets=offsets)
    expected, truth = reference.linear_weight_grad(x, grad, offsets=offsets)
    assert_near(norms, truth, 1e-5)
    torch.testing.assert_close(total.double(), expected, rtol=0, atol=1e-6 * float(expected.abs().max()) * 8)


@pytest.mark.parametrize("size", [(3, 65, 129, 300), (1, 700, 40, 20), (9, 16, 17, 520)], ids=str)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_threads_change_no_bit(size, dtype, isa, two_threads):
    x, grad = pair(*size, dtype=DTYPES[dtype])

    def everything() -> list[Tensor]:
        return [
            *(functional.linear_norms_sq(x, grad, method=m) for m in METHODS),
            *functional.linear_weight_grad(x, grad),
        ]

    two = everything()
    torch.set_num_threads(1)
    assert all(same_bits(a, b) for a, b in zip(two, everything(), strict=True))


@pytest.mark.parametrize(
    ("x_scale", "grad_scale"), [(1e-30, 1), (1e30, 1), (1e-30, 1e-30), (1e30, 1e30), (1e-38, 1e38)]
)
def test_magnitudes(x_scale, grad_scale, isa):
    """Products of float32 values leave its range on both sides."""
    x, grad = pair(3, 20, 40, 30)
    x, grad = x * x_scale, grad * grad_scale
    x[1], grad[2] = x[1] * 1e-3, 0
    truth = reference.linear_norms_sq(x, grad)
    for method in METHODS:
        assert_near(functional.linear_norms_sq(x, grad, method=method), truth, 4e-6)
    assert_near(functional.linear_weight_grad(x, grad)[1], truth, 4e-6)


def test_extremes_of_float64(isa):
    x, grad = pair(2, 5, 4, 3, dtype=torch.float64)
    for scale in (1e-100, 1e-200, 1e100):
        found = functional.linear_norms_sq(x * scale, grad / scale)
        assert_near(found, reference.linear_norms_sq(x, grad), 1e-13)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_with_its_sample(value, isa):
    x, grad = pair(3, 20, 40, 30)
    clean = {method: functional.linear_norms_sq(x, grad, method=method) for method in METHODS}
    x[1, 3, 5] = value
    for method in METHODS:
        found = functional.linear_norms_sq(x, grad, method=method)
        assert not found[1].isfinite()
        assert same_bits(found[[0, 2]], clean[method][[0, 2]])


def test_gram_knows_when_it_has_lost_its_digits(isa):
    """One input at every token, gradients that nearly cancel: kernels that add up the Gram form are off by more than
    the number itself."""
    x = randn(2, 1, 40).expand(2, 64, 40)
    grad = randn(2, 64, 30, seed=1)
    for kept in (1e-1, 1e-2, 1e-4):
        cancelling = grad - grad.mean(1, keepdim=True) * (1 - kept)
        truth = reference.linear_norms_sq(x, cancelling)
        for method in METHODS:
            found = functional.linear_norms_sq(x, cancelling, method=method)
            assert (found >= 0).all()
            # What float32 sums of such terms allow: the terms are 1 / kept times their sum.
            torch.testing.assert_close(found, truth, rtol=3e-7 * 8 / kept, atol=0)
    exact = torch.cat([grad, -grad], 1)
    both = torch.cat([x, x], 1)
    assert (functional.linear_norms_sq(both, exact, method="gram") <= 1e-10 * float(exact.square().sum())).all()


def test_which_method_is_chosen():
    assert functional.linear_method(4, 1024, 1024) == "gram"
    assert functional.linear_method(2048, 64, 64) == "direct"
    assert functional.linear_method(0, 0, 0) == "direct"
    with pytest.raises(ValueError, match="tokens: expected an integer >= 0, got -1"):
        functional.linear_method(-1, 2, 3)
    x, grad = pair(2, 4, 129, 65)
    assert same_bits(functional.linear_norms_sq(x, grad), functional.linear_norms_sq(x, grad, method="gram"))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_inside_compiled_regions(backend):
    x, grad = pair(3, 9, 17, 5)

    @torch.compile(backend=backend, fullgraph=True)
    def both(x: Tensor, grad: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
        packed = functional.linear_norms_sq(x.flatten(0, 1), grad.flatten(0, 1), offsets=offsets)
        return functional.linear_norms_sq(x, grad, method="direct"), *functional.linear_weight_grad(x, grad), packed

    found = both(x, grad, torch.arange(4) * 9)
    norms = functional.linear_norms_sq(x, grad, method="direct")
    assert same_bits(found[0], norms)
    assert same_bits(found[1], functional.linear_weight_grad(x, grad)[0])
    torch.testing.assert_close(found[3], norms, rtol=1e-5, atol=0)


def test_the_estimate_is_unbiased_and_knows_its_error():
    x, grad = pair(3, 64, 33, 17)
    x[1] = x[1, :1]  # rank 1
    truth = reference.linear_norms_sq(x, grad)
    generator = torch.Generator().manual_seed(7)
    runs = [functional.linear_norms_sq_estimate(x, grad, probes=16, generator=generator) for _ in range(400)]
    estimates, errors = (torch.stack(t) for t in zip(*runs, strict=True))
    spread = estimates.std(0)
    assert ((estimates.mean(0) - truth).abs() < 4 * spread / 20).all()
    assert ((errors.square().mean(0).sqrt() / spread - 1).abs() < 0.2).all()
    assert spread[1] / truth[1] > 0.3  # sqrt(2 / 16)
    signs = 2 * torch.randint(0, 2, (33, 16), generator=torch.Generator().manual_seed(3)) - 1
    found = functional.linear_norms_sq_estimate(x, grad, generator=torch.Generator().manual_seed(3))
    for ours, theirs in zip(found, reference.linear_norms_sq_estimate(x, grad, signs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)


def test_the_estimate_of_packed_documents():
    x, grad, offsets = randn(40, 9), randn(40, 5, seed=1), torch.tensor([0, 0, 15, 40])
    truth = reference.linear_norms_sq(x, grad, offsets=offsets)
    found, error = functional.linear_norms_sq_estimate(x, grad, probes=4096, offsets=offsets)
    assert found.shape == error.shape == (3,)
    assert ((found - truth).abs() <= 6 * error).all()


@pytest.mark.parametrize("method", METHODS)
def test_refusals(method):
    x, grad = pair(3, 4, 5, 6)

    def refused(message: str, *arguments: object, kind: type[Exception] = ValueError, **options: object) -> None:
        for call in (functional.linear_norms_sq, functional.linear_weight_grad, functional.linear_norms_sq_estimate):
            with pytest.raises(kind, match=message):
                call(*arguments, **options)

    refused(r"grad: expected the samples and tokens of x, \[3, 4\], got shape \[3, 3, 6\]", x, grad[:, :3])
    refused(r"x: expected \[B, ..., features\].*got shape \[5\]", x[0, 0], grad)
    refused("x", None, grad, kind=TypeError)
    refused("grad", x, grad.long(), kind=(TypeError, ValueError))
    refused("x: expected packed rows", x, grad, offsets=torch.tensor([0, 3]))
    flat = x.flatten(0, 1), grad.flatten(0, 1)
    for offsets in ([0, 11], [1, 12], [0, 7, 5, 12], [-1, 12], [0, 13]):
        refused("offsets: expected to ascend from 0 to the number of rows, 12", *flat, offsets=torch.tensor(offsets))
    refused("offsets: expected an int64 or int32", *flat, offsets=[0, 12], kind=TypeError)
    refused("offsets: expected an int64 or int32", *flat, offsets=torch.tensor([0.0, 12.0]), kind=TypeError)
    refused("offsets: .*empty", *flat, offsets=torch.tensor([], dtype=torch.int64))
    with pytest.raises(ValueError, match="method: expected 'gram', 'direct' or None, got 'fast'"):
        functional.linear_norms_sq(x, grad, method="fast")
    for probes in (1, 2.5, True):
        with pytest.raises(ValueError, match="probes: expected an integer >= 2"):
            functional.linear_norms_sq_estimate(x, grad, probes=probes)


def test_examples():
    result = doctest.testmod(linear)
    assert result.attempted
    assert not result.failed


# ---- on a CUDA device

ON_A_DEVICE = [
    *((2, n, 5, 3) for n in (0, 1, 15, 16, 17, 65, 130)),
    *((2, 5, n, 3) for n in (0, 1, 17, 64, 129)),
    *((2, 5, 3, n) for n in (0, 1, 17, 64, 129)),
    *[(0, 3, 4, 5), (1, 40, 70, 33), (3, 33, 65, 129), (2, 70, 136, 72), (1, 130, 16, 8)],
]


def check_on_cuda(x: Tensor, grad: Tensor, tolerance: float, offsets: Tensor | None = None) -> None:
    truth = reference.linear_norms_sq(x, grad, offsets=offsets)
    there = [placed_as_it_is(t) for t in (x, grad, offsets)]
    for method in METHODS:
        found = functional.linear_norms_sq(*there[:2], offsets=there[2], method=method)
        assert found.is_cuda
        assert_near(found.cpu(), truth, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_on_cuda(dtype):
    for size in ON_A_DEVICE[:: 1 if dtype == "f32" else 3]:
        x, grad = pair(*size, dtype=DTYPES[dtype])
        check_on_cuda(x, grad, EXACT[dtype] * max(1, size[1] ** 0.5 / 4))


@pytest.mark.gpu
def test_layouts_and_dtypes_on_cuda():
    for layout in ("transposed", "sliced", "expanded", "offset"):
        for dtype in DTYPES.values():
            x, grad = (in_layout(t, layout) for t in pair(3, 17, 19, 33, dtype=dtype))
            check_on_cuda(x, grad, 4e-6)
    for x_dtype, grad_dtype in itertools.permutations(DTYPES, 2):
        check_on_cuda(randn(3, 7, 9, dtype=DTYPES[x_dtype]), randn(3, 7, 5, seed=1, dtype=DTYPES[grad_dtype]), 2e-6)
    x, grad = randn(2, 3, 4, 5), randn(2, 3, 4, 7, seed=1)
    check_on_cuda(x, grad, 2e-6)
    check_on_cuda(x[:, 0, 0], grad[:, 0, 0], 2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_layouts_change_no_bit_on_cuda(dtype):
    """Eight neighbours at a time are copied where they lie on 16 bytes, else one by one."""
    for size in ((3, 40, 72, 80), (2, 72, 136, 200)):
        x, grad = pair(*size, dtype=DTYPES[dtype])
        expected = {method: functional.linear_norms_sq(x.cuda(), grad.cuda(), method=method) for method in METHODS}
        for layout in ("transposed", "sliced", "offset"):
            there = [placed_as_it_is(in_layout(t, layout)) for t in (x, grad)]
            for method in METHODS:
                assert same_bits(functional.linear_norms_sq(*there, method=method), expected[method])
        there = [t.mT.contiguous().cuda().mT for t in (x, grad)]
        for method in METHODS:
            assert same_bits(functional.linear_norms_sq(*there, method=method), expected[method])


@pytest.mark.gpu
def test_vectors_on_cuda():
    """Rows of eight elements, where samples or the first element do not lie on 16 bytes."""
    memory = randn(3 * (40 * 72 + 8) + 8, dtype=torch.bfloat16)
    grad = randn(3, 40, 16, seed=1, dtype=torch.bfloat16)
    for gap, offset in ((0, 0), (4, 0), (0, 4), (8, 8)):
        x = memory.as_strided((3, 40, 72), (40 * 72 + gap, 72, 1), offset)
        check_on_cuda(x, grad, 4e-6)


@pytest.fixture(params=[90, 75], ids=["tensor cores", "none"])
def capability(request: pytest.FixtureRequest) -> int:
    if emulator is not None:
        emulator.set_capability(request.param)
    elif (torch.cuda.get_device_capability() >= (8, 0)) != (request.param >= 80):
        pytest.skip("of another device")
    return request.param


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_16_bit_on_cuda(dtype, capability, monkeypatch):
    monkeypatch.setattr(linear, "fills_a_device", lambda inputs, outputs: True)
    for size in ((2, 33, 72, 70), (1, 20, 130, 9)):
        x, grad = pair(*size, dtype=DTYPES[dtype])
        check_on_cuda(x, grad, 4e-6)
        total, norms = functional.linear_weight_grad(x.cuda(), grad.cuda())
        assert_near(norms.cpu(), reference.linear_norms_sq(x, grad), 4e-6)
        expected = reference.linear_weight_grad(x, grad)[0]
        error = 4 * torch.finfo(x.dtype).eps * float(expected.abs().max())
        torch.testing.assert_close(total.cpu().double(), expected, rtol=0, atol=error)
    for scale in (1e-30, 1e30) if dtype == "bf16" else ():
        check_on_cuda(x * scale, grad * scale, 4e-6)
    assert _core.cuda_multiplies_16_bit(0) is (capability >= 80)


@pytest.mark.gpu
def test_large_weight_grad_on_cuda():
    """So many tiles that they are large."""
    x, grad = pair(2, 3, 1921, 1030, dtype=torch.bfloat16)
    total, norms = functional.linear_weight_grad(x.cuda(), grad.cuda())
    assert_near(norms.cpu(), reference.linear_norms_sq(x, grad), 2e-6)
    expected = reference.linear_weight_grad(x, grad)[0]
    torch.testing.assert_close(total.cpu().double(), expected, rtol=0, atol=2**-7 * float(expected.abs().max()))


@pytest.mark.gpu
def test_packed_documents_on_cuda():
    for dtype in DTYPES:
        for offsets in ([0, 0, 5, 5, 40, 40], [0, 40], [0, 1, 2, 40], [0]):
            x, grad = randn(offsets[-1], 17, dtype=DTYPES[dtype]), randn(offsets[-1], 9, seed=1, dtype=DTYPES[dtype])
            check_on_cuda(x, grad, 4 * EXACT[dtype], torch.tensor(offsets))
    offsets = torch.tensor([0, 3, 21, 40])
    x, grad = randn(40, 16, dtype=torch.bfloat16), randn(40, 24, seed=1, dtype=torch.bfloat16)
    check_on_cuda(x, grad, 2e-6, offsets)
    check_on_cuda(x.T.contiguous().T, grad, 2e-6, offsets)
    for offsets in ([1, 40], [0, 39], [0, 30, 20, 40], [0, 41, 40]):
        found = functional.linear_norms_sq(
            torch.ones(40, 3).cuda(), torch.ones(40, 2).cuda(), offsets=torch.tensor(offsets)
        )
        assert found.isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("fills", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_grad_on_cuda(dtype, fills, monkeypatch):
    """By one kernel for both from so many tiles on, else by torch's product and the norms."""
    monkeypatch.setattr(linear, "fills_a_device", lambda inputs, outputs: fills)
    for size in [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (3, 17, 5, 7), (2, 33, 65, 130)]:
        x, grad = pair(*size, dtype=DTYPES[dtype])
        total, norms = functional.linear_weight_grad(x.cuda(), grad.cuda())
        assert_near(norms.cpu(), reference.linear_norms_sq(x, grad), 4 * EXACT[dtype])
        assert total.dtype == x.dtype
        expected = reference.linear_weight_grad(x, grad)[0]
        largest = float(expected.abs().max()) if expected.numel() else 0
        error = 8 * torch.finfo(x.dtype).eps * largest
        torch.testing.assert_close(total.cpu().double(), expected, rtol=0, atol=max(error, 1e-30))
    starts = torch.tensor([0, 0, 5, 9])
    x, grad = (t[0, :9].contiguous() for t in pair(1, 33, 65, 70, dtype=DTYPES[dtype]))
    total, norms = functional.linear_weight_grad(x.cuda(), grad.cuda(), offsets=starts.cuda())
    assert_near(norms.cpu(), reference.linear_norms_sq(x, grad, offsets=starts), 4 * EXACT[dtype])
    expected = reference.linear_weight_grad(x, grad, offsets=starts)[0]
    error = 8 * torch.finfo(x.dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(total.cpu().double(), expected, rtol=0, atol=error)
    if fills and dtype in ("f32", "f64"):
        total, norms = functional.linear_weight_grad(x.cuda(), grad.cuda(), offsets=torch.tensor([0, 8]).cuda())
        assert norms.isnan().all()
        assert total.isnan().all()
        tiny, _ = functional.linear_weight_grad(x[None].cuda() * 1e-25, grad[None].cuda())
        torch.testing.assert_close(
            tiny.cpu().double() * 1e25, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
        )


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(3, 20, 40, 30), (3, 5, 70, 66)])
def test_range_and_special_values_on_cuda(size):
    x, grad = pair(*size)
    scales = (1e-30, 1), (1e30, 1), (1e-30, 1e-30), (1e30, 1e30), (1e-38, 1e38), (1e-15, 1e-10)
    for x_scale, grad_scale in scales:
        a, g = x * x_scale, grad * grad_scale
        a[1], g[2] = a[1] * 1e-3, 0
        check_on_cuda(a, g, 4e-6)
    wide, wide_grad = x.double(), grad.double()
    for scale in (1e-100, 1e-200, 1e100):
        truth = reference.linear_norms_sq(wide, wide_grad)
        found = functional.linear_norms_sq((wide * scale).cuda(), (wide_grad / scale).cuda())
        assert_near(found.cpu(), truth, 1e-13)
    huge = torch.full((1, 2, 3), 2.0**600, dtype=torch.float64).cuda()  # whose products are exact
    opposite = huge * torch.tensor([[[1.0], [-1.0]]]).cuda()
    assert functional.linear_norms_sq(huge, opposite, method="direct").tolist() == [0.0]
    for value in (math.nan, math.inf, -math.inf):
        clean = {method: functional.linear_norms_sq(x.cuda(), grad.cuda(), method=method).cpu() for method in METHODS}
        bad = x.clone()
        bad[1, 3, 5] = value
        for method in METHODS:
            found = functional.linear_norms_sq(bad.cuda(), grad.cuda(), method=method).cpu()
            assert not found[1].isfinite()
            assert same_bits(found[[0, 2]], clean[method][[0, 2]])


@pytest.mark.gpu
def test_gram_knows_when_it_has_lost_its_digits_on_cuda():
    x, grad = randn(2, 1, 40).expand(2, 64, 40), randn(2, 64, 30, seed=1)
    for kept in (1e-1, 1e-2, 1e-4):
        cancelling = grad - grad.mean(1, keepdim=True) * (1 - kept)
        check_on_cuda(x, cancelling, 3e-7 * 8 / kept)
    both, exact = torch.cat([x, x], 1).cuda(), torch.cat([grad, -grad], 1).cuda()
    found = functional.linear_norms_sq(both, exact, method="gram").cpu()
    assert (found <= 1e-10 * float(grad.square().sum())).all()


@pytest.mark.gpu
def test_captured_in_a_graph_on_cuda():
    x, grad = torch.ones(3, 20, 5).cuda(), torch.ones(3, 20, 7).cuda()
    graph = torch.cuda.CUDAGraph()
    out = functional.linear_norms_sq(x, grad)
    with torch.cuda.graph(graph):
        out = functional.linear_norms_sq(x, grad)
    for value in (2.0, 1e-25):
        x.fill_(value)
        graph.replay()
        assert_near(out.cpu(), torch.full((3,), 35 * (20 * value) ** 2, dtype=torch.float64), 1e-6)


@pytest.mark.gpu
def test_races_on_cuda(monkeypatch):
    """One of each kernel, for the thread sanitizer."""
    monkeypatch.setattr(linear, "fills_a_device", lambda inputs, outputs: True)
    for dtype, size in (
        (torch.bfloat16, (1, 72, 136, 72)),
        (torch.float32, (2, 17, 66, 65)),
        (torch.float64, (2, 17, 66, 65)),
    ):
        x, grad = pair(*size, dtype=dtype)
        check_on_cuda(x, grad, 4e-6)
        functional.linear_weight_grad(x.cuda(), grad.cuda())
    check_on_cuda(x * 1e-200, grad, 1e-12)
    check_on_cuda(x[0], grad[0], 2e-6, torch.tensor([0, 1, 17]))


@pytest.mark.parametrize(
    ("inputs", "outputs"), [(64, 64), (768, 3072), (109, 109), (3, 64), (1, 1), (0, 5), (576, 128), (256, 256)]
)
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_the_lengths_that_are_by_gram(inputs, outputs, device):
    ranges = _core.linear_gram_lengths(inputs, outputs, device == "cpu")
    for tokens in range(1, 800):
        inside = any(first <= tokens <= last for first, last in ranges)
        assert inside == (functional.linear_method(tokens, inputs, outputs, device=device) == "gram")


@pytest.mark.parametrize(
    ("inputs", "outputs", "ranges"),
    [(64, 64, []), (576, 128, [(33, 64), (113, 125)]), (768, 768, [(1, 460)]), (4096, 4096, [(1, 2457)])],
)
def test_a_device_fills_whole_tiles(inputs, outputs, ranges):
    """64 x 64, of which it takes 16 products at a time."""
    assert _core.linear_gram_lengths(inputs, outputs, False) == ranges

    def whole(length, piece):
        return -(-length // piece) * piece

    for tokens in range(1, 800):
        gram = whole(tokens, 64) * (whole(tokens, 64) + 64) // 2 * (whole(inputs, 16) + whole(outputs, 16))
        fewer = gram <= whole(tokens, 16) * whole(inputs, 64) * whole(outputs, 64)
        by_gram = functional.linear_method(tokens, inputs, outputs) == "gram" and fewer
        assert (functional.linear_method(tokens, inputs, outputs, device="cuda") == "gram") == by_gram


def test_the_lengths_that_are_by_gram_in_words():
    assert linear.lengths_by_gram(1, 1, "cpu") == "direct"
    assert linear.lengths_by_gram(3, 3, "cpu") == "Gram up to 1 position, else direct"
    assert linear.lengths_by_gram(109, 109, "cpu") == "Gram up to 49 and from 65 to 65 positions, else direct"
    assert linear.lengths_by_gram(576, 128, "cuda") == "Gram from 33 to 64 and from 113 to 125 positions, else direct"
    x, grad = randn(2, 9, 64), randn(2, 9, 32)
    assert linear.way(x, grad, None, "direct") == "direct (9 positions, weight 32 x 64)"
    lengths = "Gram up to 19 positions, else direct"
    assert linear.way(x, grad, None, None) == f"gram (9 positions, weight 32 x 64; {lengths})"
    offsets = torch.tensor([0, 4, 9])
    assert linear.way(x[0], grad[0], offsets, None) == f"each document's length ({lengths})"


@pytest.mark.gpu
def test_the_way_in_words_on_cuda():
    x, grad = randn(2, 9, 64, dtype=torch.bfloat16).cuda(), randn(2, 9, 32, dtype=torch.bfloat16).cuda()
    assert linear.way(x[0], grad[0], torch.tensor([0, 9]), None) == "direct (packed rows on a device)"
    assert linear.way(x, grad, None, None) == "direct (9 positions, weight 32 x 64; direct)"
    x, grad = x[:, :1].expand(-1, 4096, -1), grad[:, :1].expand(-1, 4096, -1)
    assert linear.way(x, grad, None, None).startswith("direct (4096 positions")
    many = [t[:1].expand(2**15, -1, -1) for t in (x, grad)]
    assert linear.way(*many, None, None) == "torch.bmm (4096 positions, weight 32 x 64)"


@pytest.mark.parametrize(("inputs", "outputs", "fills"), [(768, 3072, True), (512, 1024, True), (512, 1023, False)])
def test_whether_one_pass_fills_a_device(inputs, outputs, fills):
    assert linear.fills_a_device(inputs, outputs) is fills


@pytest.mark.parametrize(("sizes", "without", "with_tensor_cores"), [  # (samples, tokens, I, O)
    ((8, 1024, 768, 3072), True, True), ((8, 4096, 4096, 4096), True, True), ((64, 1024, 64, 64), True, True),
    ((256, 128, 64, 64), True, False), ((64, 512, 768, 768), True, False),  # the kernel writes no products
    ((8, 2048, 4096, 4096), True, False),  # both matrices are symmetric
    ((64, 65, 768, 3072), False, False), ((64, 197, 768, 768), False, False), ((64, 197, 1024, 4096), False, False),
    ((64, 8, 64, 64), False, False), ((1, 1, 768, 3072), False, False), ((0, 65, 768, 3072), False, False),
])  # fmt: skip
def test_which_products_are_torchs_on_cuda(sizes, without, with_tensor_cores):
    assert linear.made_by_torch(*sizes, tensor_cores=False) is without
    assert linear.made_by_torch(*sizes, tensor_cores=True) is with_tensor_cores


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_by_torch_on_cuda(dtype, monkeypatch):
    """Large layers of 16-bit numbers, in pieces; what leaves float32's range is made again."""
    monkeypatch.setattr(linear, "made_by_torch", lambda *sizes, tensor_cores: True)
    x, grad = pair(5, 9, 17, 13, dtype=dtype)
    x[3], grad[4] = 0, grad[4] * 1e-6
    truth = reference.linear_norms_sq(x, grad)
    for most in (1, 17 * 4, 17 * 13 * 2, 1 << 20):
        monkeypatch.setattr(linear, "_PRODUCTS", most)
        assert_near(functional.linear_norms_sq(x.cuda(), grad.cuda()).cpu(), truth, 2e-6)
    if dtype == torch.bfloat16:
        for scale in (1e-30, 1e30):
            truth = reference.linear_norms_sq(x * scale, grad * scale)
            assert_near(functional.linear_norms_sq((x * scale).cuda(), (grad * scale).cuda()).cpu(), truth, 2e-6)
