"""What tests and lipcore ask of ``torch.cuda``, for the emulated devices: streams, events, graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from emulated_core import DEVICES, emulator
from emulated_tensors import EmulatedTensors, index_of


class Stream:
    """A stream of a device: what is queued on it runs in its order, when somebody waits for it.

    torch's own operations run at once, after all that was queued before them on their stream.
    """

    mode: EmulatedTensors
    _by_handle: dict[tuple[int, int | None], Stream] = {}  # noqa: RUF012

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        index = index_of("cuda" if device is None else device)
        self._set(index, emulator.make_stream(index))

    def _set(self, index: int, handle: int | None) -> Stream:
        self.device, self._index, self._handle = torch.device("cuda", index), index, handle
        self._reads = self.mode.reads
        self.recorded: list[int] = []  #: addresses of tensors that were used on this stream
        self._by_handle[index, handle] = self
        return self

    @classmethod
    def current(cls, device: Any = None) -> Stream:
        """Return the stream that is current on a device."""
        index = index_of("cuda" if device is None else device)
        return cls._of(index, emulator.current_stream(index))

    @classmethod
    def default(cls, device: Any = None) -> Stream:
        """Return a device's default stream."""
        return cls._of(index_of("cuda" if device is None else device), None)

    @classmethod
    def _of(cls, index: int, handle: int | None) -> Stream:
        return cls._by_handle.get((index, handle)) or cls.__new__(cls)._set(index, handle)

    @property
    def cuda_stream(self) -> int:
        """The runtime's handle."""
        return self._handle or 0

    @property
    def reads(self) -> int:
        """How often the host has waited for a device to read what is there."""
        return self.mode.reads

    def make_current(self) -> None:
        """Queue what comes on this stream, with its device the current one."""
        emulator.set_device(self._index)
        emulator.set_stream(self._index, self._handle)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def record_use(self, tensor: torch.Tensor) -> None:
        """Keep a tensor's memory, once it is free, for what is queued here."""
        self.recorded.append(tensor.data_ptr())
        emulator.record_use(tensor.untyped_storage().data_ptr(), self._handle, self._index)

    def sleep(self, cycles: int) -> None:
        """Be busy until somebody reads."""
        self._reads = self.mode.reads

    def query(self) -> bool:
        return self.mode.reads > self._reads

    def synchronize(self) -> None:
        self.mode.reads += 1
        emulator.synchronize_stream(self._handle, self._index)


class Event:
    """A point in a stream. One that was not recorded has passed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._number: int | None = None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or Stream.current()
        self._number = emulator.record(stream._handle, stream._index)

    def wait(self, stream: Stream | None = None) -> None:
        stream = stream or Stream.current()
        if self._number is not None:
            emulator.wait(stream._handle, stream._index, self._number)

    def query(self) -> bool:
        """Return True: the device is as fast as can be when it is asked."""
        self.synchronize()
        return True

    def synchronize(self) -> None:
        if self._number is not None:
            emulator.await_event(self._number)


class CUDAGraph:
    """Kernels and torch's operations in the order they were captured in, on a stream of its own."""

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

        with _on_stream(Stream()):
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


@contextlib.contextmanager
def _on_device(device: Any) -> Iterator[None]:
    before = emulator.device()
    if device is not None:
        emulator.set_device(index_of(device))
    try:
        yield
    finally:
        emulator.set_device(before)


@contextlib.contextmanager
def _on_stream(stream: Stream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    with _on_device(stream.device):
        before = Stream.current()
        stream.make_current()
        try:
            yield
        finally:
            before.make_current()


def stand_in(mode: EmulatedTensors) -> None:
    """Put these in ``torch.cuda``'s place, for the rest of the process."""
    Stream.mode = mode

    def set_sync_debug_mode(debug_mode: str) -> None:
        mode.refuse_reads = debug_mode == "error"

    def synchronize(device: Any = None) -> None:
        mode.reads += 1
        emulator.synchronize_device(index_of("cuda" if device is None else device))

    replacements = {
        "is_initialized": lambda: True,
        "current_device": emulator.device,
        "set_device": lambda device: emulator.set_device(index_of(device)),
        "device": _on_device,
        "device_count": lambda: DEVICES,
        "synchronize": synchronize,
        "current_stream": Stream.current,
        "default_stream": Stream.default,
        "set_stream": lambda stream: stream.make_current(),
        "Stream": Stream,
        "stream": _on_stream,
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
        "_sleep": lambda cycles: Stream.current().sleep(cycles),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)

    def record_stream(tensor: torch.Tensor, stream: Stream) -> None:
        stream.record_use(tensor)

    torch.Tensor.record_stream = record_stream  # type: ignore[assignment, method-assign]

    run_backward = torch.autograd._engine_run_backward

    def run_with_the_mode(*args: Any, **kwargs: Any) -> Any:
        if mode.entered:
            with mode:  # it is off while it handles backward() and grad(), and hooks are to see the device
                return run_backward(*args, **kwargs)
        return run_backward(*args, **kwargs)

    torch.autograd._engine_run_backward = run_with_the_mode
