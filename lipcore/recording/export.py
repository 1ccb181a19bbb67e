"""A record as a table in a file that other tools read."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from lipcore.recording.run import Run
from lipcore.recording.schema import RecordError

#: One row per number.
COLUMNS = ("quantity", "place", "step", "value", "low", "high")
Row = tuple[str, str, int, float, float, float]


def export_csv(run: Run, path: str | os.PathLike[str]) -> int:
    """Write every series of a run, of single steps and of windows, as comma-separated values; return the number of
    rows. What stood in the file is replaced when all is written.

    Raises:
        RecordError: the file cannot be written.
    """
    path, count = Path(path), 0
    half = path.with_name(path.name + "-half")
    try:
        with open(half, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for row in rows_of(run):
                writer.writerow(row)
                count += 1
        os.replace(half, path)
    except OSError as error:
        raise RecordError(f"{path}: cannot be written ({error.strerror})") from error
    return count


def export_parquet(run: Run, path: str | os.PathLike[str]) -> int:
    """Write the same as Parquet; needs pyarrow.

    Raises:
        ImportError: pyarrow is missing.
        RecordError: the file cannot be written.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet needs pyarrow: pip install pyarrow") from error
    table = pyarrow.table(dict(zip(COLUMNS, zip(*rows_of(run), strict=True), strict=True)))
    path = Path(path)
    half = path.with_name(path.name + "-half")
    try:
        pyarrow.parquet.write_table(table, half)
        os.replace(half, path)
    except OSError as error:
        raise RecordError(f"{path}: cannot be written ({error})") from error
    return int(table.num_rows)


def rows_of(run: Run) -> Iterator[Row]:
    """Yield (quantity, place, step, value, least, greatest value) of everything in a run."""
    for series in run.all_series():
        for i, place in enumerate(series.places):
            columns = (series.steps, series.values[:, i], series.low[:, i], series.high[:, i])
            for step, value, low, high in zip(*(column.tolist() for column in columns), strict=True):
                yield series.name, place, step, value, low, high
