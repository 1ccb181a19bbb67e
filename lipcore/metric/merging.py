"""Windows of all ranks as one: the ranks meet, find out who owns what, and add up in one packed reduce."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lipcore.distributed.agreed import Agreed, words_of
from lipcore.distributed.contribution import Contribution, contribute
from lipcore.distributed.group import Group
from lipcore.distributed.meeting import Header
from lipcore.distributed.ownership import Ownership
from lipcore.distributed.partners import Partners
from lipcore.metric.rank_part import Holding, RankPart
from lipcore.metric.results import MetricResult

_VERSION = 4
Part = Callable[[], RankPart | str]
_LOST = (
    "its numbers of this window could not be merged, since making them raised an error ({0}); each rank's own are in "
    "pop_window() and history"
)


@dataclass
class Offer:
    """One window of this rank that waits to be merged."""

    first_step: int
    last_step: int
    parts: dict[str, RankPart]
    left_out: dict[str, str]  #: metrics without a part, and why

    @property
    def steps(self) -> list[int]:
        """The first and the last step."""
        return [self.first_step, self.last_step]

    def header(self) -> Header:
        """Return what other ranks have to know of it."""
        left_out = self.left_out | {name: part.withdrawn for name, part in self.parts.items() if part.withdrawn}
        agreed, told = {}, {}
        for name, part in self.parts.items():
            if name in left_out:
                continue
            try:
                agreed[name], told[name] = part.agreed, part.told
            except Exception as error:  # the other ranks wait for a word of this one
                left_out[name] = words_of(error)
        return {"steps": self.steps, "parts": agreed, "told": told, "left_out": left_out}


class Withdrawn(NamedTuple):
    """Numbers of a metric over a window that has been merged, which have turned out to be wrong on a rank."""

    metric: str
    first_step: int
    last_step: int
    why: str


@dataclass
class Merged:
    """One window of all ranks."""

    offer: Offer
    results: dict[str, MetricResult]
    left_out: dict[str, str]


def merge(
    partners: Partners,
    group: Group,
    what: str,
    step: int,
    offers: Sequence[Offer],
    withdrawn: Sequence[Withdrawn] = (),
    said: Any = None,
) -> tuple[list[Merged], list[Withdrawn], list[Any]]:
    """Return the windows that all ranks offer, oldest first, the newest among them; what ranks have to take back of
    windows that were merged before; and what the ranks have said, in their order. A collective: all ranks call it.

    Args:
        what: for which call, in words.
        step: the number of steps that this rank has made.
        offers: the windows that wait, oldest first.
        withdrawn: what this rank has to take back.
        said: words of this rank for the others, JSON-ready.

    Raises:
        RuntimeError: a rank has not come, or is elsewhere. No collective was started.
        ValueError: ranks are at different calls or have different windows; or their parameters are not parts of one
            model.
    """
    newest, holdings = offers[-1], _holdings(offers)
    turn_to(group, offers)
    unknown = sorted(name for name, holding in holdings.items() if holding.ownership is None)
    header: Header = {"version": _VERSION, "windows": [offer.header() for offer in offers]}
    header |= {"call": what.partition(" ")[0], "unknown": unknown, "held": sorted(holdings)}
    header |= {"withdrawn": [list(each) for each in withdrawn], "said": said}
    what = f"{what} over steps {newest.first_step} to {newest.last_step}"
    agreed, headers = Agreed(partners, group, what, step), partners.meet(group, what, step, header)
    _check_same(what, headers, group)
    _find_owners(headers, holdings, agreed)
    chosen = [(offer, *_shared(offer, found, group)) for offer in offers if (found := _of_all(offer, headers))]
    contribute([each for _, shared, _ in chosen for each in shared.values()], agreed)
    merged = [_merged(*each) for each in chosen]
    taken_back = dict.fromkeys(Withdrawn(*each) for other in headers for each in other["withdrawn"])
    return merged, list(taken_back), [other["said"] for other in headers]


def _merged(offer: Offer, shared: Mapping[str, Contribution], left_out: dict[str, str]) -> Merged:
    results: dict[str, MetricResult] = {}
    for name, contribution in shared.items():
        if contribution.lost:
            left_out[name] = _LOST.format(contribution.words)
            continue
        try:
            if (result := offer.parts[name].result(contribution.together)) is not None:
                results[name] = result
        except ValueError:  # what the ranks have does not fit together, as all of them find
            raise
        except Exception as error:
            left_out[name] = _LOST.format(f"here: {words_of(error)}")
    return Merged(offer, results, left_out)


def _find_owners(headers: Sequence[Header], holdings: Mapping[str, Holding], agreed: Agreed) -> None:
    """Find who counts what where a rank does not know that yet. The ranks tell each other in the store, in which many
    of them have the same to say: it is read once by each, and no collective is needed."""
    asked = sorted({name for other in headers for name in other["unknown"]})
    asked = [name for name in asked if all(name in other["held"] for other in headers)]
    if not asked:
        return
    words = json.dumps({name: holdings[name].described() for name in asked}).encode()
    mine = {"holds": base64.b85encode(zlib.compress(words)).decode()}
    found = [other["holds"] for other in agreed.say("who holds what", mine)]
    try:
        known = {text: json.loads(zlib.decompress(base64.b85decode(text))) for text in set(found)}
        for name in asked:
            descriptions = [known[text][name] for text in found]
            holdings[name].ownership = Ownership.of(descriptions, agreed.group.ranks, agreed.group.place)
    except Exception as error:  # all ranks find alike what does not fit; memory may be full on one alone
        agreed.say("who counts what", {"error": words_of(error)})
        raise
    said = zip(agreed.group.ranks, agreed.say("who counts what", {"error": ""}), strict=True)
    for rank, other in said:
        if other["error"]:
            raise RuntimeError(f"lipcore: {agreed.what}: on rank {rank}: {other['error']}. No collective was started")


def turn_to(group: Group, offers: Iterable[Offer]) -> None:
    """Let the parts of windows speak of the ranks of this group; they may have been merged over another one."""
    for part in (part for offer in offers for part in offer.parts.values()):
        part.turn_to(group.ranks)


def part_or_why(make: Part) -> RankPart | str:
    """Return a part of this rank; where that raises, the words that the other ranks are told: they wait for some."""
    try:
        return make()
    except ValueError as error:  # with words for users
        return str(error)
    except Exception as error:
        return words_of(error)


def merge_open(
    partners: Partners, group: Group, what: str, step: int, steps: tuple[int, int], part: Part, name: str
) -> MetricResult:
    """Return one metric's open window of all ranks; as :func:`merge`, and ValueError where there is nothing to add.

    Args:
        steps: the window's first and last.
        part: makes that of this rank.
        name: of the metric.
    """
    found = part_or_why(part)
    offer = Offer(*steps, *(({}, {name: found}) if isinstance(found, str) else ({name: found}, {})))
    ((merged,), _, _) = merge(partners, group, what, step, [offer])
    if merged.left_out:
        raise ValueError(merged.left_out[name])
    return merged.results[name]


def _holdings(offers: Sequence[Offer]) -> dict[str, Holding]:
    """Return what the newest window's parts are about, by metric; windows of what was watched earlier are not
    offered."""
    return {name: part.holding for name, part in offers[-1].parts.items() if part.holding is not None}


def _check_same(what: str, headers: Sequence[Header], group: Group) -> None:
    """Raise ValueError where ranks cannot go on together; on all of them alike, since all have the same headers."""
    first = headers[0]
    for key, words in (("call", "are at"), ("version", "have headers of version")):  # other calls say other things
        for rank, other in zip(group.ranks, headers, strict=True):
            if other[key] != first[key]:
                raise ValueError(
                    f"{what}: ranks {words} {first[key]} (rank {group.ranks[0]}) and {other[key]} (rank {rank}); all "
                    "ranks have to make the same call, with the same lipcore"
                )
    for rank, other in zip(group.ranks, headers, strict=True):
        mine, theirs = (header["windows"][-1]["steps"] for header in (first, other))
        if mine != theirs:
            raise ValueError(
                f"{what}: the windows of ranks differ: steps {mine[0]} to {mine[1]} on rank {group.ranks[0]}, steps "
                f"{theirs[0]} to {theirs[1]} on rank {rank}; pass the same window_steps= on all ranks, and close "
                "windows at the same steps"
            )


def _of_all(offer: Offer, headers: Sequence[Header]) -> list[Header]:
    """Return this window as every rank has it; [] where one does not have it."""
    found = [[window for window in header["windows"] if window["steps"] == offer.steps] for header in headers]
    return [windows[0] for windows in found] if all(found) else []


def _shared(offer: Offer, found: Sequence[Header], group: Group) -> tuple[dict[str, Contribution], dict[str, str]]:
    """Return what this rank adds for the metrics of a window that all ranks have alike, and why others are left out."""
    left_out: dict[str, str] = {}
    for rank, window in zip(group.ranks, found, strict=True):
        for name, why in window["left_out"].items():
            left_out.setdefault(name, why if name in offer.left_out else f"on rank {rank}: {why}")
    errors: dict[str, str] = {}  # which the other ranks may not have: they take this one for one that takes part
    for name, part in offer.parts.items():
        if name not in left_out and (why := _refused(part, name, errors)):
            left_out[name] = why
    for name in sorted({name for window in found for name in window["parts"]}):
        first = found[0]["parts"].get(name)
        for rank, window in zip(group.ranks, found, strict=True):
            theirs = window["parts"].get(name)
            if theirs is None:
                left_out.setdefault(name, f"rank {rank} has no such metric")
            elif first is not None and theirs != first:
                keys = [key for key in first if first[key] != theirs.get(key)]
                key = keys[0] if keys else next(iter(theirs.keys() - first.keys()))
                left_out.setdefault(
                    name,
                    f"{key} is {first.get(key)!r} on rank {group.ranks[0]} and {theirs.get(key)!r} on rank {rank}",
                )
    names = [name for name in sorted(offer.parts) if name not in left_out]
    for name in names:
        part = offer.parts[name]
        try:
            part.hear([window["told"][name] for window in found])
        except Exception as error:
            errors.setdefault(name, words_of(error))
        if why := _refused(part, name, errors):
            left_out[name] = why
    names = [name for name in names if name not in left_out]
    return {name: Contribution(offer.parts[name], errors.get(name, "")) for name in names}, left_out


def _refused(part: RankPart, name: str, errors: dict[str, str]) -> str:
    try:
        return part.refused()
    except Exception as error:
        errors.setdefault(name, words_of(error))
        return ""
