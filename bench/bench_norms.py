"""Row norms: float64 sums against torch's float32 ones, in cache and out of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import interleave, ratios, threads

from lipcore import functional
from lipcore.functional import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(256, 1024), (64, 1 << 20)], ids=["in cache", "in memory"])
def bench_sample_norms(benchmark: Any, report: Any, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    expected = reference.sample_norms(x[:8])
    ours = functional.sample_norms(x)
    torch.testing.assert_close(ours[:8], expected, rtol=1e-12, atol=0)
    theirs = torch.linalg.vector_norm(x, dim=1).double()
    error = float(((theirs[:8] - expected).abs() / expected).max())
    with threads(2):
        calls = {
            "lipcore": lambda: functional.sample_norms(x),
            "vector_norm": lambda: torch.linalg.vector_norm(x, dim=1),
        }
        times = interleave(calls, seconds=3)
        benchmark(calls["lipcore"])
    where = "in cache" if shape[1] == 1024 else "in memory"
    title = f"sample_norms, {list(shape)}, {str(dtype)[6:]} ({where}): against vector_norm"
    # In memory both are at the limit: parity is what can be claimed.
    target = 1.0 if where == "in cache" else 0.92
    report.add(
        title,
        ratios(times, "lipcore")["vector_norm"],
        "x faster",
        target=target,
        better="higher",
        vector_norm_error=error,
    )
