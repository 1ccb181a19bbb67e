"""The noise scale on simulated gradients whose G and Sigma are known; every place is a replicate of its own."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from oracle import assert_same_state

from lipcore.per_sample.noise.estimates import FEWEST, fieller
from lipcore.per_sample.noise.noise_scale import _BLOCKS, NoiseScale
from lipcore.per_sample.noise.student_t import t_quantile

NAN, INF = math.nan, math.inf
G = torch.tensor([0.3, -0.2, 0.1, 0.0, 0.4, 0.1], dtype=torch.float64)
SPREAD = torch.tensor([1.0, 0.5, 0.2, 1.5, 0.1, 0.7], dtype=torch.float64)  # standard deviations
G_SQ, TRACE = G.square().sum().item(), SPREAD.square().sum().item()


def gaussian_step(places, samples, generator, scale=1.0):
    noise = torch.randn(places, samples, len(G), dtype=torch.float64, generator=generator)
    grads = (G + SPREAD * noise) * scale
    return grads.square().sum(2).mean(1), grads.mean(1).square().sum(1)


def simulated(places, steps, samples=8, seed=0, **settings):
    noise, generator = NoiseScale(places, **settings), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        noise.observe(*gaussian_step(places, samples, generator), samples)
    return noise


def step_of(signal, trace, samples=4):
    """What gives exactly these estimates."""
    signal, trace = (torch.as_tensor(x, dtype=torch.float64).reshape(-1) for x in (signal, trace))
    return signal + trace, signal + trace / samples, samples


def numbers(noise, quantity, reducer):
    return np.array([place[quantity][reducer].value for place in noise.finalize()])


@pytest.mark.parametrize("samples", [2, 3, 8, 33])
def test_the_estimators_are_unbiased(samples):
    noise = simulated(4000, 5, samples)
    for quantity, truth in (("gradient_sq", G_SQ), ("gradient_noise", TRACE)):
        means = numbers(noise, quantity, "mean")
        assert means.mean() == pytest.approx(truth, abs=4 * means.std() / math.sqrt(len(means)))


def test_the_noise_scale_is_the_ratio_of_means():
    noise = simulated(3, 2000, 16)
    signal, trace, ratio = (numbers(noise, q, "mean") for q in ("gradient_sq", "gradient_noise", "noise_scale"))
    np.testing.assert_allclose(ratio, trace / signal, rtol=1e-14)
    np.testing.assert_allclose(ratio, TRACE / G_SQ, rtol=0.1)
    assert all(place["noise_scale"]["mean"].label == "estimate" for place in noise.finalize())


@pytest.mark.parametrize("steps", [10, 30, *(pytest.param(steps, marks=pytest.mark.slow) for steps in (100, 300))])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_intervals_hold_the_truth_as_often_as_they_say(steps, confidence):
    places = 800
    noise = simulated(places, steps, 16, seed=steps, confidence=confidence)
    for quantity, truth in (("gradient_sq", G_SQ), ("gradient_noise", TRACE), ("noise_scale", TRACE / G_SQ)):
        low, high = (numbers(noise, quantity, reducer) for reducer in ("lower", "upper"))
        covered = ((low <= truth) & (truth <= high)).mean()
        # Skewed sums of squares: few steps cover a little less.
        slack = 4 * math.sqrt(confidence * (1 - confidence) / places)
        assert confidence - slack - 0.3 / steps <= covered <= confidence + slack, quantity


def test_reading_between_steps_changes_nothing():
    plain, read = NoiseScale(3, decay=0.9), NoiseScale(3, decay=0.9)
    for i, (mean, batch, _) in enumerate(steps_for(150)):
        mean = torch.where(torch.tensor([i % 7 == 1, False, i < 40]), NAN, mean)
        for noise in (plain, read):
            noise.observe(mean, batch, 4 + i // 20 % 2)
        if i % 11 == 0:
            read.finalize()
        if i == 70:
            plain.reset()
            read.reset()
        assert plain.steps == read.steps
    ours, theirs = plain.state_dict(), read.state_dict()
    for key in ("sums", "ema"):
        torch.testing.assert_close(ours.pop(key), theirs.pop(key), rtol=1e-13, atol=1e-300)
    assert ours == theirs


def test_standard_errors_are_those_between_replicates():
    noise = simulated(1500, 200, 16)
    for quantity in ("gradient_sq", "gradient_noise", "noise_scale"):
        means = numbers(noise, quantity, "mean")
        errors = np.array([place[quantity]["mean"].error for place in noise.finalize()])
        assert np.sqrt((errors**2).mean()) == pytest.approx(means.std(), rel=0.12), quantity


def test_steps_that_depend_on_each_other_widen_the_interval():
    """A first-order autoregression with coefficient 0.8 has a mean whose variance is 9 times that of as many
    independent steps."""
    places, steps, generator = 600, 1024, torch.Generator().manual_seed(5)
    noise, drift = NoiseScale(places), torch.zeros(places, dtype=torch.float64)
    for _ in range(steps):
        drift = 0.8 * drift + 0.6 * torch.randn(places, dtype=torch.float64, generator=generator)
        noise.observe(*step_of(10 + drift, torch.full((places,), 20.0)))
    means = numbers(noise, "gradient_sq", "mean")
    errors = np.array([place["gradient_sq"]["mean"].error for place in noise.finalize()])
    assert means.std() > 2.7 / math.sqrt(steps)
    assert np.sqrt((errors**2).mean()) == pytest.approx(means.std(), rel=0.15)


def test_large_and_small_batches_estimate_the_same():
    noise, generator = NoiseScale(2000), torch.Generator().manual_seed(1)
    for samples in (2, 64, 3, 16, 1, 5):
        noise.observe(*gaussian_step(2000, samples, generator), samples)
    assert (noise.skipped, noise.steps) == (1, 5)
    for quantity, truth in (("gradient_sq", G_SQ), ("gradient_noise", TRACE)):
        means = numbers(noise, quantity, "mean")
        assert means.mean() == pytest.approx(truth, abs=4 * means.std() / math.sqrt(len(means)))


def test_with_gradients_of_a_model():
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 2).double()
    x, noise = torch.randn(12, 5).double(), NoiseScale(1)
    rows = []
    for sample in x:
        grads = torch.autograd.grad(model(sample).square().sum(), model.parameters())
        rows.append(torch.cat([g.flatten() for g in grads]))
    grads = torch.stack(rows)
    noise.observe(grads.square().sum(1).mean().reshape(1), grads.mean(0).square().sum().reshape(1), 12)
    covariance = torch.cov(grads.T)
    place = noise.finalize()[0]
    assert place["gradient_noise"]["mean"].value == pytest.approx(covariance.trace().item(), rel=1e-12)
    expected = grads.mean(0).square().sum() - covariance.trace() / 12
    assert place["gradient_sq"]["mean"].value == pytest.approx(expected.item(), rel=1e-12)


def test_exponential_averages_are_corrected_and_go_on():
    noise, values = NoiseScale(1, decay=0.9), []
    for i in range(7):
        if i == 4:
            noise.reset()
        values.append((1.0 + i, 10.0 * (i + 1) ** 2))
        noise.observe(*step_of(*values[-1]))
        weights = 0.9 ** np.arange(len(values))[::-1]
        signal, trace = np.average(np.array(values), axis=0, weights=weights)
        place = noise.finalize()[0]
        assert place["gradient_sq"]["ema"].value == pytest.approx(signal, rel=1e-12)
        assert place["gradient_noise"]["ema"].value == pytest.approx(trace, rel=1e-12)
        assert place["noise_scale"]["ema"].value == pytest.approx(trace / signal, rel=1e-12)
        assert place["noise_scale"]["ema"].count == i + 1
        window = np.array(values[4 * (i >= 4) :])
        assert place["gradient_sq"]["mean"].value == pytest.approx(window[:, 0].mean(), rel=1e-12)
        assert place["gradient_sq"]["mean"].count == len(window)


def test_without_decay_the_average_is_the_last_step():
    noise = NoiseScale(1, decay=0.0)
    for i in range(40):
        noise.observe(*step_of(1.0 + i, 3.0))
    assert noise.finalize()[0]["gradient_sq"]["ema"].value == 40
    noise.observe(*step_of(2.0, 3.0))
    assert noise.finalize()[0]["noise_scale"]["ema"].value == 1.5


def test_means_of_long_windows_are_over_all_steps():
    """Joining blocks loses nothing."""
    for steps in (1, 7, 8, 31, 32, 33, 64, 65, 129, 1000):
        noise, values = NoiseScale(1), np.random.default_rng(steps).lognormal(0, 1, (steps, 2))
        for signal, trace in values:
            noise.observe(*step_of(signal, trace))
        assert noise.steps == steps
        assert len(noise._sizes) <= _BLOCKS
        place = noise.finalize()[0]
        assert place["gradient_sq"]["mean"].value == pytest.approx(values[:, 0].mean(), rel=1e-11)
        assert place["gradient_noise"]["mean"].value == pytest.approx(values[:, 1].mean(), rel=1e-11)
        if FEWEST <= steps <= _BLOCKS:
            error = values[:, 0].std(ddof=1) / math.sqrt(steps)
            assert place["gradient_sq"]["mean"].error == pytest.approx(error, rel=1e-9)
            t = t_quantile(0.95, steps - 1)
            upper = place["gradient_sq"]["upper"].value
            assert upper == pytest.approx(values[:, 0].mean() + t * error, rel=1e-9)


@pytest.mark.parametrize("exponent", [-900, -200, 200, 900])
def test_very_small_and_large_gradients(exponent):
    noise, scaled = NoiseScale(3), NoiseScale(3)
    for mean, batch, samples in steps_for(40):
        noise.observe(mean, batch, samples)
        scaled.observe(mean * 2.0**exponent, batch * 2.0**exponent, samples)
    for ours, theirs in zip(scaled.finalize(), noise.finalize(), strict=True):
        assert ours["noise_scale"] == theirs["noise_scale"]
        for reducer, value in theirs["gradient_sq"].items():
            assert ours["gradient_sq"][reducer].value == value.value * 2.0**exponent


def test_few_steps_have_no_interval():
    noise = simulated(1, FEWEST - 1)
    for quantity in ("gradient_sq", "gradient_noise", "noise_scale"):
        reduced = noise.finalize()[0][quantity]
        assert math.isfinite(reduced["mean"].value)
        assert math.isnan(reduced["mean"].error)
        for reducer in ("lower", "upper"):
            assert math.isnan(reduced[reducer].value)
            assert not reduced[reducer].valid
            assert "8 steps" in reduced[reducer].note
    noise.observe(*gaussian_step(1, 8, torch.Generator().manual_seed(9)), 8)
    assert noise.finalize()[0]["gradient_noise"]["upper"].valid


def test_empty():
    for noise in (NoiseScale(2), NoiseScale(0)):
        for _ in range(3):
            noise.observe(*(torch.ones(noise.places),) * 2, 1)
        places = noise.finalize()
        assert len(places) == noise.places
        for place in places:
            assert place["skipped_steps"]["sum"].value == 3
            for quantity in ("gradient_sq", "gradient_noise", "noise_scale"):
                for value in place[quantity].values():
                    assert math.isnan(value.value)
                    assert (value.count, value.valid) == (0, False)
                    assert value.note.startswith("no step of this window had two samples or more")


def test_what_has_no_step_says_why():
    noise = NoiseScale(1)
    assert noise.finalize()[0]["noise_scale"]["mean"].note == "nothing recorded"
    noise.observe(torch.tensor([torch.nan]), torch.tensor([1.0]), 4)
    for reducer in ("mean", "ema"):
        assert noise.finalize()[0]["noise_scale"][reducer].note.startswith("no step of this window counts here")
    noise.observe(torch.tensor([5.0]), torch.tensor([2.0]), 4)
    assert noise.finalize()[0]["noise_scale"]["mean"].note.startswith("no interval")


def test_noise_without_a_gradient_has_no_upper_bound():
    noise, generator = NoiseScale(200), torch.Generator().manual_seed(0)
    for _ in range(40):
        grads = torch.randn(200, 8, 6, dtype=torch.float64, generator=generator)
        noise.observe(grads.square().sum(2).mean(1), grads.mean(1).square().sum(1), 8)
    unbounded = 0
    for place in noise.finalize():
        signal, ratio = place["gradient_sq"], place["noise_scale"]
        includes_0 = signal["lower"].value <= 0 <= signal["upper"].value
        assert (ratio["upper"].value == INF) == (signal["lower"].value <= 0)
        unbounded += includes_0
        if includes_0:
            assert ratio["upper"].valid
            assert "gradient_sq" in ratio["upper"].note
            assert 0 < ratio["lower"].value < INF
            assert ratio["mean"].valid == (signal["mean"].value > 0)
            assert ratio["mean"].value > 0
    assert unbounded > 180


def test_equal_samples_have_no_noise():
    noise = NoiseScale(1)
    for _ in range(10):
        noise.observe(torch.tensor([4.0]), torch.tensor([4.0]), 8)
    place = noise.finalize()[0]
    assert [place["noise_scale"][r].value for r in ("mean", "lower", "upper", "ema")] == [0, 0, 0, 0]
    assert place["gradient_sq"]["mean"].value == 4


def test_sums_passed_as_means_are_noticed():
    """The squared norm of a sum of gradients is longer than the mean of their squares."""
    noise, generator = NoiseScale(1), torch.Generator().manual_seed(0)
    for _ in range(20):
        mean, batch = gaussian_step(1, 8, generator)
        noise.observe(mean, batch * 64, 8)
    for quantity in ("gradient_sq", "gradient_noise", "noise_scale"):
        for value in noise.finalize()[0][quantity].values():
            assert not value.valid
            assert "loss reduction" in value.note


def test_steps_without_numbers_are_dropped_place_by_place():
    clean, dirty = NoiseScale(4), NoiseScale(4)
    generator = torch.Generator().manual_seed(3)
    for i in range(50):
        mean, batch = gaussian_step(4, 8, generator)
        clean.observe(mean, batch, 8)
        dirty.observe(mean, batch, 8)
        if i % 5 == 0:
            bad = torch.tensor([1.0, NAN, INF, 1.0], dtype=torch.float64)
            dirty.observe(bad.roll(i // 5), torch.tensor([0.5, 0.5, 0.5, -1.0]).double().roll(i // 5), 8)
    skipped = [place["skipped_steps"]["sum"] for place in dirty.finalize()]
    assert [value.value for value in skipped] == [7, 7, 8, 8]  # of 10 such steps
    assert all(value.count == 60 for value in skipped)
    for reducer in ("mean", "lower", "upper", "ema"):
        assert all(value["noise_scale"][reducer].valid for value in dirty.finalize())
    noise = NoiseScale(2)
    for i in range(10):
        noise.observe(*step_of([1.0, NAN if i % 2 else 1.0], [2.0, 2.0]))
    places = noise.finalize()
    assert [place["skipped_steps"]["sum"].value for place in places] == [0, 5]
    assert [place["noise_scale"]["mean"].count for place in places] == [10, 5]
    assert [place["noise_scale"]["ema"].count for place in places] == [10, 5]
    assert [place["noise_scale"]["mean"].value for place in places] == [2, 2]
    assert [place["noise_scale"]["ema"].value for place in places] == pytest.approx([2, 2])


def test_numbers_too_large_for_float64_are_dropped():
    noise = NoiseScale(1)
    noise.observe(torch.tensor([1e308]).double(), torch.tensor([0.0]).double(), 100)
    noise.observe(*step_of(1.0, 2.0))
    assert noise.finalize()[0]["noise_scale"]["mean"].value == 2
    assert noise.finalize()[0]["skipped_steps"]["sum"].value == 1


def steps_for(count, seed=0, places=3):
    rng = np.random.default_rng(seed)
    return [step_of(rng.lognormal(0, 1, places), rng.lognormal(0, 1, places)) for _ in range(count)]


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 5), (5, 0), (5, 9), (40, 3), (3, 200), (100, 100), (32, 32)])
@pytest.mark.parametrize("decay", [0.0, 0.97])
def test_merging_is_observing_everything(first, second, decay):
    whole, one, two = (NoiseScale(3, decay=decay) for _ in range(3))
    for i, step in enumerate(steps_for(first + second)):
        whole.observe(*step)
        (one if i < first else two).observe(*step)
    two.observe(*steps_for(1)[0][:2], 0)
    whole.observe(*steps_for(1)[0][:2], 1)
    pending = copy.deepcopy(two)  # two itself is folded by reading its state
    untouched = two.state_dict()
    one.merge(pending)
    assert_same_state(pending.state_dict(), untouched)
    assert (one.steps, one.skipped) == (whole.steps, whole.skipped) == (first + second, 1)
    assert len(one._sizes) <= _BLOCKS
    for quantity in ("gradient_sq", "gradient_noise", "noise_scale"):
        for reducer in ("mean", "ema"):
            ours, theirs = numbers(one, quantity, reducer), numbers(whole, quantity, reducer)
            np.testing.assert_allclose(ours, theirs, rtol=1e-10)
    one.observe(*step_of([1.0] * 3, [1.0] * 3))
    assert one.steps == first + second + 1


def test_merging_with_itself():
    noise = simulated(2, 20)
    before = numbers(noise, "noise_scale", "mean")
    noise.merge(noise)
    assert noise.steps == 40
    np.testing.assert_allclose(numbers(noise, "noise_scale", "mean"), before, rtol=1e-12)


def test_sliding_windows():
    noise, blocks, steps = NoiseScale(3), [], steps_for(90)
    for i, step in enumerate(steps):
        if i and i % 30 == 0:
            blocks.append(noise.take())
        noise.observe(*step)
    whole = NoiseScale(3)
    for step in steps:
        whole.observe(*step)
    state = noise.state_dict()
    for ours, theirs in zip(noise.finalize(blocks), whole.finalize(), strict=True):
        for quantity in ("gradient_sq", "gradient_noise", "noise_scale"):
            for reducer in ("mean", "ema"):
                assert ours[quantity][reducer].value == pytest.approx(theirs[quantity][reducer].value, rel=1e-12)
                assert ours[quantity][reducer].count == 90
            assert ours[quantity]["upper"].valid
    assert_same_state(noise.state_dict(), state)
    assert noise.finalize()[0]["noise_scale"]["mean"].count == 30


@pytest.mark.parametrize("steps", [0, 1, 31, 32, 33, 100])
def test_state(steps):
    noise, loaded = NoiseScale(3), NoiseScale(3)
    loaded.observe(*steps_for(1, seed=8)[0])
    for step in steps_for(steps):
        noise.observe(*step)
    noise.observe(*steps_for(1)[0][:2], 1)
    loaded.load_state_dict(noise.state_dict())
    assert_same_state(loaded.state_dict(), noise.state_dict())
    for step in steps_for(40, seed=1):
        noise.observe(*step)
        loaded.observe(*step)
    assert_same_state(loaded.state_dict(), noise.state_dict())
    assert loaded.finalize() == noise.finalize()
    assert_same_state(copy.deepcopy(noise).state_dict(), noise.state_dict())


def changed(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {"version": 2}, "version: the state has 2, this one has 1"),
        (lambda s: {"places": 4}, "places: the state has 4"),
        (lambda s: {"decay": 0.5}, "decay"),
        (lambda s: {"sizes": [1] * 33}, "sizes"),
        (lambda s: {"sizes": [0, 1]}, "sizes"),
        (lambda s: {"sizes": [*s["sizes"], 1]}, "sums: expected"),
        (lambda s: {"block_steps": 3}, "block_steps"),
        (lambda s: {"skipped": -1}, "skipped"),
        (lambda s: {"sums": s["sums"].float()}, "sums: expected torch.float64"),
        (lambda s: {"sums": changed(s["sums"], (0, 1, 0), NAN)}, "sums: holds numbers that are not finite"),
        (lambda s: {"sums": changed(s["sums"], (0, 0, 0), 3)}, "sums: the steps used"),
        (lambda s: {"sums": changed(s["sums"], (0, 0, 0), 0.5)}, "sums: the steps used"),
        (lambda s: {"ema": s["ema"][:3]}, "ema: expected"),
        (lambda s: {"ema": changed(s["ema"], (0, 0), 0)}, "ema"),
        (lambda s: {"ema": changed(s["ema"], (0, 0), 2)}, "ema"),
    ],
)
def test_states_that_do_not_fit(change, words):
    noise = NoiseScale(3)
    for step in steps_for(40):
        noise.observe(*step)
    before = noise.state_dict()
    with pytest.raises(ValueError, match=words):
        noise.load_state_dict(before | change(before))
    assert_same_state(noise.state_dict(), before)
    with pytest.raises(ValueError, match="state: expected a dict"):
        noise.load_state_dict([])


def test_merges_that_do_not_fit():
    for other in (NoiseScale(2), NoiseScale(3, decay=0.5)):
        with pytest.raises(ValueError, match="(places|decay): the other one has"):
            NoiseScale(3).merge(other)


def test_refusals():
    noise, good = NoiseScale(2), torch.ones(2)
    for bad in (torch.ones(3), torch.ones(2, 1), torch.ones(2, dtype=torch.int64), [1.0, 1.0]):
        with pytest.raises(ValueError, match="mean_norm_sq: expected"):
            noise.observe(bad, good, 4)
        with pytest.raises(ValueError, match="batch_grad_sq: expected"):
            noise.observe(good, bad, 4)
    for samples in (-1, 2.0, True, torch.tensor(4)):
        with pytest.raises(ValueError, match="samples"):
            noise.observe(good, good, samples)
    assert noise.steps == noise.skipped == 0
    for arguments, name in (
        ({"places": -1}, "places"),
        ({"places": 1.0}, "places"),
        ({"places": 1, "decay": 1.0}, "decay"),
        ({"places": 1, "decay": NAN}, "decay"),
        ({"places": 1, "confidence": 1.0}, "confidence"),
    ):
        with pytest.raises(ValueError, match=name):
            NoiseScale(**arguments)


def test_what_is_observed_needs_no_gradient_and_may_change():
    noise, mean = NoiseScale(1), torch.tensor([5.0], requires_grad=True)
    noise.observe(mean, torch.tensor([2.0]), 4)
    assert not noise.state_dict()["sums"].requires_grad
    mean.detach().fill_(100)
    assert noise.finalize()[0]["gradient_sq"]["mean"].value == 1


@pytest.mark.parametrize("seed", range(20))
def test_fiellers_interval_is_the_set_it_should_be(seed):
    """Against a scan of ratios."""
    rng = np.random.default_rng(seed)
    noise, signal = rng.lognormal(0.5, 1), rng.normal(0.3, 1)
    root = rng.normal(0, 0.3, (2, 2))
    covariance, t = root @ root.T, 2.0
    low, high = fieller(noise, signal, covariance, t)
    ratios = np.concatenate([[0], np.geomspace(1e-4, 1e6, 20_001)])
    spread = covariance[1, 1] - 2 * ratios * covariance[0, 1] + ratios**2 * covariance[0, 0]
    inside = (noise - ratios * signal) ** 2 <= t**2 * spread
    if signal**2 <= t**2 * covariance[0, 0]:
        assert high == INF
    expected = (ratios >= low) & (ratios <= high)
    away = ~np.isclose(ratios, low, rtol=1e-3) & ~np.isclose(ratios, high, rtol=1e-3)
    assert expected[inside & away].all()
    if noise > t * math.sqrt(covariance[1, 1]):  # else it is two pieces, or ends where |G|^2 is certainly below 0
        assert inside[expected & away].all()


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 8, 30, 31])
def test_students_t_against_numerical_integration(freedom):
    for confidence in (0.5, 0.8, 0.95, 0.99):
        t = t_quantile(confidence, freedom)
        x = np.linspace(-t, t, 200_001)
        log_norm = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
        density = np.exp(log_norm - (freedom + 1) / 2 * np.log1p(x**2 / freedom))
        area = ((density[1:] + density[:-1]) / 2 * np.diff(x)).sum()
        assert area == pytest.approx(confidence, abs=1e-6)


@pytest.mark.gpu
def test_cuda_without_synchronising():
    noise, plain, steps = NoiseScale(3), NoiseScale(3), steps_for(100)
    on_device = [(mean.cuda(), batch.cuda(), samples) for mean, batch, samples in steps]
    noise.observe(*on_device[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in on_device[1:]:
            noise.observe(*step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for step in steps:
        plain.observe(*step)
    for key in ("sums", "ema"):
        torch.testing.assert_close(noise.state_dict()[key], plain.state_dict()[key], rtol=1e-13, atol=1e-300)
