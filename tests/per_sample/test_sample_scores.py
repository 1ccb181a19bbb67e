"""Scores by sample id against a dictionary of lists."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections import defaultdict

import numpy as np
import pytest
import torch
from oracle import assert_same_state

from lipcore import SampleScores
from lipcore.per_sample.scores import sample_scores
from lipcore.per_sample.scores.id_index import _DENSE, IdIndex
from lipcore.per_sample.scores.score_columns import ScoreColumns

LIMITS = np.iinfo(np.int64)
NAN, INF = math.nan, math.inf


def ids_of(kind, rng, n):
    if kind == "dense":
        return rng.integers(0, 300, n)
    if kind == "negative":
        return rng.integers(-150, 150, n)
    if kind == "around the table's end":
        return rng.integers(_DENSE - 150, _DENSE + 150, n)
    if kind == "strided":
        return rng.integers(0, 300, n) << 40
    ids = rng.integers(LIMITS.min, LIMITS.max, 300, endpoint=True)
    ids[:2] = LIMITS.min, LIMITS.max
    return rng.choice(ids, n)


KINDS = ("dense", "negative", "around the table's end", "strided", "anything")


def check(scores, lists):
    """Every number against the lists of values by id."""
    assert len(scores) == len(lists)
    ids = sorted(lists)
    arrays = scores.to_numpy()
    assert arrays["ids"].tolist() == ids
    found = scores.lookup(torch.tensor(ids, dtype=torch.int64))
    for i, id_ in enumerate(ids):
        values = np.array(lists[id_])
        assert found.count[i] == len(values)
        assert found.mean[i].item() == pytest.approx(values.mean(), rel=1e-13, abs=1e-300)
        assert found.variance[i].item() == pytest.approx(values.var(), rel=1e-10, abs=1e-20)
        assert found.max[i] == values.max()
    for name in ("count", "mean", "variance", "max"):
        assert arrays[name].tolist() == getattr(found, name).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_against_lists(kind):
    rng, lists, scores = np.random.default_rng(1), defaultdict(list), SampleScores()
    for size in (0, 1, 2, 3, 7, 15, 16, 17, 63, 64, 65, 129, *[40] * 80):  # past the number that are folded at once
        ids, values = ids_of(kind, rng, size), rng.lognormal(0, 2, size) - 1
        scores.observe(torch.from_numpy(ids), torch.from_numpy(values))
        for id_, value in zip(ids.tolist(), values.tolist(), strict=True):
            lists[id_].append(value)
    check(scores, lists)


@pytest.mark.parametrize("kind", KINDS)
def test_growing_by_single_batches(kind):
    """Reading after each batch folds it in alone, so that slots are added a few at a time."""
    rng, lists, scores = np.random.default_rng(2), defaultdict(list), SampleScores()
    for _ in range(60):
        ids, values = ids_of(kind, rng, 9), rng.normal(0, 1, 9)
        scores.observe(torch.from_numpy(ids), torch.from_numpy(values))
        for id_, value in zip(ids.tolist(), values.tolist(), strict=True):
            lists[id_].append(value)
        assert len(scores) == len(lists)
    check(scores, lists)


def test_the_index_by_itself():
    rng, index, known = np.random.default_rng(3), IdIndex(), {}
    for step in range(200):
        ids = np.unique(np.concatenate([ids_of(kind, rng, 5) for kind in KINDS]))
        rng.shuffle(ids)
        before = index.find(ids)
        assert before.tolist() == [known.get(i, -1) for i in ids.tolist()]
        slots = index.add(ids)
        for id_, slot in zip(ids.tolist(), slots.tolist(), strict=True):
            assert known.setdefault(id_, slot) == slot
        assert sorted(known.values()) == list(range(len(index))), step
    everything = np.array(list(known))
    assert index.find(everything).tolist() == list(known.values())
    assert index.ids[: len(index)][index.find(everything)].tolist() == everything.tolist()


def test_duplicates_within_a_batch():
    scores = SampleScores()
    scores.observe(torch.tensor([5, 5, 5, -2, 5]), torch.tensor([1.0, 2.0, 3.0, 9.0, 6.0]))
    got = scores.lookup([5, -2])
    assert got.count.tolist() == [4, 1]
    assert got.mean.tolist() == [3, 9]
    assert got.variance.tolist() == [3.5, 0]
    assert got.max.tolist() == [6, 9]


def test_unknown_ids_and_empty():
    scores = SampleScores()
    assert len(scores) == 0
    for ids in ([], [1, -1, LIMITS.max]):
        got = scores.lookup(ids)
        assert got.count.tolist() == [0] * len(ids)
        assert all(math.isnan(x) for x in (*got.mean, *got.variance, *got.max))
    assert scores.top(3).ids.tolist() == []
    scores.observe(torch.tensor([3]), torch.tensor([2.0]))
    got = scores.lookup(torch.tensor([2, 3, 4, -3, 3], dtype=torch.int32))
    assert got.count.tolist() == [0, 1, 0, 0, 1]
    assert got.max.isnan().tolist() == [True, False, True, True, False]


def test_values_that_are_none():
    scores = SampleScores()
    scores.observe(torch.tensor([1, 2, 3, 1, 4]), torch.tensor([1.0, NAN, INF, NAN, -INF]))
    assert (len(scores), scores.missing, scores.invalid) == (1, 2, 2)
    assert scores.lookup([1, 2]).count.tolist() == [1, 0]
    assert scores.lookup([1]).variance.tolist() == [0]


def test_a_large_mean_keeps_its_variance():
    scores, rng = SampleScores(), np.random.default_rng(0)
    values = 1e8 + rng.normal(0, 1e-2, 1000)
    for part in values.reshape(100, 10):
        scores.observe(torch.zeros(10, dtype=torch.int64), torch.from_numpy(part))
        len(scores)
    assert scores.lookup([0]).variance.item() == pytest.approx(values.var(), rel=1e-6)


def test_sums_that_would_overflow():
    scores = SampleScores()
    scores.observe(torch.tensor([0, 0, 0]), torch.tensor([1.5e308, 1.5e308, 1.5e308], dtype=torch.float64))
    assert scores.lookup([0]).mean.item() == pytest.approx(1.5e308)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_types(kind, dtype):
    scores = SampleScores()
    scores.observe(torch.tensor([1, 9, 2, 9], dtype=kind)[::2], torch.tensor([3.0, 9, 4.0, 9], dtype=dtype)[::2])
    assert scores.lookup([1, 2]).mean.tolist() == [3, 4]


def test_what_is_observed_may_change_afterwards():
    ids, values = torch.tensor([1, 2]), torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    scores = SampleScores()
    scores.observe(ids, values)
    ids.fill_(7)
    values.detach().fill_(7)
    assert scores.lookup([1, 2, 7]).count.tolist() == [1, 1, 0]


@pytest.mark.parametrize("by", ["mean", "max", "variance", "count"])
@pytest.mark.parametrize("largest", [True, False])
def test_top(by, largest):
    rng, scores = np.random.default_rng(4), SampleScores()
    scores.observe(torch.from_numpy(rng.integers(-50, 50, 400)), torch.from_numpy(rng.integers(0, 4, 400) * 1.0))
    arrays = scores.to_numpy()
    pairs = sorted(zip((-1 if largest else 1) * arrays[by], arrays["ids"], strict=True))
    for k in (0, 1, 2, 17, len(scores) - 1, len(scores), len(scores) + 1):
        top = scores.top(k, by, largest=largest)
        assert top.ids.tolist() == [i for _, i in pairs[:k]]
        assert torch.equal(top.values, getattr(scores.lookup(top.ids), by))


def observed(seed, kind="negative"):
    rng, scores = np.random.default_rng(seed), SampleScores()
    values = rng.lognormal(0, 1, 500)
    values[:seed] = NAN
    scores.observe(torch.from_numpy(ids_of(kind, rng, 500)), torch.from_numpy(values))
    return scores


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_observing_everything(kind):
    whole, merged = SampleScores(), SampleScores()
    for seed in range(1, 4):
        merged.merge(observed(seed, kind))
        rng = np.random.default_rng(seed)
        values = rng.lognormal(0, 1, 500)
        values[:seed] = NAN
        whole.observe(torch.from_numpy(ids_of(kind, rng, 500)), torch.from_numpy(values))
    ours, theirs = merged.to_numpy(), whole.to_numpy()
    for key in ("ids", "count", "max"):
        assert ours[key].tolist() == theirs[key].tolist()
    for key in ("mean", "variance"):
        np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-12, atol=1e-15)
    assert (merged.missing, merged.invalid) == (whole.missing, whole.invalid) == (6, 0)


def test_merging_with_nothing_and_with_itself():
    scores = observed(1)
    before = scores.state_dict()
    scores.merge(SampleScores())
    assert_same_state(scores.state_dict(), before)
    empty = SampleScores()
    empty.merge(scores)
    assert_same_state(empty.state_dict(), before)
    scores.merge(scores)
    assert torch.equal(scores.state_dict()["count"], 2 * before["count"])
    assert scores.missing == 2 * before["missing"]
    np.testing.assert_allclose(scores.to_numpy()["variance"], empty.to_numpy()["variance"], rtol=1e-12, atol=1e-15)


def test_state_through_a_file():
    scores, buffer = observed(2), io.BytesIO()
    torch.save(scores.state_dict(), buffer)
    buffer.seek(0)
    loaded = observed(3)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same_state(loaded.state_dict(), scores.state_dict())
    for one in (scores, loaded):
        one.observe(torch.tensor([-4, 4000, -(2**60)]), torch.tensor([1.0, 2.0, 3.0]))
    assert_same_state(loaded.state_dict(), scores.state_dict())
    scores.reset()
    assert (len(scores), scores.missing) == (0, 0)


def test_copies_stand_on_their_own():
    scores = observed(2)
    scores.observe(torch.tensor([1]), torch.tensor([1.0]))
    for other in (copy.deepcopy(scores), pickle.loads(pickle.dumps(scores))):
        assert_same_state(other.state_dict(), scores.state_dict())
        other.observe(torch.tensor([1]), torch.tensor([1.0]))
        assert other.lookup([1]).count == scores.lookup([1]).count + 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version: the state has 2, this one has 1"),
        ({"ids": None}, r"ids: expected torch.int64 \[\*\], got NoneType"),
        ({"ids": torch.tensor([1.0])}, "ids"),
        ({"ids": torch.tensor([1, 1, 2])}, "ids: an id stands there twice"),
        ({"count": torch.tensor([1, 1])}, "count: expected 3 numbers, one per id, got 2"),
        ({"count": torch.tensor([1, 0, 1])}, "count"),
        ({"mean": torch.zeros(3)}, "mean: .*float64 .*got torch.float32"),
        ({"mean": torch.tensor([0, NAN, 0], dtype=torch.float64)}, "mean"),
        ({"mean": torch.tensor([0, 100, 0], dtype=torch.float64)}, "mean"),
        ({"m2": torch.tensor([0, -1, 0], dtype=torch.float64)}, "m2"),
        ({"max": torch.tensor([0, INF, 0], dtype=torch.float64)}, "max"),
        ({"missing": -1}, "missing"),
        ({"invalid": True}, "invalid"),
    ],
)
def test_states_that_are_none(change, words):
    scores = SampleScores()
    scores.observe(torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0, 3.0]))
    before = scores.state_dict()
    with pytest.raises(ValueError, match=words):
        scores.load_state_dict(before | change)
    assert_same_state(scores.state_dict(), before)
    with pytest.raises(ValueError, match="state: expected a dict"):
        scores.load_state_dict([])


@pytest.mark.parametrize(
    ("ids", "values", "words"),
    [
        (
            torch.tensor([1.0]),
            torch.tensor([1.0]),
            r"ids: expected an integer tensor of shape \[B\]",
        ),
        (torch.tensor([True]), torch.tensor([1.0]), "ids: .*bool"),
        ([1], torch.tensor([1.0]), "ids: .*list"),
        (torch.tensor([[1]]), torch.tensor([1.0]), "ids"),
        (torch.tensor(1), torch.tensor([1.0]), "ids"),
        (torch.tensor([1]), torch.tensor([1]), "values: .*int64"),
        (torch.tensor([1]), torch.tensor([[1.0]]), "values"),
        (torch.tensor([1, 2]), torch.tensor([1.0]), "ids: expected one per value, got 2 ids for 1 values"),
    ],
)
def test_refusals(ids, values, words):
    scores = SampleScores()
    with pytest.raises(ValueError, match=words):
        scores.observe(ids, values)
    assert len(scores) == 0


def test_refused_questions():
    scores = observed(1)
    for ids in ([1.5], torch.tensor([[1]]), torch.tensor([True])):
        with pytest.raises(ValueError, match="ids: expected integers"):
            scores.lookup(ids)
    for k in (-1, 1.0, True):
        with pytest.raises(ValueError, match="k: expected"):
            scores.top(k)
    with pytest.raises(ValueError, match="by: expected"):
        scores.top(1, by="sum")


class Event:
    """Of a device that has come as far as it is told."""

    def __init__(self):
        self.passed, self.waited = False, False

    def query(self):
        return self.passed

    def synchronize(self):
        self.passed = self.waited = True


@pytest.fixture
def device(monkeypatch):
    events = []
    on_host = sample_scores._on_host

    def pretend(tensor, dtype, mine):
        events.append(Event())
        mine.append(events[-1])
        return on_host(tensor, dtype, mine)

    monkeypatch.setattr(sample_scores, "_on_host", pretend)
    return events


def test_observing_does_not_wait_until_far_behind(device):
    scores = SampleScores()
    for i in range(255):
        scores.observe(torch.tensor([i]), torch.tensor([1.0]))
    assert not any(event.waited for event in device)
    for event in device[:200]:  # of 100 batches
        event.passed = True
    scores.observe(torch.tensor([255]), torch.tensor([1.0]))
    assert len(scores._pending) == 0  # 256 at once are waited for
    assert all(event.waited for event in device)


def test_what_has_arrived_is_taken_in_order(device):
    scores = SampleScores()
    for i in range(63):
        scores.observe(torch.tensor([i]), torch.tensor([1.0]))
    for event in device[:40]:
        event.passed = True
    scores.observe(torch.tensor([63]), torch.tensor([1.0]))
    assert (len(scores._pending), scores._pending_values) == (44, 44)
    assert not any(event.waited for event in device)
    assert len(scores) == 64
    assert scores.lookup(range(64)).count.tolist() == [1] * 64


@pytest.mark.gpu
def test_cuda_without_synchronising():
    scores, plain, rng = SampleScores(), SampleScores(), np.random.default_rng(0)
    batches = [(rng.integers(-500, 500, 32), rng.normal(0, 1, 32)) for _ in range(200)]
    pairs = [(torch.from_numpy(a).cuda(), torch.from_numpy(b).cuda()) for a, b in batches]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for ids, values in pairs:
            scores.observe(ids, values)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ids, values in batches:
        plain.observe(torch.from_numpy(ids), torch.from_numpy(values))
    for ours, theirs in zip(scores.to_numpy().values(), plain.to_numpy().values(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)


def test_scores_say_how_many_ids_they_have_and_what_is_kept_of_each() -> None:
    scores = SampleScores()
    assert repr(scores) == "SampleScores: count, mean, variance and max of a value for each of 0 ids"
    scores.observe(torch.tensor([3, 4, 3, 5, 6]), torch.tensor([1.0, 2.0, 3.0, math.nan, math.inf]))
    said = "SampleScores: count, mean, variance and max of a value for each of 2 ids"
    assert repr(scores) == f"{said}; 1 missing values left out; 1 infinite values left out"
    columns = ScoreColumns(2)
    columns.observe(torch.tensor([3, 4]), torch.ones(2, 2))
    assert repr(columns) == f"ScoreColumns: scores[k] of 2 references, the first: {said}"
