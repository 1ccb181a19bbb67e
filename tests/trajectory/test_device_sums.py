"""The sums of gradients by operations for all of them, which serve devices: here on the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import assert_close
from torch import Tensor

from lipcore import _core
from lipcore.trajectory.device_sums import DeviceSums

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def gradients(dtype: torch.dtype) -> list[Tensor | None]:
    torch.manual_seed(0)
    sizes = [(3, 5), (1,), (0,), (129,), (2, 2)]
    tensors: list[Tensor | None] = [torch.randn(size).to(dtype) for size in sizes]
    bad, worse = torch.ones(4, dtype=dtype), torch.ones(4, dtype=dtype)
    bad[2], worse[1] = math.inf, math.nan
    return [*tensors[:2], None, *tensors[2:], bad, worse]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_those_of_the_core(dtype: torch.dtype) -> None:
    given = gradients(dtype)
    sums = DeviceSums(len(given), torch.device("cpu"))
    found = sums.new()
    for _ in range(2):  # what was there is overwritten
        assert sums.read(given, found) is found
    expected = torch.zeros(len(given), _core.STEP_COLUMNS, dtype=torch.float64)
    there = [i for i, gradient in enumerate(given) if gradient is not None]
    rows = torch.empty(len(there), _core.STEP_COLUMNS, dtype=torch.float64)
    _core.square_sums([gradient for gradient in given if gradient is not None], rows)
    expected[there] = rows
    for column in (0, 4):
        assert_close(found[:, column], expected[:, column], eps=1e-14, k=1)
    assert ((found[:, 5] > 0) == (expected[:, 5] > 0)).all()
    assert not found[:, 1:4].any()


def test_all_gradients_may_be_absent() -> None:
    sums = DeviceSums(2, torch.device("cpu"))
    assert not sums.read([None, None], sums.new()).any()
