"""Snapshots: what is written after an alarm is whole, there in time, and bounded; the training stays what it was."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ways
from torch import nn

import lipcore
from lipcore.alarms import Alarms, AlarmStop, Snapshot
from lipcore.recording import RecordError

AT = 4


def train(
    snapshot: Snapshot | None,
    *,
    steps: int = 8,
    faults: tuple[int, ...] = (AT,),
    log: bool = True,
    stop: bool = False,
    scaler: Any = None,
    **watch: Any,
) -> tuple[nn.Module, torch.optim.Optimizer, dict[int, dict[str, torch.Tensor]]]:
    """Train; in these steps a sample comes twice, which alarms at once and spoils nothing. Return the parameters after
    each step too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    alarms = Alarms(signals=["loss"], snapshot=snapshot, stop=stop)
    after: dict[int, dict[str, torch.Tensor]] = {}
    with lipcore.watch(
        model, optimizer, metrics=[lipcore.Trajectory()], alarms=alarms, scaler=scaler, **watch
    ) as monitor:
        for step in range(1, steps + 1):
            each = model(torch.randn(4, 3))[:, 0].square()
            ids = 10 * step + torch.arange(4)
            if step in faults:
                ids[1] = ids[0]
            if log:
                monitor.log(loss=each.mean())
            monitor.log_batch(ids, losses=each, epoch=0)
            each.mean().backward() if scaler is None else scaler.scale(each.mean()).backward()
            optimizer.step() if scaler is None else scaler.step(optimizer)
            after[step] = {name: p.detach().clone() for name, p in model.state_dict().items()}
            if scaler is not None:
                scaler.update()
            optimizer.zero_grad()
    return model, optimizer, after


