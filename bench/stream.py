"""Limits of this machine and textbook methods: bench/native/*.cpp, built once and called through ctypes."""

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

_NATIVE = Path(__file__).parent / "native"


@cache
def _library(name: str) -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp(prefix="lipcore-bench-"))
    target = folder / f"{name}.so"
    compiler = os.environ.get("CXX", "g++")
    flags = ["-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *flags, str(_NATIVE / f"{name}.cpp"), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def stream_3r(elements: int, threads: int) -> Callable[[], None]:
    """A call that reads as many bytes as update_sums does of so many float32 elements with two state tensors."""
    arrays = [torch.rand(elements) for _ in range(3)]
    for array in arrays:
        core.advise_huge_pages(array)
    function = _library("stream").stream_3r
    function.restype = ctypes.c_float
    pointers = [ctypes.c_void_p(array.data_ptr()) for array in arrays]

    def call() -> None:
        function(*pointers, ctypes.c_int64(elements), ctypes.c_int(threads))

    call.arrays = arrays  # type: ignore[attr-defined]  # they must live as long as the pointers
    return call


def stream_3r2w(elements: int, threads: int) -> Callable[[], None]:
    """A call that moves as many bytes as a trajectory step of so many float32 elements."""
    arrays = [torch.rand(elements) for _ in range(3)]
    for array in arrays:
        core.advise_huge_pages(array)
    function = _library("stream").stream_3r2w
    pointers = [ctypes.c_void_p(array.data_ptr()) for array in arrays]

    def call() -> None:
        function(*pointers, ctypes.c_int64(elements), ctypes.c_int(threads))

    call.arrays = arrays  # type: ignore[attr-defined]  # they must live as long as the pointers
    return call


def multiply_add(threads: int, rounds: int = 1 << 18) -> Callable[[], float]:
    """A call that does float32 multiply-adds from registers to registers, and says how many operations these were."""
    function = _library("fma").fma_rounds
    function.restype = ctypes.c_double
    return lambda: float(function(ctypes.c_int64(rounds), ctypes.c_int(threads)))


_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def read_once(x: torch.Tensor, threads: int) -> Callable[[], float]:
    """A call that reads x once for its sum of squares."""
    function = getattr(_library("sketch"), f"read_{_TYPES[x.dtype]}")
    function.restype = ctypes.c_double
    arguments = ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.numel()), ctypes.c_int(threads)
    return lambda: float(function(*arguments))


def textbook_sketch(x: torch.Tensor, buckets: int, threads: int) -> Callable[[], torch.Tensor]:
    """A call that gives the CountSketch of x by a hash and an addition per element."""
    function, y = getattr(_library("sketch"), f"scatter_{_TYPES[x.dtype]}"), torch.empty(buckets, dtype=torch.float64)
    first = ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.numel()), ctypes.c_uint32(7), ctypes.c_int64(buckets)
    last = ctypes.c_void_p(y.data_ptr()), ctypes.c_int(threads)

    def call() -> torch.Tensor:
        function(*first, *last)
        return y

    return call
