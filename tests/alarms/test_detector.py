"""Scores against a plain float64 specification, when alarms are silent, and the budget."""

from __future__ import annotations

import math
from statistics import median

import numpy as np
import pytest

from lipcore.alarms.baseline import Baseline, medians_and_deviations
from lipcore.alarms.budget import Budget, predicted
from lipcore.alarms.detector import Columns, Detector
from lipcore.alarms.event import AlarmEvent
from lipcore.alarms.lasting import Lasting
from lipcore.alarms.signals import SIGNALS

SILENT, REFRACTORY = 100, 20


def score(values: list[float], x: float) -> float:
    """z of x against the last 100 of the quiet values: the specification."""
    kept = [value for value in values if not math.isnan(value)][-100:]
    if len(kept) < 100 or math.isnan(x):
        return math.nan
    middle = median(kept)
    return (x - middle) / (1.4826 * median(abs(value - middle) for value in kept) + 0.01)


def detector(*names: str, groups: tuple[str, ...] = ("a", "b"), budget: float = 1.0) -> tuple[Detector, Budget]:
    kept = Budget(budget)
    return Detector(Columns.of({name: SIGNALS[name] for name in names}, groups), kept), kept


def alarms(found: Detector, logs: np.ndarray, first: int = 1) -> list[AlarmEvent]:
    events = (found.step(first + i, row) for i, row in enumerate(logs))
    return [event for event in events if event is not None]


def noise(steps: int, columns: int, seed: int = 0, scale: float = 0.1) -> np.ndarray:
    return scale * np.random.default_rng(seed).standard_normal((steps, columns))


def test_scores_are_those_of_the_specification() -> None:
    logs = noise(160, 3)
    logs[::7, 1] = np.nan
    logs[40, 2] = np.nan
    quiet = np.random.default_rng(1).random((160, 3)) < 0.9
    baseline, kept = Baseline(3), [[], [], []]
    scored = 0
    for row, taken in zip(logs, quiet, strict=True):
        expected = [score(kept[i], row[i]) for i in range(3)]
        np.testing.assert_allclose(baseline.scores(row), expected, rtol=1e-12, atol=1e-12)
        baseline.take(row, taken)
        for i in range(3):
            kept[i] += [row[i]] * bool(taken[i])
        scored += sum(not math.isnan(value) for value in expected)
    assert scored > 100


def test_medians_and_deviations_have_the_bits_of_their_definitions() -> None:
    rng = np.random.default_rng(0)
    rows = [np.zeros(100), np.arange(100.0), np.r_[np.zeros(50), np.ones(50)], np.r_[np.zeros(99), 7.0]]
    rows += [np.r_[np.zeros(75), rng.random(25)], np.exp(3 * rng.standard_normal(100)), rng.integers(0, 3, 100) / 3]
    values = np.sort(np.stack(rows + [-row for row in rows] + list(rng.standard_normal((50, 100)))), axis=1)
    medians, deviations = medians_and_deviations(values)
    np.testing.assert_array_equal(medians, np.median(values, axis=1))
    np.testing.assert_array_equal(deviations, np.median(np.abs(values - medians[:, None]), axis=1))


def test_cumulative_sums_are_those_of_the_specification() -> None:
    limits, two_sided = np.array([3.0, 6.0]), np.array([False, True])
    sums, up, down = Lasting(two_sided), [0.0, 0.0], [0.0, 0.0]
    rng = np.random.default_rng(0)
    for _ in range(50):
        z, quiet = rng.normal(scale=4, size=2), rng.random(2) < 0.9
        for i in range(2):
            up[i] = max(0.0, up[i] + z[i] / limits[i] - 0.5) if quiet[i] else 0.0
            down[i] = max(0.0, down[i] - z[i] / limits[i] - 0.5) if quiet[i] and two_sided[i] else 0.0
        expected = [(u if u >= d else -d) / 5 for u, d in zip(up, down, strict=True)]
        np.testing.assert_allclose(sums.observe(z / limits, quiet), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("at", "told"), [(99, False), (100, True)])
def test_the_first_hundred_steps_are_silent(at: int, told: bool) -> None:
    logs = noise(at + 1, 1)
    logs[at] += 5
    assert bool(alarms(detector("loss")[0], logs)) is told


