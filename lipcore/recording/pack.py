"""Arrays and windows as the blobs of a record, and back."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from lipcore.metric.columns import Column, Columns, Places, Where, Words
from lipcore.metric.results import MetricResult, Window
from lipcore.metric.values import Level, json_ready

Steps = np.ndarray[Any, np.dtype[np.float32]]


def packed_steps(values: np.ndarray[Any, Any]) -> bytes:
    """Return numbers [steps, places] as a blob: float32, a place after the other, so that one can be read alone."""
    return np.ascontiguousarray(values.T, dtype="<f4").tobytes()


def unpacked_steps(blob: bytes, places: int) -> Steps:
    """Return the numbers [steps, places] of a blob."""
    return np.frombuffer(blob, dtype="<f4").reshape(places, -1).T


def layout_text(names: Sequence[str], levels: Sequence[Level]) -> str:
    """Return places as the text of a layout."""
    return json.dumps([list(names), list(levels)], ensure_ascii=False)


@lru_cache(maxsize=32)  # the same places come in every block of steps, and in every window
def kept_places(names: tuple[str, ...], levels: tuple[Level, ...], kept: tuple[Level, ...]) -> tuple[Where | None, str]:
    """Return which of some places have one of the levels that are `kept`, None where all have, and the text of their
    layout, "" where none has."""
    where = [i for i, level in enumerate(levels) if level in kept]
    if not where:
        return slice(0, 0), ""
    text = layout_text([names[i] for i in where], [levels[i] for i in where])
    if len(where) == len(names):
        return None, text
    begin, end = where[0], where[-1] + 1
    return slice(begin, end) if end - begin == len(where) else np.array(where), text


def places_of(text: str) -> Places:
    """Return the places of a layout's text."""
    names, levels = json.loads(text)
    return Places(names, levels)


class PackedWindow:
    """A window as header, numbers and counts.

    The header is JSON: what the columns are, and whatever is one thing for all places or is rare. Numbers, errors and
    counts of columns with one per place follow each other in two arrays, in the order of the header.

    Args:
        window: whose results are made here, if they are not yet.
        levels: the levels of places that are kept.
    """

    def __init__(self, window: Window, levels: Sequence[Level]) -> None:
        self._floats: list[np.ndarray[Any, Any]] = []
        self._counts: list[np.ndarray[Any, Any]] = []
        self.layouts: dict[str, int] = {}  #: texts of layouts, by their number in the header
        results = {name: self._result(result, levels) for name, result in window.results.items()}
        self.header = {"results": results, "off": dict(window.off)}

    def blobs(self, layout_ids: Sequence[int]) -> tuple[bytes, bytes, bytes]:
        """Return header, numbers and counts, given the numbers that the layouts have in the file."""
        header = json.dumps(self.header | {"layouts": list(layout_ids)}, ensure_ascii=False, allow_nan=False)
        return zlib.compress(header.encode(), 1), _joined(self._floats, "<f8"), _joined(self._counts, "<i8")

    def _result(self, result: MetricResult, levels: Sequence[Level]) -> dict[str, Any]:
        details = {key: _plain(value) for key, value in result.details.items()}
        return {"details": details, "quantities": {name: self._quantity(q.parts, levels) for name, q in result.items()}}

    def _quantity(self, parts: Iterable[Columns], levels: Sequence[Level]) -> list[dict[str, Any]]:
        found = []
        for part in parts:
            where, text = kept_places(part.places.names, part.places.levels, tuple(levels))
            if text:
                found.append(self._columns(part.reducers if where is None else _some(part.reducers, where), text))
        return found

    def _columns(self, reducers: Mapping[str, Column], text: str) -> dict[str, Any]:
        number = self.layouts.setdefault(text, len(self.layouts))
        return {"layout": number, "reducers": {name: self._column(column) for name, column in reducers.items()}}

    def _column(self, column: Column) -> dict[str, Any]:
        found: dict[str, Any] = {"numbers": self._number(column.numbers), "counts": self._count(column.counts)}
        found["labels"] = _words(column.labels)
        if column.valid is not True:
            found["valid"] = _flags(column.valid)
        if column.notes != "":
            found["notes"] = _words(column.notes)
        if column.errors is not None:
            found["errors"] = self._number(column.errors)
        if column.present is not None:
            found["present"] = _flags(column.present)
        return found

    def _number(self, number: float | np.ndarray[Any, Any]) -> Any:
        if isinstance(number, np.ndarray):
            self._floats.append(number)
            return "array"
        return number if math.isfinite(number) else str(number)

    def _count(self, count: int | np.ndarray[Any, Any]) -> Any:
        if isinstance(count, np.ndarray):
            self._counts.append(count)
            return "array"
        return int(count)


