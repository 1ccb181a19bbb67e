"""Writers: what experiment loggers get of a run, and that none of them stops a training."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from windows_of import window_of

import lipcore
from lipcore.recording.numbers_of import numbers_of


def trained(writers: list[Any], steps: int = 20, **options: Any) -> lipcore.Monitor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lipcore.watch(model, optimizer, writers=writers, window_steps=5, **options) as monitor:
        for _ in range(steps):
            loss = model(torch.randn(6, 4)).square().mean()
            monitor.log(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return monitor


def expected(monitor: lipcore.Monitor) -> dict[int, dict[str, float]]:
    return {window.last_step: numbers_of(window) for window in monitor.history}


def test_numbers_are_finite_valid_and_of_groups() -> None:
    found = numbers_of(window_of(3))
    assert found == {
        "lipcore/one/norm.mean/a": 3.125,
        "lipcore/one/norm.mean/b": 3.25,
        "lipcore/one/norm.mean/total": 3.375,
        **{f"lipcore/two/norm.max/{place}": 2.0 for place in ("a", "b", "total")},
    }


def test_a_function_gets_every_window() -> None:
    got: dict[int, dict[str, float]] = {}
    monitor = trained([lambda numbers, step: got.__setitem__(step, dict(numbers))])
    assert got == expected(monitor)
    assert "lipcore/logged/loss.mean/total" in got[5]
    assert "lipcore/trajectory/update_norm.max/0" in got[5]
    assert not any("weight" in name.rpartition("/")[2] for name in got[5])


def test_steps_are_counted_as_the_loop_counts() -> None:
    steps: list[int] = []
    trained([lambda numbers, step: steps.append(step)], first_step=0)
    assert steps == [4, 9, 14, 19]


def test_one_that_fails_is_given_up() -> None:
    calls, got = [], []

    def fails(numbers: Mapping[str, float], step: int) -> None:
        calls.append(step)
        raise ConnectionError("no network")

    with pytest.warns(RuntimeWarning, match="the writer 'fails' gets no more numbers, and the training goes on: Conn"):
        monitor = trained([fails, lambda numbers, step: got.append(step)])
    assert calls == [5]
    assert got == [5, 10, 15, 20]
    assert len(monitor.history) == 4


def test_one_that_cannot_be_closed_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    class Summary:
        def add_scalar(self, name: str, number: float, step: int) -> None:
            pass

        def flush(self) -> None:
            raise OSError("no space left")

    start = time.perf_counter()
    with pytest.warns(RuntimeWarning, match="the writer 'Summary' gets no more numbers.*OSError: no space left"):
        trained([Summary()], steps=5)
    assert time.perf_counter() - start < 30


@pytest.mark.ci
def test_one_is_closed_when_the_process_ends(tmp_path: Path) -> None:
    code = """
import sys, time, torch, lipcore

class Summary:
    def __init__(self):
        self.got = []
    def add_scalar(self, name, number, step):
        if name.endswith("update_norm.max/total"):
            time.sleep(0.2)
            self.got.append(step)
    def flush(self):
        print(*self.got)

model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
monitor = lipcore.watch(model, optimizer, writers=[Summary()], window_steps=1)
for _ in range(5):
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
raise ValueError("the loop")
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout.split() == ["1", "2", "3", "4", "5"], found.stderr


