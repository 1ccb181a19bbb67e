"""The emulator finds what a GPU would not forgive, and shows what a GPU does but rarely."""

from __future__ import annotations

import ctypes
import math
import re

import pytest
import torch
from devices import EMULATED
from emulated_core import MODE, ORDERS, PATH, emulator
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not EMULATED, reason="of the emulator: runs with `make test-cuda-on-cpu`"),
]
#: In the order of kSpecimens in specimens.cu.
SPECIMENS = (
    *("read_beyond", "write_beside", "two_barriers", "missing_lane", "lane_that_left", "foreign_mask", "misaligned"),
    *("result_of_all", "unwritten_shared", "number_of_block", "lanes", "matrix_product", "copies"),
    *("copies_for_nobody", "no_blocks", "too_many_threads"),
)
THREADS = 64


def run(name: str, x: Tensor) -> int:
    specimen = ctypes.CDLL(PATH.replace("core.so", "libdevice.so")).emulator_run_specimen
    specimen.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int64)
    return int(specimen(SPECIMENS.index(name), x.data_ptr(), x.numel()))


@pytest.fixture
def x() -> Tensor:
    return torch.zeros(THREADS, dtype=torch.float64, device="cuda")


FINDINGS = {
    "read_beyond": r"read_beyond touched an address 576 bytes from the start of 512 bytes of device memory",
    "two_barriers": r"threads of a block meet at different places, specimens\.cu:\d+ and specimens\.cu:\d+",
    "missing_lane": r"deadlock: threads of a block of missing_lane wait in __shfl_xor_sync at specimens\.cu:\d+ __sync",
    "lane_that_left": r"__shfl_xor_sync at specimens\.cu:\d+: the mask ffffffff names lane 3, which is not there",
    "foreign_mask": r"__shfl_xor_sync at specimens\.cu:\d+: lane 31 is not in its own mask 7fff0000",
    "misaligned": r"__ldcs of an address that is not a multiple of its 16 bytes",
    "copies_for_nobody": r"cp\.async: a thread leaves its kernel with copies that it has not waited for",
    "no_blocks": r"no GPU launches lanes with a grid of 0 x 1 x 1",
    "too_many_threads": r"no GPU launches lanes with a grid of 1 x 1 x 1, blocks of 2048 x 1 x 1",
}


@pytest.mark.parametrize("name", FINDINGS)
def test_what_is_found(name: str, x: Tensor) -> None:
    if MODE == "asan" and name in ("read_beyond", "misaligned"):
        pytest.skip("the sanitizer ends the process instead")
    if MODE == "tsan":
        pytest.skip("threads that are left where they wait are never ordered before the host")
    refused = run(name, x)
    assert (refused != 0) == (name in ("no_blocks", "too_many_threads"))
    found = emulator.take_findings()
    assert any(re.search(FINDINGS[name], text) for text in found), found


def test_a_write_beside_an_allocation_is_found_when_it_is_freed() -> None:
    if MODE == "asan":
        pytest.skip("the sanitizer ends the process instead")
    x = torch.zeros(THREADS + 1, dtype=torch.float64, device="cuda")  # ends 8 bytes before the guard page
    run("write_beside", x)
    assert not emulator.take_findings()
    del x
    (found,) = emulator.take_findings()
    assert found == "something was written 520 bytes from the start of 520 bytes of device memory"


def test_only_thread_0_has_the_result_of_a_reduction(x: Tensor) -> None:
    run("result_of_all", x)
    assert x[0] == THREADS
    assert (x[1:] != THREADS).all()


def test_memory_holds_nan_before_it_is_written(x: Tensor) -> None:
    run("unwritten_shared", x)  # two blocks, of which each leaves zeros
    assert x.isnan().all()
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        bits = torch.tensor([-1], dtype=torch.int64).view(dtype)
        assert math.isnan(bits[0]), "what emulator/memory.cpp fills device memory with"


# Blocks that hand a number on are no race on the emulator, where one runs after the other, but they are one.
no_races = pytest.mark.skipif(MODE == "tsan", reason="the sanitizer sees the race")


