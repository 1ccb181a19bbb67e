"""bench/spikes: what is recorded is what lipcore's alarms see, and the counts are those of the definitions."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lipcore
from lipcore.alarms import Alarms

BENCH = Path(__file__).parents[2] / "bench"
if not BENCH.exists():
    pytest.skip("there is no bench folder", allow_module_level=True)
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def spikes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(BENCH))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for name in [
        name for name in sys.modules if name in ("small_transformer", "report", "evidence") or name.startswith("spikes")
    ]:
        del sys.modules[name]


def test_the_final_runs_are_none_of_those_that_thresholds_come_from() -> None:
    from spikes.suite import Size, jobs

    chosen, final = ({job[1:3] for job in jobs(Size(), calibration=first)} for first in (True, False))
    assert (len(chosen), len(final)) == (36, 78)
    assert not chosen & final


@pytest.mark.ci
def test_what_goes_with_what_at_equal_loss_is_that_of_the_committed_runs() -> None:
    import evidence

    committed = json.loads(evidence.RESULTS.read_text(encoding="utf-8"))["at_equal_loss"]
    assert evidence.json_ready(evidence.at_equal_loss(), digits=4) == committed
    assert committed["label corruption, same seed"]["epochs"]["rho"] == 1.0


@pytest.mark.ci
def test_factors_of_theorem_3_with_dropout() -> None:
    import evidence

    found = evidence.dropout(0.5, 0, begin=0.66, end=0.6)
    product = np.prod([found[name] for name in ("beta", "phi", "log(sum n_l)", "1 + gamma", "1 / p_min", "1 / margin")])
    assert found["1 / radius"] == pytest.approx(product * found["1 / (mu (1 - mu))"])
    assert 0.5 < found["test loss"] < 0.7


def test_alarms_of_a_recorded_training_are_those_of_the_monitor() -> None:
    from spikes.detectors import shipped
    from spikes.faults import FAULTS, Injector
    from spikes.models import TASKS, Training
    from spikes.run import joined, record

    training, live = Training(TASKS["mlp"], 0), Alarms()
    (element,) = (fault for fault in FAULTS if fault.kind == "element")

    class Late(Injector):
        """The fault at step 110 of one and the same Monitor."""

        def weights(self, k: int) -> None:
            super().weights(k - 110)

    injector = Late(element, 0, training, 0)
    series = record(training, 116, injector, alarms=live)
    events = [(event.step, event.signal, event.place) for event in live.events]
    assert events[0][::2] == (111, lipcore.by_block(injector.target))

    def told(series: Any) -> list[tuple[int, str, str]]:
        return [(event.step, event.signal, event.place) for event in shipped(series)]

    assert told(series) == events
    fixed = {name: series[name] for name in ("places", "levels")}
    halves = [{name: array[part] for name, array in series.items()} for part in (slice(100), slice(100, None))]
    whole = joined(halves[0] | fixed, halves[1] | fixed)
    assert told(whole) == events


def test_scores_thresholds_and_alarms_are_those_of_the_definitions() -> None:
    from spikes.detectors import Scores, alarms, scores_of, threshold

    logs = np.random.default_rng(0).standard_normal((130, 2))
    z = scores_of(logs)
    before = logs[20:120, 1]
    middle = np.median(before)
    assert z[120, 1] == pytest.approx((logs[120, 1] - middle) / (1.4826 * np.median(abs(before - middle)) + 0.01))
    assert not z[:100].any()
    clean = [np.random.default_rng(i).random(1100) for i in range(3)]
    limit = threshold(clean, 2.0)  # 3000 steps that are scored: 6 stretches are over it
    assert sum(float(score[t : t + 20].max()) > limit for score in clean for t in range(100, 1100, 20)) == 6
    score = np.zeros(200)
    score[[50, 120, 130, 141, 190]] = 9.0
    assert alarms(score, 8.0) == [120, 141, 190]
    assert Scores(np.array([[1.0, 3.0, 2.0]]), ["a", "", "b"]).place(0) == "b"


def test_the_light_is_on_ten_steps_longer_than_it_is_over_its_limit() -> None:
    from spikes.detectors import light

    rms = np.exp(0.1 * np.random.default_rng(0).standard_normal(140))
    rms[[99, 120]] = 5.0  # before there are a hundred steps to compare with, and then
    on = light({"normalized_update_rms": rms}).most
    assert np.flatnonzero(on).tolist() == list(range(120, 131))


def test_intervals_of_shares() -> None:
    from spikes.evaluate import interval, rate

    assert interval(34, 34) == (pytest.approx(34 / (34 + 1.959964**2)), pytest.approx(1.0))
    assert interval(5, 10) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert interval(0, 0) == (0.0, 1.0)
    found = rate(3, 2000)
    assert (found["per_1000"], found["low"] < 1.5 < found["high"]) == (1.5, True)


def test_a_fork_goes_on_as_the_training_would() -> None:
    from spikes.models import TASKS, Training
    from spikes.run import joined, losses_of, record

    training = Training(TASKS["cnn"], 3)
    before = record(training, 5)
    fork = training.fork()
    assert losses_of(training.fork(), 3) == losses_of(Training(TASKS["cnn"], 3), 8)[5:]  # without a Monitor
    whole = record(Training(TASKS["cnn"], 3), 8)
    both = joined(before, record(fork, 3))
    for name in ("loss", "rate", "grad_norm", "update_norm", "kurtosis"):
        np.testing.assert_array_equal(both[name], whole[name])
    assert losses_of(Training(TASKS["cnn"], 3), 8) == whole["loss"].tolist()


@pytest.mark.parametrize("kind", ["overflow", "lost"])
def test_faults_in_a_gradient_are_there_when_it_is_read(kind: str) -> None:
    from spikes.faults import FAULTS, Injector
    from spikes.models import TASKS, Training
    from spikes.run import record

    (number,) = (i for i, fault in enumerate(FAULTS) if fault.kind == kind)
    plain = record(Training(TASKS["mlp"], 0), 3)
    training = Training(TASKS["mlp"], 0)
    injector = Injector(FAULTS[number], number, training, 0)
    series = record(training, 3, injector)
    column = series["places"].tolist().index(injector.target)
    ratio = series["grad_norm"][:, column] / plain["grad_norm"][:, column]
    assert ratio[0] > 5 if kind == "overflow" else not ratio.any()
    assert series["loss"][0] == plain["loss"][0]


def test_thresholds_were_frozen_for_every_detector_of_every_model() -> None:
    from spikes.detectors import JOINT, SINGLE
    from spikes.models import TASKS
    from spikes.suite import THRESHOLDS

    frozen = json.loads(THRESHOLDS.read_text(encoding="utf-8"))["thresholds"]
    assert list(frozen) == list(TASKS)
    for task, limits in frozen.items():
        missing = {name for name in [*SINGLE, *JOINT] if name not in limits}
        assert not missing if task != "cnn" else missing == {"RMS_t per parameter", "normalized_update_rms"}


@pytest.mark.ci
@pytest.mark.parametrize("task", ["transformer", "mlp", "cnn"])
def test_the_suite_in_a_small_size(task: str, tmp_path: Path) -> None:
    from spikes import figure, suite

    size = suite.Size(calibration=1, clean=1, faulty=1, organic=1, steps=220, before=130, tasks=(task,))
    suite.record_all(suite.jobs(size, calibration=True), tmp_path, 1)
    suite.calibrate(size, tmp_path, tmp_path / "thresholds.json")
    suite.record_all(suite.jobs(size, calibration=False), tmp_path, 1)
    limits = json.loads((tmp_path / "thresholds.json").read_text())
    found: dict[str, Any] = suite.results(size, tmp_path, limits, {})
    for by_detector in found["faults"][task].values():
        assert all(row["runs"] == 1 and 0 <= row["found"] <= 1 for row in by_detector.values())
    assert found["faults"][task]["one weight = 16"]["update norm per group"]["right"] == 1
    assert found["explosions"][task]["explosions"]
    assert ("warning light" in found["spikes"][task]["detectors"]) == (task != "cnn")  # which has no AdamW
    suite.write(tmp_path / "spikes.json", found)
    figure.draw(json.loads((tmp_path / "spikes.json").read_text()), tmp_path / "spikes.png")
    assert (tmp_path / "spikes.png").stat().st_size > 5_000
