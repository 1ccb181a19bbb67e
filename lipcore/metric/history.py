"""The closed windows of a run, as many as there is room for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, SupportsIndex, overload

from lipcore.metric.values import suffix_maximum
from lipcore.metric.window import Window

HISTORY_BYTES = 64 << 20


class History(deque[Window]):
    """The closed windows, oldest first; bounded by the Monitor's `history_limit` and `history_bytes`.

    Where a window more does not fit the bytes, what older ones keep for numbers that nobody has read (a copy of W_1)
    goes first, then the oldest windows go. The last one always stays. A slice is a list of windows.
    """

    def __init__(
        self, windows: Iterable[Window] = (), maxlen: int | None = None, *, bytes_limit: int | None = None
    ) -> None:
        super().__init__(windows, maxlen)
        self.bytes_limit = bytes_limit
        self._at_most = 0  # bytes, as far as append() knows; what has been read since needs less

    @property
    def nbytes(self) -> int:
        """Bytes of memory of all windows, about."""
        return sum(window.nbytes for window in self)

    @overload
    def __getitem__(self, which: SupportsIndex, /) -> Window: ...
    @overload
    def __getitem__(self, which: slice, /) -> list[Window]: ...
    def __getitem__(self, which: SupportsIndex | slice, /) -> Window | list[Window]:
        return list(self)[which] if isinstance(which, slice) else super().__getitem__(which)

    def append(self, window: Window) -> None:
        """Add the latest window; the oldest go when there is no room."""
        super().append(window)
        if self.bytes_limit is None:
            return
        self._at_most += window.nbytes
        if self._at_most > self.bytes_limit:
            self._make_room(self.bytes_limit)

    def forget(self, step: int) -> None:
        """Drop windows with steps behind this one, which are made again."""
        kept = [window for window in self if window.last_step <= step]
        if len(kept) < len(self):
            self.clear()
            self.extend(kept)

    def _make_room(self, limit: int) -> None:
        size = self.nbytes
        for window in list(self)[:-1]:
            if size <= limit:
                break
            for result in window.results.values():
                size -= result.pending_bytes
                result.drop_pending(f"not read while there was room (history_bytes={limit:,})")
        while size > limit and len(self) > 1:
            size -= self.popleft().nbytes
        self._at_most = size

    def series(self, metric: str, quantity: str, place: str, reducer: str) -> list[float]:
        """Return one number per closed window."""
        return [window[metric][quantity][place][reducer].value for window in self]

    def steadiness(self, place: str, metric: str = "lipschitz") -> list[float]:
        r"""Return Definition 1 of Loukas et al. per window: :math:`\varphi(\tau) = \max_{t \ge \tau} r_t`, tau = each
        window's start.

        A suffix maximum over the windows kept; the last entry is the last window's own maximum.
        """
        return suffix_maximum(self.series(metric, "normalized_gradient_norm", place, "max"))

    def to_dict(self) -> dict[str, Any]:
        """Return {"windows": [...]}, JSON-ready."""
        return {"windows": [window.to_dict() for window in self]}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> History:
        """Restore what :meth:`to_dict` gave, from JSON too; None, which stands for what is not finite, becomes NaN.

        Raises:
            ValueError: it is something else.

        >>> History.from_dict({"windows": []})
        History([])
        """
        if not isinstance(state, Mapping) or not isinstance(state.get("windows"), (list, tuple)):
            raise ValueError(
                f"d: expected the dict that History.to_dict() returned, with a list of windows, got {_what(state)}"
            )
        return cls(_restored(i, window) for i, window in enumerate(state["windows"]))


def _restored(i: int, state: Any) -> Window:
    try:
        return Window.from_dict(state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"d: windows[{i}] is not one that History.to_dict() returned ({type(error).__name__}: {error})"
        ) from error


def _what(state: Any) -> str:
    return f"keys {list(state)[:8]}" if isinstance(state, Mapping) else type(state).__name__
