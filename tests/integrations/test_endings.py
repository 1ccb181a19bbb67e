"""What ends a training, and what the next one in the same folder finds: by each way of attaching lipcore."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from few import few
from torch import Tensor, nn
from torch.nn import functional as nnf

import lipcore
from lipcore.alarms import AlarmEvent, Alarms, AlarmStop

pytestmark = pytest.mark.usefixtures("slow_steps")  # an alarm ends a training before its last step
End = Literal["alarm", "interrupt", "error", "none"]
STEPS, AT = 20, 13
RAISED: dict[End, type[BaseException]] = {"alarm": AlarmStop, "interrupt": KeyboardInterrupt, "error": ValueError}
X = torch.randn(8 * STEPS, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(len(X)) % 3
SIZE = 8


class Classifier(nn.Module):
    """A model that ends the training itself, in its forward pass number AT."""

    def __init__(self, end: End) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.end, self.calls = end, 0

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        self.calls += self.training
        if self.calls == AT and self.end == "interrupt":
            raise KeyboardInterrupt
        if self.calls == AT and self.end == "error":
            raise ValueError("a batch that cannot be read")
        logits = self.net(x)
        if self.calls == AT and self.end == "alarm":
            logits = logits * torch.nan
        return {"logits": logits} | ({} if labels is None else {"loss": nnf.cross_entropy(logits, labels)})


def watching(end: End) -> dict[str, Any]:
    return {"window_steps": 5, "alarms": Alarms(stop=True) if end == "alarm" else "default"}


def loop(model: nn.Module, optimizer: Any, monitor: lipcore.Monitor) -> None:
    for x, y in zip(X.split(SIZE), Y.split(SIZE), strict=True):
        loss = model(x, y)["loss"]
        monitor.log(loss=loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def with_block(run: Path, end: End) -> list[lipcore.Monitor]:
    model = Classifier(end)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made = lipcore.watch(model, optimizer, run=run, metrics=[lipcore.Trajectory()], **watching(end))
    with made as monitor, warnings.catch_warnings():
        loop(model, optimizer, monitor)
    return [made]


def accelerated(run: Path, end: End) -> None:
    from accelerate import Accelerator

    model = Classifier(end)
    both = Accelerator(cpu=True).prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with lipcore.watch(*both, run=run, metrics=[lipcore.Trajectory()], **watching(end)) as monitor:
        loop(*both, monitor)


def transformers_trainer(run: Path, end: End, *, logging_steps: int = 1000, model: Any = None) -> Any:
    import transformers

    settings: dict[str, Any] = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_nan_inf_filter": False}
    settings |= {"num_train_epochs": 1, "per_device_train_batch_size": SIZE, "save_strategy": "no", "max_grad_norm": 0}
    arguments = transformers.TrainingArguments(str(run.parent / "out"), **settings, logging_steps=logging_steps)
    return transformers.Trainer(
        Classifier(end) if model is None else model,
        arguments,
        train_dataset=[{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)],
        callbacks=[lipcore.integrations.HFCallback(run=run, **watching(end))],
    )


TRAINERS: list[Any] = []  # as of a notebook, which has them still


def by_transformers(run: Path, end: End) -> None:
    TRAINERS.append(transformers_trainer(run, end))
    TRAINERS[-1].train()


def by_transformers_in_a_function(run: Path, end: End) -> None:
    gc.collect()  # the Trainer of the last call, which nothing keeps
    transformers_trainer(run, end).train()


def by_lightning(run: Path, end: End) -> None:
    import lightning
    from torch.utils.data import DataLoader, TensorDataset

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Classifier(end)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.net(*batch)["loss"]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    callback = lipcore.integrations.LightningCallback(run=run, **watching(end))
    TRAINERS.append(lightning.Trainer(
        **quiet, accelerator="cpu", max_epochs=1, enable_checkpointing=False, callbacks=[callback]
    ))  # fmt: skip
    TRAINERS[-1].fit(Module(), DataLoader(TensorDataset(X, Y), batch_size=SIZE))


def needs(name: str) -> Any:
    def there() -> bool:
        try:
            __import__(name)
        except ImportError:
            return False
        return True

    return [pytest.mark.ci, pytest.mark.skipif(not there(), reason=f"needs {name} (make test-ci)")]


WAYS: list[Any] = [
    with_block,
    pytest.param(accelerated, marks=needs("accelerate")),
    pytest.param(by_transformers, marks=[*needs("transformers"), *needs("accelerate")]),
    pytest.param(by_transformers_in_a_function, marks=[*needs("transformers"), *needs("accelerate")]),
    pytest.param(by_lightning, marks=needs("lightning")),
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    TRAINERS.clear()
    gc.collect()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("end", few(["alarm", "interrupt", "error", "none"], 1))
def test_the_next_run_in_the_folder_begins(tmp_path: Path, way: Callable[[Path, End], object], end: End) -> None:
    run = tmp_path / "run"
    if end == "none":
        way(run, end)
    else:
        with pytest.raises((RAISED[end], *([SystemExit] if end == "interrupt" else []))):  # Lightning exits
            way(run, end)
    by_its_trainer = way in (by_transformers, by_transformers_in_a_function)
    untold = by_its_trainer and end in ("interrupt", "error")  # it calls nobody
    with lipcore.open_run(run) as first:
        assert first.being_written == untold
        made = first.last_step
        least, most = {"none": (STEPS, STEPS), "alarm": (AT, STEPS - 1)}.get(end, (AT - 1, AT - 1))
        assert untold or least <= made <= most
        assert [event.step for event in first.events if event.kind == "alarm"] == [AT] * (end == "alarm")
        told = [event.text.partition(":")[0] for event in first.events if event.kind == "exception"]
        assert told == ([] if end == "none" or untold else [RAISED[end].__name__])
    way(run, "none")
    with lipcore.open_run(run) as second:
        assert second.series("update_norm", "total").steps.tolist() == list(range(1, STEPS + 1))
        assert second.events == []
        assert not second.being_written
    with lipcore.open_run(run / "rank0-before-1.older") as older:  # of one that nobody told of, it is whole by now
        assert older.last_step == (AT - 1 if untold else made)
        if untold:
            assert [event.text.partition(":")[0] for event in older.events] == ["UntoldEnd"]
            assert older.postmortem() is not None


@pytest.mark.parametrize("end", few(["alarm", "interrupt", "error"], 1))
def test_a_loop_without_a_with_block_is_told_to_close(tmp_path: Path, end: End) -> None:
    def begun(end: End) -> tuple[nn.Module, Any, lipcore.Monitor]:
        model = Classifier(end)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        metrics = [lipcore.Trajectory()]
        return model, optimizer, lipcore.watch(model, optimizer, run=tmp_path, metrics=metrics, **watching(end))

    model, optimizer, monitor = begun(end)
    with pytest.raises(RAISED[end]):
        loop(model, optimizer, monitor)
    if end == "alarm":  # before it is closed, whoever looks at the file finds the step
        with lipcore.open_run(tmp_path) as run:
            assert run.last_step >= AT
            assert [event.step for event in run.events] == [AT]
    with pytest.raises(lipcore.RecordError, match=r"a Monitor of this process writes it already. Call its close\(\)"):
        begun("none")
    monitor.close()  # raises nothing: the alarm has been raised
    loop(*(again := begun("none")))
    again[2].close()
    with lipcore.open_run(tmp_path) as run:
        assert run.last_step == STEPS


@pytest.mark.ci
@pytest.mark.parametrize("end", ["interrupt", "error", "none"])
def test_a_trainer_of_transformers_trains_again(tmp_path: Path, end: End) -> None:
    pytest.importorskip("transformers", reason="needs the extra `hf`")
    pytest.importorskip("accelerate", reason="needs the extra `trainers` (make test-ci)")
    trainer = transformers_trainer(tmp_path / "run", end, logging_steps=5)
    if end == "none":
        trainer.train()
    else:
        with pytest.raises(RAISED[end]):
            trainer.train()
    trainer.train()
    totals = [entry.get("lipcore/trajectory/update_norm.mean/total") for entry in trainer.state.log_history]
    assert len([total for total in totals if total is not None]) == STEPS // 5
    with lipcore.open_run(tmp_path / "run") as run:
        assert run.last_step == STEPS
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in trainer.model.modules()]
    assert not any(hooks)


@pytest.mark.ci
def test_two_trainings_at_once_do_not_take_each_others_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")
    pytest.importorskip("accelerate", reason="needs the extra `trainers` (make test-ci)")
    refused: list[str] = []

    class Inside(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                with pytest.raises(lipcore.RecordError) as error:
                    transformers_trainer(tmp_path / "run", "none").train()
                refused.append(str(error.value))

    trainer = transformers_trainer(tmp_path / "run", "none")
    trainer.add_callback(Inside())
    trainer.train()
    assert "callback.monitor" in refused[0]
    trainer.add_callback(lipcore.integrations.HFCallback(run=tmp_path / "run"))
    with pytest.raises(lipcore.RecordError, match="cannot be written twice"):
        trainer.train()
    with lipcore.open_run(tmp_path / "run") as run:
        assert run.last_step == STEPS


@pytest.mark.ci
def test_a_training_in_another_thread_goes_on_for_as_long_as_it_does(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")
    pytest.importorskip("accelerate", reason="needs the extra `trainers` (make test-ci)")
    inside, go_on = threading.Event(), threading.Event()

    class Waits(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            inside.set()
            assert go_on.wait(60)

    def work() -> None:
        trainer = transformers_trainer(tmp_path / "run", "error")
        trainer.add_callback(Waits())
        with pytest.raises(ValueError, match="a batch that cannot be read"):
            trainer.train()

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(60)
    try:
        with pytest.raises(lipcore.RecordError, match="cannot be written twice"):
            transformers_trainer(tmp_path / "run", "none").train()
    finally:
        go_on.set()
        thread.join()
    transformers_trainer(tmp_path / "run", "none").train()
    with lipcore.open_run(tmp_path / "run") as run:
        assert run.last_step == STEPS


@pytest.mark.ci
def test_no_rank_stops_at_the_end_of_a_step_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Others would wait for it: it stops where all log."""
    pytest.importorskip("transformers", reason="needs the extra `hf`")
    pytest.importorskip("accelerate", reason="needs the extra `trainers` (make test-ci)")
    trainer = transformers_trainer(tmp_path / "run", "none")
    callback = lipcore.integrations.HFCallback(metrics=[lipcore.Trajectory()], alarms=Alarms(stop=True))
    model = Classifier("none")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=model, optimizer=optimizer)
    assert callback.monitor is not None
    callback.monitor._failures.keep(AlarmStop(AlarmEvent(1, "nonfinite", "net", torch.inf, "step 1")))
    with monkeypatch.context() as several:
        several.setattr(callback.monitor._global.partners, "find", object)
        callback.on_step_end(trainer.args, trainer.state, trainer.control)
        with pytest.raises(AlarmStop):
            callback.on_log(trainer.args, trainer.state, trainer.control, logs={"loss": 1.0})
