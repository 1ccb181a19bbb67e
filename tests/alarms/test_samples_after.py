"""Gradient norms of single samples that are switched on after an alarm: right, for so many steps, and free before."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ways
from torch import nn

import lipcore
from lipcore.alarms import AlarmEvent, Alarms, Snapshot, samples
from lipcore.alarms.samples import SamplesAfter
from lipcore.per_sample.open_step import MicroBatch
from lipcore.per_sample.step_listener import StepListener

AT, ON = 5, 3


class Training:
    """A training in which a sample comes twice in step AT, which alarms at once, and one is too large soon after."""

    def __init__(self, *, named: bool = True, micro: int = 1, device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.norms = lipcore.PerSampleGradNorms(loss_reduction="mean")
        self.named, self.micro, self.device = named, micro, device
        self.expected: dict[int, list[float]] = {}  # norms of the steps that are to be measured
        self.hooks: list[int] = []  # on the first layer, after each step

    def go(self, *, steps: int = 12, per_sample: int | None = ON, **watch: Any) -> Alarms:
        torch.manual_seed(1)
        alarms = Alarms(signals=["loss"], per_sample=per_sample)
        metrics = [lipcore.Trajectory()] + [self.norms] * (per_sample is not None)
        with lipcore.watch(self.model, self.optimizer, metrics=metrics, alarms=alarms, **watch) as monitor:
            for step in range(1, steps + 1):
                for part in range(self.micro):
                    x = torch.randn(4, 3).to(self.device)
                    each = self.model(x)[:, 0].square()
                    if step == AT + 2 and part == self.micro - 1:
                        each = each * torch.tensor([1, 1, 50, 1]).to(self.device)
                    own = 10 * step + 4 * part + torch.arange(4)
                    if step == AT:
                        own[0] = own[1]
                    self.expected.setdefault(step, []).extend(self.gradient_norms(each))
                    if self.named or step == AT:
                        monitor.log_batch(own.to(self.device), epoch=0)
                    (each.mean() / self.micro).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.hooks.append(len(self.model[0]._forward_hooks))
        return alarms

    def gradient_norms(self, each: torch.Tensor) -> list[float]:
        parameters = list(self.model.parameters())
        grads = [torch.autograd.grad(one, parameters, retain_graph=True) for one in each]
        return [float(torch.cat([g.flatten() for g in one]).norm()) / self.micro for one in grads]


class Scaled(nn.Module):
    """What no rule covers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_largest_of_the_steps_after_an_alarm_are_named(named: bool, device: str) -> None:
    training = Training(named=named, device=device)
    (found,) = training.go().samples
    assert (found.alarm, found.first, found.last, found.count) == (AT, AT + 1, AT + ON, 4 * ON)
    steps = range(AT + 1, AT + ON + 1)
    everything = np.array([norm for step in steps for norm in training.expected[step]])
    assert found.median == pytest.approx(np.median(everything), rel=1e-5)
    order = np.argsort(-everything, kind="stable")[:5]
    assert [one.norm for one in found.largest] == pytest.approx(everything[order], rel=1e-5)
    assert [(one.step, one.row) for one in found.largest] == [(steps[i // 4], i % 4) for i in order]
    assert [one.id for one in found.largest] == [10 * steps[i // 4] + i % 4 if named else None for i in order]
    who = f"sample {10 * (AT + 2) + 2}" if named else "row 2"
    said = f"after the alarm in step {AT}: the largest gradient norms of 12 samples in steps 6 to 8: {who} in step 7 ("
    assert found.message.startswith(said)


def test_hooks_are_there_in_those_steps_alone_and_windows_have_their_samples(tmp_path: Path) -> None:
    training = Training()
    training.go(run=tmp_path / "a", window_steps=4)
    before = training.hooks[0]
    assert training.hooks == [before] * (AT - 1) + [before + 1] * ON + [before] * (12 - AT - ON + 1)
    with lipcore.open_run(tmp_path / "a") as run:
        counts = [window["per_sample_grad_norm"].norm["total"].mean.count for window in run.windows]
        assert counts == [0, 4 * ON, 0]
        assert [batch.step for batch in run.batches() if batch.norms is not None] == [6, 7, 8]
        (event,) = [event for event in run.events if event.kind == "samples after an alarm"]
        assert (event.step, event.data["alarm"], event.data["largest"][0][:3]) == (AT + ON, AT, [7, 2, 72])
        said = str(run.postmortem())
        assert "Samples in the steps after" in said
        assert "sample 72 in step" in said
        if find_spec("bokeh") is not None:
            from lipcore.report.postmortem.page import postmortem_page

            assert "sample 72 in step 7" in postmortem_page(run)


def test_micro_batches_are_one_step() -> None:
    training = Training(micro=2)
    (found,) = training.go().samples
    assert found.count == 8 * ON
    assert (found.largest[0].step, found.largest[0].row, found.largest[0].id) == (AT + 2, 6, 10 * (AT + 2) + 6)


def test_training_stays_bit_for_bit_the_same() -> None:
    watched, plain = Training(), Training()
    watched.go()
    plain.go(per_sample=None)
    for mine, theirs in zip(watched.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_end_of_the_training_tells_of_the_steps_so_far() -> None:
    training = Training()
    (found,) = training.go(steps=AT + 2).samples
    assert (found.first, found.last, found.count) == (AT + 1, AT + 2, 8)


def test_a_metric_that_goes_on_elsewhere_keeps_nothing_of_where_it_was(tmp_path: Path) -> None:
    """In its next Monitor it tells nobody of the one before, and holds no optimizer of that."""
    norms = lipcore.PerSampleGradNorms(loss_reduction="mean")
    gone: list[Any] = []
    for name in ("a", "b", "c"):
        model = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        alarms = Alarms(signals=["loss"], per_sample=9) if name == "a" else None
        metrics = [lipcore.Trajectory(), norms]
        with lipcore.watch(model, optimizer, metrics=metrics, alarms=alarms, run=tmp_path / name) as monitor:
            for step in range(1, 4):
                monitor.log_batch([1, 1] if step == 3 else [2 * step, 2 * step + 1], epoch=0)
                model(torch.randn(2, 3)).square().mean().backward()
                optimizer.step()  # the alarm of the last one is followed by none
        gone.append(weakref.ref(optimizer))
        del model, optimizer, metrics, monitor, alarms
    gc.collect()
    assert [one() for one in gone[:-1]] == [None, None]
    assert len(norms._window.listeners) == 1


@pytest.mark.filterwarnings("ignore:the parameters moved after")
def test_steps_that_are_read_inside_of_the_next_backward_pass(tmp_path: Path) -> None:
    """There nothing is switched: it waits until the optimizer is about to step, whose step then has no record."""
    training = Training()
    alarms = Alarms(signals=["loss"], per_sample=ON, snapshot=Snapshot(tmp_path, states=True))
    metrics = [lipcore.Trajectory(), training.norms]
    hooks = []
    with lipcore.Monitor(training.model, training.optimizer, metrics, alarms=alarms) as monitor:
        for step in range(1, 13):
            each = training.model(torch.randn(4, 3))[:, 0].square()
            ids = 10 * step + torch.arange(4)
            monitor.log_batch([51, *ids[1:].tolist()] if step == AT else ids, epoch=0)
            each.mean().backward()
            training.optimizer.step()
            with torch.no_grad():
                training.model[2].weight.mul_(0.99)
            training.optimizer.zero_grad()
            hooks.append(len(training.model[0]._forward_hooks))
    (found,) = alarms.samples
    assert found.last - found.first == ON - 1
    assert found.count in (4 * ON, 4 * (ON - 1))
    assert sum(hooks) in range(ON, ON + 2)
    assert [path.parent.name for path in tmp_path.glob("*/rank0.pt")] == [f"step{found.alarm}"]


def test_numbers_at_rest_say_why_there_are_none() -> None:
    training = Training()
    with lipcore.Monitor(
        training.model, training.optimizer, [lipcore.Trajectory(), training.norms], alarms=Alarms(per_sample=2)
    ) as monitor:
        assert "its hooks are off until an alarm" in str(monitor.plan())
        training.model(torch.randn(2, 3)).mean().backward()
        training.optimizer.step()
        with pytest.raises(RuntimeError, match=r"no backward pass was recorded yet: its hooks are off until an alarm"):
            print(training.norms.per_sample)
        monitor.rebind()
        assert not training.model[0]._forward_hooks
        with pytest.raises(ValueError, match="watches a model already"):
            lipcore.Monitor(training.model, metrics=[training.norms])
        window = monitor.close_window() or monitor.history[-1]
    assert not window["per_sample_grad_norm"].norm["total"].mean.valid


def step_with(monitor: lipcore.Monitor, training: Training, ids: list[int]) -> None:
    monitor.log_batch(ids, epoch=0)
    training.model(torch.randn(len(ids), 3)).square().mean().backward()
    training.optimizer.step()
    training.optimizer.zero_grad()


@pytest.mark.parametrize("end", ["rests", "measures", "loads a state"])
def test_a_metric_that_has_rested_measures_every_step_in_a_monitor_without_alarms(end: str) -> None:
    training, alarms = Training(), Alarms(signals=["loss"], per_sample=ON)
    metrics = [lipcore.Trajectory(), training.norms]
    with lipcore.Monitor(training.model, training.optimizer, metrics, alarms=alarms) as monitor:
        step_with(monitor, training, [1, 2] if end == "rests" else [1, 1])
        assert bool(training.model[0]._forward_hooks) is (end != "rests")
    assert not training.model[0]._forward_hooks
    if end == "loads a state":
        monitor.load_state_dict(monitor.state_dict())
    with lipcore.Monitor(training.model, training.optimizer, [training.norms], window_steps=3) as monitor:
        assert "its hooks are off" not in str(monitor.plan())
        for step in range(3):
            step_with(monitor, training, [2 * step, 2 * step + 1])
    result = monitor.history[0]["per_sample_grad_norm"]
    assert result.norm["total"].mean.count == 6
    assert result.noise_scale["total"].mean.count == 3
    assert len(training.norms.scores) == 6
    assert alarms._samples_after is not None
    assert not alarms._samples_after._found  # those of the first Monitor keep nothing of the second's steps


def two_steps(monitor: lipcore.Monitor, training: Training) -> None:
    """Train for a window of two steps, in which all samples are measured."""
    for step in range(2):
        step_with(monitor, training, [2 * step, 2 * step + 1])
    assert len(training.norms.scores) == 4
    assert monitor.history[0]["per_sample_grad_norm"].noise_scale["total"].mean.count == 2


def test_a_monitor_that_cannot_be_made_leaves_nothing_at_rest() -> None:
    training, trajectory = Training(), lipcore.Trajectory()
    metrics = [trajectory, training.norms]
    alarms = Alarms(signals=["loss", "unexplained_movement"], per_sample=ON)
    with pytest.raises(ValueError, match="window_steps"):
        lipcore.Monitor(training.model, training.optimizer, metrics, alarms=alarms, window_steps=0)
    with lipcore.Monitor(training.model, training.optimizer, metrics, window_steps=2) as monitor:
        assert "its hooks are off" not in str(monitor.plan())
        assert not trajectory.checks_movement
        two_steps(monitor, training)


def test_a_monitor_that_refuses_what_another_watches_changes_nothing_there() -> None:
    training, trajectory = Training(), lipcore.Trajectory()
    metrics = [trajectory, training.norms]
    with lipcore.Monitor(training.model, training.optimizer, metrics, window_steps=2) as monitor:
        for refused in (metrics, metrics[::-1]):
            alarms = Alarms(signals=["loss", "unexplained_movement"], per_sample=ON)
            with pytest.raises((RuntimeError, ValueError), match="a model already"):
                lipcore.Monitor(training.model, training.optimizer, refused, alarms=alarms)
        monitor.rebind()
        assert not trajectory.checks_movement
        two_steps(monitor, training)


def test_that_there_is_no_noise_scale_then_is_said() -> None:
    training = Training()

    def monitor(alarms: Alarms | None, **options: Any) -> lipcore.Monitor:
        norms = lipcore.PerSampleGradNorms(loss_reduction="mean", **options)
        return lipcore.Monitor(training.model, training.optimizer, [lipcore.Trajectory(), norms], alarms=alarms)

    said = "has no noise scale, since it is on after alarms alone"
    with monitor(None) as plain, monitor(Alarms(per_sample=2)) as on_call, monitor(None, noise_scale=False) as without:
        assert said in str(on_call.plan())
        assert said not in str(plain.plan())
        assert said not in str(without.plan())
        with pytest.raises(ValueError, match=r"noise: the state has a noise scale, and .* Alarms\(per_sample=\.\.\.\)"):
            on_call.load_state_dict(plain.state_dict())
        with pytest.raises(ValueError, match=r"noise: the state has a noise scale, and .* noise_scale=False"):
            without.load_state_dict(plain.state_dict())
        with pytest.raises(ValueError, match=r"noise: the state has none, .* pass noise_scale=False"):
            plain.load_state_dict(on_call.state_dict())
        without.load_state_dict(on_call.state_dict())
        on_call.load_state_dict(without.state_dict())
    with monitor(Alarms(per_sample=2), noise_scale=False) as on_call:
        assert said not in str(on_call.plan())


def test_a_noise_scale_of_a_monitor_before_is_not_told_on() -> None:
    training = Training()
    model, optimizer, told = training.model, training.optimizer, []
    for alarms in (None, Alarms(per_sample=2), None):
        metrics = [lipcore.Trajectory(), training.norms]
        with lipcore.Monitor(model, optimizer, metrics, alarms=alarms, window_steps=2) as monitor:
            if alarms is not None:
                training.norms.wake()
            for _ in range(3):
                model(torch.randn(4, 3)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        told.append([name for name in monitor.history[-1].flat(level="total") if "noise" in name])
    assert told[0]
    assert told == [told[0], [], told[0]]


def test_a_checkpoint_ends_it() -> None:
    training = Training()
    alarms = Alarms(signals=["loss"], per_sample=50)
    metrics = [lipcore.Trajectory(), training.norms]
    with lipcore.Monitor(training.model, training.optimizer, metrics, alarms=alarms) as monitor:

        def step() -> None:
            training.model(torch.randn(2, 3)).square().mean().backward()
            training.optimizer.step()

        step()
        state = monitor.state_dict()
        monitor.log_batch([1, 1], epoch=0)
        step()
        assert training.model[0]._forward_hooks
        monitor.load_state_dict(state)
        assert not training.model[0]._forward_hooks
        step()
    assert alarms.samples == []


def test_a_parameter_that_no_rule_covers_by_then_ends_it_and_not_the_training() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Scaled(3))
    model[1].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = lipcore.PerSampleGradNorms(loss_reduction="mean", max_replay_bytes=0)
    alarms = Alarms(signals=["loss"], per_sample=2)
    monitor = lipcore.Monitor(model, optimizer, [lipcore.Trajectory(), norms], alarms=alarms)
    model[1].requires_grad_(True)
    monitor.metrics["trajectory"].rebind()
    monitor.log_batch([1, 1], epoch=0)
    model(torch.randn(2, 3)).mean().backward()
    with pytest.warns(RuntimeWarning, match=r"lipcore turned per_sample_grad_norm off: .*1\.weight"):
        optimizer.step()
    monitor.log()
    model[1].requires_grad_(False)
    monitor.rebind()
    assert norms.rests
    assert not model[0]._forward_hooks
    monitor.close()


class Mixing(nn.Module):
    """A layer of which no row depends on its own sample alone, and whose gradient does not tell."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1 + x.detach().mean(0))


class Failing(nn.Module):
    """No layer that is wrong; the test has the metric fail in another way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("layer", [Mixing, Failing])
def test_what_stops_the_metric_is_warned_of_and_the_training_goes_on(
    layer: type[nn.Module], alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), layer(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    norms = lipcore.PerSampleGradNorms(loss_reduction="mean")
    alarms = Alarms(signals=["loss"], per_sample=2)
    metrics = [norms] if alone else [lipcore.Trajectory(), norms]
    monitor = lipcore.Monitor(model, optimizer, metrics, alarms=alarms, window_steps=4)
    if layer is Failing:

        def fail(record: Any) -> None:
            raise RuntimeError("no memory")

        monkeypatch.setattr(norms, "observe_layers", fail)
    with pytest.warns(RuntimeWarning, match="^lipcore turned per_sample_grad_norm off: ") as caught:
        for step in range(1, 13):
            monitor.log_batch([step, step] if step == AT else [2 * step, 2 * step + 1], epoch=0)
            model(torch.randn(2, 3)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        monitor.close()
    assert len([one for one in caught if "turned" in str(one.message)]) == 1
    (found,) = alarms.samples
    assert (found.alarm, found.count) == (AT, 0)
    assert norms.off
    assert norms.off in found.message
    assert [window.last_step for window in monitor.history] == [4, 8, 12]
    assert not model[0]._forward_hooks
    lipcore.Monitor(model, optimizer, [norms]).close()
    assert not norms.warns_only  # there it is asked for


class Norms:
    """What stands for a pass's numbers."""

    def __init__(self, *values: float) -> None:
        self.per_sample = torch.tensor(values, dtype=torch.float64)


def told(*steps: list[float], back: bool = False, doubts: Sequence[str] = (), by: int | None = None) -> Any:
    found: list[Any] = []
    after = SamplesAfter(len(steps), lipcore.PerSampleGradNorms(loss_reduction="mean"), found.append, found.append)
    after.hear(AlarmEvent(9, "loss", "total", 4.0, "", by))
    after.between(10, 10)
    for i, values in enumerate(steps):
        after.begin_step(11 + i)
        if values:
            doubt = doubts[i] if doubts else ""
            after.step_samples([MicroBatch(Norms(*values), None, None)], doubt)  # type: ignore[arg-type]
        if back:
            after.samples_taken_back("samples were mixed")
        after.between(11 + i, 11 + i)
    (one,) = found
    return one


def test_the_end_is_that_of_an_alarm_behind_which_no_step_came_too() -> None:
    found: list[Any] = []
    after = SamplesAfter(2, lipcore.PerSampleGradNorms(loss_reduction="mean"), found.append, found.append)
    after.hear(AlarmEvent(9, "loss", "total", 4.0, ""))
    after.between(10, 10)
    after.end()
    after.step_samples([MicroBatch(Norms(1.0), None, None)], "")  # type: ignore[arg-type]
    after.end()
    assert found == after._found == []


def test_steps_whose_loss_is_not_known_say_so() -> None:
    """Theirs is a reason of the metric's own, not of the passes."""
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    alarms = Alarms(signals=["loss"], per_sample=2)
    metrics = [lipcore.Trajectory(), lipcore.PerSampleGradNorms(loss_reduction="auto")]
    with lipcore.Monitor(model, optimizer, metrics, alarms=alarms) as monitor:
        for step in range(1, 5):
            monitor.log_batch([step, step] if step == 1 else [2 * step, 2 * step + 1], epoch=0)
            model(torch.randn(2, 3)).square().mean().backward()
            optimizer.step()
    (found,) = alarms.samples
    assert "no gradient norms of samples in steps 2 to 3 (loss_reduction='auto' reads the loss's own" in found.message


def test_norms_that_are_not_finite_come_first_and_what_is_missing_is_said() -> None:
    one = told([1.0, float("nan"), 3.0], [float("inf"), 2.0])
    assert [(each.step, each.row) for each in one.largest] == [(11, 1), (12, 0), (11, 2), (12, 1), (11, 0)]
    assert one.median == 2.0
    assert "row 1 in step 11 (not finite), row 0 in step 12 (not finite), row 2 in step 11 (3, 1.5 times" in one.message
    assert told([float("nan")] * 2).message.endswith(
        "the gradient norms of all 2 samples in step 11 (2 steps behind it) are not finite"
    )
    assert told([]).message.endswith(
        "no gradient norms of samples in step 11 (2 steps behind it; no step has had a recorded backward pass)"
    )
    assert told([1.0], back=True).message.endswith("(2 steps behind it; they were taken back: samples were mixed)")


def test_an_alarm_of_another_rank_is_named_as_its_own_and_how_far_behind_it_the_steps_lie(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = told([1.0, 9.0, 1.0])
    assert (own.told_by, own.rank, own.behind) == (None, None, 2)
    monkeypatch.setattr(samples, "world_size", lambda: 4)
    monkeypatch.setattr(samples, "rank", lambda: 3)
    one = told([1.0, 9.0], [1.0], by=1)
    assert (one.alarm, one.first, one.last, one.told_by, one.rank, one.behind) == (9, 11, 12, 1, 3, 2)
    assert one.message.startswith(
        "after the alarm in step 9 on rank 1, of which rank 3 heard as windows were merged: the largest gradient norms "
        "of 3 samples of rank 3 in steps 11 to 12 (2 to 3 steps behind it): row 1 in step 11 (9,"
    )


def test_that_some_parameters_are_not_covered_is_said_beside_the_samples() -> None:
    training = Training()
    torch.manual_seed(0)
    training.model = nn.Sequential(nn.Linear(3, 4), Scaled(4), nn.Linear(4, 1))
    training.optimizer = torch.optim.SGD(training.model.parameters(), lr=0.1)
    training.norms = lipcore.PerSampleGradNorms(loss_reduction="mean", on_unsupported="skip", max_replay_bytes=0)
    (found,) = training.go().samples
    assert "over the covered parameters only: " in found.doubt


def test_what_is_not_proved_is_said_beside_the_samples(tmp_path: Path) -> None:
    """Also where the window closes with the last of the steps, and its doubts with it."""
    training = Training()
    training.norms = lipcore.PerSampleGradNorms(loss_reduction="mean", prove=False)
    (found,) = training.go(run=tmp_path / "a", window_steps=AT + ON).samples
    assert found.doubt == "not proved: prove=False was passed"
    assert f"of 12 samples in steps 6 to 8 ({found.doubt}): sample 72 in step 7 (" in found.message
    with lipcore.open_run(tmp_path / "a") as run:
        (event,) = [event for event in run.events if event.kind == "samples after an alarm"]
        assert event.data["doubt"] == found.doubt
        assert found.doubt in " ".join(str(run.postmortem()).split())


def test_the_first_doubt_of_all_steps_is_said_and_why_norms_are_nan() -> None:
    assert told([1.0], [2.0]).doubt == ""
    usual, beyond = told([1.0], [2.0], doubts=["", "no proof"]), told([1.0, 1.0], [2.5], doubts=["", "no proof"])
    assert not usual.stands_out
    assert usual.message.endswith(
        "no gradient norm of 2 samples in steps 11 to 12 (2 to 3 steps behind it; no proof) is beyond twice the "
        "median; the largest: row 0 in step 12 (2, 1.33 times the median)"
    )
    assert beyond.stands_out
    assert (
        "of 3 samples in steps 11 to 12 (2 to 3 steps behind it; no proof): row 0 in step 12 (2.5, 2.5 times "
        in beyond.message
    )
    assert told([float("nan")], [1.0]).stands_out
    assert told([float("nan")] * 2, doubts=["no rule"]).message.endswith(
        "the gradient norms of all 2 samples in step 11 (2 steps behind it; no rule) are not finite"
    )


def test_a_scale_that_nobody_knows_is_a_doubt_about_the_samples() -> None:
    training = Training()
    heard: list[str] = []

    class Listener(StepListener):
        def step_samples(self, batches: Sequence[MicroBatch], doubt: str) -> None:
            heard.append(doubt)

    with lipcore.Monitor(training.model, training.optimizer, [training.norms]) as monitor:
        training.norms.listen(Listener())
        for step in range(2):
            training.model(torch.randn(2, 3)).square().mean().backward()
            if step == 1:
                training.norms.observe_unknown_scale("a scale is in them")
            monitor.flush()
            training.optimizer.step()
    assert heard == ["", "not proved: a scale is in them"]


class Switch:
    """A SamplesAfter of two steps that the test drives, with what it has told."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.metric = lipcore.PerSampleGradNorms(loss_reduction="mean")
        self.after = SamplesAfter(2, self.metric, self.told.append, self.told.append)

    def on(self, step: int) -> None:
        self.after.hear(AlarmEvent(step, "loss", "total", 4.0, ""))
        self.after.between(step, step)

    def step(self, step: int, *values: float) -> None:
        self.after.begin_step(step)
        if values:
            self.after.step_samples([MicroBatch(Norms(*values), None, None)], "")  # type: ignore[arg-type]


def test_reasons_of_an_earlier_time_are_not_told() -> None:
    switch, nothing = Switch(), "in steps 10 to 11 (no step has had a recorded backward pass)"
    switch.after.samples_taken_back("while nothing was on")
    switch.metric._without_loss["an earlier reason"] += 1
    switch.on(9)
    switch.step(10)
    switch.after.samples_taken_back("of what a checkpoint ends")
    switch.after.forget()
    switch.on(9)
    switch.step(11)
    switch.after.between(11, 11)
    assert switch.told[-1].message.endswith(nothing)
    switch.on(11)
    switch.metric._without_loss["a reason of now"] += 1
    switch.after.between(13, 13)
    switch.metric._without_loss["a reason of later"] += 1
    assert switch.told[-1].message.endswith("in steps 12 to 13 (a reason of now)")


def test_norms_since_the_last_good_proof_alone_are_taken_back() -> None:
    switch = Switch()
    switch.on(9)
    switch.step(10, 1.0, 3.0)
    switch.after.samples_proved()
    switch.step(11, 7.0)
    switch.after.samples_taken_back("samples were mixed")
    switch.after.between(11, 11)
    assert [one.norm for one in switch.told[-1].largest] == [3.0, 1.0]
    assert switch.told[-1].doubt == "others were taken back: samples were mixed"


def test_norms_are_taken_back_on_their_way_from_a_device_too() -> None:
    class Copy:
        is_there = True

        def tensors(self) -> tuple[torch.Tensor]:
            return (torch.tensor([1.0, 3.0, 7.0], dtype=torch.float64).view(torch.int64),)

    switch = Switch()
    switch.on(9)
    switch.step(10, 1.0, 3.0)
    switch.after.samples_proved()
    switch.step(11, 7.0)
    facts = samples._Facts(AlarmEvent(9, "loss", "total", 4.0, ""), 10, 11, None, "", "")
    found, after = switch.after._found, switch.after
    after._copied.append((facts, found, Copy()))  # type: ignore[arg-type]
    after._found, after._first, after._wanted = [], None, None
    after.samples_taken_back("samples were mixed")
    after.end()
    assert [one.norm for one in switch.told[-1].largest] == [3.0, 1.0]


def test_what_is_no_count_and_metrics_without_norms_are_refused() -> None:
    with pytest.raises(ValueError, match="^per_sample: expected an integer >= 1 or None, got 0"):
        Alarms(per_sample=0)
    with pytest.raises(ValueError, match=r"^alarms: per_sample= switches .* add lipcore.PerSampleGradNorms"):
        lipcore.Monitor(nn.Linear(2, 1), metrics=[lipcore.Trajectory()], alarms=Alarms(per_sample=2))


def named_on_ranks(rank: int, folder: str, name: str) -> dict[str, Any]:
    torch.manual_seed(rank)
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    alarms = Alarms(signals=["loss"], per_sample=ON)
    metrics = [lipcore.Trajectory(), lipcore.PerSampleGradNorms(loss_reduction="mean")]
    expected: dict[int, list[float]] = {}
    with lipcore.watch(
        model, optimizer, metrics=metrics, run=f"{folder}/{name}", window_steps=4, alarms=alarms
    ) as monitor:
        for step in range(1, 17):
            x = torch.randn(2, 3)
            each = model(x)[:, 0].square()
            monitor.log(loss=each.mean())
            monitor.log_batch([1, 1] if rank == 1 and step == 3 else [10 * step, 10 * step + 1], epoch=0)
            inputs = torch.cat([x, torch.ones(2, 1)], dim=1).norm(dim=1)
            expected[step] = (2 * each.detach().sqrt() * inputs).tolist()
            each.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    own = [window["per_sample_grad_norm"].norm["total"].mean.count for window in monitor.history]
    merged = [window["per_sample_grad_norm"].norm["total"].mean for window in monitor.global_history]
    return {
        "samples": [(one.alarm, one.first, one.last, one.count, one.largest[0].norm) for one in alarms.samples],
        "told": [(one.told_by, one.rank, one.behind, one.message) for one in alarms.samples],
        "recorded": [
            (event.data.get("told_by"), event.text)
            for event in lipcore.open_run(f"{folder}/{name}", rank).events
            if event.kind == "samples after an alarm"
        ],
        "expected": expected,
        "own": own,
        "merged": [(value.count, value.value, value.valid) for value in merged],
    }


@pytest.mark.ci
def test_ranks_of_which_one_is_awake_and_the_other_rests_merge_their_windows(tmp_path: Path) -> None:
    """The rank whose alarm it is measures steps 4 to 6; the other hears of it where windows 1 to 4 are merged."""
    found = run_ways(tmp_path, named_on_ranks, {"a": {}})["a"]
    awake = [range(6, 9), range(4, 7)]
    everything: list[list[float]] = [[], [], [], []]  # by window, of which the last is merged at the end
    for one, steps in zip(found, awake, strict=True):
        ((alarm, first, last, count, largest),) = one["samples"]
        norms = [norm for step in steps for norm in one["expected"][str(step)]]
        assert (alarm, first, last, count) == (3, steps[0], steps[-1], 2 * ON)
        assert largest == pytest.approx(max(norms), rel=1e-5)
        for step in steps:
            everything[(step - 1) // 4] += one["expected"][str(step)]
    said = [
        "after the alarm in step 3 on rank 1, of which rank 0 heard as windows were merged: ",
        "after the alarm in step 3: ",
    ]
    which = ["6 samples of rank 0 in steps 6 to 8 (3 to 5 steps behind it)", "6 samples of rank 1 in steps 4 to 6"]
    for i, (one, by, behind) in enumerate(zip(found, (1, None), (3, 1), strict=True)):
        ((*facts, message),) = one["told"]
        assert facts == [by, i, behind]
        assert message.startswith(said[i])
        assert which[i] in message
        assert one["recorded"] == [[by, message]]
    assert [one["own"] for one in found] == [[0, 6, 0, 0], [2, 4, 0, 0]]
    assert found[0]["merged"] == found[1]["merged"]
    for norms, (count, mean, valid) in zip(everything, found[0]["merged"], strict=True):
        assert count == len(norms)
        assert valid == bool(norms)
        assert not norms or mean == pytest.approx(np.mean(norms), rel=1e-5)
