"""What the documentation says runs: every ```python block of README and docs/, and examples in public docstrings."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import lipcore

_ROOT = Path(__file__).parents[2]
_FIGURES = "benchmarks.md"  # tables; test_benchmarks_page.py holds them
PAGES = [_ROOT / "README.md", *(page for page in sorted((_ROOT / "docs").glob("*.md")) if page.name != _FIGURES)]
# An info string beyond "python" ("```python no-run") keeps a block from being executed.
_FENCE = re.compile(r"^```python[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


def blocks(page):
    text = page.read_text()
    return [(text.count("\n", 0, match.start(1)) + 1, match.group(1)) for match in _FENCE.finditer(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch, capsys):
    """Top to bottom in one namespace, as a reader would paste them."""
    found = blocks(page)
    assert found, f"{page.name} has no ```python block"
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": "__main__"}
    for line, source in found:
        # Blank lines in front make a traceback point at the page's own line.
        code = compile("\n" * (line - 1) + source, str(page), "exec")
        exec(code, namespace)


def modules():
    names = ["lipcore"]
    names += [m.name for m in pkgutil.walk_packages(lipcore.__path__, "lipcore.") if not m.name.endswith("__main__")]
    return [name for name in names if not name.endswith("._core")]


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"needs an optional package: {error}")
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0, "see the doctest's output above"


def test_public_operations_have_examples():
    finder = doctest.DocTestFinder(recurse=False)
    public = [lipcore.functional.sample_norms, lipcore.functional.normalized_norms, lipcore.functional.trajectory_step]
    public += [lipcore.Trajectory, lipcore.Distribution, lipcore.Lipschitz, lipcore.Monitor, lipcore.local_lipschitz]
    for thing in public:
        examples = [e for test in finder.find(thing, thing.__name__) for e in test.examples]
        assert examples, f"{thing.__name__} has no example"
