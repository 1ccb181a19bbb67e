"""The check of movement in the pass of the trajectory's step: the numbers of two passes, and what it refuses."""

from __future__ import annotations

import copy
import math
import weakref
from typing import Any

import pytest
import torch
from oracle import same_bits
from torch import Tensor, nn

import lipcore
from lipcore import _core, functional
from lipcore.alarms import Alarms
from lipcore.functional.update_rules import UpdateRule
from lipcore.functional.update_sums import MOMENTUM, UNEXPLAINED
from lipcore.trajectory.mean_ring import quotients
from lipcore.trajectory.parameters import WatchedParameter
from lipcore.trajectory.sources import OptimizerSource
from lipcore.trajectory.table import Table
from lipcore.trajectory.tracker import Tracker

ADAMW = UpdateRule.of_step(1e-3, shrink=1e-5, first_scale=2.0, second_scale=3.0, eps=1e-8, adaptive=True)
NESTEROV = UpdateRule.of_step(0.1, 0.09, 1e-3, momentum=True)
RULES = [ADAMW, NESTEROV, UpdateRule(0.1), UpdateRule(), ADAMW]
SHAPES = [(300, 500), (7,), (65536,), (3, 5), ()]
CHECKED = [0, 1, 3, 4]  # not the third
UNITS = [1e-12, 2e-12, 3e-12, 4e-12]


