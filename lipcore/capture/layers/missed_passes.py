"""Forward passes that are not recorded, as their step is not or recording has stopped: how many samples they have."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lipcore.capture.layers.batch_of import batch_tensor
from lipcore.capture.layers.options import LayerOptions
from lipcore.capture.proof import is_proof
from lipcore.capture.training_pass import in_backward
from lipcore.models.outputs import on_backward


class MissedPasses:
    """The passes of one model that are not recorded, so that NaN comes in their length.

    Args:
        options: how the layers are tapped.
        on_unrecorded: gets the number of samples and the reason when a backward pass comes after recording has stopped.

    Attributes:
        samples: of the last one; None where that cannot be told.
    """

    def __init__(self, options: LayerOptions, on_unrecorded: Callable[[int, str], None]) -> None:
        self._options, self._on_unrecorded = options, on_unrecorded
        self.samples: int | None = None
        self._came = -1  # the last backward pass that was told of

    def begin(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Note a forward pass with these arguments."""
        try:
            if self._options.offsets_of is not None:
                self.samples = self._options.offsets_of(arguments, keywords).numel() - 1
                return
            first = batch_tensor(arguments, keywords, self._options.batch_dim)
            self.samples = None if first is None else first.shape[self._options.batch_dim]
        except Exception:  # of the user's function, or for what no pass could be recorded of
            self.samples = None

    def end(self, output: Any, reason: str) -> None:
        """Have the backward pass through what the model has returned told of, with this reason."""
        if self.samples is not None:
            on_backward(output, functools.partial(self._comes_back, self.samples, reason))

    def _comes_back(self, samples: int, reason: str, gradients: Any) -> None:
        task = in_backward()
        if task != self._came and not is_proof():
            self._came = task
            self._on_unrecorded(samples, reason)