@no_races
@pytest.mark.parametrize("order", ORDERS)
def test_blocks_come_in_every_order(order: str, x: Tensor) -> None:
    emulator.set_order(ORDERS[order], 3)
    run("number_of_block", x)
    turns = x[:5].tolist()
    assert sorted(turns) == [0, 1, 2, 3, 4]
    assert (turns == [0, 1, 2, 3, 4]) == (order == "ascending")
    assert (turns == [4, 3, 2, 1, 0]) == (order == "descending")


def test_lanes_exchange_by_the_rules(x: Tensor) -> None:
    run("lanes", x)
    for thread, value in enumerate(x.tolist()):
        lane = thread % 32
        down, up = min(lane + 1, 31), lane - 2 if lane >= 2 else lane
        assert value == down + 100 * up + 10000 * 7 + 1e6 * (lane % 2)


def test_matrices_are_multiplied_by_the_documented_layout() -> None:
    x = torch.zeros(2, 16, 8, dtype=torch.float64, device="cuda")
    run("matrix_product", x)
    i, j, k = (torch.arange(n, dtype=torch.float64) for n in (16, 8, 16))
    expected = (i[:, None] - 2 * k) @ (j[:, None] + 3 * k).T
    assert (x.cpu() == expected).all()


def test_a_copy_lands_when_it_is_waited_for(x: Tensor) -> None:
    x[:4] = torch.arange(1.0, 5).cuda()
    run("copies", x)
    before, between, behind = x[4:16].cpu().view(3, 4)
    assert before.isnan().all()
    assert between[:2].tolist() == [1, 2]
    assert between[2:].isnan().all()
    assert behind.tolist() == [1, 2, 3, 0]


@pytest.mark.skipif(MODE == "tsan", reason="nothing orders the threads that all say so")
def test_tensor_cores_that_are_not_there_are_found() -> None:
    emulator.set_capability(75)
    run("matrix_product", torch.zeros(2, 16, 8, dtype=torch.float64, device="cuda"))
    assert "no tensor cores that take this are on a device of capability 75" in emulator.take_findings()


def test_launches_wait_until_somebody_looks(x: Tensor) -> None:
    before = emulator.launches()
    run("lanes", x)
    assert emulator.launches() == before
    assert x[0] != 0
    assert emulator.launches() == before + 1


def test_device_memory_is_kept_for_what_is_queued() -> None:
    x = torch.zeros(THREADS, dtype=torch.float64, device="cuda")
    run("lanes", x)
    del x
    assert not emulator.take_findings()


@no_races
def test_a_captured_launch_runs_at_every_replay(x: Tensor) -> None:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run("number_of_block", x)
        x.add_(1)
    assert not x.any()
    for _ in range(2):
        graph.replay()
    assert x[-1] == 2 * (5 + 1)


# ---- streams


def test_what_a_stream_does_not_wait_for_has_not_happened(x: Tensor) -> None:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run("lanes", x)
        event = side.record_event()
        run("result_of_all", x)
    assert not x.any()
    torch.cuda.current_stream().wait_event(event)
    assert x[0] != 0
    assert x[0] != THREADS  # what was queued behind the event
    torch.cuda.current_stream().wait_stream(side)
    assert x[0] == THREADS


def test_what_is_queued_waits_for_other_streams_too(x: Tensor) -> None:
    """A wait takes its place in the queue, for kernels as for torch."""
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first):
        run("result_of_all", x)
    second.wait_stream(first)
    with torch.cuda.stream(second):
        run("lanes", x)
    before = emulator.launches()
    second.synchronize()
    assert emulator.launches() == before + 2
    assert x[0] not in (0, THREADS)


