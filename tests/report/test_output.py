"""Where the page goes: whole or not at all, with an error that says what to do."""

from __future__ import annotations

import sys
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from recorded_runs import HOSTILE, recorded

from lipcore.cli import main
from lipcore.recording import RunRecord, open_run
from lipcore.report.follow import follow
from lipcore.report.output import ReportError, write_whole

pytest.importorskip("bokeh", reason="needs the extra `report`")


def test_the_command_writes_a_page_into_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded(tmp_path / "a", steps=20).close()
    assert main(["report", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "a" / "report.html")
    assert (tmp_path / "a" / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert main(["report", str(tmp_path / "a"), "-o", str(tmp_path / "b.html")]) == 0
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["b.html"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{a}", "-o", "{no}/x.html"], "x.html: cannot be written"),
        (["{a}", "-o", "{a}"], "is a folder"),
        (["{no}"], "there is no run"),
        (["{a}", "--rank", "3"], "the run has no record of rank 3"),
    ],
)
def test_what_the_user_can_put_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    recorded(tmp_path / "a", steps=5, windows=0).close()
    places = {"a": tmp_path / "a", "no": tmp_path / "no"}
    assert main(["report", *(argument.format(**places) for argument in arguments)]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.rglob("*half*"))


def test_a_missing_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(tmp_path / "a", steps=5, windows=0).close()
    monkeypatch.setitem(sys.modules, "bokeh", None)
    assert main(["report", str(tmp_path / "a")]) == 2
    assert 'pip install "lipcore[report]"' in capsys.readouterr().err
    assert not (tmp_path / "a" / "report.html").exists()


def test_a_page_that_fails_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.html"
    assert write_whole("older", path) == path
    write_whole("a folder \udc80", tmp_path / "y.html").unlink()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(ReportError, match="No space left"):
        write_whole("newer", path)
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def test_a_notebook_shows_the_page_in_a_frame(tmp_path: Path) -> None:
    with recorded(tmp_path / "a", steps=5, windows=0) as run:
        page = run.report()
    assert repr(page) == "Page(name='a')"
    shown = page._repr_html_()
    assert shown.startswith("<iframe")
    assert shown.count("<") == 2
    assert unescape(shown.partition('srcdoc="')[2].removesuffix('"></iframe>')) == page.html
    assert page.save(tmp_path / "x.html").read_text() == page.html


def test_a_notebook_shows_the_head_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bokeh", None)  # it draws nothing
    with recorded(tmp_path / "a", fault=(240, "layers.1"), alarm=True) as run:
        shown = run._repr_html_()
    page = unescape(shown.partition('srcdoc="')[2].removesuffix('"></iframe>'))
    assert "240" in page.partition('class="headline"')[2][:300]
    assert "layers.1" in page
    assert "<script" not in page
    with recorded(tmp_path / "b", places=HOSTILE, alarm=True, fault=(240, HOSTILE[0])) as run:
        assert run._repr_html_().count("<") == 2
    with recorded(tmp_path / "c", steps=0, windows=0) as run:
        assert "Nothing was recorded yet" in run._repr_html_()


def test_a_page_follows_its_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = RunRecord(tmp_path / "a")
    record.begin(0)
    record.flush()
    target, seen, made = tmp_path / "x.html", [], [0]
    plan = iter((3, 0, 9))  # steps that are made meanwhile

    def wait(seconds: float) -> None:
        seen.append((seconds, f'"reload":{seconds}' in target.read_text(), target.stat().st_mtime_ns))
        count = next(plan, None)
        if count is None:
            raise KeyboardInterrupt
        if count:
            record.add_steps(made[0] + 1, {"logged/loss": np.ones((count, 1))}, ["total"], ["total"])
            record.flush()
            made[0] += count

    assert follow(lambda: open_run(tmp_path / "a"), target, 0.5, wait) == 3
    assert [page[:2] for page in seen] == [(0.5, True)] * 4
    assert seen[1][2] == seen[2][2]  # nothing was recorded in between
    assert '"reload":null' in target.read_text()
    record.close()
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "a"), "--follow", "0"])
    assert "expected a number of seconds >= 0.1, got '0'" in capsys.readouterr().err
