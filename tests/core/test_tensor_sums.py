"""Sums of squares of many tensors, and blocks of running means that are merged: on the CPU and on a device."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import assert_close, same_bits
from torch import Tensor

from lipcore import _core

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DEVICE_CHUNK = 16384  # kCudaChunk
SIZES = [0, 1, 3, 4, 5, 1023, 1024, 1030, DEVICE_CHUNK - 1, DEVICE_CHUNK, DEVICE_CHUNK + 5, 65536 + 17]
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def squares_of(tensors: list[Tensor], device: str) -> Tensor:
    out = torch.full((len(tensors), _core.STEP_COLUMNS), math.nan, dtype=torch.float64, device=device)
    _core.square_sums([tensor.to(device) for tensor in tensors], out)
    return out.cpu()


@DEVICES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squares(dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(size).to(dtype) for size in SIZES]
    expected = torch.zeros(len(tensors), _core.STEP_COLUMNS, dtype=torch.float64)
    for row, tensor in zip(expected, tensors, strict=True):
        row[0] = row[3] = tensor.double().square().sum()
    assert_close(squares_of(tensors, device), expected, eps=1e-13, k=1)


@DEVICES
def test_squares_of_more_tensors_than_a_launch_takes(device: str) -> None:
    tensors = [torch.full((k % 7,), float(k), dtype=DTYPES[k % 4]) for k in range(300)]
    expected = torch.tensor([float(k % 7 * k * k) for k in range(300)], dtype=torch.float64)
    found = squares_of([tensor.float() if k > 256 else tensor for k, tensor in enumerate(tensors)], device)
    assert_close(found[:, 0], expected, eps=2**-7, k=1)
    exact = [k for k in range(300) if (k <= 256 and k % 4 != 2) or k > 256]
    assert same_bits(found[exact, 0], expected[exact])


@DEVICES
@pytest.mark.parametrize("count", [1, 3])
def test_squares_of_nothing(count: int, device: str) -> None:
    assert squares_of([torch.empty(0)] * count, device).tolist() == [[0] * 5] * count


@DEVICES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squares_of_values_that_are_not_finite(dtype: torch.dtype, device: str) -> None:
    tensors = [torch.ones(size).to(dtype) for size in (5, 3 * DEVICE_CHUNK, 4, 7)]
    tensors[1][0], tensors[1][DEVICE_CHUNK + 3], tensors[1][-1] = math.nan, math.inf, -math.inf
    tensors[2][:] = math.nan
    found = squares_of(tensors, device)
    assert found[1, :4].isnan().all()
    assert found[2, :4].isnan().all()
    assert found[:, 4].tolist() == [0, 3, 4, 0]
    assert found[[0, 3], 0].tolist() == [5, 7]


@DEVICES
def test_squares_that_leave_float64(device: str) -> None:
    """No element is to blame, so none is counted."""
    found = squares_of([torch.full((3,), 1e200, dtype=torch.float64)], device)
    assert found[0, :4].isnan().all()
    assert found[0, 4] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squares_do_not_depend_on_alignment_or_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(3 * DEVICE_CHUNK + 7).to(dtype).cuda()
    shifted = torch.empty(x.numel() + 1, dtype=dtype, device="cuda")[1:].copy_(x)
    for other in (shifted, x if dtype == torch.float64 else x.float()):
        assert same_bits(squares_of([other], "cuda"), squares_of([x], "cuda"))


@DEVICES
def test_gradients_that_are_not_there(device: str) -> None:
    """A list looks gradients up at every call; where there is none, nothing has moved."""
    parameters = {f"p{k}": torch.nn.Parameter(torch.zeros(3, device=device)) for k in range(4)}
    gradients = _core.GradientList([(parameters, name, None) for name in parameters])
    parameters["p1"].grad = torch.full((3,), 2.0, device=device)
    out = torch.full((4, _core.STEP_COLUMNS), math.nan, dtype=torch.float64, device=device)
    for value in (2.0, 3.0):
        parameters["p3"].grad = torch.full((3,), value, device=device)  # elsewhere than before
        assert gradients.read(out)
        expected = [[0] * 5, [12, 0, 0, 12, 0], [0] * 5, [3 * value**2, 0, 0, 3 * value**2, 0]]
        assert out.tolist() == expected
    parameters["p2"].grad = torch.ones(2, 3, device=device)[:1].t()[:, 0].expand(3) * 1
    parameters["p2"].data = torch.zeros(3, device=device)
    parameters["p0"] = torch.nn.Parameter(torch.zeros(3, 2, device=device))
    parameters["p0"].grad = torch.ones(3, 4, device=device)[:, ::2]
    assert not gradients.read(out)  # strided
    assert out.tolist() == expected


@pytest.mark.gpu
def test_tensors_and_results_on_two_devices_are_refused() -> None:
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    rows = torch.zeros(2, _core.STEP_COLUMNS, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^tensors\[1\]: is not on the CPU"):
        _core.square_sums([here, there], rows)
    with pytest.raises(ValueError, match=r"^tensors\[1\]: is on another device than the result"):
        _core.square_sums([there, here], rows.cuda())


# ---- running means


def block_of(size: int, dtype: torch.dtype) -> list[Tensor]:
    """Last points, reference and deviation of a block of steps."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [torch.randn(size).to(dtype), torch.randn(size).to(dtype), torch.randn(size).to(wide)]


