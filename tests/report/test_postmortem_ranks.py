"""The post-mortem and the report of a run of several ranks: whose numbers they are, and what happened on the others."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lipcore.cli import main
from lipcore.recording import RunRecord, open_run
from lipcore.recording.batches import Batch

LOSS_TEXT = "alarm in step 120{}: loss is 3 times its usual value (score 30, limit 3 x 1)"
LOSS = {"signal": "loss", "place": "lnf", "score": 30.0}


def recorded(
    folder: Path,
    rank: int,
    *events: tuple[int, str, str, dict[str, Any]],
    steps: int = 150,
    spike: int = 0,
    starts: Sequence[int] = (0,),
    closed: bool = True,
) -> None:
    """Write the record of a rank; its loss is 3 times as large in one step, and one of that step's samples is."""
    rng = np.random.default_rng(rank)
    record = RunRecord(folder, rank=rank)
    record.begin(starts[0])
    norms = np.exp(0.05 * rng.standard_normal((steps, 3)))
    loss = np.exp(0.05 * rng.standard_normal(steps))
    each = np.exp(0.1 * rng.standard_normal((steps, 4))).astype(np.float32)
    if spike:
        loss[spike - 1] *= 3
        each[spike - 1, 2] = 20.0
    for name in ("grad", "update", "weight"):
        record.add_steps(1, {f"trajectory/{name}_norm": norms}, ["a", "b", "total"], ["group", "group", "total"])
    record.add_steps(1, {"logged/loss": loss[:, None]}, ["total"], ["total"])
    ids = np.arange(4) + 1000 * rank
    record.add_batches([Batch(i + 1, ids + 10 * i, None, each[i], None) for i in range(steps)])
    for start in starts[1:]:
        record.begin(start)
    for step, kind, text, data in events:
        record.add_event(step, kind, text, data)
    record.close()
    if not closed:
        (folder / f"rank{rank}.lipcore-writer").touch()


def told_by_another(folder: Path, *, beside: bool = True) -> None:
    recorded(folder, 0, (120, "alarm", LOSS_TEXT.format(" on rank 1"), LOSS | {"rank": 1}))
    if beside:
        recorded(folder, 1, (120, "alarm", LOSS_TEXT.format(""), LOSS), spike=120)


def text_of(folder: Path, step: int | None = None, *, rank: int = 0, follow: bool | None = None) -> str:
    with open_run(folder, rank) as run:
        return " ".join(str(run.postmortem(step, follow=follow)).split())


@pytest.mark.parametrize("step", [None, 120])
def test_an_alarm_that_another_rank_told_is_looked_up_in_its_record(tmp_path: Path, step: int | None) -> None:
    told_by_another(tmp_path / "a")
    with open_run(tmp_path / "a") as run:
        account = run.postmortem(step)
    assert (account.rank, account.asked, account.begin) == (1, 0, 120)
    assert 2.5 < account.changes[0].times < 3.5
    assert account.samples[0].suspects == [1000 + 1190 + 2]
    text = " ".join(str(account).split())
    assert "Run a, rank 1, step 120: loss is 3 times its usual value First: step 120, loss" in text
    assert "samples and single steps are of rank 1 alone, not rank 0, since it is what happened there" in text
    assert "--rank 0 shows those of rank 0" in text
    assert "told by" not in text


