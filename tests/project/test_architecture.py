"""docs/architecture.md and CONTRIBUTING.md speak of the tree as it is."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

import pytest
from test_import_order import ORDER

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
#: A file or folder in backticks: with a slash, and an ending or a slash at the end. X stands for any name.
_PATH = re.compile(r"`([\w./*-]+(?:/|\.(?:py|pyi|cpp|cu|h|txt|toml|json|md)))`")
_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
#: Made by a command, not committed.
_MADE = {"lipcore-demo/figure.png", "build/dev/compile_commands.json"}
_WIDTH = 140


def paths_of(page: Path) -> list[str]:
    found = [path for path in _PATH.findall(page.read_text(encoding="utf-8")) if "/" in path]
    return sorted({re.sub(r"\bX\b|(?<=_)X(?=\.)", "*", path) for path in found} - _MADE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    # From the root, from the package, and in its rooms, as `noise/` of per_sample.
    starts = [ROOT, ROOT / "lipcore", *(ROOT / "lipcore" / room for room in ORDER)]
    missing = [path for path in paths_of(page) if not any(list(start.glob(path)) for start in starts)]
    assert not missing, f"{page.name} names {', '.join(missing)}"


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    links = _LINK.findall(page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


def test_the_page_draws_the_order_of_imports() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (drawn,) = re.findall(r"^```text\n(_core.*?)\n```$", text, re.MULTILINE | re.DOTALL)
    names = re.findall(r"\w+", drawn)
    assert names == [room for room in ORDER if room != "__main__"]


def test_the_page_names_every_room() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text[text.index("| room |") : text.index("`csrc/` has rooms")]
    assert {room for row in table.split("\n| ") for room in re.findall(r"`(\w+)`", row.split(" |")[0])} == set(ORDER)


def test_an_operator_has_the_places_that_are_listed() -> None:
    """Ten at most: files of the core and of functional that speak of the operator which CONTRIBUTING names to read."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text[text.index("## A new operator") : text.index("## CUDA kernels")]
    (name,) = re.findall(r"`(\w+)` is one to read", section)
    places = [place.replace("X", name) for place in re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)]
    assert len(places) <= 10
    sources = [
        *(path for path in (ROOT / "csrc").rglob("*.[ch]*") if path.parent.name != "cuda"),
        *(ROOT / "lipcore" / "functional").glob("*.py"),
        *(ROOT / "CMakeLists.txt", ROOT / "lipcore" / "_core.pyi"),
    ]
    said = re.compile(rf"\b{name}(_sq)?\b")
    speaking = [path.relative_to(ROOT).as_posix() for path in sources if said.search(path.read_text(encoding="utf-8"))]
    # A place with a star is the file of the operator's family: one of those that no other place names.
    for place in sorted(places, key=lambda place: "*" in place):
        found = fnmatch.filter(speaking, place)
        assert len(found) == 1, f"{place}: {found} speak of {name}"
        speaking.remove(found[0])
    assert not speaking, f"{name} also stands in {speaking}"


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_lines_of_prose_fit_a_screen(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    lines = prose.splitlines()
    assert not [line for line in lines if len(line) > _WIDTH and not line.startswith("|")]
