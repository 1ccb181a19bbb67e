"""A layer whose rule is not lipcore's: one sample's gradient by the rule is compared with autograd's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lipcore import functional
from lipcore.capture.layers.layer_pass import LayerPass
from lipcore.capture.layers.layer_site import LayerSite
from lipcore.capture.layers.packed import batch_of_call
from lipcore.layers import norms_sq_of

_TOLERANCE, _TOLERANCE_HALF = 1e-3, 5e-2  # of a norm, relative
_OTHER = (
    "of one sample, the rule {0} brings a gradient of norm {1:.6g}, and autograd one of {2:.6g}: the rule is not that "
    "of this layer"
)


def wrong_by_rule(site: LayerSite, node: Any, gradient: Tensor, run: LayerPass, *, half: bool) -> dict[str, str]:
    """Return the parameters for which the rule and the graph between the layer's parameters and its output disagree.

    Args:
        site: the layer.
        node: the node of the graph by which the layer's output was tapped.
        gradient: the gradient at the layer's output.
        run: the forward pass.
        half: True where half precision is computed in.
    """
    sample = run.batch.size // 2
    alone = _of_sample(site, gradient, run, sample)
    # Behind a layer that is called twice, or tied, there are other uses of the parameter; a hook on one rewrites its
    # gradient, and no sample's.
    own = {
        key: p
        for key, p in site.module.named_parameters()
        if key in site.names and run.calls[site.names[key]] == 1 and not p._backward_hooks
    }
    if not own:
        return {}
    with torch.autocast(gradient.device.type, enabled=False):
        exact = torch.autograd.grad(
            [GradientEdge(*node.next_functions[0])], list(own.values()), [alone], retain_graph=True, allow_unused=True
        )
        with torch.no_grad():
            rows = norms_sq_of(site.rule.factors(site.module, alone, node.extra, *node.saved_tensors))
    wrong = {}
    for key, found in zip(own, exact, strict=True):
        if found is not None and found.is_sparse:
            found = found.coalesce().values()
        norm = 0.0 if found is None else float(functional.sample_norms(found[None])[0])
        row = rows[key].sqrt().cpu() if key in rows else torch.zeros(run.batch.size, device="cpu")
        mine = float(row[sample])
        slack = (_TOLERANCE_HALF if half else _TOLERANCE) * max(norm, mine)
        if not abs(mine - norm) <= slack or not float(row.sum()) - mine <= slack:
            wrong[site.names[key]] = _OTHER.format(type(site.rule).__name__, mine, norm)
    return wrong


def _of_sample(site: LayerSite, gradient: Tensor, run: LayerPass, sample: int) -> Tensor:
    batch = batch_of_call(run.batch, gradient, site.rule.feature_dims(site.module))
    dim, begin, length = 0, sample, 1
    rows = gradient
    if batch.offsets is None:
        dim = site.rule.sample_dim(site.module, gradient, batch)
    else:
        begin = int(batch.offsets[sample])
        length = int(batch.offsets[sample + 1]) - begin
        rows = gradient.reshape(-1, gradient.shape[-1])
    alone = torch.zeros_like(rows)
    alone.narrow(dim, begin, length).copy_(rows.narrow(dim, begin, length))
    return alone.reshape(gradient.shape)
