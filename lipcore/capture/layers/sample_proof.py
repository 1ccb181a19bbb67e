"""One pass under proof: does every layer get, as row i of its gradient, that of sample i and of no other?

Shapes cannot tell positions [T] from samples where T = B, and hooks do not see that a model sorts or mixes its samples.
The weighted pass (:mod:`lipcore.capture.proof`) shows it, row by row.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lipcore.capture.layers.layer_pass import DELTA, LayerPass
from lipcore.capture.layers.layer_site import LayerSite
from lipcore.capture.layers.own_rule import wrong_by_rule
from lipcore.capture.layers.pass_graph import Graph
from lipcore.capture.proof import (
    BITS,
    BITS_OF_FLOAT16,
    FIXED_DIGITS,
    MIXED,
    Point,
    RowIds,
    row_ids,
    squared_norms,
)
from lipcore.capture.sample_ids import SampleIds
from lipcore.capture.seeds import Seeds
from lipcore.capture.zero_mixing import mixes_by_zero
from lipcore.layers import Batch

_MIXED = (
    "of one sample's outputs alone, its gradient has parts at other samples ({0:.3g} of its norm). Either the layer is "
    "called without the batch dimension (name it in broadcast=), or the batch dimension is not where it is looked for "
    "(batch_dim=), or the model returns other rows beside what the loss is made of (name that, output='<key or "
    "module>'), or the model mixes its samples (statistics over the batch, sorting), and then there are no gradients "
    "per sample"
)
_MOVED = (
    "of its gradient, row {0} is that of sample {1}: the model moves its samples (flip, roll, sort, a shuffle) before "
    "this layer, and norms would go to the wrong ones. Bring the batch into that order before the model is called, or "
    "put the samples back before the next layer; where it returns rows in another order beside what the loss is made "
    "of (features of pictures), name that, output='<key or module>'"
)
_NOT_LINEAR = (
    "a backward pass through it is not linear (a hook or an autograd Function clips or normalises gradients), so that "
    "weights do not tell its samples apart"
)
_HALF = (
    "in half precision its gradients are not the same bits in every run, so that mixing of a few percent is not seen"
)
#: Largest error of a squared norm's ratio that rounding explains, by the dtype that is computed in.
_TOLERANCE = {torch.float64: 2e-9, torch.float32: 2e-5}
_TOLERANCE_HALF = 6e-2
_MOST_ALONE = 3  # passes from single samples that show what mixes


@dataclass
class Verdict:
    """The findings of one proof.

    Attributes:
        reason: why this pass proves nothing, or "".
        wrong: parameters whose norms are not those of single samples, and why.
        entered: outputs that must bring a gradient for `wrong` to matter; empty: whatever they bring.
        seen: per layer, the samples whose row was right, bool [B].
        unreached: layers that no gradient came to.
        ids: per layer and call of it, in the order of the graph, which samples the rows of its gradient are of.
        open: something was not finite or had no gradient, and should be asked again.
        by_zero: samples are mixed by factors that are 0 in this pass.
    """

    reason: str = ""
    wrong: dict[str, str] = field(default_factory=dict)
    entered: list[Tensor] = field(default_factory=list)
    seen: dict[str, Tensor] = field(default_factory=dict)
    unreached: set[str] = field(default_factory=set)
    ids: dict[str, list[SampleIds]] = field(default_factory=dict)
    open: bool = False
    by_zero: bool = False


def verdict(run: LayerPass, seeds: Seeds, graph: Graph, sites: Sequence[LayerSite], *, fixed: bool) -> Verdict:
    """Prove one pass, or find what is wrong with it; raise RuntimeError where its graph allows no other backward pass.

    Args:
        run: the forward pass, which has just ended.
        seeds: its outputs with a batch dimension.
        graph: what is behind them.
        sites: every tapped layer.
        fixed: run as many backward passes whatever the batch.
    """
    found = _Weighed(run, seeds, graph, sites, fixed=fixed)
    while found.spoiled and len(seeds.outputs) > 1:
        # A layer's second output (attention weights) is among these, which need not enter the loss.
        seeds = Seeds(seeds.outputs[:-1], seeds.samples[:-1], seeds.dims[:-1], seeds.size)
        found = _Weighed(run, seeds, graph, sites, fixed=fixed)
    result = found.verdict()
    result.by_zero = not (fixed or result.wrong or result.reason) and found.mixes_by_zero()
    if not fixed and (result.wrong or result.reason) and len(seeds.outputs) > 1:
        each = [_Weighed(run, seeds.only(i), graph, sites, fixed=False).verdict() for i in range(len(seeds.outputs))]
        good = [one for one in each if not one.wrong and not one.reason and one.seen]
        if good:  # an output that mixes samples, such as similarities, matters where it enters the loss
            for one in good[1:]:
                good[0].seen = {name: rows | one.seen.get(name, rows) for name, rows in good[0].seen.items()}
            entered = [seeds.outputs[i] for i, one in enumerate(each) if one.wrong]
            return replace(good[0], wrong=result.wrong, entered=entered)
    return result


class _Weighed:
    """The rows of all layers' gradients, from backward passes that weight the samples of some outputs."""

    def __init__(self, run: LayerPass, seeds: Seeds, graph: Graph, sites: Sequence[LayerSite], *, fixed: bool) -> None:
        self._run, self._seeds, self._sites, self._fixed = run, seeds, sites, fixed
        self._foreign = graph.foreign
        self._calls: dict[int, Tensor] = {}
        self._gradients: dict[int, Tensor] = {}  # at layers whose rule is the user's own
        self._points: list[tuple[LayerSite, Point]] = [
            (node.site, _point(node, run.batch, self._gradients)) for node in graph.tapped
        ]
        by_number = {site.number: site for site in sites}
        for number, probe in run.probes.items():
            self._points.append((by_number[number], Point(probe, functools.partial(_columns, self._calls, number))))
        half = bool(graph.dtypes & {torch.float16, torch.bfloat16})
        double = graph.dtypes == {torch.float64}
        self._half, self._dtype = half, torch.float64 if double else torch.float32
        tolerance = _TOLERANCE_HALF if half else _TOLERANCE[self._dtype]
        self._rows: list[RowIds | None] = row_ids(
            seeds,
            [point for _, point in self._points],
            bits=BITS_OF_FLOAT16 if torch.float16 in graph.dtypes else BITS,
            digits=FIXED_DIGITS if fixed else 0,
            tolerance=tolerance,
            foreign=graph.foreign,
        )
        self._tolerance = tolerance

    @property
    def spoiled(self) -> bool:
        """True where a compiled layer got a gradient at an output beside its first."""
        return any(bool(calls.isnan()) for calls in self._calls.values())

    def mixes_by_zero(self) -> bool:
        """Return whether samples are mixed by factors that are 0 in this pass."""
        points = [point for _, point in self._points]
        return not self._run.probes and mixes_by_zero(self._seeds, points, self._rows)

    def verdict(self) -> Verdict:
        result, rounding = Verdict(), 0.0
        suspects: dict[str, tuple[int, str]] = {}  # by layer: a sample whose row shows it, and what is said then
        for (site, _), rows in zip(self._points, self._rows, strict=True):
            calls = self._calls.get(site.number)
            if rows is None or (calls is not None and bool((calls > 1) | (calls < 0))):
                continue  # called twice in a compiled region: refused when the probe is read
            size = max(1, self._seeds.size)
            expected = torch.arange(len(rows.ids), device="cpu") % size
            right, mixed = rows.ids == expected, rows.ids == MIXED
            moved = (rows.ids >= 0) & ~right
            result.open |= bool((~right & ~moved).any())
            result.ids.setdefault(site.name, []).append(SampleIds(rows.ids, size))
            if bool(moved.any()):
                at = int(moved.nonzero()[0])
                suspects[site.name] = int(expected[at]), _MOVED.format(int(expected[at]), int(rows.ids[at]))
            if bool(mixed.any()):
                suspects[site.name] = int(expected[int(mixed.nonzero()[0])]), _MIXED
            right = right.reshape(-1, size).any(0)
            result.seen[site.name] = result.seen.get(site.name, torch.zeros_like(right)) | right
            rounding = max(rounding, rows.rounding)
        result.unreached = {site.name for site in self._sites} - set(result.seen)
        names = {site.name: site.names.values() for site in self._sites}
        shares = self._shares([sample for sample, _ in suspects.values()])
        for layer, (_, why) in suspects.items():
            if layer in shares:
                result.wrong |= dict.fromkeys(names[layer], why.format(shares[layer]))
        if suspects and not result.wrong:
            result.reason = _NOT_LINEAR
        elif self._half and rounding > 1e-12:
            result.reason = _HALF
        for (site, point), rows in zip(self._points, self._rows, strict=True):
            gradient = self._gradients.get(id(point.at))
            if gradient is not None and rows is not None and not result.wrong:
                result.wrong |= wrong_by_rule(site, point.at, gradient, self._run, half=self._half)
        return result

    def _shares(self, samples: Sequence[int]) -> dict[str, float]:
        """Return, by layer that mixes or moves samples, the share of a sample's gradient that is not in its row. Passes
        from single samples' outputs show it, since only they are sure where gradients are clipped."""
        found: dict[str, float] = {}
        # Every rank of a sharded model runs as many passes.
        for sample in [*samples, 0][:1] if self._fixed else list(dict.fromkeys(samples))[:_MOST_ALONE]:
            found |= {name: share for name, share in self._alone(sample).items() if share > self._tolerance}
        return found if samples else {}

    def _alone(self, sample: int) -> dict[str, float]:
        weights = torch.zeros(self._seeds.size, device="cpu")
        weights[sample : sample + 1] = 1  # there is none in an empty batch
        found: dict[str, float] = {}
        squares = squared_norms(self._seeds, [point for _, point in self._points], weights, self._foreign)
        for (site, _), row, rows in zip(self._points, squares, self._rows, strict=True):
            if row is None or rows is None or not self._seeds.size:
                continue
            row, whole = (x.reshape(-1, self._seeds.size).sum(0) for x in (row, rows.squares))
            mine, others = float(row[sample]), float(row.sum() - row[sample])
            share = max((others / max(mine + others, 1e-300)) ** 0.5, abs(1 - mine / max(float(whole[sample]), 1e-300)))
            found[site.name] = max(found.get(site.name, 0.0), share)
        return found


