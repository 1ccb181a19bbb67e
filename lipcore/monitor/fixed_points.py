"""Fixed points at which the local Lipschitz constant is measured at every window's close: far from the data, say."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lipcore.lipschitz.pointwise import constants
from lipcore.metric.distribution import Distribution
from lipcore.metric.results import MetricResult, Value
from lipcore.models.checks import check_batch_size, check_input, check_rows, finite_rows
from lipcore.models.names import unwrap
from lipcore.regions.patterns import Patterns, activation_patterns


class Probe:
    """One set of points; made by :meth:`lipcore.Monitor.probe`."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        name: str,
        output: int | str | Callable[[Any], Tensor] | None,
        regions: bool,
        batch_size: int,
    ) -> None:
        check_input(model, x)
        if not len(x):
            raise ValueError(f"x: expected shape [N, ...] with N >= 1, got {list(x.shape)}")
        check_batch_size(batch_size)
        check_rows(finite_rows(x), "x", "it")
        self.name, self.x = name, x.detach().clone()
        self._model, self._output, self._regions, self._batch_size = unwrap(model), output, regions, batch_size
        self.patterns: Patterns | None = None  #: as last measured, with regions=True
        #: Local Lipschitz constant of every point, as last measured; float64 [N].
        self.values = torch.empty(0, device="cpu")
        self._churn = math.nan
        self.measure()
        self._churn = math.nan

    def measure(self) -> None:
        """Take the model as it is now, in eval mode."""
        with in_eval_mode(self._model):
            parts = enumerate(self.x.split(self._batch_size))
            found = [constants(self._model, part, self._output, known_apart=number > 0) for number, part in parts]
            self.values = torch.cat(found)
            self._churn = math.nan
            if self._regions and not bool(torch.isfinite(self.values).all()):
                self.patterns = None  # training diverged, which a probe reports and does not stop
            elif self._regions:
                patterns = activation_patterns(self._model, self.x, output=self._output, batch_size=self._batch_size)
                self._churn = math.nan if self.patterns is None else self.patterns.churn(patterns)
                self.patterns = patterns

    def add_to(self, result: MetricResult) -> Exception | None:
        """Measure, and write the numbers down; the error where they could not be had, and then numbers that are not
        valid."""
        try:
            self._add_measured(result)
        except Exception as error:
            self._add_unknown(result, f"not measured: {error}")
            return error
        return None

    def _add_measured(self, result: MetricResult) -> None:
        self.measure()
        distribution = Distribution()
        distribution.observe(self.values)
        result.add("local_lipschitz", self.name, "total", **distribution.reduced("exact", note="in eval mode"))
        if self._regions:
            count = len(self.x)
            known = self.patterns is not None
            regions = float(self.patterns.regions) if self.patterns is not None else math.nan
            note = "" if known else "constants at the points are not finite"
            result.add("regions", self.name, "total", last=Value(regions, count, "exact", known, note))
            changed = Value(self._churn, count, "exact", not math.isnan(self._churn))
            result.add("region_churn", self.name, "total", last=changed)

    def _add_unknown(self, result: MetricResult, note: str) -> None:
        self.values, self.patterns = torch.full_like(self.values, math.nan), None
        unknown = {reducer: replace(value, note=note) for reducer, value in Distribution().reduced("exact").items()}
        result.add("local_lipschitz", self.name, "total", **unknown)
        for quantity in ("regions", "region_churn") if self._regions else ():
            result.add(quantity, self.name, "total", last=Value(math.nan, 0, "exact", False, note))


class Probes:
    """All probes of a Monitor."""

    def __init__(self) -> None:
        self._probes: dict[str, Probe] = {}

    def __bool__(self) -> bool:
        return bool(self._probes)

    def add(self, probe: Probe) -> None:
        self._probes[probe.name] = probe

    def check_name(self, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(f"name: expected a word for the probe, got {name!r}")
        if name in self._probes:
            raise ValueError(f"name: there is a probe {name!r} already; choose another name")

    def finalize(self) -> tuple[MetricResult, dict[str, Exception]]:
        """Measure all of them now, and return the errors of those that could not be, which takes neither the others nor
        the metrics with it: their numbers are not valid and say why. ``details["seconds"]`` says how long it took."""
        result = MetricResult("probes", points={name: len(probe.x) for name, probe in self._probes.items()})
        start = time.perf_counter()
        errors = {name: error for name, probe in self._probes.items() if (error := probe.add_to(result)) is not None}
        result.details["seconds"] = time.perf_counter() - start
        return result, errors


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode while it lasts; each gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
