"""The default watch() beside trainscope 1.8.1, the post-mortem debugger on the package index: a step, bytes, faults.

Both watch the same transformer in a loop as their pages show it: trainscope is told of a step between backward() and
optimizer.step(). A step with alarms is measured too. trainscope's detectors look at the loss alone, so for the faults
they are given the losses of the trainings of bench/spikes (some minutes). Results go to bench/results/trainscope.json
too, from which docs/evidence.md is made.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_watch import Training as Watched
from measure import interleave, ratios, threads
from report import FOLDER, machine
from spikes import suite
from spikes.detectors import QUIET, USUAL
from spikes.evaluate import BUDGET, interval, rate
from spikes.faults import FAULTS, Injector
from spikes.models import TASKS, Training
from spikes.run import AFTER, losses_of

from lipcore.metric.results import json_ready

pytest.importorskip("trainscope", reason="no trainscope here; `make bench-peers` installs it")
from trainscope import TrainScope, TrainScopeConfig
from trainscope.core.detectors import make_detector

_SHORT, _LONG = 256, 1280  # steps of two runs, whose sizes tell what a step takes
_SAMPLES, _LENGTH = 2, 8  # there, which sizes do not depend on

Options = dict[str, Any]
#: As shipped. Thresholds are of CUSUM's sum and of z; the band of percentiles has none.
SHIPPED: dict[str, Options] = {
    "CUSUM of the loss, its default": {"name": "changepoint"},
    "z-score of the loss": {"name": "z_score"},
    "percentiles of the loss": {"name": "percentile"},
}
_LIGHT: Options = {"histogram_every_n_steps": 50, "activation_metrics_every_n_steps": 50}


class Told(Watched):
    """A training that trainscope is told of, or lipcore, in one of the ways."""

    def begin(self, way: str, folder: Path) -> None:
        self.scope: TrainScope | None = None
        if not way.startswith("trainscope"):
            super().begin(way, folder)
            return
        options = _LIGHT if way.endswith("light") else {}
        config = TrainScopeConfig(run_dir=str(folder), run_name=way, **options)
        self.scope = TrainScope(self.model, self.optimizer, config).attach()

    def before_step(self, loss: torch.Tensor) -> None:
        if self.scope is not None:
            self.scope.step(loss.item())

    def close(self) -> None:
        if self.scope is not None:
            self.scope.detach()
        super().close()


_WAYS = ("plain", "control", "watched", "alarms", "trainscope", "trainscope, light")


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Any:
    """What is written beside the report's rows, whichever of these benchmarks ran."""
    logging.getLogger("trainscope").setLevel(logging.ERROR)
    path = (request.config.getoption("--results") or FOLDER / "results") / "trainscope.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found |= {"machine": machine(), "version": _version()}
    yield found
    suite.write(path, found)


def _version() -> str:
    from importlib.metadata import version

    return version("trainscope")


def bench_step_of_a_transformer(benchmark: Any, report: Any, results: dict[str, Any]) -> None:
    with threads(1), tempfile.TemporaryDirectory() as name:
        trainings = {way: Told(way, Path(name)) for way in _WAYS}
        for way in ("watched", "alarms", "trainscope"):
            parameters = (trainings[one].model.parameters() for one in ("plain", way))
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(*parameters, strict=True)), way
        monitor = trainings["alarms"].monitor
        assert monitor is not None
        assert monitor.alarms is not None
        assert monitor.alarms.rate == monitor.alarms.rate  # not NaN: steps are scored by now
        calls: dict[str, Callable[[], None]] = {way: training.steps for way, training in trainings.items()}
        times = interleave(calls, seconds=110, rounds=25, clock=time.process_time)  # both have threads that write
        found = ratios(times, "plain")
        benchmark.pedantic(calls["watched"], rounds=1, iterations=1)
        for training in trainings.values():
            training.close()
    plain = 1e3 * sorted(times["plain"])[len(times["plain"]) // 2] / Told.turn
    results["step"] = {"plain_ms": plain, **{way: found[way] for way in _WAYS if way != "plain"}}
    where = "trainscope, transformer of 1 million parameters, 12 x 64 tokens, 1 thread"
    lipcore = {"lipcore": found["watched"], "lipcore_with_alarms": found["alarms"]}
    details = {"control": found["control"], **lipcore, "plain_ms": plain}
    report.add(where, found["trainscope"], "x plain", **details)
    report.add(f"{where}, activations in every 50th step", found["trainscope, light"], "x plain", **details)


def bench_bytes_of_a_step(benchmark: Any, report: Any, results: dict[str, Any]) -> None:
    found = {}
    with threads(1), tempfile.TemporaryDirectory() as name:
        for way in ("watched", "trainscope"):
            sizes = []
            for steps in (_SHORT, _LONG):
                folder = Path(name) / str(steps)
                folder.mkdir(exist_ok=True)
                training = Told(way, folder, samples=_SAMPLES, length=_LENGTH, steps=steps)
                training.close()
                sizes.append(sum(file.stat().st_size for file in (folder / way).rglob("*") if file.is_file()))
            found[way] = (sizes[1] - sizes[0]) / (_LONG - _SHORT)
        count = sum(1 for _ in training.model.parameters())
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)
    results["bytes_per_step"] = {"lipcore": found["watched"], "trainscope": found["trainscope"], "parameters": count}
    where = f"trainscope, record of a step of {count} parameters"
    report.add(where, found["trainscope"], "bytes", lipcore=found["watched"])


