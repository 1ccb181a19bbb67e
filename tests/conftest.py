"""GPU tests run on a device or on the emulated one, or are visibly skipped; every instruction set and number of threads
can be forced."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated_core import emulator
from one_rank import one_rank
from ways import ISAS

from lipcore import _core


def why_no_cuda() -> str:
    """Empty when GPU tests can run."""
    if emulator is not None:
        return ""
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


@pytest.fixture(scope="session")
def _emulated_tensors() -> Any:
    from emulated_tensors import EmulatedTensors, ResultsStay
    from emulated_torch_cuda import stand_in

    mode = EmulatedTensors()
    stand_in(mode)
    return mode, ResultsStay()


@pytest.fixture(autouse=True)
def _on_the_emulated_device(request: pytest.FixtureRequest) -> Any:
    """In a process with the emulator (tests/cuda_on_cpu), the device of the GPU tests; what it finds fails the test."""
    if emulator is None or not request.node.get_closest_marker("gpu"):
        yield
        return
    above, below = request.getfixturevalue("_emulated_tensors")
    emulator.begin_test()
    with below, above:
        yield
    found = emulator.take_findings()
    assert not found, "the emulator found:\n" + "\n".join(found)


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
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step takes longer than numbers of single steps wait, whatever the machine: each is handed on at once."""
    for module in ("lipcore.trajectory.single_steps", "lipcore.monitor.logged"):
        monkeypatch.setattr(f"{module}.PROMPT", 0.0)


@pytest.fixture
def group_of_one_rank() -> Iterator[None]:
    """torch's process group, of this process alone."""
    with one_rank():
        yield


@pytest.fixture
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()
