"""Rooms of the package: a file imports from its own package, or from one that stands earlier in one order."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lipcore

ROOT = Path(lipcore.__file__).parent

#: docs/architecture.md draws it. Names of packages and of modules at the root.
ORDER = [
    *("_core", "models", "_connect", "functional", "layers", "capture", "distributed", "metric", "trajectory"),
    *("lipschitz", "per_sample", "tensor_stats", "regions", "theory", "alarms", "report", "recording", "monitor"),
    *("integrations", "demo", "cli", "__main__"),
]
MOST_AT_THE_ROOT = 24


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, package of lipcore) of every import, those inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            parts = node.module.split(".")
            if parts[0] == "lipcore":
                yield from (
                    (node.lineno, name) for name in ([a.name for a in node.names] if len(parts) == 1 else [parts[1]])
                )
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "lipcore":
                    yield node.lineno, parts[1] if len(parts) > 1 else "lipcore"


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def misplaced(path: Path) -> list[str]:
    here = room_of(path)
    wrong = []
    for line, there in imports_of(path):
        if there in (here, "__version__") or (there == "lipcore" and ORDER.index(here) > ORDER.index("monitor")):
            continue  # what users import is complete by then
        if there not in ORDER or ORDER.index(there) > ORDER.index(here):
            wrong.append(f"{path.relative_to(ROOT.parent)}:{line}: {here} may not import {there}")
    return wrong


@pytest.mark.parametrize("room", ORDER)
def test_a_room_imports_only_what_stands_before_it(room: str) -> None:
    paths = sorted((ROOT / room).rglob("*.py")) or [ROOT / f"{room}.py"]
    wrong = [line for path in paths if path.exists() for line in misplaced(path)]
    assert not wrong, "\n".join(wrong)


def test_every_room_has_its_place() -> None:
    rooms = {room_of(path) for path in ROOT.rglob("*.py")} - {"__init__"}
    assert rooms <= set(ORDER)
    seen = [path.name for path in ROOT.iterdir() if not path.name.startswith(("__pycache__", "_core.cpython"))]
    assert len(seen) <= MOST_AT_THE_ROOT, sorted(seen)


def test_modules_of_a_room_import_each_other_in_no_circle() -> None:
    """Lazy imports and those under TYPE_CHECKING are imports here."""
    modules = {
        ".".join(("lipcore", *path.relative_to(ROOT).with_suffix("").parts)): path for path in ROOT.rglob("*.py")
    }
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    edges: dict[str, set[str]] = {}
    for name, path in modules.items():
        edges[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or node.module is None or not node.module.startswith("lipcore"):
                continue
            for alias in node.names:
                target = f"{node.module}.{alias.name}"
                found = target if target in modules else node.module
                # A package's __init__ collects its modules: importing it from inside is no edge to them all.
                if found in modules and found != name and path.name != "__init__.py":
                    edges[name].add(found)
    assert not circle_in(edges), " -> ".join(circle_in(edges))


def circle_in(edges: dict[str, set[str]]) -> list[str]:
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(edges.get(name, ())):
            if found := walk(other, [*path, name]):
                return found
        done.add(name)
        return []

    for name in sorted(edges):
        if found := walk(name, []):
            return found
    return []


def test_a_wrong_import_is_named(tmp_path: Path) -> None:
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
