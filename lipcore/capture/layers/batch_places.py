"""Where the batch is in what a model and its layers return, as a pass on one sample more shows it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from lipcore.capture.graph.another_size import CannotRun, Shapes, on_one_more
from lipcore.capture.layers.layer_pass import LayerPass
from lipcore.capture.layers.layer_site import LayerSite
from lipcore.capture.layers.proof_output import ProofOutput
from lipcore.capture.output_places import OutputPlaces, places_of
from lipcore.models.outputs import tensors_of

_MISPLACED = (
    "in what it returns, of shape {0}, the batch is not in dimension {1}, where its rule looks for it, but {2}, as a "
    "pass on one sample more shows"
)


_MOST = 32  # kinds of passes that are remembered


class Seen(NamedTuple):
    """The findings of a pass on one sample more.

    Attributes:
        places: where the samples are in the output that proofs begin at; None where its tensors are others.
        shapes: of the layers' outputs.
    """

    places: OutputPlaces | None
    shapes: Shapes


def seen_places(seen: Seen | None) -> OutputPlaces | None:
    """Return where the samples are in the output, as far as a pass on one more has shown it."""
    return None if seen is None else seen.places


class BatchPlaces:
    """The passes on one sample more that show where the batch is.

    Args:
        model: the module that is called.
        output: where proofs begin.
    """

    def __init__(self, model: nn.Module, output: ProofOutput) -> None:
        self._model, self._output = model, output
        self._known: dict[tuple[object, ...], Seen] = {}  # by samples and shapes

    def look(self, run: LayerPass, output: object) -> Seen | None:
        """Return what a pass on one sample more shows beside this one, which has returned `output`; None where the
        model cannot be run so."""
        call, batch = run.call, run.batch
        if call is None or batch.offsets is not None or batch.size < 2:
            return None
        key = batch.size, *(tuple(tensor.shape) for tensor in tensors_of(output))
        if key in self._known:
            return self._known[key]
        shapes: Shapes = defaultdict(list)
        self._output.listen()
        try:
            returned = on_one_more(self._model, *call[:2], batch.size, batch.dim, shapes=shapes)
            seen = Seen(places_of(output, self._output.of(returned), batch), shapes)
        except (CannotRun, ValueError):
            return None
        if any(seen.places or ()) and len(self._known) < _MOST:
            self._known[key] = seen
        return seen


def misplaced(run: LayerPass, sites: Sequence[LayerSite], theirs: Shapes) -> dict[str, str]:
    """Return the parameters of layers that do not have the batch where their rules look for it, and why: for passes of
    which no proof can show it.

    Args:
        run: the pass.
        sites: its tapped layers.
        theirs: the shapes of their outputs on one sample more.
    """
    found: dict[str, str] = {}
    for site in sites:
        if site.broadcast or len(run.shapes[site.number]) != len(theirs[site.number]):
            continue
        for mine, other in zip(run.shapes[site.number], theirs[site.number], strict=True):
            dims = [d for d, (n, m) in enumerate(zip(mine, other, strict=False)) if n != m]
            expected = site.rule.sample_dim(site.module, torch.empty(mine, device="meta"), run.batch) if mine else 0
            if len(mine) == len(other) and dims != [expected]:
                seen = f"in {' and '.join(map(str, dims))}" if dims else "nowhere"
                found |= dict.fromkeys(site.names.values(), _MISPLACED.format(list(mine), expected, seen))
    return found
