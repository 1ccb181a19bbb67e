"""The metric PerSampleGradDots: inner products of single samples' gradients with given ones."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from lipcore.capture.layers.layer_pass import LayerRecord
from lipcore.capture.layers.tapped import TappedLayers
from lipcore.metric.protocol import PlanLine
from lipcore.metric.results import MetricResult
from lipcore.metric.values import Value
from lipcore.per_sample.arguments import OnUnsupported, check_arguments, layer_options
from lipcore.per_sample.loss_factor import LossFactor
from lipcore.per_sample.loss_reduction import LossReduction, Reduction, Terms
from lipcore.per_sample.metric import PerSampleMetric
from lipcore.per_sample.pass_dots import PassDots
from lipcore.per_sample.pass_norms import Norms
from lipcore.per_sample.rank_dots import DotsPart, UsedReferences
from lipcore.per_sample.references import Gradient, References
from lipcore.per_sample.scores.sample_scores import SampleScores
from lipcore.per_sample.scores.score_columns import ScoreColumns
from lipcore.per_sample.signed import add_dots, quantities, shown_dots
from lipcore.per_sample.total import total_of


class PerSampleGradDots(PerSampleMetric):
    r"""Inner products :math:`\langle \nabla_\theta\, l_i, r \rangle` of single samples' gradients with a gradient r
    that you give, exact, from the ordinary backward pass.

    With r the gradient of a validation loss, a sample with a large product is one that a small step on it would help
    that loss by (TracIn, Pruthi et al. 2020, at one checkpoint); a negative one pulls against it. For a Linear with
    input x and output gradient g the product is the sum of (x R^T) * g over the sample's rows, and so on for every
    layer's rule: no per-sample gradient is ever stored.

    Passes, proofs, micro-batches, windows and ids are those of :class:`PerSampleGradNorms`, and so are l_i and the
    arguments that are not described here. Eager mode only.

    Alone::

        reference = dict(zip(names, torch.autograd.grad(validation_loss, parameters)))
        with lipcore.PerSampleGradDots(model, reference=reference, loss_reduction="mean") as dots:
            loss_fn(model(x), y).backward()
            dots.per_sample

    In a Monitor it makes windows with the distributions of the products in total and per layer: ``dot``, or ``dot_0``,
    ``dot_1`` ... for several references, with the share of negative ones (``negative``).

    Args:
        model: only when the metric stands alone.
        reference: {parameter name: tensor of its shape} for all measured parameters, or a list of K such dicts: then
            numbers are [B, K] instead of [B]. Parameters without a gradient (None) may be in it where they are not
            measured. It is copied, in float32 at least; the state does not hold it.
        loss_reduction: "mean", "sum" or "auto", as of :class:`PerSampleGradNorms`.

    Attributes:
        scores: per sample id, when `ids` are given; with a list of references ``scores[k]``.

    Raises:
        TypeError, ValueError: a reference that does not fit the model; a trainable parameter that no rule covers; an
            argument of another kind or range than described.
    """

    name = "per_sample_grad_dot"
    _last_norms: Callable[[], PassDots]

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        reference: Gradient | Sequence[Gradient],
        loss_reduction: LossReduction,
        loss_terms: Terms = None,
        scale: float = 1.0,
        every_steps: int = 1,
        on_unsupported: OnUnsupported = "error",
        batch_dim: int = 0,
        cu_seqlens: str | Callable[[tuple[Any, ...], dict[str, Any]], Tensor] | None = None,
        broadcast: Sequence[str] = (),
        prove: bool = True,
        output: str | Callable[[Any], Any] | None = None,
        max_replay_bytes: int = 1 << 30,
        max_replay_flops: int | None = None,
        scaler: Any = None,
    ) -> None:
        self._references = References(reference)
        reduction = Reduction(loss_reduction, loss_terms, scale, batch_dim)
        check_arguments(every_steps, on_unsupported, batch_dim, broadcast, None, alone=model is not None)
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
            measure=self._measure,
        )
        columns = self._references.columns
        self._used: UsedReferences | None = None  # from when it is bound
        super().__init__(
            *(model, reduction, options),
            every_steps=every_steps,
            noise_scale=False,
            columns=2 * columns,
            make_scores=SampleScores if self._references.single else functools.partial(ScoreColumns, columns),
            scaler=scaler,
        )

    def _measure(self, factors: Any) -> dict[str, Tensor]:
        if self._used is not None:
            self._used.used = True
        return self._references(factors)  # those of now: others may be set at any time

    def tapped(self, layers: TappedLayers) -> None:
        self._check(self._references, layers)
        super().tapped(layers)
        if self._used is None:
            self._used = UsedReferences(self._references.bits(), self._window.blocks)

    def _check(self, references: References, layers: TappedLayers) -> None:
        coverage = layers.coverage
        references.check(dict(coverage.parameters()), coverage.measured())

    def set_reference(self, reference: Gradient | Sequence[Gradient]) -> None:
        """Multiply the samples' gradients of all following backward passes with another reference, or as many as
        before. The open window and the scores go on: reset() where they shall not be mixed.

        Raises:
            TypeError, ValueError: a reference that does not fit the model, or a number of others; nothing is changed.
        """
        references = References(reference)
        before = self._references
        if self._engine is not None:
            self._engine.flush()
        if (references.single, references.columns) != (before.single, before.columns):
            expected = "one dict" if before.single else f"a list of {before.columns} dicts"
            raise ValueError(f"reference: expected {expected}, as before; make another metric for another number")
        if self._capture is not None:
            self._check(references, self._capture)
        self._references = references
        if self._used is not None:
            self._used.change(references.bits(), self._window.steps)

    def reset(self) -> None:
        """Start a new window."""
        super().reset()
        if self._used is not None:
            self._used.reset(self._window.steps, waiting=bool(self._window.open_step))

    def advance(self) -> None:
        """Slide the window by a block."""
        super().advance()
        if self._used is not None:
            self._used.advance(self._window.steps, waiting=bool(self._window.open_step))

    def _numbers_of(self, record: LayerRecord, factor: LossFactor) -> PassDots:
        return PassDots(record, factor, self._layer_index, self._references.columns, self._references.single)

    def _add_numbers(self, result: MetricResult, note: str, doubt: str) -> None:
        add_dots(result, self._layers, total_of(self._capture), self._window.merged(), self._quantities, note, doubt)

    def _part_of(self, agreed: dict[str, Any], **found: Any) -> DotsPart:
        names = ",".join(name for name, *_ in self._held())
        agreed |= {"quantities": self._quantities}
        assert self._used is not None
        return DotsPart(agreed, **found, names=hashlib.sha256(names.encode()).hexdigest()[:16], bits=self._used.bits)

    def _shown_rows(self) -> list[tuple[str, dict[str, Value]]]:
        window = self._window.merged()
        return shown_dots(self._layers, total_of(self._capture), window, self._quantities, self._measured)

    def _own_plan(self) -> list[PlanLine]:
        return [PlanLine("reference", f"copies of {self._references.columns}", self._references.nbytes)]

    @property
    def _quantities(self) -> list[str]:
        return quantities(self._references.columns, self._references.single)

    # ---- the last micro-batch

    @property
    def per_sample(self) -> Tensor:
        """Inner products over all measured parameters, float64 [B], or [B, K] for a list of references, of the last
        backward pass. NaN, with the reason in :attr:`broken`, where that pass was not recorded."""
        return self._last_norms().per_sample

    @property
    def per_layer(self) -> Norms:
        """Inner products per layer; NaN, with a reason in ``.reasons``, where nothing was recorded."""
        return self._last_norms().per_layer

    @property
    def per_parameter(self) -> Norms:
        """Inner products per parameter; NaN, with a reason in ``.reasons``, where nothing was recorded."""
        return self._last_norms().per_parameter
