"""What proofs have found about the passes of one kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lipcore.capture.layers.layer_pass import LayerPass
from lipcore.capture.layers.layer_site import LayerSite
from lipcore.capture.layers.sample_proof import Verdict, unseen_rows
from lipcore.capture.proof import is_proof
from lipcore.capture.sample_ids import SampleIds
from lipcore.capture.training_pass import accumulates_everything

_OPEN = "the numbers of the pass that was to be proved are not finite"
_NO_GRADIENTS = "the model's outputs bring no gradient to any layer"

Done = tuple[tuple[int, ...], int, int]  # shape of the input, nodes, calls of tapped layers


@dataclass
class Findings:
    """Findings of earlier proofs about passes with one number of dimensions and samples."""

    reason: str = _OPEN  # why they are not proved
    by_zero: bool = False  # samples were mixed by factors of 0
    past: str = ""  # the loss came past the output that was proved
    seen: dict[str, Tensor] = field(default_factory=dict)
    unseen: dict[str, Tensor] = field(default_factory=dict)
    unreached: dict[str, set[str]] = field(default_factory=dict)
    met: set[str] = field(default_factory=set)  # layers that were called in a proof, and that no gradient came to
    left_out: dict[str, int] = field(default_factory=dict)  # of these, the numbers of layers that were not called
    ids: dict[str, list[SampleIds]] = field(default_factory=dict)
    together: set[Done] = field(default_factory=set)  # of passes that all ranks have looked at together, to no find

    def take(self, run: LayerPass, found: Verdict, sites: Sequence[LayerSite], *, others: bool) -> None:
        """Take in what a further proof has found.

        Args:
            run: the pass that was proved.
            sites: all tapped layers.
            others: parameters are measured that no tapped layer brings.
        """
        self.by_zero |= found.by_zero
        self._add(found.ids)
        for layer, rows in found.seen.items():
            self.seen[layer] = self.seen.get(layer, rows) | rows
        self.reason = found.reason
        if not found.reason and not others and not any(bool(rows.any()) for rows in found.seen.values()):
            self.reason = _OPEN if found.open else _NO_GRADIENTS
        self.unseen = {} if self.reason else unseen_rows(sites, self.seen)
        unreached = [site for site in sites if site.name in found.unreached and site.name not in self.seen]
        called = {site.name for site in unreached if run.tapped.get(site.number) or site.number in run.probes}
        self.left_out = {s.name: s.number for s in unreached if s.name not in called | self.met}
        self.met |= called
        self.unreached = {site.name: set(site.names.values()) for site in unreached}

    def _add(self, found: Mapping[str, list[SampleIds]]) -> None:
        """Take in whose rows a further proof has found; where a layer's calls are others than before, they count."""
        for layer, calls in found.items():
            known = self.ids.get(layer, [])
            if len(known) != len(calls):
                self.ids[layer] = calls
                continue
            for mine, theirs in zip(known, calls, strict=True):
                mine.add(theirs)

    def came_past(self, run: LayerPass, why: str, gradients: Any) -> None:
        """Take in, in a backward pass, that a gradient has come past the output that was proved."""
        if not is_proof() and accumulates_everything():
            self.past = why
            run.unproved = run.unproved or why


def done_of(run: LayerPass) -> Done:
    """Return what a pass has done, as far as it is known without looking at its graph."""
    return run.shape, run.nodes, run.taps
