"""Where a page is written to: whole, or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


class ReportError(RuntimeError):
    """The error of a page that cannot be written."""


def write_whole(text: str, path: str | os.PathLike[str]) -> Path:
    """Write a text to a file, which is replaced when all is written; return its path.

    Raises:
        ReportError: the file cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise ReportError(f"{path}: is a folder; choose the name of a file, such as {path / 'report.html'}")
    half = None
    try:
        file, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix="-half")
        half = Path(name)
        with open(file, "wb") as opened:
            opened.write(text.encode("utf-8", "replace"))  # a folder's name may be no text
        mask = os.umask(0)
        os.umask(mask)
        half.chmod(0o666 & ~mask)
        os.replace(half, path)
    except OSError as error:
        raise ReportError(f"{path}: cannot be written ({error.strerror or error}); choose another file") from error
    finally:
        if half is not None:
            half.unlink(missing_ok=True)
    return path
