"""Results of a window, from its distributions and from what is known beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lipcore.lipschitz.sandwich import no_sides, sandwich_sides
from lipcore.lipschitz.singular_values import SingularValues
from lipcore.lipschitz.weight_in_parts import WeightInParts
from lipcore.metric.distribution import Distribution
from lipcore.metric.later import Later
from lipcore.metric.results import Label, MetricResult, Value, weakest

_SELDOM = "no micro-batch of this window had one: {0}; lambda_every=1 takes one in each"
_NOT_ALONE = (
    "ranks hold parts of the parameters, so nothing has shown that the output depends on the model's input by way of "
    "W_1 alone"
)
_IN_PARTS = "ranks hold parts of W_1, and add up what gives its singular values: the sides are in windows of all ranks"
MOVED = "W_1 of the window's close, but it moved within the window"


@dataclass
class Theorem:
    """W_1 as the sandwich of Theorem 1 takes it.

    Attributes:
        sigma: its singular values; None where W_1 does not stand on the model's input, and there is no theorem.
        shape: outputs first.
        moved: within the window.
        in_parts: this rank's, where each rank has one; sigma is there once they have added them up.
        alone: it is known of parts that they are all that stands on the model's input.
    """

    sigma: Later[SingularValues] | None
    shape: tuple[int, ...] = ()
    moved: bool = False
    in_parts: WeightInParts | None = None
    alone: bool = True


@dataclass
class Facts:
    """Words and numbers of a window beside its distributions.

    Attributes:
        label, note: what numbers are worth.
        first_off: why there is no r.
        lambda_off: why there is no lambda.
        lambda_note: what stands at lambda in place of the note.
        lambda_seldom: how lambda is taken, where that is not in every micro-batch; else "".
        unproved: why lambdas are not shown to be right.
        theorem: None where nothing is said of Theorem 1.
        first_bias: what the corollaries ask, but the number of samples; None without a first layer.
    """

    name: str
    first_layer: str
    place: str
    quantity: str
    label: Label
    note: str
    first_off: str
    lambda_off: str
    lambda_note: str
    lambda_seldom: str
    unproved: str
    theorem: Theorem | None
    first_bias: dict[str, Any] | None
    unrecorded: int | None
    because: list[str]
    taken_back: int
    add_others: Callable[[MetricResult], None] = field(repr=False)

    def result(
        self, ratios: Distribution, lambdas: Distribution, paired: Distribution, into: MetricResult | None = None
    ) -> MetricResult:
        """Return the numbers of a window with the distributions of r, of lambda, and of r where there is a lambda;
        `into`: a result without numbers that is to have them."""
        result = MetricResult(self.name) if into is None else into
        result.details.update(first_layer=self.first_layer, output=self.place, quantity=self.quantity)
        if self.unrecorded is not None:
            result.details["unrecorded_forwards"] = self.unrecorded
            if self.because:
                result.details["unrecorded_because"] = self.because
        count, skipped = ratios.count, ratios.missing + ratios.invalid
        if self.first_off:
            result.details["normalized_gradient_norm_off"] = self.first_off
            count, skipped = lambdas.count, lambdas.missing + lambdas.invalid
        note, place, label = self.first_off or self.note, self.place, self.label
        result.add("normalized_gradient_norm", place, "total", **ratios.reduced(label, total=True, note=note))
        result.add("steadiness", place, "total", max=Value(ratios.max, ratios.count, label, ratios.count > 0, note))
        result.add("skipped", place, "total", sum=Value(float(skipped), count + skipped))
        result.details["infinite_ratios"] = ratios.invalid
        self._add_constants(result, lambdas, self.lambda_seldom if count else "")
        if self.first_bias is not None:
            self._add_sandwich(result, lambdas.mean, paired)
            facts = list(self.first_bias.items())
            result.details["first_bias"] = dict([*facts[:3], ("samples", count + skipped), *facts[3:]])
        self.add_others(result)
        if self.taken_back:
            result.details["taken_back"] = self.taken_back
        return result

    def _add_constants(self, result: MetricResult, lambdas: Distribution, seldom: str) -> None:
        """Add lambda, or the reason why it was not taken; `seldom`: why micro-batches that had an r may have none."""
        label, note = self.label, self.lambda_note
        if self.lambda_off:
            result.details["local_lipschitz_off"] = self.lambda_off
            lambdas, note = Distribution(), self.lambda_off
        elif self.unproved and lambdas.count:
            label, note = weakest([label, "heuristic"]), f"{note}; " * bool(note) + self.unproved
        values = lambdas.reduced(label, note=note)
        why = self.lambda_off or (_SELDOM.format(seldom) if seldom and not lambdas.count else "")
        if why:
            values = {reducer: replace(value, note=why) for reducer, value in values.items()}
        result.add("local_lipschitz", self.place, "total", **values)

    def _add_sandwich(self, result: MetricResult, average: float, paired: Distribution) -> None:
        theorem, count, label, note = self.theorem, paired.count, self.label, self.note
        if theorem is None or not (count or theorem.in_parts):
            return
        sigma, middle = theorem.sigma, paired.mean
        if not theorem.alone:
            result.details["first_weight_not_alone"] = _NOT_ALONE
        if sigma is None and theorem.in_parts is not None:
            result.details["sandwich_in_parts"] = _IN_PARTS
            return
        if sigma is None:
            sides = no_sides(middle, count, label, note, self.first_layer)
            result.add("sandwich", self.place, "total", **sides)
            result.details["sandwich_off"] = sides["lower"].note
            return
        result.details["first_weight_moved"] = theorem.moved
        if theorem.moved:
            label, note = "heuristic", f"{note}; " * bool(note) + MOVED
        result.details["singular_values"] = sigma.then(asdict)
        if not count:
            return
        shape = theorem.shape
        later = sigma.then(lambda found: sandwich_sides(found, shape, average, middle, count, label, note))
        result.add_later("sandwich", self.place, "total", sigma, later)