@pytest.mark.parametrize(("name", "by", "told"), [
    ("loss", 2.0, True), ("loss", -2.0, False), ("update_norm", 2.0, True), ("update_norm", -2.0, True),
    ("grad_norm", -2.0, True), ("grad_norm", 0.3, False),
])  # fmt: skip
def test_which_ways_alarm(name: str, by: float, told: bool) -> None:
    found, _ = detector(name, groups=("a",))
    logs = noise(121, 1, scale=0.08)
    logs[120] = by
    assert [event.step for event in alarms(found, logs)] == [121] * told


def test_an_alarm_is_alone_for_twenty_steps() -> None:
    logs = noise(200, 1, scale=0.05)
    logs[[120, 130, 141, 145], 0] = 3.0, 3.5, 3.0, 60.0  # the last one is in the third one's time
    found, budget = detector("loss", budget=1000.0)
    assert [event.step for event in alarms(found, logs)] == [121, 142]
    assert budget.alarms == 2


def test_what_alarms_stays_out_of_the_baseline_and_nan_always_does() -> None:
    logs = noise(140, 1)
    logs[120:125] = 5.0
    logs[125:130] = np.nan
    found, _ = detector("loss")
    alarms(found, logs)
    quiet = [*logs[:120, 0], *logs[130:, 0]]
    np.testing.assert_allclose(found._baseline.scores(np.array([1.0])), score(quiet, 1.0), rtol=1e-12)


def test_a_new_level_alarms_once() -> None:
    logs = noise(500, 1)
    logs[200:] += 4
    assert [event.step for event in alarms(detector("loss")[0], logs)] == [201]


def test_a_small_change_that_lasts_alarms_without_a_single_step_over_the_limit() -> None:
    logs = noise(200, 1, scale=0.003)
    logs[140:] += 0.065
    found, _ = detector("update_norm", groups=("a",))
    (first, *_) = alarms(found, logs)
    assert 145 < first.step < 190
    assert "has been higher than usual" in first.message
    assert first.place == "a"
    quiet = list(logs[: first.step - 1, 0])
    assert max(abs(score(quiet[:i], quiet[i])) for i in range(101, first.step - 1)) < 6


def test_the_place_is_that_of_the_update_and_of_the_gradient_for_gradients() -> None:
    logs = noise(121, 5, scale=0.02)  # loss; updates of a, b; gradients of a, b
    logs[120] = [2.0, 0.0, 0.5, 0.4, 0.0]
    (event,) = alarms(detector("loss", "update_norm", "grad_norm")[0], logs)
    assert (event.signal, event.place) == ("loss", "b")
    logs[120] = [0.0, 0.0, 0.5, 0.9, 0.0]
    (event,) = alarms(detector("loss", "update_norm", "grad_norm")[0], logs)
    assert (event.signal, event.place) == ("grad_norm", "a")
    logs[120] = [2.0, 0.0, 0.0, 0.0, 0.0]
    (event,) = alarms(detector("loss", "update_norm", "grad_norm")[0], logs)
    assert (event.signal, event.place) == ("loss", "total")


def multiplier_of(
    stretches: list[tuple[float, int]], per_1000: float, least: float, direction: int, before: float
) -> float:
    """The multiplier after some stretches of 20 steps, each its peak and the direction of its rate: the
    specification."""
    peaks = sorted((peak for peak, own in stretches if own == direction), reverse=True)
    allowed = per_1000 * 20 * len(peaks) / 1000
    count = math.ceil(allowed)
    seen = peaks[count - 1] if count <= len(peaks) else 0.0
    if len(peaks) < 5:
        return max(1.0, seen, before)
    k = max(count, min(math.ceil(len(peaks) / 3), count + 9))
    if k >= len(peaks):
        return max(least, seen)
    mean = (sum(math.log(peak / peaks[k]) for peak in peaks[:k]) + 5 * 0.1) / (k + 5)
    farther = (k + 5) * mean * ((k / allowed) ** (1 / (k + 5)) - 1)
    return max(least, seen, min(1.0, peaks[k] * math.exp(farther)))


