"""Distribution: moments and quantiles of a stream, merging, state, and the path that devices take."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from oracle import assert_same_state

from lipcore import Distribution, _core
from lipcore.metric.device_rows import DeviceRows
from lipcore.metric.distribution import observe_rows, on_device, reset_all
from lipcore.metric.host_reads import fetch

QUANTILES = (0.0, 0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1.0)


def generator(seed=0):
    return np.random.default_rng(seed)


STREAMS = {
    "lognormal": generator(1).lognormal(0, 2, 20_001),
    "uniform": generator(2).uniform(0, 1, 10_000),
    "narrow": 1e4 + generator(3).normal(0, 1, 10_000),
    "many_decades": 10 ** generator(4).uniform(-36, 36, 20_000),
    "two_peaks": np.concatenate([generator(5).uniform(1, 2, 5_000), generator(6).uniform(1e6, 2e6, 5_000)]),
    "half_zeros": np.maximum(generator(7).normal(0, 1, 10_001), 0),
    "constant": np.full(100, 0.3),
    "powers_of_two": 2.0 ** np.arange(-100, 100),
    "one": np.array([2.5]),
    "two": np.array([1.0, 3.0]),
    "zero": np.zeros(3),
}


def observed(values, pieces=1):
    distribution = Distribution()
    for piece in np.array_split(values, pieces):
        distribution.observe(torch.from_numpy(piece))
    return distribution


def numbers(distribution):
    """Everything that merging keeps exactly."""
    core = distribution.core
    return core.count, core.min, core.max, core.missing, core.invalid, core.bins()


@pytest.mark.parametrize("stream", STREAMS)
def test_against_numpy(stream):
    values = STREAMS[stream]
    d = observed(values, pieces=3)
    assert d.count == len(values)
    assert (d.min, d.max) == (values.min(), values.max())
    assert d.mean == pytest.approx(values.mean(), rel=1e-12)
    assert d.sum == pytest.approx(values.sum(), rel=1e-12)
    assert d.variance == pytest.approx(values.var(), rel=1e-9, abs=1e-25)
    for q in QUANTILES:
        low, high = (np.quantile(values, q, method=m) for m in ("lower", "higher"))
        assert low * (1 - 0.004) <= d.quantile(q) <= high * (1 + 0.004), q
    assert (d.quantile(0), d.quantile(1)) == (values.min(), values.max())


@pytest.mark.parametrize("stream", ["lognormal", "uniform", "narrow"])
def test_quantiles_of_smooth_streams_to_one_percent(stream):
    """numpy's default rule interpolates between observed values; on a smooth stream that is the same to 1 %."""
    for q in QUANTILES[3:-2]:
        assert observed(STREAMS[stream]).quantile(q) == pytest.approx(np.quantile(STREAMS[stream], q), rel=0.01)


@pytest.mark.parametrize("pieces", [2, 7])
@pytest.mark.parametrize("stream", STREAMS)
def test_merging_is_observing_everything(stream, pieces):
    values = STREAMS[stream]
    whole, merged = observed(values), Distribution()
    for i, piece in enumerate(np.array_split(values, pieces)):
        part = observed(piece)
        part.observe(torch.tensor([math.nan] * i + [-1.0]))
        whole.observe(torch.tensor([math.nan] * i + [-1.0]))
        merged.merge(part)
    assert numbers(merged) == numbers(whole)
    assert merged.mean == pytest.approx(whole.mean, rel=1e-12)
    assert merged.variance == pytest.approx(whole.variance, rel=1e-9, abs=1e-25)
    assert [merged.quantile(q) for q in QUANTILES] == [whole.quantile(q) for q in QUANTILES]


def test_an_empty_one_is_the_identity_of_merging():
    full, empty = observed(STREAMS["lognormal"]), Distribution()
    before = full.state_dict()
    full.merge(empty)
    assert_same_state(full.state_dict(), before)
    empty.merge(full)
    assert_same_state(empty.state_dict(), before)


def test_merging_with_itself_doubles():
    d = observed(STREAMS["uniform"])
    median, variance = d.quantile(0.5), d.variance
    d.merge(d)
    assert d.count == 20_000
    assert d.quantile(0.5) == median
    assert d.variance == pytest.approx(variance, rel=1e-12)


def test_empty():
    d = Distribution()
    assert d.count == d.missing == d.invalid == d.sum == 0
    for number in (d.mean, d.min, d.max, d.variance, d.quantile(0.5)):
        assert math.isnan(number)
    d.observe(torch.empty(0))
    d.observe(torch.empty(0, 3, dtype=torch.float64))
    assert d.count == 0
    assert all(not value.valid and value.note for value in d.reduced("exact").values())


@pytest.mark.parametrize("path", ["core", "device"])
def test_what_is_no_value_is_counted_apart(path):
    values = torch.tensor(
        [1.0, math.nan, math.inf, -math.inf, -1.0, -1e-300, -0.0, 0.0, 3.0, math.nan], dtype=torch.float64
    )
    d = through(path, [values])
    assert d.count == 4
    assert d.missing == 2
    assert d.invalid == 4
    assert (d.min, d.max, d.sum) == (0.0, 3.0, 4.0)
    assert math.copysign(1, d.quantile(0)) == 1 or d.quantile(0) == 0