def alarms_of(losses: Sequence[float], options: Options) -> list[int]:
    """Return the steps, from 0, of all alarms of a detector. A loss that is not finite, of which trainscope logs a
    warning, counts as one."""
    detector = make_detector(options)
    return [step for step, loss in enumerate(losses) if not math.isfinite(loss) or detector.update(loss) is not None]


def rate_of(runs: Sequence[Sequence[float]], options: Options) -> dict[str, Any]:
    """Return a detector's rate of alarms in trainings without a fault, counted as those of bench/spikes are: after the
    first hundred steps, and none in the 20 steps after another."""
    count = 0
    for losses in runs:
        last = -QUIET - 1
        for step in alarms_of(losses, options):
            if step >= USUAL and step > last + QUIET:
                count, last = count + 1, step
    return rate(count, sum(len(losses) - USUAL for losses in runs))


def at_the_budget(runs: Sequence[Sequence[float]], name: str) -> Options:
    """Return the detector with the least threshold, in steps of 5 %, that keeps to the budget in trainings without a
    fault."""
    options: Options = {"name": name, "threshold": 1.0}
    while rate_of(runs, options)["per_1000"] > BUDGET:
        options["threshold"] *= 1.05
    return options


def _clean(kind: str, task: str, size: suite.Size) -> list[list[float]]:
    """Return the losses of the trainings without a fault."""
    seeds = [job[2] for job in suite.jobs(size, calibration=kind == "calibration") if job[:2] == (kind, task)]
    return [losses_of(Training(TASKS[task], seed), size.steps) for seed in seeds]


def _faulty(task: str, size: suite.Size) -> dict[str, list[list[float]]]:
    """Return the losses of the trainings with each fault, which begins after so many steps."""
    found: dict[str, list[list[float]]] = {fault.name: [] for fault in FAULTS}
    for seed in [job[2] for job in suite.jobs(size, calibration=False) if job[:2] == ("faulty", task)]:
        training = Training(TASKS[task], seed)
        before = losses_of(training, size.before)
        for number, fault in enumerate(FAULTS):
            fork = training.fork()
            found[fault.name].append(before + losses_of(fork, AFTER, Injector(fault, number, fork, seed)))
    return found


def bench_faults(benchmark: Any, report: Any, results: dict[str, Any]) -> None:
    size = suite.Size()
    found: dict[str, Any] = {}
    with threads(1):
        for task in size.tasks:
            calibration, clean = (_clean(kind, task, size) for kind in ("calibration", "clean"))
            faulty = _faulty(task, size)
            detectors = dict(SHIPPED)
            for words, name in (("CUSUM of the loss", "changepoint"), ("z-score of the loss", "z_score")):
                detectors[f"{words}, at equal false alarms"] = at_the_budget(calibration, name)
            for words, options in detectors.items():
                row = found.setdefault(words, {"faults": {}, "false_alarms": {}, "options": {}})
                row["options"][task] = options
                row["false_alarms"][task] = rate_of(clean, options)
                row["faults"][task] = {
                    fault.name: _found(faulty[fault.name], options, size.before, fault.window) for fault in FAULTS
                }
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)
    for words, row in found.items():
        each = [one for by_fault in row["faults"].values() for name, one in by_fault.items() if name != FAULTS[-1].name]
        total = {key: sum(one[key] for one in each) for key in ("found", "runs")}
        low, high = interval(total["found"], total["runs"])
        row["total"] = total | {"low": low, "high": high}
        report.add(f"trainscope's {words}: faults found", total["found"] / total["runs"], "of all", **total)
    results["detectors"] = json_ready(found, digits=6)


def _found(runs: Sequence[Sequence[float]], options: Options, begin: int, window: int) -> dict[str, int]:
    told = (any(begin <= step < begin + window for step in alarms_of(losses, options)) for losses in runs)
    return {"found": sum(told), "runs": len(runs)}
