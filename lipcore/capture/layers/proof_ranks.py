"""Ranks of a sharded model: whether all of them take part in a proof, since one that ran its passes alone would wait
for ever.

A metric may be on one rank only, or have stopped on one. Each rank announces a proof in the store before the forward
pass in question begins, and looks when it has ended. In between it has gathered parameters from all ranks, so every
announcement is there, and all ranks see the same numbers. A rank that was once alone stays out.
"""

from __future__ import annotations

import hashlib
from collections import Counter

from torch import nn

from lipcore.models.torch_internals import default_store

_made: Counter[str] = Counter()  # on this rank, per model
_WITHDRAWN = -(1 << 20)


class Ranks:
    """The ranks that a sharded model is on.

    Args:
        model: the sharded model, with DTensors as parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        mesh = next(p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh"))
        what = repr((mesh.mesh.flatten().tolist(), [name for name, _ in model.named_parameters()]))
        self._model = f"lipcore/proof/{hashlib.sha1(what.encode(), usedforsecurity=False).hexdigest()}"
        self._key = f"{self._model}/{_made[self._model]}"
        self._size: int = mesh.size()
        self._store = default_store()
        # Of how many each rank has made, the sum and the sum of squares: they tell whether all have made as many.
        self._store.add(f"{self._model}/made", 1)
        self._store.add(f"{self._model}/made_sq", 2 * _made[self._model] + 1)
        _made[self._model] += 1
        self._announced: set[int] = set()
        self._out = False

    def announce(self, number: int) -> None:
        """Announce that this rank will prove the pass of this number, which has not begun."""
        if not self._out:
            self._store.add(f"{self._key}/{number}", 1)
            self._announced.add(number)

    def withdraw(self, after: int) -> None:
        """Take back this rank's announcements of passes after the one of this number, and take part in no more
        proofs."""
        self._out = True
        for number in {number for number in self._announced if number > after}:
            self._announced.remove(number)
            self._store.add(f"{self._key}/{number}", _WITHDRAWN)

    def agree(self, number: int) -> bool:
        """Return whether all ranks have announced the pass of this number, which has ended on this rank."""
        if number not in self._announced:
            return False
        self._announced.remove(number)
        made, made_sq = (self._store.add(f"{self._model}/{what}", 0) for what in ("made", "made_sq"))
        if self._store.add(f"{self._key}/{number}", 0) == self._size and self._size * made_sq == made * made:
            return True
        self._store.add(f"{self._key}/{number}", _WITHDRAWN)
        self.withdraw(number)
        return False
