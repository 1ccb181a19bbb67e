"""Peak memory of one contender in a fresh process: `peak_growth` starts this file and watches it from outside.

The kernel's own high-water mark (ru_maxrss) would be that of importing torch and of making the parameters, and
tracemalloc does not see tensors; a sampling thread in the process itself would wait for the interpreter's lock.
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import time

import psutil
import torch
from contenders import CONTENDERS

_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
_STEPS = 2
_INTERVAL = 2e-4  # seconds between looks; a step at 1e7 parameters takes 4e-3 and more


def peak_growth(contender: str, elements: int, tensors: int, dtype: str) -> int:
    """Bytes of resident memory at the peak of setting up and stepping, beyond a process that has the parameters."""
    command = [sys.executable, __file__, contender, str(elements), str(tensors), dtype]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{' '.join(command)} did not get ready; see its output above")
        worker = psutil.Process(process.pid)
        start = peak = worker.memory_info().rss
        process.stdin.write("go\n")
        process.stdin.flush()
        while process.poll() is None:
            try:
                peak = max(peak, worker.memory_info().rss)
            except psutil.NoSuchProcess:
                break
            time.sleep(_INTERVAL)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with status {process.returncode}; see its output above")
    return peak - start


def _take(contender: str, params: list[torch.Tensor], steps: int) -> None:
    call = CONTENDERS[contender](params)
    for _ in range(steps):
        call()


def _give_back() -> None:
    """glibc keeps freed blocks under 32 MB for later; taken again, they would not show as growth."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def main() -> None:
    contender, elements, tensors, dtype = sys.argv[1:]
    torch.set_num_threads(1)
    params = [torch.randn(int(elements) // int(tensors)).to(_DTYPES[dtype]) for _ in range(int(tensors))]
    with torch.no_grad():
        # Once before: libraries, threads and compiled code are not what a step needs.
        _take(contender, params, 1)
        gc.collect()
        _give_back()
        print("ready", flush=True)
        sys.stdin.readline()
        _take(contender, params, _STEPS)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
