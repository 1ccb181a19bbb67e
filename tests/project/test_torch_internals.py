"""Private names of torch: all of them in one file, and each there in the torch that is installed."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lipcore
from lipcore.models import torch_internals

ROOT = Path(lipcore.__file__).parent
HOME = ROOT / "models" / "torch_internals.py"


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return 2 * grad


def holders() -> dict[str, object]:
    from torch.distributed.tensor import DTensor

    x = torch.ones(2, requires_grad=True)
    x.register_post_accumulate_grad_hook(lambda p: None)  # the attribute is made by the first one
    return {
        "module": nn.Linear(1, 1),
        "convolution": nn.Conv2d(1, 1, 1),
        "storage": x.untyped_storage(),
        "graph node": (2 * x).grad_fn,
        "operator": torch.ops.aten.mm.default,
        "tensor": x,
        "autograd function's node": type(_Twice.apply(x).grad_fn),
        "gradient scaler": torch.amp.GradScaler("cpu"),
        "distributed tensor": DTensor,
    }


@pytest.mark.parametrize("kind", torch_internals.ATTRIBUTES)
def test_attributes_are_there(kind: str) -> None:
    lacking = [name for name in torch_internals.ATTRIBUTES[kind] if not hasattr(holders()[kind], name)]
    assert not lacking, f"torch {torch.__version__} lacks {', '.join(lacking)} of a {kind}"


def test_a_missing_name_is_named() -> None:
    with pytest.raises(ImportError, match=r"lipcore needs _C\._no_such_name of torch, which torch .* does not have"):
        torch_internals._found("_C._no_such_name")


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def _own_names(trees: dict[Path, ast.Module]) -> set[str]:
    """Return private names that lipcore itself defines: attributes that are set, methods, modules."""
    own = {path.stem for path in trees}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
    return own


def strangers(trees: dict[Path, ast.Module]) -> list[str]:
    """Return uses of private names that are not lipcore's and not in the table."""
    known = _own_names(trees).union(*torch_internals.ATTRIBUTES.values())
    found = []
    for path, tree in trees.items():
        if path == HOME:
            continue
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Attribute):
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lipcore"):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                names = [] if node.module == "__future__" else names
            found += [f"{path}:{node.lineno}: {n}" for n in names if _is_private(n) and n not in known]  # type: ignore[attr-defined]
    return found


def test_no_other_file_uses_a_private_name() -> None:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))}
    assert not strangers(trees), "name it in models/torch_internals.py:\n" + "\n".join(strangers(trees))


def test_the_search_finds_them() -> None:
    code = "import torch\nfrom torch.utils._pytree import tree_leaves\nx = torch._C._current_graph_task_id\n"
    assert len(strangers({Path("a.py"): ast.parse(code)})) == 3
