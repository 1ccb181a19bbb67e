"""What Lipschitz says: its plan, the open window's results, and what they add to those of all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lipcore.lipschitz.first_weight import singular_values_later
from lipcore.lipschitz.rank_part import LipschitzPart
from lipcore.lipschitz.records import LipschitzRecords
from lipcore.lipschitz.weight_in_parts import WeightInParts, is_in_parts, numbers_of, refusal, way_of
from lipcore.lipschitz.window_facts import Facts, Theorem
from lipcore.metric.distribution import on_device
from lipcore.metric.handed_out import Withdrawable
from lipcore.metric.host_reads import OnDevice
from lipcore.metric.plan_lines import PlanLines
from lipcore.metric.protocol import PlanLine, TapCounts
from lipcore.metric.rank_distributions import RankDistributions
from lipcore.metric.rank_part import FSDP1_PIECES, Holding, RankPart
from lipcore.metric.results import Label, MetricResult
from lipcore.models.names import class_before_sharding, named_modules, with_prefix
from lipcore.models.ranks import is_fsdp1
from lipcore.models.tensor_parallel import part_ranks


class LipschitzResults(LipschitzRecords):
    """Base of :class:`Lipschitz` that makes results of what was taken in."""

    _sigma: bool
    _numbers: MetricResult | None  # of a copy, which has nothing else
    _holding: Holding | None
    _counts: TapCounts | None

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
        parts = part_ranks(self._model, self._model.named_parameters())
        counts = parts is None or parts.counts  # others see the same samples
        distributions = RankDistributions(self._open.merged())
        part = LipschitzPart.of(self._facts(sandwich=True), self._holding, distributions, counts=counts)
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
        the number of samples. A layer without a bias has no name of one, unless one is followed in its place."""
        assert self._first.module is not None
        shape = self._first.batch_shape
        followed = self._virtual_bias is not None and not self._virtual_bias.off
        there = followed or self._first.module._parameters.get("bias") is not None
        own = with_prefix(self.prefix, with_prefix(self._first.name, "bias"))
        return {
            "parameter": own if there else None,
            "layer": class_before_sharding(self._first.module).__name__,
            "rows_per_sample": None if shape is None else math.prod(shape[1:-1]),
            **self._bias.details(),
        }
