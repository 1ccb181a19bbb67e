"""The output folder: checked before anything is trained, filled in one go at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory


class DemoError(Exception):
    """Error that stops the demo and can be put right by whoever started it."""


@contextmanager
def staging(out: Path, *, force: bool) -> Iterator[Path]:
    """Make a temporary folder whose files move to `out` when the block ends well; otherwise nothing is left behind.

    It lies inside `out`: the same file system, so that moving is one atomic rename per file.
    """
    made = [folder for folder in (out, *out.parents) if not os.path.lexists(folder)]
    try:
        if out.is_dir() and any(out.iterdir()) and not force:
            raise DemoError(f"'{out}' exists and is not empty; pass --force to overwrite, or --out for another folder")
        out.mkdir(parents=True, exist_ok=True)
        temporary = TemporaryDirectory(dir=out, prefix=".unfinished-")
    except OSError as error:
        _remove_empty(made)
        raise DemoError(f"cannot write to '{out}': {error.strerror}; choose another folder with --out") from None
    try:
        with temporary as name:
            yield Path(name)
            for file in sorted(path for path in Path(name).rglob("*") if path.is_file()):
                place = out / file.relative_to(name)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, place)
    except OSError as error:
        raise DemoError(f"cannot write to '{out}': {error}") from error
    finally:
        _remove_empty(made)


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):  # one that is not there, or no longer empty, stays, and so do those above it
        for folder in folders:
            folder.rmdir()
