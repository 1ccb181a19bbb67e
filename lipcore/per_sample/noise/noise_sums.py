"""One optimizer step's sums over its micro-batches, from which the gradient noise scale is estimated."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lipcore import _core
from lipcore.capture.layers.layer_pass import LayerRecord
from lipcore.capture.parameters import GradientWatch
from lipcore.distributed.gradient_parts import gradient_part, why_not_known
from lipcore.models.ranks import under_process_group
from lipcore.models.reduction import Reduction
from lipcore.models.torch_internals import hooks_after_accumulation
from lipcore.per_sample.layer_index import LayerIndex
from lipcore.per_sample.loss_factor import LossFactor
from lipcore.per_sample.noise.rank_steps import StepSums
from lipcore.per_sample.pass_norms import PassNorms

UNEQUAL = "the loss divides a sample's terms by another number from micro-batch to micro-batch"
TWICE = "two backward passes came from one forward pass, so that its samples are in the gradient twice"
HOOKED = (
    "parameters have hooks, which may have changed the gradient before it was accumulated; remove them (another "
    "tool's: wandb.unwatch()), or pass noise_scale=False"
)
CHANGED = (
    "gradients were changed between two of its backward passes (zeroed in place, scaled, clipped, replaced), so that "
    "they are not what its samples add up to; zero_grad(set_to_none=True) where the earlier ones are to be forgotten"
)
NOT_FOUND = (
    "its gradients were not found at the end of a backward pass: parameters were replaced by others (call "
    "Monitor.rebind()), something took the gradients away in that pass, or all layers are inside reentrant checkpoints "
    "(pass use_reentrant=False)"
)
NOT_EMPTY = (
    "gradients were there already when its first backward pass began, so that they are not what its samples add up to; "
    "call zero_grad() before every step"
)
UNREDUCED = (
    "fully_shard() had not reduced all of its gradients yet when the optimizer made it "
    "(set_requires_gradient_sync(False) or set_requires_all_reduce(False) in the last backward pass), so that they "
    "enter the next step; set these to True before a step's last backward pass"
)
SHARDED = (
    "gradients are sharded, and a rank knows the norm of its shard only; monitor.global_window() has the noise scale "
    "of all ranks"
)
NO_SAMPLES = (
    "the gradient is longer than the mean of its samples' gradients can be, so it has parts that are no sample's "
    "(a penalty in the loss), or the loss reduction is not what was declared"
)
#: A gradient, and its version when it was seen.
_Seen = tuple[weakref.ref[Tensor], int]
JENSEN = 1 + 1 / 64  # a few units in the last place of bfloat16, in which gradients may have been computed


class NoiseSums:
    """Sums of one optimizer step per place (layers, then the total): of ||grad l_i||^2 over the step's samples, and
    ||mean of grad l_i||^2 from the accumulated gradients.

    The step enters as NaN, and is counted with the reason, where the gradient is not the mean over its samples.

    Args:
        layer_index: the place of each layer.
        measured: returns the parameters.
        reduction: what reduces their gradients over ranks.
    """

    def __init__(
        self,
        layer_index: LayerIndex,
        measured: Callable[[], Mapping[str, nn.Parameter]],
        reduction: Reduction | None = None,
    ) -> None:
        self._layer_index = layer_index
        self._measured = measured  # as a pass may find parameters that cannot be, whose samples are in no sum
        self._reduction = reduction or Reduction(None)
        self.off = ""  #: why there are no estimates
        self.names = list(layer_index.layer_of)  #: of the parameters
        self._place = {name: i for i, name in enumerate(self.names)}
        self._versions: dict[str, _Seen] = {}  # of the gradients when they were read last
        self.reset()
        self._start()

    def reset(self) -> None:
        """Start counting skipped steps anew."""
        self._skipped: dict[str, int] = {}
        self._on_device: dict[str, Tensor] = {}  # of the reasons that only the device knows

    def _start(self) -> None:
        self._forget_samples()
        self._hooked = False
        self._stray = ""
        self._gradient_sq: Tensor | None = None
        self._found: tuple[list[int], Tensor] | None = None  # parameters, and the squared norms of their gradients
        self._left, self._versions = self._versions, {}
        self._changed = False  # whether something else than a backward pass has changed them since

    def _forget_samples(self) -> None:
        self._task = -1  # the last backward pass
        self._sum: Tensor | None = None
        self._samples = 0
        self._factor: LossFactor | None = None
        self._same: Tensor | None = None  # whether all micro-batches have one factor, where only the device knows
        self._wrong = ""  # why the gradient is not the mean over the samples

    @property
    def hooked(self) -> bool:
        """True where steps were left out because parameters have hooks."""
        return HOOKED in self._skipped

    def count_skipped(self, steps: Mapping[str, int]) -> None:
        """Count steps that were left out, by reason."""
        for reason, count in steps.items():
            self._skipped[reason] = self._skipped.get(reason, 0) + count

    def skipped(self) -> dict[str, int]:
        """Return how many steps were left out, by reason. Waits for the device."""
        found = dict(self._skipped)
        for reason, count in self._on_device.items():
            if steps := int(count):
                found[reason] = found.get(reason, 0) + steps
        return found

    def add(self, norms: PassNorms) -> None:
        """Add another micro-batch of the step."""
        record, factor = norms.record, norms.factor
        if record.fresh and record.task != self._task:
            self._forget_samples()  # gradients were zeroed in mid-step (a closure, two passes a step)
        elif record.repeated:
            self._wrong = TWICE
        if not self._samples and record.began_with:
            self._wrong = self._wrong or NOT_EMPTY
        self._task = record.task
        sums = norms.added.sum(1)
        if len(norms.layers) < len(self._layer_index.layers):  # a layer that was not reached has no gradient: 0
            found = dict(zip(norms.layers, sums[:-1].unbind(), strict=True))
            nothing = torch.zeros_like(sums[-1])
            sums = torch.stack([*(found.get(layer, nothing) for layer in self._layer_index.layers), sums[-1]])
        self._sum = sums if self._sum is None else self._sum + sums
        self._samples += norms.samples
        if self._factor is None:
            self._factor = factor
        elif self._factor.differs(factor):
            self._wrong = self._wrong or UNEQUAL
        elif (same := self._factor.equals(factor)) is not None:
            self._same = same if self._same is None else self._same & same

    def expect(self, record: LayerRecord) -> None:
        """Expect the gradients of this pass to be read next: it is ending."""
        if record.fresh:  # it had none to add to
            self._versions, self._changed = {}, False

    def spoil(self, reason: str) -> None:
        """Give up this step for a reason: its gradients are not those of its samples alone."""
        self._stray = reason

    def read_gradients(self) -> None:
        """Read, after a backward pass and before anything clips, the squared norm of what has accumulated so far, per
        place."""
        which, index, gradients, versions = [], [], [], {}
        # DDP writes what it has reduced over the ranks, which is a change too.
        alone = not under_process_group()
        self._hooked = False
        if why := self._reduction.own_rule():  # which may have been given since the first step
            self.spoil(why)
        for name, parameter in self._measured().items():  # one that was frozen may still have a gradient of before
            if parameter.grad is not None and name in self._layer_index.layer_of:
                part = gradient_part(parameter, parameter.grad)
                if part is None:
                    self.spoil(why_not_known(name, parameter, parameter.grad, hooks=False))
                    continue
                if _is_sharded(parameter):
                    self.off = SHARDED
                self._hooked |= _is_hooked(parameter)
                which.append(self._place[name])
                index.append(self._layer_index.number[self._layer_index.layer_of[name]])
                gradients.append(_dense(part))
                if alone and _has_own_version(parameter.grad):
                    versions[name] = weakref.ref(parameter.grad), parameter.grad._version
        self._changed |= any(not _is_added_to(before, versions.get(name)) for name, before in self._versions.items())
        left, self._left = self._left, {}
        if left and all(_is_added_to(before, versions.get(name)) for name, before in left.items()):
            self._wrong = self._wrong or NOT_EMPTY
        self._versions = versions
        if not gradients:
            return
        rows = torch.empty(len(gradients), _core.STEP_COLUMNS, dtype=torch.float64, device=gradients[0].device)
        _core.square_sums(gradients, rows)
        squares = rows[:, 0]
        self._found = which, squares
        places = self._layer_index.sums(squares, index, len(self._layer_index.layers) + 1)
        places[-1] = squares.sum()
        self._gradient_sq = places

    def step_sums(self) -> StepSums:
        """Return what this rank knows of a step that was made, for the noise scale of all ranks."""
        gradient = None
        if self._found is not None:
            which, squares = self._found
            gradient = squares.new_zeros(len(self.names), dtype=torch.float64)
            gradient[self._layer_index.on(squares.device, which)] = squares.double()
        weight: float | Tensor = 1.0
        if self._factor is not None and self._samples:
            value = self._factor.value
            weight = 1 / value if isinstance(value, Tensor) or value else 0.0
        wrong = self._reason(changed=False)
        return StepSums(self._sum, self._samples, weight, gradient, self._same, wrong)

    def finish(self, observe: Callable[[Tensor, Tensor, int], None], ranks: int) -> None:
        """Hand a step that was made to `observe`, (mean ||grad l_i||^2, ||mean grad l_i||^2, samples), and start the
        next."""
        if self._sum is not None and self._factor is not None and self._samples and not self.off:
            # All micro-batches have the factor f, so f * (accumulated gradient) is the sum over the samples.
            scale = self._factor.value / self._samples
            mean = self._sum / self._samples
            found = torch.full_like(mean, torch.nan) if self._gradient_sq is None else self._gradient_sq
            batch = self._checked(mean, found * (scale * scale), alone=ranks == 1)
            observe(mean, batch, self._samples * ranks)
        self._start()

    def _checked(self, mean: Tensor, batch: Tensor, alone: bool) -> Tensor:
        """Return the squared norm of the mean gradient; NaN where it is not that."""
        if wrong := self._reason(self._changed):
            self._skipped[wrong] = self._skipped.get(wrong, 0) + 1
            return torch.full_like(batch, torch.nan)
        if self._same is not None:
            self._count(UNEQUAL, ~self._same)
            batch = torch.where(self._same, batch, torch.nan)
        if not alone:  # the gradient is that of all ranks' samples, the norms are of this rank's
            return batch
        impossible = batch > mean * JENSEN  # by Jensen's inequality: the mean's square, the mean of the squares
        if impossible.is_cpu and not bool(impossible.any()):
            return batch  # as nearly always; another device is not waited for
        impossible[-1] = impossible.any()
        self._count(NO_SAMPLES, impossible[-1])
        return batch.masked_fill(impossible, torch.nan)

    def _reason(self, changed: bool) -> str:
        """Return why the gradient is not the mean over the samples, as far as the host knows; "" where it is."""
        if self._reduction.unreduced(lambda: self._measured().values()):
            return UNREDUCED
        if self._gradient_sq is None:
            return self._stray or NOT_FOUND
        return self._wrong or self._stray or (HOOKED if self._hooked else CHANGED if changed else "")

    def _count(self, reason: str, skipped: Tensor) -> None:
        count = self._on_device.get(reason)
        self._on_device[reason] = skipped.long() if count is None else count + skipped

    def drop(self) -> None:
        """Drop the open step, which was skipped."""
        self._start()


def _is_hooked(parameter: nn.Parameter) -> bool:
    return bool(parameter._backward_hooks) or not all(
        GradientWatch.is_ours(hook) for hook in hooks_after_accumulation(parameter)
    )


def _has_own_version(gradient: Tensor) -> bool:
    """Return whether a gradient's version counts its changes: views of one buffer count them together, a sparse one's
    two tensors apart."""
    return type(gradient) is Tensor and gradient.layout == torch.strided and not gradient._is_view()


def _is_added_to(before: _Seen, now: _Seen | None) -> bool:
    """Return whether a backward pass at most has changed a gradient: it adds in place, once."""
    same = now is not None and now[0]() is before[0]() is not None
    return same and now is not None and now[1] - before[1] <= 1


def _is_sharded(parameter: Any) -> bool:
    placements = getattr(parameter, "placements", ())
    return any(not each.is_replicate() and parameter.device_mesh.size(i) > 1 for i, each in enumerate(placements))


def _dense(gradient: Tensor) -> Tensor:
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    gradient = gradient.detach()
    return gradient if torch.ops.aten.is_non_overlapping_and_dense(gradient) else gradient.contiguous()
