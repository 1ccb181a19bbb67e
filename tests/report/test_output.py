"""Where the page goes: whole or not at all, with an error that says what to do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from recorded_runs import recorded

from lipcore.cli import main
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