@pytest.mark.skipif(MODE != "plain", reason="the sanitizer ends the process instead")
@pytest.mark.parametrize("recorded", [False, True])
def test_memory_that_another_stream_uses_is_to_be_recorded(recorded: bool) -> None:
    x = torch.zeros(THREADS, dtype=torch.float64, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run("lanes", x)
    if recorded:
        x.record_stream(side)
    del x
    torch.cuda.current_stream().synchronize()
    found = emulator.take_findings()
    assert bool(found) == (not recorded), found
    assert all("lanes touched an address in no device memory" in text for text in found)


# ---- devices


@pytest.mark.skipif(MODE != "plain", reason="the sanitizers' memory has no guards")
def test_a_kernel_reaches_no_memory_of_another_device() -> None:
    x = torch.zeros(THREADS, dtype=torch.float64, device="cuda:1")
    run("lanes", x)
    (found,) = emulator.take_findings()
    assert re.fullmatch(
        r"lanes touched an address \d+ bytes from the start of 512 bytes of device memory of cuda:1", found
    )
    with torch.cuda.device(1):
        run("lanes", x)
    torch.cuda.synchronize(1)
    assert x[0] != 0


def test_devices_do_not_wait_for_each_other() -> None:
    x = torch.zeros(THREADS, dtype=torch.float64, device="cuda:1")
    with torch.cuda.device(1):
        run("lanes", x)
    before = emulator.launches()
    torch.cuda.synchronize(0)
    assert emulator.launches() == before
    torch.cuda.synchronize(1)
    assert emulator.launches() == before + 1


def test_a_kernel_needs_a_stream_of_the_current_device(x: Tensor) -> None:
    elsewhere = torch.cuda.Stream("cuda:1")
    emulator.set_stream(0, elsewhere.cuda_stream)
    assert run("lanes", x) == 400  # cudaErrorInvalidResourceHandle
    emulator.set_stream(0, None)


def test_tensors_of_two_devices_do_not_mix(x: Tensor) -> None:
    y = x.to("cuda:1")
    assert (x.device.index, y.device.index, y.get_device()) == (0, 1, 1)
    assert (y + 1).device == torch.zeros_like(y).device == torch.device("cuda", 1)
    with torch.cuda.device(1):
        assert torch.zeros(3, device="cuda").device.index == torch.zeros(3).cuda().device.index == 1
    with pytest.raises(RuntimeError, match="on the same device"):
        x + y
    for mixed in (
        lambda: torch.stack([x, y]),
        lambda: torch.cat(tensors=[x, y]),
        lambda: torch.where(x == 1, x, other=y),
        lambda: torch.add(x, 1, out=y),
    ):
        with pytest.raises(RuntimeError, match="on the same device"):
            mixed()
    torch._foreach_add_([x, y], 0)
    assert (x.device.index, y.device.index) == (0, 1)
    y.add_(2)
    x.copy_(y)
    assert x.device.index == 0
    assert (x == 2).all()


def test_each_tensor_of_a_list_is_worked_on_where_it_is(x: Tensor) -> None:
    there, host = x.to("cuda:1"), torch.zeros(3)
    for made in (
        torch._foreach_add([x, there, host], 1),
        torch._foreach_mul([x, there, host], [x, there, host]),
        torch._foreach_norm([x, there, host]),
        torch._foreach_mul([x, there, host], [1.0, 2.0, 3.0]),
        torch._foreach_pow(0.9, [x, there, host]),
        torch._foreach_pow([x, there, host], 2),
    ):
        assert [tensor.device for tensor in made] == [x.device, there.device, host.device]
    torch._foreach_mul_([x, there], [x, there])
    for wrong in (
        lambda: torch._foreach_add([x, there], [there, x]),
        lambda: torch._foreach_add_([x], [there]),
        lambda: torch._foreach_addcmul_([x, there], [x, there], [x, x]),
        lambda: torch._foreach_lerp([x], [x], weights=[there]),
    ):
        with pytest.raises(RuntimeError, match="on the same device"):
            wrong()


# ---- the tensors


def test_results_stay_where_their_inputs_are() -> None:
    w = torch.randn(3, 4, device="cuda", requires_grad=True)
    y = (torch.randn(2, 3).cuda() @ w).tanh()
    y.sum().backward()
    for tensor in (w, y, w.grad, w.t(), y[0], y.detach().double(), torch.zeros_like(w), w.new_empty(3)):
        assert tensor.is_cuda
        assert not tensor.is_cpu
        assert tensor.device == torch.device("cuda", 0)
    for tensor in (y.cpu(), w.detach().to("cpu", torch.float64), torch.zeros(3), torch.empty(2, device="cpu")):
        assert tensor.is_cpu
        assert not tensor.is_cuda
    torch.testing.assert_close(w.grad, (w * 0 + w.grad))


def test_a_moved_module_moves_its_parameters() -> None:
    module = torch.nn.Linear(3, 4).cuda()
    assert all(parameter.is_cuda for parameter in module.parameters())
    assert not any(parameter.is_cuda for parameter in module.cpu().parameters())


def test_a_read_can_be_refused(x: Tensor) -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing operation: item"):
            x.sum().item()
        x.add_(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
