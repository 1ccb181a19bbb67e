"""The report of a long run: its bytes, how long it takes to make, and until a browser has drawn it."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, browser
from recorded_runs import recorded

from lipcore.report.page import page_of

PLACES, STEPS, FAULT = 300, 100_000, 73_210


def bench_a_long_run(benchmark: Any, report: Any) -> None:
    names = [f"layers.{i}.weight" for i in range(PLACES)]
    with tempfile.TemporaryDirectory() as folder:
        run = recorded(Path(folder) / "run", STEPS, names, level="tensor", fault=(FAULT, names[123]), windows=100)
        begin = time.perf_counter()
        text = page_of(run)
        made = time.perf_counter() - begin
        run.close()
        assert f"{FAULT:,}" in text  # what is to be seen first is there
        assert names[123] in text
        page = Path(folder) / "page.html"
        page.write_text(text, encoding="utf-8")
        what = f"the report of {STEPS:,} steps of {PLACES} parameters"
        report.add(f"{what}: size", page.stat().st_size / 1e6, "MB", target=3.0, better="lower")
        report.add(f"{what}: making it", made, "s", target=60.0, better="lower")
        benchmark.pedantic(page.read_text, rounds=1, iterations=1)
        if CHROMIUM is None:
            pytest.skip("needs chromium to be opened")
        with browser() as chromium:
            chromium.open(page)
            opened = sorted(chromium.open(page) for _ in range(5))[2]
            assert not chromium.troubles
        report.add(f"{what}: until a browser has drawn it", opened, "s", target=2.0, better="lower")
