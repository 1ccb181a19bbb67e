"""Saved states that do not fit, of everything that has a state: refused by the key's name, and nothing changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from few import few
from models import batches, mlp, seeded
from torch import Tensor, nn

from lipcore import Distribution, Lipschitz, Monitor, PerSampleGradNorms, SampleScores, TensorStats, Trajectory
from lipcore.per_sample.noise.noise_scale import NoiseScale
from lipcore.trajectory.table import COLUMNS


def trained(metrics: list[Any]) -> tuple[nn.Module, Monitor]:
    model = seeded(lambda: mlp(5, 7, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = Monitor(model, optimizer, metrics=metrics)
    for x, y in batches(3, 4):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return model, monitor


def distribution() -> Distribution:
    found = Distribution()
    found.observe(torch.tensor([1.0, 2.0, 3.0]))
    return found


def scores() -> SampleScores:
    found = SampleScores()
    found.observe(torch.arange(3), torch.tensor([1.0, 2.0, 3.0]))
    return found


def metric(make: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: (found := make(), trained([found]))[0]


STATEFUL: dict[str, Callable[[], Any]] = {
    "distribution": distribution,
    "scores": scores,
    "noise": lambda: NoiseScale(2),
    "trajectory": metric(Trajectory),
    "sketch": metric(lambda: Trajectory(mode="sketch", buckets=256)),
    "lipschitz": metric(Lipschitz),
    "per_sample": metric(lambda: PerSampleGradNorms(loss_reduction="mean")),
    "tensor_stats": metric(lambda: TensorStats(every_steps=1)),
    "monitor": lambda: trained([Trajectory(), Lipschitz()])[1],
}


def leaves(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(path, value) of everything in a state that is no dict or list."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield from leaves(value, (*path, key))
    elif isinstance(state, list) and state:
        for i, value in enumerate(state):
            yield from leaves(value, (*path, i))
    else:
        yield path, state


def places(state: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The first of the leaves that differ in an index or a parameter's name only."""
    seen = set()
    for path, value in leaves(state):
        kind = tuple(key for key in path if isinstance(key, str) and not key[0].isdigit())
        if kind not in seen:
            seen.add(kind)
            yield path, value


def changed(state: Any, path: tuple[Any, ...], value: Any) -> Any:
    state = copy.deepcopy(state)
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return state


def equal(one: Any, other: Any) -> bool:
    theirs = dict(leaves(other))
    mine = dict(leaves(one))
    return mine.keys() == theirs.keys() and all(
        torch.equal(a.nan_to_num(), theirs[path].nan_to_num()) if isinstance(a, Tensor) else a == theirs[path]
        for path, a in mine.items()
    )


def refused(thing: Any, state: Any) -> str:
    """What load_state_dict() says of it, having changed nothing."""
    before = thing.state_dict()
    with pytest.raises(ValueError, match=r"^[\w\[\]., #]+:? ") as caught:
        thing.load_state_dict(state)
    assert equal(before, thing.state_dict())
    return str(caught.value)


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("state", [None, [], 3, "state", {}], ids=repr)
def test_what_is_no_state(name: str, state: Any) -> None:
    refused(STATEFUL[name](), state)


@pytest.mark.parametrize("name", STATEFUL)
def test_a_state_fits_itself(name: str) -> None:
    thing = STATEFUL[name]()
    state = thing.state_dict()
    thing.load_state_dict(copy.deepcopy(state))
    assert equal(state, thing.state_dict())


@pytest.mark.parametrize("name", STATEFUL)
def test_every_key_is_needed(name: str) -> None:
    thing = STATEFUL[name]()
    state = thing.state_dict()
    # States of an earlier lipcore lack them.
    optional = {"apart", "jumps", "bias_steps", "numbered", "doubt", "doubts", "taken_back", "in_parts"}
    for key in state.keys() - optional:
        assert key in refused(thing, {k: v for k, v in state.items() if k != key})


@pytest.mark.parametrize("name", STATEFUL)
def test_a_version_is_a_number(name: str) -> None:
    thing = STATEFUL[name]()
    state = thing.state_dict()
    for version in (True, 99, "1", None, 1.5):
        assert refused(thing, state | {"version": version}).startswith("version: ")


@pytest.mark.parametrize("name", few(STATEFUL, 2))
def test_tensors_that_hold_nothing_to_take_over(name: str) -> None:
    thing = STATEFUL[name]()
    state = thing.state_dict()
    for path, value in places(state):
        if not isinstance(value, Tensor):
            continue
        bad = [value.to("meta"), value[None], value.tolist(), None]
        if value.is_floating_point():
            bad += [value.clone().requires_grad_(), value.to(torch.float16)]
        if value.dim():
            bad.append(value.to_sparse())
        for other in bad:
            assert str(path[-1]) in refused(thing, changed(state, path, other))


@pytest.mark.parametrize("name", STATEFUL)
def test_counts_that_are_none(name: str) -> None:
    thing = STATEFUL[name]()
    state = thing.state_dict()
    settings = {"version", "group", "mixed", "weight_moved", "every_steps", "window_blocks", "ring", "sketch", "places"}
    counts = [p for p, v in places(state) if type(v) is int and not settings & set(map(str, p))]
    for path in counts:
        if "bias_steps" in path or path[0] == "starts":
            continue
        for value in (True, -1, 2**62, 1.5, None, "3"):
            refused(thing, changed(state, path, value))


@pytest.mark.parametrize("value", [torch.nan, -3.0])
@pytest.mark.parametrize("name", ["trajectory", "sketch"])
def test_rows_that_no_ledger_holds(name: str, value: float) -> None:
    thing = STATEFUL[name]()
    state = thing.state_dict()
    rows = state["trackers"]["exact" if name == "trajectory" else "sketch"]["rows"]
    for column in range(rows.shape[1] - 1):  # the last one is the group, which is compared
        if value != value and COLUMNS[column] == "total_path":
            continue  # not known of parts that other ranks had before
        bad = rows.clone()
        bad[0, column] = value
        path = ("trackers", "exact" if name == "trajectory" else "sketch", "rows")
        assert "rows" in refused(thing, changed(state, path, bad))
