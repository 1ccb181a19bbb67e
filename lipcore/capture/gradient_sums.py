"""Sums of single samples' gradients, beside the gradients that come to the parameters in the same backward pass.

What is measured of the samples of a batch adds up to the gradient that autograd brings to the parameter, unless
something else reaches it: a penalty, a use of the parameter in the loss itself, a hook that changes gradients on their
way. The two sums are compared by a few random projections, so that neither has to be kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lipcore.capture.proof import is_proof
from lipcore.capture.training_pass import in_backward
from lipcore.layers import Factor
from lipcore.layers.projections import projected
from lipcore.models.outputs import gradient_node

DIFFER = (
    "the gradient that came to parameter '{0}' is not the sum of the samples' gradients (they differ by {1:.2g} times "
    "its norm): the loss has a penalty on the parameter or uses it outside the model's forward pass, or a hook changes "
    "its gradient; the norms are without that. Use the optimizer's weight_decay for penalties, and do the rest in "
    "forward()"
)
NOTHING = (
    "no gradient came to parameter '{0}', and its layer was called with another tensor in its place (functional_call, "
    "a frozen or detached one), whose gradients are in the norms; call it so in the first pass too, and they are not"
)
# What may differ by rounding: of the gradient and of the samples' gradients, and of the largest of all parameters',
# where the terms of a gradient cancel but for rounding (a bias that softmax or a batch norm takes away again).
_EXACT, _EXACT_NOISE = 1e-3, 1e-5
_ROUGH, _ROUGH_NOISE = 0.1, 0.03  # where gradients are of half precision on their way


class GradientSums:
    """The two sums for the parameters of one pass.

    Args:
        parameters: those that are measured, by name.
        on_error: gets what would have been raised in the backward pass.

    Attributes:
        rough: a gradient was of half precision on its way.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], on_error: Callable[[Exception], None]) -> None:
        self._handles: list[Any] = []
        self.rough = _rounds_products()
        self._on_error = on_error
        self._task = -1
        self._samples: dict[str, Tensor] = {}
        self._came: dict[str, Tensor] = {}
        self._watched: set[str] = set()
        for name, parameter in parameters.items():
            if parameter.is_leaf and parameter.requires_grad:
                # Of the node and not of the tensor, whose hooks belong to others and run before.
                self._watched.add(name)
                accumulates = gradient_node(parameter)
                self._handles.append((accumulates, accumulates.register_prehook(_Hook(self, name))))

    def begin(self, task: int) -> None:
        """Forget what an earlier backward pass has brought."""
        if self._task != task:
            self._task, self._samples, self._came = task, {}, {}

    def look_at(self, gradients: Iterable[Tensor | None]) -> None:
        """Note where gradients on their way to the parameters are of half precision."""
        self.rough |= any(each is not None and each.dtype in (torch.float16, torch.bfloat16) for each in gradients)

    def add_factors(self, factors: Mapping[str, Factor]) -> None:
        """Take in per-sample gradients that a backward pass has brought."""
        for name, factor in factors.items():
            self.look_at(factor.tensors())
            if factor.samples:
                with torch.autocast(next(factor.tensors()).device.type, enabled=False):
                    _add(self._samples, name, factor.projected_sum())

    def add(self, name: str, total: Tensor) -> None:
        """Take in a sum of samples' gradients."""
        _add(self._samples, name, projected(total))

    def _at_parameter(self, name: str, gradient: Tensor | None) -> None:
        # What comes in another backward pass (another thread's) is of another forward pass.
        if gradient is None or in_backward() != self._task or is_proof():
            return
        try:
            self.look_at([gradient])
            _add(self._came, name, projected(gradient))
        except Exception as error:
            self._on_error(error)

    def difference(self, task: int, norms_sq: Mapping[str, Tensor], names: Container[str]) -> str | None:
        """Return which parameter's gradient differs, with the ways out, "" where none does; None where nothing can be
        said.

        Args:
            task: the backward pass.
            norms_sq: the samples' squared norms by parameter, where they are at hand.
            names: of the parameters to be compared.
        """
        came = {name: each for name, each in self._came.items() if name in names}
        if came:  # in the same pass others get nothing: a layer that was called with another tensor in its place
            none = (name for name in self._samples if name in names and name in self._watched and name not in came)
            came |= {name: torch.zeros_like(self._samples[name]) for name in none}
        if task != self._task or not came or not self._samples:
            return None
        over, share = self._compared(came, norms_sq)
        if bool(over.isnan().any()):
            return None
        worst = int(over.argmax())
        if not bool(over[worst] > 1):
            return ""
        name = list(came)[worst]
        return DIFFER.format(name, float(share[worst])) if name in self._came else NOTHING.format(name)

    def different(self, gradients: Mapping[str, Tensor]) -> list[str]:
        """Return which of these gradients are others than what the samples' gradients have added up to."""
        if not gradients:
            return []
        self.look_at(gradients.values())
        over, _ = self._compared({name: projected(gradient) for name, gradient in gradients.items()}, {})
        return [name for name, beyond in zip(gradients, over > 1, strict=True) if bool(beyond)]

    def _compared(self, came: Mapping[str, Tensor], norms_sq: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return by how much each gradient differs, over what rounding explains, and over its norm; NaN where a number
        is not finite."""
        found = torch.stack([self._samples.get(name, torch.zeros_like(each)) for name, each in came.items()]).cpu()
        there = torch.stack(list(came.values())).cpu()
        sizes = {name: row.clamp_min(0).sqrt().sum() for name, row in norms_sq.items() if name in came}
        size = torch.stack([sizes.get(name, each.new_zeros(())).cpu() for name, each in came.items()])
        norm = there.square().mean(1).sqrt()
        scale = norm + size
        share, noise = (_ROUGH, _ROUGH_NOISE) if self.rough else (_EXACT, _EXACT_NOISE)
        by = (there - found).square().mean(1).sqrt()
        over = by / (share * scale + noise * scale.max()).clamp_min(torch.finfo(torch.float64).tiny)
        finite = there.isfinite().all(1) & found.isfinite().all(1) & size.isfinite()
        return over.where(finite, torch.nan), by / norm.clamp_min(1e-300)

    def remove(self) -> None:
        """Take the hooks off, and let go of the nodes."""
        for _, handle in self._handles:
            handle.remove()
        self._handles = []

    def __del__(self) -> None:
        self.remove()  # a pass that has no backward pass


class _Hook:
    """The hook at one parameter; others (DistributedDataParallel) may keep its node for ever."""

    def __init__(self, sums: GradientSums, name: str) -> None:
        self._sums, self._name = weakref.ref(sums), name

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        sums = self._sums()
        if sums is not None:
            with torch.no_grad():
                sums._at_parameter(self._name, gradients[0])


def _add(sums: dict[str, Tensor], name: str, found: Tensor) -> None:
    sums[name] = sums[name] + found if name in sums else found


def _rounds_products() -> bool:
    """Return whether torch may make matrix products of float32 numbers from fewer of their digits (TF32, bfloat16)."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # the newer switches were used, one for each backend, which that does not sum up
        backends = torch.backends
        of_mkldnn = getattr(backends.mkldnn, "matmul", None)
        switches = (backends, backends.cuda, backends.cuda.matmul, backends.mkldnn, of_mkldnn)
        return any(getattr(switch, "fp32_precision", "ieee") not in ("ieee", "none") for switch in switches)
