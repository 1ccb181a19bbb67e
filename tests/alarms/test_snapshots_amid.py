"""Snapshots where much is under way: SAM's two steps, ranks that remove folders, processes that are killed or end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ways
from torch import nn
from torch.distributed.fsdp import fully_shard
from wrappers import Sam, mlp

import lipcore
from lipcore.alarms import AlarmEvent, Alarms, Snapshot
from lipcore.recording.snapshots import Snapshots, _write_into

X = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))


def alarm(step: int) -> AlarmEvent:
    return AlarmEvent(step, "loss", "total", 4.0, "")


def test_a_parameter_that_is_gone_is_not_waited_for(tmp_path: Path) -> None:
    """A layer that is removed, or has other names, is gathered for no pass."""

    class DTensor(nn.Parameter):
        """A parameter that is taken for one that is spread over ranks."""

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for layer in model:
        layer.weight = DTensor(layer.weight.detach())
    snapshots = Snapshots(Snapshot(tmp_path, states=True), 0, model, [], None, print)
    assert snapshots.all_spread
    model[0].weight = nn.Parameter(torch.zeros(2, 2))
    assert not snapshots.all_spread
    del model[0]
    assert snapshots.all_spread


@pytest.mark.parametrize("by", ["two steps", "closure"])
def test_states_are_not_those_that_sam_goes_up_to(tmp_path: Path, by: str) -> None:
    torch.manual_seed(0)
    model = mlp()
    optimizer = Sam(model.parameters(), torch.optim.SGD, lr=0.1)
    alarms = Alarms(signals=["loss"], snapshot=Snapshot(tmp_path, states=True))
    after: list[list[torch.Tensor]] = [[p.detach().clone() for p in model.parameters()]]

    def loss(step: int) -> None:
        model(X).square().mean().backward()
        monitor.log(a=1.0)  # also between the two steps
        if step == 3 and len(alarms.events) == 0 and by == "closure":
            monitor.log_batch([1, 1], epoch=0)
            monitor.log(a=1.0)

    with lipcore.Monitor(model, optimizer, [lipcore.Trajectory()], alarms=alarms) as monitor:
        for step in range(1, 6):
            model(X).square().mean().backward()
            if by == "closure":
                optimizer.step(lambda step=step: loss(step))  # type: ignore[misc]
            else:
                optimizer.first_step()
                if step == 3:
                    monitor.log_batch([1, 1], epoch=0)
                loss(step)
                optimizer.second_step()
            after.append([p.detach().clone() for p in model.parameters()])
    found = torch.load(tmp_path / "step3" / "rank0.pt", weights_only=True)
    assert (found["step"], found["amid_step"]) == (3, False)
    assert all(torch.equal(p, q) for p, q in zip(found["model"].values(), after[3], strict=True))


def test_a_training_that_ends_between_sams_steps_says_so(tmp_path: Path) -> None:
    model = mlp()
    optimizer = Sam(model.parameters(), torch.optim.SGD, lr=0.1)
    alarms = Alarms(signals=["loss"], snapshot=Snapshot(tmp_path, states=True))
    with (
        pytest.warns(RuntimeWarning, match="are not of the end of step 0: some"),
        lipcore.Monitor(model, optimizer, [lipcore.Trajectory()], alarms=alarms) as monitor,
    ):
        model(X).square().mean().backward()
        optimizer.first_step()
        monitor.log_batch([1, 1], epoch=0)
    assert torch.load(tmp_path / "step1" / "rank0.pt", weights_only=True)["amid_step"]


def test_so_does_one_that_an_error_ends_there(tmp_path: Path) -> None:
    """No call of the Monitor's follows, in which the files would be written."""
    model = mlp()
    optimizer = Sam(model.parameters(), torch.optim.SGD, lr=0.1)
    alarms = Alarms(signals=["loss"], snapshot=Snapshot(tmp_path, states=True))
    with (
        pytest.raises(ZeroDivisionError),
        pytest.warns(RuntimeWarning, match="are not of the end of step 0: some"),
        lipcore.Monitor(model, optimizer, [lipcore.Trajectory()], alarms=alarms) as monitor,
    ):
        model(X).square().mean().backward()
        optimizer.first_step()
        monitor.log_batch([1, 1], epoch=0)
        raise ZeroDivisionError
    assert torch.load(tmp_path / "step1" / "rank0.pt", weights_only=True)["amid_step"]


