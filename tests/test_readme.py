"""What the documentation says runs: every ```python block of the README, and the examples in public docstrings."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import lipcore

README = Path(__file__).parents[1] / "README.md"
# An info string beyond "python" ("```python no-run") keeps a block from being executed.
_FENCE = re.compile(r"^```python[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


def blocks():
    text = README.read_text() if README.exists() else ""
    return [(text.count("\n", 0, match.start(1)) + 1, match.group(1)) for match in _FENCE.finditer(text)]


def test_readme_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    """Top to bottom in one namespace, as a reader would paste them."""
    if not README.exists():
        pytest.skip("there is no README.md")
    found = blocks()
    assert found, "README.md has no ```python block"
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": "__main__"}
    for line, source in found:
        # Blank lines in front make a traceback point at the README's own line.
        code = compile("\n" * (line - 1) + source, str(README), "exec")
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
