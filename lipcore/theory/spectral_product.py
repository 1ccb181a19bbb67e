"""The textbook bound of a network's global Lipschitz constant: the product of its layers' spectral norms."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipcore.metric.results import Value
from lipcore.models.chains import altered_modules, modules_in_order
from lipcore.models.checks import check_input, check_kind
from lipcore.models.names import unwrap
from lipcore.models.own_pass import misfit_in_words, own_pass
from lipcore.theory.layer_constants import layer_constant


def spectral_norm_product(model: nn.Module, x: Tensor) -> Value:
    r"""Compute the textbook bound of a network's global Lipschitz constant, with which Loukas et al. compare Corollary
    1: :math:`\prod_l \|W_l\|_2` times the constants of the modules between.

    For chains (nested nn.Sequential) of Linear, convolutions, BatchNorm in eval mode, pooling and element-wise
    activations, parametrized or not. Norms are by SVD; of larger maps and convolutions a bound of it, some percent
    above, by Lanczos iteration (its failure for one start vector in 1e9 is neglected). One-sided; exact only by
    accident. Not valid where a parameter is not finite.

    Args:
        x: inputs [N, ...] with N >= 1; only their shape matters, for convolutions and pooling.

    Raises:
        ValueError: the model is no chain, a hook may change what a module of it does (old weight_norm and pruning among
            them), or a module has no known constant (each named); x does not fit the model.
        TypeError: x is not a tensor.
    """
    check_input(model, x)
    if not len(x):
        raise ValueError(f"x: expected shape [N, ...] with N >= 1, got {list(x.shape)}")
    check_kind(model)
    for where, by in altered_modules(model).items():
        raise ValueError(
            f"model: {where} has a hook or a forward of its own ({_called(by[0])}) that may change its weight or its "
            "output, so its constant is not known; remove it: torch.nn.utils.remove_weight_norm() or "
            "torch.nn.utils.prune.remove(), in a model made anew from the state_dict where this one trains on"
        )
    chain = modules_in_order(model, parametrized=True)
    if chain is None:
        raise ValueError(
            f"model: a {type(unwrap(model)).__name__} is not a chain of torch's layers (nn.Sequential), so its "
            "spectral norms do not multiply"
        )
    # One weight for the constant and for the pass: spectral_norm in train mode makes another one at every look.
    with own_pass(model), torch.no_grad(), misfit_in_words(model, x), parametrize.cached():
        return _product(chain, x[:1].detach().clone())


def _product(chain: list[nn.Module], point: Tensor) -> Value:
    product, notes = 1.0, []
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


def _called(hook: Any) -> str:
    return str(getattr(hook, "__name__", type(hook).__name__))
