"""Sketches over all ranks against one process in float64: each situation is right to 1e-7, and near the numbers that it
estimates; or refused by name."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
from rank_runs import Found, assert_right, run_situations
from sketch_situations import situations

from lipcore.distributed.ownership import Ownership
from lipcore.trajectory.sketch_places import start_of

RIGHT = {2: ("ddp", "fsdp2", "tensor_parallel", "one_group", "open_window"), 4: ("hsdp", "tensor_parallel_and_fsdp2")}
LEFT_OUT = {
    "pipeline": r"ranks hold other parameters \(stages of a pipeline\), .* use mode 'exact' or 'updates'",
    "other_seeds": r"sketch is \[256, 0\] on rank 0 and \[256, 1\] on rank 1",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> dict[int, Found]:
    """What every rank has found, by number of ranks."""
    return {}


def found_of(runs: dict[int, Found], ranks: int, name: str, tmp_path_factory: Any) -> list[Any]:
    if ranks not in runs:
        runs[ranks] = run_situations(tmp_path_factory.mktemp("ranks"), "sketch_situations", ranks)
    return runs[ranks][name]


def test_every_situation_is_in_the_table() -> None:
    assert sorted(name for name, *_ in situations(2)) == sorted([*RIGHT[2], *LEFT_OUT])
    assert sorted(name for name, *_ in situations(4)) == sorted(RIGHT[4])


@pytest.mark.ci
@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks, names in RIGHT.items() for name in names])
def test_right(runs: dict[int, Found], ranks: int, name: str, tmp_path_factory: Any) -> None:
    for numbers in found_of(runs, ranks, name, tmp_path_factory):
        assert_right(numbers)
        assert numbers.get("sketches", 0.0) <= 1e-12
        assert numbers.get("of one process", 0.0) <= 1e-12
        assert numbers.get("far", 0.0) <= 5  # standard errors
        assert numbers.get("grad_norm", 1.0) > 0


@pytest.mark.ci
@pytest.mark.parametrize("name", LEFT_OUT)
def test_left_out(runs: dict[int, Found], name: str, tmp_path_factory: Any) -> None:
    for numbers in found_of(runs, 2, name, tmp_path_factory):
        assert isinstance(numbers, dict), numbers
        assert re.search(LEFT_OUT[name], numbers["said"]), numbers["said"]


@pytest.mark.parametrize("whole", [(7,), (5, 6), (4, 3, 5), (1, 4)])
@pytest.mark.parametrize("cut", [(0,), (1,), (0, 1), (2,), (0, 2)])
def test_shards_number_each_element_once(whole: tuple[int, ...], cut: tuple[int, ...]) -> None:
    """Along the first dimension as in the memory of the whole tensor."""
    cut = tuple(dim for dim in cut if dim < len(whole))
    ends = [[(0, (n + 1) // 2), ((n + 1) // 2, n)] if dim in cut else [(0, n)] for dim, n in enumerate(whole)]
    taken: list[int] = []
    for parts in itertools.product(*ends):
        shape, offset = [end - begin for begin, end in parts], [begin for begin, _ in parts]
        start = start_of(whole, shape, offset)
        taken += range(start, start + math.prod(shape))
        if cut == (0,) and math.prod(shape):
            assert start == offset[0] * math.prod(whole[1:])
    assert sorted(taken) == list(range(math.prod(whole)))


def test_who_counts_what_together() -> None:
    """Rank 0 counts the copy; each rank its part; rank 1 has nothing of the last one."""
    common = {"groups": ["g"] * 3, "whole": [[2], [2], [1]], "bits": ["0"] * 3}
    first = {"names": ["copy", "parts", "one"], "offset": [[0], [0], [0]], "shape": [[2], [1], [1]]} | common
    second = {"names": ["copy", "parts", "one"], "offset": [[0], [1], [1]], "shape": [[2], [1], [0]]} | common
    for here in (0, 1):
        owners = Ownership.of([first, second], (0, 1), here)
        assert owners.counted_together(["copy"])
        assert owners.counted_together(["parts", "one"])
        assert not owners.counted_together(["copy", "parts"])
