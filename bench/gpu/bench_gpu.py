"""Benchmarks of the CUDA kernels; run.sh builds, tests and calls this.

Every case is first checked against float64. Ours, the baselines and the limits then take turns; a time is the median
over the rounds, from CUDA events around enough calls. `share` is the limit's time divided by ours, both from the same
rounds: of a kernel that only moves the same bytes through the same streams, and of a device-to-device copy of as many
bytes.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import of_layers
import of_models
import torch
from timing import LIMIT_BYTES, Call, assert_close, copy_limit, host_us, measure
from torch import Tensor

import lipcore
from lipcore import functional

HOST_ELEMENTS = 10_000_000  # the host's time is only seen where the device does not hold it up
# (parameters, tensors, dtype, also torch.compile)
STEPS = [
    (1_000, 10, torch.float32, False),
    (10_000, 10, torch.float32, False),
    (1_000_000, 10, torch.float32, False),
    (25_000_000, 150, torch.float32, False),
    (100_000_000, 10, torch.float32, True),
    (1_000_000_000, 50, torch.float32, False),
    (25_000_000, 150, torch.bfloat16, False),
    (1_000_000_000, 50, torch.bfloat16, False),
]
NORMS = [
    (1_000_000, 10, torch.float32),
    (256, 1024, torch.float32),
    (4096, 4096, torch.float32),
    (64, 1 << 22, torch.float32),
    (1, 1 << 28, torch.float32),
    (64, 1 << 22, torch.bfloat16),
]

# ---- trajectory_step and what people write instead


class State:
    """Parameters, and the state of the baselines; lipcore's lives in its Trajectory."""

    def __init__(self, elements: int, tensors: int, dtype: torch.dtype) -> None:
        sizes = [elements // tensors] * tensors
        self.params = [torch.randn(size, device="cuda").to(dtype) for size in sizes]
        self.prev = [p.clone() for p in self.params]
        self.deviation = [torch.zeros(size, device="cuda") for size in sizes]
        for p in self.params:
            p.mul_(1.02)


def eager(s: State, share: float = 0.5) -> list[list[Tensor]]:
    rows = []
    for w, prev, deviation in zip(s.params, s.prev, s.deviation, strict=True):
        step = (w - prev).float()
        before = step + deviation
        torch.mul(before, share, out=deviation)
        m2 = torch.dot(before, deviation)
        largest = torch.linalg.vector_norm(step, float("inf"))
        bad = (~w.isfinite()).sum()
        norms = [torch.linalg.vector_norm(x, dtype=torch.float32) for x in (step, w)]
        rows.append([norms[0], m2, largest, norms[1], bad])
        prev.copy_(w)
    return rows


def foreach(s: State, share: float = 0.5) -> list[list[Tensor]]:
    steps = torch._foreach_sub(s.params, s.prev)
    rows = [torch._foreach_norm(x) for x in (steps, s.params)]
    rows.append(torch._foreach_norm(steps, float("inf")))
    rows.append([(~w.isfinite()).sum() for w in s.params])
    before = torch._foreach_add(s.deviation, [x.float() for x in steps])
    torch._foreach_copy_(s.deviation, torch._foreach_mul(before, share))
    rows.append([torch.dot(a, b) for a, b in zip(before, s.deviation, strict=True)])
    torch._foreach_copy_(s.prev, s.params)
    return rows


def check_step(s: State) -> None:
    """lipcore against float64, one tensor at a time."""
    prev, deviation = [p.clone() for p in s.prev], [d.clone() for d in s.deviation]
    rows = functional.trajectory_step(s.params, prev, deviation, 2)
    for i, row in enumerate(rows):
        w, p, d = (x[i].double() for x in (s.params, s.prev, s.deviation))
        step = w - p
        before = step + d
        after = before / 2
        want = [step.pow(2).sum(), (before * after).sum(), step.abs().max(), w.pow(2).sum()]
        assert_close(row[:4], torch.stack(want), 1e-6)
        assert row[4] == 0
        assert torch.equal(prev[i], s.params[i])
        assert_close(deviation[i].norm(), after.norm(), 1e-6)


def time_step(elements: int, tensors: int, dtype: torch.dtype, compiled: bool, stream: ctypes.CDLL) -> dict[str, Any]:
    s = State(elements, tensors, dtype)
    check_step(s)
    trajectory = lipcore.Trajectory([(f"p{i}", p) for i, p in enumerate(s.params)])
    calls: dict[str, Call] = {"lipcore": trajectory.update, "eager": lambda: eager(s), "foreach": lambda: foreach(s)}
    result: dict[str, Any] = {"op": "trajectory", "parameters": elements, "tensors": tensors, "dtype": str(dtype)[6:]}
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(eager)
        start = time.perf_counter()
        function(s)
        torch.cuda.synchronize()
        result["compile_s"] = round(time.perf_counter() - start, 1)
        calls["compile"] = lambda: function(s)
    item = s.params[0].element_size()
    bytes_moved = elements * (3 * item + 8)
    part = min(1.0, LIMIT_BYTES / bytes_moved)
    calls["stream_limit"] = stream_limit(int(elements * part), dtype, stream)
    calls["copy_limit"] = copy_limit(int(bytes_moved * part))
    result |= measure(calls, bytes_moved, part)
    if elements <= HOST_ELEMENTS:
        result["host_us"] = round(host_us(trajectory.update), 2)
    return result


def stream_limit(elements: int, dtype: torch.dtype, stream: ctypes.CDLL) -> Call:
    w, prev = (torch.zeros(elements, dtype=dtype, device="cuda") for _ in range(2))
    deviation = torch.zeros(elements, device="cuda")
    words, wide_words = elements * w.element_size() // 16, 4 // w.element_size()

    def run() -> None:
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in (w, prev, deviation)]
        current = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        code = stream.stream_limit(*pointers, ctypes.c_int64(words), wide_words, current)
        assert code == 0, f"CUDA error {code}"

    return run


