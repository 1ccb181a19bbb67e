"""Local Lipschitz constants and the normalised first-layer gradient length, from the ordinary backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lipcore import _core
from lipcore.capture.taps.tap import FIRST_LAYER, Record, SingleSample, Tap
from lipcore.distributed.placed import local_of
from lipcore.lipschitz.bias_steps import BiasSteps
from lipcore.lipschitz.first_weight import singular_values_later
from lipcore.lipschitz.input_tap import ModelInputTap
from lipcore.lipschitz.numerators import Numerators
from lipcore.lipschitz.rank_part import LipschitzPart
from lipcore.lipschitz.taps import FirstLayerTap, OutputTap
from lipcore.lipschitz.targets import begins_with_layer, find_input
from lipcore.lipschitz.virtual_bias import VirtualBias
from lipcore.lipschitz.weight_in_parts import WeightInParts, is_in_parts, numbers_of, refusal, way_of
from lipcore.lipschitz.window_facts import Facts, Theorem
from lipcore.metric.blocks import Block, BlockWindow, added_blocks, empty_blocks
from lipcore.metric.distribution import observe_ratios, on_device
from lipcore.metric.handed_out import HandedOut, Withdrawable
from lipcore.metric.hook_warnings import warn_in_hook
from lipcore.metric.host_reads import OnDevice, TensorRead
from lipcore.metric.plan_lines import PlanLines
from lipcore.metric.protocol import BatchOfOne, Needs, PlanLine, TapCounts
from lipcore.metric.rank_distributions import RankDistributions
from lipcore.metric.rank_part import FSDP1_PIECES, Holding, RankPart
from lipcore.metric.results import Label, MetricResult
from lipcore.metric.standalone import StandaloneMetric
from lipcore.metric.state import check_version
from lipcore.models.arguments import check_choice, check_count
from lipcore.models.checks import has_statistics, mixes_samples
from lipcore.models.inputs import InputChoice, check_input_choice
from lipcore.models.named_output import check_output_choice, find_output
from lipcore.models.names import class_before_sharding, named_modules, unwrap, with_prefix
from lipcore.models.ranks import is_fsdp1
from lipcore.models.torch_internals import AnyBatchNorm

_PROBE = "follow fixed points in eval mode, monitor.probe(x, name), or use GroupNorm or LayerNorm"
_REPLACE = "put GroupNorm or LayerNorm in its place"
_LEAVE_OUT = (
    "follow fixed points in eval mode, monitor.probe(x, name), where samples are apart there, or leave out what mixes "
    "them"
)
# Distributions of a window: of r, of lambda, and of r where there is a lambda, for the sandwich.
_LAMBDA, _PAIRED, _PLACES = 1, 2, 3
_OF_LAMBDA = ("local_lipschitz", "sandwich")  # quantities that are made of the second and third


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
    _version = 1

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
        self._open = BlockWindow(_PLACES, 1)
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

    def _forget_record(self) -> None:
        if not self._served:
            self._open.mark()  # what the taps brought is right
        self._record, self._served = None, True

    def _agrees(self, r: float, local_lipschitz: float) -> bool:
        """Return whether the shortcut reads the values that the taps have just brought; warn where it does not."""
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
        if agrees:
            self._open.mark()
            self._handed_out.settle()
        elif self._served:
            self._take_back()
        return agrees

    def _take_back(self) -> None:
        """Drop what was read from the gradients since the last check, which the taps have found to be wrong."""
        self._served = False
        reason = (
            "the gradients of the first and last bias have come to hold more than the loss of one sample (a penalty on "
            "parameters?)"
        )
        count = self._open.take_back()
        self._taken_back += count
        self._handed_out.withdraw(f"unproved: a later proof failed: {reason}")
        self._warn(
            f"{reason}: {count} values that were read from them since the last check are taken back, results that were "
            "made of some of them are NaN (windows of the history too), and from here on they are not used"
        )

    def prepare(self, optimizers: Sequence[Optimizer], scaler: Any, window_blocks: int) -> None:
        """Take the optimizers whose steps move the first bias, and how many blocks a window has."""
        self._open = BlockWindow(_PLACES, window_blocks)
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
        self._holding = Holding(self._held)
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

    # ---- what it observes

    def observe_record(self, record: Record) -> None:
        """Take in one micro-batch that has come through the taps."""
        output_grad = record[self._last.key]
        if self._batchnorms:
            self._check_mixing()
        numerators = self._numerators.of(record, mixed=self._mixed)
        self._since_check = 0 if self._heed_checks() else self._since_check + 1
        if self._raised is not None:
            error, self._raised = self._raised, None
            raise error
        if numerators is None:
            return
        self._record = numerators, output_grad
        self._observe(numerators, output_grad, self._open.open, self._cores)
        if self._served:  # what the taps bring is right, and stays
            proved = self._open.proved
            self._observe(numerators, output_grad, proved, [distribution.core for distribution in proved])

    def _observe(self, numerators: Tensor, output_grad: Tensor, block: Block, cores: list[Any]) -> None:
        if numerators.is_cpu:
            _core.observe_ratios(numerators, output_grad, cores, self._last.smallest)
        else:
            observe_ratios(numerators, output_grad[0], self._last.smallest, block)

    def observe_gradients(self) -> None:
        if self._virtual_bias is not None:
            self._virtual_bias.observe_gradients()

    def observe_used_gradients(self, optimizer: Optimizer) -> None:
        if self._virtual_bias is not None:
            self._virtual_bias.observe_used_gradients(optimizer)

    def observe_step(self) -> None:
        """Count an optimizer step that was just made."""
        self._bias.observe()
        if self._virtual_bias is not None:
            self._virtual_bias.observe_step()

    @property
    def step_call(self) -> Callable[[], object]:
        """The function that counts a step, for loops whose steps take microseconds."""
        return self._bias.observe if self._virtual_bias is None else self.observe_step

    def _heed_checks(self) -> bool:
        """Label the values where samples mix, and drop the lambdas that a check has found to be wrong; return whether
        one has agreed."""
        if self._at_input.mixing and not self._mixed:
            self._mixes("the output of a sample depends on other samples of the batch", _LEAVE_OUT)
        found, at_input = self._numerators, self._at_input
        wrong = found.disagreed
        if at_input.strayed:
            wrong = f"the output has come to depend on the input past '{self._first.name}'"
        agreed = found.agreed and not wrong
        found.agreed, found.disagreed, at_input.strayed = False, "", False
        if agreed:
            self._unchecked.settle()
        if wrong:
            self._drop_lambdas(wrong)
        return agreed

    def _drop_lambdas(self, why: str) -> None:
        """Drop the lambdas since the last check that agreed, in results that have been handed out too."""
        known = bool(self._open.merged()[_LAMBDA].count or self._unchecked)
        self._open.drop((_LAMBDA, _PAIRED))
        self._unchecked.withdraw(f"a later check did not agree: {why}", _OF_LAMBDA)
        if known:
            self._warn(
                f"local_lipschitz by W_1 of '{self._first.name}' is not the gradient at the model's input: {why}. What "
                "came since the last check that agreed is dropped, and NaN in windows that have closed"
            )

    def _check_mixing(self) -> None:
        if any(mixes_samples(module) for module in self._batchnorms):
            lasting = not all(map(has_statistics, self._batchnorms))
            self._mixes(f"{self._mixer} mixes samples", _REPLACE if lasting else _PROBE)

    @property
    def _mixer(self) -> str:
        """Name of what mixes samples, where something does."""
        if not self._batchnorms:
            return "the model"
        kept = all(map(has_statistics, self._batchnorms))
        return f"BatchNorm {'in train mode' if kept else 'without running statistics'}"

    def _mixes(self, why: str, way_out: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(
                f"{why}, so per-sample gradients are not those of single samples: lipschitz values are heuristic "
                f"(directly behind the first layer they lose their meaning). For exact ones {way_out}"
            )
        self._mixed = True

    def _lose_first(self, reason: str) -> None:
        self._numerators.lose_first(reason)

    def _lambda_refused(self, reason: str) -> None:
        self._warn(f"lipcore turned local_lipschitz off: {reason}")

    def _virtual_bias_refused(self, reason: str) -> None:
        self._warn(f"lipcore does not follow the virtual bias: {reason}")

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
        ratios = _ratios(*self._record, self._last.smallest)
        return PerSample(ratios[0], ratios[1])

    # ---- results

    def plan(self) -> PlanLines:
        """Return lines that say what is tapped, and by which rule."""
        if self.off:
            return PlanLines([PlanLine("off", self.off)])
        first = (
            f"'{self._first.name}' ({class_before_sharding(self._first.module).__name__})"
            if self._first.module is not None
            else "found at the first step"
        )
        what = {
            "scalar": "one value per sample",
            "residual": "any shape, one-sided bound",
            "": "one value per sample, or a one-sided bound where there are several",
        }[self._resolved]
        size = 3 * 2048
        weight = self._first.weight()
        size += weight.numel() * weight.element_size() if weight is not None else 0
        if self._numerators.first_off:
            first = f"off: {self._numerators.first_off}"
        lines = [PlanLine("first layer", first if self._by_input else f"{first}, {self._lambda_rule}", size)]
        if self._by_input:
            lines.append(PlanLine("lambda", self._lambda_rule))
        if is_in_parts(self._first.module, weight) and self._resolved != "residual":
            lines.append(self._plan_of_parts(weight))
        return PlanLines([*lines, PlanLine("output", f"{self._last.place}: {what}")])

    @property
    def _by_input(self) -> bool:
        """True where lambda is not taken by W_1."""
        return bool(self._at_input.off) or self._at_input.by_product is False

    @property
    def _lambda_rule(self) -> str:
        """Words for how lambda is taken."""
        return self._at_input.rule if self._by_input else self._first.rule

    def _plan_of_parts(self, weight: Any) -> PlanLine:
        """Return a line that says what the singular values of a W_1 in parts cost."""
        assert self._first.module is not None
        way, shape = way_of(self._first.module, weight), tuple(weight.shape)
        off, numbers = refusal(shape, way, asked=self._sigma), numbers_of(shape, way)
        if off:
            return PlanLine("sigma of W_1", f"off: {off}")
        return PlanLine("sigma of W_1", f"ranks add up {numbers:,} numbers ({8e-6 * numbers:.3g} MB) in each window")

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what makes a copy or a pickle: the metric as it is before it is bound, and the open window's
        numbers."""
        numbers = self.finalize() if self._model is not None else self._numbers
        return _copy_of, (type(self), self._settings, numbers, self.off)

    def on_device(self) -> list[OnDevice]:
        if self._numbers is not None:
            return []
        found = [*on_device([*self._open.open, *self._open.proved]), *self._numerators.on_device()]
        weight = self._first.weight()
        if weight is not None and not weight.is_cpu and self._weight_before is not None:
            found.append(self._weight_stood)
        return found

    def finalize(self) -> MetricResult:
        """Return the open window's numbers; the class says what they are."""
        if self._numbers is not None:
            return self._numbers
        ratios, lambdas, paired = self._open.merged()
        result = self._facts(sandwich=bool(paired.count)).result(ratios, lambdas, paired)
        self._follow([result], bool(lambdas.count))
        return result

    def _follow(self, handed_out: Sequence[Withdrawable], has_lambdas: bool) -> None:
        """Have checks to come reach what is handed out."""
        for each in handed_out:
            if self._served and self._open.unproved:
                self._handed_out.add(each)
            if has_lambdas and self._since_check:
                self._unchecked.add(each)

    def rank_part(self) -> RankPart | str:
        """Return what the open window adds to that of all ranks, or why there is nothing to add."""
        if self._model is None or self._holding is None:
            return "it watches no model: this is a copy, or no Monitor has bound it"
        if is_fsdp1(self._model):
            return FSDP1_PIECES
        distributions = RankDistributions(self._open.merged())
        part = LipschitzPart.of(self._facts(sandwich=True), self._holding, distributions)
        self._follow([part, part.empty], True)
        return part

    def _held(self) -> list[tuple[str, str, Tensor]]:
        """Return name, group and tensor of all parameters: ranks with others train other models."""
        found: dict[int, tuple[str, str, Tensor]] = {}
        for module_name, module in named_modules(self._model) if self._model is not None else ():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    name = with_prefix(self.prefix, with_prefix(module_name, key))
                    found.setdefault(id(parameter), (name, "", parameter))
        return list(found.values())

    def _facts(self, *, sandwich: bool) -> Facts:
        """Return what is known of the open window beside its distributions; `sandwich`: W_1 is asked for."""
        self._numerators.settle()
        self._heed_checks()
        quantity = self._resolved or self._quantity
        label: Label = "one-sided" if quantity == "residual" else "exact"
        note = self._last.of_values if quantity == "residual" else ""
        if self._mixed:
            label, note = "heuristic", f"{self._mixer} mixes samples" + f"; {note} where nothing mixes" * bool(note)
        off, lambda_note = self._at_input.off or self._at_input.suspended, note
        if not self._at_input.is_vector and isinstance(self._first.module, nn.Embedding):
            where = f"at the output of Embedding '{self._first.name}': the input holds integers"
            off, lambda_note = "", f"{note}; " * bool(note) + where
        return Facts(
            name=self.name,
            first_layer=with_prefix(self.prefix, self._first.name),
            place=with_prefix(self.prefix, self._last.place),
            quantity=quantity,
            label=label,
            note=note,
            first_off=self._numerators.first_off,
            lambda_off=off,
            lambda_note=lambda_note,
            lambda_seldom="" if self._lambda_rule.endswith("every micro-batch") else self._lambda_rule,
            unproved=self._at_input.unproved or self._doubt,
            theorem=self._theorem() if sandwich else None,
            first_bias=self._first_bias() if self._first.module is not None else None,
            unrecorded=None if self._counts is None else self._counts.unrecorded,
            because=[] if self._counts is None else list(self._counts.refused),
            taken_back=self._taken_back,
            add_others=self._add_virtual_bias,
        )

    def _add_virtual_bias(self, result: MetricResult) -> None:
        if self._virtual_bias is not None:
            self._virtual_bias.add_to(result)

    def _theorem(self) -> Theorem | None:
        """Return W_1 as it is now, for the sandwich; None where there is none to speak of."""
        module, weight = self._first.module, self._first.weight()
        if module is None or isinstance(module, nn.Embedding) or self._resolved != "scalar":
            return None
        if weight is not None and is_in_parts(module, weight):
            return self._theorem_in_parts(module, weight)
        if weight is None or not self._at_input.by_product:
            return Theorem(None)
        before = self._weight_before if self._weight_is_as_before() else None
        sigma = singular_values_later(module, weight, self._first.batch_shape, before)
        return None if sigma is None else Theorem(sigma, tuple(weight.shape), self._weight_moved())

    def _theorem_in_parts(self, module: nn.Module, weight: Tensor) -> Theorem | None:
        """Return this rank's part of W_1 as it is now; None where the layer computes W_1 of parameters of its own."""
        name = next((name for name, _, parameter in self._held() if parameter is weight), None)
        if name is None:
            return None
        parts = WeightInParts.of(name, module, weight, self._first.batch_shape, asked=self._sigma)
        alone = bool(self._at_input.by_product) and not self._at_input.off
        return Theorem(None, parts.shape, self._weight_moved(), parts, alone)

    def _goes_on(self) -> bool:
        """Return whether there is something to measure without r and lambda: the singular values of a W_1 in parts."""
        scalar = self._resolved == "scalar"  # what the theorem is about
        return self._sigma and scalar and is_in_parts(self._first.module, self._first.weight())

    def _first_bias(self) -> dict[str, Any]:
        """Return what Corollaries 2 and 3 ask of the first layer and its bias, for lipcore.theory to check; without
        the number of samples."""
        assert self._first.module is not None
        shape = self._first.batch_shape
        own = f"{self._first.name}.bias" if self._first.name else "bias"
        return {
            "parameter": with_prefix(self.prefix, own),
            "layer": class_before_sharding(self._first.module).__name__,
            "rows_per_sample": None if shape is None else math.prod(shape[1:-1]),
            **self._bias.details(),
        }

    def rebind(self) -> None:
        """Bind the same model again, after its modules have changed."""
        self._open.mark()  # a check to come is about another model
        self._unchecked.settle()
        self._handed_out.settle()
        if self._model is not None:
            self.bind(self._model)

    def reset(self) -> None:
        """Start a new window."""
        self._open.reset()
        self._mixed, self._moved, self._doubt = False, False, ""
        self._taken_back = 0
        self._at_input.start_window()
        self._bias.reset()
        if self._virtual_bias is not None:
            self._virtual_bias.reset()
        self._remember_weight()

    def advance(self) -> None:
        """Slide the window by a block. Its labels (mixed samples, a first layer that moved) count from the first block
        that they were true of."""
        if self._open.blocks == 1:
            self.reset()
            return
        self._open.advance()
        self._at_input.start_window()
        self._moved = self._weight_moved()
        self._bias.advance()
        if self._virtual_bias is not None:
            self._virtual_bias.advance()
        self._bias.find(self._model, self._first.module)

    def _remember_weight(self) -> None:
        """Keep W_1 at the window's start, to tell at its close whether Theorem 1 can be stated with one W_1."""
        weight = local_of(self._first.weight())
        self._weight_before = weight.detach().clone() if weight is not None else None
        self._bias.find(self._model, self._first.module)

    def _weight_moved(self) -> bool:
        known = self._weight_before is not None and self._first.weight() is not None
        return self._moved or (known and not self._weight_is_as_before())

    def _weight_is_as_before(self) -> bool:
        return bool(self._weight_stood.on_host())

    def _compare_weights(self) -> Tensor:
        """Return 1 where W_1 is what it was at the window's start, else 0; of a sharded one, where this rank's part is:
        DTensors would ask the other ranks."""
        weight: Tensor | None = local_of(self._first.weight())
        before = self._weight_before
        if weight is None or before is None or weight.shape != before.shape or weight.device != before.device:
            return torch.zeros((), dtype=torch.float64, device="cpu" if weight is None else weight.device)
        if weight.is_cpu:
            return torch.scalar_tensor(torch.equal(before, weight.detach()), dtype=torch.float64, device="cpu")
        return (before == weight.detach()).all().double()

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

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the window: its version, distributions, labels and the bias' steps."""
        virtual = {} if self._virtual_bias is None else {"virtual_bias": self._virtual_bias.state_dict()}
        return virtual | {
            "version": self._version,
            "quantity": self._resolved or "auto",
            "mixed": self._mixed,
            "weight_moved": self._weight_moved(),
            **self._open.state_dict("distributions"),
            "bias_steps": self._bias.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; where it does not fit, raise ValueError and change nothing."""
        check_version(state, self._version, "metric")
        quantity, own = state.get("quantity"), self._resolved or self._quantity
        known = ("auto", "scalar", "residual") if own == "auto" else ("auto", own)
        if quantity not in known:
            raise ValueError(f"quantity: the state has {quantity!r}, this metric has {own!r}")
        for key in ("mixed", "weight_moved"):
            if not isinstance(state.get(key), bool):
                raise ValueError(f"{key}: expected True or False, got {state.get(key)!r}")
        loaded = self._open.loaded(state, "distributions")
        bias_steps = state.get("bias_steps", [])  # a state of an earlier lipcore has none
        if not isinstance(bias_steps, list) or not all(map(_are_steps, bias_steps)):
            raise ValueError(f"bias_steps: expected [steps, lowest, highest rate] per block, got {bias_steps!r}")
        if self._virtual_bias is not None:
            self._virtual_bias.load_state_dict(state.get("virtual_bias", {}))
        self._open.become(loaded)
        if quantity != "auto":
            self._resolved = str(quantity)
        self._mixed, self._moved = state["mixed"], state["weight_moved"]
        self._bias.load(bias_steps)
        self._remember_weight()

    def empty_state(self, rest: dict[str, Any]) -> dict[str, Any]:
        """Return its state without samples."""
        return {**rest, "mixed": False, "weight_moved": False, **empty_blocks(rest, "distributions")}

    def add_states(self, begin: dict[str, Any], others: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the state with the samples of all of these, which is worth what the least of them is."""
        found = [begin, *others]
        labels = {key: any(state[key] for state in found) for key in ("mixed", "weight_moved")}
        known = [state["quantity"] for state in found if state["quantity"] != "auto"]
        quantity = known[0] if known else "auto"
        return {**begin, **labels, "quantity": quantity, **added_blocks(found, "distributions")}


def _copy_of(kind: type[Lipschitz], settings: dict[str, Any], numbers: MetricResult | None, off: str) -> Lipschitz:
    copied = kind(**settings)
    copied._numbers, copied.off = numbers, off
    return copied


def _are_steps(block: Any) -> bool:
    """Return whether a value is a block's number of steps with its lowest and highest rate."""
    numbers = isinstance(block, (list, tuple)) and all(isinstance(number, (int, float)) for number in block)
    return numbers and len(block) == 3 and math.isfinite(block[0]) and block[0] >= 0


def _ratios(numerators: Tensor, output_grad: Tensor, smallest: float) -> Tensor:
    """Return r, lambda, and r where there is a lambda, [3, B]; NaN where the output's gradient is 0, not finite or
    below `smallest`."""
    eps = output_grad.abs()
    return torch.where((eps > 0) & (eps >= smallest) & eps.isfinite(), numerators / eps, math.nan)
