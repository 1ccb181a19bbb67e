"""What one rank adds to collectives that all ranks of a group make, also where it cannot make its numbers: a rank that
stayed away would leave the others in a collective, with which the training's next one is paired."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lipcore.distributed.agreed import Agreed, words_of
from lipcore.distributed.packed import Packed, Together
from lipcore.distributed.partial_sums import Partial

_NOTHING = torch.zeros(0, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class Sizes:
    """How many numbers of a part go into each collective: the same on all ranks, whatever becomes of the part there.

    Attributes:
        largest: of :attr:`Packed.largest`.
        sums: of :attr:`Packed.sums`; gets the maxima over all ranks.
        partial: of the partials that ranks which hold parts of the same add up: the same on these.
        handle: the process group of these ranks.
        most_partial: the largest `partial` of all ranks.
    """

    largest: int
    sums: Callable[[list[Tensor]], int]
    partial: int = 0
    handle: Any = None
    most_partial: int = 0


class Contributor(Protocol):
    """What numbers come from; all of these may raise on one rank alone."""

    def sizes(self) -> Sizes: ...

    def partials(self) -> Sequence[Partial]: ...

    def packed(self) -> Packed: ...


class Contribution:
    """A part's numbers on their way through the collectives. In the memory of each they stand behind a flag, which says
    whether this rank has raised for the part; what becomes of them later has its memory before the flag is set.

    Args:
        part: that they come from.
        error: what this rank has raised for it before.

    Attributes:
        sizes: of its numbers.
        error: what this rank has raised for it; "" for nothing.
        lost: some rank has raised for it, as all of them know.
        why: by rank, once the ranks have told each other.
    """

    def __init__(self, part: Contributor, error: str = "") -> None:
        self.error, self.lost = error, False
        self.why: dict[int, str] = {}
        self._part = part
        self._packed: Packed | None = None
        self._partials: Sequence[Partial] = ()
        self._own = self._found = _NOTHING
        self._left_alone = False  # its partials were not added up, for what another rank has raised
        self.sizes = self._tried(part.sizes) or Sizes(0, lambda _: 0)

    def _tried(self, make: Callable[[], Any]) -> Any:
        """Return what is made; None, and keep the error, where that raises."""
        try:
            return make()
        except Exception as error:
            self.error = self.error or words_of(error)
            return None

    def _fill(self, into: Tensor, make: Callable[[], Sequence[Tensor]], nothing: float) -> None:
        """Write the numbers that are made where they can be, and the flag before them."""

        def write() -> None:
            self._own = _joined(make())
            if len(self._own) != len(into) - 1:
                self.error = f"it has {len(self._own)} numbers, {len(into) - 1} are expected"
                return
            self._found = torch.empty_like(self._own)
            into[1:].copy_(self._own)

        if not (self.error or self._left_alone):
            self._tried(write)
        if self.error or self._left_alone:
            into[1:].fill_(nothing)
        into[0] = float(bool(self.error))

    def _taken(self, numbers: Tensor) -> Tensor:
        """Return what came of the numbers, in memory that was there before."""
        return self._found.copy_(numbers[1:])

    # ---- of the ranks that hold parts of the same

    def fill_partials(self, into: Tensor) -> None:
        """Write its partials."""

        def make() -> list[Tensor]:
            self._partials = self._part.partials()
            return [partial.number for partial in self._partials]

        self._fill(into, make, 0.0)

    def take_partials(self, total: Tensor) -> None:
        """Take the sums of what :meth:`fill_partials` has written."""
        self._left_alone = bool(total[0])
        if not (self.error or self._left_alone):
            self._tried(lambda: _hand_out(self._partials, self._taken(total), self._own))

    # ---- of all ranks

    def fill_largest(self, into: Tensor) -> None:
        """Write the numbers of which the maxima are wanted."""

        self._fill(into, lambda: self._made().largest, -torch.inf)

    def take_largest(self, numbers: Tensor) -> None:
        """Take the maxima over all ranks of what :meth:`fill_largest` has written."""
        self.lost = bool(numbers[0])
        if not self.lost:
            packed = self._made()
            packed.largest = _apart(self._taken(numbers), packed.largest)

    def _made(self) -> Packed:
        """Return what the part adds."""
        if self._packed is None:
            self._packed = self._part.packed()
        return self._packed

    @property
    def number_of_sums(self) -> int:
        """How many numbers are added up; none where all know that it is lost."""
        largest = [] if self._packed is None else self._packed.largest
        return 0 if self.lost else self._tried(lambda: self.sizes.sums(largest)) or 0

    def fill_sums(self, into: Tensor) -> None:
        """Write the numbers that are added up."""

        def make() -> list[Tensor]:
            packed = self._made()
            if callable(packed.sums):
                packed.sums = packed.sums(packed.largest)
            return packed.sums

        self._left_alone |= self.lost
        self._fill(into, make, 0.0)

    def take_sums(self, numbers: Tensor) -> None:
        """Take the sums over all ranks of what :meth:`fill_sums` has written."""
        self.lost |= bool(numbers[0])
        if not self.lost:
            packed = self._made()
            assert not callable(packed.sums)
            packed.sums = _apart(self._taken(numbers), packed.sums)

    @property
    def together(self) -> Together:
        """The numbers of all ranks."""
        assert not self.lost
        packed = self._made()
        assert not callable(packed.sums)
        return Together(packed.sums, packed.largest)

    @property
    def words(self) -> str:
        """Return which rank has raised what for it."""
        return "; ".join(f"rank {rank}: {why}" for rank, why in self.why.items())


def contribute(all_of_them: Sequence[Contribution], agreed: Agreed) -> None:
    """Bring the parts of all ranks together: one all-reduce of maxima and one of sums, where there are any, and before
    them one for each group of ranks that add up parts of the same. Whatever a part raises on one rank, this rank takes
    part with a filler and says so, the part is lost on all ranks, and they tell each other why in the store.

    Raises:
        RuntimeError: on all ranks, where one has no memory for a collective.
    """
    _add_up_partials(all_of_them, agreed)
    operations, parts = torch.distributed.ReduceOp, list(all_of_them)
    lengths = [1 + each.sizes.largest for each in parts]
    maxima = any(length > 1 for length in lengths)
    if maxima:
        pieces = [(each.fill_largest, each.take_largest) for each in parts]
        _reduced(agreed.room(sum(lengths)), lengths, pieces, operations.MAX, agreed.group.handle)
    lengths = [1 + each.number_of_sums for each in parts]
    if any(length > 1 for length in lengths) or (parts and not maxima):
        pieces = [(each.fill_sums, each.take_sums) for each in parts]
        _reduced(agreed.room(sum(lengths)), lengths, pieces, operations.SUM, agreed.group.handle)
    _tell([each for each in parts if each.lost], agreed)


def _add_up_partials(all_of_them: Sequence[Contribution], agreed: Agreed) -> None:
    """Add up what several ranks hold parts of; with other numbers of samples some groups of ranks have less to add up
    than others, and all ranks have memory for as much."""
    count = sum(1 + each.sizes.most_partial for each in all_of_them if each.sizes.most_partial)
    room = agreed.room(count) if count else None
    parts = [each for each in all_of_them if each.sizes.partial]
    for handle in dict.fromkeys(each.sizes.handle for each in parts):
        mine = [each for each in parts if each.sizes.handle is handle]
        lengths = [1 + each.sizes.partial for each in mine]
        assert room is not None
        pieces = [(each.fill_partials, each.take_partials) for each in mine]
        _reduced(room[: sum(lengths)], lengths, pieces, torch.distributed.ReduceOp.SUM, handle)


def _reduced(
    room: Tensor,
    lengths: Sequence[int],
    pieces: Sequence[tuple[Callable[[Tensor], None], Callable[[Tensor], None]]],
    operation: torch.distributed.ReduceOp.RedOpType,
    handle: Any,
) -> None:
    """Fill the room, reduce it over the ranks, and have what came of it taken."""
    numbers = room.split(list(lengths))
    for (fill, _), piece in zip(pieces, numbers, strict=True):
        fill(piece)
    torch.distributed.all_reduce(room, operation, group=handle)
    for (_, take), piece in zip(pieces, numbers, strict=True):
        take(piece)


def _tell(lost: Sequence[Contribution], agreed: Agreed) -> None:
    if not lost:
        return
    said = {"said": [each.error for each in lost]}
    for rank, other in zip(agreed.group.ranks, agreed.say("what went wrong", said), strict=True):
        for each, why in zip(lost, other["said"], strict=True):
            if why:
                each.why[rank] = why


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    if not tensors:
        return _NOTHING
    return torch.cat([tensor.reshape(-1) for tensor in tensors]).double().cpu()


def _apart(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    pieces = flat.split([tensor.numel() for tensor in like])
    return [piece.reshape(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]


def _hand_out(partials: Sequence[Partial], total: Tensor, own: Tensor) -> None:
    numbers = [partial.number for partial in partials]
    for partial, whole, addend in zip(partials, _apart(total, numbers), _apart(own, numbers), strict=True):
        partial.take(whole, addend)
