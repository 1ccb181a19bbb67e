"""What one rank adds to the numbers of all: a metric's part of a window, and the parameters that it is about."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from torch import nn

from lipcore.distributed.agreed import words_of
from lipcore.distributed.contribution import Sizes
from lipcore.distributed.ownership import Description, Ownership, describe
from lipcore.distributed.packed import Packed, Together
from lipcore.distributed.partial_sums import Partial
from lipcore.metric.results import MetricResult
from lipcore.models.gathered import in_parts

#: Why a metric without parts is not in a global window.
NOT_MERGED = "its numbers are not merged over ranks; each rank's own are in pop_window() and history"
FSDP1_PIECES = (
    "the parameters of FullyShardedDataParallel (FSDP1) are pieces of flat tensors that do not say where they belong, "
    "so their numbers cannot be merged over ranks; use torch.distributed.fsdp.fully_shard()"
)


class Holding:
    """The parameters that this rank watches, or parts of them, and who counts what, once the ranks have found it.

    Args:
        parameters: returns (name, group, tensor) of each.
        refused: why they cannot be merged; "" where they can.
        kept: names of those that this rank could count; None: of all.
        model: where they stand.
    """

    def __init__(
        self,
        parameters: Callable[[], Iterable[tuple[str, str, Any]]],
        refused: str = "",
        kept: Collection[str] | None = None,
        model: Any = None,
    ) -> None:
        self._parameters, self._refused, self._kept, self._model = parameters, refused, kept, model
        self._found: dict[tuple[int, ...], Ownership] = {}  # by the ranks of a group
        self._ranks: tuple[int, ...] = ()

    def settle(self) -> None:
        """Stay with the parameters of now, before the metric turns to others: windows of these may wait."""
        found = list(self._parameters())
        self._parameters = lambda: found

    def turn_to(self, ranks: tuple[int, ...]) -> None:
        """Say who counts what among the ranks of this group from now on."""
        self._ranks = ranks

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of the group."""
        return self._ranks

    @property
    def ownership(self) -> Ownership | None:
        """Owners of all parts among the ranks of the group; None where these have not found them yet."""
        return self._found.get(self._ranks)

    @ownership.setter
    def ownership(self, found: Ownership) -> None:
        self._found[self._ranks] = found

    def held(self) -> list[tuple[str, str, Any]]:
        """Return (name, group, tensor) of each, with what this rank holds of it between two steps."""
        held = self._parameters()
        return in_parts(self._model, held) if isinstance(self._model, nn.Module) else list(held)

    def described(self) -> Description:
        """Return what this rank holds; or why that cannot be said. Waits for the device."""
        try:
            return {"refused": self._refused} if self._refused else describe(self.held(), self._kept, self._ranks)
        except Exception as error:  # the other ranks wait for a word of this one
            return {"refused": words_of(error)}


class RankPart(ABC):
    """A metric's numbers of one window on one rank, for the numbers of all.

    Attributes:
        agreed: what has to be the same on all ranks, JSON-ready.
        holding: the parameters that it is about; None where it is about none.
        withdrawn: why its numbers have turned out to be wrong since the window closed; "" where they have not.
    """

    agreed: dict[str, Any]
    holding: Holding | None
    withdrawn: str = ""

    def turn_to(self, ranks: tuple[int, ...]) -> None:
        """Speak of the ranks of this group from now on."""
        if self.holding is not None:
            self.holding.turn_to(ranks)

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that it keeps, about."""

    def refused(self) -> str:
        """Return why what the ranks hold cannot be merged for this metric, from the ownership and from what they have
        told, if they have, alone; "" where it can. The same on all ranks."""
        return ""

    @abstractmethod
    def sizes(self) -> Sizes:
        """Return how many numbers :meth:`packed` and :meth:`partials` have, from `agreed`, the ownership and what the
        ranks have told alone: a rank that cannot make its numbers has to know it too."""

    @abstractmethod
    def packed(self) -> Packed:
        """Return what this rank adds, as many numbers as :meth:`sizes` says."""

    @abstractmethod
    def result(self, together: Together) -> MetricResult | None:
        """Return the metric's numbers, from the parts of all ranks together; None, on all of them, for nothing."""

    @property
    def told(self) -> dict[str, Any]:
        """Words for the other ranks beside `agreed`, JSON-ready; most often the same on all ranks, which read each
        other's only where they differ."""
        return {}

    def hear(self, told: Sequence[dict[str, Any]]) -> None:  # noqa: B027
        """Take what the ranks have told, in their order, this one included; called before packed()."""

    def partials(self) -> Sequence[Partial]:
        """Return what the ranks that hold parts of this one's samples' gradients are to add up before packed() is
        called; the same shapes on each of them."""
        return ()

    def withdraw(self, why: str, names: Collection[str] | None = None) -> None:
        """Give up the numbers of this window, where they have not been merged yet."""
        self.withdrawn = why
