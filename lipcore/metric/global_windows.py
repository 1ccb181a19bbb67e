"""Closed windows that wait for those of the other ranks, and the windows of all ranks made of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lipcore.distributed.partners import Partners
from lipcore.distributed.rank_axis import Place
from lipcore.metric.merging import Merged, Offer, Withdrawn, merge, part_or_why, turn_to
from lipcore.metric.protocol import Metric
from lipcore.metric.rank_part import NOT_MERGED, RankPart
from lipcore.metric.results import History, Window
from lipcore.metric.window import Scope
from lipcore.models.gathered import holds_parts
from lipcore.models.ranks import rank, world_size

#: How many closed windows, and bytes of them, wait at most.
_MOST, _MOST_BYTES = 32, 64 << 20
_NEVER_CALLED = (
    "nobody has called monitor.global_window() for so long that closed windows are no longer kept for it: what is read "
    "here covers this rank alone (window.scope). Call it on every rank at logging steps, or pass group=None to the "
    "Monitor"
)
_DESTROYED = (
    "global_window: torch.distributed.destroy_process_group() was called, so that no other rank can be reached; call "
    "it behind the last global_window(). This rank's own windows are in pop_window() and history"
)


class GlobalWindows:
    """Keeper of what closed windows add to those of all ranks, until :meth:`merge`.

    Args:
        group, timeout: of the Monitor.
        limit, bytes_limit: how many merged windows are kept.

    Attributes:
        partners: the ranks of the group.
    """

    def __init__(self, group: Any, timeout: float, limit: int, bytes_limit: int) -> None:
        self.partners = Partners(group, timeout)
        self._waiting: deque[tuple[Window, Offer]] = deque()
        self._newest: Window | None = None  # of a process that stands alone
        self._warned = False
        self._called = False  # merge(), by somebody
        self._partial: dict[str, tuple[int, str]] = {}  # metrics whose windows from a step or before lack samples
        self._told: set[Withdrawn] = set()
        self.history = History(maxlen=limit, bytes_limit=bytes_limit)  #: windows of all ranks, oldest first
        self.last_merged: list[Window] = []  #: those that the last merge() has added to it
        self.heard: list[Any] = []  #: what the ranks have said at the last merge(), in their order

    def scope(self, model: nn.Module, metrics: Iterable[Metric]) -> Scope:
        """Return what this process's own windows cover."""
        if self.stands_alone:
            return "global"
        parts = holds_parts(model) or any(metric.keeps_parts for metric in metrics)
        return "shard" if parts else "rank"

    @property
    def none_asked_for(self) -> bool:
        """True with group=None."""
        return self.partners.none_asked_for

    @property
    def stands_alone(self) -> bool:
        """True where this process's own windows are all there is."""
        alone = self.partners.find() is None and self.partners.lost is None
        return alone and not (self.partners.none_asked_for and world_size() > 1)

    @property
    def place(self) -> Place:
        """This rank among those that train the model."""
        group = self.partners.find() or self.partners.lost
        if group is not None:
            return Place(group.place, group.size, group.ranks)
        apart = self.partners.none_asked_for and world_size() > 1
        return Place(rank(), world_size(), (rank(),), apart=True) if apart else Place(0, 1, (rank(),))

    def leave_out(self, names: Iterable[str], step: int, why: str) -> None:
        """Leave some metrics out of windows with steps up to this one."""
        self._partial |= dict.fromkeys(names, (step, why))

    def left_out_alone(self, begin: int) -> dict[str, str]:
        """Return the metrics that a process which stands alone leaves out of a window with steps behind `begin`, and
        why; of several ranks, each one's own windows have what it has."""
        return {name: why for name, (step, why) in self._partial.items() if step > begin and self.stands_alone}

    def lacking(self, begin: int) -> dict[str, list[Any]]:
        """Return which metrics lack samples in windows with steps up to one behind `begin`: that step, and why."""
        return {name: [step, why] for name, (step, why) in self._partial.items() if step > begin}

    def go_on_lacking(self, found: Mapping[str, Sequence[Any]]) -> None:
        """Leave out what was left out where a state was saved, and nothing else that this run has left out before."""
        self._partial = {name: (step, why) for name, (step, why) in found.items()}

    def forget(self, step: int) -> None:
        """Drop windows with steps behind this one, merged or not, and why such were to lack something: a checkpoint was
        loaded, and these steps are made again."""
        self._waiting = deque(each for each in self._waiting if each[0].last_step <= step)
        self.history.forget(step)
        self.partners.go_back()
        self.last_merged = [window for window in self.last_merged if window.last_step <= step]
        self._newest = self._newest if self._newest is not None and self._newest.last_step <= step else None
        self._told = {each for each in self._told if each.last_step <= step}
        self._partial = {name: each for name, each in self._partial.items() if each[0] <= step}

    @property
    def waiting(self) -> list[tuple[int, int]]:
        """The first and the last step of each closed window that waits, where windows are merged at all."""
        return [(window.first_step, window.last_step) for window, _ in self._waiting] if self._called else []

    @property
    def waits(self) -> bool:
        """True where closed windows wait to be merged with those of other ranks."""
        return bool(self._waiting)

    def keep(self, window: Window, metrics: Mapping[str, Metric], more: Mapping[str, RankPart]) -> str:
        """Keep what this rank adds to a closed window, before the metrics start the next one, and `more` of what is no
        metric's; return a warning, once, where too many wait. No collective."""
        if self.partners.none_asked_for and world_size() > 1:
            return ""
        if self.partners.find() is None:
            self._newest = window if self.partners.lost is None else None
            return ""
        parts = dict(more)
        left_out = {name: NOT_MERGED for name in window if name not in metrics and name not in more}
        for name, metric in metrics.items():
            step, why = self._partial.get(name, (0, ""))
            part = why if window.first_step <= step else _part_of(metric)
            if isinstance(part, str):
                left_out[name] = part
            else:
                parts[name] = part
        self._waiting.append((window, Offer(window.first_step, window.last_step, parts, left_out)))
        lost = False
        while len(self._waiting) > 1 and (len(self._waiting) > _MOST or self._bytes > _MOST_BYTES):
            self._waiting.popleft()
            lost = True
        if not lost or self._warned:
            return ""
        self._warned = True
        return _NEVER_CALLED

    @property
    def number_waiting(self) -> int:
        """Number of closed windows that wait to be merged."""
        return len(self._waiting)

    @property
    def _bytes(self) -> int:
        return sum(part.nbytes for _, offer in self._waiting for part in offer.parts.values())

    @property
    def is_given_up(self) -> bool:
        """True where nobody has merged windows for so long that they are kept no longer."""
        return self._warned

    def merge(self, step: int, said: Any = None) -> Window | None:
        """Merge all windows that wait, add them to the history and return the newest; None where none waits. With other
        ranks a collective, at which each hears what the others have said (:attr:`heard`).

        Raises:
            RuntimeError: group=None; the process group is gone; a rank has not come, or is elsewhere: the windows go on
                waiting.
            ValueError: what the ranks have does not fit together: the windows are given up.
        """
        self.last_merged, self.heard, self._called = [], [], True
        if self.partners.none_asked_for and world_size() > 1:
            raise RuntimeError(
                "global_window: this Monitor was made with group=None, so its windows are this rank's; pass "
                "group='auto' to merge those of all ranks"
            )
        group = self.partners.find()
        if group is None and self.partners.lost is not None:
            raise RuntimeError(_DESTROYED)
        if group is None:
            newest, self._newest = self._newest, None
            return newest
        turn_to(group, (offer for _, offer in self._waiting))
        self._drop_unknown()
        if not self._waiting:
            self.partners.pass_by(group, "monitor.global_window() with no window that waits", step)
            return None
        what = f"monitor.global_window() of window {self._waiting[-1][0].index}"
        try:
            offers, lost = [offer for _, offer in self._waiting], self._withdrawn()
            found, withdrawn, heard = merge(self.partners, group, what, step, offers, lost, said)
        except ValueError:
            self._waiting.clear()
            raise
        self._withdraw(withdrawn)
        self.heard = heard
        windows = {id(offer): window for window, offer in self._waiting}
        self._waiting.clear()
        self.last_merged = [_window_of(windows[id(merged.offer)], merged) for merged in found]
        for window in self.last_merged:
            self.history.append(window)
        return self.history[-1]

    def _withdrawn(self) -> list[Withdrawn]:
        """Return what has been withdrawn on this rank of merged windows, which the other ranks are not told of yet."""
        found = [
            Withdrawn(name, window.first_step, window.last_step, result.details["withdrawn"])
            for window in self.history
            for name, result in window.items()
            if "withdrawn" in result.details
        ]
        return [each for each in found if each not in self._told]

    def _withdraw(self, withdrawn: Sequence[Withdrawn]) -> None:
        """Take back here what a rank has to take back."""
        self._told.update(withdrawn)
        for window in self.history:
            for name, first, last, why in withdrawn:
                meant = (window.first_step, window.last_step) == (first, last) and name in window
                if meant and "withdrawn" not in window[name].details:
                    window[name].withdraw(why)

    def _drop_unknown(self) -> None:
        """Drop windows of parameters that are not watched any more and whose owners were never found."""
        if not self._waiting:
            return
        now = {id(part.holding) for part in self._waiting[-1][1].parts.values()}

        def known(offer: Offer) -> bool:
            holdings = (part.holding for part in offer.parts.values() if part.holding is not None)
            return all(holding.ownership is not None or id(holding) in now for holding in holdings)

        self._waiting = deque(each for each in self._waiting if known(each[1]))

    def __getstate__(self) -> dict[str, Any]:
        """Make what a copy has: what was merged, and nothing that waits."""
        return self.__dict__ | {"_waiting": deque()}


def _part_of(metric: Metric) -> RankPart | str:
    return metric.off or part_or_why(metric.rank_part)


def _window_of(window: Window, merged: Merged) -> Window:
    steps = window.first_step, window.last_step
    return Window(window.index, *steps, True, "global", merged.results, merged.left_out)
