"""docs/gallery.md: every picture is there, small enough for a repository, and drawn by the script."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIGURES, SCRIPT = ROOT / "docs" / "figures", ROOT / "docs" / "figures" / "gallery.py"
if not SCRIPT.exists():
    pytest.skip("docs is not part of this installation", allow_module_level=True)

PAGE = (ROOT / "docs" / "gallery.md").read_text()
NAMES = re.findall(r'^    "([\w-]+)": \w+,$', SCRIPT.read_text(), re.MULTILINE)


def test_the_page_has_every_picture_of_the_script_and_its_command() -> None:
    assert len(NAMES) >= 6
    shown = re.findall(r"!\[(.+)\]\((figures/[\w-]+\.png)\)", PAGE)
    assert {Path(path).stem for _, path in shown} == {*NAMES, "demo"}
    assert all(len(words) > 40 for words, _ in shown)  # for who does not see it
    assert set(re.findall(r"`make gallery NAMES=([\w-]+)`", PAGE)) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_small(name: str) -> None:
    content = (FIGURES / f"{name}.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) <= 150_000


@pytest.mark.ci
@pytest.mark.parametrize("name", NAMES)
def test_one_command_draws_a_picture(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    from browser import CHROMIUM

    if name in ("report", "demo-report", "spike") and CHROMIUM is None:
        pytest.skip("needs chromium: apt-get install chromium")
    command = [sys.executable, SCRIPT, "--out", tmp_path, name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 5_000 < (tmp_path / f"{name}.png").stat().st_size <= 150_000
