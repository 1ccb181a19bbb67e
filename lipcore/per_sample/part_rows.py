"""Squared norms of samples whose gradients lie in parts on several ranks, kept until these have added them up.

A sample's norm is the root of a sum over the ranks, so nothing can be made of it before: neither a distribution nor a
score. Kept are, for each micro-batch, the squares of this rank's parts by layer and in total. What all of the ranks
hold alike is in those of one rank; and beside them, on each rank, to see that it is alike.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lipcore.capture.layers.compared_inputs import INPUT
from lipcore.distributed.partial_sums import Partial
from lipcore.metric.distribution import Distribution, observe_roots
from lipcore.metric.state import checked_tensor, is_count
from lipcore.models.tensor_parallel import PartRanks

_MOST_BYTES = 64 << 20  # in the open window, and of windows before whose samples have names
TOO_MANY = (
    "ranks hold parts of the parameters (tensor parallelism), and more than 64 MiB of single samples' squares waited "
    "to be added up; call global_window() on every rank more often, with shorter windows, or pass a larger every_steps="
)
#: What is so of a rank's own numbers.
IN_PARTS = "over this rank's parts of the parameters (tensor parallelism); whole samples' are in global_window()"
OTHER_PARTS = (
    "{0} ranks have saved squares of single samples, over parts of the parameters (tensor parallelism) that lie "
    "otherwise here, so the open window begins anew, and the scores lack its samples; before a checkpoint that another "
    "plan loads, call global_window() at a window's end"
)
LOST = (
    "lipcore's scores by id lack {0} samples: ranks hold parts of the parameters (tensor parallelism), and more than "
    "64 MiB of single samples' squares waited to be added up; call global_window() or sync_scores() more often, on "
    "every rank"
)
#: Why samples' norms are not added up.
UNLIKE = (
    "ranks that hold layer '{0}' alike got other gradients of the same samples there (each has seen a part of them, or "
    "of their positions or features), so that the gradient of a sample is a sum over ranks, and squares do not add up"
)
OTHER_INPUTS = (
    "ranks that hold parts of the parameters (tensor parallelism) were given other samples: layer '{0}', whose input "
    "is whole on each of them, got other values there; give these ranks the same batches"
)
BEFORE = -1  #: in a state, in the place of the block: of a window before
OTHER_SCORES = (
    "lipcore's scores by id lack those of {0} ids that ranks have saved, since other ranks hold other parts of the "
    "parameters here (tensor parallelism); load this checkpoint with as many ranks and the same plan to have them"
)
_KEYS = ("block", "whole", "unlike", "scored", "squares", "alike", "layers", "ids", "losses")  # of a row, in a state
_SAME = 1e-2  # relative, of squares of what ranks hold alike: they may be computed by other kernels


class PassRows:
    """One micro-batch's squares.

    Args:
        squares: [places, B], what this rank adds; the total is the last place.
        alike: [some layers, B], squares of what all ranks hold alike.
        layers: these layers.
        ids, losses: of the samples, [B]; None where they have none.

    Attributes:
        whole: the squares are those of whole gradients.
        unlike: a layer of which ranks have different numbers where they hold it alike; "" for none.
    """

    def __init__(
        self, squares: Tensor, alike: Tensor, layers: list[str], ids: Tensor | None, losses: Tensor | None
    ) -> None:
        self.squares, self.alike, self.layers, self.ids, self.losses = squares, alike, layers, ids, losses
        self.whole, self.unlike = False, ""
        self.number = -1  # among all of them
        self.nbytes = squares.nbytes + alike.nbytes  #: that are kept, at most

    @cached_property
    def bits(self) -> int:
        """A number that differs where ranks have other samples: of how many there are, of their ids, and of what is
        compared of them."""
        ids = b"" if self.ids is None else self.ids.cpu().contiguous().numpy().tobytes()
        return zlib.crc32(ids, zlib.crc32(repr(self.layers).encode(), self.squares.shape[1]))

    @property
    def numbers(self) -> int:
        """Number of those that are to be added up."""
        return self.squares.numel() + self.alike.numel()

    def partial(self, ranks: PartRanks) -> Partial:
        """Return what is to be added up."""
        both = torch.cat([self.squares.double(), self.alike.double()])
        places, count = len(self.squares), len(ranks.ranks)
        return Partial(both, ranks.handle, lambda total, own: self._take(total, own[places:], count))

    def _take(self, total: Tensor, alike: Tensor, ranks: int) -> None:
        """Take the sum over the ranks; several times, where windows overlap."""
        squares, several = total.split([len(total) - len(alike), len(alike)])
        if (unlike := unlike_row(several, alike, ranks)) >= 0:
            self.unlike = self.layers[unlike]
        self.squares, self.whole, self.alike = squares.clone(), True, self.alike[:0].clone()

    def norms(self) -> Tensor:
        """Return the norms of whole samples, [B]."""
        return self.squares[-1].sqrt()


class PartRows:
    """The squares of a window's samples.

    Args:
        ranks: that hold the parts.
        places: how many there are.
        blocks: of the window.
    """

    def __init__(self, ranks: PartRanks, places: int, blocks: int) -> None:
        self.ranks, self._places = ranks, places
        self._blocks: deque[list[PassRows]] = deque([[]], maxlen=blocks)
        self._sizes: deque[int] = deque([0], maxlen=blocks)  # bytes of each
        self._unscored: deque[PassRows] = deque()  # with ids, also of windows before
        self._unscored_bytes = 0
        self._made = self._marked = 0
        self._scored: list[PassRows] = []  # since the last mark, of those before it
        self._over: deque[bool] = deque([False], maxlen=blocks)  # of each, whether some of its rows are not kept
        self._lost = 0  # samples with names that no score gets, which nobody has been told of

    def add(self, rows: PassRows) -> None:
        """Add a micro-batch."""
        rows.number, self._made = self._made, self._made + 1
        if rows.ids is not None:
            self._unscored.append(rows)
            self._unscored_bytes += rows.nbytes
            while self._unscored_bytes > _MOST_BYTES:
                oldest = self._unscored.popleft()
                self._unscored_bytes -= oldest.nbytes
                self._lost += oldest.squares.shape[1]
        if not self._over[-1]:
            self._blocks[-1].append(rows)
            self._sizes[-1] += rows.nbytes
            if sum(self._sizes) > _MOST_BYTES:
                for at, block in enumerate(self._blocks):
                    block.clear()
                    self._sizes[at], self._over[at] = 0, True

    @property
    def off(self) -> str:
        """Reason why rows of the open window are not all kept; "" where they are."""
        return TOO_MANY if any(self._over) else ""

    @property
    def nbytes(self) -> int:
        """Bytes that are kept, about."""
        return _bytes({id(rows): rows for rows in (*self.window(), *self._unscored)}.values())

    def window(self) -> list[PassRows]:
        """Return those of the window."""
        return [rows for block in self._blocks for rows in block]

    @property
    def waiting(self) -> list[PassRows]:
        """Those that are to be added up before all scores are known."""
        return [rows for rows in self._unscored if not rows.whole]

    def score(self, take: Callable[[PassRows], None]) -> None:
        """Hand on those of named samples that are whole, and whose squares are."""
        whole = [rows for rows in self._unscored if rows.whole]
        if not whole:
            return
        self._keep_unscored(rows for rows in self._unscored if not rows.whole)
        right = [rows for rows in whole if not rows.unlike]
        for rows in right:
            take(rows)
        self._scored += [rows for rows in right if rows.number < self._marked]  # a failed proof forgets the others

    def _keep_unscored(self, rows: Iterable[PassRows]) -> None:
        self._unscored = deque(rows)
        self._unscored_bytes = _bytes(self._unscored)

    def give_up_waiting(self) -> None:
        """Leave out of the scores what waits, since ranks have other samples there and never will add it up."""
        self._keep_unscored(rows for rows in self._unscored if rows.whole)

    def tell_lost(self) -> str:
        """Return, once, words on samples that the scores lack; "" where there are none."""
        lost, self._lost = self._lost, 0
        return LOST.format(lost) if lost else ""

    def go_on_scoring(self, before: PartRows | None) -> None:
        """Hand on to the scores, besides, what another one of the same ranks has not: of other layers."""
        if before is not None and before.ranks == self.ranks:
            self._keep_unscored(before._unscored)
            self._made, self._lost = before._made, before._lost

    def mark(self) -> None:
        """Note that all so far are right."""
        self._marked, self._scored = self._made, []

    def take_back(self, take: Callable[[PassRows], None]) -> None:
        """Forget those since the last mark; hand on, once more, those before that came to the scores since."""
        for at, block in enumerate(self._blocks):
            block[:] = [rows for rows in block if rows.number < self._marked]
            self._sizes[at] = _bytes(block)
        self._keep_unscored(rows for rows in self._unscored if rows.number < self._marked)
        self._scored = [rows for rows in self._scored if rows.number < self._marked]
        for rows in self._scored:
            take(rows)

    def reset(self) -> None:
        """Start a window."""
        self._blocks.clear()
        self._sizes.clear()
        self._over.clear()
        self.advance()

    def advance(self) -> None:
        """Start a block; the oldest one falls out."""
        self._blocks.append([])
        self._sizes.append(0)
        self._over.append(False)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Return whose parts these are, those of the window, and those of windows before that have no scores yet."""
        window = [(at, rows) for at, block in enumerate(self._blocks) for rows in block]
        inside, unscored = {id(each) for _, each in window}, {id(each) for each in self._unscored}
        window = [(BEFORE, each) for each in self._unscored if id(each) not in inside] + window
        rows = [each for _, each in window]
        return {
            "ranks": len(self.ranks.ranks),
            "place": self.ranks.place,
            "off": self.off,
            "over": list(self._over),
            "blocks": len(self._blocks),
            "block": [at for at, _ in window],
            "whole": [each.whole for each in rows],
            "unlike": [each.unlike for each in rows],
            "scored": [id(each) not in unscored for each in rows],
            "squares": [each.squares.cpu() for each in rows],
            "alike": [each.alike.cpu() for each in rows],
            "layers": [each.layers for each in rows],
            "ids": [_or_empty(each.ids) for each in rows],
            "losses": [_or_empty(each.losses) for each in rows],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checked state."""
        self.__init__(self.ranks, self._places, self._blocks.maxlen or 1)  # type: ignore[misc]
        for _ in range(1, state.get("blocks", 1)):
            self.advance()
        for at, over in enumerate(state.get("over", [])):
            self._over[at] = bool(over)
        for one in _one_by_one(state):
            tensors = one["squares"].clone(), one["alike"].clone()
            rows = PassRows(*tensors, list(one["layers"]), _or_none(one["ids"]), _or_none(one["losses"]))
            rows.whole, rows.unlike, rows.number = bool(one["whole"]), one["unlike"], self._made
            self._made += 1
            if one["block"] != BEFORE:
                self._blocks[one["block"]].append(rows)
                self._sizes[one["block"]] += rows.nbytes
            if rows.ids is not None and not one["scored"]:
                self._unscored.append(rows)
                self._unscored_bytes += rows.nbytes
        self.mark()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a process group cannot be copied")  # what has these leaves them out


def _one_by_one(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for values in zip(*(state.get(key, []) for key in _KEYS), strict=True):
        yield dict(zip(_KEYS, values, strict=True))


def check_part_rows(state: Any, rows: PartRows | None) -> None:
    """Raise ValueError, naming what does not fit, where a state cannot be gone on from."""
    if not isinstance(state, dict):
        raise ValueError(f"in_parts: expected a dict, got {type(state).__name__}")
    if not state:
        return
    here = "whole" if rows is None else f"part {rows.ranks.place} of {len(rows.ranks.ranks)}"
    there = f"part {state.get('place')} of {state.get('ranks')}"
    if here != there:
        raise ValueError(
            f"in_parts: the state has squares of single samples over {there} of the parameters (tensor parallelism), "
            f"and this rank holds {here}; go on with the same plan, or save at a window's end, behind global_window()"
        )
    lengths = {key: len(state.get(key, [])) for key in _KEYS}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"in_parts: expected lists of the same length, got {lengths}")
    count, over = state.get("blocks", 1), state.get("over", [False])
    if not is_count(count) or count < 1 or len(over) != count:
        raise ValueError(f"in_parts: expected a count of blocks, each over or not, got {count!r} and {over!r}")
    for one in _one_by_one(state):
        if one["block"] != BEFORE and not (is_count(one["block"]) and one["block"] < count):
            raise ValueError(f"in_parts: expected one of {count} blocks, got {one['block']!r}")
        places = rows._places if rows is not None and one["block"] != BEFORE else None
        squares = checked_tensor("in_parts.squares", one["squares"], torch.float64, (places, None))
        alike = None if one["whole"] else len(one["layers"])
        checked_tensor("in_parts.alike", one["alike"], torch.float64, (alike, squares.shape[1]))


def has_rows(state: dict[str, Any]) -> bool:
    """Return whether a state has squares of samples, or had too many."""
    return bool(state.get("squares") or state.get("off"))


def why_unlike(layer: str) -> str:
    """Return why squares are not added up, of what was unlike."""
    return OTHER_INPUTS.format(layer[len(INPUT) :]) if layer.startswith(INPUT) else UNLIKE.format(layer)


def unlike_row(several: Tensor, own: Tensor, ranks: int) -> int:
    """Return the first row of squares [rows, B] of which so many ranks do not have the same, by their sum; -1 for
    none."""
    mine = ranks * own
    wrong = ((several - mine).abs() > _SAME * (several + mine)).any(1)
    return int(wrong.nonzero()[0]) if bool(wrong.any()) else -1


def observe_whole(rows: Iterable[PassRows], places: int) -> list[Distribution]:
    """Return the distributions of whole samples' norms by place."""
    found = [Distribution() for _ in range(places)]
    squares = [each.squares for each in rows]
    if squares:
        observe_roots(torch.cat(squares, 1), found)
    return found


def bits_of(rows: Sequence[PassRows]) -> list[int]:
    """Return how many micro-batches there are to be added up, and a number that differs where their samples do."""
    waiting = [each for each in rows if not each.whole]
    return [len(waiting), zlib.crc32(repr([each.bits for each in waiting]).encode())]


def _bytes(rows: Iterable[PassRows]) -> int:
    return sum(each.nbytes for each in rows)


def _or_empty(tensor: Tensor | None) -> Tensor:
    return torch.empty(0, device="cpu") if tensor is None else tensor.cpu()


def _or_none(tensor: Tensor) -> Tensor | None:
    return tensor.clone() if len(tensor) else None
