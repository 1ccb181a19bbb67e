"""The state of a Trajectory: saved, loaded and gone on with bit for bit; what does not fit is refused by name."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from few import few, spread
from oracle import DTYPES, assert_same_state
from paths import Path, check, mlp, observe, tensors_of, train, walk
from torch import Tensor, nn

from lipcore import Monitor, Trajectory


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # tensors, numbers and strings only


def some_steps(trajectory: Trajectory, model: nn.Module, seed: int = 1) -> None:
    train(model, 4, trajectory.update, seed=seed)
    trajectory.reset()
    train(model, 3, trajectory.update, seed=seed + 1)


def test_state_does_not_alias_live_parameters() -> None:
    model = mlp()
    trajectory = Trajectory(model)
    some_steps(trajectory, model)
    state, numbers = trajectory.state_dict(), trajectory.compute().to_dict()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(777)
    assert_same_state(trajectory.state_dict(), state)
    assert trajectory.compute().to_dict() == numbers
    tracker = state["trackers"]["exact"]
    for tensor in (tracker["rows"], *(t for kinds in tracker["tensors"].values() for t in kinds.values())):
        tensor.fill_(55)  # nor does a state that was handed out alias the trajectory
    assert trajectory.compute().to_dict() == numbers


# ---- going on


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", [copy.copy, through_a_file])
def test_save_and_restart_continue_bit_for_bit(way: Callable[[Any], Any], dtype: str) -> None:
    model = mlp(DTYPES[dtype])
    trajectory = Trajectory(model, every_steps=2)
    some_steps(trajectory, model)
    state = way(trajectory.state_dict())
    twin = copy.deepcopy(model)
    restarted = Trajectory(twin, every_steps=2)
    restarted.load_state_dict(state)
    assert_same_state(restarted.state_dict(), trajectory.state_dict())
    some_steps(trajectory, model, seed=9)
    some_steps(restarted, twin, seed=9)
    assert_same_state(restarted.state_dict(), trajectory.state_dict())
    assert restarted.compute().to_dict() == trajectory.compute().to_dict()


SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {},
    "every_third": {"every_steps": 3},
    "per_element": {"stats": ["variance", "element_variance", "path_length"]},
    "sliding": {"window_blocks": 3},
    "sliding_per_element": {"window_blocks": 3, "stats": ["element_variance"]},
    "snapshot": {"mode": "updates", "source": "snapshot"},
    "optimizer": {"mode": "updates", "source": "optimizer"},
    "gradients": {"stats": ["grad_norm", "clipped_grad_norm", "update_norm", "variance"]},
}


class Loop:
    """Training with Adam that can be stopped and begun again elsewhere."""

    def __init__(self, settings: dict[str, Any], saved: dict[str, Any] | None = None, **windows: int) -> None:
        self.model = mlp()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        if saved:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
        self.metric = Trajectory(**settings)
        self.monitor = Monitor(self.model, self.optimizer, metrics=[self.metric], **windows)
        if saved:
            self.monitor.load_state_dict(saved["monitor"])

    def run(self, first: int, last: int) -> None:
        for t in range(first, last):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(t))
            self.optimizer.zero_grad()
            self.model(x).square().mean().backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.05)
            self.optimizer.step()

    def saved(self) -> dict[str, Any]:
        loop = {"model": self.model, "optimizer": self.optimizer, "monitor": self.monitor}
        return through_a_file({key: part.state_dict() for key, part in loop.items()})


@pytest.mark.parametrize("case", few(SETTINGS, 1))
def test_a_loop_goes_on_as_if_it_had_not_been_stopped(case: str) -> None:
    """In every mode, before and after the first 512 steps and over the ends of blocks, with and without closed ones."""
    windows = {"window_steps": 1800, "window_blocks": 3} if "sliding" in case else {"window_steps": None}
    whole, half, done = Loop(SETTINGS[case], **windows), Loop(SETTINGS[case], **windows), 0
    resumed = []
    for at, end in ((5, 520), (512, 1030), (700, 1030)):
        half.run(done, at)
        saved, done = half.saved(), at
        resumed.append((Loop(SETTINGS[case], saved, **windows), at, end))
        assert_same_state(through_a_file(resumed[-1][0].monitor.state_dict()), saved["monitor"])
        assert resumed[-1][0].monitor.compute().to_dict() == half.monitor.compute().to_dict()
    done = 0
    for loop, at, end in resumed:
        loop.run(at, end)
        whole.run(done, end)
        done = end
        assert_same_state(loop.monitor.state_dict(), whole.monitor.state_dict())
        assert loop.monitor.compute().to_dict() == whole.monitor.compute().to_dict()
        if "element" in case:
            assert_same_state(loop.metric.element_variance(), whole.metric.element_variance())
    other = whole.metric.drain()
    for loop, _, _ in resumed[1:]:
        one = loop.metric.drain()
        assert torch.equal(one.steps, other.steps)
        assert torch.equal(one.update_norm, other.update_norm)
        assert one.lost == other.lost


def test_updates_that_are_given() -> None:
    tensors = tensors_of()

    def step(*trajectories: Trajectory) -> None:
        updates = {name: 0.1 * torch.randn(t.shape) for name, t in tensors.items()}
        for name, tensor in tensors.items():
            tensor.add_(updates[name])
        for trajectory in trajectories:
            trajectory.update(updates)

    whole, half = (Trajectory(tensors.items(), source="explicit") for _ in range(2))
    for _ in range(600):
        step(whole, half)
    resumed = Trajectory(tensors.items(), source="explicit")
    resumed.load_state_dict(through_a_file(half.state_dict()))
    for _ in range(3):
        step(whole, resumed)
    assert_same_state(resumed.state_dict(), whole.state_dict())
    assert resumed.compute().to_dict() == whole.compute().to_dict()


def test_a_state_is_taken_over_whatever_was_there_before() -> None:
    """Earlier blocks, closed blocks and quantiles of the one that loads are gone."""
    tensors = tensors_of()
    short, long = (Trajectory(tensors.items(), window_blocks=2, stats=["element_variance", "variance"]) for _ in "ab")
    path = Path(tensors)
    fresh = through_a_file(short.state_dict())
    for _ in range(2):
        walk(tensors, 600, long.update)
        long.advance()
    long.load_state_dict(fresh)
    assert_same_state(long.state_dict(), fresh)
    for name, values in path.points[0].items():
        tensors[name].copy_(values.reshape(tensors[name].shape))
    walk(tensors, 4, observe(long, path))
    for name, found in long.element_variance().items():
        assert torch.allclose(found.double(), path.element_variance(name), rtol=1e-4, atol=0)


def test_after_steps_that_were_left_out() -> None:
    tensors = tensors_of()
    trajectory, path = Trajectory(tensors.items()), Path(tensors)
    walk(tensors, 5, observe(trajectory, path), nan_at={0: ("a.bias",), 4: ("b.weight",)})
    resumed = Trajectory(tensors.items())
    resumed.load_state_dict(through_a_file(trajectory.state_dict()))
    walk(tensors, 4, observe(resumed, path), seed=2)
    check(resumed.compute(), path)


# ---- refusals

Change = Callable[[dict[str, Any]], object]


def without(key: str) -> Change:
    return lambda state: state.pop(key)


def with_(key: str, value: Any) -> Change:
    return lambda state: state.__setitem__(key, value)


def exact(change: Change) -> Change:
    """A change of what the tracker of exact mode has saved."""
    return lambda state: change(state["trackers"]["exact"])


def tensor(kind: str, value: Tensor | None) -> Change:
    """A change of one parameter's copies."""
    return exact(lambda tracker: tracker["tensors"]["0.weight"].__setitem__(kind, value))


