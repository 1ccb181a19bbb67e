"""`lipcore top`: what is seen of a run, in any size of terminal, and how it is left."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from recorded_runs import HOSTILE, recorded

from lipcore.cli import main

pytest.importorskip("rich", reason="needs the extra `top`")
from lipcore.cli.top.reading import Pace, Seen, look
from lipcore.cli.top.view import lines_of, spark


def seen_of(folder: Path, **what: object) -> Seen:
    with recorded(folder / "a", **what) as run:  # type: ignore[arg-type]
        return look(run, Pace())


def text(seen: Seen, width: int = 80, height: int = 24, **how: bool) -> str:
    return "\n".join(line.plain for line in lines_of(seen, width, height, **how))


def test_the_hottest_layer_comes_first_and_alarms_are_told(tmp_path: Path) -> None:
    seen = seen_of(tmp_path, fault=(298, "layers.1"), alarm=True)
    assert (seen.step, seen.span, seen.being_written) == (300, (1, 300), False)
    assert [line.name for line in seen.lines] == ["loss", "gradient norm", "update norm", "weight norm"]
    assert seen.layers[0].name == "layers.1"
    assert 30 < seen.layers[0].times < 80
    shown = text(seen)
    assert re.search(r"layers\.1 .* x  ", shown)
    assert "1 alarm\nstep 298  layers.1: update norm over learning rate is 50 times" in shown
    assert "q or Ctrl-C" in shown
    assert "not being written now" in shown


def test_it_fits_any_terminal(tmp_path: Path) -> None:
    places = [*HOSTILE, "escape\x1b[2J", *(f"layers.{i}" for i in range(50))]
    seen = seen_of(tmp_path, places=places, fault=(200, HOSTILE[0]), alarm=True)
    for width in (20, 79, 80, 200):
        for height in (3, 10, 24, 60):
            for ascii_only in (False, True):
                lines = lines_of(seen, width, height, ascii_only=ascii_only)
                assert len(lines) <= height
                assert all(line.cell_len <= width for line in lines)
                assert "".join(line.plain for line in lines).isprintable()
                assert lines[-1].plain.startswith("q or Ctrl-C ends")


def test_what_is_not_finite_is_said(tmp_path: Path) -> None:
    shown = text(seen_of(tmp_path, only_nan=True))
    assert shown.count("not finite") >= 4
    assert "alarms are off" in shown
    assert "Nothing was recorded yet" in text(seen_of(tmp_path / "b", steps=0, windows=0))
    assert text(seen_of(tmp_path / "c", steps=1, windows=0, places=["only"]))


def test_steps_per_second_are_those_that_were_seen() -> None:
    pace = Pace()
    assert pace.rate(100, 0.0, 7.0) == 7.0
    assert pace.rate(150, 10.0, 7.0) == 5.0
    assert pace.rate(20, 11.0, 7.0) == 7.0  # begun anew
    assert pace.rate(30, 12.0, 7.0) == 10.0
    for now in range(13, 90):
        rate = pace.rate(30, float(now), 7.0)
    assert rate == 0.0


def test_bars_show_where_something_is_not_finite() -> None:
    values = np.ones(1000)
    values[500] = np.nan
    assert spark(values, 10, ascii_only=True) == ".....x...."
    assert spark(np.full(5, np.nan), 3) == "xxx"
    assert spark(np.array([1.0, 10, 100, 1000]), 4, ascii_only=True)[1:3] == "-*"
    assert spark(np.empty(0), 10) == spark(np.ones(3), 0) == ""


def test_it_prints_once_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded(tmp_path / "a", fault=(298, "layers.1"), alarm=True).close()
    before = {path: path.read_bytes() for path in (tmp_path / "a").glob("*.lipcore")}
    assert main(["top", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "layers.1" in out
    assert "q or Ctrl-C" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert {path: path.read_bytes() for path in before} == before
    assert main(["top", str(tmp_path / "none")]) == 2
    assert "there is no run" in capsys.readouterr().err


# ---- in a terminal


class Terminal:
    """`lipcore top` in a terminal of its own."""

    def __init__(self, run: Path, columns: int = 80, lines: int = 24) -> None:
        import fcntl
        import pty
        import termios

        self._set = lambda c, n: fcntl.ioctl(self.file, termios.TIOCSWINSZ, struct.pack("HHHH", n, c, 0, 0))
        command = [sys.executable, "-m", "lipcore", "top", str(run), "--every", "0.1"]
        self.process, self.file = pty.fork()
        if not self.process:
            os.environ.pop("COLUMNS", None)
            os.environ.pop("LINES", None)
            os.environ["TERM"] = "xterm-256color"
            signal.signal(
                signal.SIGINT, signal.SIG_DFL
            )  # a shell has jobs in the background ignore it, with what they start
            os.execv(sys.executable, command)
        self._set(columns, lines)
        self.seen = ""

    def resize(self, columns: int, lines: int) -> None:
        self._set(columns, lines)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Read until something is seen since the last call."""
        deadline = time.monotonic() + 40
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < deadline, self.seen[-2000:]
            if select.select([self.file], [], [], 1)[0]:
                try:
                    self.seen += os.read(self.file, 1 << 16).decode(errors="replace")
                except OSError:
                    break
        assert found, self.seen[-2000:]
        self.seen = self.seen[found.end() :]
        return found

    def status(self) -> int:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if select.select([self.file], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    self.seen += os.read(self.file, 1 << 16).decode(errors="replace")
            done, status = os.waitpid(self.process, os.WNOHANG)
            if done:
                os.close(self.file)
                return os.waitstatus_to_exitcode(status)
        raise AssertionError("it has not ended")


@pytest.mark.ci
@pytest.mark.parametrize("way", ["q", "Ctrl-C"])
def test_it_follows_a_run_that_begins_anew_resizes_and_is_left(tmp_path: Path, way: str) -> None:
    recorded(tmp_path / "a", steps=100, windows=1).close()
    terminal = Terminal(tmp_path / "a")
    terminal.wait_for(r"step 100 ")
    recorded(tmp_path / "a", steps=150, windows=1, seed=1).close()  # the older one's file is kept beside it
    terminal.wait_for(r"step 150 ")
    shutil.rmtree(tmp_path / "a")
    terminal.wait_for(r"Cannot be read just now")
    recorded(tmp_path / "a", steps=70, windows=1).close()
    terminal.wait_for(r"step 70 ")
    terminal.resize(100, 16)
    terminal.wait_for(r"hottest layers {15,}")  # wider than in 80 columns
    if way == "q":
        os.write(terminal.file, b"q")
    else:
        os.kill(terminal.process, signal.SIGINT)
    assert terminal.status() == 0
    assert "Traceback" not in terminal.seen
    assert "\x1b[?1049l" in terminal.seen  # the screen that was there is back
