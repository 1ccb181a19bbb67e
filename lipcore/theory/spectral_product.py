"""The textbook bound of a network's global Lipschitz constant: the product of its layers' spectral norms."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lipcore.chain import modules_in_order
from lipcore.names import unwrap
from lipcore.results import Value
from lipcore.theory.layer_constants import layer_constant


@torch.no_grad()
def spectral_norm_product(model: nn.Module, x: Tensor) -> Value:
    r"""The textbook bound of the global Lipschitz constant: :math:`\prod_l \|W_l\|_2` times the constants of what lies
    between (what Loukas et al. compare Corollary 1 with).

    For chains (nested nn.Sequential) of Linear, convolutions, BatchNorm in eval mode, pooling and element-wise
    activations. Norms are by SVD; of larger maps and convolutions a bound of it, some percent above, by Lanczos
    iteration (its failure for one start vector in 1e9 is neglected). One-sided; exact only by accident. Not valid where
    a parameter is not finite.

    Args:
        x: inputs [N, ...] with N >= 1; only their shape matters, for convolutions and pooling.

    Raises:
        ValueError: the model is no chain, or a module in it has no known constant (named).
    """
    chain = modules_in_order(model)
    if chain is None:
        raise ValueError(
            f"model: a {type(unwrap(model)).__name__} is not a chain of torch's layers (nn.Sequential), so its "
            "spectral norms do not multiply"
        )
    if not isinstance(x, Tensor) or not x.dim() or not len(x):
        seen = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x: expected shape [N, ...] with N >= 1, got {seen}")
    product, notes, point = 1.0, [], x[:1].detach()
    for position, module in enumerate(chain):
        found = layer_constant(module, point)
        if found is None:
            raise ValueError(
                f"model: module {position} of the chain, {type(module).__name__}, has no known Lipschitz constant with "
                f"these settings ({module}); leave it out or put the model into eval mode"
            )
        product *= found[0]
        if found[1]:
            notes.append(f"module {position}: {found[1]}")
        if not math.isfinite(product):
            return Value(
                product,
                len(chain),
                "one-sided",
                False,
                f"the constant of module {position}, {type(module).__name__}, is not finite",
            )
        point = module(point)
    return Value(product, len(chain), "one-sided", True, "; ".join(notes))
