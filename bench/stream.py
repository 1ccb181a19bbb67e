"""The stream limit of this machine: bench/native/stream.cpp, built once and called through ctypes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

import lipcore._core as core

_SOURCE = Path(__file__).parent / "native" / "stream.cpp"


@cache
def _library() -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp(prefix="lipcore-bench-"))
    target = folder / "stream.so"
    compiler = os.environ.get("CXX", "g++")
    flags = ["-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *flags, str(_SOURCE), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def stream_3r(elements: int, threads: int) -> Callable[[], None]:
    """A call that reads as many bytes as update_sums does of so many float32 elements with two state tensors."""
    arrays = [torch.rand(elements) for _ in range(3)]
    for array in arrays:
        core.advise_huge_pages(array)
    function = _library().stream_3r
    function.restype = ctypes.c_float
    pointers = [ctypes.c_void_p(array.data_ptr()) for array in arrays]

    def call() -> None:
        function(*pointers, ctypes.c_int64(elements), ctypes.c_int(threads))

    call.arrays = arrays  # type: ignore[attr-defined]  # they must live as long as the pointers
    return call


def stream_4r2w(elements: int, threads: int) -> Callable[[], None]:
    """A call that moves as many bytes as a trajectory step of so many float32 elements."""
    arrays = [torch.rand(elements) for _ in range(4)]
    for array in arrays:
        core.advise_huge_pages(array)
    function = _library().stream_4r2w
    pointers = [ctypes.c_void_p(array.data_ptr()) for array in arrays]

    def call() -> None:
        function(*pointers, ctypes.c_int64(elements), ctypes.c_int(threads))

    call.arrays = arrays  # type: ignore[attr-defined]  # they must live as long as the pointers
    return call
