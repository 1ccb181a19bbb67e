"""GPU tests that cannot run are visibly skipped; every instruction set and number of threads can be forced."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from ways import ISAS

from lipcore import _core


def why_no_cuda() -> str:
    """Empty when GPU tests can run."""
    if not _core.cuda_built:
        return "this lipcore was built without CUDA"
    if not torch.cuda.is_available():
        return "this torch sees no CUDA device"
    return ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    reason = why_no_cuda() if item.get_closest_marker("gpu") else ""
    if not reason:
        return
    if os.environ.get("LIPCORE_REQUIRE_CUDA") == "1":
        pytest.fail(f"LIPCORE_REQUIRE_CUDA=1, but {reason}", pytrace=False)
    pytest.skip(f"GPU test: {reason}")


@pytest.fixture(params=ISAS)
def isa(request):
    """Every instruction set of this CPU in turn."""
    before = _core.isa()
    _core.use_isa(request.param)
    yield request.param
    _core.use_isa(before)


@pytest.fixture
def two_threads():
    """torch's pool with two threads, so that work is split even on a machine with one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


@pytest.fixture
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()