def test_only_what_is_no_value():
    d = Distribution()
    d.observe(torch.tensor([math.nan, math.inf, -2.0]))
    assert (d.count, d.missing, d.invalid) == (0, 1, 2)
    assert math.isnan(d.mean)


@pytest.mark.parametrize("q", [-0.1, 1.1, math.nan])
def test_quantiles_outside_of_0_to_1_are_refused(q):
    with pytest.raises(ValueError, match="q: "):
        observed(STREAMS["two"]).quantile(q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_of_any_shape_dtype_and_layout(dtype):
    values = torch.rand(6, 10).to(dtype)
    a, b = Distribution(), Distribution()
    a.observe(values.t()[::2].requires_grad_())
    b.observe(values.double().t()[::2].contiguous().reshape(-1))
    assert numbers(a) == numbers(b)
    c = Distribution()
    c.observe(torch.tensor(0.5))
    assert c.count == 1


def test_reset_forgets_everything():
    d = observed(STREAMS["lognormal"])
    d.observe(torch.tensor([math.nan, -1.0]))
    d.reset()
    assert_same_state(d.state_dict(), Distribution().state_dict())


# ---- bins


def test_bins_are_ordered_and_narrow():
    middles = [_core.bin_middle(b) for b in range(_core.BINS - 127)]
    assert all(a < b for a, b in itertools.pairwise(middles))
    for value in 10 ** generator(8).uniform(-37, 38, 3_000):
        assert _core.bin_middle(_core.bin_of(value)) == pytest.approx(value, rel=0.004)


@pytest.mark.parametrize("value", [0.0, 5e-324, 1e-300, 1e-45, 1e-40, 1.17e-38, 3.3e38, 3.41e38, 1e100, 1.7e308])
def test_values_outside_of_float32(value):
    """Still counted, with exact minimum and maximum, in bins that exist."""
    assert 0 <= _core.bin_of(value) < _core.BINS
    d = observed(np.array([value, value]))
    assert d.quantile(0.5) == value


# ---- the device path, run on the CPU


def through(path, batches):
    d = Distribution()
    if path == "core":
        for batch in batches:
            d.observe(batch)
        return d
    rows = DeviceRows(1, torch.device("cpu"))
    for batch in batches:
        rows.observe(batch.reshape(1, -1))
    fetch([rows])
    rows.drain_into(d._core, 0)
    return d


EXTREMES = torch.tensor(
    [0.0, 5e-324, 1e-45, 1e-40, 1.2e-38, 1.0, 3.3e38, 3.4028234e38, 3.403e38, 1e100], dtype=torch.float64
)
BATCHES = {
    **{name: [torch.from_numpy(v.copy())] for name, v in STREAMS.items()},
    **{f"{name}_in_pieces": [torch.from_numpy(p) for p in np.array_split(v, 5)] for name, v in STREAMS.items()},
    "with_nan": [torch.tensor([1.0, math.nan, 2.0, math.inf]), torch.tensor([math.nan, -1.0]), torch.tensor([3.0])],
    "nothing_usable": [torch.tensor([math.nan, -1.0])],
    "an_empty_batch": [torch.tensor([1.0]), torch.empty(0), torch.tensor([2.0])],
    "extremes": [EXTREMES],
    "round_to_even": [1 + torch.arange(1.0, 64.0, dtype=torch.float64) * 2.0**-8 + 2.0**-25],
}


@pytest.mark.parametrize("case", BATCHES)
def test_the_device_path_gives_the_same(case):
    here, there = through("core", BATCHES[case]), through("device", BATCHES[case])
    assert numbers(there) == numbers(here)
    assert there.mean == pytest.approx(here.mean, rel=1e-12, nan_ok=True)
    assert there.variance == pytest.approx(here.variance, rel=1e-9, abs=1e-25, nan_ok=True)


def test_draining_twice_adds_nothing():
    d = Distribution()
    rows = DeviceRows(1, torch.device("cpu"))
    for size, count in ((3, 3), (2, 5)):
        rows.observe(torch.ones(1, size, dtype=torch.float64))
        for _ in range(2):
            fetch([rows])
            rows.drain_into(d._core, 0)
        assert d.count == count


def test_what_was_fetched_twice_and_not_drained_adds_up():
    d = Distribution()
    rows = DeviceRows(2, torch.device("cpu"))
    for value in (1.0, 3.0):
        rows.observe(torch.tensor([[value], [math.nan]]))
        fetch([rows])
    rows.drain_into(d._core, 0)
    assert (d.count, d.min, d.max, d.missing) == (2, 1.0, 3.0, 0)


@pytest.mark.gpu
def test_rows_of_values_on_cuda():
    values = torch.from_numpy(STREAMS["lognormal"][:15_000].reshape(3, -1))
    here, there = ([Distribution() for _ in range(3)] for _ in range(2))
    for part in values.split(1000, dim=1):
        observe_rows(part, here)
        observe_rows(part.cuda(), there)
    for distributions, of in ((here, values[:2]), (there, values[:2].cuda())):  # others together
        observe_rows(of, distributions[:2])
        distributions[1].observe(of[0])
        reset_all(distributions[2:])
        observe_rows(of, distributions[1:])
    assert [numbers(d) for d in there] == [numbers(d) for d in here]


@pytest.mark.gpu
def test_distributions_are_fetched_together():
    groups = [[Distribution() for _ in range(k)] for k in (1, 2)]
    every = [distribution for group in groups for distribution in group]
    for group in groups:
        observe_rows(torch.rand(len(group), 5).cuda(), group)
    fetch(on_device(every))
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert [distribution.count for distribution in every] == [5, 5, 5]
        assert all(distribution.core.bins() for distribution in every)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_values_on_cuda():
    here, there = Distribution(), Distribution()
    for values in BATCHES["lognormal_in_pieces"]:
        here.observe(values)
        there.observe(values.cuda())
    assert numbers(there) == numbers(here)


@pytest.mark.gpu
def test_every_replay_of_a_captured_observation_counts():
    values = torch.rand(7, dtype=torch.float64).cuda()
    there, here = Distribution(), Distribution()
    there.observe(values)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        there.observe(values)
    here.observe(values.cpu())
    for replay in range(4):
        if replay == 2:  # a new window, which the graph knows nothing of
            reset_all([here, there])
        values.mul_(3)
        graph.replay()
        here.observe(values.cpu())
    assert numbers(there) == numbers(here)


@pytest.mark.gpu
def test_a_new_window_copies_nothing_to_the_device():
    distribution, values = Distribution(), torch.rand(5, dtype=torch.float64).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            distribution.observe(values)
            reset_all([distribution])
        distribution.observe(values)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert distribution.count == 5


# ---- state


@pytest.mark.parametrize("way", ["direct", "file"])
def test_state_round_trip(way):
    d = observed(STREAMS["many_decades"])
    d.observe(torch.tensor([math.nan, -1.0]))
    state = d.state_dict()
    if way == "file":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    other = observed(STREAMS["uniform"])
    other.load_state_dict(state)
    assert_same_state(other.state_dict(), d.state_dict())
    for each in (d, other):
        each.observe(torch.from_numpy(STREAMS["lognormal"]))
    assert_same_state(other.state_dict(), d.state_dict())


def changed(key, value):
    return lambda state: state.__setitem__(key, value(state[key]) if callable(value) else value)


def moments(index, value):
    def change(state):
        state["moments"][index] = value

    return change


CORRUPT = {
    "version": changed("version", 2),
    **{f"without_{k}": (lambda s, k=k: s.pop(k)) for k in ("version", "moments", "missing", "invalid", "bins")},
    "moments_short": changed("moments", lambda m: m[:4]),
    "moments_long": changed("moments", lambda m: torch.cat([m, m])),
    "moments_none": changed("moments", None),
    "count_too_large": moments(0, 1e6),
    "count_negative": moments(0, -1.0),
    "count_nan": moments(0, math.nan),
    "count_fraction": moments(0, 10_000.5),
    "mean_nan": moments(1, math.nan),
    "mean_negative": moments(1, -1.0),
    "m2_negative": moments(2, -1.0),
    "m2_inf": moments(2, math.inf),
    "min_negative": moments(3, -1.0),
    "min_above_max": moments(3, 1e30),
    "max_nan": moments(4, math.nan),
    "missing_negative": changed("missing", -1),
    "missing_text": changed("missing", "none"),
    "invalid_negative": changed("invalid", -1),
    "bins_odd": changed("bins", lambda b: b[:-1]),
    "bins_missing": changed("bins", lambda b: b[:-2]),
    "bins_out_of_range": changed("bins", lambda b: torch.cat([torch.tensor([_core.BINS]), b[1:]])),
    "bins_negative": changed("bins", lambda b: torch.cat([torch.tensor([-5]), b[1:]])),
    "bins_twice": changed("bins", lambda b: torch.cat([b[2:4], b[2:]])),
    "bins_negative_count": changed("bins", lambda b: torch.cat([b, torch.tensor([3, -1, 4, 1])])),
    "bins_float": changed("bins", lambda b: b.double() + 0.5),
    "bins_none": changed("bins", None),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_a_corrupt_state_changes_nothing(case):
    state = observed(STREAMS["uniform"]).state_dict()
    CORRUPT[case](state)
    d = observed(STREAMS["lognormal"])
    d.observe(torch.tensor([math.nan]))
    before = d.state_dict()
    with pytest.raises(ValueError, match=r"\w+: "):
        d.load_state_dict(state)
    assert_same_state(d.state_dict(), before)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))])
def test_a_copy_goes_on_alone(again):
    distribution = observed([1.0, 2.0, math.nan, math.inf])
    copied = again(distribution)
    assert_same_state(copied.state_dict(), distribution.state_dict())
    copied.observe(torch.ones(3))
    assert (copied.count, copied.missing, copied.invalid, distribution.count) == (5, 1, 1, 2)
