"""Ranks that share the parameters which they hold alike: windows of all ranks are those without shares, and each rank
keeps its share alone."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from rank_runs import Found, assert_right, run_situations
from split_situations import situations
from torch import nn

from lipcore import Monitor, Trajectory
from lipcore.distributed.group import Group
from lipcore.distributed.ownership import Ownership, describe
from lipcore.distributed.shares import Shares
from lipcore.trajectory.gradient_norms import Gradients
from lipcore.trajectory.groups import by_block
from lipcore.trajectory.parameters import find_watched
from lipcore.trajectory.tracker import Tracker

RIGHT = {2: ("ddp", "ddp_snapshot", "ddp_updates", "fsdp2", "tensor_parallel"), 4: ("hsdp",)}
REFUSED = {
    "independent": r"ValueError: parameter 'a.weight' has other values on rank 1 than on rank 0",
    "apart": r"ValueError: split_replicas: with group=None each rank trains a model of its own",
    "pipeline": r"ValueError: parameter 'stages.\d.*': rank \d leaves it to another rank \(split_replicas\)",
    "too_many": r"ValueError: split_replicas: 2 ranks hold the same 1 parameters, and each of them has to keep one",
}

OTHERS = ("local_windows", "sometimes_unused", "unused", "frozen", "rebinds")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> dict[int, Found]:
    """What every rank has found, by number of ranks."""
    return {}


def found_of(runs: dict[int, Found], ranks: int, name: str, tmp_path_factory: Any) -> list[Any]:
    if ranks not in runs:
        runs[ranks] = run_situations(tmp_path_factory.mktemp("ranks"), "split_situations", ranks)
    return runs[ranks][name]


def test_every_situation_is_in_the_table() -> None:
    assert sorted(name for name, *_ in situations(2)) == sorted([*RIGHT[2], *REFUSED, *OTHERS])
    assert sorted(name for name, *_ in situations(4)) == sorted(RIGHT[4])


@pytest.mark.ci
@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks, names in RIGHT.items() for name in names])
def test_windows_of_all_ranks_are_those_without(
    runs: dict[int, Found], ranks: int, name: str, tmp_path_factory: Any
) -> None:
    each = found_of(runs, ranks, name, tmp_path_factory)
    for numbers in each:
        assert_right(numbers)
        assert numbers["apart"] <= 1e-12
    if name == "fsdp2":
        assert all(numbers["copies"][0] == numbers["copies"][1] for numbers in each)
        return
    assert all(numbers["bytes"][0] < numbers["bytes"][1] for numbers in each)
    if name == "ddp":
        kept = [one for numbers in each for one in numbers["kept"]]
        assert len(set(kept)) == len(kept) == 6
        shared, whole = (sum(numbers["copies"][i] for numbers in each) for i in (0, 1))
        assert 2 * shared == whole


@pytest.mark.ci
@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_all_ranks(runs: dict[int, Found], name: str, tmp_path_factory: Any) -> None:
    errors = found_of(runs, 2, name, tmp_path_factory)
    assert len(errors) == 2
    for error in errors:
        assert isinstance(error, str), error
        assert re.search(REFUSED[name], error), error


@pytest.mark.ci
def test_a_rank_s_own_windows(runs: dict[int, Found], tmp_path_factory: Any) -> None:
    for numbers in found_of(runs, 2, "local_windows", tmp_path_factory):
        assert_right(numbers)
        assert numbers["scope"] == "shard"
        assert numbers["places"] == sorted(numbers["kept"])
        assert numbers["details"] == 6 - len(numbers["kept"])


@pytest.mark.ci
@pytest.mark.parametrize("name", ["sometimes_unused", "unused"])
def test_steps_without_gradients_are_those_without(runs: dict[int, Found], name: str, tmp_path_factory: Any) -> None:
    for numbers in found_of(runs, 2, name, tmp_path_factory):
        assert isinstance(numbers, dict), numbers
        assert numbers["gradients"] > 0
        assert not numbers["keys"]
        assert not numbers["apart"]


@pytest.mark.ci
def test_a_share_that_is_frozen(runs: dict[int, Found], tmp_path_factory: Any) -> None:
    each = found_of(runs, 2, "frozen", tmp_path_factory)
    for numbers in each:
        assert isinstance(numbers, dict), numbers
        assert "split_replicas: all parameters that one of 2 ranks keeps" in numbers["said"]
    assert sorted(name for numbers in each for name in numbers["kept"]) == ["1.weight", "2.weight"]


@pytest.mark.ci
def test_rebind_before_windows_are_merged(runs: dict[int, Found], tmp_path_factory: Any) -> None:
    for numbers in found_of(runs, 2, "rebinds", tmp_path_factory):
        assert isinstance(numbers, dict), numbers
        assert numbers["windows"] == 4
        assert not numbers["last"]  # there is another reference
        assert not numbers["off"]
        assert not numbers["apart"]
        assert set(numbers["missing"]) <= {"path_length.cumulative", "directness.last"}


def test_gradients_of_what_other_ranks_watch() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 1, bias=False), "b": nn.Linear(2, 1, bias=False)})
    a, b = find_watched(model, by_block, None)
    steps = Tracker([a])
    alone, shared = (Gradients([a], 512, 1, ["grad_norm"], steps, by_name=True, others=others) for others in ([], [b]))
    model["b"](torch.ones(1, 2)).sum().backward()
    for gradients in (alone, shared):
        gradients.observe_before_clipping()
        gradients.observe_step()
    assert not alone.trackers["grad_norm"].seen
    assert shared.trackers["grad_norm"].seen == 1


def sizes(*elements: int) -> list[tuple[str, torch.Tensor]]:
    return [(f"p{i}", torch.zeros(size)) for i, size in enumerate(elements)]


def kept_by(parameters: Any, ranks: int, shares: list[Shares]) -> list[set[str]]:
    numbers = tuple(range(ranks))
    return [one.mine(parameters, Group(None, numbers, place)) for place, one in enumerate(shares)]


def test_shares_are_even_and_stay() -> None:
    shares = [Shares() for _ in range(3)]
    parameters = sizes(50, 10, 20, 30, 40, 30)
    found = kept_by(parameters, 3, shares)
    assert sorted(name for each in found for name in each) == sorted(name for name, _ in parameters)
    of = dict(parameters)
    assert {sum(of[name].numel() for name in each) for each in found} == {60}
    more = kept_by([*parameters[1:], ("q", torch.zeros(100))], 3, shares)
    for before, after in zip(found, more, strict=True):
        assert before - {"p0"} <= after
    assert sorted(name for each in more for name in each) == sorted([*dict(parameters[1:]), "q"])


def test_each_rank_keeps_something() -> None:
    found = kept_by(sizes(1000, 0, 0, 1), 4, [Shares() for _ in range(4)])
    assert all(len(each) == 1 for each in found)
    with pytest.raises(ValueError, match=r"split_replicas: 4 ranks hold the same 3 parameters"):
        kept_by(sizes(1000, 1, 1), 4, [Shares() for _ in range(4)])


def test_a_share_of_which_nothing_is_left() -> None:
    shares = [Shares() for _ in range(2)]
    parameters = sizes(100, 10, 10)
    found = kept_by(parameters, 2, shares)
    assert {"p0"} in found
    for place, one in enumerate(shares):
        with pytest.raises(
            ValueError, match=r"split_replicas: all parameters that one of 2 ranks keeps .*new Trajectory"
        ):
            one.mine(parameters[1:], Group(None, (0, 1), place))
    assert kept_by(parameters, 2, shares) == found


def test_one_process_has_everything() -> None:
    model = nn.Linear(3, 1)
    with Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), [Trajectory(split_replicas=True)]) as monitor:
        assert "split_replicas" not in str(monitor.plan())
        monitor.step()
        assert monitor.compute().scope == "global"  # type: ignore[union-attr]


def test_a_part_that_nobody_keeps() -> None:
    tensors = [("a", "g", torch.ones(2)), ("b", "g", torch.ones(3))]
    both = [describe(tensors, {"a"}), describe(tensors, {"b"})]
    assert [Ownership.of(both, (0, 1), here).mine for here in (0, 1)] == [{"a"}, {"b"}]
    assert Ownership.of([both[1], describe(tensors)], (0, 1), 0).mine == {"b"}
    with pytest.raises(ValueError, match="parameter 'b': rank 0 leaves it to another rank"):
        Ownership.of([both[0], both[0]], (0, 1), 0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "sketch"}, "split_replicas: mode 'sketch' keeps nothing of single parameters"),
        ({"mode": "auto", "memory_budget": 10**6}, "split_replicas: mode 'auto' may choose another mode on each rank"),
        ({"mode": "updates", "source": "explicit"}, "split_replicas: source 'explicit' is given what has moved"),
    ],
)
def test_what_cannot_be_shared(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Trajectory(split_replicas=True, **settings)
    with pytest.raises(TypeError, match="split_replicas: expected True or False, got 2"):
        Trajectory(split_replicas=2)  # type: ignore[arg-type]
