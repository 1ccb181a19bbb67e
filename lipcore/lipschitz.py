"""Local Lipschitz constants and the normalised first-layer gradient length, from the ordinary backward pass."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lipcore import _core, functional
from lipcore.capture import FIRST_LAYER_TYPES
from lipcore.distribution import Distribution
from lipcore.metric import FIRST_LAYER, Metric, PlanLine, Record, Tap
from lipcore.names import named_modules, unwrap
from lipcore.pullback import pull_back
from lipcore.results import Label, MetricResult, Value
from lipcore.spectral import singular_values

_SMALL = 4096  # multiplications below which one compiled loop beats torch's matrix product and what surrounds it
_KEYS = ("lipschitz.input", "lipschitz.output")


class _FirstLayerTap(Tap):
    """Per sample: ||delta|| and ||W_1^T delta||, delta the gradient at the first layer's output before its activation."""

    key = _KEYS[0]
    columns = 2
    in_place_after = True

    def __init__(self, metric: Lipschitz) -> None:
        self._metric = metric
        self.name = ""
        self.module: nn.Module | None = None
        self.input_shape: tuple[int, ...] | None = None  # of one sample, as last seen

    def resolve(self, name: str, module: nn.Module) -> None:
        if not isinstance(module, FIRST_LAYER_TYPES):
            raise ValueError(
                f"input: module '{name}' is a {type(module).__name__}; the first layer must be a Linear, Conv1d, Conv2d, "
                "Conv3d or Embedding"
            )
        self.name, self.module = name, module
        self._metric._remember_weight()

    def save(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], Any]:
        shape = tuple(arguments[0].shape) if arguments else None
        self.input_shape = shape[1:] if shape else None
        if isinstance(module, nn.Embedding) or shape is None:
            return (), None
        weight: Tensor = module.weight  # type: ignore[assignment]
        return (weight.detach(),), shape

    def reduce(self, grad_output: Tensor, extra: Any, *saved: Tensor) -> Tensor:
        if not saved:  # an Embedding's input is not a vector, so there is no lambda
            norms = functional.sample_norms(grad_output)
            return torch.stack([norms, torch.full_like(norms, math.nan)])
        (weight,) = saved
        small = grad_output.dim() == 2 and weight.dim() == 2 and grad_output.numel() * weight.shape[1] <= _SMALL
        if small and not torch.compiler.is_compiling() and grad_output.is_cpu:
            out = torch.empty(2, grad_output.shape[0], dtype=torch.float64)
            _core.first_layer_norms(grad_output, weight, out)
            return out
        # At least float32, whatever autocast made of the gradient: bfloat16 products would carry 4e-3.
        precise = torch.promote_types(grad_output.dtype, torch.float32)
        assert self.module is not None
        pulled = pull_back(self.module, weight.to(precise), grad_output.to(precise), extra)
        return torch.stack([functional.sample_norms(grad_output), functional.sample_norms(pulled)])