def test_where_that_record_is_not_here_or_not_asked_for_the_flag_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told_by_another(tmp_path / "a", beside=False)
    text = text_of(tmp_path / "a")
    assert "loss is 3 times its usual value (told by rank 1)" in text
    assert "The alarm is of rank 1, and all else here of rank 0. Its record is not here" in text
    assert "--rank 1 looks into it" in text
    told_by_another(tmp_path / "b")
    assert main(["postmortem", str(tmp_path / "b"), "--rank", "0"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Run b, rank 0, step 120: loss is 3 times its usual value (told by rank 1)" in out
    assert "Its record lies beside: --rank 1 looks into it" in out
    for given in ([str(tmp_path / "b")], [str(tmp_path / "b"), "--rank", "1"], [str(tmp_path / "b" / "rank1.lipcore")]):
        assert main(["postmortem", *given]) == 0
        assert "Run b, rank 1, step 120" in capsys.readouterr().out


def test_the_rank_that_ended_first_is_looked_at(tmp_path: Path) -> None:
    data = {"type": "ValueError", "where": "train.py:16 in <module>"}
    recorded(tmp_path / "a", 1, (149, "exception", "ValueError: bad shard", data))
    recorded(tmp_path / "a", 0, (149, "exception", "RuntimeError: Connection closed by peer", data))
    text = text_of(tmp_path / "a")
    assert "Run a, rank 1, step 149: ended by ValueError: bad shard" in text
    assert "On other ranks - rank 0, step 149, exception: RuntimeError: Connection closed by peer" in text
    assert "ended by RuntimeError" in text_of(tmp_path / "a", follow=False)


def test_a_loss_that_is_not_finite_on_one_rank_comes_before_what_all_made_of_it(tmp_path: Path) -> None:
    of_all = {"signal": "nonfinite", "place": "a.weight", "score": None}
    recorded(tmp_path / "a", 0, (120, "alarm", "alarm in step 120: not finite: parameter of 'a.weight'", of_all))
    lost = of_all | {"place": "total"}
    recorded(
        tmp_path / "a", 1, (120, "alarm", "alarm in step 120: not finite: the loss; parameter of 'a.weight'", lost)
    )
    assert "Run a, rank 1, step 120: not finite: the loss" in text_of(tmp_path / "a")


def test_records_of_more_ranks_from_before_a_rewind_say_nothing_of_later_steps(tmp_path: Path) -> None:
    recorded(tmp_path / "a", 1, (120, "alarm", LOSS_TEXT.format(""), LOSS), spike=120)
    with sqlite3.connect(tmp_path / "a" / "rank1.lipcore") as file:
        file.execute("update events set wall = wall - 3600")
    file.close()
    recorded(tmp_path / "a", 0, starts=(0, 150))
    text = text_of(tmp_path / "a", 120)
    assert "Run a, rank 1, step 120: loss is 3 times" in text  # of before
    recorded(tmp_path / "b", 1, (120, "alarm", LOSS_TEXT.format(""), LOSS), spike=120)
    with sqlite3.connect(tmp_path / "b" / "rank1.lipcore") as file:
        file.execute("update events set wall = wall - 3600")
    file.close()
    recorded(tmp_path / "b", 0)
    assert "Run b, rank 0, step 120: no alarm" in text_of(tmp_path / "b", 120)


def test_a_record_that_breaks_off_is_said_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"type": "RuntimeError"}
    recorded(tmp_path / "a", 0, (149, "exception", "RuntimeError: Connection closed by peer", data))
    recorded(tmp_path / "a", 1, steps=128, closed=False)
    said = "The record of rank 1 breaks off at step 128 without a word about its end, where others go on to step 150"
    assert f"{said}: its process was killed (SIGKILL, out of memory)." in text_of(tmp_path / "a")
    assert main(["postmortem", str(tmp_path / "a"), "--rank", "1"]) == 2
    err = capsys.readouterr().err
    assert "this run has no alarm; choose a step with --step, from 1 to 128" in err
    assert said in err
    assert "Rank 0 has an exception of step 149: --rank 0" in err
    recorded(tmp_path / "b", 0, steps=64, closed=False)
    assert main(["postmortem", str(tmp_path / "b")]) == 2
    assert "The record breaks off at step 64 without a word about its end: its process" in capsys.readouterr().err


def test_the_pages_say_whose_numbers_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bokeh", reason="needs the extra `report`")
    monkeypatch.setattr("lipcore.report.page.library", lambda: "// bokeh")
    told_by_another(tmp_path / "a")
    assert main(["postmortem", str(tmp_path / "a"), "-o", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Run a, rank 1, step 120: loss is 3 times its usual value" in page
    assert "are of rank 1 alone" in page
    assert main(["report", str(tmp_path / "a"), "-o", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "loss, samples and single steps of rank 0 alone" in page
    assert "what is below is not of that rank, --rank 1 shows it" in page
