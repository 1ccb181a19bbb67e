"""Gradient norms of samples that are not exact are told with their doubt, from the training to the post-mortem."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest
from faulty_runs import SAMPLE, faulty

import lipcore
from lipcore.recording import RunRecord, open_run
from lipcore.recording.batches import Batch
from lipcore.report.postmortem.account import Account
from lipcore.report.postmortem.causes import cause_of, checks_of
from lipcore.report.postmortem.changes import Change
from lipcore.report.postmortem.samples import Samples, samples_of
from lipcore.report.postmortem.words import of_ranking

DOUBT = "not proved: prove=False was passed"


def test_a_doubt_comes_with_the_norms_of_its_step(tmp_path: Path) -> None:
    norms = lipcore.PerSampleGradNorms(loss_reduction="mean", noise_scale=False, prove=False)
    faulty(tmp_path / "a", "sample", metrics=[lipcore.Trajectory(), norms])
    with open_run(tmp_path / "a") as run:
        assert {batch.doubt for batch in run.batches()} == {DOUBT}
        account = run.postmortem()
    by_norm, by_loss = account.samples[0].rankings
    assert (by_norm.doubt, by_loss.doubt) == (DOUBT, "")
    assert account.samples[0].suspects == [SAMPLE]
    said = " ".join(str(account).split())
    assert DOUBT in said.partition("by gradient norm: 1 of 32 stands out; ")[2].partition(" id ")[0]
    assert said.count(DOUBT) == 1  # the losses say the same sample, without a doubt


def test_exact_norms_have_none_and_what_is_taken_back_loses_it(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "a")
    record.begin(0)
    ids, norms = np.arange(2), np.ones(2, np.float32)
    record.add_batches([Batch(1, ids, norms, None, None), Batch(2, ids, norms, None, None, DOUBT)])
    record.forget_norms(1)
    record.close()
    with open_run(tmp_path / "a") as run:
        assert [(batch.doubt, batch.norms is None) for batch in run.batches()] == [("", False), ("", True)]


def test_a_file_without_doubts_is_read_and_written(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "a")
    record.begin(0)
    record.close()
    file = sqlite3.connect(record.path)
    file.execute("alter table batches drop column doubt")
    file.execute("insert into batches values(1, ?, null, null, null)", (np.arange(2).tobytes(),))
    file.commit()
    file.close()
    with open_run(tmp_path / "a") as run:
        assert [(batch.step, batch.doubt) for batch in run.batches()] == [(1, "")]
    record = RunRecord(tmp_path / "a")
    record.begin(1)
    record.add_batches([Batch(2, np.arange(2), np.ones(2, np.float32), None, None, DOUBT)])
    record.write_excerpt(tmp_path / "b.lipcore")
    record.close()
    assert not record.failed
    for path in (tmp_path / "a", tmp_path / "b.lipcore"):
        with open_run(path) as run:
            assert [(batch.step, batch.doubt) for batch in run.batches()] == [(1, ""), (2, DOUBT)]


def samples(own: list[float], *, losses: list[float] | None = None, doubt: str = DOUBT) -> Samples:
    """Return the samples of step 2, of which four had a norm of 1 in step 1."""
    ids = np.arange(4)
    before, after = (None if losses is None else np.array(x, np.float32) for x in ([1.0] * 4, losses))
    found = samples_of(
        [
            Batch(1, ids, np.ones(4, np.float32), before, None, doubt),
            Batch(2, ids, np.array(own, np.float32), after, None, doubt),
        ],
        2,
    )
    assert found is not None
    return found


def account(found: Samples) -> Account:
    change = Change(2, "trajectory/grad_norm", "0", 40.0, 9.0, 9.0, 2)
    return Account("a", 2, None, 1, 2, 2, changes=[change], compared=20, samples=[found])


@pytest.mark.parametrize(
    ("own", "verdict", "words"),
    [
        ([1.0, 9.0, 1.0, 1.0], "single", "1 stands out (by gradient norms with a doubt: not proved: prove=False"),
        ([9.0, 9.0, 9.0, 9.0], "batch", "not single samples (by gradient norms with a doubt: not proved"),
        ([1.0, 1.0, 1.0, 1.0], "usual", "no sample stands out (by gradient norms with a doubt: not proved"),
    ],
)
def test_what_is_concluded_from_such_norms_says_so(own: list[float], verdict: str, words: str) -> None:
    found = samples(own)
    assert (found.verdict, found.doubt) == (verdict, DOUBT)
    assert words in cause_of(account(found))
    assert verdict == "usual" or DOUBT in checks_of(account(found))[0]
    assert of_ranking(found, found.rankings[0]).endswith(f"; {DOUBT}")
    exact = samples(own, doubt="")
    assert exact.verdict == verdict
    assert "doubt" not in " ".join([cause_of(account(exact)), *checks_of(account(exact))])


def test_losses_that_say_the_same_have_no_doubt() -> None:
    assert samples([1.0, 9.0, 1.0, 1.0], losses=[1.0, 9.0, 1.0, 1.0]).doubt == ""
    assert samples([1.0, 9.0, 1.0, 1.0], losses=[1.0, 1.0, 1.0, 1.0]).doubt == DOUBT


def test_samples_that_stand_out_without_a_doubt_are_named_alone() -> None:
    both = samples([1.0, 9.0, 1.0, 1.0], losses=[9.0, 1.0, 1.0, 1.0])
    assert (both.suspects, both.doubt) == ([0], "")
    batch = samples([1.0, 9.0, 1.0, 1.0], losses=[9.0] * 4)
    assert (batch.verdict, batch.doubt, batch.suspects, batch.doubt_of_suspects) == ("batch", "", [1], DOUBT)
    lost = Change(2, "trajectory/grad_norm", "0", np.nan, np.nan, 9.0, 2)
    assert f"1 stands out (by gradient norms with a doubt: {DOUBT})" in cause_of(
        Account("a", 2, None, 1, 2, 2, changes=[lost], compared=20, samples=[batch])
    )


def test_exact_norms_are_not_compared_with_others() -> None:
    ids, small = np.arange(4), np.full(4, 0.1, np.float32)
    lacking = [Batch(step, ids, small, None, None, "layer 0 has no rule") for step in (1, 2, 3)]
    exact = [Batch(step, ids, 10 * small, None, None) for step in (4, 5)]
    for before, verdict in (([*lacking, exact[0]], "usual"), (lacking, "unknown")):
        found = samples_of([*before, exact[1]], 5)
        assert found is not None
        assert (found.verdict, found.doubt) == (verdict, "")


@pytest.mark.parametrize(("own", "verdict"), [([np.nan] * 4, "unknown"), ([np.nan, 1.0, 9.0, 1.0], "single")])
def test_norms_that_are_not_known_are_no_fault_of_a_sample(own: list[float], verdict: str) -> None:
    found = samples(own, doubt="layer 0 has no rule")
    assert found.verdict == verdict
    assert found.suspects == ([2] if verdict == "single" else [])
    assert samples(own, doubt="").verdict == "batch"
