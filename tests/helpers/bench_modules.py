"""Modules of the folder of benchmarks, which no package has."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@contextmanager
def imported(monkeypatch: pytest.MonkeyPatch, name: str, *others: str) -> Iterator[Any]:
    """One of them, which is forgotten after the test, as are others that it imports; skips, visibly, without the
    folder."""
    if not BENCH.exists():
        pytest.skip("there is no bench folder")
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module(name)
    for each in (name, *others):
        sys.modules.pop(each, None)
