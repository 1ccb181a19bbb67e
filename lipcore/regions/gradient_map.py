"""The linear map from Kronecker patterns to gradients, of chains of Linear and ReLU."""

from __future__ import annotations

import math

import torch
from torch import nn

from lipcore.models.chains import modules_in_order
from lipcore.regions.patterns import Patterns

_PASSED_OVER = (nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def log_gradient_map_norm(model: nn.Module, patterns: Patterns) -> float:
    r"""Compute log ||M||_2 for Linear, ReLU, ..., Linear with one output. M's norm is the root of the largest
    eigenvalue of W_1^T diag(v) W_1 with v = (W_d^2) ... (W_2^2), element-wise squares. NaN for other models."""
    chain = [m for m in modules_in_order(model) or [] if not isinstance(m, _PASSED_OVER)]
    linears, between = chain[::2], chain[1::2]
    if not all(type(m) is nn.Linear for m in linears) or not all(isinstance(m, nn.ReLU) for m in between):
        return math.nan
    if len(linears) != len(between) + 1:
        return math.nan
    widths = [int(m.out_features) for m in linears]  # type: ignore[arg-type]
    takes = [int(m.in_features) for m in linears]  # type: ignore[arg-type]
    # Where a layer is applied to several tokens, the pattern is wider than the layer.
    if widths != [*takes[1:], 1] or widths[:-1] != [gate.width for gate in patterns.layers]:
        return math.nan
    weights = [m.weight.detach().double() for m in linears]  # type: ignore[operator]
    v = torch.ones(1, dtype=torch.float64, device=weights[0].device)
    log_scale = 0.0  # of v, which overflows in deep chains
    for weight in reversed(weights[1:]):
        v = v @ weight.square()
        largest = float(v.max())
        if largest == 0.0:
            return -math.inf
        v, log_scale = v / largest, log_scale + math.log(largest)
    norm = float(torch.linalg.matrix_norm(v.sqrt()[:, None] * weights[0], ord=2))
    return 0.5 * log_scale + (math.log(norm) if norm else -math.inf)
