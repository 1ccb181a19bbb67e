"""One optimizer step's sums over its micro-batches, from which the gradient noise scale is estimated."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lipcore import _core, functional
from lipcore.per_sample.micro_batch import MicroBatch
from lipcore.per_sample.places import Places


class StepSums:
    """Per place (layers, then the total): sum of ||grad l_i||^2 over the step's samples, and ||mean of grad l_i||^2
    from the accumulated gradients."""

    def __init__(self, places: Places, parameters: Callable[[], Iterable[tuple[str, nn.Parameter]]]) -> None:
        self._places = places
        self._parameters = parameters
        self.skipped = 0  #: steps whose gradient is not the mean over its samples
        self.off = ""  #: why there are no estimates
        self._start()

    def _start(self) -> None:
        self._sum: Tensor | None = None
        self._samples = 0
        self._factor: float | Tensor | None = None
        self._unequal = False
        self._whole = True
        self._gradient_sq: Tensor | None = None

    def add(self, micro: MicroBatch) -> None:
        """Another micro-batch of the step."""
        sums = micro.squares.sum(1)
        if len(micro.layers) < len(self._places.layers):
            numbers = [self._places.number[layer] for layer in micro.layers]
            every = sums.new_zeros(len(self._places.layers) + 1)
            every[[*numbers, -1]] = sums
            sums = every
        self._sum = sums if self._sum is None else self._sum + sums
        self._samples += micro.samples
        # Tensors are not compared: that would synchronise. A scaler's scale is the same within a step.
        if not isinstance(micro.factor, Tensor) and not isinstance(self._factor, Tensor):
            self._unequal |= self._factor is not None and self._factor != micro.factor
        self._factor = micro.factor

    def read_gradients(self) -> None:
        """After a backward pass, before anything clips: the squared norm of what has accumulated so far, per place."""
        names, gradients = [], []
        for name, parameter in self._parameters():
            if parameter.grad is not None and name in self._places.layer_of:
                if _is_sharded(parameter.grad):
                    self.off = "gradients are sharded, and a rank knows the norm of its shard only"
                names.append(self._places.number[self._places.layer_of[name]])
                gradients.append(_dense(parameter.grad))
        if not gradients or self.off:
            return
        if gradients[0].is_cpu:
            rows = torch.empty(len(gradients), _core.STEP_COLUMNS, dtype=torch.float64)
            _core.square_sums(gradients, rows)
            squares = rows[:, 0]
        else:
            squares = torch.cat([functional.sample_norms(g.reshape(1, -1)) for g in gradients]).square()
        places = torch.zeros(len(self._places.layers) + 1, dtype=torch.float64, device=squares.device)
        places.index_add_(0, torch.tensor(names, device=squares.device), squares)
        places[-1] = squares.sum()
        self._gradient_sq = places

    def finish(self, observe: Callable[[Tensor, Tensor, int], None], ranks: int) -> None:
        """The step was made: (mean ||grad l_i||^2, ||mean grad l_i||^2, samples), and start the next."""
        if self._sum is not None and self._gradient_sq is not None and self._factor is not None and self._samples:
            if self._unequal:
                self.skipped += 1
            else:
                # All micro-batches have the factor f, so f * (accumulated gradient) is the sum over the samples.
                scale = self._factor / self._samples
                observe(self._sum / self._samples, self._gradient_sq * scale * scale, self._samples * ranks)
        self._start()

    def drop(self) -> None:
        """The step was skipped."""
        self._start()


def _is_sharded(gradient: Tensor) -> bool:
    return any(not placement.is_replicate() for placement in getattr(gradient, "placements", ()))


def _dense(gradient: Tensor) -> Tensor:
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    local = getattr(gradient, "to_local", None)
    gradient = gradient.detach() if local is None else local().detach()
    return gradient if torch.ops.aten.is_non_overlapping_and_dense(gradient) else gradient.contiguous()