def test_states_and_the_last_steps_of_the_record(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    _, _, after = train(Snapshot(tmp_path / "s", states=True), run=tmp_path / "a", scaler=scaler)
    files = sorted(path.relative_to(tmp_path / "s").as_posix() for path in (tmp_path / "s").rglob("*.*"))
    assert files == [f"step{AT}/rank0.lipcore", f"step{AT}/rank0.pt"]
    found = torch.load(tmp_path / "s" / f"step{AT}" / "rank0.pt", weights_only=True)
    assert (found["alarm"]["step"], found["alarm"]["signal"], found["alarm"]["rank"]) == (AT, "sample_ids", None)
    assert found["step"] in (AT - 1, AT)  # log_batch() tells of it, before the step is made
    for name, tensor in after[found["step"]].items():
        assert torch.equal(found["model"][name], tensor)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    model.load_state_dict(found["model"])
    again = torch.optim.AdamW(model.parameters())
    again.load_state_dict(found["optimizers"][0])
    assert float(again.state[model[0].weight]["step"]) == found["step"]
    assert found["scaler"]["scale"] == 8.0
    torch.set_rng_state(found["rng_state"])
    with lipcore.open_run(tmp_path / "s" / f"step{AT}") as run:
        assert [event.step for event in run.events] == [AT]
        assert run.series("update_norm").steps.tolist() == list(range(1, found["step"] + 1))
        assert [batch.step for batch in run.batches()] == list(range(1, found["step"] + 1))


def test_training_stays_bit_for_bit_the_same(tmp_path: Path) -> None:
    watched, *_ = train(Snapshot(tmp_path / "s", states=True), run=tmp_path / "a")
    state = torch.get_rng_state()
    plain, *_ = train(None)
    assert torch.equal(torch.get_rng_state(), state)
    for mine, theirs in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_as_many_are_kept_as_are_asked_for_and_none_of_alarms_that_follow(tmp_path: Path) -> None:
    for fault in (4, 2, 3):
        train(Snapshot(tmp_path / "s", states=True, keep=2), steps=4, faults=(fault,), run=tmp_path / f"a{fault}")
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["step2", "step3"]  # those written last


def test_a_loop_that_calls_nothing_has_it_at_the_end_of_a_step(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    alarms = Alarms(signals=["update_norm"], snapshot=Snapshot(tmp_path, states=True))
    there = []
    with lipcore.Monitor(model, optimizer, [lipcore.Trajectory()], alarms=alarms):
        for step in range(1, 200):
            model(torch.randn(4, 3)).square().mean().backward()
            if step == 100:
                model[2].bias.grad.fill_(torch.inf)
            optimizer.step()
            optimizer.zero_grad()
            there.append(next(tmp_path.glob("*/rank0.pt"), None) is not None)
    assert not any(there[:99])
    assert there[-1]
    assert torch.load(tmp_path / "step100" / "rank0.pt")["alarm"]["signal"] == "nonfinite"


class Ends(Exception):
    """What a loop raises."""


def train_two(folder: Path, *, ends: bool = False, stop: bool = False) -> list[dict[str, torch.Tensor]]:
    """Train two parts with an optimizer each; in step 3 a sample comes twice, between their steps. Return the
    parameters by the number of steps that were made."""
    one, other = nn.Linear(3, 1), nn.Linear(3, 1)
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (one, other)]
    both = nn.ModuleDict({"one": one, "other": other})
    state = lambda: {name: tensor.clone() for name, tensor in both.state_dict().items()}  # noqa: E731
    alarms = Alarms(signals=["loss"], snapshot=Snapshot(folder, states=True), stop=stop)
    after = [state()]
    with lipcore.Monitor({"one": one, "other": other}, optimizers, [lipcore.Trajectory()], alarms=alarms) as monitor:
        for step in range(1, 6):
            for part, optimizer in zip((one, other), optimizers, strict=True):
                part(torch.randn(4, 3)).square().mean().backward()
                if part is other and step == 3:
                    monitor.log_batch([1, 1], epoch=0)
                    monitor.log(a=1.0)
                    if ends:
                        raise Ends
                optimizer.step()
                optimizer.zero_grad()
            after.append(state())
    return after


def test_states_are_not_of_two_steps_where_several_optimizers_step_in_turn(tmp_path: Path) -> None:
    after = train_two(tmp_path)
    found = torch.load(tmp_path / "step3" / "rank0.pt", weights_only=True)
    assert (found["step"], found["amid_step"]) == (3, False)
    for name, tensor in after[3].items():
        assert torch.equal(found["model"][name], tensor)


@pytest.mark.parametrize(("given", "error"), [({"ends": True}, Ends), ({"stop": True}, AlarmStop)])
def test_states_of_a_training_that_ends_between_two_optimizers_say_so(
    tmp_path: Path, given: dict[str, bool], error: type[Exception]
) -> None:
    with (
        pytest.warns(RuntimeWarning, match=r"alarm in step 3 are not of the end of step 2: some"),
        pytest.raises(error),
    ):
        train_two(tmp_path, **given)
    found = torch.load(tmp_path / "step3" / "rank0.pt", weights_only=True)
    assert (found["step"], found["amid_step"]) == (2, True)


def same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(mine[name], theirs[name], 0, 0, equal_nan=True) for name in theirs)


@pytest.mark.parametrize("calls", [True, False])
def test_an_event_in_which_the_monitor_is_called_has_the_step_of_its_states(tmp_path: Path, calls: bool) -> None:
    model = nn.Linear(3, 1)
    model.count = nn.Parameter(torch.zeros(()))  # of the steps
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    on_event = lambda _: monitor.log(a=1.0) if calls else None  # noqa: E731
    alarms = Alarms(signals=["loss"], snapshot=Snapshot(tmp_path, states=True), on_event=on_event)
    with lipcore.Monitor(model, optimizer, [lipcore.Trajectory()], alarms=alarms) as monitor:
        for step in range(1, 12):
            (0.1 * model(torch.randn(4, 3)).square().mean() - model.count).backward()
            if step == 6:
                model.bias.grad.fill_(torch.nan)
            optimizer.step()
            optimizer.zero_grad()
    found = torch.load(tmp_path / "step6" / "rank0.pt", weights_only=True)
    assert (found["step"], found["amid_step"]) == (int(found["model"]["count"]), False)


@pytest.mark.parametrize("stop", [False, True])
def test_a_step_that_is_counted_by_hand_is_counted_before_the_states_are_written(tmp_path: Path, stop: bool) -> None:
    model = nn.Linear(3, 1)
    alarms = Alarms(signals=["loss"], snapshot=Snapshot(tmp_path, states=True), stop=stop)
    with contextlib.suppress(AlarmStop), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a loop that was stopped amid a step
        with lipcore.Monitor(model, metrics=[lipcore.Trajectory()], alarms=alarms) as monitor:
            for step in range(1, 5):
                monitor.log_batch([1, 1] if step == 3 else [10 * step, 10 * step + 1], epoch=0)
                torch.nn.init.constant_(model.weight, step)
                monitor.step()
    found = torch.load(tmp_path / "step3" / "rank0.pt", weights_only=True)
    assert int(found["model"]["weight"][0, 0]) == 3
    assert (found["step"], found["amid_step"]) == ((2, True) if stop else (3, False))


