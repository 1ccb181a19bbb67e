"""What a model gets in the place of its input while the gradient there is taken."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lipcore.capture.identity import Alias
from lipcore.capture.own_nodes import counted, note_begun
from lipcore.models.outputs import gradient_node


@counted
def alias_of(x: Tensor, anchor: Tensor) -> Tensor:
    """Return an alias of x, with the attributes that the user has put on x."""
    if not x.requires_grad:
        note_begun()
    alias: Tensor = Alias.apply(x, anchor)  # type: ignore[no-untyped-call]
    alias.__dict__.update(x.__dict__)
    return alias


class Source:
    """The tensor that a pass is differentiated by, and whether a layer was given that very tensor.

    Attributes:
        places: in how many places of the model's arguments it stands.
    """

    __slots__ = ("_tensor", "_version", "places")

    def __init__(self, tensor: Tensor, places: int = 1) -> None:
        self.places = places
        self._tensor = tensor
        self._version = tensor._version

    def holds(self, other: Any) -> bool:
        """Return whether another tensor is this one, or a reshaped view of it with the samples first, and this one is
        as it was at the beginning of the pass."""
        mine = self._tensor
        if mine._version != self._version:
            return False
        return other is mine or (
            isinstance(other, Tensor)
            and other.dtype == mine.dtype
            and other.numel() == mine.numel()
            and other.shape[:1] == mine.shape[:1]
            and other.is_contiguous()
            and mine.is_contiguous()
            and other.data_ptr() == mine.data_ptr()
        )

    @property
    def node(self) -> Any:
        """The node of a graph that the gradient at the tensor comes to; None where it requires none."""
        return gradient_node(self._tensor)

    @property
    def changed(self) -> bool:
        """True where the model worked on the tensor in place."""
        return self._tensor._version != self._version
