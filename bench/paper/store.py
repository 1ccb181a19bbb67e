"""Files that are there whole or not at all, so that a run that was interrupted goes on where it was."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from lipcore.metric.results import json_ready


class BadState(ValueError):
    """A state file that cannot be gone on from."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path}: not a state file of this script ({why}); delete it to start that part again")


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Seven digits; None for what is not finite."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(json_ready(document, digits=7), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path, keys: Collection[str], length: int | None = None) -> dict[str, Any]:
    """A document that has these keys, each a list of this length where one is given.

    Raises:
        BadState: it is truncated, or another script's.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise BadState(path, str(error)) from None
    missing = sorted(set(keys) - set(document)) if isinstance(document, dict) else ["a dictionary"]
    if missing:
        raise BadState(path, f"it lacks {', '.join(missing)}")
    for key in keys if length is not None else ():
        if not isinstance(document[key], list) or len(document[key]) != length:
            raise BadState(path, f"{key} is not a list of {length}")
    return document  # type: ignore[no-any-return]


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial.npz")
    np.savez(partial, **arrays)
    os.replace(partial, path)


def load_arrays(path: Path, shapes: dict[str, tuple[int | None, ...]]) -> dict[str, np.ndarray] | None:
    """The arrays of a file; None where there is none. Those named must have these shapes (None: any size).

    Raises:
        BadState: it is truncated, or another script's or run's.
    """
    if not path.exists():
        return None
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, AttributeError, TypeError) as error:
        raise BadState(path, str(error)) from None
    for name, shape in shapes.items():
        if name not in arrays:
            raise BadState(path, f"it lacks {name}")
        found = arrays[name].shape
        if len(found) != len(shape) or any(b is not None and a != b for a, b in zip(found, shape, strict=True)):
            raise BadState(path, f"{name} has shape {list(found)}, not {list(shape)}")
    return arrays
