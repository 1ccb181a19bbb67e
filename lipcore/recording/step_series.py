"""Series of single steps: blocks of a file, put together or one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lipcore.recording.folding import FOLD, unfolded
from lipcore.recording.pack import unpacked_steps
from lipcore.recording.run_file import RunFile
from lipcore.recording.series import Series, matching
from lipcore.report.source import Block

Numbers = np.ndarray[Any, np.dtype[np.float64]]


def series_of_steps(file: RunFile, quantity: str, pattern: str, name: str) -> Series:
    """Return a quantity of single steps in the places that fit a pattern, under this name."""
    columns: dict[str, int] = {}
    pieces: list[tuple[np.ndarray[Any, Any], list[int], np.ndarray[Any, Any]]] = []
    rows = file.rows("select first, last, layout, fold, rowid from steps where quantity = ? order by first", quantity)
    for first, last, layout, fold, rowid in rows:
        names = list(file.places(layout).names)
        where = matching(names, pattern)
        if not where:
            continue
        if fold == 1:
            steps = np.arange(first, last + 1)
            found = _part(file, rowid, where, len(steps))
            three = np.stack([found, found, found])
        else:
            (blob,) = file.rows("select data from steps where rowid = ?", rowid)[0]
            three = unfolded(blob, len(names))[:, :, where]
            steps = np.minimum(first - 1 + FOLD * np.arange(1, three.shape[1] + 1), last)
        pieces.append((steps, [columns.setdefault(names[i], len(columns)) for i in where], three))
    total = sum(len(steps) for steps, _, _ in pieces)
    values = np.full((3, total, len(columns)), np.nan)
    at, numbers = 0, np.empty(total, np.int64)
    for steps, where, three in pieces:
        numbers[at : at + len(steps)] = steps
        values[:, at : at + len(steps), where] = three
        at += len(steps)
    return _joined(name, numbers, values, list(columns))


def blocks_of_steps(file: RunFile, quantity: str, first: int, last: int) -> Iterator[Block]:
    """Yield the blocks of a quantity of single steps as they lie in the file, of those that have a step between two."""
    for begin, layout in file.rows(
        "select first, layout from steps where quantity = ? and last >= ? and first <= ? order by first, layout",
        *(quantity, first, last),
    ):
        rows = file.rows(
            "select last, fold, data from steps where quantity = ? and first = ? and layout = ?",
            *(quantity, begin, layout),
        )
        if not rows:  # joined to an older block meanwhile, or rewound
            continue
        (end, fold, blob), places = rows[0], file.places(layout)
        if fold == 1:
            values = unpacked_steps(blob, len(places))
            yield Block(np.arange(begin, end + 1), places.names, places.levels, values, values, values)
        else:
            low, mean, high = unfolded(blob, len(places))
            steps = np.minimum(begin - 1 + FOLD * np.arange(1, len(mean) + 1), end)
            yield Block(steps, places.names, places.levels, mean, low, high)


def _part(file: RunFile, rowid: int, where: Sequence[int], steps: int) -> Numbers:
    """Return some places of a block, [steps, places], without reading the others."""
    size = 4 * steps
    pieces = []
    for begin, end in _stretches(where):
        blob = file.rows(
            "select substr(data, ?, ?) from steps where rowid = ?", begin * size + 1, (end - begin) * size, rowid
        )[0][0]
        pieces.append(np.frombuffer(blob, "<f4").reshape(end - begin, steps))
    return np.concatenate(pieces).T.astype(np.float64)


def _stretches(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of stretches of increasing numbers without gaps."""
    begin = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[begin], numbers[i - 1] + 1
            begin = i


def _joined(name: str, steps: np.ndarray[Any, Any], values: Numbers, places: list[str]) -> Series:
    """Return a series in which blocks of the same steps, with other places, are one."""
    order, inverse = np.unique(steps, return_inverse=True)
    if len(order) == len(steps) and (order == steps).all():
        return Series(name, steps, values[1], places, values[0], values[2])
    joined = np.full((3, len(order), len(places)), np.nan)
    for row in range(len(steps)):
        there = ~np.isnan(values[1, row])
        joined[:, inverse[row], there] = values[:, row, there]
    return Series(name, order, joined[1], places, joined[0], joined[2])
