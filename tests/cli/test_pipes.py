"""A command whose reader has had enough ends without a traceback."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.ci
@pytest.mark.parametrize("command", ["doctor", "--help", "compare --help"])
def test_a_reader_that_goes_away_is_no_error(command: str) -> None:
    words = [sys.executable, "-u", "-m", "lipcore", *command.split()]  # unbuffered: every line is written by itself
    for unbuffered in (True, False):
        with subprocess.Popen(
            [word for word in words if unbuffered or word != "-u"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.close()
            _, error = process.communicate(timeout=120)
        assert error == b""
        assert process.returncode in (0, 141)
