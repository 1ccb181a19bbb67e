"""Local Lipschitz constants and the normalised first-layer gradient length, from the ordinary backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lipcore.capture.taps.tap import FIRST_LAYER, SingleSample, Tap
from lipcore.lipschitz.bias_steps import BiasSteps
from lipcore.lipschitz.input_tap import ModelInputTap
from lipcore.lipschitz.numerators import Numerators
from lipcore.lipschitz.records import PLACES
from lipcore.lipschitz.results import LipschitzResults
from lipcore.lipschitz.taps import FirstLayerTap, OutputTap
from lipcore.lipschitz.targets import begins_with_layer, find_input
from lipcore.lipschitz.virtual_bias import VirtualBias
from lipcore.metric.blocks import BlockWindow
from lipcore.metric.handed_out import HandedOut
from lipcore.metric.host_reads import TensorRead
from lipcore.metric.protocol import BatchOfOne, Needs, TapCounts
from lipcore.metric.rank_part import Holding
from lipcore.metric.results import MetricResult
from lipcore.models.arguments import check_choice, check_count
from lipcore.models.inputs import InputChoice, check_input_choice
from lipcore.models.named_output import check_output_choice, find_output
from lipcore.models.names import named_modules, unwrap
from lipcore.models.torch_internals import AnyBatchNorm


@dataclass(frozen=True)
class PerSample:
    """Values of the last recorded micro-batch, one per sample (NaN where the sample was skipped)."""

    normalized_gradient_norm: Tensor
    local_lipschitz: Tensor


class Lipschitz(LipschitzResults):
    r"""Complexity of the function that is being learnt: local Lipschitz constants at the training samples as they are
    visited.

    Everything comes from the one ordinary backward pass. For every sample i of every batch, with u the first layer's
    output before its activation and :math:`\hat y` the model's output:

    * ``normalized_gradient_norm`` :math:`r_i = \|\partial L/\partial u_i\| \,/\, |\partial L/\partial \hat y_i|` (mean,
      min, max, p50, p99, sum). Its sum over a window is the normalised first-layer gradient length, the middle of
      Theorem 1 of Loukas, Poiitis and Jegelka (NeurIPS 2021) with the first bias taken non-shared
    * ``local_lipschitz`` :math:`\lambda_i = \|\partial L/\partial x_i\| \,/\, |\partial L/\partial \hat y_i| =
      \|\nabla_x f(x_i)\|` at the model's input x, exact (mean, min, max, p50, p99). Where the first layer that runs is
      a Linear or convolution of torch's own, on x itself and the only one to use it, the numerator is :math:`\|W_1^\top
      \partial L/\partial u_i\|`, without another backward pass. Elsewhere autograd takes the gradient at x, in some of
      the passes (`lambda_every`). Behind an Embedding it is the constant at the Embedding's output, which the note says
    * ``sandwich``, the two sides of Theorem 1 around its middle: lower :math:`\bar\lambda/\sigma_1(W_1)`, middle
      :math:`\bar r`, upper :math:`\bar\lambda/\sigma_{\min}(W_1)`. The upper side holds only where W_1 has full rank
      and no more outputs than inputs; `upper.valid` says so. W_1 is taken when the window closes; where it moved within
      the window both sides are labelled heuristic. Where sigma_1 is found by iteration (large layers, convolutions) the
      lower side divides by an upper bound of it and is one-sided
    * ``steadiness``: the maximum of r over the window (Definition 1; over several windows :meth:`History.steadiness`)
    * ``skipped``: samples with :math:`\partial L/\partial\hat y_i` zero or not finite, which say nothing.
      ``unrecorded``: forward passes whose backward pass never came

    With ``virtual_bias=True``, of a first layer without a bias, also the path of the one that it does not have, whose
    gradient is :math:`\sum_{i,p} \partial L/\partial u_{i,p}` over samples i and positions p:
    ``virtual_bias_update_norm``, ``virtual_bias_path_length``, ``virtual_bias_distance``, ``virtual_bias_directness``
    and ``virtual_bias_variance``, which are what :class:`Trajectory` says of a parameter. They are those of a bias that
    starts at 0, is stepped by plain SGD with the layer's own learning rate, and whose updates the forward pass does not
    see (the "virtual bias" of the paper; Corollaries 2 and 3). Momentum, weight decay, other optimizers, clipped
    gradients, a GradScaler, several ranks and compiled models turn them off by name. Where BatchNorm in train mode
    comes next, such a bias does nothing, and its path is rounding.

    The result's ``details["first_bias"]`` holds what Corollaries 2 and 3 ask of the steps: rows per sample, samples,
    the optimizer of the first layer's bias, its settings, and its lowest and highest learning rate within the window.

    The loss reduction, constant factors, AMP scaling, class weights and gradient accumulation cancel in the ratio.
    dL/du and dL/dyhat are those of the whole loss, so a term that reaches u past the output (an auxiliary head, a
    penalty on activations) enters r. A saturated sigmoid whose dL/dyhat rounds to zero is skipped.

    The first passes of a run and of each window are checked: ``autograd.grad`` of two samples' outputs, through the
    same graph, must be what was taken. Where it is not, or where the model cannot be differentiated by its input,
    ``local_lipschitz`` is NaN with the reason, and one warning says so.

    Where ranks gather parameters as layers run (``fully_shard``), lambda is taken by W_1 alone, in an ``nn.Sequential``
    of torch's own layers, at a layer that `input` names, and elsewhere from :meth:`Monitor.prove` on. All ranks run the
    check together, in passes 1, 2, 4, 64, 128, ...; where they do not, lambda is labelled heuristic. It is absent from
    a pass on that does other operations than the proved one.

    Args:
        model: a module, to use the metric alone (call update() after every optimizer step); leave it out inside a
            Monitor.
        input: what lambda is the gradient at. The name of an argument or keyword of the model's forward (or of an entry
            of a dict or dataclass among them), or a function of (arguments, keywords) that returns one of the tensors
            in them; default: the first argument. Or the canonical name of a layer (Linear, Conv1-3d, Embedding), which
            is then the first layer, and x what enters it; default: the first one executed.
        output: canonical name of the module whose output is yhat, or the key or attribute that yhat has in what the
            model returns, or a function that returns it; default: the model's own output. It stands in the keys.
        quantity: "scalar" needs one output value per sample. "residual" takes outputs with several values z_i and gives
            :math:`\|\partial L/\partial u_i\| / \|\partial L/\partial z_i\|` and :math:`\|\partial L/\partial x_i\| /
            \|\partial L/\partial z_i\|`, lower bounds of the Jacobians' spectral norms, labelled one-sided.
            "auto" (default): "scalar" where the first output has one value per sample, else "residual".
        lambda_every: compute local Lipschitz constants at every k-th micro-batch; r is always taken at every one.
            Default: at every one where that is cheap, else at every 32nd (W_1^T delta costs as much as the layer's
            forward pass); where autograd takes the gradient at x, as often as 0.5 % of the time allow. The count of
            each value says how many samples are in it. Samples that the shortcut serves always have one.
        batch_of_one: "exact" (default): batches of one sample are tapped like others. "fast": r and lambda are read
            from the gradients of the first and last bias where the model is an nn.Sequential between two Linear layers,
            in a third of the time. What else comes to reach these gradients (a penalty on parameters) is noticed by the
            next comparison only, which takes back the values since the last one (up to 255) and says how many.
        virtual_bias: also follow the bias that the first layer does not have, see above.
        sigma: where ranks hold parts of W_1 and the model has one output value per sample, take its singular values
            (``details["singular_values"]`` of windows of all ranks) whatever it costs. They are taken unasked up to
            131,328 numbers in each window's reduce, which is 512 inputs where outputs are cut. Under tensor parallelism
            they are all that can be measured, and without `sigma` the metric stops there.
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

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        input: InputChoice | None = None,
        output: str | Callable[[Any], Tensor] | None = None,
        quantity: Literal["auto", "scalar", "residual"] = "auto",
        lambda_every: int | None = None,
        optional: bool = False,
        batch_of_one: BatchOfOne = "exact",
        virtual_bias: bool = False,
        sigma: bool = False,
    ) -> None:
        check_input_choice(input)
        check_output_choice(output)
        check_choice("quantity", quantity, ("auto", "scalar", "residual"))
        check_count("lambda_every", lambda_every, optional=True)
        check_choice("batch_of_one", batch_of_one, get_args(BatchOfOne))
        if not isinstance(sigma, bool):
            raise TypeError(f"sigma: expected True or False, got {sigma!r}")
        self._settings = {"input": input, "output": output, "quantity": quantity, "lambda_every": lambda_every}
        self._settings |= {"optional": optional, "batch_of_one": batch_of_one, "virtual_bias": virtual_bias}
        self._settings |= {"sigma": sigma}
        self._sigma = sigma
        self._numbers: MetricResult | None = None  # of a copy, which has nothing else
        self._input, self._output, self._quantity = input, output, quantity
        self.optional = optional
        self._fast = batch_of_one == "fast"
        self._weight_before: Tensor | None = None
        self._weight_stood = TensorRead(self._compare_weights)
        self._moved = False  # W_1 had moved within the window before its state was loaded
        self._resolved = "" if quantity == "auto" else str(quantity)  # "auto" is settled by the first output
        self._bias = BiasSteps(virtual=virtual_bias)
        self._virtual_bias = VirtualBias(self._bias, self._virtual_bias_refused) if virtual_bias else None
        self._at_input = ModelInputTap(f"{self.name}.x", lambda_every, self._lambda_refused)
        self._first = FirstLayerTap(
            *(f"{self.name}.input", self._at_input, self._remember_weight, self._lose_first, lambda_every),
            self._virtual_bias,
            stays=sigma,
        )
        self._last = OutputTap(f"{self.name}.output", self._check_output)
        self._at_input.first, self._at_input.last = self._first, self._last
        self._numerators = Numerators(self._first, self._last, self._at_input, self._warn, self._goes_on)
        self._open = BlockWindow(PLACES, 1)
        self._cores = self._open.cores  # the same objects all the time: the shortcut holds them
        self._handed_out = HandedOut()  # results with values that the shortcut may have to take back
        self._unchecked = HandedOut()  # results with lambdas that no check has come after yet
        self._since_check = 0  # micro-batches, since a check has agreed in one
        self._taken_back = 0  # of this window
        self._doubt = ""  # why lambdas that were merged into this window are not shown to be right
        self._record: tuple[Tensor, Tensor] | None = None  # the last one's numerators and output gradients
        self._batchnorms: list[nn.Module] = []
        self._mixed = False  # a BatchNorm in train mode was seen in this window
        self._warned = False
        self._raised: Warning | None = None  # by a warning, where it could not be handed on
        self._served = False  # the shortcut has been used
        self._model: nn.Module | None = None
        self._holding: Holding | None = None
        self._counts: TapCounts | None = None
        if model is not None:
            self._watch(model)

    # ---- what it needs

    def needs(self) -> Needs:
        """Say what the metric taps: the gradient at the first layer's output, at the model's output and at its
        input."""
        layer = self._first.target
        taps: dict[Tap, str] = {self._first: layer or FIRST_LAYER, self._last: self._last.target, self._at_input: layer}
        return Needs(
            taps=taps,
            single_sample=self._single_sample(),
            gradients=self._virtual_bias is not None,
            used_gradients=self._virtual_bias is not None,
        )

    def counted(self, counts: TapCounts) -> None:
        """Take the counts of the forward passes that this metric taps."""
        self._counts = counts

    def _single_sample(self) -> SingleSample | None:
        """Return the receiver of the bias shortcut; None where a layer or an output is named or the output is a vector,
        since the shortcut reads the ends of the model."""
        named = self._input is not None or self._output is not None
        if named or not self._fast or self._quantity == "residual":
            return None
        return SingleSample(self._cores, on_served=self._forget_record, agrees=self._agrees)

    def prepare(self, optimizers: Sequence[Optimizer], scaler: Any, window_blocks: int) -> None:
        """Take the optimizers whose steps move the first bias, and how many blocks a window has."""
        self._open = BlockWindow(PLACES, window_blocks)
        self._cores = self._open.cores
        self._bias.prepare(optimizers, window_blocks)
        if self._virtual_bias is not None:
            self._virtual_bias.prepare(scaler, window_blocks)

    def bind(self, model: nn.Module) -> None:
        """Turn to a model: find its input, output and first layer, and the layers in which samples mix."""
        if self._numbers is not None:
            raise RuntimeError(
                "this Lipschitz is a copy, which holds the numbers of compute() and no model; to go on, make a new one "
                "and load_state_dict() of the original"
            )
        self._model = model
        self._holding = Holding(self._held, model=model)
        self._first.target, self._at_input.choice = find_input(model, self._input)
        self._last.target, self._last.choice = find_output(model, self._output)
        self._first.begins = begins_with_layer(model)
        self._at_input.bind(model)
        self._numerators.start()
        if self._virtual_bias is not None:
            self._virtual_bias.bind(model)
            if self._first.module is not None:  # bound again
                self._virtual_bias.found(self._first.name, self._first.module)
        self._batchnorms = [module for _, module in named_modules(unwrap(model)) if isinstance(module, AnyBatchNorm)]

    def _check_output(self, output: Tensor) -> None:
        """Raise ValueError when this output does not have the one value per sample that it should have."""
        values, rows = output.numel(), output.shape[0] if output.dim() else 1
        if not self._resolved and values:
            self._resolved = "scalar" if values == rows else "residual"
        if self._resolved == "residual" or values == rows:
            return
        raise ValueError(
            f"output: {self._last.place} has shape {list(output.shape)}, but one value per sample is needed, [B] or "
            "[B, 1]. Choose: output='<module>' with such an output, or quantity='residual' for a one-sided bound on "
            "vector outputs"
        )

    @property
    def per_sample(self) -> PerSample:
        """Values of r and lambda of every sample of the last recorded micro-batch (batch-1 steps that the shortcut
        serves keep none)."""
        if self._record is None:
            raise RuntimeError(
                "no micro-batch at hand: none was recorded yet, or the last one was served by the batch-1 shortcut"
            )
        ratios = _ratios(*self._record, self._last.smallest)
        return PerSample(ratios[0], ratios[1])

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what makes a copy or a pickle: the metric as it is before it is bound, and the open window's
        numbers."""
        numbers = self.finalize() if self._model is not None else self._numbers
        return _copy_of, (type(self), self._settings, numbers, self.off)

    def merge(self, other: Lipschitz) -> None:
        """Add the open window of another Lipschitz metric (of another rank, say) to this one's, with what its numbers
        are worth."""
        if not isinstance(other, Lipschitz):
            raise TypeError(f"other: expected a Lipschitz, got {type(other).__name__}")
        if other._numbers is not None:
            raise ValueError(
                "other: this Lipschitz is a copy, which holds the numbers of compute() and no distributions; merge the "
                "original"
            )
        if self._resolved and other._resolved not in ("", self._resolved):
            raise ValueError(f"other: its quantity is {other._resolved!r}, this one's is {self._resolved!r}")
        self._resolved = self._resolved or other._resolved
        self._open.merge(other._open)
        self._mixed |= other._mixed
        self._moved |= other._weight_moved()
        self._taken_back += other._taken_back
        self._doubt = self._doubt or other._at_input.unproved or other._doubt


def _copy_of(kind: type[Lipschitz], settings: dict[str, Any], numbers: MetricResult | None, off: str) -> Lipschitz:
    copied = kind(**settings)
    copied._numbers, copied.off = numbers, off
    return copied


def _ratios(numerators: Tensor, output_grad: Tensor, smallest: float) -> Tensor:
    """Return r, lambda, and r where there is a lambda, [3, B]; NaN where the output's gradient is 0, not finite or
    below `smallest`."""
    eps = output_grad.abs()
    return torch.where((eps > 0) & (eps >= smallest) & eps.isfinite(), numerators / eps, math.nan)