def test_what_a_killed_process_has_left_half_goes(tmp_path: Path) -> None:
    said: list[str] = []
    for name in ("step3/rank0.pt-half", "step4/rank0.lipcore-half-wal", "step4/rank10.pt-half", "step5/rank1.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"a part")
    snapshots = Snapshots(Snapshot(tmp_path, states=True), 0, nn.Linear(1, 1), [], None, said.append)
    snapshots.hear(alarm(9))
    snapshots.write(9, None)
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))
    assert left == ["step4/rank10.pt-half", "step5/rank1.pt", "step9/rank0.pt"]
    assert not (tmp_path / "step3").exists()
    assert not said


def test_a_folder_that_another_rank_removes_as_it_is_written_into_is_made_again(tmp_path: Path) -> None:
    times = iter((True, False))

    def write(target: Path) -> None:
        if next(times):
            target.parent.rmdir()
        target.write_text("whole")

    _write_into(tmp_path / "step9", "rank0.pt", write)
    assert (tmp_path / "step9" / "rank0.pt").read_text() == "whole"
    with pytest.raises(IsADirectoryError):
        _write_into(tmp_path / "step9", ".", lambda target: target.write_text(""))


def test_weights_that_are_swapped_in_between_two_steps_are_not_taken_for_the_trainings(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    alarms = Alarms(signals=["loss"], snapshot=Snapshot(tmp_path, states=True))
    average = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    with lipcore.Monitor(model, optimizer, [lipcore.Trajectory()], alarms=alarms) as monitor:
        for step in range(1, 6):
            model(X).square().mean().backward()
            optimizer.step()
            if step == 3:
                own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
                model.load_state_dict(average)
                monitor.log_batch([1, 1], epoch=0)
                monitor.log(validation=1.0)
                assert not list(tmp_path.iterdir())
                model.load_state_dict(own)
    found = torch.load(tmp_path / "step4" / "rank0.pt", weights_only=True)
    assert (found["step"], found["amid_step"]) == (3, False)
    assert all(torch.equal(found["model"][name], tensor) for name, tensor in own.items())


def test_weights_that_are_loaded_at_the_end_say_so(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    alarms = Alarms(signals=["loss"], snapshot=Snapshot(tmp_path, states=True))
    with (
        pytest.warns(RuntimeWarning, match="are not of the end of step 1: some .* or were loaded"),
        lipcore.Monitor(model, optimizer, [lipcore.Trajectory()], alarms=alarms) as monitor,
    ):
        model(X).square().mean().backward()
        optimizer.step()
        model.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()})
        monitor.log_batch([1, 1], epoch=0)
    assert torch.load(tmp_path / "step2" / "rank0.pt", weights_only=True)["amid_step"]


def test_a_loop_that_goes_to_another_folder_has_them_where_they_were_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    snapshots = Snapshots(Snapshot("s", states=True), 0, nn.Linear(1, 1), [], None, pytest.fail)
    monkeypatch.chdir(tmp_path / "other")
    snapshots.hear(alarm(9))
    snapshots.write(9, None)
    assert (tmp_path / "one" / "s" / "step9" / "rank0.pt").exists()


