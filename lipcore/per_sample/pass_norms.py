"""The per-sample norms of one backward pass."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from lipcore import _core
from lipcore.capture.layers.compared_inputs import INPUT
from lipcore.capture.layers.layer_pass import DELTA, ERROR, OUTPUT, LayerRecord, Rows
from lipcore.metric.distribution import Distribution, observe_roots
from lipcore.models.tensor_parallel import PartRanks
from lipcore.per_sample.layer_index import LayerIndex
from lipcore.per_sample.loss_factor import LossFactor
from lipcore.per_sample.total import TOTAL

_float64 = torch.float64
_SHOWN, _ALIKE = 8, 0.4  # names that an error shows, and how like the one asked for the first of them are


class Norms(Mapping[str, Tensor]):
    """Numbers by name, float64 of one shape ([B] for norms); NaN throughout where there is none, with the reason in
    :attr:`reasons`. `same_as` has names by which users may ask for what stands under another one."""

    def __init__(
        self,
        what: str,
        rows: dict[str, Tensor],
        reasons: dict[str, str],
        shape: tuple[int, ...],
        same_as: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._what, self.rows, self.reasons, self._shape, self._same_as = what, rows, reasons, shape, same_as

    def __getitem__(self, name: str) -> Tensor:
        if name in self.rows:
            return self.rows[name]
        if name in self.reasons:
            return torch.full(self._shape, torch.nan, dtype=_float64, device="cpu")
        raise KeyError(self._unknown(name))

    def _unknown(self, name: str) -> str:
        """Say that there is no such name, and which there are, those that are most like it first."""
        first = self._same_as.get(name)
        if first is not None and first in self:
            return f"no {self._what} {name!r} was measured; it is tied, and is found as {first!r}"
        names = list(self)
        if not names:
            return f"no {self._what} {name!r} was measured; there are none"
        close = get_close_matches(str(name), names, _SHOWN, _ALIKE)
        shown = [*close, *(other for other in names if other not in close)][:_SHOWN]
        count = f" {len(shown)} of {len(names)}:" if len(shown) < len(names) else ""
        return f"no {self._what} {name!r} was measured; there are{count} {', '.join(map(repr, shown))}"

    def __iter__(self) -> Iterator[str]:
        yield from self.rows
        yield from (name for name in self.reasons if name not in self.rows)

    def __len__(self) -> int:
        return len(set(self.rows) | set(self.reasons))


class PassNorms:
    """Norms of one backward pass: those of its record times its loss factor f.

    Attributes:
        names, layers: the parameters and the layers that brought numbers.
        rows: squared norms per parameter, float64 [names, B].
        layer_index: the layers of the model.
        total: the name of the total's place.
        parts: the ranks that hold parts of the gradients, of which these are this rank's; None where they are whole.
    """

    def __init__(
        self,
        record: LayerRecord,
        factor: LossFactor,
        layer_index: LayerIndex,
        total: str = TOTAL,
        parts: PartRanks | None = None,
    ) -> None:
        self.record, self.factor = record, factor
        self.layer_index, self.total, self.parts = layer_index, total, parts
        # In the model's order; backward passes bring them from the end.
        found = record.norms_sq
        self.names, self.layers, self._index = layer_index.of(found)
        if isinstance(found, Rows) and found.names == self.names:
            self.rows = found.table
        elif self.names:
            self.rows = torch.stack([found[name] for name in self.names])
        else:
            self.rows = torch.empty(0, record.samples, dtype=_float64, device="cpu")
        if factor.tensor is not None or factor.number != 1:
            self.rows = self.rows * (factor.value * factor.value)

    @cached_property
    def squares(self) -> Tensor:
        """Squared norms per layer and, last, in total, float64 [layers + 1, B]."""
        return self._sums(self.rows, self._index)

    def _sums(self, rows: Tensor, index: list[int]) -> Tensor:
        """Return the sums of some parameters' rows per layer and, last, in total."""
        known = self._known
        if rows.is_cpu:
            squares = torch.empty(len(self.layers) + 1, self.samples, dtype=_float64, device="cpu")
            _core.place_sums(rows, index, known, squares)
            return squares
        layers = self.layer_index.sums(rows, index, len(self.layers))
        total = rows.sum(0) if known else rows.new_full((self.samples,), torch.nan)
        return torch.cat([layers, total.unsqueeze(0)])

    @property
    def added(self) -> Tensor:
        """Squared norms as :attr:`squares` has them, of what this rank adds to those of all that hold parts: its own
        and, on one of them, what all hold alike."""
        if self.parts is None or self.parts.counts:
            return self.squares
        return self._of([i for i, name in enumerate(self.names) if name in self.parts.cuts])

    def _of(self, chosen: list[int]) -> Tensor:
        """Return the squares of some of the parameters."""
        rows = self.rows.index_select(0, self.layer_index.on(self.rows.device, chosen))
        return self._sums(rows, [self._index[i] for i in chosen])

    @property
    def in_parts(self) -> tuple[Tensor, Tensor, list[str]]:
        """Squares that the ranks that hold parts are to add up, [layers of the model + 1, B], NaN for those that
        brought no numbers; the squares of what they hold alike, of the layers that have some, and what is to be
        alike of an input, [layers, B]; and these layers."""
        assert self.parts is not None
        whole = [i for i, name in enumerate(self.names) if name not in self.parts.cuts]
        places = sorted({self._index[i] for i in whole})
        alike = self._of(whole).index_select(0, self.layer_index.on(self.rows.device, places))
        inputs = self.inputs
        alike = torch.cat([alike, *(row.unsqueeze(0).to(alike.device) for row in inputs.values())])
        return self._per_place(self.added), alike, [*(self.layers[place] for place in places), *inputs]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Numbers of the samples that ranks which hold parts were given, and compare; by the layer that saw them."""
        found = self.record.norms_sq
        names = [name for name in found if name.startswith(INPUT)] if self.parts is not None else []
        return {INPUT + self.layer_index.layer_of[name[len(INPUT) :]]: found[name] for name in names}

    @property
    def _known(self) -> bool:
        """True when there is a total."""
        return bool(self.names) and not self.record.broken

    @property
    def squares_per_place(self) -> Tensor:
        """Squared norms with a row for every layer of the model, NaN where it brought no numbers, and the total
        last."""
        return self._per_place(self.squares)

    def _per_place(self, squares: Tensor) -> Tensor:
        every = len(self.layer_index.layers)
        if len(self.layers) == every:
            return squares
        missing = squares.new_full((self.samples,), torch.nan)
        found = dict(zip(self.layers, squares[:-1], strict=True))
        return torch.stack([*(found.get(layer, missing) for layer in self.layer_index.layers), squares[-1]])

    def observe(self, distributions: list[Distribution]) -> None:
        """Add the norms per layer of the model and, last, in total; a layer without numbers counts B missing ones."""
        observe_roots(self.squares_per_place, distributions)

    @property
    def samples(self) -> int:
        return self.record.samples

    @property
    def per_sample(self) -> Tensor:
        return self.squares[-1].sqrt()

    @property
    def per_parameter(self) -> Norms:
        rows = dict(zip(self.names, self.rows.sqrt(), strict=True)) if self.names else {}
        return Norms("parameter", rows, self.record.reasons, (self.samples,), self.layer_index.tied)

    @property
    def per_layer(self) -> Norms:
        rows = dict(zip(self.layers, self.squares[:-1].sqrt(), strict=True))
        reasons = layer_reasons(self.layer_index, self.record, rows)
        return Norms("layer", rows, reasons, (self.samples,), self.layer_index.tied)

    def missing(self, places: Iterable[str]) -> Norms:
        """Return NaN, with the reason, for places of a pass that was not recorded."""
        return Norms("layer", {}, dict.fromkeys(places, self.record.broken), (self.samples,))

    @property
    def standard_error(self) -> Norms:
        """Standard errors of the estimated norms among per_layer, and of the total: that of the square over twice the
        norm."""
        variance: dict[str, Tensor] = {}
        for name, error in self.record.norms_sq.items():
            if name.startswith(ERROR):
                for place in (self.layer_index.layer_of[name[len(ERROR) :]], self.total):
                    variance[place] = variance.get(place, 0.0) + error.square()
        norms = dict(zip([*self.layers, self.total], self.squares.sqrt(), strict=True))
        factor_sq = self.factor.value * self.factor.value
        rows = {place: factor_sq * total.sqrt() / (2 * norms[place]) for place, total in variance.items()}
        # Where the estimate is 0, so is what it estimates but for probability 0.
        rows = {place: row.masked_fill(norms[place] == 0, 0.0) for place, row in rows.items()}
        return Norms("layer", rows, {}, (self.samples,))

    @property
    def normalized(self) -> Norms:
        """Normalised norms r of every layer: the loss's factors cancel."""
        record = self.record.norms_sq
        if OUTPUT not in record:
            raise RuntimeError("normalized: nothing was recorded; pass normalized=True and run a backward pass")
        eps_sq = record[OUTPUT]
        usable = (eps_sq > 0) & eps_sq.isfinite()
        rows = {
            name[len(DELTA) :]: torch.where(usable, row / eps_sq, torch.nan).sqrt()
            for name, row in record.items()
            if name.startswith(DELTA)
        }
        several = "is called several times in a pass, and has an output gradient for each"
        reasons = {name: several for name, row in rows.items() if row.isnan().all() and not eps_sq.isnan().all()}
        return Norms("layer", rows, reasons, (self.samples,))


def layer_reasons(layer_index: LayerIndex, record: LayerRecord, found: Collection[str]) -> dict[str, str]:
    """Return why layers that are not among the found ones have no numbers, and why others have not all."""
    reasons = dict.fromkeys(layer_index.layers, "no rule covers its parameters here: see coverage()")
    for name, layer in layer_index.layer_of.items():
        reasons[layer] = record.reasons.get(name, reasons[layer])
    shown = {name: why for name, why in reasons.items() if name not in found}
    partly = {layer_index.layer_of[name] for name in record.reasons if name in record.norms_sq}
    return shown | {layer: reasons[layer] for layer in partly}
