"""An independent check: the configurations of Opacus's shipped per-layer tests, measured by lipcore.

Opacus's tests build a module and an input and hand both to `run_test` of their base class. Here that is lipcore against
one sample at a time in float64, for both loss reductions. `make test-peers` runs it and writes the counts.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import sys
import unittest
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

common = pytest.importorskip("opacus.tests.grad_samples.common", reason="needs the extra `peers` (make test-peers)")

import opacus  # noqa: E402
from opacus.tests import grad_samples  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from per_sample_oracle import assert_norms, norms_sq, weighted_sum  # noqa: E402

import lipcore  # noqa: E402

pytestmark = pytest.mark.slow

FILES = sorted(m.name for m in pkgutil.iter_modules(grad_samples.__path__) if m.name.endswith("_test"))
_counts: dict[str, Counter[str]] = {}
_refusals: dict[str, set[str]] = {}


class _Run:
    """What one file's configurations came to."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.refusals: set[str] = set()
        self.failures: list[str] = []

    def take(self, x: Any, module: nn.Module, batch_first: bool, chunk_method: Any) -> None:
        for reduction in ("sum", "mean"):
            self.counts[self._outcome(x, module, 0 if batch_first else 1, reduction, chunk_method)] += 1

    def _outcome(self, x: Any, module: nn.Module, dim: int, reduction: str, chunk_method: Any) -> str:
        try:
            return self._compare(x, module, dim, reduction, chunk_method)
        except AssertionError as error:
            self.failures.append(f"{module}, batch dimension {dim}, {reduction}: {error}")
            return "failed"

    def _refuses(self, module: nn.Module, error: ValueError) -> str:
        self.refusals.add(f"{type(module).__name__}: {error}".split(". Ways out")[0])
        return "refused by name"

    def _compare(self, x: Any, module: nn.Module, dim: int, reduction: str, chunk_method: Any) -> str:
        try:
            metric = lipcore.PerSampleGradNorms(module, loss_reduction=reduction, batch_dim=dim)
        except ValueError as error:
            return self._refuses(module, error)
        if isinstance(x, PackedSequence):  # has its samples in no dimension
            try:
                with metric:
                    module(x)
            except ValueError as error:
                return self._refuses(module, error)
            raise AssertionError("a PackedSequence was taken, which has its samples in no dimension")
        if isinstance(x, tuple):  # bags: indices of any number come first, and the number of samples with the offsets
            module, x = _OffsetsFirst(module), x[::-1]
            metric.close()
            metric = lipcore.PerSampleGradNorms(module, loss_reduction=reduction)
        arguments = x if isinstance(x, tuple) else (x,)
        samples = _samples(arguments, dim, chunk_method)
        module.zero_grad()
        with metric:
            total = weighted_sum(module(*arguments))
            (total / max(1, len(samples)) if reduction == "mean" else total).backward()
            if samples:
                assert_norms(metric, norms_sq(module, samples, weighted_sum))
            else:
                assert metric.per_sample.shape == (0,)
        return "passed"


class _OffsetsFirst(nn.Module):
    def __init__(self, bag: nn.Module) -> None:
        super().__init__()
        self.bag = bag

    def forward(self, offsets: Tensor, indices: Tensor) -> Tensor:
        return self.bag(indices, offsets)


def _samples(arguments: tuple[Any, ...], dim: int, chunk_method: Any) -> list[tuple[Any, ...]]:
    if len(arguments) > 1:  # bags: Opacus's test knows how they are cut
        return [chunk[::-1] for chunk in chunk_method(arguments[::-1])]
    (x,) = arguments
    assert isinstance(x, Tensor)
    return [(part,) for part in x.split(1, dim)] if x.shape[dim] else []


@pytest.fixture(scope="module", autouse=True)
def results() -> Iterator[None]:
    """Written where OPACUS_RESULTS says."""
    yield
    path = os.environ.get("OPACUS_RESULTS")
    if path and _counts:
        total = sum(_counts.values(), Counter())
        text = {
            "opacus": opacus.__version__,
            "torch": torch.__version__,
            "lipcore": lipcore.__version__,
            "configurations": dict(total),
            "files": {name: dict(counts) for name, counts in _counts.items()},
            "refused": {name: sorted(found) for name, found in _refusals.items() if found},
        }
        Path(path).write_text(json.dumps(text, indent=1, sort_keys=True) + "\n")


@pytest.mark.parametrize("name", FILES)
def test_shipped_configurations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _Run()

    def run_test(
        self: Any, x: Any, module: nn.Module, batch_first: bool = True, *, chunk_method: Any = iter, **_: Any
    ) -> None:
        run.take(x, module, batch_first, chunk_method)

    monkeypatch.setattr(common.GradSampleHooks_test, "run_test", run_test)
    torch.manual_seed(0)
    module = importlib.import_module(f"{grad_samples.__name__}.{name}")
    outcome = unittest.TestResult()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unittest.defaultTestLoader.loadTestsFromModule(module).run(outcome)
    _counts[name], _refusals[name] = run.counts, run.refusals
    trouble = [text for _, text in (*outcome.errors, *outcome.failures)]
    assert not run.failures, "\n".join(run.failures[:5])
    assert not trouble, trouble[0]
    if not run.counts:
        pytest.skip(f"{name} tests functions of Opacus's own, no layers")