class _OutputTap(Tap):
    """Per sample: |dL/dyhat|, or ||dL/dz|| for quantity="residual"."""

    key = _KEYS[1]
    columns = 1

    def __init__(self, metric: Lipschitz) -> None:
        self._metric = metric
        self.name = ""
        self.module: nn.Module | None = None
        self.kind = ""  # what made the output, as far as it can be seen

    def resolve(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        last = module
        while isinstance(last, nn.Sequential) and len(last):
            last = last[-1]
        self.kind = type(last).__name__ if not list(last.children()) else ""

    def check(self, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"output: {self.place} returns a {type(output).__name__}, not a tensor; name the module whose output is meant: "
                "output='<module>'"
            )
        if not self.kind and output.grad_fn is not None and output.grad_fn.name().startswith("Sigmoid"):
            self.kind = "Sigmoid"
        self._metric.check_output(output)

    @property
    def place(self) -> str:
        """Last part of the keys: which output the numbers refer to, since a probability and a logit give different ones."""
        name = self.name or "model"
        return f"{name}:{self.kind}" if self.kind else name

    def reduce(self, grad_output: Tensor, extra: Any, *saved: Tensor) -> Tensor:
        if grad_output.is_cpu and not torch.compiler.is_compiling():
            out = torch.empty(1, grad_output.shape[0], dtype=torch.float64)
            _core.sample_norms(grad_output, out[0])
            return out
        return functional.sample_norms(grad_output).reshape(1, -1)


@dataclass(frozen=True)
class PerSample:
    """The last recorded micro-batch, one value per sample (NaN where the sample was skipped)."""

    normalized_gradient_norm: Tensor
    local_lipschitz: Tensor


class Lipschitz(Metric):
    r"""How complex the function being learnt is: local Lipschitz constants at the training samples, as they are visited.

    From one ordinary backward pass, for every sample i of every batch, with u the first layer's output before its activation:

    * ``normalized_gradient_norm`` :math:`r_i = \|\partial L/\partial u_i\| \,/\, |\partial L/\partial \hat y_i|` (mean, min, max, p50,
      p99, sum); the sum over a window is the normalised first-layer gradient length, the middle of Theorem 1 of
      Loukas, Poiitis and Jegelka (NeurIPS 2021) with the first bias taken non-shared
    * ``local_lipschitz`` :math:`\lambda_i = \|W_1^\top \partial L/\partial u_i\| \,/\, |\partial L/\partial \hat y_i| = \|\nabla_x f(x_i)\|`,
      exact, no second backward (mean, min, max, p50, p99); none for an Embedding
    * ``sandwich``: lower :math:`\bar\lambda/\sigma_1(W_1)`, middle :math:`\bar r`, upper :math:`\bar\lambda/\sigma_{\min}(W_1)`
      (Theorem 1). The upper side holds only when W_1 has no more outputs than inputs and full rank; `upper.valid` says so. W_1 is
      taken at the window's close; when it moved within the window both sides are labelled heuristic
    * ``steadiness``: max of r over the window (Definition 1; over several windows :meth:`History.steadiness`)
    * ``skipped``: samples with :math:`\partial L/\partial\hat y_i` zero or not finite, which say nothing; ``unrecorded``: forward
      passes whose backward never came

    Loss reduction, constant factors, AMP scaling, class weights and gradient accumulation cancel in the ratio. The lemma
    :math:`\nabla_x f = W_1^\top \nabla_u f` needs every path from x to pass through the first layer.

    Args:
        model: a module, to use the metric alone (call update() after every optimizer step); leave out inside a Monitor.
        input: canonical name of the first layer (Linear, Conv1-3d, Embedding); default: the first one executed.
        output: canonical name of the module whose output is yhat; default: the model's own output. It stands in the keys.
        quantity: "scalar" (default) needs one output value per sample. "residual" takes outputs with several values z_i and
            gives :math:`\|\partial L/\partial u_i\| / \|\partial L/\partial z_i\|` and :math:`\|\partial L/\partial x_i\| / \|\partial L/\partial z_i\|`,
            lower bounds of the Jacobians' spectral norms, labelled one-sided.
        shortcut: at batch 1 read r and lambda from the gradients of the first and last bias where the model is an nn.Sequential
            between two Linear layers (same numbers, a third of the time); False: always tap.
        optional: turn off with a line in the plan, instead of an error, where the model has no such output or first layer.
    """

    name = "lipschitz"
    _version = 1

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        input: str | None = None,
        output: str | None = None,
        quantity: Literal["scalar", "residual"] = "scalar",
        optional: bool = False,
        shortcut: bool = True,
    ) -> None:
        if quantity not in ("scalar", "residual"):
            raise ValueError(f"quantity: expected 'scalar' or 'residual', got {quantity!r}")
        self._input, self._output, self._quantity = input, output, quantity
        self.optional = optional
        self._shortcut = shortcut
        self._weight_before: Tensor | None = None
        self._first = _FirstLayerTap(self)
        self._last = _OutputTap(self)
        self._ratios, self._lambdas = Distribution(), Distribution()
        self._core_distributions = [self._ratios.core, self._lambdas.core]
        self._record: Record | None = None
        self._seen_before = 0  # samples seen when that record came
        self._batchnorms: list[nn.Module] = []
        self._mixed = False  # a BatchNorm in train mode was seen in this window
        self._monitor: Any = None
        if model is not None:
            from lipcore.monitor import Monitor

            self._monitor = Monitor(model, metrics=[self])

    # ---- what it needs

    @property
    def single_sample(self) -> tuple[Any, Any] | None:
        """The bias shortcut reads the ends of the model; named layers and vector outputs take the taps."""
        named = self._input is not None or self._output is not None
        return None if not self._shortcut or named or self._quantity != "scalar" else (self._ratios.core, self._lambdas.core)

    def bind(self, model: nn.Module) -> None:
        """Look for layers in which samples mix."""
        self._batchnorms = [module for _, module in named_modules(unwrap(model)) if isinstance(module, _BatchNorm)]

    def taps(self) -> dict[Tap, str]:
        """The gradient at the first layer's output and at the model's."""
        return {self._first: self._input or FIRST_LAYER, self._last: self._output or ""}

    def check_output(self, output: Tensor) -> None:
        """ValueError when this output does not have the one value per sample it should."""
        if self._quantity == "residual" or (output.dim() and output.numel() == output.shape[0]):
            return
        raise ValueError(
            f"output: {self._last.place} has shape {list(output.shape)}, but one value per sample is needed, [B] or [B, 1]. "
            "Choose: output='<module>' with such an output, or quantity='residual' for a one-sided bound on vector outputs"
        )

    # ---- what it observes

    def observe_record(self, record: Record) -> None:
        """One micro-batch through the taps."""
        numerators, output_grad = record.columns[_KEYS[0]], record.columns[_KEYS[1]][0]
        if numerators.shape[1] != output_grad.shape[0]:
            raise ValueError(
                f"input: first layer '{self._first.name}' has {numerators.shape[1]} rows, {self._last.place} has "
                f"{output_grad.shape[0]}; both must have the batch as first dimension (was it flattened with another one?)"
            )
        if self._batchnorms:
            self._check_mixing()
        self._record = record
        self._seen_before = self._seen()
        if numerators.is_cpu:
            _core.observe_ratios(numerators, output_grad, self._core_distributions)
            return
        eps = output_grad.abs()
        ratios = torch.where((eps > 0) & eps.isfinite(), numerators / eps, math.nan)
        self._ratios.observe(ratios[0])
        self._lambdas.observe(ratios[1])

    def _check_mixing(self) -> None:
        if any(module.training for module in self._batchnorms):
            if not self._mixed:
                warnings.warn(
                    "BatchNorm in train mode mixes samples, so per-sample gradients are not those of single samples: "
                    "lipschitz values are heuristic (directly behind the first layer they lose their meaning). Use GroupNorm or "
                    "LayerNorm for exact ones",
                    UserWarning,
                    stacklevel=2,
                )
            self._mixed = True

    def _seen(self) -> int:
        return int(self._ratios.count + self._ratios.missing + self._ratios.invalid)

    def update(self) -> None:
        """Call after every optimizer step when the metric stands alone."""
        self._alone().step()

    def close(self) -> None:
        """Remove the hooks of a metric that stands alone."""
        self._alone().close()

    def _alone(self) -> Any:
        if self._monitor is None:
            raise RuntimeError("this Lipschitz has no model of its own; pass one, or use the Monitor it belongs to")
        return self._monitor

    @property
    def per_sample(self) -> PerSample:
        """r and lambda of every sample of the last recorded micro-batch (batch-1 steps served by the shortcut keep none)."""
        record = self._record
        if record is None or self._seen() != self._seen_before + record.columns[_KEYS[1]].shape[1]:
            raise RuntimeError(
                "no micro-batch at hand: none was recorded yet, or the last one was served by the batch-1 shortcut"
            )
        numerators, eps = record.columns[_KEYS[0]], record.columns[_KEYS[1]][0]
        ratios = torch.where((eps > 0) & eps.isfinite(), numerators / eps, math.nan)
        return PerSample(ratios[0], ratios[1])

    # ---- results

    def plan(self) -> list[PlanLine]:
        """What is tapped, and by which rule."""
        if self.off:
            return [PlanLine("off", self.off)]
        first = (
            f"'{self._first.name}' ({type(self._first.module).__name__})"
            if self._first.module is not None
            else "found at the first step"
        )
        what = "one value per sample" if self._quantity == "scalar" else "any shape, one-sided bound"
        size = 2 * 2048
        if isinstance(self._first.module, nn.Module):
            weight: Tensor = self._first.module.weight  # type: ignore[assignment]
            size += weight.numel() * weight.element_size() if isinstance(weight, Tensor) else 0
        return [
            PlanLine("first layer", first, size),
            PlanLine("output", f"{self._last.place}: {what}"),
        ]

    def compute(self) -> MetricResult:
        """The open window's results; changes nothing."""
        if self._monitor is not None:
            self._monitor.flush()
        return self.finalize()

    def finalize(self) -> MetricResult:
        """The open window's numbers; see the class for what they are."""
        result = MetricResult(self.name, first_layer=self._first.name, output=self._last.place, quantity=self._quantity)
        label: Label = "one-sided" if self._quantity == "residual" else "exact"
        note = ""
        if self._mixed:
            label, note = "heuristic", "BatchNorm in train mode mixes samples"
        place = self._last.place
        result.add("normalized_gradient_norm", place, "total", **self._ratios.reduced(label, total=True, note=note))
        if not isinstance(self._first.module, nn.Embedding):
            result.add("local_lipschitz", place, "total", **self._lambdas.reduced(label, note=note))
            self._add_sandwich(result, place, label, note)
        count = self._ratios.count
        result.add("steadiness", place, "total", max=Value(self._ratios.max, count, label, count > 0, note))
        result.add("skipped", place, "total", sum=Value(float(self._seen() - count), self._seen()))
        return result

    def _add_sandwich(self, result: MetricResult, place: str, label: Label, note: str) -> None:
        module, count = self._first.module, self._ratios.count
        if module is None or not count or self._quantity != "scalar":
            return
        sigma = singular_values(module, self._first.input_shape)
        if sigma is None:
            return
        weight: Tensor = module.weight  # type: ignore[assignment]
        if self._weight_before is not None and not torch.equal(self._weight_before, weight.detach()):
            label, note = (
                "heuristic",
                f"{note}; " * bool(note) + "W_1 of the window's close, but it moved within the window",
            )
        average = self._lambdas.mean
        result.details["singular_values"] = {"largest": sigma.largest, "smallest": sigma.smallest, "rule": sigma.rule}
        if sigma.smallest is None:
            upper, valid, why = math.nan, False, "the smallest singular value is not known"
        elif weight.shape[0] > weight.shape[1]:
            upper, valid, why = (
                math.nan,
                False,
                "W_1 has more outputs than inputs: Theorem 1's upper side is false then",
            )
        elif sigma.smallest == 0:
            upper, valid, why = math.inf, False, "W_1 is rank-deficient"
        else:
            upper, valid, why = average / sigma.smallest, True, note
        result.add(
            "sandwich",
            place,
            "total",
            lower=Value(average / sigma.largest if sigma.largest else math.nan, count, label, sigma.largest > 0, note),
            middle=Value(self._ratios.mean, count, label, True, note),
            upper=Value(upper, count, label, valid, why),
        )

    def reset(self) -> None:
        """Start a new window."""
        self._ratios.reset()
        self._lambdas.reset()
        self._mixed = False
        if self._record is not None:
            self._seen_before = -self._record.columns[_KEYS[1]].shape[1]
        self._remember_weight()

    def _remember_weight(self) -> None:
        """W_1 at the window's start, to tell at its close whether Theorem 1 can be stated with one W_1."""
        weight = getattr(self._first.module, "weight", None)
        self._weight_before = weight.detach().clone() if isinstance(weight, Tensor) else None

    def merge(self, other: Lipschitz) -> None:
        """Add another one's open window (of another rank, say) to this one's."""
        self._ratios.merge(other._ratios)
        self._lambdas.merge(other._lambdas)
        self._mixed |= other._mixed

    def state_dict(self) -> dict[str, Any]:
        """Version and the two distributions."""
        return {
            "version": self._version,
            "quantity": self._quantity,
            "ratios": self._ratios.state_dict(),
            "lambdas": self._lambdas.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; ValueError, and nothing changed, when it does not fit."""
        for key, expected in (("version", self._version), ("quantity", self._quantity)):
            if state.get(key) != expected:
                raise ValueError(f"{key}: the state has {state.get(key)!r}, this metric has {expected!r}")
        ratios = Distribution()
        ratios.load_state_dict(state["ratios"])
        lambdas = Distribution()
        lambdas.load_state_dict(state["lambdas"])
        for mine, theirs in ((self._ratios, ratios), (self._lambdas, lambdas)):
            mine.reset()  # the compiled objects stay: the shortcut holds them
            mine.merge(theirs)


def local_lipschitz(
    model: nn.Module,
    x: Tensor,
    *,
    output: int | Callable[[Any], Tensor] | None = None,
    quantity: Literal["scalar", "jacobian"] = "scalar",
) -> Tensor:
    r"""Local Lipschitz constants at given points, :math:`\lambda_i = \|\nabla_x f(x_i)\|_2`, by one backward pass.

    For a network with piecewise linear activations this is the Lipschitz constant of the linear region around x_i. Parameters'
    gradients are not touched.

    Args:
        model: maps x [B, ...] to one value per sample, [B] or [B, 1].
        x: [B, ...], floating.
        output: for other outputs, which value: an index into the last dimension of [B, K], or a callable that turns what the
            model returns into [B].
        quantity: "jacobian" gives the spectral norm of the Jacobian of an output [B, K] instead, by K backward passes.

    Returns:
        float64 [B], detached.

    Raises:
        ValueError: the output has several values per sample and nothing says which; x is empty of dimensions; BatchNorm in train
            mode (samples mix; call model.eval()); the output does not depend on x.
        TypeError: x is not a floating tensor.

    >>> line = nn.Linear(2, 1)
    >>> _ = line.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
    >>> local_lipschitz(line, torch.zeros(1, 2))
    tensor([5.], dtype=torch.float64)
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(
            f"x: expected a floating tensor, got {x.dtype}; the gradient with respect to integers is not defined"
        )
    if not x.dim():
        raise ValueError("x: expected shape [B, ...], got a 0-dimensional tensor")
    for name, module in named_modules(model):
        if isinstance(module, _BatchNorm) and module.training:
            raise ValueError(
                f"model: module '{name}' is a {type(module).__name__} in train mode, which mixes samples; call model.eval()"
            )
    if quantity not in ("scalar", "jacobian"):
        raise ValueError(f"quantity: expected 'scalar' or 'jacobian', got {quantity!r}")
    with torch.enable_grad():
        point = x.detach().clone().requires_grad_()
        result = model(point)
        if quantity == "jacobian":
            return _jacobian_norms(result, point)
        value = _one_per_sample(result, output, len(x))
        if not len(x):
            return torch.empty(0, dtype=torch.float64, device=x.device)
        (gradient,) = _grad(value.sum(), point)
    return functional.sample_norms(gradient)


def _one_per_sample(result: Any, output: int | Callable[[Any], Tensor] | None, batch: int) -> Tensor:
    if callable(output):
        result = output(result)
    if not isinstance(result, Tensor):
        raise ValueError(
            f"output: the model returns a {type(result).__name__}; pass output=<callable that gives one value per sample>"
        )
    if isinstance(output, int):
        if result.dim() != 2 or not -result.shape[1] <= output < result.shape[1]:
            raise ValueError(
                f"output: index {output} does not fit the model's output of shape {list(result.shape)}; expected [B, K]"
            )
        result = result[:, output]
    if result.dim() == 0 or result.shape[0] != batch or result.numel() != batch:
        raise ValueError(
            f"output: the model's output has shape {list(result.shape)} for {batch} samples, but one value per sample is needed; pass "
            "output=<index or callable>, or quantity='jacobian' for the Jacobian's spectral norm"
        )
    return result


def _jacobian_norms(result: Any, point: Tensor) -> Tensor:
    if not isinstance(result, Tensor) or result.dim() < 1 or result.shape[0] != point.shape[0]:
        raise ValueError("quantity: 'jacobian' needs a tensor output of shape [B, ...]")
    if not len(point):
        return torch.empty(0, dtype=torch.float64, device=point.device)
    flat = result.reshape(len(point), -1)
    rows = [_grad(column.sum(), point, retain=True)[0].reshape(len(point), -1) for column in flat.unbind(1)]
    return torch.linalg.matrix_norm(torch.stack(rows, 1).double(), ord=2)


def _grad(value: Tensor, point: Tensor, *, retain: bool = False) -> tuple[Tensor, ...]:
    if not value.requires_grad:
        raise ValueError("model: its output does not depend on x through differentiable operations")
    try:
        return torch.autograd.grad(value, point, retain_graph=retain)
    except RuntimeError as error:
        if "not have been used" not in str(error):
            raise
        raise ValueError("model: its output does not depend on x through differentiable operations") from None
