"""The core over the emulator in the ordinary one's place, where LIPCORE_CUDA_ON_CPU names it; import before lipcore.

Both cores have the same types and cannot live in one process, so a process runs all tests on one of them.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PATH = os.environ.get("LIPCORE_CUDA_ON_CPU", "")
#: plain, asan or tsan
MODE = Path(PATH).parent.name
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "findings": (ctypes.c_int64, ()),
    "finding": (ctypes.c_char_p, (ctypes.c_int64,)),
    "clear_findings": (None, ()),
    "allocate": (ctypes.c_void_p, (ctypes.c_int64, ctypes.c_int)),
    "record_use": (None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)),
    "free": (None, (ctypes.c_void_p,)),
    "device_of": (ctypes.c_int, (ctypes.c_void_p,)),
    "device": (ctypes.c_int, ()),
    "set_device": (None, (ctypes.c_int,)),
    "make_stream": (ctypes.c_void_p, (ctypes.c_int,)),
    "current_stream": (ctypes.c_void_p, (ctypes.c_int,)),
    "set_stream": (None, (ctypes.c_int, ctypes.c_void_p)),
    "record": (ctypes.c_int64, (ctypes.c_void_p, ctypes.c_int)),
    "wait": (None, (ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)),
    "await_event": (None, (ctypes.c_int64,)),
    "synchronize_stream": (None, (ctypes.c_void_p, ctypes.c_int)),
    "synchronize_device": (None, (ctypes.c_int,)),
    "set_capability_of": (None, (ctypes.c_int, ctypes.c_int)),
    "set_capability": (None, (ctypes.c_int,)),
    "capability": (ctypes.c_int, ()),
    "set_oldest": (None, (ctypes.c_int, ctypes.c_int)),
    "set_versions": (None, (ctypes.c_int, ctypes.c_int)),
    "questions": (ctypes.c_int64, ()),
    "set_order": (None, (ctypes.c_int, ctypes.c_uint64)),
    "set_deferred": (None, (ctypes.c_int,)),
    "synchronize": (None, ()),
    "begin_capture": (None, ()),
    "end_capture": (ctypes.c_int64, ()),
    "replay": (None, (ctypes.c_int64,)),
    "launches": (ctypes.c_int64, ()),
    "blocks": (ctypes.c_int64, ()),
    "allocations": (ctypes.c_int64, ()),
    "driver_allocations": (ctypes.c_int64, ()),
    "empty_cache": (None, ()),
}
DEVICES = 2
ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}


class Emulator:
    """What emulator/control.h offers, without its prefix."""

    def __init__(self, library: Path) -> None:
        self._library, self._names = library, dict[int, str]()
        handle = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(handle, f"emulator_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        bridge = ctypes.PyDLL(str(library)).emulator_bridge
        bridge.restype, bridge.argtypes = ctypes.py_object, (ctypes.py_object,)
        torch.Tensor.__dlpack_c_exchange_api__ = bridge(torch.Tensor)

    def __getattr__(self, name: str) -> Any:  # for type checkers: all are set above
        raise AttributeError(name)

    def begin_test(self) -> None:
        """Set what a GPU does: launches come later, blocks and threads in no order. The first device is current."""
        self.set_device(0)
        for device in range(DEVICES):
            self.set_stream(device, None)
        self.set_deferred(1)
        self.set_order(ORDERS["shuffled"], 1)
        self.set_capability(90)
        self.set_oldest(0, 0)
        self.set_versions(13000, 13000)

    def take_findings(self) -> list[str]:
        """Return what was found since the last call, in words."""
        self.synchronize()
        found = [self.finding(i).decode() for i in range(self.findings())]
        self.clear_findings()
        return [
            re.sub(r"kernel\+([0-9a-f]+)", lambda match: self._kernel_at(int(match[1], 16)), text) for text in found
        ]

    def _kernel_at(self, offset: int) -> str:
        if not self._names:
            symbols = subprocess.run(["nm", "-C", self._library], capture_output=True, text=True, check=True).stdout
            for line in symbols.splitlines():
                if match := re.match(r"([0-9a-f]+) [tW] (.*)", line):
                    self._names[int(match[1], 16)] = match[2].replace("(anonymous namespace)::", "").split("(")[0]
        return self._names.get(offset, "a kernel")


class _InPlaceOfTheOrdinaryCore(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.util.spec_from_file_location(name, PATH) if name == "lipcore._core" else None


def _load() -> Emulator | None:
    if not PATH:
        return None
    if "lipcore" in sys.modules:
        raise ImportError("import emulated_core before lipcore: its core cannot be replaced any more")
    sys.meta_path.insert(0, _InPlaceOfTheOrdinaryCore())
    return Emulator(Path(PATH).with_name("libdevice.so"))


#: None in a process with the ordinary core.
emulator = _load()