class Stepped:
    """Tensors after a step, with what moved them, and a tracker of them that has not seen the step yet."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)

        def some(of: torch.dtype = dtype) -> list[Tensor]:
            return [torch.randn(shape, generator=generator).to(of) for shape in SHAPES]

        self.owner: dict[str, Tensor] = {str(i): tensor for i, tensor in enumerate(some())}
        watched = [WatchedParameter(self.owner, name, name, "01"[i % 2]) for i, name in enumerate(self.owner)]
        self.tracker = Tracker(watched, ring=8)
        self.first, self.second = some(torch.float32), [t.abs() + 1e-3 for t in some(torch.float32)]
        for tensor, moved in zip(self.owner.values(), some(), strict=True):
            tensor.add_(moved, alpha=0.01)
        self.recent = torch.zeros(8, len(SHAPES), 2, dtype=torch.float64)

    @property
    def previous(self) -> list[Tensor]:
        assert self.tracker.copies is not None
        return self.tracker.copies.prev

    def taken(self, **other: Any) -> dict[str, Any]:
        lists = {"params": list(self.owner.values()), "first": self.first, "second": self.second, "rules": RULES}
        lists["previous"] = self.previous
        return {name: [tensors[i] for i in CHECKED] for name, tensors in lists.items()} | other

    def check(self) -> _core.MovementCheck:
        return _core.MovementCheck(self.recent, CHECKED, UNITS)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_pass_has_the_numbers_of_two(dtype: torch.dtype, threads: int) -> None:
    one, two = Stepped(dtype), Stepped(dtype)
    rows, squares = functional.update_sums(**two.taken())
    assert not two.tracker.step()
    check, before = one.check(), torch.get_num_threads()
    check.take(**one.taken())
    torch.set_num_threads(threads)
    try:
        assert not one.tracker.step_with(check)
    finally:
        torch.set_num_threads(before)
    for mine, theirs in ((one.tracker.table.rows, two.tracker.table.rows), (one.previous, two.previous)):
        assert all(map(same_bits, mine, theirs))
    sizes = rows[:, 0] + rows[:, 3]
    mixes = torch.tensor([RULES[i].mix for i in CHECKED], dtype=torch.float64)
    sizes = sizes + squares[MOMENTUM].nan_to_num(0) * mixes**2
    found = one.recent[0, CHECKED]
    assert same_bits(found[:, 0], squares[UNEXPLAINED])
    torch.testing.assert_close(found[:, 1], torch.tensor(UNITS, dtype=torch.float64) * sizes, rtol=1e-15, atol=0)
    assert one.recent[0, 2].isnan().all()
    assert not one.recent[1:].any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_tensor_that_is_not_finite_is_not_known_and_others_are(value: float) -> None:
    one, good = Stepped(), Stepped()
    one.first[0][3, 4] = value  # the update, and not the parameter
    one.owner["1"][2] = value
    for stepped in (one, good):
        check = stepped.check()
        check.take(**stepped.taken())
        stepped.tracker.step_with(check)
    assert one.recent[0, :3].isnan().all()
    assert same_bits(one.recent[0, 3:], good.recent[0, 3:])


def test_what_was_taken_is_of_one_step() -> None:
    stepped = Stepped()
    check, before = stepped.check(), [t.clone() for t in stepped.previous]
    with pytest.raises(ValueError, match=r"^check: has taken no step of these parameters; call take\(\)"):
        stepped.tracker.step_with(check)
    assert all(map(same_bits, stepped.previous, before))
    check.take(**stepped.taken())
    stepped.tracker.step_with(check)
    with pytest.raises(ValueError, match="has taken no step"):
        stepped.tracker.step_with(check)
    check.take(**stepped.taken())
    check.drop()
    with pytest.raises(ValueError, match="has taken no step"):
        stepped.tracker.step_with(check)


def test_what_it_refuses() -> None:
    stepped = Stepped()
    check = stepped.check()
    taken = stepped.taken()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({name: entries[:3] for name, entries in taken.items()}, "^params: expected 4 tensors, one per place, got 3"),
        (taken | {"previous": [None, *taken["previous"][1:]]}, r"^previous\[0\]: is missing"),
        (taken | {"previous": None}, r"^previous\[0\]: is missing"),
        (taken | {"first": [torch.zeros(2), *taken["first"][1:]]}, r"^first\[0\]: expected shape"),
        (taken | {"rules": RULES[:1]}, "^rules: expected 4 rules"),
    ]
    for lists, words in wrong:
        check.take(**taken)
        with pytest.raises(ValueError, match=words):
            check.take(**lists)
        with pytest.raises(ValueError, match="has taken no step"):  # nor what was taken before
            stepped.tracker.step_with(check)
    with pytest.raises(ValueError, match=r"^places\[1\]: expected rising numbers of the ring's 5 tensors, got 0"):
        _core.MovementCheck(stepped.recent, [0, 0], UNITS[:2])
    with pytest.raises(ValueError, match="^units_sq: expected 4, one per place, got 1"):
        _core.MovementCheck(stepped.recent, CHECKED, UNITS[:1])
    with pytest.raises(ValueError, match="^recent: expected a float64 CPU tensor"):
        _core.MovementCheck(torch.zeros(2, 3), CHECKED, UNITS)


def test_state_in_another_layout_is_checked_too() -> None:
    """It is copied, in a pass of its own."""
    scores = []
    for transposed in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(40, 30)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        alarms = Alarms(signals=["unexplained_movement"])
        trajectory = lipcore.Trajectory()
        with lipcore.Monitor(model, optimizer, [trajectory], alarms=alarms):
            for step in range(6):
                model(torch.randn(4, 40)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                state = optimizer.state[model.weight]
                if transposed:
                    state["exp_avg"] = state["exp_avg"].t().contiguous().t()
                if step == 3:
                    model.weight.data[0] *= 1.01
            assert trajectory.checks_movement
        scores.append([(event.step, event.place, event.score) for event in alarms.events])
    assert scores[0] == scores[1]
    assert [found[:2] for found in scores[0]] == [(5, "weight")]


def test_a_refused_step_lets_go_of_what_was_taken() -> None:
    stepped = Stepped()
    stepped.first = [tensor.clone() for tensor in stepped.first]
    state, check = weakref.ref(stepped.first[0]), stepped.check()
    check.take(**stepped.taken())
    del stepped.owner["1"]
    with pytest.raises(ValueError, match="parameter '1' was removed"):
        stepped.tracker.step_with(check)
    stepped.first = []
    assert state() is None


def test_quotients_of_tensors_groups_and_all() -> None:
    table = Table([0, 1, 0], 3, 4, torch.device("cpu"))
    recent = torch.rand(4, 3, 2, dtype=torch.float64)
    recent[1, 0], recent[2], recent[3, 2, 1] = torch.nan, torch.nan, torch.inf
    found = quotients(recent, 3, 7, table)  # in the ring: 3, 0, 1, 2
    known = recent[[3, 0, 1, 2]].where(recent[[3, 0, 1, 2]].isfinite().all(dim=2, keepdim=True), 0.0)
    sums = torch.stack([*known.unbind(1), known[:, 0] + known[:, 2], known[:, 1], 0 * known[:, 0], known.sum(1)], 1)
    torch.testing.assert_close(found, (sums[..., 0] / sums[..., 1]).sqrt(), equal_nan=True, rtol=1e-14, atol=0)
    assert found[:, 5].isnan().all()
    with pytest.raises(ValueError, match="^recent: expected a float64 CPU tensor"):
        _core.step_quotients(recent, 0, 5, table.group_of_on_host, 3, found)
    with pytest.raises(ValueError, match="^out: expected a float64 CPU tensor"):
        _core.step_quotients(recent, 0, 2, table.group_of_on_host, 3, found)
    with pytest.raises(ValueError, match=r"^group_of\[1\]: is not one of the groups"):
        _core.step_quotients(recent, 0, 4, table.group_of_on_host, 1, torch.empty(4, 5, dtype=torch.float64))


def test_what_moved_parameters_is_as_the_optimizer_is_now() -> None:
    """Groups and state are looked up once for as long as they stay, and no longer."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    owner: dict[str, Any] = dict(model.named_parameters())
    parameters = [(name, owner, name) for name in owner]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    source = OptimizerSource(optimizer, parameters)

    def check() -> None:
        model(torch.randn(2, 3)).sum().backward()
        optimizer.step()
        found, fresh = source.moves(), OptimizerSource(optimizer, parameters).moves()
        assert found is not None
        assert fresh is not None
        assert found.rules == fresh.rules
        states = [optimizer.state[parameter] for parameter in owner.values()]
        assert all(one is state["exp_avg"] for one, state in zip(found.first, states, strict=True))
        assert all(one is state["exp_avg_sq"] for one, state in zip(found.second, states, strict=True))
        rows, squares = source.sums()
        expected = functional.update_sums(*found)
        assert same_bits(rows, expected[0])
        assert same_bits(squares[:UNEXPLAINED].nan_to_num(-1), expected[1][:UNEXPLAINED].nan_to_num(-1))

    check()
    check()
    moved = optimizer.param_groups[0]["params"].pop(1)
    optimizer.add_param_group({"params": [moved], "lr": 0.1})
    check()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    check()
    optimizer.param_groups[1]["lr"] = 0.2
    check()
    model[1].bias.grad = None
    optimizer.step()
    found = source.moves()
    assert found is not None
    assert found.first[3] is None
    assert found.rules[3] == UpdateRule()
    optimizer.param_groups[0]["params"].pop()
    with pytest.raises(ValueError, match="parameter '1.bias' of the model is not the optimizer's any more"):
        source.moves()
