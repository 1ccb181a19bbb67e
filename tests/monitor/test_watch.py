"""watch(): a Monitor whose windows, steps and logged numbers are in the record of the run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from states import opened, sealed
from torch import Tensor, nn

import lipcore
from lipcore.monitor import defaults
from lipcore.trajectory.step_stream import StepArrays


def parts() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def batch(step: int) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(step))


def train(
    monitor: lipcore.Monitor, model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, *, after: bool = False
) -> list[float]:
    losses = []
    for step in steps:
        loss = model(batch(step)).square().mean()
        if not after:
            monitor.log(loss=loss, lr=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if after:
            monitor.log(loss=loss, lr=0.1)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("after", [False, True])
def test_all_of_it_is_in_the_record(tmp_path: Path, after: bool) -> None:
    model, optimizer = parts()
    seen: list[np.ndarray] = []
    metrics = [
        lipcore.Trajectory(on_step=lambda first, arrays: seen.append(arrays["update_norm"])),
        lipcore.Lipschitz(),
    ]
    with lipcore.watch(
        model,
        optimizer,
        run=tmp_path / "a",
        metrics=metrics,
        window_steps=10,
        record_level="tensor",
        config={"lr": 0.1},
    ) as monitor:
        losses = train(monitor, model, optimizer, range(130), after=after)
        kept = list(monitor.history)
    with lipcore.open_run(tmp_path / "a") as run:
        assert run.config["lr"] == 0.1
        assert run.config["model"] == "Sequential"
        assert [window.to_dict() for window in run.windows] == [window.to_dict() for window in kept]
        series = run.series("loss")
        assert series.steps.tolist() == list(range(1, 131))
        assert np.allclose(series["total"], losses, rtol=1e-6)
        assert np.allclose(run.series("update_norm").values, np.concatenate(seen), rtol=1e-6, atol=1e-30)
        assert run.series("update_norm", "0.*").places == ["0.weight", "0.bias"]
        assert len(run.series("local_lipschitz.max")) == 13


def test_windows_have_what_was_logged() -> None:
    model, optimizer = parts()
    with lipcore.Monitor(model, optimizer, window_steps=5) as monitor:
        losses = train(monitor, model, optimizer, range(10))
        for window, part in zip(monitor.history, (losses[:5], losses[5:]), strict=True):
            loss = window["logged"].loss["total"]
            assert loss.mean.value == pytest.approx(np.mean(part))
            assert loss.max.value == pytest.approx(max(part))
            assert loss.last.value == pytest.approx(part[-1])
            assert loss.mean.count == 5
        assert "logged" not in monitor.close_window() if monitor.close_window() else True


def test_what_is_logged_may_change_later_and_be_nan() -> None:
    model, optimizer = parts()
    with lipcore.Monitor(model, optimizer, [lipcore.Trajectory()], window_steps=None) as monitor:
        for value in (1.0, float("nan"), 3.0):
            loss = torch.tensor(value)
            monitor.log(loss=loss)
            loss += 100
            monitor.step()
        found = monitor.close_window()["logged"].loss["total"]
    assert (found.mean.value, found.mean.count, found.last.value) == (2.0, 2, 3.0)
    assert found.mean.note == "1 that are not finite are left out"


def test_what_is_logged_now_and_then_stands_at_its_steps(tmp_path: Path) -> None:
    model, _ = parts()
    with lipcore.watch(model, metrics=[lipcore.Trajectory()], run=tmp_path / "a", window_steps=None) as monitor:
        for step in range(1, 21):
            monitor.log(loss=float(step)) if step % 5 else monitor.log(loss=float("nan"), accuracy=step / 20)
            monitor.step()
    run = lipcore.open_run(tmp_path / "a")
    assert run.series("accuracy").steps.tolist() == [5, 10, 15, 20]
    assert run.series("loss").steps.tolist() == list(range(1, 21))
    assert np.isnan(run.series("loss")["total"]).sum() == 4


def test_names_that_a_metric_has_too_are_kept_apart(tmp_path: Path) -> None:
    model, optimizer = parts()
    with lipcore.watch(model, optimizer, run=tmp_path / "a", window_steps=10) as monitor:
        for step in range(20):
            monitor.log(update_norm=100.0, grad_norm=float("nan"), only=float("nan"))
            model(batch(step)).square().mean().backward()
            optimizer.step()
    run = lipcore.open_run(tmp_path / "a")
    with pytest.raises(ValueError, match="several metrics have 'update_norm'; choose logged/"):
        run.series("update_norm")
    assert (run.series("logged/update_norm").values == 100).all()
    assert (run.series("trajectory/update_norm").values != 100).all()
    assert np.isnan(run.series("only").values).all()
    assert {"only", "logged/update_norm", "trajectory/update_norm", "weight_norm"} <= set(run.quantities)


def test_what_was_logged_in_an_open_window_is_in_the_state(tmp_path: Path) -> None:
    means = []
    for stops in (False, True):
        model, optimizer = parts()
        monitor = lipcore.Monitor(model, optimizer, window_steps=10)
        for step in range(20):
            if step == 15 and stops:
                state = torch.load(_saved(monitor.state_dict(), tmp_path), weights_only=True)
                monitor.close()
                monitor = lipcore.Monitor(model, optimizer, window_steps=10)
                monitor.load_state_dict(state)
            monitor.log(loss=float(step))
            model(batch(step)).square().mean().backward()
            optimizer.step()
        means.append(monitor.history[-1]["logged"].loss["total"].mean)
        monitor.close()
    assert means[0] == means[1]
    assert (means[0].value, means[0].count, means[0].note) == (14.5, 10, "")


def test_numbers_of_other_steps_than_the_windows_say_so() -> None:
    model, optimizer = parts()
    with lipcore.Monitor(model, optimizer, window_steps=5) as monitor:
        train(monitor, model, optimizer, range(10), after=True)
    first, second = (window["logged"].loss["total"].mean for window in monitor.history)
    assert first.note == "logged at steps 1 to 4; log before optimizer.step() for those of the window"
    assert second.note.startswith("logged at steps 5 to 9;")


def test_a_state_whose_logged_numbers_are_none() -> None:
    model, optimizer = parts()
    monitor = lipcore.Monitor(model, optimizer)
    state = monitor.state_dict()
    one = torch.ones(1, dtype=torch.float64)
    for bad, message in (
        (None, "logged: expected a dict, got NoneType"),
        ({"steps": [-1], "names": ["x"], "numbers": one}, "logged.steps: expected a list of counts"),
        ({"steps": [1], "names": [], "numbers": one}, "logged.names: expected a list of as many names"),
        ({"steps": [1], "names": ["x"], "numbers": one.float()}, "logged.numbers: expected torch.float64"),
        ({"steps": [], "names": [], "numbers": one}, "logged.numbers: expected 0 of them, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            monitor.load_state_dict(sealed(opened(state) | {"logged": bad}))
    monitor.close()


def test_micro_batches_of_a_step_are_averaged(tmp_path: Path) -> None:
    model, optimizer = parts()
    with lipcore.watch(model, optimizer, run=tmp_path / "a", window_steps=None) as monitor:
        for step in range(3):
            for part in range(2):
                loss = model(batch(step)).mean() * 0 + 10 * step + part
                monitor.log(loss=loss)
                loss.backward()
            optimizer.step()
    assert lipcore.open_run(tmp_path / "a").series("loss")["total"].tolist() == [0.5, 10.5, 20.5]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"lr": "0.1"}, TypeError, "lr: expected a tensor with one number, got str"),
        ({"loss": True}, TypeError, "loss: expected a tensor with one number, got bool"),
        ({"tokens": torch.ones(3)}, ValueError, r"tokens: expected a tensor with one number, got one of shape \[3\]"),
        ({"x": torch.tensor(1j)}, TypeError, "x: .*complex"),
    ],
)
def test_what_cannot_be_logged(given: dict[str, Any], error: type[Exception], message: str) -> None:
    model, optimizer = parts()
    with lipcore.Monitor(model, optimizer) as monitor, pytest.raises(error, match=message):
        monitor.log(**given)


def test_resuming_makes_one_clean_history(tmp_path: Path) -> None:
    """Ended at step 37, gone on from the checkpoint of step 25: as if it had never been stopped."""
    for name, stops in (("whole", []), ("stopped", [37])):
        model, optimizer = parts()
        monitor = lipcore.watch(model, optimizer, run=tmp_path / name, window_steps=10)
        state: dict[str, Any] = {}
        begin = 0
        for end in [*stops, 60]:
            for step in range(begin, end):
                train(monitor, model, optimizer, range(step, step + 1))
                if step + 1 == 25:
                    state = {"m": model.state_dict(), "o": optimizer.state_dict(), "l": monitor.state_dict()}
                    state = torch.load(_saved(state, tmp_path), weights_only=True)
            monitor.close()
            if end == 60:
                break
            model, optimizer = parts()
            model.load_state_dict(state["m"])
            optimizer.load_state_dict(state["o"])
            monitor = lipcore.watch(model, optimizer, run=tmp_path / name, window_steps=10)
            monitor.load_state_dict(state["l"])
            begin = 25
    whole, stopped = (lipcore.open_run(tmp_path / name) for name in ("whole", "stopped"))
    assert [(start.kind, start.step) for start in stopped.starts] == [("start", 0), ("rewind", 25)]
    for name in ("update_norm", "weight_norm", "loss", "update_norm.mean", "path_length.cumulative"):
        mine, other = whole.series(name), stopped.series(name)
        assert mine.steps.tolist() == other.steps.tolist()
        assert mine.places == other.places
        assert np.array_equal(mine.values, other.values, equal_nan=True)


def _saved(state: Any, tmp_path: Path) -> Path:
    torch.save(state, tmp_path / "checkpoint.pt")
    return tmp_path / "checkpoint.pt"


def test_a_run_that_forgot_to_go_on_is_told(tmp_path: Path) -> None:
    for again in (False, True):
        model, optimizer = parts()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with lipcore.watch(model, optimizer, run=tmp_path / "a", window_steps=10) as monitor:
                train(monitor, model, optimizer, range(20))
        messages = [str(one.message) for one in told if "record of an older run" in str(one.message)]
        assert len(messages) == again
        assert all("rank0-before-1.older" in message for message in messages)
    assert lipcore.open_run(tmp_path / "a" / "rank0-before-1.older").last_step == 20


def test_a_state_that_is_loaded_in_mid_run(tmp_path: Path) -> None:
    model, optimizer = parts()
    with lipcore.watch(model, optimizer, run=tmp_path / "a", window_steps=10) as monitor:
        train(monitor, model, optimizer, range(15))
        state = monitor.state_dict()
        train(monitor, model, optimizer, range(15, 40))
        monitor.load_state_dict(state)
        train(monitor, model, optimizer, range(15, 20))
    with lipcore.open_run(tmp_path / "a") as run:
        assert [(start.kind, start.step) for start in run.starts] == [("start", 0), ("rewind", 15)]
        for name in ("update_norm", "loss"):
            assert run.series(name).steps.tolist() == list(range(1, 21))


def test_a_checkpoint_and_the_record_end_at_the_same_step(tmp_path: Path) -> None:
    model, optimizer = parts()
    monitor = lipcore.watch(model, optimizer, run=tmp_path / "a", window_steps=10)
    train(monitor, model, optimizer, range(17))
    monitor.state_dict()
    with lipcore.open_run(tmp_path / "a") as run:
        assert run.series("update_norm").steps[-1] == run.series("loss").steps[-1] == 17
    monitor.close()


def test_without_a_run_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, optimizer = parts()
    with lipcore.watch(model, optimizer, window_steps=5) as monitor:
        train(monitor, model, optimizer, range(5))
        assert len(monitor.history) == 1
    assert not list(tmp_path.iterdir())


def test_a_record_that_cannot_be_written_stops_no_training(tmp_path: Path) -> None:
    model, optimizer = parts()
    with pytest.warns(RuntimeWarning, match="the run is no longer recorded, and the training goes on: .*full"):
        with lipcore.watch(model, optimizer, run=tmp_path / "a", window_steps=10) as monitor:
            train(monitor, model, optimizer, range(20))
            monitor.state_dict()
            recorder = monitor._listeners[-1]
            recorder.record._connection.execute("pragma max_page_count = 1")  # type: ignore[attr-defined]
            train(monitor, model, optimizer, range(20, 400))
    assert len(monitor.history) == 40
    assert lipcore.open_run(tmp_path / "a").last_step >= 20


def test_what_is_wrong_is_said_before_the_first_step(tmp_path: Path) -> None:
    model, optimizer = parts()
    for bad, error in (
        ({"run": 3}, TypeError),
        ({"run": tmp_path / "a", "config": 3}, TypeError),
        ({"run": tmp_path / "a", "record_level": "x"}, ValueError),
        ({"run": tmp_path / "a", "window_steps": 0}, ValueError),
    ):
        with pytest.raises(error):
            lipcore.watch(model, optimizer, **bad)
    assert not (tmp_path / "a").exists()
    other = nn.Linear(2, 2)
    with lipcore.watch(model, optimizer, run=tmp_path / "a") as monitor:
        train(monitor, model, optimizer, range(3))
    with pytest.raises(lipcore.RecordError, match="is the record of another model"):
        lipcore.watch(other, torch.optim.SGD(other.parameters(), lr=0.1), run=tmp_path / "a")
    assert not other._forward_hooks


def test_training_stays_bit_for_bit_the_same(tmp_path: Path) -> None:
    weights = []
    for watched in (False, True):
        model, optimizer = parts()
        if watched:
            with lipcore.watch(model, optimizer, run=tmp_path / "a") as monitor:
                train(monitor, model, optimizer, range(20))
        else:
            train(lipcore.Monitor(nn.Linear(1, 1)), model, optimizer, range(20))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_a_callback_of_the_users_that_raises_ends_no_record(tmp_path: Path) -> None:
    def raises(first: int, arrays: StepArrays) -> None:
        raise KeyError("mine")

    model, optimizer = parts()
    metrics = [lipcore.Trajectory(on_step=raises)]
    monitor = lipcore.watch(model, optimizer, run=tmp_path / "a", metrics=metrics, window_steps=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(200):
            model(batch(step)).square().mean().backward()
            optimizer.step()  # without zero_grad(): the last steps are not finite
        with pytest.raises(KeyError, match="mine"):
            monitor.close()
    assert lipcore.open_run(tmp_path / "a").series("update_norm").steps.tolist() == list(range(1, 201))


@pytest.mark.parametrize("made", [lipcore.watch, lipcore.Monitor])
def test_copies_of_large_models_are_not_taken(monkeypatch: pytest.MonkeyPatch, made: Any) -> None:
    assert _mode_of(made, *parts()) == "exact"
    monkeypatch.setattr(defaults, "_SMALL", 0)
    assert _mode_of(made, *parts()) == "updates"
    model = nn.Linear(4, 1)
    with made(model, window_steps=1) as monitor:  # whose steps are counted by hand
        monitor.step()
    assert monitor.history[-1]["trajectory"].details["mode"] == "exact"


def _mode_of(made: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    with made(model, optimizer, window_steps=5) as monitor:
        train(monitor, model, optimizer, range(5))
        mode: str = monitor.history[-1]["trajectory"].details["mode"]
    return mode
