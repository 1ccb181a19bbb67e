"""What tests and lipcore ask of ``torch.cuda``, for the emulated device: one stream, events, graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from emulated_core import emulator
from emulated_memory import CUDA
from emulated_tensors import EmulatedTensors


class Stream:
    """The one stream there is: what is on another one comes in the order of the program."""

    def __init__(self, mode: EmulatedTensors) -> None:
        self._mode, self._reads = mode, 0
        self.device, self.cuda_stream = CUDA, 0
        self.recorded: list[int] = []  #: addresses of tensors that were used on this stream

    @property
    def reads(self) -> int:
        """How often the host has waited for the device to read what is there."""
        return self._mode.reads

    def wait_stream(self, other: Any) -> None:
        """Do nothing."""

    wait_event = wait_stream

    def record_event(self, event: Any = None) -> Event:
        return event or Event()

    def sleep(self, cycles: int) -> None:
        """Be busy until somebody reads."""
        self._reads = self._mode.reads

    def query(self) -> bool:
        return self._mode.reads > self._reads

    def synchronize(self) -> None:
        self._mode.reads += 1
        emulator.synchronize()


class Event:
    """A point in the stream."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        """Do nothing: there is one stream."""

    def wait(self, stream: Any = None) -> None:
        """Do nothing: there is one stream."""

    def query(self) -> bool:
        emulator.synchronize()
        return True

    def synchronize(self) -> None:
        emulator.synchronize()


class CUDAGraph:
    """Kernels and torch's operations in the order they were captured in."""

    def __init__(self) -> None:
        self._work: list[Callable[[], Any]] = []

    def capture(self, mode: EmulatedTensors) -> Iterator[None]:
        def cut() -> None:
            number = emulator.end_capture()
            self._work.append(lambda: emulator.replay(number))

        def record(operation: Callable[[], Any]) -> None:
            cut()
            self._work.append(operation)
            emulator.begin_capture()

        emulator.begin_capture()
        mode.record = record
        try:
            yield
        finally:
            mode.record = None
            cut()

    def replay(self) -> None:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for work in self._work:
                work()


def stand_in(mode: EmulatedTensors) -> None:
    """Put these in ``torch.cuda``'s place, for the rest of the process."""
    stream = Stream(mode)

    def set_sync_debug_mode(debug_mode: str) -> None:
        mode.refuse_reads = debug_mode == "error"

    replacements = {
        "is_initialized": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "synchronize": lambda device=None: stream.synchronize(),
        "current_stream": lambda device=None: stream,
        "Stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "graph": contextlib.contextmanager(lambda graph: graph.capture(mode)),
        "is_current_stream_capturing": lambda: mode.record is not None,
        "memory_stats": lambda device=None: {
            "allocation.all.allocated": emulator.allocations(),
            "num_device_alloc": emulator.driver_allocations(),
        },
        "empty_cache": emulator.empty_cache,
        "mem_get_info": lambda device=None: (1 << 36, 1 << 36),
        # Its random numbers come from the CPU's generator.
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "set_sync_debug_mode": set_sync_debug_mode,
        "_sleep": stream.sleep,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)

    def record_stream(tensor: torch.Tensor, stream: Stream) -> None:
        stream.recorded.append(tensor.data_ptr())

    torch.Tensor.record_stream = record_stream  # type: ignore[assignment, method-assign]

    run_backward = torch.autograd._engine_run_backward

    def run_with_the_mode(*args: Any, **kwargs: Any) -> Any:
        if mode.entered:
            with mode:  # it is off while it handles backward() and grad(), and hooks are to see the device
                return run_backward(*args, **kwargs)
        return run_backward(*args, **kwargs)

    torch.autograd._engine_run_backward = run_with_the_mode
