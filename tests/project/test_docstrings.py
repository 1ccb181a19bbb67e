"""Docstrings begin as their kind does: a function's with a verb, a class's or a property's with a noun."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lipcore

ROOT = Path(lipcore.__file__).parent
#: Rooms whose docstrings are held to it.
ROOMS = (
    "_connect",
    "alarms",
    "capture",
    "cli",
    "demo",
    "functional",
    "layers",
    "lipschitz",
    "metric",
    "models",
    "monitor",
    "per_sample",
    "regions",
    "report",
    "theory",
    "trajectory",
)
#: No verb begins so, and no noun says of whom.
_NOT_A_VERB = {"a", "an", "the", "whether", "what", "which", "how", "where", "why", "when", "who", "of", "in", "per"}
_NOT_A_VERB |= {"over", "as", "with", "for", "by", "from", "at", "to", "none", "true", "false", "those", "this", "it"}
_NOT_A_VERB |= {"one", "another", "all", "right", "everything", "valueerror", "typeerror", "population", "backward"}
_VERBS_IN_S = {"pass", "process", "express", "press", "guess"}
_NOT_A_NOUN = {
    "whether",
    "how",
    "where",
    "why",
    "when",
    "who",
    "of",
    "per",
    "as",
    "with",
    "is",
    "are",
    "return",
    "give",
}
_NOT_A_NOUN |= {"refuses", "takes", "makes", "keeps", "finds", "says", "compute", "say", "find"}
_NOT_A_NOUN |= {"what", "tracks", "drives", "hands", "reads", "ticks"}


def first_words(path: Path) -> Iterator[tuple[int, str, bool]]:
    """(line, first word, whether it is to be a noun) of every docstring below the module's own."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef)) or not (text := ast.get_docstring(node)):
            continue
        named = isinstance(node, ast.ClassDef) or any(
            isinstance(d, ast.Name) and d.id in ("property", "cached_property") for d in node.decorator_list
        )
        yield node.lineno, text.split()[0].rstrip(",;:.").lower(), named


def fits(word: str, noun: bool) -> bool:
    if not word[0].isalpha():
        return False
    if noun:
        return word not in _NOT_A_NOUN
    # "Returns" or "Rows": the third person, or a plural
    return word not in _NOT_A_VERB and (not word.endswith("s") or word in _VERBS_IN_S)


def misfits(path: Path) -> list[str]:
    return [
        f"{path.relative_to(ROOT.parent)}:{line}: begins with {word!r}"
        for line, word, noun in first_words(path)
        if not fits(word, noun)
    ]


@pytest.mark.parametrize(
    ("word", "noun", "right"),
    [
        ("return", False, True),
        ("pass", False, True),
        ("returns", False, False),
        ("rows", False, False),
        ("whether", False, False),
        ("valueerror", False, False),
        ("rows", True, True),
        ("what", True, False),
        ("tracks", True, False),
        ("||x||", False, False),
    ],
)
def test_what_a_docstring_may_begin_with(word: str, noun: bool, right: bool) -> None:
    assert fits(word, noun) is right


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_begin_as_their_kind_does(room: str) -> None:
    paths = sorted((ROOT / room).rglob("*.py")) or [ROOT / f"{room}.py"]
    wrong = [line for path in paths for line in misfits(path)]
    assert not wrong, "\n".join(wrong)
