"""When the weighted pass is run: often enough to notice a change, and at most in one pass of a hundred."""

from __future__ import annotations

from collections import Counter

from torch import nn

from lipcore.models.ranks import under_process_group

_SECOND, _LONGEST = 64, 4096  # passes; the distance doubles in between
_EARLY = (2, 4)  # under a process group, where what a pass leaves open does not bring another
_COMPARED = 32  # passes: the samples' gradients are added up once in so many, which takes up to a third of a step
_KINDS = 8  # numbers of samples or of dimensions that are proved as they come; later ones one per distance


class ProofSchedule:
    """The passes that are proved: 1, 64, 128, 256 ... 4096 and every 4096th, and those in which something is new.

    New are a number of samples or of dimensions, and other sizes once per distance. A pass that left something open
    (rows without a gradient, numbers that are not finite) is followed by others of as many samples, ever farther apart.
    Under a process group the number of the pass decides alone, and is 2 and 4 too: where one rank ran a pass of its
    own, sharded models would hang.

    What the samples' gradients add up to needs no backward pass more: it is compared with what comes to the parameters
    in every 32nd pass too, of models on the CPU.
    """

    def __init__(self) -> None:
        self.passes = 0
        self.by_number = False  #: the last pass was to be proved by its number, whatever its batch
        self._next = 1
        self._owed = False  # the last one fell on a batch of one sample
        self._again: dict[tuple[int, int], int] = {}  # by kind, when what was left open is asked again
        self._asked: Counter[tuple[int, int]] = Counter()
        self._spare, self._other_sizes = _KINDS, True
        self._kinds: set[tuple[int, int]] = set()
        self._shapes: set[tuple[int, ...]] = set()

    def due(self, shape: tuple[int, ...], samples: int) -> bool:
        """Count a pass whose input has this shape, and return whether it is to be proved."""
        self.passes += 1
        self.by_number = by_number = self.passes >= self._next
        if by_number:
            self._next = max(_SECOND, self.passes + min(self.passes, _LONGEST))
            self._spare, self._other_sizes = max(1, self._spare), True
        if under_process_group():
            return by_number or self.passes in _EARLY
        self._owed |= by_number
        if samples < 2:
            return False
        kind = len(shape), samples
        new_kind = kind not in self._kinds and self._spare > 0
        new_shape = shape not in self._shapes and self._other_sizes
        due = self._owed or new_kind or new_shape or self._again.get(kind, self.passes + 1) <= self.passes
        if due:
            self._other_sizes &= self._owed or new_kind or not new_shape
            self._spare -= new_kind
            self._owed = False
            self._again.pop(kind, None)
            self._kinds.add(kind)
            self._shapes.add(shape)
        return due

    def adds_up(self, model: nn.Module) -> bool:
        """Return whether the samples' gradients of the last pass are to be added up and compared, though it is not due.
        To compare those of a device is to wait for it, which is for proofs alone."""
        often = self.passes % _COMPARED == 0 and all(parameter.is_cpu for parameter in model.parameters())
        return self.by_number or often

    def due_next(self) -> bool:
        """Return whether the next pass is to be proved by its number, as under a process group."""
        return self.passes + 1 >= self._next or self.passes + 1 in _EARLY

    def ask_again(self, kind: tuple[int, int]) -> None:
        """Note that the last proof has left something open, in a pass of so many dimensions and samples."""
        self._asked[kind] += 1
        self._again[kind] = self.passes + max(1, self._asked[kind] ** 2 // 4)

    def ask_soon(self, kind: tuple[int, int]) -> None:
        """Note that a pass of so many dimensions and samples has had what no proof has seen; does nothing where another
        proof is to come by what one has left open."""
        if self._again.get(kind, 0) <= self.passes:
            self.ask_again(kind)
