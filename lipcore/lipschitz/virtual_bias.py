r"""The path of a bias that the first layer does not have: what Corollaries 2 and 3 speak of, for models without one.

The gradient of a bias at the first layer's output u is :math:`\partial L/\partial b_1 = \sum_{i,p} \partial L/\partial
u_{i,p}`, over samples and positions, whether the layer has one or not. It is accumulated into a leaf of that shape as
autograd accumulates any parameter's, and the leaf takes the steps that plain SGD would make of it. The forward pass
does not see them: the bias stays 0 in the model. (Loukas, Poiitis, Jegelka, NeurIPS 2021, call it virtual.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lipcore.lipschitz.bias_steps import BiasSteps
from lipcore.metric.results import MetricResult, Value
from lipcore.models.names import with_prefix
from lipcore.models.ranks import world_size
from lipcore.models.torch_internals import is_compiled
from lipcore.trajectory.building import Stat
from lipcore.trajectory.metric import Trajectory

#: Quantities of the path, and the first part of their names in the result of Lipschitz.
QUANTITIES: tuple[Stat, ...] = ("update_norm", "path_length", "distance", "directness", "variance")
PREFIX = "virtual_bias_"

_NOTE = "virtual: '{0}' has no bias; the path of one whose updates the forward pass does not see, by plain SGD"
_CHANGED = (
    "the gradient of '{0}' was changed between the backward pass and the step (clipped?), which a bias that is not "
    "there does not share"
)
_OTHER_STEP = (
    "'{0}' did not move by lr times its gradient (a closure, a wrapper around the optimizer, averaged weights?)"
)
_ROUNDING = 8.0  # units in the last place by which two ways of taking an SGD step differ


class VirtualBias:
    """The virtual bias of one first layer.

    Args:
        steps: of the optimizer that holds the layer's weight.
        on_off: called with the reason when its path cannot be followed, or not any more.
    """

    def __init__(self, steps: BiasSteps, on_off: Callable[[str], None]) -> None:
        self._steps, self._on_off = steps, on_off
        self._compiled = self._scaled = False
        self._blocks = 1
        self.start()

    def prepare(self, scaler: Any, window_blocks: int) -> None:
        """Take the GradScaler and how many blocks a window has."""
        self._scaled = scaler is not None and scaler.is_enabled()
        self._blocks = window_blocks

    def bind(self, model: nn.Module) -> None:
        """Turn to a model whose first layer is yet to be found."""
        self._compiled = any(is_compiled(module) for module in model.modules())
        self.start()

    def start(self) -> None:
        """Begin anew, without a layer."""
        self.off = ""  #: why the path cannot be followed
        self.place = ""  #: the name that the bias would have
        self._name = ""
        self._layer: nn.Module | None = None
        self._leaf: Tensor | None = None
        self._path: Trajectory | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._norm: Tensor | None = None  # of the weight's gradient when the last backward pass had ended
        self._before: Tensor | None = None  # the weight, and its update, of the step under way
        self._update: Tensor | None = None
        self._doubts: dict[str, Tensor] = {}  # by reason, whether it is true; on the weight's device

    # ---- in the user's passes

    def found(self, name: str, layer: nn.Module) -> None:
        """Take the first layer, once it is known."""
        if layer is self._layer:
            return
        self._name, self._layer = name, layer
        # An embedding has no bias that could be followed: what says so is at the layer itself.
        self.place = (name or "model") if isinstance(layer, nn.Embedding) else with_prefix(name, "bias")
        self._refuse(self._refusal())

    def _refusal(self) -> str:
        layer = self._layer
        if isinstance(layer, nn.Embedding) or layer is None:
            return f"the first layer is a {type(layer).__name__}, whose output no bias is added to"
        bias = layer._parameters.get("bias")
        if bias is not None:
            return f"'{self._name}' has a bias of its own: Trajectory() follows '{self.place}'"
        if self._compiled:
            return "the model is compiled, and no leaf gets a gradient inside; watch the model as it is in eager mode"
        if self._scaled:
            return "a GradScaler scales the gradients; train without it"
        if world_size() > 1:
            return "gradients are averaged over several ranks, and this one is not; train on one"
        return ""

    def _refuse(self, reason: str) -> None:
        if reason and not self.off:
            self.off = reason
            self._leaf = self._before = self._update = None
            self._on_off(reason)

    def leaf(self, output: Tensor) -> Tensor | None:
        """Return the leaf that is to get the sum of the gradient at the layer's output."""
        if self.off or self._layer is None:
            return None
        if self._leaf is None:
            self._make(output)
        elif self._leaf.device != output.device:
            self._refuse("the model has moved to another device; call rebind()")
        return self._leaf

    def _make(self, output: Tensor) -> None:
        weight = self._weight()
        if weight is None:
            self._refuse(f"'{self._name}' has no weight that an optimizer could step")
            return
        linear = isinstance(self._layer, nn.Linear)
        channels = output.shape[-1] if linear else weight.shape[0]
        shape = (channels,) if linear else (channels, *[1] * (weight.dim() - 2))
        self._leaf = torch.zeros(shape, dtype=weight.dtype, device=output.device, requires_grad=True)
        self._leaf.register_hook(self._arrives)
        self._path = Trajectory([(self.place, self._leaf)], stats=QUANTITIES, window_blocks=self._blocks)
        if self._loaded is not None:
            self._load(self._loaded)

    def _weight(self) -> Tensor | None:
        return self._layer._parameters.get("weight") if self._layer is not None else None

    def _arrives(self, gradient: Tensor) -> None:
        """Before a gradient is added to the leaf's, and to the weight's: where the user has cleared the weight's since
        (zero_grad), a bias' would be cleared too. Nothing may be raised here."""
        leaf = self._leaf
        if leaf is not None and leaf.grad is not None:
            leaf.grad = self._kept(leaf.grad)

    def _kept(self, gradient: Tensor) -> Tensor | None:
        weight = self._weight()
        theirs = None if weight is None else weight.grad
        if theirs is None:
            return None
        if theirs.is_cpu:
            return gradient if bool(theirs.any()) else None
        return torch.where(theirs.any(), gradient, torch.zeros_like(gradient))

    # ---- steps

    def observe_gradients(self) -> None:
        """Keep the norm of the weight's gradient at the end of a backward pass."""
        weight = self._weight()
        if self._leaf is not None and weight is not None and weight.grad is not None:
            self._norm = torch.linalg.vector_norm(weight.grad)

    def observe_used_gradients(self, optimizer: Optimizer) -> None:
        """Take the step that the optimizer is about to take, if it holds the weight."""
        if self._leaf is None or (self._steps.holder is not None and optimizer is not self._steps.holder):
            return
        reason = self._steps.unlike_sgd(self._name)
        if reason:
            self._refuse(reason)
            return
        weight, group = self._weight(), self._steps.group
        if weight is None or group is None:
            return
        self._before, self._update = weight.detach().clone(), None
        if weight.grad is None:
            return
        sign = 1.0 if group.get("maximize") else -1.0
        norm, before = torch.linalg.vector_norm(weight.grad), self._norm
        same = torch.zeros_like(norm, dtype=torch.bool) if before is None else (norm == before)
        self._doubt(_CHANGED, ~(same | norm.isnan()))
        if self._leaf is None:
            return
        self._update = sign * group["lr"] * weight.grad
        gradient = None if self._leaf.grad is None else self._kept(self._leaf.grad)
        if gradient is not None:
            rate = sign * group["lr"]
            with torch.no_grad():  # as torch does it, rounding included
                self._leaf.add_(rate * gradient) if isinstance(rate, Tensor) else self._leaf.add_(gradient, alpha=rate)

    def observe_step(self) -> None:
        """Take the point that the step has led to."""
        if self._leaf is None or self._path is None:
            return
        weight, before, update = self._weight(), self._before, self._update
        self._before = self._update = None
        if not self._steps.known:
            self._refuse("no optimizer was given, so that its learning rate is not known; pass optimizer=")
            return
        if weight is not None and before is not None:
            update = torch.zeros_like(before) if update is None else update
            error = (weight.detach() - before - update).abs()
            scale = torch.maximum(before.abs(), weight.detach().abs()) + update.abs()
            wrong = (error > _ROUNDING * torch.finfo(weight.dtype).eps * scale).any()
            self._doubt(_OTHER_STEP, wrong)
        if not self.off:
            self._path.observe_step()

    def _doubt(self, reason: str, true: Tensor) -> None:
        """Note whether something speaks against the path; on a device it is read when the window is."""
        if true.is_cpu:
            if bool(true):
                self._refuse(reason.format(self._name))
            return
        known = self._doubts.get(reason)
        self._doubts[reason] = true if known is None else known | true

    # ---- windows

    def reset(self) -> None:
        """Start a new window."""
        if self._path is not None:
            self._path.reset()

    def advance(self) -> None:
        """Slide the window by a block."""
        if self._path is not None:
            self._path.advance()

    def add_to(self, result: MetricResult) -> None:
        """Add the path to a result, or the reason why there is none."""
        for reason, true in self._doubts.items():
            if bool(true):
                self._refuse(reason.format(self._name))
        if self.off or self._path is None:
            reason = self.off or "the first layer has not run yet"
            result.details[f"{PREFIX}off"] = reason
            nothing = Value(math.nan, 0, "exact", False, reason)
            for name in QUANTITIES:
                result.add(f"{PREFIX}{name}", self.place or "model", "total", last=nothing)
            return
        note, path = _NOTE.format(self._name), self._path.finalize()
        for name in QUANTITIES:
            values = {
                reducer: replace(value, note="; ".join(filter(None, (note, value.note))))
                for reducer, value in path[name][self.place].items()
            }
            result.add(f"{PREFIX}{name}", self.place, "total", **values)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Return the point and the path so far; nothing where there is none."""
        if self._leaf is None or self._path is None:
            return dict(self._loaded or {})
        return {"value": self._leaf.detach().clone(), "path": self._path.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, now or when the layer has run; raise ValueError where it does not fit, and change
        nothing."""
        if state and (not isinstance(state.get("value"), Tensor) or not isinstance(state.get("path"), Mapping)):
            raise ValueError(f"virtual_bias: expected a state with 'value' and 'path', got {list(state)}")
        if self._path is not None and state:
            self._load(state)
        else:
            self._loaded = state or None

    def _load(self, state: Mapping[str, Any]) -> None:
        assert self._leaf is not None
        assert self._path is not None
        value = state["value"]
        if value.shape != self._leaf.shape or value.dtype != self._leaf.dtype:
            raise ValueError(
                f"virtual_bias: expected {self._leaf.dtype} {list(self._leaf.shape)}, got {value.dtype} "
                f"{list(value.shape)}"
            )
        self._path.load_state_dict(dict(state["path"]))
        with torch.no_grad():
            self._leaf.copy_(value)
        self._loaded = None