# Functions of their own: in methods, a graph and what keeps it would hold each other until the garbage is collected.
def _point(node: Any, batch: Batch, gradients: dict[int, Tensor]) -> Point:
    site: LayerSite = node.site
    kept = gradients if site.has_own_rule and hasattr(node, "extra") else None
    return Point(node, functools.partial(_squares, site, batch, kept, id(node)))


def _squares(site: LayerSite, batch: Batch, kept: dict[int, Tensor] | None, key: int, gradient: Tensor) -> Tensor:
    if kept is not None:
        kept.setdefault(key, gradient.clone())
    return site.squares_of(gradient, batch)


def _columns(calls: dict[int, Tensor], number: int, gradient: Tensor) -> Tensor:
    """Return the squares that a compiled region's probe got, and note how often the layer was called (its last row)."""
    calls[number] = gradient[-1].max()
    return gradient[:-1].reshape(-1)


def unseen_rows(sites: Sequence[LayerSite], seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return, by name of a record's row, the samples that no proof has seen; rows of which all were seen are left
    out."""
    found: dict[str, Tensor] = {}
    for site in sites:
        rows = seen.get(site.name)
        if rows is not None and not bool(rows.all()):
            found |= dict.fromkeys((*site.names.values(), DELTA + site.name), ~rows)
    return found
