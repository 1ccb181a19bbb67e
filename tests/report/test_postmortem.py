"""The post-mortem of a step: it names step, layer and sample of planted faults, and says what it does not know."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_runs import AT, SAMPLE, faulty
from few import few
from recorded_runs import HOSTILE, recorded

from lipcore.alarms import Alarms
from lipcore.cli import main
from lipcore.recording import RunRecord, open_run
from lipcore.recording.run import Event
from lipcore.report.alarms_told import worst_first
from lipcore.report.postmortem.account import Account
from lipcore.report.postmortem.causes import cause_of, checks_of
from lipcore.report.postmortem.changes import scores
from lipcore.report.postmortem.reading import account_of
from lipcore.report.postmortem.samples import samples_of
from lipcore.report.postmortem.words import text_of, told_of
from lipcore.report.stretch import Stretch


def of(folder: Path, fault: str, step: int | None = None, **how: Any) -> tuple[Account, str]:
    faulty(folder / "a", fault, **how)
    with open_run(folder / "a") as run:
        account = run.postmortem(step)
    text = str(account)
    assert max(map(len, text.splitlines())) <= 80
    return account, text


# ---- planted faults


def test_a_learning_rate_of_one_layer_in_one_step(tmp_path: Path) -> None:
    account, text = of(tmp_path, "rate")
    assert (account.step, account.begin) == (AT, AT)
    first = account.changes[0]
    assert (first.step, first.place, first.what) == (AT, "2", "update norm")
    assert first.parameter in ("2.weight", "2.bias")
    assert 20 < first.times < 60
    assert account.beyond is not None
    assert account.beyond[0] == "2"
    (jump,) = account.jumps
    assert jump.group == "param_groups[1]: 2.weight to 2.bias"
    assert (jump.here, jump.before) == pytest.approx((1.5, 0.05))
    assert "the learning rate of param_groups[1]: 2.weight to 2.bias was 1.5 in this step, 30 times" in cause_of(
        account
    )
    assert checks_of(account)[0].startswith("Who set the learning rate of param_groups[1]")
    assert not any("ample" in check or "batch of" in check for check in checks_of(account))
    assert account.places[0].place == "2"
    assert "First: step 140, update norm of layer 2" in text


def test_a_sample_with_a_huge_input(tmp_path: Path) -> None:
    account, text = of(tmp_path, "sample")
    assert (account.step, account.begin) == (AT, AT)
    assert account.at_begin[0].what == "gradient norm"
    assert account.at_begin[0].place == "0"  # the layer that it comes in by
    samples = account.samples[0]
    assert (samples.step, samples.count, samples.verdict, samples.suspects) == (AT, 32, "single", [SAMPLE])
    norms, losses = samples.rankings
    assert (norms.by, norms.top[0].id, losses.top[0].id) == ("gradient norm", SAMPLE, SAMPLE)
    assert norms.top[0].norm > 50 * norms.median  # type: ignore[operator]
    assert f"of its 32 samples {SAMPLE} stands out" in cause_of(account)
    assert checks_of(account)[0].startswith(f"Look at sample {SAMPLE}")
    assert f"torch.set_rng_state() with run.batches({AT}, {AT})[0].rng_state" in " ".join(text.split())


@pytest.mark.ci
def test_a_bad_batch(tmp_path: Path) -> None:
    account, _ = of(tmp_path, "batch")
    assert (account.step, account.begin, account.at_begin[0].what) == (AT, AT, "loss")
    assert {one.place for one in account.places} == {"0", "2", "4"}
    assert account.samples[0].verdict == "batch"
    assert "so was the whole batch, not single samples" in cause_of(account)
    assert checks_of(account)[0].startswith(f"Look at the whole batch of step {AT} (32 samples)")


@pytest.mark.ci
def test_a_wrong_label(tmp_path: Path) -> None:
    account, _ = of(tmp_path, "label")
    assert account.samples[0].suspects == [SAMPLE]
    assert account.samples[0].rankings[1].share > 0.9


@pytest.mark.ci
def test_a_value_that_is_not_finite(tmp_path: Path) -> None:
    account, text = of(tmp_path, "nan")
    assert (account.step, account.begin, account.at_begin[0].what) == (AT, AT, "loss")
    assert not account.at_begin[0].finite
    assert account.samples[0].suspects == [SAMPLE]
    assert "The loss is the first value that is not finite" in cause_of(account)
    assert f"{SAMPLE} stands out" in cause_of(account)
    assert re.search(rf"{SAMPLE} +not finite +not finite", text)


@pytest.mark.ci
def test_weights_that_are_written_to_are_not_blamed_on_the_samples(tmp_path: Path) -> None:
    account, _ = of(tmp_path, "weights")
    assert (account.begin, account.at_begin[0].place, account.at_begin[0].what) == (AT + 1, "2", "update norm")
    assert account.beyond is not None
    assert account.beyond[0] == "2"
    assert "as its gradient explains: the optimizer's state, or other code that wrote to the weights" in cause_of(
        account
    )
    assert not any("whole batch" in check for check in checks_of(account))


def test_an_element_that_the_optimizer_did_not_move_is_told_first(tmp_path: Path) -> None:
    """It shows in no norm; an alarm of another kind with a larger score is not chosen before it."""
    alarms = Alarms(signals=["loss", "update_norm", "grad_norm", "unexplained_movement"])
    account, text = of(tmp_path, "element", alarms=alarms, samples=False, steps=150)
    assert (account.step, [one.step for one in account.unexplained]) == (AT + 1, [AT + 1])
    (event,) = account.unexplained
    said = f"In step {AT + 1}, 2.weight moved by what its optimizer did not do, "
    assert told_of(account)[0].startswith(said)
    assert told_of(account)[0].endswith(" times what rounding may make of it.")
    assert said in " ".join(text.split())
    assert "Code that writes to weights besides the optimizer: callbacks, hooks" in checks_of(account)[0]
    assert "rebase()" in checks_of(account)[0]
    assert checks_of(account)[1].startswith("Memory: a flipped bit")
    assert checks_of(account)[2].startswith("Collectives")
    events = [
        Event(step, 0.0, "alarm", "", {"signal": signal, "score": score})
        for step, signal, score in ((1, "loss", 1e9), (2, "unexplained_movement", 9.0), (3, "nonfinite", None))
    ]
    assert [one.step for one in worst_first([*events, event])] == [3, AT + 1, 2, 1]
    counted = [Event(step, 0.0, "alarm", "", {"signal": "sample_ids", "score": 10.0 * step}) for step in (5, 4, 6)]
    assert [one.step for one in worst_first([*counted, events[0]])] == [1, 4, 5, 6]  # scores of samples are counts


@pytest.mark.ci
def test_written_weights_explain_what_changed_after_it(tmp_path: Path) -> None:
    alarms = Alarms(signals=["loss", "update_norm", "grad_norm", "unexplained_movement"])
    account, _ = of(tmp_path, "weights", alarms=alarms, samples=False)
    assert account.changes
    assert "began with it or after it: something else than the optimizer had changed" in cause_of(account)
    assert not any("state of the layer" in check for check in checks_of(account))


@pytest.mark.ci
def test_one_group_in_the_optimizer_whose_alarms_take_the_rate_for_a_schedule(tmp_path: Path) -> None:
    account, _ = of(tmp_path, "rate", AT, groups=False)
    assert {one.place for one in account.at_begin} == {"0", "2", "4"}
    assert account.jumps[0].group == "param_groups[0]: 0.weight to 4.bias"
    assert "the learning rate of param_groups[0]" in cause_of(account)


@pytest.mark.ci
def test_what_was_not_recorded_is_said_and_how_it_is(tmp_path: Path) -> None:
    account, text = of(tmp_path, "batch", samples=False)
    missing = dict(account.missing)
    assert "monitor.log_batch(ids" in missing[f"the samples of step {AT}"]
    assert 'stats=[..., "clipped_grad_norm"]' in missing["the gradient after clipping"]
    assert account.begin == AT
    assert "the samples of this step, or the weights that the step before left" in " ".join(text.split())


def test_an_exception_is_looked_at_where_there_is_no_alarm(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="enough"):
        faulty(tmp_path / "a", "raise", at=30, samples=False)
    with open_run(tmp_path / "a") as run:
        account = run.postmortem()
        text = str(account)
    assert account.step == 30
    assert "ended by ValueError: enough of it" in text
    assert "faulty_runs.py" in text
    assert "is beyond what is usual" in text


# ---- bad input


def test_a_run_without_an_alarm_needs_a_step_and_a_step_has_to_be_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded(tmp_path / "a", steps=50, windows=1).close()
    assert main(["postmortem", str(tmp_path / "a")]) == 2
    assert "this run has no alarm; choose a step with --step, from 1 to 50. Alarms were off" in capsys.readouterr().err
    for step in (0, 51, -3):
        assert main(["postmortem", str(tmp_path / "a"), "--step", str(step)]) == 2
        assert f"step: the record has steps 1 to 50, and not {step}" in capsys.readouterr().err
    assert main(["postmortem", str(tmp_path / "a"), "--step", "50"]) == 0
    assert "step 50: no alarm" in capsys.readouterr().out


def test_no_run_an_empty_one_and_another_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["postmortem", str(tmp_path / "none")]) == 2
    assert "there is no run" in capsys.readouterr().err
    recorded(tmp_path / "a", steps=0, windows=0).close()
    assert main(["postmortem", str(tmp_path / "a")]) == 2
    assert "nothing was recorded yet: this run has no step" in capsys.readouterr().err
    file = sqlite3.connect(tmp_path / "a" / "rank0.lipcore")
    file.execute("update meta set value = '0' where key = 'schema'")
    file.commit()
    file.close()
    assert main(["postmortem", str(tmp_path / "a")]) == 2
    assert "is a record of schema 0" in capsys.readouterr().err


def test_the_first_steps_have_nothing_to_be_compared_with(tmp_path: Path) -> None:
    with recorded(tmp_path / "a", steps=50, windows=1) as run:
        account = account_of(run, 1)
        assert account.compared == 0
        assert "there is too little to compare the step with (nothing before it)" in " ".join(text_of(account).split())
        assert account_of(run, 12).compared == 11


def test_a_record_of_before_there_was_a_flight_recorder(tmp_path: Path) -> None:
    recorded(tmp_path / "a", fault=(240, "layers.1"), alarm=True).close()
    file = sqlite3.connect(tmp_path / "a" / "rank0.lipcore")
    file.execute("drop table batches")
    file.commit()
    file.close()
    with open_run(tmp_path / "a") as run:
        account = account_of(run)
    assert (account.step, account.changes[0].place, account.changes[0].what) == (240, "layers.1", "update norm")
    missing = dict(account.missing)
    assert "the samples of step 240" in missing
    assert "pass the optimizer to watch()" in missing["the learning rate"]


def test_folded_steps_are_not_taken_for_single_ones(tmp_path: Path) -> None:
    names = [f"g{i}" for i in range(200)]
    rng = np.random.default_rng(0)
    record = RunRecord(tmp_path / "a", max_bytes=1 << 20)
    record.begin(0)
    for first in range(1, 2000, 64):
        values = np.exp(0.1 * rng.standard_normal((64, 200)))
        record.add_steps(first, {"trajectory/update_norm": values}, names, ["group"] * 200)
    record.close()
    with open_run(tmp_path / "a") as run:
        account = account_of(run, 200)
        assert account.folded
        assert account.compared == 0
        assert "in the record as means of 64 alone" in " ".join(text_of(account).split())
        assert any("raise max_bytes= of watch()" in how for _, how in account.missing)
        assert account_of(run, run.last_step).compared == 100


def test_nothing_is_found_in_noise(tmp_path: Path) -> None:
    """Of heavy tails too: a change has to be beyond what the steps before have by themselves."""
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(40):
        values = np.exp(0.3 * rng.standard_t(3, (149, 3)))
        steps = np.arange(1, 150)
        one = scores(Stretch(steps, ["a", "b", "c"], ["group"] * 3, values, np.ones(149, bool), False), 117)
        found += bool((np.abs(one.z[116 - 1 : 116 + 1]) > one.limit).any())
    assert found <= 4


def test_samples_of_a_few_steps_and_of_none() -> None:
    from lipcore.recording.batches import Batch

    ids = np.arange(4)
    batches = [Batch(step, ids + 4 * step, np.ones(4, np.float32), None, None) for step in range(1, 4)]
    odd = Batch(4, ids, np.array([1, 2.5, np.nan, 1], np.float32), None, None)
    samples = samples_of([*batches, odd], 4)
    assert samples is not None
    assert [one.id for one in samples.rankings[0].top[:2]] == [2, 1]
    assert (samples.rankings[0].outstanding, samples.verdict) == (2, "batch")  # half of them
    assert samples_of([*batches, odd], 9) is None
    first = samples_of(batches, 1)
    assert first is not None
    assert first.verdict == "unknown"
    assert samples_of([Batch(1, None, None, None, b"x")], 1) is None


# ---- the page and the command


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bokeh", reason="needs the extra `report`")
    monkeypatch.setattr("lipcore.report.page.library", lambda: "// bokeh")


@pytest.mark.usefixtures("no_library")
def test_the_page_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded(tmp_path / "a", fault=(240, "layers.1"), alarm=True).close()
    page = tmp_path / "page.html"
    assert main(["postmortem", str(tmp_path / "a"), "-o", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    text = page.read_text(encoding="utf-8")
    assert "Run a, step 240: update norm over learning rate is 50 times its usual value" in text
    assert "First: step 240, update norm of layers.1" in text
    assert text.index('id="verdict"') < text.index('id="spread"') < text.index('id="plot-loss"')
    assert '"start":[116,1]' in text  # the map begins at that step and layer
    assert main(["postmortem", str(tmp_path / "a"), "-o", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize(
    "how",
    few(
        [
            ({"places": HOSTILE, "fault": (200, HOSTILE[0]), "alarm": True}, None),
            ({"only_nan": True}, 200),
            ({"steps": 1, "windows": 1}, 1),
            ({"places": [f"layers.{i}.weight" for i in range(500)], "level": "tensor"}, 150),
        ],
        2,
    ),
)
def test_a_page_of_any_record(tmp_path: Path, how: tuple[dict[str, Any], int | None]) -> None:
    from lipcore.report.postmortem.page import postmortem_page

    recording, step = how
    with recorded(tmp_path / "<b>a", **recording) as run:
        page = postmortem_page(run, step)
        text_of(account_of(run, step))
    assert "<script>alert(1)" not in page.replace("\\u003c", "")
    assert "<b>a" not in page
