"""The GPU benchmarks on small sizes: their calls run, and their checks against float64 hold."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SMALL = {
    "linear": [(2, 5, 6, 7, torch.float32), (2, 5, 6, 7, torch.bfloat16)],
    "fused": [(2, 5, 6, 7, torch.float32)],
    "conv": [(3, 2, 3, 5, 3, torch.float32)],
    "rows": [(3, 5, 6, torch.float32), (3, 5, 6, torch.bfloat16)],
    "embedding": [(2, 5, 6, 9, torch.float32)],
}


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that imports one of their modules, in which every call is made once and none is timed."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench" / "gpu"))

    def measure(calls: dict[str, Callable[[], Any]], *sizes: Any) -> dict[str, Any]:
        for call in calls.values():
            call()
        return {"ms": dict.fromkeys(calls, 0.0)}

    def module(name: str) -> Any:
        found = importlib.import_module(name)
        monkeypatch.setattr(found, "measure", measure)
        return found

    yield module
    for name in ("of_layers", "of_models", "timing"):
        sys.modules.pop(name, None)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SMALL)
def test_every_layer(imported: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    of_layers = imported("of_layers")
    monkeypatch.setattr(of_layers, "extra_mib", lambda call: 0.0)
    assert {function.__name__ for function, _ in of_layers.CASES} == set(SMALL)
    for case in SMALL[name]:
        assert getattr(of_layers, name)(*case)["ms"]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:CUDA is not available:UserWarning")
def test_the_models_steps(imported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    of_models = imported("of_models")
    sizes = {"WIDTH": 8, "LAYERS": 1, "HEADS": 2, "LENGTH": 6, "VOCABULARY": 11, "STEPS": 2, "ROUNDS": 1}
    for name, size in sizes.items():
        monkeypatch.setattr(of_models, name, size)
    found = of_models.gpt2(2)
    assert not found["errors"]
    assert set(found["ratio"]) == set(of_models.WAYS)
    assert of_models.sums()["ms"]
