"""The metric PerSampleGradNorms: exact norms of single samples' gradients, during ordinary training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lipcore.capture.layers.batch_of_one import Sink
from lipcore.capture.layers.layer_pass import LayerRecord
from lipcore.metric.protocol import BatchOfOne, PlanLine
from lipcore.metric.results import MetricResult
from lipcore.metric.values import Value
from lipcore.models.arguments import check_choice
from lipcore.per_sample.added_up import ASK, whole_norms
from lipcore.per_sample.arguments import OnUnsupported, check_arguments, layer_options
from lipcore.per_sample.gram import gram_of
from lipcore.per_sample.loss_factor import LossFactor
from lipcore.per_sample.loss_reduction import LossReduction, Reduction, Terms
from lipcore.per_sample.methods import LayerMethod
from lipcore.per_sample.metric import PerSampleMetric
from lipcore.per_sample.pass_norms import Norms, PassNorms
from lipcore.per_sample.rank_part import PerSamplePart
from lipcore.per_sample.results import add_norms
from lipcore.per_sample.scores.sample_scores import SampleScores
from lipcore.per_sample.total import total_of
from lipcore.per_sample.weighted_sum import (
    Coefficients,
    add_into,
    check_set_grad,
    coefficients_of,
    set_gradients,
    weighted_sums,
)


class PerSampleGradNorms(PerSampleMetric):
    r"""Norms :math:`n_i = \|\nabla_\theta\, l_i\|_2` of single samples' gradients, exact, from the ordinary backward
    pass.

    :math:`l_i` is the sum of sample i's loss terms before any reduction over the batch. A backward pass brings a
    multiple of :math:`\nabla l_i` that depends on the loss reduction, so you have to name that: with
    ``loss_reduction="sum"`` what comes is taken as it is; with ``"mean"`` it is multiplied by B, or by `loss_terms`
    where the mean is over something else (tokens). There is one record per backward pass; a sample is a row of the
    batch in one forward pass. The gradients of a weight that is used more than once (a module called twice, an
    embedding tied to the head) are joined before the norm is taken. Training stays bit for bit the same, except with
    ``fused=True``.

    A penalty on the parameters does not belong in the loss; use the optimizer's weight decay. The norms are without it,
    because it is no sample's, but the noise scale is wrong by it. Passes that prove themselves add up the samples'
    gradients and compare them with the parameters': what else reaches those (a penalty, a use of the parameter in the
    loss, a hook that changes its gradient) is said in a warning and in :attr:`unproved`. Losses and models that mix
    samples have no per-sample gradient.

    Alone, it needs the model and nothing else::

        with lipcore.PerSampleGradNorms(model, loss_reduction="mean") as norms:
            loss_fn(model(x), y).backward()
            norms.per_sample

    In a Monitor it makes windows. They hold the distributions of the norms in total and per layer (``norm``), and
    the gradient noise scale :math:`B_{simple} = \mathrm{tr}\,\Sigma / |G|^2` of McCandlish et al. (2018) with its two
    unbiased estimators (``noise_scale``, ``gradient_noise``, ``gradient_sq``), which takes in all micro-batches of a
    step. Steps whose gradient is not the mean of their samples' gradients are counted, with the reason, in
    ``details["noise_scale_skipped"]``.

    Args:
        model: only when the metric stands alone.
        loss_reduction: "mean" or "sum": what your loss does over the batch. "auto": read f from the graph of the loss,
            and g, the gradient that comes to the loss, in its backward pass: what comes of a sample is multiplied by
            f / g. The loss is the one that :meth:`set_loss` or ``monitor.log(loss=loss)`` was called with before
            ``loss.backward()``, else what the model returns as ``loss``. f cannot be found from the gradients alone.
        loss_terms: with "mean": how many terms were averaged, when that is not B: a number, a tensor, a function that
            is called after every backward pass, the name of a keyword that the model is called with (a trainer's
            "num_items_in_batch"), or a function of its (arguments, keywords). For cross-entropy over tokens: how many
            targets are not ignored.
        scale: what else the loss was multiplied by (1/k under gradient accumulation over k micro-batches).
        every_steps: record in every k-th optimizer step (of a Monitor's clock); the other steps cost next to nothing.
        on_unsupported: "error", or "skip" to measure the parameters that are covered and leave out the others.
        batch_dim: batch dimension of the model's input and of activations [T, B, features]; 0 or 1.
        cu_seqlens: packed sequences of different lengths, [total, features]: name of the model's keyword argument that
            has the boundaries (int [B + 1]), or a function of (arguments, keywords) that returns them. The norms are
            per document then.
        broadcast: names of layers that are called without the batch dimension (position embeddings on [T] or [1, T]).
            Their output is expanded to [B, T, ...] at once, so nothing may be put in front of it (unsqueeze(0)).
        methods: {layer name: "gram" or "direct"} to override the cost rule; "estimate" for a Linear on sequences takes
            its squared norms from 16 random probes (:func:`lipcore.functional.linear_norms_sq_estimate`), unbiased,
            with :attr:`standard_error`.
        fused: take the norms inside Linear's weight gradient, which lipcore then computes itself: nearly free on long
            sequences, but the gradient is summed in another order.
        normalized: also measure :attr:`normalized`, r_i of every tapped layer; needs one output per sample.
        noise_scale: also estimate the gradient noise scale.
        prove: let passes prove themselves, the first one and ever fewer later ones: backward passes through its graph
            from weighted outputs show, bit for bit, that row i of every layer's gradient is that of sample i, and two
            samples are run among copies of themselves. This finds samples that are mixed, moved, or looked for in the
            wrong dimension. Hooks on tensors and on modules' backward passes see those passes too. What is not proved
            is not labelled exact, and :attr:`unproved` and ``details["not_proved"]`` say why.
        output: where those backward passes begin: the name of the module whose output has the batch dimension, for
            models that return their loss alone; or the key or attribute of a part of what the model returns, or a
            function of that. Default: all that it returns. What comes behind it counts as the loss.
        batch_of_one: "exact" (default): batches of one sample are tapped like others. "fast": their norms are read from
            the parameters' gradients, after three proofs that these are the same and with more proofs now and then.
            What else comes to reach those gradients (a penalty on parameters) may be noticed by the next proof only.
            With ``loss_reduction="auto"`` they are tapped.
        max_replay_bytes: parameters that no layer's rule covers are measured from the autograd graph, in eager mode, by
            products and sums where they meet the batch or by running nodes once more for every sample (:meth:`plan`
            says which); the gradients of single samples of a parameter may take so many bytes at once (default: 1 GiB),
            and so many may be kept in one pass where a checkpoint would keep none. 0: such parameters are refused, or
            skipped.
        max_replay_flops: of these, the replays for one parameter may take so many floating-point operations in one
            recorded pass: B times those of the nodes that its gradient comes through, as :meth:`plan` shows them. Of a
            product of a [M, K] and b [K, N] a node takes 2MKN for each gradient, of a convolution 2 per element of the
            weight and position of its output, of attention 10 per query, key and feature; of anything else 1 per
            element of its output and of the gradients that it brings. Nodes that several parameters share count for
            each. Products and sums of rows count nothing; passes that prove themselves take more. 0: nothing is
            replayed. Default: None, any number, since replays beyond a bound of time are slow where those beyond a
            bound of memory end the training; the norms are right either way.
        scaler: a torch.amp.GradScaler, when the metric stands alone (a Monitor has its own).
        keep_factors: keep each layer's input and output gradient from the backward pass until the next forward pass
            begins, for :meth:`weighted_sum` and :meth:`gram`: about as much memory as the activations themselves
            (:meth:`plan` says how much after the first pass). Eager mode only; batches of one are tapped.

    Raises:
        ValueError: a trainable parameter that no rule covers, named with the ways out; an argument of another kind or
            range than described.
    """

    name = "per_sample_grad_norm"
    _last_norms: Callable[[], PassNorms]

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        loss_reduction: LossReduction,
        loss_terms: Terms = None,
        scale: float = 1.0,
        every_steps: int = 1,
        on_unsupported: OnUnsupported = "error",
        batch_dim: int = 0,
        cu_seqlens: str | Callable[[tuple[Any, ...], dict[str, Any]], Tensor] | None = None,
        broadcast: Sequence[str] = (),
        methods: Mapping[str, LayerMethod] | None = None,
        fused: bool = False,
        normalized: bool = False,
        noise_scale: bool = True,
        prove: bool = True,
        output: str | Callable[[Any], Any] | None = None,
        batch_of_one: BatchOfOne = "exact",
        max_replay_bytes: int = 1 << 30,
        max_replay_flops: int | None = None,
        scaler: Any = None,
        keep_factors: bool = False,
    ) -> None:
        reduction = Reduction(loss_reduction, loss_terms, scale, batch_dim)
        check_choice("batch_of_one", batch_of_one, get_args(BatchOfOne))
        if not isinstance(keep_factors, bool):
            raise TypeError(f"keep_factors: expected True or False, got {keep_factors!r}")
        check_arguments(every_steps, on_unsupported, batch_dim, broadcast, methods, alone=model is not None)
        options = layer_options(
            reduction,
            batch_dim=batch_dim,
            cu_seqlens=cu_seqlens,
            broadcast=broadcast,
            on_unsupported=on_unsupported,
            prove=prove,
            output=output,
            max_replay_bytes=max_replay_bytes,
            max_replay_flops=max_replay_flops,
            methods=dict(methods or {}),
            fused=fused,
            normalized=normalized,
            fast_batch_of_one=batch_of_one == "fast",
            keep_factors=keep_factors,
        )
        self._added_up: tuple[PassNorms, PassNorms] | None = None  # of a rank's parts, and over all ranks
        super().__init__(
            *(model, reduction, options),
            every_steps=every_steps,
            noise_scale=noise_scale,
            columns=1,
            make_scores=SampleScores,
            scaler=scaler,
        )

    def _numbers_of(self, record: LayerRecord, factor: LossFactor) -> PassNorms:
        parts = None if self._capture is None else self._capture.parts
        return PassNorms(record, factor, self._layer_index, total_of(self._capture), parts)

    def _add_numbers(self, result: MetricResult, note: str, doubt: str) -> None:
        estimated = [layer for layer, method in self._methods.items() if method == "estimate"]
        add_norms(result, self._layers, total_of(self._capture), self._window.merged(), estimated, note, doubt)

    def _part_of(self, agreed: dict[str, Any], **found: Any) -> PerSamplePart:
        shared, in_parts = self._window.shared, self._window.in_parts
        estimated = [layer for layer, method in self._methods.items() if method == "estimate"]
        agreed |= {"estimated": estimated, "noise_scale": shared is not None}
        if in_parts is not None:
            agreed |= {"parts": len(in_parts.ranks.ranks)}
        part = PerSamplePart(agreed, **found)
        if shared is not None:
            part.noise, part.noise_off = shared.part([name for name, *_ in self._held()], self._window.steps)
            part.averaged = shared.averaged
        if in_parts is None:
            return part
        part.parts = in_parts.ranks
        part.rows, part.rows_off = in_parts.window(), in_parts.off
        return part

    def _shown_rows(self) -> list[tuple[str, dict[str, Value]]]:
        total, measured = total_of(self._capture), self._measured
        pairs = zip([*self._layers, total], self._window.merged(), strict=False)
        return [(p, distribution.reduced("exact")) for p, distribution in pairs if p == total or p in measured]

    def _own_plan(self) -> list[PlanLine]:
        rows = self._window.in_parts
        if rows is not None:  # and no factors are kept
            until = f"of {len(rows.ranks.ranks)} ranks, until global_window() adds them up"
            return [PlanLine("squares of parts", until, rows.nbytes)]
        if self._options.keep_factors:
            factors = None if self._last is None else self._last.record.factors
            said = "from the backward pass to the next forward pass" + ("" if factors else ", once one is recorded")
            return [PlanLine("kept factors", said, 0 if factors is None else factors.nbytes)]
        return []

    def _single_sink(self, names: tuple[str, ...]) -> Sink | None:
        """Return where the compiled code may write the norms of these parameters' layers, when nothing else asks for
        them."""
        if self._next.ever or self._scaler is not None or not self._reduction.is_constant:
            return None
        index = [self._layer_index.number[self._layer_index.layer_of[name]] for name in names]
        factor = self._reduction.factor(1, None)
        return None if factor is None else (index, self._window.distributions.cores, factor.number**2)

    # ---- the last micro-batch

    @property
    def per_sample(self) -> Tensor:
        """Norms n_i over all measured parameters, float64 [B], of the last backward pass. NaN, with the reason in
        :attr:`broken`, where that pass was not recorded (autograd.grad, backward(inputs=), a step between those of
        `every_steps`, after recording has stopped)."""
        square = self._capture.single.total() if self._stands_alone and self._capture is not None else None
        if square is not None:  # of a batch of one, at a tenth of what a record costs
            return torch.tensor([math.sqrt(square)], dtype=torch.float64, device="cpu")
        return self._whole_norms("per_sample").per_sample

    @property
    def per_layer(self) -> Norms:
        """Norms per layer, float64 [B] each; NaN, with a reason in ``.reasons``, where nothing was recorded."""
        return self._whole_norms("per_layer").per_layer

    @property
    def per_parameter(self) -> Norms:
        """Norms per parameter, float64 [B] each; NaN, with a reason in ``.reasons``, where nothing was recorded."""
        return self._whole_norms("per_parameter").per_parameter

    def sync_norms(self, *, timeout: float = 60) -> Tensor:
        """Add up the squares of the last backward pass over the ranks that hold parts of the parameters (tensor
        parallelism), all of which call it, and return :attr:`per_sample`. It, :attr:`per_layer` and
        :attr:`per_parameter` are then those of whole gradients, on each of the ranks. Windows and scores need no such
        call: ``global_window()`` and :meth:`sync_scores` add up what they have.

        Args:
            timeout: seconds to wait for the other ranks.

        Returns:
            Norms n_i, float64 [B]; those that this rank has anyway, where it holds whole parameters. NaN, with the
            reason in :attr:`broken`, where the pass was not recorded.

        Raises:
            RuntimeError: a rank has not come in time, or is at another step. No collective was started.
            ValueError: the ranks have recorded other samples, or have not seen the same of them.
        """
        last = self._last_norms()
        if last.parts is None:
            return last.per_sample
        whole = whole_norms(last, f"{self.name}.sync_norms()", self._window.steps, timeout)
        self._added_up = last, whole
        return whole.per_sample

    def _whole_norms(self, asked: str) -> PassNorms:
        """Return the last norms; RuntimeError where this rank has those of parts."""
        last = self._last_norms()
        if last.parts is None or last.record.broken:
            return last
        if self._added_up is not None and self._added_up[0] is last:
            return self._added_up[1]
        raise RuntimeError(ASK.format(asked, ", ".join(map(str, last.parts.ranks))))

    @property
    def standard_error(self) -> Norms:
        """Standard errors of estimated norms, float64 [B], by layer with ``methods={layer: "estimate"}``: that of
        :attr:`per_layer`, as the probes show it; and ``["total"]``, or ``["total_of_measured"]`` where trained
        parameters are left out: that of :attr:`per_sample`. Empty where all norms are exact."""
        last = self._last_norms()
        estimated = [layer for layer, method in self._methods.items() if method == "estimate"]
        if last.record.broken and estimated:
            return last.missing([*estimated, last.total])
        return last.standard_error

    @property
    def normalized(self) -> Norms:
        r"""Normalised gradient norms per layer, float64 [B] each: :math:`r_i = \|\partial L/\partial u_i\| /
        |\partial L/\partial\hat y_i|` with u the layer's output; every factor of the loss cancels. NaN where the
        output's gradient is 0 or not finite."""
        last = self._last_norms()
        if last.record.broken and self._options.normalized:
            return last.missing(self._layers)
        return last.normalized

    def weighted_sum(
        self, coefficients: Coefficients, *, into: dict[str, Tensor] | None = None, set_grad: bool = False
    ) -> dict[str, Tensor]:
        r"""Compute :math:`\sum_i c_i \nabla l_i` of the last backward pass, without another pass; needs
        ``keep_factors=True``, and to be called before the next forward pass.

        Args:
            coefficients: c, a floating-point tensor [B] on the norms' device, or a mask of bool there (1 and 0); or a
                function that takes :attr:`per_sample` to them, as ``lambda n: lipcore.clip_factors(n, 1.0)``. They are
                constants: no gradient flows to them.
            into: what this has returned for earlier micro-batches of a step, or an empty dict: the sums are added to it
                in place.
            set_grad: also make the sums (with what was in `into`) the parameters' ``.grad``, in place of the plain
                gradient. On one rank, without a GradScaler, with all trained parameters measured.

        Returns:
            The sum per measured parameter, in its shape and in float32 at least; `into` where that was given.
            Parameters that no gradient came to are not in it. As :attr:`per_sample`, the sums are of :math:`l_i`
            itself: with ``loss_reduction="mean"`` divide them by B for what ``.grad`` would be. NaN where a sample with
            a coefficient other than 0 has no norm, and throughout for a pass that was not recorded; reasons are in
            ``per_parameter.reasons`` and :attr:`broken`.

        Raises:
            RuntimeError: no factors were kept, they were released, or written into by code of yours; the backward pass
                was that of several forward passes; `set_grad` where there are no sums, several ranks or a GradScaler.
            TypeError, ValueError: an argument of another shape, device or kind; `set_grad` with trained parameters that
                are not measured.
        """
        norms = self._last_norms_with_factors("weighted_sum")
        coverage = self._watched().coverage
        if set_grad:
            check_set_grad(coverage, norms.record.broken, self._scaler)
        sums = weighted_sums(norms, coefficients_of(coefficients, norms), coverage.measured())
        sums = sums if into is None else add_into(into, sums)
        if set_grad:
            set_gradients(coverage, sums)
        return sums

    def gram(self) -> Norms:
        r"""Compute :math:`\langle \nabla l_i, \nabla l_j \rangle` for the samples of the last backward pass: per layer,
        and over all measured parameters as ``["total"]`` (``["total_of_measured"]`` where trained ones are left
        out), float64 [B, B] each. Needs ``keep_factors=True``, and to be
        called before the next forward pass.

        Returns:
            Symmetric matrices by layer; NaN in the rows and columns of samples without a norm, and with a reason in
            ``.reasons`` where nothing was recorded.

        Raises:
            RuntimeError: as :meth:`weighted_sum`.
        """
        return gram_of(self._last_norms_with_factors("gram"))

    def _last_norms_with_factors(self, asked: str) -> PassNorms:
        if not self._options.keep_factors:
            raise RuntimeError(
                f"{asked}: this metric keeps no factors of the gradients; make it with keep_factors=True, which holds "
                "the layers' inputs and output gradients until the next forward pass"
            )
        norms = self._last_norms()
        if self._joint and norms is self._last:
            raise RuntimeError(
                f"{asked}: the last backward pass was that of several forward passes, and the factors of the last one "
                "alone are at hand; call backward() for each"
            )
        return norms