@DEVICES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_means_of_blocks(dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    shares = [0.0, 0.25, 0.5, 0.75, 1.0] * 25  # more tensors than a launch takes
    long = 65536 + 17 if device == "cpu" else DEVICE_CHUNK + 5
    sizes = [(0, 1, 300, 1030, long if k < 5 else 3)[k % 5] for k in range(len(shares))]
    blocks = [block_of(size, dtype) for size in sizes]
    means = [(last.double() - reference.double()) - deviation.double() for last, reference, deviation in blocks]
    earlier = [torch.randn(size, dtype=torch.float64) for size in sizes]
    on_device = [tensor.to(device, copy=True) for tensor in earlier]
    share = torch.tensor(shares, dtype=torch.float64)
    gaps = torch.full_like(share, math.nan).to(device)
    lists = [[tensor.to(device) for tensor in kind] for kind in zip(*blocks, strict=True)]
    _core.fold_means(*lists, on_device, share.to(device), gaps)
    for k, (mean, before, after) in enumerate(zip(means, earlier, on_device, strict=True)):
        assert_close(gaps[k], (mean - before).square().sum(), eps=1e-13, k=1)
        assert_close(after, torch.lerp(before, mean, shares[k]), scale=before.abs() + 1, eps=1e-15)
        if shares[k] == 1:
            assert same_bits(after.cpu(), mean)
        if device == "cuda":
            here = before.clone()
            one = ([tensor] for tensor in blocks[k])
            _core.fold_means(*one, [here], share[k : k + 1], torch.empty(1, dtype=torch.float64))
            assert same_bits(after.cpu(), here)


def test_means_that_do_not_belong_together_are_refused() -> None:
    share = torch.ones(1, dtype=torch.float64)
    good = {name: torch.ones(3) for name in ("last", "reference", "deviation")}
    good["earlier"] = torch.zeros(3, dtype=torch.float64)
    bad = {
        "reference": torch.ones(3).bfloat16(),
        "deviation": torch.ones(3, dtype=torch.float64),
        "earlier": torch.zeros(4, dtype=torch.float64),
        "last": torch.ones(2),
    }
    for name, tensor in bad.items():
        lists = {key: [value] for key, value in (good | {name: tensor}).items()}
        with pytest.raises(ValueError, match=r"^earlier\[0\]: does not fit last, reference and deviation\[0\]"):
            _core.fold_means(**lists, share=share, gap_sq=share.clone())
        with pytest.raises(ValueError, match="expected as many tensors of each"):
            _core.fold_means(**(lists | {"deviation": []}), share=share, gap_sq=share.clone())
    assert not good["earlier"].any()


@pytest.mark.gpu
def test_means_on_two_devices_are_refused() -> None:
    one, earlier = torch.ones(3), torch.zeros(3, dtype=torch.float64)
    share = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^earlier\[0\]: does not fit last, reference and deviation\[0\]"):
        _core.fold_means(*([one.cuda()] for _ in range(3)), [earlier], share.cuda(), share.clone().cuda())
    with pytest.raises(ValueError, match="on one device"):
        _core.fold_means(*([one] for _ in range(3)), [earlier], share, share.clone().cuda())
