"""What a user says of the samples of a batch: their ids and their losses."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lipcore.functional.dtypes import INTEGERS


def checked_ids(ids: Any) -> Tensor:
    """Return a copy of sample ids, integers [B]: a loader may fill its buffer anew before the step.

    Raises:
        ValueError: these are none.
    """
    given = ids if isinstance(ids, Tensor) else np.asarray(ids)
    found = given if isinstance(given, Tensor) else torch.from_numpy(given) if given.dtype.kind in "iu" else None
    if found is None or found.dim() != 1 or found.dtype not in INTEGERS:
        what = list(given.shape)
        raise ValueError(f"ids: expected integers of shape [B], got {given.dtype} of shape {what}")
    return found.clone()


def checked_losses(losses: Any, ids: Tensor) -> Tensor:
    """Return a copy of the losses of samples with these ids, without their graph.

    Raises:
        ValueError: these are none, or not as many.
    """
    if not isinstance(losses, Tensor) or losses.dim() != 1 or not losses.is_floating_point():
        what = f"{losses.dtype} of shape {list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"losses: expected a floating-point tensor of shape [B], one per sample, got {what}; pass what a loss with "
            'reduction="none" returns, summed over each sample\'s terms'
        )
    if len(losses) != len(ids):
        raise ValueError(f"losses: expected one per id, got {len(losses)} losses for {len(ids)} ids")
    return losses.detach().clone()


class NamedSamples:
    """The ids and the losses that were set for the next backward pass.

    Attributes:
        ever: ids have been set, at some time.
    """

    def __init__(self) -> None:
        self.ever = False
        self._ids: Tensor | None = None
        self._losses: Tensor | None = None

    def set_ids(self, ids: Any) -> bool:
        """Set the ids, and no losses; return whether these are the first ones ever."""
        self._ids, self._losses = checked_ids(ids), None
        first, self.ever = not self.ever, True
        return first

    def set_losses(self, losses: Any) -> None:
        """Set the losses of the samples whose ids were set."""
        if self._ids is None:
            raise ValueError(
                "losses: there are no ids to keep them by; call set_ids(ids) before, in the same micro-batch"
            )
        self._losses = checked_losses(losses, self._ids)

    def take(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the ids and the losses, and forget them."""
        ids, losses, self._ids, self._losses = self._ids, self._losses, None, None
        return ids, losses
