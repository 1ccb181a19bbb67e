"""Files that are there whole or not at all, so that a run that was interrupted goes on where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from lipcore.results import json_ready


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Seven digits; None for what is not finite."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(json_ready(document, digits=7), indent=1, allow_nan=False) + "\n", encoding="utf-8")
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
