"""Ranks of a sharded model: whether all of them take part in a proof, and would run the same passes in it, since one
that ran its passes alone would wait for ever.

A metric may be on one rank only, or have stopped on one. Each rank announces a proof in the store before the forward
pass in question begins, and looks when it has ended. In between it has gathered parameters from all ranks that share
them, so every announcement is there, and all ranks see the same numbers. A rank that was once alone stays out: proofs
that the user asks for are its only ones. Other replicas of HSDP are counted too, though nothing is gathered from them,
and where they are late all are out: a model may speak to them itself (statistics over all samples), in the backward
pass as well, which cannot be told from gathering. One replica that ran such a pass alone would meet the others in the
midst of their training.

What the passes are follows from the graph, and that may follow from a rank's own batch: so before any is run all ranks
say which they would run. That is decided once: by the last that comes, or the first that would run others.
"""

from __future__ import annotations

import datetime
import hashlib
from contextlib import suppress
from typing import Any

from torch import nn

from lipcore.models.gathered import mesh_of
from lipcore.models.ranks import rank
from lipcore.models.torch_internals import default_store

_WITHDRAWN = -(1 << 20)
_PATIENCE = datetime.timedelta(seconds=60)  # for the end of a forward pass on the other ranks

#: Why nothing is measured of a model that was whole when it was looked at.
SHARDED_SINCE = (
    "model: its parameters were spread over ranks (fully_shard, parallelize_module) after lipcore has looked at it; "
    "call rebind(), or do that before"
)


class Ranks:
    """The ranks that a sharded model is on.

    Args:
        model: the sharded model.
        of: what is proved. Ranks of one kind know nothing of those of another.
    """

    def __init__(self, model: nn.Module, of: str = "proof") -> None:
        mesh = mesh_of(model)
        what = repr((mesh.mesh.flatten().tolist(), [name for name, _ in model.named_parameters()]))
        self._model = f"lipcore/{of}/{hashlib.sha1(what.encode(), usedforsecurity=False).hexdigest()}"
        self._size: int = mesh.size()
        self._store = default_store()
        # How many this rank has made before is in the store, which may outlive a process group and has their keys.
        made = self._store.add(f"{self._model}/made_by/{rank()}", 1) - 1
        self._key = f"{self._model}/{made}"
        # Of how many each rank has made, the sum and the sum of squares: they tell whether all have made as many.
        self._store.add(f"{self._model}/made", 1)
        self._store.add(f"{self._model}/made_sq", 2 * made + 1)
        self._announced: set[int] = set()
        self._out = False
        self._settled: set[str] = set()

    @property
    def is_out(self) -> bool:
        """True where this rank takes part in no more proofs but those that all ranks are asked for."""
        return self._out

    def announce(self, number: int) -> None:
        """Announce that this rank will prove the pass of this number, which has not begun."""
        if not self._out and number not in self._announced:
            try:
                self._store.add(f"{self._key}/{number}", 1)
                self._announced.add(number)
            except RuntimeError:  # the store is gone, and the rank that had it
                self._out = True

    def withdraw(self, after: int) -> None:
        """Take back this rank's announcements of passes after the one of this number, and take part in no more
        proofs."""
        self._out = True
        for number in {number for number in self._announced if number > after}:
            self._announced.remove(number)
            with suppress(RuntimeError):  # the store is gone, and nobody waits
                self._store.add(f"{self._key}/{number}", _WITHDRAWN)

    def agree(self, number: int) -> bool:
        """Return whether all ranks have announced the pass of this number, which has ended on this rank."""
        if number not in self._announced:
            return False
        self._announced.remove(number)
        with suppress(RuntimeError):  # the store is gone
            made, made_sq = (self._store.add(f"{self._model}/{what}", 0) for what in ("made", "made_sq"))
            if self._store.add(f"{self._key}/{number}", 0) == self._size and self._size * made_sq == made * made:
                return True
            self._store.add(f"{self._key}/{number}", _WITHDRAWN)
        self.withdraw(number)
        return False

    def skip(self, number: int) -> None:
        """Tell the other ranks that this one, which has announced the pass of this number, proves nothing in it."""
        if number in self._announced:
            self._announced.remove(number)
            self.miss(str(number))

    def settle(self, proof: str, passes: str) -> bool:
        """Return whether all ranks run the passes of a proof, the same on each of them; waits for the others.

        Args:
            proof: which one, the same on all ranks.
            passes: words for the passes that this rank would run; "" for none.
        """
        key, store = f"{self._key}/{proof}", self._store
        self._settled.add(proof)
        decision = f"{key}/decision"
        if not passes or _told(store.compare_set(f"{key}/passes", "", passes)) != passes:
            return self._decide(decision, "stay")
        if store.add(f"{key}/ready", 1) == self._size:
            return self._decide(decision, "go")
        try:
            store.wait([decision], _PATIENCE)
        except RuntimeError:  # a rank has not come
            return self._decide(decision, "stay")
        return bool(_told(store.get(decision)) == "go")

    def miss(self, proof: str) -> None:
        """Tell the other ranks that this one runs no passes of a proof, where it has not told them anything yet."""
        if proof not in self._settled:
            with suppress(RuntimeError):  # the store is gone, and nobody waits
                self.settle(proof, "")

    def _decide(self, key: str, decision: str) -> bool:
        """Return whether the proof goes on, which whoever comes first decides."""
        return bool(_told(self._store.compare_set(key, "", decision)) == "go")


def _told(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