@pytest.mark.parametrize("scale", [0.3, 0.8, 3.0])
@pytest.mark.parametrize("per_1000", [1.0, 5.0, 1000.0])
@pytest.mark.parametrize("least", [1.0, 0.5])
def test_the_multiplier_is_that_of_the_specification(scale: float, per_1000: float, least: float) -> None:
    budget, stretches, rng = Budget(per_1000, least), [], np.random.default_rng(0)
    rate = direction = 0
    for stretch in range(120):
        own = (0, 1, 0, -1)[stretch // 12 % 4]  # 12 stretches of each kind in turn
        scores = scale * rng.random(20)
        before = budget.multiplier if own == direction else max(1.0, budget.multiplier)
        top = min(scores.max(), 2 * budget.multiplier)
        for value in scores:
            rate += 0.01 * own
            budget.observe(float(value), alarmed=False, log_rate=rate)
        direction = own
        stretches.append((top, own))
        assert budget.multiplier == pytest.approx(multiplier_of(stretches, per_1000, least, own, before), rel=1e-12)


def test_the_multiplier_falls_late_and_slowly_where_nothing_happens() -> None:
    budget, rng, kept = Budget(1.0, 0.5), np.random.default_rng(0), []
    for _ in range(3000):
        budget.observe(0.1 * abs(rng.standard_normal()), alarmed=False)
        kept.append(budget.multiplier)
    assert set(kept[:99]) == {1.0}
    assert kept[99] < 1
    assert kept[-1] == 0.5


@pytest.mark.parametrize("per_1000", [1e-3, 1e-20, 5e-324])
def test_a_budget_of_next_to_nothing_leaves_the_limits_as_they_are(per_1000: float) -> None:
    budget, rng = Budget(per_1000, 0.5), np.random.default_rng(0)
    for _ in range(400):
        budget.observe(0.5 + 0.2 * rng.random(), alarmed=False)
    assert budget.multiplier == 1.0
    assert 1 < predicted([1.0] * 20, per_1000) < math.inf


def test_a_budget_of_more_than_every_step_is_one_of_every_step() -> None:
    budgets = [Budget(per_1000, 0.5) for per_1000 in (1e308, 1e3)]
    for score in np.random.default_rng(0).random(4000):
        for budget in budgets:
            budget.observe(float(score), alarmed=False)
    assert [budget.multiplier for budget in budgets] == [0.5, 0.5]


def test_peaks_of_another_phase_do_not_count() -> None:
    """Scores several times as large while the learning rate rises."""
    budget, rng = Budget(1.0, 0.5), np.random.default_rng(0)
    for step in range(2000):
        budget.observe(2 + rng.random(), alarmed=False, log_rate=1e-3 * step)
    assert budget.multiplier > 1.9
    stands = budget.multiplier
    for _ in range(80):
        budget.observe(rng.random(), alarmed=False, log_rate=1.999)
    assert budget.multiplier == stands
    for _ in range(500):
        budget.observe(0.5 + 0.1 * rng.random(), alarmed=False, log_rate=1.999)
    assert budget.multiplier < 1
    for step in range(20):
        budget.observe(2 + rng.random(), alarmed=False, log_rate=2 + 1e-3 * step)
    assert budget.multiplier > 1.9  # as in the first phase


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.ci), pytest.param(2, marks=pytest.mark.ci)])
def test_quiet_noise_uses_the_budget_and_keeps_to_it(seed: int) -> None:
    """Normal noise is never over the limits; a score of 0.85 of the limit is told with the lower ones alone."""
    steps, budget = 1500, 1.0
    logs = 0.3 * np.random.default_rng(2000 + seed).standard_normal((steps, 4))
    before = list(logs[:-1, 2])
    logs[-1, 2] = median(before[-SILENT:]) + 0.85 * 6 / (score(before, 1.0) - score(before, 0.0))
    columns = Columns.of({name: SIGNALS[name] for name in ("update_norm", "grad_norm")}, ("a", "b"))
    told = {least: alarms(Detector(columns, Budget(budget, least)), logs) for least in (1.0, 0.5)}
    assert told[1.0] == []
    assert told[0.5][-1].step == steps
    expected = budget * (steps - SILENT) / 1000
    assert len(told[0.5]) - 1 <= expected + 3 * math.sqrt(expected)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.ci), pytest.param(2, marks=pytest.mark.ci)])
def test_noise_with_heavy_tails_keeps_to_the_budget(seed: int) -> None:
    """Student's t with 3 degrees of freedom is over limits of normal noise all the time; seeds are not those that
    anything was chosen by."""
    rng, steps, budget = np.random.default_rng(1000 + seed), 3000, 2.0
    found, kept = detector("update_norm", "grad_norm", budget=budget)
    logs = 0.3 * rng.standard_t(3, (steps, 4))
    late = [event for event in alarms(found, logs) if event.step > 1000]
    assert kept.steps == steps - SILENT
    assert kept.multiplier > 1
    expected = budget * (steps - 1000) / 1000
    assert len(late) <= expected + 3 * math.sqrt(expected)
    free, unbounded = detector("update_norm", "grad_norm", budget=1000.0)  # the control: without a budget
    assert len(alarms(free, logs[:1000])) > 3 * budget
    assert unbounded.multiplier == 1
