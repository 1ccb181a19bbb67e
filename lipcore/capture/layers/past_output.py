"""Ways from what a model returns to its layers that do not lead through the output that was proved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from lipcore.capture.layers.layer_pass import LayerPass
from lipcore.capture.layers.layer_site import LayerSite
from lipcore.models.outputs import nodes_before, tensors_of


def past_output(
    run: LayerPass, returned: Any, output: Any, sites: Sequence[LayerSite]
) -> Iterator[tuple[Tensor, LayerSite]]:
    """Return those tensors that a pass has returned from which a layer can be reached past its output, each with such a
    layer. What is returned from between the layers and the output was proved with it."""
    mine = {id(site) for site in sites}
    ends = {tensor.grad_fn for tensor in tensors_of(output)}
    within = set(nodes_before(ends))
    for tensor in tensors_of(returned):
        if tensor.grad_fn is None or tensor.grad_fn in within:
            continue
        for node in nodes_before([tensor.grad_fn], ends):
            if id(getattr(node, "site", None)) in mine and node.run is run:
                yield tensor, node.site
                break
