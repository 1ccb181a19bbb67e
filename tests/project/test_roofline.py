"""The table of least costs in docs/cuda.md is what bench/gpu/roofline.py computes."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_table() -> None:
    found = runpy.run_path(str(ROOT / "bench" / "gpu" / "roofline.py"))
    page = (ROOT / "docs" / "cuda.md").read_text().splitlines()
    lines = found["table"]()
    begin = page.index(lines[0])
    assert page[begin : begin + len(lines)] == lines
