"""Inner products of the gradients of one micro-batch's samples with each other."""

from __future__ import annotations

import torch
from torch import Tensor

from lipcore.per_sample.pass_norms import Norms, PassNorms, layer_reasons
from lipcore.per_sample.weighted_sum import usable_factors


def gram_of(norms: PassNorms) -> Norms:
    """Return f^2 <g_i, g_j> per layer and, in total, over all measured parameters, float64 [B, B] each, with
    the pass's loss factor f. NaN where one of the two samples has no norm."""
    record, layer_of = norms.record, norms.layer_index.layer_of
    factors = usable_factors(norms, "gram")
    scale = norms.factor.value * norms.factor.value
    rows: dict[str, Tensor] = {}
    with torch.no_grad(), torch.autocast(norms.per_sample.device.type, enabled=False):
        for name in norms.names if factors is not None else ():
            if factors is None or name not in factors:
                continue
            gram = factors[name].gram() * scale
            missing = record.norms_sq[name].isnan()
            gram = ((gram + gram.T) / 2).masked_fill(missing | missing[:, None], torch.nan)
            for place in (layer_of[name], norms.total):
                rows[place] = rows[place] + gram if place in rows else gram
    rows = {place: rows[place] for place in (*norms.layers, norms.total) if place in rows}  # the order of the norms
    reasons = layer_reasons(norms.layer_index, record, [place for place in rows if place != norms.total])
    if record.broken or norms.total not in rows:
        rows.pop(norms.total, None)
        reasons[norms.total] = record.broken or "no gradient reached a measured parameter in this backward pass"
    return Norms("layer", rows, reasons, (norms.samples, norms.samples))