class UnpackedWindow:
    """The results of a packed window.

    Args:
        header, floats, counts: the blobs.
        layouts: texts of the file's layouts by their numbers.
    """

    def __init__(self, header: bytes, floats: bytes, counts: bytes, layouts: dict[int, str]) -> None:
        self._header = json.loads(zlib.decompress(header))
        self._floats, self._counts = np.frombuffer(floats, "<f8"), np.frombuffer(counts, "<i8")
        self._places = [places_of(layouts[number]) for number in self._header["layouts"]]
        self._at = [0, 0]
        self.off: dict[str, str] = self._header["off"]
        self.results = {name: self._result(name, one) for name, one in self._header["results"].items()}

    def _result(self, name: str, packed: dict[str, Any]) -> MetricResult:
        result = MetricResult(name, **packed["details"])
        for quantity, parts in packed["quantities"].items():
            for part in parts:
                places = self._places[part["layout"]]
                reducers = {key: self._column(one, len(places)) for key, one in part["reducers"].items()}
                result.add_columns(quantity, Columns(places, reducers))
        return result

    def _column(self, packed: dict[str, Any], places: int) -> Column:
        return Column(
            self._number(packed["numbers"], places),
            self._take(self._counts, 1, places) if packed["counts"] == "array" else packed["counts"],
            _unpacked_words(packed["labels"]),
            _unpacked_flags(packed["valid"], places) if "valid" in packed else True,
            _unpacked_words(packed.get("notes", "")),
            self._number(packed["errors"], places) if "errors" in packed else None,
            _unpacked_flags(packed["present"], places) if "present" in packed else None,  # type: ignore[arg-type]
        )

    def _number(self, packed: Any, places: int) -> Any:
        return self._take(self._floats, 0, places) if packed == "array" else float(packed)

    def _take(self, array: np.ndarray[Any, Any], which: int, count: int) -> np.ndarray[Any, Any]:
        begin = self._at[which]
        self._at[which] += count
        return array[begin : begin + count]


def _joined(arrays: Sequence[np.ndarray[Any, Any]], dtype: str) -> bytes:
    return np.concatenate(arrays).astype(dtype).tobytes() if arrays else b""


def _some(reducers: Mapping[str, Column], where: Where) -> dict[str, Column]:
    return {name: column.at(where) for name, column in reducers.items()}


def _words(words: str | Words) -> Any:
    return words if isinstance(words, str) else {"words": list(words.words), "codes": words.codes.tolist()}


def _unpacked_words(packed: Any) -> Any:
    return packed if isinstance(packed, str) else Words.of(np.array(packed["codes"]), tuple(packed["words"]))


def _flags(flags: bool | np.ndarray[Any, Any]) -> Any:
    return bool(flags) if isinstance(flags, (bool, np.bool_)) else np.packbits(flags).tobytes().hex()


def _unpacked_flags(packed: Any, places: int) -> bool | np.ndarray[Any, Any]:
    if isinstance(packed, bool):
        return packed
    return np.unpackbits(np.frombuffer(bytes.fromhex(packed), np.uint8), count=places).astype(bool)


def _plain(value: Any) -> Any:
    """Return a detail as JSON has it; what JSON has no word for as text."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    try:
        ready = json_ready(value)
        json.dumps(ready, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
    return ready
