"""merge_shards(): parameters cut into pieces give the numbers of whole ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
from paths import Path, assert_same_numbers, check, tensors_of, walk
from torch import Tensor

from lipcore import Trajectory
from lipcore.trajectory import merge_shards


def cut(tensors: dict[str, Tensor], shards: int) -> list[dict[str, Tensor]]:
    """Every tensor's elements in pieces, in unequal ones; they share its memory."""
    pieces: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    for name, tensor in tensors.items():
        flat = tensor.view(-1)
        ends = [0, *(flat.numel() * (i + 1) // (shards + 1) for i in range(shards - 1)), flat.numel()]
        for i, piece in enumerate(pieces):
            piece[name] = flat[ends[i] : ends[i + 1]]
    return pieces


def sharded(shards: int, **settings: Any) -> tuple[dict[str, Tensor], Trajectory, list[Trajectory], Path, Any]:
    tensors = tensors_of()
    whole = Trajectory(tensors.items(), **settings)
    parts = [Trajectory(piece.items(), **settings) for piece in cut(tensors, shards)]
    path = Path(tensors)

    def step() -> None:
        for trajectory in (whole, *parts):
            trajectory.update()
        path.look()

    return tensors, whole, parts, path, step


@pytest.mark.parametrize("steps", [1, 12, 700])
@pytest.mark.parametrize("shards", [1, 2, 3])
def test_shards_are_the_whole(shards: int, steps: int) -> None:
    tensors, whole, parts, path, step = sharded(shards)
    walk(tensors, steps, step)
    result = merge_shards([part.summary() for part in parts])
    assert result.details["shards"] == shards
    check(result, path, tolerance=2e-6)
    assert_same_numbers(result, whole.compute(), 2e-6)


def test_path_lengths_do_not_add_up() -> None:
    tensors, _, parts, path, step = sharded(2)
    walk(tensors, 5, step)
    added = sum(part.compute().path_length["total"].sum.value for part in parts)
    assert added > 1.2 * float(path.expected(list(tensors))["path_length"]["sum"])


def test_a_later_window_has_no_cumulative_path() -> None:
    tensors, whole, parts, _, step = sharded(2)
    walk(tensors, 5, step)
    for trajectory in (whole, *parts):
        trajectory.reset()
    walk(tensors, 4, step, seed=2)
    result, truth = merge_shards([part.summary() for part in parts]), whole.compute()
    for quantity in ("update_norm", "update_ratio", "variance", "distance", "weight_norm"):
        for reducer, value in truth[quantity]["total"].items():
            near = 0.01 if reducer in ("p50", "p99") else 1e-6
            assert result[quantity]["total"][reducer].value == pytest.approx(value.value, rel=near)
    assert list(result.path_length["total"]) == ["sum"]
    assert "directness" not in result


def test_parameters_of_one_shard_alone() -> None:
    """As with pipeline stages: places are added, groups and the total are those of all."""
    tensors = tensors_of()
    parts = [Trajectory([(n, tensors[n]) for n in names]) for names in (["a.weight"], ["a.bias", "b.weight"])]
    path = Path(tensors)

    def step() -> None:
        for part in parts:
            part.update()
        path.look()

    walk(tensors, 9, step)
    check(merge_shards([part.summary() for part in parts]), path)


@pytest.mark.parametrize("every", [False, True])
def test_steps_left_out_in_one_shard(every: bool) -> None:
    """The whole tensor is left out of that step, in its group and in the total too."""
    tensors, _, parts, path, step = sharded(2)
    names = tuple(tensors) if every else ("b.weight",)
    walk(tensors, 8, step, nan_at={2: names, 5: ("a.bias",)})
    result = merge_shards([part.summary() for part in parts])
    # The shard that stayed finite moved on from its own last point: steps after a gap are shorter there.
    for place, members in {"b.weight": ["b.weight"], "b": ["b.weight"], "total": list(tensors)}.items():
        truth = path.expected(members)
        for quantity in ("nonfinite_steps", "nonfinite_elements"):
            assert result[quantity][place].sum.value == truth[quantity]["sum"]
        norms = [math.sqrt(sum(float(s) for s in squares)) for squares in squares_of(parts, members, 8) if squares]
        assert result.update_norm[place].last.count == len(norms)
        assert result.path_length[place].sum.value == pytest.approx(sum(norms), rel=1e-6)
        assert result.update_norm[place].p50.value == pytest.approx(sorted(norms)[(len(norms) - 1) // 2], rel=0.2)


def squares_of(parts: list[Trajectory], members: list[str], steps: int) -> list[list[Tensor]]:
    """Squared update norms of the members that are finite in all shards, per step."""
    drained = [part.summary() for part in parts]
    out = []
    for t in range(steps):
        per_member = [sum(s["steps"][t, s["names"].index(name), 0] for s in drained) for name in members]
        out.append([square for square in per_member if math.isfinite(square)])  # type: ignore[arg-type,misc]
    return out  # type: ignore[return-value]


# ---- refusals


def test_a_window_longer_than_the_ring_is_refused() -> None:
    tensors, _, parts, _, step = sharded(2, ring=512)
    walk(tensors, 512, step, nan_at={3: ("b.weight",)})
    merge_shards([part.summary() for part in parts])
    step()
    with pytest.raises(ValueError, match="ring: the window has 513 steps, the ring keeps 512; .* Use ring=513 or more"):
        parts[0].summary()
    parts[0].reset()
    assert len(parts[0].summary()["steps"]) == 0


def test_summaries_that_do_not_belong_together_are_refused() -> None:
    tensors = tensors_of()
    one, other = Trajectory(tensors.items()), Trajectory(tensors.items())
    walk(tensors, 3, one.update)
    walk(tensors, 2, other.update)
    with pytest.raises(ValueError, match=r"summaries\[1\]: 2 steps in the window, summaries\[0\] has 3"):
        merge_shards([one.summary(), other.summary()])
    chords = Trajectory(tensors.items(), every_steps=2)
    with pytest.raises(ValueError, match=r"summaries\[1\]: every_steps is 2, that of summaries\[0\] 1"):
        merge_shards([one.summary(), chords.summary()])
    with pytest.raises(ValueError, match=r"summaries\[1\]: quantities is "):
        merge_shards([one.summary(), Trajectory(tensors.items(), source="explicit").summary()])
    with pytest.raises(ValueError, match="summaries: expected at least one"):
        merge_shards([])
