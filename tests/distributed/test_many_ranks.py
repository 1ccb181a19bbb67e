"""A thousand ranks by simulation: what a logging step costs one of them, in time and in memory."""

from __future__ import annotations

import hashlib
import json
import resource
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lipcore.distributed.meeting import Meeting
from lipcore.distributed.packed import Packed, folded
from lipcore.metric.distribution import Distribution
from lipcore.metric.rank_distributions import RankDistributions, distributions_of
from lipcore.metric.results import MetricResult
from lipcore.trajectory.shard_sums import ShardSums
from lipcore.trajectory.whole import Whole, places_of

RANKS, PARAMETERS, STEPS = 1024, 291, 100  # parameters of a model of 7 billion elements
NAMES = [f"layers.{i // 9}.{i % 9}.weight" for i in range(PARAMETERS)]
MOVES = frozenset({"update_norm", "update_ratio", "path_length", "weight_norm"})


class World:
    """Summaries of so many ranks, each made when it is folded. Every rank has the same share of every parameter."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.places = ranks, places_of(NAMES, [name.rpartition(".")[0] for name in NAMES])
        steps = torch.rand(STEPS, PARAMETERS, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        most = torch.zeros(PARAMETERS, 4, dtype=torch.float64)
        most[:, 3] = STEPS
        added = torch.ones(PARAMETERS, 4, dtype=torch.float64)
        self.share = ShardSums(steps / ranks, added / ranks, most, torch.zeros(len(self.places), dtype=torch.float64))

    def __call__(self) -> Iterator[Packed]:
        for _ in range(self.ranks):
            packed = self.share.packed()
            assert isinstance(packed.sums, list)
            yield Packed([tensor.clone() for tensor in packed.sums], packed.largest)

    def result(self) -> MetricResult:
        found = MetricResult("trajectory")
        (sums,) = ShardSums.of_packed(folded(self), [])
        Whole(sums, self.places, STEPS).add_to(found, MOVES, "path_length")
        return found


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other would count as work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.ci
@pytest.mark.usefixtures("one_thread")
def test_a_logging_step_of_a_thousand_ranks() -> None:
    one, world = World(1), World(RANKS)
    expected = one.result()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spent = []
    for _ in range(3):
        start = time.process_time()
        found = world.result()
        spent.append(time.process_time() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert min(spent) <= 1.0
    assert grown <= 64  # MB; all summaries together are 480
    for name, quantity in expected.items():
        for place in quantity:
            for reducer, value in quantity[place].items():
                assert found[name][place][reducer].value == pytest.approx(value.value, rel=1e-12)


def test_distributions_of_many_ranks_are_those_of_all_values() -> None:
    """One of the places has values on one rank only, another one none at all."""
    generator, whole = torch.Generator().manual_seed(0), [Distribution() for _ in range(3)]
    parts = []
    for rank in range(50):
        own = [Distribution() for _ in range(3)]
        values = [torch.rand(7, generator=generator, dtype=torch.float64) * 10.0 ** (rank % 5)]
        values.append(torch.tensor([3.0, torch.nan, torch.inf])[: 3 * (rank == 4)])
        for place, each in enumerate(values):
            own[place].observe(each)
            whole[place].observe(each)
        parts.append(RankDistributions(own))

    def packed() -> Iterator[Packed]:
        for part in parts:
            yield Packed(lambda most, p=part: p.sums(range(3), most[0]), [part.largest(range(3), 3)])  # type: ignore[misc]

    together = folded(packed)
    for found, expected in zip(distributions_of(together.largest[0], together.sums), whole, strict=True):
        assert (found.count, found.missing, found.invalid) == (expected.count, expected.missing, expected.invalid)
        assert found.core.bins() == expected.core.bins()
        if expected.count:
            assert (found.min, found.max, found.quantile(0.99)) == (expected.min, expected.max, expected.quantile(0.99))
            assert found.mean == pytest.approx(expected.mean, rel=1e-13)
            assert found.variance == pytest.approx(expected.variance, rel=1e-12)


class Counting:
    """A store that counts what it is asked; its own questions are answered by a HashStore."""

    def __init__(self) -> None:
        self.store, self.asked = dist.HashStore(), 0

    def __getattr__(self, name: str) -> Any:
        self.asked += 1
        return getattr(self.store, name)


@pytest.mark.parametrize("alike", [True, False])
def test_a_meeting_of_a_thousand_ranks(alike: bool) -> None:
    """The last one finds everybody there; what it asks does not grow with the number of ranks."""
    store = Counting()
    meeting = Meeting(store, "many", RANKS - 1, range(RANKS))
    key = "many/1/7/0"  # of the first meeting, at step 7
    for place in range(RANKS - 1):
        text = json.dumps({"windows": [1, 2], "rank": 0 if alike else place % 3}, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        store.store.set(f"{key}/text/{digest}", text)
        store.store.append(f"{key}/came", f"{place}:{digest};")
        store.store.add(f"{key}/of/{digest}", 1)
        store.store.add(f"{key}/arrived", 1)
    store.asked = 0
    start = time.process_time()
    headers = meeting.meet("a call", 7, {"windows": [1, 2], "rank": 0}, 5.0)
    assert time.process_time() - start <= 1.0
    assert len(headers) == RANKS
    assert [header["rank"] for header in headers[:5]] == ([0] * 5 if alike else [0, 1, 2, 0, 1])
    assert store.asked <= 20
