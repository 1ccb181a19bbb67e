"""Copies of a record's file, each whole at every moment."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path


def copy_file(source: Path, target: Path) -> None:
    """Copy a record's file to another one."""
    connection = sqlite3.connect(source)
    try:
        copy_record(connection, target)
    finally:
        connection.close()


def copy_record(connection: sqlite3.Connection, target: Path) -> None:
    """Copy a record as it is now to another file."""
    half = target.with_name(target.name + "-half")
    half.unlink(missing_ok=True)
    copy = sqlite3.connect(half)
    try:
        connection.backup(copy)
    finally:
        copy.close()
    os.replace(half, target)
