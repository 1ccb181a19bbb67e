"""Local Lipschitz constants and the normalised first-layer gradient length, from the ordinary backward pass."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lipcore import _core
from lipcore.capture.taps.tap import FIRST_LAYER, Record, SingleSample, Tap
from lipcore.lipschitz.bias_steps import BiasSteps
from lipcore.lipschitz.first_weight import singular_values_later
from lipcore.lipschitz.pointwise import mixes_samples
from lipcore.lipschitz.sandwich import sandwich_sides
from lipcore.lipschitz.taps import FirstLayerTap, OutputTap
from lipcore.metric.distribution import Distribution, loaded_distributions
from lipcore.metric.hook_warnings import warn_in_hook
from lipcore.metric.protocol import Needs, PlanLine, TapCounts
from lipcore.metric.results import Label, MetricResult, Value
from lipcore.metric.standalone import StandaloneMetric
from lipcore.metric.state import check_version
from lipcore.models.arguments import check_choice, check_count
from lipcore.models.names import named_modules, unwrap
from lipcore.models.torch_internals import AnyBatchNorm


@dataclass(frozen=True)
class PerSample:
    """Values of the last recorded micro-batch, one per sample (NaN where the sample was skipped)."""

    normalized_gradient_norm: Tensor
    local_lipschitz: Tensor


class Lipschitz(StandaloneMetric):
    r"""Complexity of the function that is being learnt: local Lipschitz constants at the training samples as they are
    visited.

    Everything comes from the one ordinary backward pass. For every sample i of every batch, with u the first layer's
    output before its activation and :math:`\hat y` the model's output:

    * ``normalized_gradient_norm`` :math:`r_i = \|\partial L/\partial u_i\| \,/\, |\partial L/\partial \hat y_i|` (mean,
      min, max, p50, p99, sum). Its sum over a window is the normalised first-layer gradient length, the middle of
      Theorem 1 of Loukas, Poiitis and Jegelka (NeurIPS 2021) with the first bias taken non-shared
    * ``local_lipschitz`` :math:`\lambda_i = \|W_1^\top \partial L/\partial u_i\| \,/\, |\partial L/\partial \hat y_i| =
      \|\nabla_x f(x_i)\|`, exact, without a second backward pass (mean, min, max, p50, p99); there is none for an
      Embedding
    * ``sandwich``, the two sides of Theorem 1 around its middle: lower :math:`\bar\lambda/\sigma_1(W_1)`, middle
      :math:`\bar r`, upper :math:`\bar\lambda/\sigma_{\min}(W_1)`. The upper side holds only where W_1 has full rank
      and no more outputs than inputs; `upper.valid` says so. W_1 is taken when the window closes; where it moved within
      the window both sides are labelled heuristic. Where sigma_1 is found by iteration (large layers, convolutions) the
      lower side divides by an upper bound of it and is one-sided
    * ``steadiness``: the maximum of r over the window (Definition 1; over several windows :meth:`History.steadiness`)
    * ``skipped``: samples with :math:`\partial L/\partial\hat y_i` zero or not finite, which say nothing.
      ``unrecorded``: forward passes whose backward pass never came

    The result's ``details["first_bias"]`` holds what Corollaries 2 and 3 ask of the steps: rows per sample, samples,
    the optimizer of the first layer's bias, its settings, and its lowest and highest learning rate within the window.

    The loss reduction, constant factors, AMP scaling, class weights and gradient accumulation cancel in the ratio.
    dL/du and dL/dyhat are those of the whole loss, so a term that reaches u past the output (an auxiliary head, a
    penalty on activations) enters r. A saturated sigmoid whose dL/dyhat rounds to zero is skipped.

    :math:`\nabla_x f = W_1^\top \nabla_u f` needs every path from x to pass through the first layer. An input skip is
    looked for in the first forward pass, and warned of. x is what enters that layer, after any preprocessing in the
    model.

    Args:
        model: a module, to use the metric alone (call update() after every optimizer step); leave it out inside a
            Monitor.
        input: canonical name of the first layer (Linear, Conv1-3d, Embedding); default: the first one executed.
        output: canonical name of the module whose output is yhat; default: the model's own output. It stands in the
            keys.
        quantity: "scalar" (default) needs one output value per sample. "residual" takes outputs with several values z_i
            and gives :math:`\|\partial L/\partial u_i\| / \|\partial L/\partial z_i\|` and :math:`\|\partial L/\partial
            x_i\| / \|\partial L/\partial z_i\|`, lower bounds of the Jacobians' spectral norms, labelled one-sided.
        lambda_every: compute local Lipschitz constants at every k-th micro-batch; r is always taken at every one.
            Default: at every one where that is cheap, else at every 16th (W_1^T delta costs as much as the layer's
            forward pass). The count of each value says how many samples are in it. Samples that the shortcut serves
            always have one.
        shortcut: at batch 1, read r and lambda from the gradients of the first and last bias where the model is an
            nn.Sequential between two Linear layers (the same numbers in a third of the time); False: always tap.
        optional: where the model has no such output or first layer, turn off with a line in the plan instead of an
            error.

    >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    >>> lipschitz = Lipschitz(model)
    >>> model(torch.randn(8, 2)).square().mean().backward()
    >>> lipschitz.update()
    >>> lipschitz.compute().local_lipschitz["model:Linear"].mean.count
    8
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
        lambda_every: int | None = None,
        optional: bool = False,
        shortcut: bool = True,
    ) -> None:
        check_choice("quantity", quantity, ("scalar", "residual"))
        check_count("lambda_every", lambda_every, optional=True)
        self._settings = {"input": input, "output": output, "quantity": quantity, "lambda_every": lambda_every}
        self._settings |= {"optional": optional, "shortcut": shortcut}
        self._numbers: MetricResult | None = None  # of a copy, which has nothing else
        self._input, self._output, self._quantity = input, output, quantity
        self.optional = optional
        self._shortcut = shortcut
        self._weight_before: Tensor | None = None
        self._moved = False  # W_1 had moved within the window before its state was loaded
        self._first = FirstLayerTap(f"{self.name}.input", self._remember_weight, self._bypassed, lambda_every)
        self._last = OutputTap(f"{self.name}.output", self._check_output)
        self._ratios, self._lambdas = Distribution(), Distribution()
        self._paired = Distribution()  # r of the samples that have a lambda, for the sandwich
        self._all = (self._ratios, self._lambdas, self._paired)
        self._core_distributions = [distribution.core for distribution in self._all]
        self._record: tuple[Tensor, Tensor] | None = None  # the last one's numerators and output gradients
        self._batchnorms: list[nn.Module] = []
        self._mixed = False  # a BatchNorm in train mode was seen in this window
        self._warned = False
        self._raised: Warning | None = None  # by a warning, where it could not be handed on
        self._served = False  # the shortcut has been used
        self._skips = False  # the output depends on the input past the first layer
        self._closed: deque[list[Distribution]] = deque(maxlen=0)  # blocks of a sliding window
        self._bias = BiasSteps()
        self._model: nn.Module | None = None
        self._counts: TapCounts | None = None
        if model is not None:
            self._watch(model)

    # ---- what it needs

    def needs(self) -> Needs:
        """Say what it taps: the gradient at the first layer's output and at the model's."""
        taps: dict[Tap, str] = {self._first: self._input or FIRST_LAYER, self._last: self._output or ""}
        return Needs(taps=taps, single_sample=self._single_sample())

    def counted(self, counts: TapCounts) -> None:
        """Take what counts its forward passes."""
        self._counts = counts

    def _single_sample(self) -> SingleSample | None:
        """The bias shortcut reads the ends of the model; named layers and vector outputs take the taps."""
        named = self._input is not None or self._output is not None
        if named or not self._shortcut or self._quantity != "scalar":
            return None
        return SingleSample(self._core_distributions, on_served=self._forget_record, agrees=self._agrees)

    def _forget_record(self) -> None:
        self._record, self._served = None, True

    def _agrees(self, r: float, local_lipschitz: float) -> bool:
        """Whether the shortcut reads what the taps have just brought."""
        if self._record is None or self._record[1].shape[1] != 1:
            return False
        numerators, eps = self._record[0].tolist(), abs(self._record[1].item())
        if eps > 0 and math.isfinite(eps):
            tapped = numerators[0][0] / eps, numerators[1][0] / eps
            agrees = math.isclose(r, tapped[0], rel_tol=1e-6)
            # NaN: the taps take lambda less often.
            agrees &= math.isnan(tapped[1]) or math.isclose(local_lipschitz, tapped[1], rel_tol=1e-6)
        else:
            agrees = math.isnan(r)
        if not agrees and self._served:
            self._warn(
                "the gradients of the first and last bias have come to hold more than the loss of one sample (a "
                "penalty on parameters?): up to 255 earlier values were read from them; from here on they are not used"
            )
        return agrees

    def prepare(self, optimizers: Sequence[Optimizer], scaler: Any, window_blocks: int) -> None:
        """How many blocks a window has, and whose steps move the first bias."""
        self._closed = deque(maxlen=window_blocks - 1)
        self._bias.prepare(optimizers, window_blocks)

    def bind(self, model: nn.Module) -> None:
        """Look for layers in which samples mix."""
        if self._numbers is not None:
            raise RuntimeError(
                "this Lipschitz is a copy, which holds the numbers of compute() and no model; to go on, make a new one "
                "and load_state_dict() of the original"
            )
        self._model = model
        self._batchnorms = [module for _, module in named_modules(unwrap(model)) if isinstance(module, AnyBatchNorm)]

    def _check_output(self, output: Tensor) -> None:
        """ValueError when this output does not have the one value per sample it should."""
        values, rows = output.numel(), output.shape[0] if output.dim() else 1
        if self._quantity == "residual" or values == rows:
            return
        raise ValueError(
            f"output: {self._last.place} has shape {list(output.shape)}, but one value per sample is needed, [B] or "
            "[B, 1]. Choose: output='<module>' with such an output, or quantity='residual' for a one-sided bound on "
            "vector outputs"
        )

    # ---- what it observes

    def observe_record(self, record: Record) -> None:
        """One micro-batch through the taps."""
        numerators, output_grad = record[self._first.key], record[self._last.key]
        if numerators.shape[1] != output_grad.shape[1]:
            raise ValueError(
                f"input: first layer '{self._first.name}' has {numerators.shape[1]} rows, {self._last.place} has "
                f"{output_grad.shape[1]}; both must have the batch as first dimension (was it flattened with another "
                "one?)"
            )
        if self._batchnorms:
            self._check_mixing()
        if self._raised is not None:
            error, self._raised = self._raised, None
            raise error
        self._record = numerators, output_grad
        if numerators.is_cpu:
            _core.observe_ratios(numerators, output_grad, self._core_distributions)
        else:
            ratios = _ratios(numerators, output_grad)
            for distribution, values in zip(self._all, ratios, strict=True):
                distribution.observe(values)

    def observe_step(self) -> None:
        """One optimizer step has been made."""
        self._bias.observe()

    @property
    def step_call(self) -> Callable[[], object]:
        """The counting itself, at every step of loops whose steps take microseconds."""
        return self._bias.observe

    def _check_mixing(self) -> None:
        if any(mixes_samples(module) for module in self._batchnorms):
            if not self._warned:
                self._warned = True
                self._warn(
                    "BatchNorm in train mode mixes samples, so per-sample gradients are not those of single samples: "
                    "lipschitz values are heuristic (directly behind the first layer they lose their meaning). Use "
                    "GroupNorm or LayerNorm for exact ones"
                )
            self._mixed = True

    def _bypassed(self) -> None:
        self._skips = True
        self._warn(
            f"the model's output depends on its input past the first layer '{self._first.name}' (an input skip?): "
            "normalized_gradient_norm is exact, but local_lipschitz is only the part of the gradient that goes "
            "through that layer, labelled heuristic"
        )

    def _warn(self, message: str) -> None:
        self._raised = warn_in_hook(message, UserWarning, stacklevel=3) or self._raised

    @property
    def per_sample(self) -> PerSample:
        """Values of r and lambda of every sample of the last recorded micro-batch (batch-1 steps that the shortcut
        serves keep none)."""
        if self._record is None:
            raise RuntimeError(
                "no micro-batch at hand: none was recorded yet, or the last one was served by the batch-1 shortcut"
            )
        ratios = _ratios(*self._record)
        return PerSample(ratios[0], ratios[1])

    # ---- results

    def plan(self) -> list[PlanLine]:
        """Return what is tapped, and by which rule."""
        if self.off:
            return [PlanLine("off", self.off)]
        first = (
            f"'{self._first.name}' ({type(self._first.module).__name__})"
            if self._first.module is not None
            else "found at the first step"
        )
        what = "one value per sample" if self._quantity == "scalar" else "any shape, one-sided bound"
        size = 3 * 2048
        if isinstance(self._first.module, nn.Module):
            weight: Tensor = self._first.module.weight  # type: ignore[assignment]
            size += weight.numel() * weight.element_size() if isinstance(weight, Tensor) else 0
        return [
            PlanLine("first layer", f"{first}, {self._first.rule}", size),
            PlanLine("output", f"{self._last.place}: {what}"),
        ]

    def __reduce__(self) -> tuple[Any, ...]:
        """Make a copy or a pickle: as it is before it is bound, then the open window's numbers and nothing else."""
        numbers = self.finalize() if self._model is not None else self._numbers
        return _copy_of, (type(self), self._settings, numbers, self.off)

    def finalize(self) -> MetricResult:
        """The open window's numbers; see the class for what they are."""
        if self._numbers is not None:
            return self._numbers
        result = MetricResult(self.name, first_layer=self._first.name, output=self._last.place, quantity=self._quantity)
        label: Label = "one-sided" if self._quantity == "residual" else "exact"
        note = ""
        if self._mixed:
            label, note = "heuristic", "BatchNorm in train mode mixes samples"
        place = self._last.place
        ratios, lambdas, paired = self._window()
        result.add("normalized_gradient_norm", place, "total", **ratios.reduced(label, total=True, note=note))
        if self._counts is not None:
            result.details["unrecorded_forwards"] = self._counts.unrecorded
            if self._counts.refused:
                result.details["unrecorded_because"] = list(self._counts.refused)
        count, skipped = ratios.count, ratios.missing + ratios.invalid
        result.add("steadiness", place, "total", max=Value(ratios.max, count, label, count > 0, note))
        result.add("skipped", place, "total", sum=Value(float(skipped), count + skipped))
        result.details["infinite_ratios"] = ratios.invalid
        if not isinstance(self._first.module, nn.Embedding):
            if self._skips:
                label, note = "heuristic", f"{note}; " * bool(note) + "the input also goes past the first layer"
            result.add("local_lipschitz", place, "total", **lambdas.reduced(label, note=note))
            self._add_sandwich(result, place, label, note, lambdas.mean, paired)
            if self._first.module is not None:
                result.details["first_bias"] = self._first_bias(count + skipped)
        return result

    def _window(self) -> list[Distribution]:
        """r, lambda, and r where there is a lambda, over all blocks of the window."""
        if not self._closed:
            return list(self._all)
        merged = [Distribution() for _ in self._all]
        for block in (*self._closed, self._all):
            for into, distribution in zip(merged, block, strict=True):
                into.merge(distribution)
        return merged

    def _add_sandwich(
        self, result: MetricResult, place: str, label: Label, note: str, average: float, paired: Distribution
    ) -> None:
        module, count = self._first.module, paired.count
        if module is None or not count or self._quantity != "scalar":
            return
        sigma = singular_values_later(module, self._first.batch_shape, self._weight_before)
        if sigma is None:
            return
        shape = tuple(module.weight.shape)  # type: ignore[arg-type]
        moved = result.details["first_weight_moved"] = self._weight_moved()
        if moved:
            label, note = (
                "heuristic",
                f"{note}; " * bool(note) + "W_1 of the window's close, but it moved within the window",
            )
        result.details["singular_values"] = sigma.then(asdict)
        middle = paired.mean
        sides = sigma.then(lambda found: sandwich_sides(found, shape, average, middle, count, label, note))
        result.add_later("sandwich", place, "total", sigma, sides)

    def _first_bias(self, samples: int) -> dict[str, Any]:
        """What Corollaries 2 and 3 ask of the first layer and its bias, for lipcore.theory to check."""
        shape = self._first.batch_shape
        return {
            "parameter": f"{self._first.name}.bias" if self._first.name else "bias",
            "layer": type(self._first.module).__name__,
            "rows_per_sample": None if shape is None else math.prod(shape[1:-1]),
            "samples": samples,
            **self._bias.details(),
        }

    def rebind(self) -> None:
        """Look for layers in which samples mix anew."""
        if self._model is not None:
            self.bind(self._model)

    def reset(self) -> None:
        """Start a new window."""
        self._closed.clear()
        self._start_block()
        self._mixed = self._moved = False
        self._bias.reset()
        self._remember_weight()

    def advance(self) -> None:
        """Slide the window by a block. What labels it (mixed samples, a first layer that moved) counts from the first
        block in which it was so."""
        if self._closed.maxlen == 0:
            self.reset()
            return
        block = [Distribution() for _ in self._all]
        for into, distribution in zip(block, self._all, strict=True):
            into.merge(distribution)
        self._closed.append(block)
        self._moved = self._weight_moved()
        self._bias.advance()
        self._bias.find(self._model, self._first.module)
        self._start_block()

    def _start_block(self) -> None:
        for distribution in self._all:
            distribution.reset()  # the compiled objects stay: the shortcut holds them

    def _remember_weight(self) -> None:
        """W_1 at the window's start, to tell at its close whether Theorem 1 can be stated with one W_1."""
        weight = getattr(self._first.module, "weight", None)
        self._weight_before = weight.detach().clone() if isinstance(weight, Tensor) else None
        self._bias.find(self._model, self._first.module)

    def _weight_moved(self) -> bool:
        weight = getattr(self._first.module, "weight", None)
        before = self._weight_before
        return self._moved or (before is not None and weight is not None and not torch.equal(before, weight.detach()))

    def merge(self, other: Lipschitz) -> None:
        """Add the open window of another Lipschitz metric (of another rank, say) to this one's."""
        if not isinstance(other, Lipschitz):
            raise TypeError(f"other: expected a Lipschitz, got {type(other).__name__}")
        if other._quantity != self._quantity:
            raise ValueError(f"other: its quantity is {other._quantity!r}, this one's is {self._quantity!r}")
        for mine, theirs in zip(self._all, other._all, strict=True):
            mine.merge(theirs)
        self._mixed |= other._mixed

    def state_dict(self) -> dict[str, Any]:
        """Version and the two distributions."""
        return {
            "version": self._version,
            "quantity": self._quantity,
            "mixed": self._mixed,
            "weight_moved": self._weight_moved(),
            "distributions": [distribution.state_dict() for distribution in self._all],
            "closed": [[distribution.state_dict() for distribution in block] for block in self._closed],
            "bias_steps": self._bias.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state. Where it does not fit, raise a ValueError and change nothing."""
        check_version(state, self._version, "metric")
        if state.get("quantity") != self._quantity:
            raise ValueError(f"quantity: the state has {state.get('quantity')!r}, this metric has {self._quantity!r}")
        for key in ("mixed", "weight_moved"):
            if not isinstance(state.get(key), bool):
                raise ValueError(f"{key}: expected True or False, got {state.get(key)!r}")
        loaded = self._loaded("distributions", state.get("distributions"))
        blocks, most = state.get("closed"), self._closed.maxlen or 0
        if not isinstance(blocks, list) or len(blocks) > most:
            seen = f"{len(blocks)} of them" if isinstance(blocks, list) else repr(blocks)
            raise ValueError(f"closed: expected a list of at most {most} blocks, got {seen}")
        closed = [self._loaded(f"closed[{i}]", block) for i, block in enumerate(blocks)]
        bias_steps = state.get("bias_steps", [])  # a state of an earlier lipcore has none
        if not isinstance(bias_steps, list) or not all(map(_are_steps, bias_steps)):
            raise ValueError(f"bias_steps: expected [steps, lowest, highest rate] per block, got {bias_steps!r}")
        self._closed.clear()
        self._closed.extend(closed)
        for mine, theirs in zip(self._all, loaded, strict=True):
            mine.reset()  # the compiled objects stay: the shortcut holds them
            mine.merge(theirs)
        self._mixed, self._moved = state["mixed"], state["weight_moved"]
        self._bias.load(bias_steps)
        self._remember_weight()

    def _loaded(self, key: str, states: Any) -> list[Distribution]:
        """A block of the window."""
        return loaded_distributions(key, states, len(self._all))


def _copy_of(kind: type[Lipschitz], settings: dict[str, Any], numbers: MetricResult | None, off: str) -> Lipschitz:
    copied = kind(**settings)
    copied._numbers, copied.off = numbers, off
    return copied


def _are_steps(block: Any) -> bool:
    """Whether these are the steps and the lowest and highest rate of a block."""
    numbers = isinstance(block, (list, tuple)) and all(isinstance(number, (int, float)) for number in block)
    return numbers and len(block) == 3 and math.isfinite(block[0]) and block[0] >= 0


def _ratios(numerators: Tensor, output_grad: Tensor) -> Tensor:
    """r, lambda and r where there is a lambda, [3, B]; NaN where the output's gradient is 0 or not finite."""
    eps = output_grad.abs()
    return torch.where((eps > 0) & eps.isfinite(), numerators / eps, math.nan)
