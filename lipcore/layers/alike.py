"""Modules without a rule that compute what a rule knows: norms, linear and transposed linear layers of other libraries.

Nothing is taken on trust: a stand-in with random parameters is called with random rows, large and small, and must give
what the formula gives. Its name, and what its attributes are called, do not matter.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.nn.utils import parametrize

from lipcore.functional.linear import ways
from lipcore.layers.calls import is_trainable
from lipcore.layers.factor import Factor
from lipcore.layers.factor_outer import Outer
from lipcore.layers.factor_sums import RowSum
from lipcore.layers.linear import LinearRule
from lipcore.layers.norm import FeatureNormRule
from lipcore.layers.registry import type_with_rule
from lipcore.layers.rule import Batch, Cut, Rule

_TOLERANCE = 2e-5
_EPS = (1e-5, 1e-6, 1e-8, 0.0, torch.finfo(torch.float32).eps)  # where no attribute holds another


def rule_alike(module: nn.Module) -> Rule | None:
    """Return a rule that holds for what this module computes; None where none is known to.

    Looked at are modules of types without a rule, with a weight of one or two dimensions, perhaps a bias, and no other
    parameter, buffer or module in them.
    """
    shapes = {key: tuple(p.shape) for key, p in module._parameters.items() if p is not None}
    bare = not module._buffers and not module._modules and "forward" not in vars(module)
    floats = all(p is None or p.is_floating_point() for p in module._parameters.values())
    if not bare or not floats or parametrize.is_parametrized(module) or type_with_rule(module) is not None:
        return None
    weight, bias = shapes.get("weight", ()), shapes.get("bias")
    if not shapes.keys() <= {"weight", "bias"} or not all(weight) or len(weight) not in (1, 2):
        return None
    try:
        found = _Trial(module, shapes)
        if len(weight) == 1 and bias in (None, weight):
            return found.norm(bias is not None)
        return found.linear() if len(weight) == 2 else None
    except Exception:  # of a module that cannot be called so
        return None


class _Trial:
    """One call of a module's stand-in, to be compared with formulas."""

    def __init__(self, module: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
        generator = torch.Generator("cpu").manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

        numbers = {key: random(*shape) for key, shape in shapes.items()}
        self.weight, self.bias = numbers["weight"], numbers.get("bias")
        stand_in = copy.copy(module)
        stand_in.__dict__["_parameters"] = dict.fromkeys(module._parameters) | {
            key: nn.Parameter(value, requires_grad=False) for key, value in numbers.items()
        }
        self._outputs: dict[int, tuple[Tensor, Any]] = {}
        self._call = functools.partial(type(module).forward, stand_in)
        self._random = random
        self.eps = [value for value in vars(module).values() if isinstance(value, float) and 0 <= value < 1]

    def _holds(self, features: int, formula: Callable[[Tensor], Tensor]) -> bool:
        if features not in self._outputs:
            x = self._random(2, 3, features) * torch.tensor([1e-3, 1.0, 30.0], device="cpu")[:, None]
            with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False):
                self._outputs[features] = x, self._call(x.clone())
        x, output = self._outputs[features]
        expected = formula(x)
        if not isinstance(output, Tensor) or output.shape != expected.shape or not output.is_floating_point():
            return False
        rows, scale = (output - expected).abs().amax(-1), expected.abs().amax(-1)
        return bool((rows <= _TOLERANCE * scale).all())

    def norm(self, with_bias: bool) -> Rule | None:
        """Return the rule of a norm over the last dimension that the module is."""
        features, weight, bias = len(self.weight), self.weight, self.bias
        for eps in dict.fromkeys([*self.eps, *_EPS]):
            for kind in (RMSNormAlike, LayerNormAlike):
                rule = kind(eps)
                for offset in (0.0,) if with_bias else (0.0, 1.0):
                    shift = 0.0 if bias is None else bias

                    def formula(x: Tensor, rule: FeatureNormRule = rule, offset: float = offset) -> Tensor:
                        return rule.normalized(None, x) * (offset + weight) + shift  # noqa: B023

                    if self._holds(features, formula):
                        return rule
        return None

    def linear(self) -> Rule | None:
        """Return the rule of y = x W^T + b, or of y = x W + b, where the module is one of them."""
        weight, shift = self.weight, 0.0 if self.bias is None else self.bias
        if self._fits(weight.shape[1], lambda x: x @ weight.T + shift):
            return LinearAlike()
        return TransposedLinear() if self._fits(weight.shape[0], lambda x: x @ weight + shift) else None

    def _fits(self, features: int, formula: Callable[[Tensor], Tensor]) -> bool:
        try:
            return self._holds(features, formula)
        except Exception:  # of rows of another length than the module takes
            return False


def only_tensor(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    """Return the one argument of a call; raise ValueError where there is another, whose part in what the module
    computes nothing has shown."""
    given = [*arguments, *keywords.values()]
    if len(given) != 1 or not isinstance(given[0], Tensor) or given[0].is_nested:
        raise ValueError(
            f"expected one tensor, as in the trial that has shown what this module computes, got {len(given)} "
            f"argument{'s' * (len(given) != 1)}"
        )
    return given[0]


class _NormAlike(FeatureNormRule):
    def __init__(self, eps: float) -> None:
        self._eps = eps

    def feature_dims(self, module: Any) -> int:
        return 1

    def eps(self, module: Any, x: Tensor) -> float | None:
        return self._eps

    def kept(self, x: Tensor) -> Tensor:
        # A composition of operations, which need not keep their input: what is not kept may be changed in place.
        own = x.requires_grad and x.dtype in (torch.float32, torch.float64)
        return super().kept(x) if own else x.detach().clone()

    def save(
        self, module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], batch: Batch
    ) -> tuple[tuple[Tensor, ...], Any]:
        return super().save(module, (only_tensor(arguments, keywords),), {}, batch)


class RMSNormAlike(_NormAlike):
    """The rule of y = xhat w or xhat (1 + w), with xhat = x / sqrt(mean x^2 + eps)."""

    def normalized(self, module: Any, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self._eps)


class LayerNormAlike(_NormAlike):
    """The rule of y = xhat w + b, with xhat = (x - mean x) / sqrt(var x + eps)."""

    center = True

    def normalized(self, module: Any, x: Tensor) -> Tensor:
        return nnf.layer_norm(x, x.shape[-1:], eps=self._eps)


class LinearAlike(LinearRule):
    """The rule of y = x W^T + b under another name."""

    def fuses(self, module: nn.Module) -> bool:
        return False

    def ways(self, module: Any) -> str:
        first, second = module.weight.shape
        return ways(first, second, module.weight.device)  # the same for [O, I] and [I, O]

    def save(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], batch: Batch
    ) -> tuple[tuple[Tensor, ...], Any]:
        return super().save(module, (only_tensor(arguments, keywords),), {}, batch)


class TransposedLinear(LinearAlike):
    """The rule of y = x W + b, the weight being [I, O]."""

    cuts: ClassVar = {"weight": {0: Cut(input=-1), 1: Cut(output=-1)}, "bias": {0: Cut(output=-1)}}

    def factors(self, module: nn.Module, grad_output: Tensor, extra: Any, *saved: Tensor) -> dict[str, Factor]:
        batch: Batch = extra
        grad = batch.tokens(grad_output)
        factors: dict[str, Factor] = {}
        if saved:
            factors["weight"] = Outer(grad, batch.tokens(saved[0]), batch.offsets)
        if is_trainable(module, "bias"):
            factors["bias"] = RowSum(grad, None, batch.offsets)
        return factors