CORRUPT: dict[str, tuple[Change, str]] = {
    **{f"without_{key}": (without(key), key) for key in ("version", "names", "groups", "every_steps", "steps_seen")},
    "without_trackers": (without("trackers"), "trackers"),
    "version": (with_("version", 99), "version"),
    "names": (with_("names", ["a", "b"]), "names"),
    "groups": (with_("groups", ["a", "b"]), "groups"),
    "every_steps": (with_("every_steps", 3), "every_steps"),
    "ring": (with_("ring", 3), "ring"),
    "mode": (with_("mode", "sketch"), "mode"),
    "steps_seen_text": (with_("steps_seen", "many"), "steps_seen"),
    "steps_seen_none": (with_("steps_seen", None), "steps_seen"),
    "trackers_list": (with_("trackers", []), "trackers"),
    "trackers_none": (with_("trackers", None), "trackers"),
    "tracker_none": (lambda s: s["trackers"].update(exact=None), "exact"),
    "tracker_unknown": (lambda s: s["trackers"].update(other={}), "other"),
    "rows_shape": (exact(with_("rows", torch.zeros(2, 2, dtype=torch.float64))), "exact.rows"),
    "rows_dtype": (exact(lambda t: t.update(rows=t["rows"].float())), "exact.rows"),
    "rows_list": (exact(lambda t: t.update(rows=t["rows"].tolist())), "exact.rows"),
    "without_rows": (exact(without("rows")), "rows"),
    "groups_of_rows": (exact(lambda t: t["rows"].__setitem__((0, -1), 7e9)), r"exact\.rows: the groups"),
    "groups_nan": (exact(lambda t: t["rows"].__setitem__((0, -1), math.nan)), r"exact\.rows: the groups"),
    "cursor_negative": (exact(lambda t: t["cursor"].__setitem__(0, -5)), r"exact\.cursor"),
    "cursor_nan": (exact(lambda t: t["cursor"].__setitem__(0, math.nan)), r"exact\.cursor"),
    "cursor_fraction": (exact(lambda t: t["cursor"].__setitem__(0, 6.5)), r"exact\.cursor"),
    "settled": (exact(with_("settled", -1)), "settled"),
    "settled_late": (exact(with_("settled", 99)), r"exact\.settled: 99 steps"),
    "open_steps": (exact(with_("open_steps", 512)), r"exact\.open_steps"),
    "drained": (exact(lambda t: t["recent"].update(drained=99)), r"exact\.recent\.drained: 99 steps"),
    "absorbed": (exact(lambda t: t["recent"].update(absorbed=99)), r"exact\.recent\.absorbed: 99 steps"),
    "trackers_number": (with_("trackers", 5), "trackers"),
    "gradients": (with_("gradients", {"grad_norm": {}}), "gradients"),
    "closed": (exact(with_("closed", [{}])), "closed"),
    "recent": (exact(with_("recent", {})), "recent"),
    "distributions": (exact(with_("distributions", [])), "distributions"),
    "distribution": (exact(lambda t: t["distributions"][3].update(version=7)), r"distributions\[3\]: version"),
    "tensors_list": (exact(with_("tensors", [])), "tensors"),
    "tensors_none": (exact(with_("tensors", None)), "tensors"),
    "tensor_missing": (exact(lambda t: t["tensors"].pop("0.bias")), r"0\.bias"),
    "copies_missing": (exact(lambda t: t["tensors"]["0.bias"].pop("deviation")), r"0\.bias.*deviation"),
    "copies_unknown": (tensor("median", torch.zeros(3)), r"0\.weight.*median"),
    "copies_shape": (tensor("prev", torch.zeros(3)), r"0\.weight\.prev"),
    "copies_dtype": (tensor("ref", torch.zeros(8, 6, dtype=torch.float64)), r"0\.weight\.ref"),
    "copies_none": (tensor("ref", None), r"0\.weight\.ref"),
}