@pytest.mark.ci
def test_one_that_is_slow_makes_nobody_wait() -> None:
    release = threading.Event()

    def slow(numbers: Mapping[str, float], step: int) -> None:
        release.wait(30)

    start = time.perf_counter()
    threading.Timer(8.0, release.set).start()
    with pytest.warns(RuntimeWarning, match="the writer 'slow' gets no more numbers.*64 windows behind"):
        monitor = trained([slow], steps=5 * 80)
    assert len(monitor.history) == 80
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize(
    ("writers", "error", "message"),
    [
        ("tensorboard", TypeError, "writers: expected a list of names or functions, got 'tensorboard'"),
        (["board"], ValueError, "writers: expected one of tensorboard, wandb, mlflow, trackio, got 'board'"),
        ([3], TypeError, "writers: expected a name or a function of"),
        (["tensorboard"], ValueError, "'tensorboard' needs run="),
    ],
)
def test_what_is_no_writer(writers: Any, error: type[Exception], message: str) -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(error, match=message):
        lipcore.watch(model, torch.optim.SGD(model.parameters(), lr=0.1), writers=writers)
    assert not model._forward_hooks


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_library_that_is_missing_is_named(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (name, "torch.utils.tensorboard", f"{name}.entities", "trackio.context_vars"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ImportError, match=rf"writers: '{name}' needs its library; pip install 'lipcore\[{name}\]'"):
        trained([name], run=tmp_path / "a")


# ---- with the real libraries


def scalars_of(folder: Path) -> dict[int, dict[str, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    found: dict[int, dict[str, float]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found.setdefault(event.step, {})[name] = event.value
    return found


def same(found: Mapping[int, Mapping[str, float]], monitor: lipcore.Monitor) -> None:
    wanted = expected(monitor)
    assert found.keys() == wanted.keys()
    for step, numbers in wanted.items():
        assert found[step] == pytest.approx(numbers, rel=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard(tmp_path: Path) -> None:
    monitor = trained(["tensorboard"], run=tmp_path / "a")
    same(scalars_of(tmp_path / "a"), monitor)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_writer_of_tensorboards_own(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        monitor = trained([writer])
    same(scalars_of(tmp_path), monitor)


@pytest.mark.ci
def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="needs the extra `trainers` (make test-ci)")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(RuntimeError, match=r"call wandb.init\(\) before"):
        trained(["wandb"])
    with wandb.init(mode="offline", dir=tmp_path, project="lipcore") as run:
        seen: dict[int, dict[str, float]] = {}
        log = run.log

        def spied(numbers: dict[str, float], **keywords: Any) -> None:
            seen[int(numbers["lipcore/step"])] = {k: v for k, v in numbers.items() if k != "lipcore/step"}
            log(numbers, **keywords)

        monkeypatch.setattr(run, "log", spied)
        run.log({"mine": 1, "lipcore/step": 0}, step=1000)  # a step of the loop's own, beyond lipcore's
        seen.clear()
        monitor = trained(["wandb"])
    same(seen, monitor)


@pytest.mark.ci
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow", reason="needs the extra `trainers` (make test-ci)")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    try:
        with pytest.raises(RuntimeError, match=r"call mlflow.start_run\(\) before"):
            trained(["mlflow"])
        with mlflow.start_run() as run:
            monitor = trained(["mlflow"])
        client = mlflow.MlflowClient()
        found: dict[int, dict[str, float]] = {}
        for name in client.get_run(run.info.run_id).data.metrics:
            for metric in client.get_metric_history(run.info.run_id, name):
                found.setdefault(metric.step, {})[name] = metric.value
    finally:
        mlflow.set_tracking_uri(before)
    colons = {step: {k.replace("_", ":"): v for k, v in numbers.items()} for step, numbers in found.items()}
    wanted = {step: {k.replace("_", ":"): v for k, v in n.items()} for step, n in expected(monitor).items()}
    assert colons.keys() == wanted.keys()
    for step, numbers in wanted.items():
        assert colons[step] == pytest.approx(numbers)


@pytest.mark.ci
def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio", reason="needs the extra `trackio`, with pillow < 13 (make test-trackio)")
    from trackio import context_vars

    with pytest.raises(RuntimeError, match=r"call trackio.init\(\) before"):
        trained(["trackio"])
    run: Callable[..., Any] = trackio.init(project="lipcore", embed=False)
    seen: dict[int, dict[str, float]] = {}
    current = context_vars.current_run.get()
    log = current.log
    monkeypatch.setattr(current, "log", lambda n, step: (seen.__setitem__(step, dict(n)), log(n, step=step)))
    try:
        monitor = trained(["trackio"])
    finally:
        trackio.finish()
    assert run is not None
    same(seen, monitor)
