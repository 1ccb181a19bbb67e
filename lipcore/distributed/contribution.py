"""What one rank adds to collectives that all ranks of a group make, also where it cannot make its numbers: a rank that
stayed away would leave the others in a collective, with which the training's next one is paired."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lipcore.distributed.group import Group
from lipcore.distributed.packed import Packed, Together, gathered
from lipcore.distributed.partial_sums import Partial, add_up

_MOST_WORDS = 240  # characters of an error that other ranks are told
_ROOM = 1024  # bytes for each


@dataclass(frozen=True)
class Sizes:
    """How many numbers of a part go into each collective: the same on all ranks, whatever becomes of the part there.

    Attributes:
        largest: of :attr:`Packed.largest`.
        sums: of :attr:`Packed.sums`; gets the maxima over all ranks.
        partial: of the partials that ranks which hold parts of the same add up.
        handle: the process group of these ranks.
    """

    largest: int
    sums: Callable[[list[Tensor]], int]
    partial: int = 0
    handle: Any = None


class Contributor(Protocol):
    """What numbers come from; all of these may raise on one rank alone."""

    def sizes(self) -> Sizes: ...

    def partials(self) -> Sequence[Partial]: ...

    def packed(self) -> Packed: ...


class Contribution:
    """A part's numbers on their way through the collectives.

    Args:
        part: that they come from.
        error: what this rank has raised for it before.

    Attributes:
        error: what this rank has raised for it; "" for nothing.
        lost: some rank has raised for it, as all of them know.
        why: by rank, once the ranks have told each other.
    """

    def __init__(self, part: Contributor, error: str = "") -> None:
        self.error, self.lost = error, False
        self.why: dict[int, str] = {}
        self._part, self._packed = part, Packed([], [])
        self._left_alone = False  # its partials were not added up, for what another rank has raised
        self._sizes = self._tried(part.sizes) or Sizes(0, lambda _: 0)

    def _tried(self, make: Callable[[], Any]) -> Any:
        """Return what is made; None, and keep the error, where that raises."""
        try:
            return make()
        except Exception as error:
            self.error = self.error or words_of(error)
            return None

    def _flat(self, make: Callable[[], Sequence[Tensor]], size: int, nothing: float) -> Tensor:
        """Return so many numbers, those that are made where they can be."""
        if not (self.error or self._left_alone):
            tensors = self._tried(make)
            flat: Tensor | None = None if tensors is None else self._tried(lambda: _joined(tensors))
            if flat is not None and len(flat) == size:
                return flat
            self.error = self.error or f"it has {0 if flat is None else len(flat)} numbers, {size} are expected"
        return torch.full((size,), nothing, dtype=torch.float64, device="cpu")

    @property
    def handle(self) -> Any:
        """Process group of the ranks that add up its partials; None where there are none."""
        return self._sizes.handle if self._sizes.partial else None

    def partial(self) -> list[Partial]:
        """Return its partials as one, behind a number that says whether this rank has raised."""
        found: list[Partial] = []

        def make() -> list[Tensor]:
            found.extend(self._part.partials())
            return [partial.number for partial in found]

        size = self._sizes.partial
        numbers = self._flat(make, size, 0.0)
        flag = numbers.new_tensor([float(bool(self.error))])

        def take(total: Tensor, own: Tensor) -> None:
            self._left_alone = bool(total[0])
            if not (self.error or self._left_alone):
                self._tried(lambda: _hand_out(found, total[1:], own[1:]))

        return [Partial(torch.cat([flag, numbers]), self.handle, take)]

    def largest(self) -> Tensor:
        """Return whether this rank has raised, and the numbers of which the maxima are wanted."""

        def make() -> list[Tensor]:
            self._packed = self._part.packed()
            return self._packed.largest

        flat = self._flat(make, self._sizes.largest, -torch.inf)
        return torch.cat([flat.new_tensor([float(bool(self.error))]), flat])

    def take_largest(self, numbers: Tensor) -> None:
        """Take the maxima over all ranks of what :meth:`largest` returns."""
        self.lost = bool(numbers[0])
        if not self.lost:
            self._packed.largest = _apart(numbers[1:], self._packed.largest)

    def sums(self) -> Tensor:
        """Return whether this rank has raised, and the numbers that are added up; nothing where all know that it is
        lost."""
        if self.lost:
            return torch.zeros(0, dtype=torch.float64, device="cpu")
        made, most = self._packed.sums, self._packed.largest
        size = self._tried(lambda: self._sizes.sums(most)) or 0
        if callable(made):
            flat = self._flat(lambda: self._made(made, most), size, 0.0)
        else:
            flat = self._flat(lambda: made, size, 0.0)
        return torch.cat([flat.new_tensor([float(bool(self.error))]), flat])

    def _made(self, make: Callable[[list[Tensor]], list[Tensor]], most: list[Tensor]) -> list[Tensor]:
        self._packed.sums = make(most)
        return self._packed.sums

    def take_sums(self, numbers: Tensor) -> None:
        """Take the sums over all ranks of what :meth:`sums` returns."""
        if self.lost:
            return
        self.lost = bool(numbers[0])
        if not self.lost and not callable(self._packed.sums):
            self._packed.sums = _apart(numbers[1:], self._packed.sums)

    @property
    def together(self) -> Together:
        """The numbers of all ranks."""
        assert not self.lost
        assert not callable(self._packed.sums)
        return Together(self._packed.sums, self._packed.largest)


def contribute(all_of_them: Sequence[Contribution], group: Group) -> None:
    """Bring the parts of all ranks together: one all-reduce of maxima and one of sums, and before them one for each
    group of ranks that add up parts of the same. Whatever a part raises on one rank, this rank takes part with a filler
    and says so, the part is lost on all ranks, and they tell each other why, in one collective more."""
    add_up([partial for each in all_of_them if each.handle is not None for partial in each.partial()])
    packed = [each.largest() for each in all_of_them]
    if any(len(flat) > 1 for flat in packed):  # of the same lengths on all ranks
        found = _all_reduced(packed, group, torch.distributed.ReduceOp.MAX)
        for each, numbers in zip(all_of_them, found, strict=True):
            each.take_largest(numbers)
    found = _all_reduced([each.sums() for each in all_of_them], group, torch.distributed.ReduceOp.SUM)
    for each, numbers in zip(all_of_them, found, strict=True):
        each.take_sums(numbers)
    _tell([each for each in all_of_them if each.lost], group)


def _tell(lost: Sequence[Contribution], group: Group) -> None:
    if not lost:
        return
    said = {i: each.error for i, each in enumerate(lost) if each.error}
    for rank, text in zip(group.ranks, gathered(json.dumps(said), 16 + _ROOM * len(lost), group), strict=True):
        heard: Mapping[str, str] = json.loads(text or "{}")
        for i, why in heard.items():
            lost[int(i)].why[rank] = why


def _all_reduced(
    flats: Sequence[Tensor], group: Group, operation: torch.distributed.ReduceOp.RedOpType
) -> Sequence[Tensor]:
    if not sum(map(len, flats)):
        return flats
    flat = torch.cat(list(flats)).to(group.device)
    torch.distributed.all_reduce(flat, operation, group=group.handle)
    pieces: Sequence[Tensor] = flat.cpu().split([len(each) for each in flats])
    return pieces


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    if not tensors:
        return torch.zeros(0, dtype=torch.float64, device="cpu")
    return torch.cat([tensor.reshape(-1) for tensor in tensors]).double().cpu()


def _apart(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    pieces = flat.split([tensor.numel() for tensor in like])
    return [piece.reshape(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]


def _hand_out(partials: Sequence[Partial], total: Tensor, own: Tensor) -> None:
    numbers = [partial.number for partial in partials]
    for partial, whole, addend in zip(partials, _apart(total, numbers), _apart(own, numbers), strict=True):
        partial.take(whole, addend)


def words_of(error: Exception) -> str:
    """Return the kind and the words of an error, as short and plain as other ranks are told them."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text)[:_MOST_WORDS]