@pytest.mark.parametrize("case", spread(CORRUPT, 2))
def test_a_state_that_does_not_fit_changes_nothing(case: str) -> None:
    corrupt, words = CORRUPT[case]
    model = mlp()
    trajectory = Trajectory(model)
    some_steps(trajectory, model)
    before, numbers = trajectory.state_dict(), trajectory.compute().to_dict()
    other = mlp(seed=3)
    source = Trajectory(other)
    some_steps(source, other, seed=5)
    state = source.state_dict()
    corrupt(state)
    with pytest.raises(ValueError, match=words):
        trajectory.load_state_dict(state)
    assert_same_state(trajectory.state_dict(), before)
    assert trajectory.compute().to_dict() == numbers


def test_state_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="names"):
        Trajectory(mlp()).load_state_dict(Trajectory(nn.Linear(3, 3)).state_dict())
    with pytest.raises(ValueError, match=r"weight\.prev: .*float32.*float64"):
        Trajectory(nn.Linear(6, 8)).load_state_dict(Trajectory(nn.Linear(6, 8).double()).state_dict())
    with pytest.raises(ValueError, match="prev"):
        Trajectory(nn.Linear(60, 80)).load_state_dict(Trajectory(nn.Linear(6, 8)).state_dict())


@pytest.mark.parametrize("seed", [29, *range(8)])
def test_a_state_of_points_that_hardly_differ_is_loaded(seed: int) -> None:
    """Rounding may leave a block of two points with a variance below 0, which no state holds."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = Monitor(model, optimizer, [Trajectory()], window_steps=4, window_blocks=2)
    for _ in range(3):
        optimizer.zero_grad()
        (model(torch.randn(6, 5)) - torch.randn(6, 1)).square().mean().backward()
        optimizer.step()
    state = monitor.state_dict()
    monitor.close()
    again = Monitor(model, optimizer, [Trajectory()], window_steps=4, window_blocks=2)
    again.load_state_dict(state)
    again.close()
