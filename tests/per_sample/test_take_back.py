"""A proof that fails takes back what came since the last good one: windows, scores and noise scale are those of a run
that never saw it."""

from __future__ import annotations

import copy
import warnings
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from per_sample_models import made, sum_loss
from per_sample_oracle import norms_sq
from torch import Tensor, nn

from lipcore import Monitor, PerSampleGradNorms
from lipcore.metric.results import MetricResult

SIZE = 3
TOOK_BACK = "took back the gradient norms of (?P<count>[0-9]+) samples"


class Turning(nn.Module):
    """Mixes its samples from some pass on."""

    def __init__(self, mixes_from: int) -> None:
        super().__init__()
        self.inner, self.passes, self.mixes_from = nn.Linear(5, 4), 0, mixes_from
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        hidden = self.inner(x).tanh()
        # As many operations in every pass: of others the next proof does not wait for its turn.
        share = 1.0 if self.passes >= self.mixes_from else 0.0
        y: Tensor = self.head(hidden + share * hidden.flip(0))
        return y


def x(number: int, size: int = SIZE) -> Tensor:
    return torch.randn(size, 5, generator=torch.Generator().manual_seed(number))


def exact(model: nn.Module, inputs: Tensor) -> Tensor:
    squares = norms_sq(model, [(row,) for row in inputs.split(1)], sum_loss)
    return torch.stack(list(squares.values())).sum(0).sqrt()


def turning(mixes_from: int) -> Turning:
    return made(lambda: Turning(mixes_from))


def all_numbers(result: MetricResult) -> list[float]:
    return [v.value for quantity in result.values() for place in quantity.values() for v in place.values()]


def backward(model: nn.Module, number: int) -> None:
    model.zero_grad()
    sum_loss(model(x(number))).backward()


@pytest.mark.filterwarnings("ignore:lipcore stopped recording")
@pytest.mark.parametrize("skip", [False, True], ids=["error", "skip"])
@pytest.mark.parametrize("mixes_from", [40, 70])
def test_passes_since_the_last_good_proof_leave_the_window(mixes_from: int, skip: bool) -> None:
    model, last_good = turning(mixes_from), 1 if mixes_from == 40 else 64
    fails_at = 64 if mixes_from == 40 else 128
    metric = PerSampleGradNorms(model, loss_reduction="sum", on_unsupported="skip" if skip else "error")
    expected: list[Tensor] = []
    for number in range(1, fails_at):
        expected.append(exact(turning(10**6), x(number)))
        metric.set_ids(torch.arange(SIZE) + 10 * number)
        backward(model, number)
    with pytest.warns(UserWarning, match=TOOK_BACK) as warned:
        model(x(fails_at))  # in skip mode its own backward pass is recorded, and labelled heuristic
    (said,) = [str(w.message) for w in warned if "took back" in str(w.message)]
    assert f"of {SIZE * (fails_at - 1 - last_good)} samples" in said
    right = torch.stack(expected[:last_good]).flatten()
    total = metric.finalize().norm["total_of_measured"]
    assert total.mean.count == len(right)
    assert total.mean.value == pytest.approx(float(right.mean()), rel=1e-5)
    assert total.max.value == pytest.approx(float(right.max()), rel=1e-5)
    assert total.min.value == pytest.approx(float(right.min()), rel=1e-5)
    assert sum(metric.finalize().details["taken_back"].values()) == SIZE * (fails_at - 1 - last_good)
    ids = [10 * number + i for number in range(1, last_good + 1) for i in range(SIZE)]
    found = metric.scores.to_numpy()
    kept = found["ids"] < 10 * (last_good + 1)
    assert found["ids"][kept].tolist() == ids
    assert len(metric.scores) == len(ids)
    assert found["mean"] == pytest.approx(right.numpy(), rel=1e-5)
    with suppress(ValueError):
        metric.close()


@pytest.mark.filterwarnings("ignore:lipcore stopped recording", "ignore:lipcore took back")
def test_a_monitor_is_as_if_it_had_stopped_at_the_last_good_proof() -> None:
    """Bit for bit, the noise scale too; windows that closed since then are NaN, those before are not."""

    def run(steps: int, mixes_from: int) -> tuple[Monitor, PerSampleGradNorms]:
        model = turning(mixes_from)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        metric = PerSampleGradNorms(loss_reduction="sum")
        monitor = Monitor(model, optimizer, metrics=[metric], window_steps=20)
        for number in range(1, steps + 1):
            backward(model, number)
            optimizer.step()
        with suppress(ValueError):
            monitor.close()
        return monitor, metric

    (monitor, metric), (before, _) = run(128, 100), run(64, 10**6)
    name = metric.name
    assert [window.first_step for window in monitor.history] == [1, 21, 41, 61, 81, 101]
    for window, expected in zip(list(monitor.history)[:3], before.history, strict=True):
        assert window[name].flat() == pytest.approx(expected[name].flat(), rel=0, abs=0, nan_ok=True)
    for window in list(monitor.history)[3:]:
        assert np.isnan(all_numbers(window[name])).all()
        assert "a later proof failed" in window[name].norm["total"].mean.note
        assert not window[name].norm["total"].mean.valid
        assert "a later proof failed" in window[name].details["withdrawn"]
    assert metric.finalize().norm["total_of_measured"].mean.count == 0
    averages = [m._window.noise.state_dict()["ema"] for m in (metric, before.metrics[name])]
    assert torch.equal(*averages)