def train_sharded(rank: int, folder: str, name: str) -> dict[str, object]:
    """Train what is spread over two ranks; the second has an alarm as it has gathered its layer for a pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    fully_shard(model[0])
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    alarms = Alarms(signals=["loss"], snapshot=Snapshot(f"{folder}/s", states=True))
    after: list[torch.Tensor] = [model[2].weight.to_local().detach().clone()]
    there = False
    with lipcore.Monitor(model, optimizer, [lipcore.Trajectory()], alarms=alarms) as monitor:
        for step in range(1, 7):
            loss = model(torch.randn(4, 8)).square().mean()
            if rank == 1 and step == 3:
                monitor.log_batch([1, 1], epoch=0)
                monitor.log(loss=loss)
                there = Path(folder, "s", "step3").exists()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            after.append(model[2].weight.to_local().detach().clone())
    if rank == 0:
        return {"same": True, "there": there}
    found = torch.load(f"{folder}/s/step3/rank1.pt", weights_only=True)
    return {"same": torch.equal(found["model"]["2.weight"], after[found["step"]]), "there": there}


@pytest.mark.ci
def test_states_of_one_rank_alone_are_no_reason_for_it_to_gather_parameters_again(tmp_path: Path) -> None:
    assert run_ways(tmp_path, train_sharded, {"a": {}})["a"] == [{"same": True, "there": False}] * 2


_LOOP = """
import os, sys, torch
from torch import nn
import lipcore
from lipcore.alarms import Alarms, Snapshot

folder, way, waits = sys.argv[1:]
for module in (lipcore.trajectory.single_steps, lipcore.monitor.logged):
    module.PROMPT = float(waits)  # not 10 ms: the machine would say when an alarm is heard of
torch.set_num_threads(1)
model = nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
alarms = Alarms(signals=["loss"], snapshot=Snapshot(f"{folder}/s", states=True))
monitor = lipcore.watch(model, optimizer, run=f"{folder}/a", metrics=[lipcore.Trajectory()], alarms=alarms)
if way == "killed":
    save = torch.save
    def killed(state, target):
        save(state, target)
        os.kill(os.getpid(), 9)
    torch.save = killed
for step in range(1, 4):
    loss = model(torch.ones(2, 3)).square().mean() * (float("nan") if step == 3 else 1.0)
    monitor.log(loss=loss)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
if way == "killed":
    monitor.log(loss=1.0)
    monitor.log(loss=1.0)
    monitor.close()
"""


def ended(folder: Path, way: str, waits: float = 60.0) -> int:
    command = [sys.executable, "-c", _LOOP, str(folder), way, str(waits)]
    return subprocess.run(command, capture_output=True, timeout=120, check=False, env=os.environ).returncode


@pytest.mark.ci
@pytest.mark.parametrize(("waits", "behind"), [(0.0, []), (60.0, ["exit"])], ids=["heard at once", "heard at the end"])
def test_an_alarm_of_the_last_step_of_a_loop_that_closes_nothing_has_its_files(
    tmp_path: Path, waits: float, behind: list[str]
) -> None:
    assert ended(tmp_path, "plain", waits) == 0
    found = torch.load(tmp_path / "s" / "step3" / "rank0.pt", weights_only=True)
    assert (found["alarm"]["signal"], found["step"], found["amid_step"]) == ("nonfinite", 3, False)
    with lipcore.open_run(tmp_path / "s" / "step3") as run:
        assert [event.kind for event in run.events] == ["alarm", *behind]


@pytest.mark.ci
def test_a_process_that_is_killed_as_it_writes_leaves_no_file_that_is_half(tmp_path: Path) -> None:
    assert ended(tmp_path, "killed") == -signal.SIGKILL
    names = sorted(path.name for path in (tmp_path / "s" / "step3").iterdir())
    assert names == ["rank0.lipcore", "rank0.pt-half"]
    lipcore.open_run(tmp_path / "s" / "step3").close()
    assert ended(tmp_path, "plain") == 0
    assert sorted(path.name for path in (tmp_path / "s" / "step3").iterdir()) == ["rank0.lipcore", "rank0.pt"]