def time_norms(rows: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
    x = torch.randn(rows, length, device="cuda").to(dtype)
    assert_close(functional.sample_norms(x), torch.linalg.vector_norm(x, dim=1, dtype=torch.float64), 1e-12)
    bytes_read = x.numel() * x.element_size()
    calls: dict[str, Call] = {
        "lipcore": lambda: functional.sample_norms(x),
        "vector_norm": lambda: torch.linalg.vector_norm(x, dim=1),
        "vector_norm_f64": lambda: torch.linalg.vector_norm(x, dim=1, dtype=torch.float64),
        "copy_limit": copy_limit(bytes_read),
    }
    result: dict[str, Any] = {"op": "sample_norms", "rows": rows, "length": length, "dtype": str(dtype)[6:]}
    result |= measure(calls, bytes_read)
    if x.numel() <= HOST_ELEMENTS:
        result["host_us"] = round(host_us(calls["lipcore"]), 2)
    return result


# ---- all of it


def machine() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpu_memory_GB": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "l2_MB": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stream", type=Path, required=True, help="stream.cu as a shared library")
    parser.add_argument("--results", type=Path, required=True, help="folder for gpu-<name>.json")
    parser.add_argument("--name", help="default: the GPU's")
    parser.add_argument("--seconds", type=float, default=240, help="start no further case after that")
    parser.add_argument("--only", help="regular expression for the cases' titles")
    parser.add_argument(
        "--check", action="append", default=[], help="name=outcome of a check made before, for the file"
    )
    arguments = parser.parse_args()
    stream = ctypes.CDLL(str(arguments.stream))
    gpu = torch.cuda.get_device_name(0)
    name = arguments.name or re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia ")).strip("-")
    path = arguments.results / f"gpu-{name}.json"
    report: dict[str, Any] = {
        "machine": machine(),
        "commit": os.environ.get("LIPCORE_COMMIT", "unknown"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "checks": dict(check.split("=", 1) for check in arguments.check),
        "results": [],
        "left_out": [],
    }
    cases: list[tuple[str, Callable[..., dict[str, Any]], tuple[Any, ...]]] = [
        *((f"trajectory {c[0]:,} parameters in {c[1]} {c[2]}", time_step, (*c, stream)) for c in STEPS),
        *((f"sample_norms {c[0]:,} x {c[1]:,} {c[2]}", time_norms, c) for c in NORMS),
        *((" ".join(map(str, (f.__name__, *c))), f, c) for f, c in of_layers.CASES),
        *((" ".join(map(str, (f.__name__, *c))), f, c) for f, c in of_models.CASES),
    ]
    start, failed = time.monotonic(), 0
    for title, bench, case in cases:
        if arguments.only and not re.search(arguments.only, title):
            continue
        if time.monotonic() - start > arguments.seconds:
            report["left_out"].append(f"{title}: out of time")
            continue
        try:
            result = bench(*case)
        except torch.cuda.OutOfMemoryError:
            report["left_out"].append(f"{title}: not enough memory")
        except Exception as error:
            failed += 1
            report["left_out"].append(f"{title}: {type(error).__name__}: {error}")
        else:
            report["results"].append(result)
            figures = {key: value for key, value in result.items() if re.match("times_|share_|GB_|host_", key)}
            print(f"{title}: {result['ms'].get('lipcore')} ms", *(f"{k}={v}" for k, v in figures.items()), flush=True)
        torch.cuda.empty_cache()
        path.write_text(json.dumps(report, indent=1) + "\n")  # after every case: a run cut short leaves what it has
    for line in report["left_out"]:
        print("left out:", line)
    print(path)
    if failed:
        raise SystemExit(f"{failed} cases failed")


if __name__ == "__main__":
    main()