@pytest.mark.filterwarnings("ignore:lipcore stopped recording")
def test_a_sliding_window_keeps_what_is_proved() -> None:
    model = turning(100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    metric = PerSampleGradNorms(loss_reduction="sum")
    monitor = Monitor(model, optimizer, metrics=[metric], window_steps=100, window_blocks=10)
    for number in range(1, 128):
        backward(model, number)
        optimizer.step()
    with pytest.warns(UserWarning, match=f"of {63 * SIZE} samples"):
        backward(model, 128)
    right = torch.cat([exact(turning(10**6), x(number)) for number in range(31, 65)])
    total = metric.finalize().norm["total_of_measured"]
    assert total.mean.count == len(right)  # the window began in step 31
    assert total.mean.value == pytest.approx(float(right.mean()), rel=1e-5)
    with pytest.raises(ValueError, match="model: "):
        monitor.close()


def test_micro_batches_of_the_open_step_are_taken_back_too() -> None:
    model = turning(60)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    metric = PerSampleGradNorms(loss_reduction="sum", on_unsupported="skip")
    with Monitor(model, optimizer, metrics=[metric]):
        for number in range(1, 64):
            sum_loss(model(x(number))).backward()
            if number % 5 == 0:
                optimizer.step()
                optimizer.zero_grad()
        with pytest.warns(UserWarning, match=TOOK_BACK):
            sum_loss(model(x(64))).backward()
        assert metric.finalize().norm["total_of_measured"].mean.count in (0, SIZE, 5 * SIZE)
        assert not metric._window.open_step or metric._window.open_step.samples == SIZE


# ---- batches of one that are served from the gradients


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Linear(3, 1))


def served_step(model: nn.Module, number: int, penalty: bool) -> None:
    model.zero_grad()
    loss = sum_loss(model(x(number, 1)))
    if penalty:  # on a weight in the middle, which the gradient of the last bias does not show
        loss = loss + 0.3 * model[2].weight.square().sum()
    loss.backward()


@pytest.mark.parametrize("way", ["alone", "alone, ids", "monitor"])
def test_served_passes_since_the_last_good_proof_are_taken_back(way: str) -> None:
    model = made(chain)
    metric = PerSampleGradNorms(None if way == "monitor" else model, loss_reduction="sum", batch_of_one="fast")
    monitor = Monitor(model, metrics=[metric], window_steps=None) if way == "monitor" else None
    expected: list[float] = []
    said: list[str] = []
    proofs: list[int] = []  # passes that are tapped
    early: Any = None
    for number in range(400):
        serving = metric._capture.single._core if metric._capture is not None else None
        expected.append(float(exact(copy.deepcopy(model), x(number, 1))))
        if way == "alone, ids":
            metric.set_ids([number])
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            served_step(model, number, penalty=number >= 150)
            if monitor is not None:
                monitor.step()
        if serving is not None and metric._capture.single._core is not serving:  # type: ignore[union-attr]
            proofs.append(number)
        said += [str(w.message) for w in warned if "took back" in str(w.message)]
        if said:
            break
        if number == 160:
            early = metric.compute() if monitor is None else monitor.compute()[metric.name]  # type: ignore[index]
    failed_at = number
    last_good = [proof for proof in proofs if proof < 150][-1]
    assert failed_at == next(proof for proof in proofs if proof >= 150)
    (message,) = said
    assert f"of {failed_at - last_good - 1} samples" in message
    right = [*expected[: last_good + 1], expected[failed_at]]
    total = (metric.compute() if monitor is None else monitor.compute()[metric.name]).norm["total"]  # type: ignore[index]
    assert total.mean.count == len(right)
    assert total.mean.value == pytest.approx(sum(right) / len(right), rel=1e-5)
    assert total.max.value == pytest.approx(max(right), rel=1e-5)
    assert np.isnan(all_numbers(early)).all()
    if way == "alone, ids":
        assert metric.scores.to_numpy()["ids"].tolist() == [*range(last_good + 1), failed_at]
        assert metric.scores.to_numpy()["mean"] == pytest.approx(np.array(right), rel=1e-5)
    (monitor or metric).close()
