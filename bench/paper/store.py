"""Files that are there whole or not at all, so that a run that was interrupted goes on where it was."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Seven digits; None for what is not finite."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(_rounded(document), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial.npz")
    np.savez(partial, **arrays)
    os.replace(partial, path)


def load_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """None where there is no such file."""
    if not path.exists():
        return None
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def _rounded(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _rounded(value.tolist())
    if isinstance(value, (float, np.floating)):
        return float(f"{float(value):.7g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(part) for part in value]
    return value
