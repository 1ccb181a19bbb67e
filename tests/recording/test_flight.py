"""The flight recorder: what is kept of the last steps and around alarms, and what is left when a process ends."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lipcore
from lipcore.recording import RecordError, RunRecord, open_run
from lipcore.recording.batches import AROUND, AROUND_SAMPLES, KEPT, Batch

NAMES, LEVELS = ["a.weight", "a.bias", "a", "total"], ["tensor", "tensor", "group", "total"]


def batch_of(step: int, size: int = 3) -> Batch:
    ids = np.arange(size, dtype=np.int64) + 10 * step
    return Batch(step, ids, ids.astype(np.float32) / 2, None, b"state" if step % 2 else None)


def write(record: RunRecord, steps: range, size: int = 3) -> None:
    for first in range(steps.start, steps.stop, 64):
        own = range(first, min(first + 64, steps.stop))
        values = np.arange(own.start, own.stop)[:, None] + np.arange(len(NAMES)) / 8
        arrays = {"flight/tensor_update_norm": values}
        record.add_steps(first, {"trajectory/update_norm": values}, NAMES, LEVELS)  # type: ignore[arg-type]
        record.add_details(first, arrays, NAMES, LEVELS)  # type: ignore[arg-type]
        record.add_batches([batch_of(step, size) for step in own])


def test_the_last_steps_are_kept_and_those_around_an_alarm(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "a")
    record.begin(0)
    write(record, range(1, 705))
    record.add_event(700, "alarm", "alarm in step 700", {})
    write(record, range(705, 3001))
    record.close()
    with open_run(tmp_path / "a") as run:
        assert run.series("update_norm").steps.tolist() == list(range(1, 3001))  # of groups all of them
        steps = run.series("tensor_update_norm").steps
        before, after = AROUND
        wanted = {*range(700 - before, 701 + after), *range(3001 - KEPT, 3001)}
        assert wanted <= set(steps.tolist())
        assert len(steps) <= len(wanted) + 4 * 64  # whole blocks
        assert run.series("tensor_update_norm", "a.bias").values[-1] == 3000 + 1 / 8
        found = {batch.step: batch for batch in run.batches()}
        before, after = AROUND_SAMPLES
        assert sorted(found) == [*range(700 - before, 701 + after), *range(3001 - KEPT, 3001)]
        assert found[700].ids.tolist() == [7000, 7001, 7002]  # type: ignore[union-attr]
        assert found[700].norms.tolist() == [3500.0, 3500.5, 3501.0]  # type: ignore[union-attr]
        assert found[700].losses is None
        assert [found[step].rng_state for step in (699, 700)] == [b"state", None]
        assert [batch.step for batch in run.batches(2995, 2997)] == [2995, 2996, 2997]


def test_of_large_batches_and_models_less_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lipcore.recording.batches._BYTES", 1 << 20)
    record = RunRecord(tmp_path / "a", max_bytes=1 << 20)
    record.begin(0)
    record.add_batches([batch_of(step, 9000) for step in range(1, 41)])
    names = [f"{i}.weight" for i in range(100)]
    record.add_details(1, {"flight/tensor_update_norm": np.ones((9, 100))}, names, ["tensor"] * 100)
    record.close()
    with open_run(tmp_path / "a") as run:
        assert len(run.batches()) == (1 << 20) // (12 * 9000 + 5)
        assert run.step_quantities == []


def test_a_record_of_every_parameter_has_no_details_of_its_own(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "a", level="tensor")
    record.begin(0)
    write(record, range(1, 65))
    record.close()
    with open_run(tmp_path / "a") as run:
        assert run.step_quantities == ["trajectory/update_norm"]


def test_a_rewind_forgets_later_samples_and_an_older_file_gets_the_table(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "a")
    record.begin(0)
    write(record, range(1, 101))
    record.begin(50)
    record.close()
    with open_run(tmp_path / "a") as run:
        assert [batch.step for batch in run.batches()] == list(range(1, 51))
        assert run.series("tensor_update_norm").steps.tolist() == list(range(1, 51))
        path = run.path
    file = sqlite3.connect(path)
    file.execute("drop table batches")
    file.commit()
    file.close()
    with open_run(tmp_path / "a") as run:
        assert run.batches() == []
    record = RunRecord(tmp_path / "a")
    record.begin(50)
    write(record, range(51, 61))
    record.close()
    assert not record.failed
    with open_run(tmp_path / "a") as run:
        assert [batch.step for batch in run.batches()] == list(range(51, 61))


# ---- of a Monitor


def parts() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    groups = [{"params": model[0].parameters()}, {"params": [model[2].weight, model[2].bias], "lr": 0.2}]
    return model, torch.optim.SGD(groups, lr=0.1)


def test_a_monitor_records_samples_rates_and_generators(tmp_path: Path) -> None:
    model, optimizer = parts()
    norms = lipcore.PerSampleGradNorms(loss_reduction="mean", noise_scale=False)
    seen: dict[int, list[Any]] = {}
    with lipcore.watch(model, optimizer, metrics=[lipcore.Trajectory(), norms], run=tmp_path / "a") as monitor:
        for step in range(1, 8):
            for micro in range(1 + (step == 3)):  # two micro-batches in one step
                state = torch.get_rng_state()
                x = torch.randn(4, 3)
                each = model(x)[:, 0].square()
                monitor.log_batch(100 * step + 10 * micro + np.arange(4), losses=each, rng_state=state)
                each.mean().backward()
                seen.setdefault(step, []).append((norms.per_sample, each.detach(), state))
            optimizer.param_groups[1]["lr"] = 0.5 if step == 5 else 0.2
            optimizer.step()
            optimizer.zero_grad()
    with open_run(tmp_path / "a") as run:
        batches = run.batches()
        assert [batch.step for batch in batches] == list(range(1, 8))
        for batch in batches:
            each = seen[batch.step]
            assert batch.ids.tolist() == [100 * batch.step + 10 * m + i for m in range(len(each)) for i in range(4)]  # type: ignore[union-attr]
            assert np.allclose(batch.norms, torch.cat([one[0] for one in each]), rtol=1e-6)  # type: ignore[arg-type]
            assert np.allclose(batch.losses, torch.cat([one[1] for one in each]), rtol=1e-6)  # type: ignore[arg-type]
            assert batch.rng_state == each[0][2].numpy().tobytes()
        rates = run.series("group_lr")
        assert rates.places == ["param_groups[0]: 0.weight to 0.bias", "param_groups[1]: 2.weight to 2.bias"]
        assert np.allclose(rates.values[:, 0], 0.1)
        assert np.allclose(rates.values[:, 1], [0.2, 0.2, 0.2, 0.2, 0.5, 0.2, 0.2])
    assert len(norms.loss_scores) == 32
    assert norms.loss_scores.lookup([302]).mean.item() == pytest.approx(seen[3][0][1][2].item())


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("measured", [False, True])
def test_samples_of_a_step_that_a_scaler_skipped_are_not_those_of_the_next(
    tmp_path: Path, micro: int, measured: bool
) -> None:
    model, optimizer = parts()
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    norms = [lipcore.PerSampleGradNorms(loss_reduction="mean", noise_scale=False)] * measured
    metrics = [lipcore.Trajectory(), *norms]
    with lipcore.watch(model, optimizer, metrics=metrics, run=tmp_path / "a", scaler=scaler) as monitor:
        for step in range(5):
            for part in range(micro):
                each = model(torch.randn(2, 3))[:, 0].square()
                ids = 100 * step + 10 * part + np.arange(2)
                monitor.log_batch(ids, losses=each, rng_state=torch.full((3,), 10 * step + part, dtype=torch.uint8))
                loss = each.mean() * (float("inf") if step == 2 else 1.0)
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    with open_run(tmp_path / "a") as run:
        wanted = [[100 * s + 10 * p + i for p in range(micro) for i in range(2)] for s in (0, 1, 3, 4)]
        assert [batch.ids.tolist() for batch in run.batches()] == wanted  # type: ignore[union-attr]
        assert [batch.rng_state for batch in run.batches()] == [bytes([10 * s] * 3) for s in (0, 1, 3, 4)]


@pytest.mark.parametrize("fused", [False, True])
def test_the_scale_with_which_each_step_was_made(tmp_path: Path, fused: bool) -> None:
    """Not that which update() makes afterwards, also where a step is skipped, or read late."""
    model, _ = parts()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)
    scales = []
    metrics = [lipcore.Trajectory(stats=["update_norm", "grad_norm", "clipped_grad_norm"])]
    with lipcore.watch(model, optimizer, metrics=metrics, run=tmp_path / "a", scaler=scaler) as monitor:
        for step in range(1, 9):
            loss = model(torch.randn(2, 3)).square().mean() * (float("inf") if step == 6 else 1.0)
            scaler.scale(loss).backward()
            scale = scaler.get_scale()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            scaler.step(optimizer)
            scales += [scale] * (step != 6)
            scaler.update()
            optimizer.zero_grad()
            monitor.log(loss=loss if step != 6 else 1.0)
    assert len(set(scales)) == 3
    with lipcore.open_run(tmp_path / "a") as run:
        found = run.series("loss_scale")
        assert found["total"].tolist() == scales
        assert found.steps.tolist() == list(range(1, 8))
        said = str(run.postmortem(6))
        here, before = found["total"][5], found["total"][4]
        assert f"scale of the GradScaler: {here:g}, {before:g} in the step before" in said
        assert "clipped to 0.001, by a factor of" in said.replace("\n    ", " ")
    plain = lipcore.watch(parts()[0], run=tmp_path / "b")
    plain.close()
    with lipcore.open_run(tmp_path / "b") as run:
        assert "optimizer/loss_scale" not in run.step_quantities


def test_samples_by_loss_alone_and_nothing_where_no_batch_is_named(tmp_path: Path) -> None:
    model, optimizer = parts()
    with lipcore.watch(model, optimizer, run=tmp_path / "a") as monitor:
        for step in range(3):
            each = model(torch.randn(4, 3))[:, 0].square()
            if step == 1:
                monitor.log_batch([7, 8, 9, -1], losses=each)
            each.mean().backward()
            optimizer.step()
    with open_run(tmp_path / "a") as run:
        (batch,) = run.batches()
        assert (batch.step, batch.ids.tolist(), batch.norms) == (2, [7, 8, 9, -1], None)  # type: ignore[union-attr]
        assert batch.losses is not None


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"ids": [0.5]}, ValueError, "^ids: expected integers"),
        ({"losses": torch.ones(2)}, ValueError, "^ids: losses were given without"),
        ({"ids": [1, 2], "losses": torch.ones(3)}, ValueError, "^losses: expected one per id, got 3 losses for 2 ids"),
        ({"ids": [1, 2], "losses": [1.0, 2.0]}, ValueError, "^losses: expected a floating-point tensor"),
        ({"rng_state": b"abc"}, TypeError, "^rng_state: expected what torch.get_rng_state"),
    ],
)
def test_what_is_no_batch_is_refused(given: dict[str, Any], error: type[Exception], message: str) -> None:
    model, optimizer = parts()
    with lipcore.Monitor(model, optimizer) as monitor, pytest.raises(error, match=message):
        monitor.log_batch(**given)


def test_losses_are_kept_by_id_and_need_one() -> None:
    model, _ = parts()
    with lipcore.PerSampleGradNorms(model, loss_reduction="mean") as norms:
        each = model(torch.randn(2, 3))[:, 0].square()
        with pytest.raises(ValueError, match=r"^losses: .* call set_ids\(ids\) before"):
            norms.set_losses(each)
        norms.set_ids([5, 6])
        norms.set_losses(each)
        each.mean().backward()
        model(torch.randn(2, 3)).mean().backward()  # of which nothing was said
        assert norms.loss_scores.lookup([5, 6]).mean.tolist() == pytest.approx(each.tolist())
        state = norms.state_dict()
        again = lipcore.PerSampleGradNorms(model, loss_reduction="mean")
        again.load_state_dict(state)
        assert again.loss_scores.top(2, "mean").ids.tolist() == norms.loss_scores.top(2, "mean").ids.tolist()
        again.merge(norms)
        assert again.loss_scores.lookup([5]).count.item() == 2
        synced = norms.sync_scores(group=None, losses=True)
        assert synced.to_numpy()["ids"].tolist() == [5, 6]
        again.close()


def test_norms_that_are_taken_back_are_not_in_the_record(tmp_path: Path) -> None:
    from lipcore.per_sample.open_step import MicroBatch
    from lipcore.recording.flight import Flight

    class Norms:
        def __init__(self, values: list[float]) -> None:
            self.per_sample = torch.tensor(values, dtype=torch.float64)

    record = RunRecord(tmp_path / "a")
    record.begin(0)
    taken: list[tuple[int, str]] = []

    def took_back(after: int, reason: str) -> None:
        taken.append((after, reason))
        record.forget_norms(after)

    flight = Flight([], dict, record.add_batches, lambda *_: None, took_back)

    def step(number: int) -> None:
        flight.begin_step(number)
        flight.step_samples([MicroBatch(Norms([1.0, 2.0]), torch.tensor([number, -number]), None)], "")  # type: ignore[arg-type]

    step(1)
    flight.samples_proved()
    step(2)
    flight.hand_on()  # in the file already
    step(3)
    flight.samples_taken_back("samples were mixed")
    step(4)
    flight.hand_on()
    record.close()
    assert taken == [(1, "samples were mixed")]
    with open_run(tmp_path / "a") as run:
        assert [batch.norms is None for batch in run.batches()] == [False, True, True, False]
        assert all(batch.ids is not None for batch in run.batches())


def test_an_alarm_is_in_the_file_with_its_steps_long_before_a_block_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("trajectory.single_steps", "monitor.logged"):
        monkeypatch.setattr(f"lipcore.{module}.PROMPT", 0.0)  # as of steps that take long
    model, optimizer = parts()
    with lipcore.watch(model, optimizer, run=tmp_path / "a", alarms="default") as monitor:
        for step in range(1, 12):
            each = model(torch.randn(4, 3))[:, 0].square()
            monitor.log(loss=each.mean())
            monitor.log_batch(torch.arange(4), losses=each)
            each.mean().backward()
            if step == 5:
                with torch.no_grad():
                    model[2].bias.fill_(float("nan"))
            optimizer.step()
            optimizer.zero_grad()
        monitor._listeners[-1].record.flush()  # type: ignore[attr-defined]
        with open_run(tmp_path / "a") as run:
            assert (run.events[0].kind, run.events[0].step) == ("alarm", 5)
            for name in ("tensor_update_norm", "loss", "group_lr"):
                assert 5 <= run.series(name).steps[-1] < 11, name
            assert run.batches(5, 5)


# ---- ends of processes


SERIES = ("update_norm", "tensor_update_norm", "loss", "group_lr")


def training(run: Path, way: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-X", "faulthandler", Path(__file__).with_name("ending_training.py"), run, way]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(run: Path, way: str, number: int | None) -> tuple[int, str, str]:
    with training(run, way) as process:
        assert process.stdout is not None
        if number is not None:
            for line in process.stdout:
                if line.strip() == "200":
                    break
            process.send_signal(number)
            if way == "ignored":
                for line in process.stdout:
                    if int(line) > 400:
                        process.kill()
                        break
        out, error = process.communicate(timeout=60)
    return process.returncode, out, error


@pytest.mark.ci
@pytest.mark.parametrize("way", ["plain", "chained", "ignored"])
def test_what_waits_is_written_at_sigterm_which_goes_on_to_its_handler(tmp_path: Path, way: str) -> None:
    status, out, error = ended(tmp_path / "a", way, signal.SIGTERM)
    assert "Traceback" not in error
    if way == "plain":
        assert status == -signal.SIGTERM
    if way == "chained":
        assert status == 0
        assert "went on" in out
    with open_run(tmp_path / "a") as run:
        (event,) = [event for event in run.events if event.kind != "alarm"]
        assert event.kind == "SIGTERM"
        assert event.step >= 200
        for name in SERIES:
            assert run.series(name).steps[-1] >= event.step - 1, name
        assert run.batches()[-1].step >= event.step - 1


def written(run: Path) -> int:
    """Return up to which step a record that is being written has all that there is of one; 0: not yet."""
    try:
        with open_run(run) as read:
            samples = read.batches()
            return int(min([samples[-1].step, *(read.series(name).steps[-1] for name in SERIES)]))
    except (RecordError, KeyError, IndexError):
        return 0


@pytest.mark.ci
def test_what_was_in_the_file_survives_sigkill(tmp_path: Path) -> None:
    """Blocks are written at some time behind their steps, which depends on the machine: so a reader says what it has
    seen there, and the process is killed at once."""
    seen, end = 0, time.monotonic() + 60
    with training(tmp_path / "a", "plain") as process:
        while (seen := written(tmp_path / "a")) < 100:
            assert process.poll() is None
            assert time.monotonic() < end
        process.kill()
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    with open_run(tmp_path / "a") as run:
        assert run.events == [] or {event.kind for event in run.events} == {"alarm"}
        for name in SERIES:
            steps = run.series(name).steps
            assert steps[-1] >= seen
            assert steps.tolist() == list(range(steps[0], steps[-1] + 1))
        batches = run.batches()
        assert batches[-1].step >= seen
        assert all(batch.ids.tolist() == [8 * batch.step + i for i in range(8)] for batch in batches)  # type: ignore[union-attr]


@pytest.mark.ci
@pytest.mark.parametrize("way", ["raise", "raise outside a with block"])
def test_an_exception_is_told_with_its_place(tmp_path: Path, way: str) -> None:
    status, _, error = ended(tmp_path / "a", way, None)
    assert status == 1
    assert "ValueError: this is the end" in error
    with open_run(tmp_path / "a") as run:
        (event,) = [event for event in run.events if event.kind != "alarm"]
        assert (event.step, event.kind, event.text) == (77, "exception", "ValueError: this is the end")
        assert event.data["type"] == "ValueError"
        assert "ending_training.py" in event.data["where"]
        assert run.series("loss").steps[-1] == run.batches()[-1].step == run.series("update_norm").steps[-1] == 77


def test_the_handler_that_was_there_is_back_after_close(tmp_path: Path) -> None:
    def watch(name: str) -> lipcore.Monitor:
        model, optimizer = parts()
        monitor = lipcore.watch(model, optimizer, run=tmp_path / name)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        return monitor

    before = signal.getsignal(signal.SIGTERM)
    lipcore.watch(*parts(), run=tmp_path / "none").close()
    one, other = watch("a"), watch("b")
    assert signal.getsignal(signal.SIGTERM) is not before
    other.close()
    one.close()
    assert signal.getsignal(signal.SIGTERM) is before
    one, other = watch("c"), watch("d")
    one.close()  # in the other order: what is left does nothing but hand the signal on
    other.close()
    signal.signal(signal.SIGTERM, before)