def test_states_of_a_step_that_is_read_late_are_written_when_it_is_counted(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    alarms = Alarms(signals=["loss"], snapshot=Snapshot(tmp_path, states=True))
    metrics = [lipcore.Trajectory(mode="exact")]
    after: list[dict[str, torch.Tensor]] = [{}]
    with (
        pytest.warns(RuntimeWarning, match="From now on a step is read when the next backward pass begins"),
        lipcore.Monitor(model, optimizer, metrics, alarms=alarms) as monitor,
    ):
        for step in range(1, 6):
            model(torch.randn(4, 3)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                model.weight.mul_(0.9)
            after.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            if step == 3:
                assert monitor._step_end.late
                monitor.log_batch([1, 1], epoch=0)
                monitor.log(a=1.0)
    (file,) = tmp_path.glob("*/rank0.pt")
    found = torch.load(file, weights_only=True)
    assert same(after[found["step"]], found["model"])
    assert not found["amid_step"]


def test_an_alarm_shortly_after_another_has_none(tmp_path: Path) -> None:
    from lipcore.alarms import AlarmEvent
    from lipcore.recording.snapshots import Snapshots

    model = nn.Linear(1, 1)
    said: list[str] = []
    snapshots = Snapshots(Snapshot(tmp_path, states=True, keep=9), 0, model, [], None, said.append)

    def alarm(step: int) -> None:
        snapshots.hear(AlarmEvent(step, "loss", "total", 4.0, ""))
        snapshots.write(step, None)

    for step in (100, 101, 120, 121, 130):
        alarm(step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step100", "step121"]
    snapshots.state_loaded(90)
    alarm(95)
    assert (tmp_path / "step95" / "rank0.pt").exists()
    assert not said


def test_an_earlier_alarm_that_is_heard_of_late_has_its_files(tmp_path: Path) -> None:
    from lipcore.alarms import AlarmEvent
    from lipcore.recording.snapshots import Snapshots

    said: list[str] = []
    snapshots = Snapshots(Snapshot(tmp_path, states=True, keep=2), 0, nn.Linear(1, 1), [], None, said.append)

    def hear(*steps: int) -> None:
        for step in steps:  # of other ranks, where they meet
            snapshots.hear(AlarmEvent(step, "loss", "total", 4.0, "", rank=1))

    hear(95)
    snapshots.write(96, None)
    hear(50, 51, 60)
    snapshots.write(100, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step50", "step95"]
    hear(110, 95, 50, 150, 200, 250)  # 110 is soon after 95; of the others those are written that would be kept
    assert snapshots.due
    snapshots.write(260, None)
    assert not snapshots.due
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step200", "step250"]
    assert torch.load(tmp_path / "step200" / "rank0.pt")["step"] == 260
    assert not said


def test_it_is_written_before_the_training_stops(tmp_path: Path) -> None:
    with pytest.raises(AlarmStop):
        train(Snapshot(tmp_path / "s", states=True), stop=True, run=tmp_path / "a")
    assert (tmp_path / "s" / f"step{AT}" / "rank0.pt").exists()
    assert lipcore.open_run(tmp_path / "s" / f"step{AT}").postmortem().step <= AT


def test_what_cannot_be_written_is_warned_of_and_the_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(state: Any, file: Any) -> None:
        file.write(b"a part")
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")  # as torch does when it closes what it could not write

    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(RuntimeWarning, match=r"lacks .*rank0.pt, which could not be written \(OSError.*No space"):
        *_, after = train(Snapshot(tmp_path / "s", states=True), run=tmp_path / "a")
    assert len(after) == 8
    assert [path.name for path in (tmp_path / "s").rglob("rank*")] == ["rank0.lipcore"]  # nothing that is half
    monkeypatch.undo()
    (tmp_path / "f").write_text("")
    with pytest.warns(RuntimeWarning, match=r"could not be written \((NotADirectory|FileExists)Error"):
        train(Snapshot(tmp_path / "f" / "s"), run=tmp_path / "b")


def test_nothing_to_write_is_told() -> None:
    with pytest.raises(ValueError, match=r"^alarms: their snapshot would have nothing to write"):
        train(Snapshot("nowhere"))
    model = nn.Linear(2, 1)
    alarms = Alarms(signals=["loss"], snapshot=Snapshot("nowhere"))
    with lipcore.Monitor(model, metrics=[], alarms=alarms) as monitor:
        monitor.log_batch([1, 1], epoch=0)
        with pytest.warns(RuntimeWarning, match="has nothing to write: there is no record; pass run="):
            monitor.log()
    assert not Path("nowhere").exists()


def test_the_remedy_can_be_followed_with_the_same_alarms_and_metrics(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    alarms, metrics = Alarms(signals=["loss"], snapshot=Snapshot(tmp_path / "s")), [lipcore.Trajectory()]
    with pytest.raises(ValueError, match="pass run="):
        lipcore.watch(model, metrics=metrics, alarms=alarms)
    with lipcore.watch(model, metrics=metrics, alarms=alarms, run=tmp_path / "a") as monitor:
        monitor.log_batch([1, 1], epoch=0)
        monitor.step()
    assert (tmp_path / "s" / "step1" / "rank0.lipcore").exists()


def test_alarms_of_a_run_that_has_not_begun_can_go_into_another(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    model = nn.Linear(2, 1)
    alarms = Alarms(signals=["loss"], snapshot=Snapshot(tmp_path / "s"), per_sample=2)
    metrics = lambda: [lipcore.Trajectory(), lipcore.PerSampleGradNorms(loss_reduction="mean")]  # noqa: E731
    with pytest.raises((OSError, RecordError, ValueError)):
        lipcore.watch(model, metrics=metrics(), alarms=alarms, run=tmp_path / "a")
    with lipcore.watch(model, metrics=metrics(), alarms=alarms, run=tmp_path / "b") as monitor:
        for step in range(1, 5):
            monitor.log_batch([1, 1] if step == 1 else [10 * step, 10 * step + 1], epoch=0)
            model(torch.randn(2, 2)).square().mean().backward()
            monitor.step()
    assert len(alarms.events) == len(alarms.samples) == 1
    with lipcore.open_run(tmp_path / "s" / "step1") as run:
        assert len(run.events) == 1


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"folder": ""}, TypeError, "^folder: expected the path of a folder"),
        ({"folder": __file__}, ValueError, "is a file$"),
        ({"folder": "a", "states": 1}, TypeError, "^states: expected True or False, got 1"),
        ({"folder": "a", "keep": 0}, ValueError, "^keep: expected an integer >= 1, got 0"),
    ],
)
def test_what_is_no_snapshot_is_refused(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Snapshot(**given)
    with pytest.raises(TypeError, match=r"^snapshot: expected a lipcore.alarms.Snapshot or None, got str"):
        Alarms(snapshot="a")  # type: ignore[arg-type]


def train_on_ranks(rank: int, folder: str, name: str) -> list[float]:
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    alarms = Alarms(signals=["loss"], snapshot=Snapshot(f"{folder}/s", states=True, keep=1))
    with lipcore.watch(model, optimizer, run=f"{folder}/{name}", window_steps=4, alarms=alarms) as monitor:
        for step in range(1, 13):
            loss = model(torch.randn(4, 3)).square().mean()
            monitor.log(loss=loss)
            monitor.log_batch([1, 1] if rank == 1 and step == 3 else [10 * step, 10 * step + 1], epoch=0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    weight: list[float] = model.module.weight.flatten().tolist()
    return weight


@pytest.mark.ci
def test_every_rank_writes_its_own(tmp_path: Path) -> None:
    weights = run_ways(tmp_path, train_on_ranks, {"a": {}})["a"]
    assert weights[0] == weights[1]
    (folder,) = (tmp_path / "s").iterdir()
    assert folder.name == "step3"
    names = [f"rank{rank}.{ending}" for rank in range(2) for ending in ("lipcore", "pt")]
    assert sorted(path.name for path in folder.iterdir()) == names
    found = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert [one["alarm"]["rank"] for one in found] == [1, None]  # the other one has heard of it
    assert found[0]["step"] >= found[1]["step"]
