"""Runs a training under a Monitor and keeps every number that a detector may look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import lipcore
from lipcore.alarms import Alarms
from lipcore.trajectory.step_stream import StepArrays
from spikes.faults import FAULTS, Injector
from spikes.models import BATCH, TASKS, Rate, Training

Series = dict[str, NDArray[Any]]

#: Numbers of a step by place, which a Trajectory gives for every parameter, group and in total.
NORMS = ("update_norm", "grad_norm", "weight_norm")
BEFORE = 400  # steps before a fault
AFTER = 40


class _Norms:
    """Collector of a Trajectory's single steps."""

    def __init__(self) -> None:
        self.blocks: list[StepArrays] = []

    def __call__(self, first: int, arrays: StepArrays) -> None:
        self.blocks.append(arrays)

    def series(self) -> Series:
        found: Series = {name: np.concatenate([block[name] for block in self.blocks]) for name in NORMS}
        places, levels = self.blocks[0].places, self.blocks[0].levels
        return found | {"places": np.array(places), "levels": np.array(levels)}


def record(
    training: Training,
    steps: int,
    injector: Injector | None = None,
    *,
    samples: bool = False,
    alarms: Alarms | None = None,
) -> Series:
    """Train so many steps and return what was seen: the loss that a loop logs, the learning rate, norms by place,
    activation kurtosis by module, numbers of AdamW's state, the largest loss of a sample; with `samples` per-sample
    losses and gradient norms [steps, batch].

    It ends early where the loss is not finite.
    """
    model, optimizer, task = training.model, training.optimizer, training.task
    norms = _Norms()
    stats = lipcore.TensorStats(parameters=False, gradients=False, outputs=task.outputs, every_steps=1)
    metrics: list[lipcore.Metric] = [lipcore.Trajectory(on_step=norms), stats]
    each = lipcore.PerSampleGradNorms(loss_reduction="mean") if samples else None
    metrics += [each] if each is not None else []
    rows: list[dict[str, Any]] = []

    def before_backward(losses: Tensor, rate: float) -> None:
        losses = losses.detach()
        rows.append({"loss": float(losses.mean()), "rate": rate, "sample_loss": losses.double().numpy()})
        monitor.log(loss=rows[-1]["loss"], lr=rate)

    def before_update() -> None:
        if isinstance(optimizer, torch.optim.AdamW):
            rows[-1] |= _of_adamw(optimizer, rate_of_change=False)

    with lipcore.Monitor(model, optimizer, metrics, window_steps=1, history_limit=1, alarms=alarms) as monitor:
        for k in range(steps):
            one_step(training, k, injector, before_backward, before_update)
            window, row = monitor.pop_window(), rows[-1]
            assert window is not None
            output = window["tensor_stats"].output
            row["kurtosis"] = np.array([output[name].kurtosis.value for name in task.outputs])
            if isinstance(optimizer, torch.optim.AdamW):
                row |= _of_adamw(optimizer, rate_of_change=True)
            if each is not None:
                row["sample_norm"] = each.per_sample.double().numpy().copy()
            if not np.isfinite(row["loss"]):
                break
    return {name: np.array([row[name] for row in rows]) for name in rows[0]} | norms.series()


def one_step(
    training: Training,
    k: int,
    injector: Injector | None = None,
    before_backward: Callable[[Tensor, float], None] | None = None,
    before_update: Callable[[], None] | None = None,
) -> float:
    """Take one step, with a fault that began k steps before, and return the loss that a loop logs.

    Args:
        before_backward: is called with the samples' losses and the learning rate, before backward().
        before_update: is called before optimizer.step().
    """
    optimizer, task, rate = training.optimizer, training.task, training.rate(training.steps)
    if injector is not None:
        rate = injector.rate(k, rate)
        injector.weights(k)
    for group in optimizer.param_groups:
        group["lr"] = rate
    ids = training.next_ids() if injector is None else injector.ids(k)
    x, y, weights = training.x[ids], training.y[ids], torch.ones(BATCH)
    if injector is not None:
        x, y, weights = injector.batch(k, x, y)
    losses = task.losses(training.model(x), y)
    if before_backward is not None:
        before_backward(losses, rate)
    loss = (losses * weights).mean()
    optimizer.zero_grad()
    if injector is not None:
        injector.backward(k)
        loss = injector.loss(loss)
    loss.backward()
    if before_update is not None:
        before_update()
    optimizer.step()
    training.steps += 1
    return float(losses.detach().mean())


def losses_of(training: Training, steps: int, injector: Injector | None = None) -> list[float]:
    """Train so many steps and return the losses alone; it ends early where one is not finite."""
    found: list[float] = []
    while len(found) < steps and (not found or np.isfinite(found[-1])):
        found.append(one_step(training, len(found), injector))
    return found


def _of_adamw(optimizer: torch.optim.Optimizer, *, rate_of_change: bool) -> dict[str, NDArray[Any]]:
    """Return RMS_t of each parameter before a step, sqrt(mean(g^2 / max(v, eps^2))) of Wortsman et al. (2023) with the
    second moments as they were; or, after it, the root mean square of AdamW's normalised update."""
    group = optimizer.param_groups[0]
    found, sizes = [], []
    for p in group["params"]:
        state = optimizer.state.get(p)
        if not state or p.grad is None:
            found.append(float("nan"))
        elif rate_of_change:
            step, (b1, b2) = float(state["step"]), group["betas"]
            second = (state["exp_avg_sq"] / (1 - b2**step)).sqrt() + group["eps"]
            found.append(float((state["exp_avg"] / (1 - b1**step) / second).square().mean()))
        else:
            found.append(float((p.grad.square() / state["exp_avg_sq"].clamp_min(group["eps"] ** 2)).mean()))
        sizes.append(p.numel())
    if rate_of_change:
        return {"normalized_update_rms": np.sqrt(np.average(found, weights=sizes))}
    return {"rms_t": np.sqrt(np.array(found))}


def clean(task: str, seed: int, steps: int, rate: Rate | None = None) -> Series:
    """Record a training without a fault."""
    return record(Training(TASKS[task], seed, rate), steps)


def faulty(task: str, seed: int, before: int = BEFORE, after: int = AFTER) -> dict[str, Series]:
    """Record a training, and what each fault makes of it from the same step on; by the fault's kind, "before" first.
    Each has its ``target``, the parameter that a fault in a layer is in."""
    training = Training(TASKS[task], seed)
    found = {"before": record(training, before)}
    for number, fault in enumerate(FAULTS):
        fork = training.fork()
        injector = Injector(fault, number, fork, seed)
        found[fault.kind] = record(fork, after, injector, samples=fault.in_sample)
        found[fault.kind]["target"] = np.array(injector.target)
    return found


def joined(before: Mapping[str, NDArray[Any]], after: Mapping[str, NDArray[Any]]) -> Series:
    """Return the series of a training and of what follows as one."""
    fixed = ("places", "levels", "target")
    both = [name for name in before if name in after and name not in fixed]
    found = {name: np.concatenate([before[name], after[name]]) for name in both}
    return found | {name: np.asarray(after[name]) for name in fixed if name in after}
