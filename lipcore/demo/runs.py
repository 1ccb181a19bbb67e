"""One training run under a lipcore Monitor, and what it brings."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import lipcore
from lipcore.demo.tasks import Task


@dataclass
class Run:
    """One value per epoch; lipcore's numbers are those of the epoch's window, at the samples as they were visited."""

    level: float
    seed: int
    place: str = ""  #: the output the numbers refer to, as lipcore names it
    train_loss: list[float] = field(default_factory=list)  #: mean over the epoch, each batch before its update
    test_loss: list[float] = field(default_factory=list)  #: at the end of the epoch
    normalized_length: list[float] = field(
        default_factory=list
    )  #: sum of r over the epoch / number of training samples
    grad_norm: list[float] = field(default_factory=list)  #: of a batch's gradient, mean over the epoch
    lipschitz_mean: list[float] = field(default_factory=list)
    lipschitz_p99: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)  #: samples whose loss gradient was exactly 0

    @property
    def cumulative_length(self) -> float:
        """Cumulative length per training sample, over all epochs."""
        return sum(self.normalized_length)


@dataclass
class TaskResult:
    """All runs of one task, ordered by level, then seed."""

    task: Task
    runs: list[Run]

    def at(self, level: float) -> list[Run]:
        return [run for run in self.runs if run.level == level]


def train(task: Task, level: float, seed: int, after_epoch: Callable[[], None], record: Path | None = None) -> Run:
    """Train one network, calling `after_epoch` after every epoch, and record the run in the folder `record`."""
    problem = task.build(level, seed)
    model, loss_function, count = problem.model, problem.loss, len(problem.x)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=task.learning_rate)
    run = Run(level, seed)
    metrics: list[Any] = [lipcore.Lipschitz()] if record is None else [lipcore.Lipschitz(), lipcore.Trajectory()]
    about = f"{task.title.lower()}, {task.difficulty} {level:g}"
    config = {"about": about, "seed": seed, "optimizer": f"Adam, {task.learning_rate:g}", "batch": task.batch_size}
    with lipcore.watch(model, optimizer, run=record, metrics=metrics, window_steps=None, config=config) as monitor:
        for _ in range(task.epochs):
            total, norms = 0.0, []
            for batch in torch.from_numpy(problem.random.permutation(count)).split(task.batch_size):
                optimizer.zero_grad()
                loss = loss_function(model(problem.x[batch]), problem.y[batch])
                monitor.log(loss=loss)
                loss.backward()
                norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None)))
                optimizer.step()
                total += loss.item() * len(batch)
            window = monitor.close_window()
            assert window is not None  # an epoch has steps
            measured = window["lipschitz"]
            (run.place,) = measured["normalized_gradient_norm"]
            run.train_loss.append(total / count)
            run.normalized_length.append(measured["normalized_gradient_norm"][run.place].sum.value / count)
            run.grad_norm.append(statistics.fmean(norms))
            run.lipschitz_mean.append(measured["local_lipschitz"][run.place].mean.value)
            run.lipschitz_p99.append(measured["local_lipschitz"][run.place].p99.value)
            run.skipped.append(int(measured["skipped"][run.place].sum.value))
            with torch.no_grad():
                run.test_loss.append(float(loss_function(model(problem.x_test), problem.y_test)))
            after_epoch()
    return run
