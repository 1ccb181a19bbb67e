r"""What normalising layers share: :math:`y = \hat x \odot \gamma + \beta`.

xhat is computed from the input once more: (y - beta) / gamma has no answer where gamma is 0, and few digits near it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lipcore.layers.calls import apart_from_autocast, at_least_float32, check_channels, is_trainable, tensor_argument
from lipcore.layers.factor import Factor
from lipcore.layers.factor_norm import NormalizedRowSum
from lipcore.layers.factor_sums import ChannelSum, RowSum
from lipcore.layers.rule import Batch, Rule

_HOW = "sums over positions"


class FeatureNormRule(Rule):
    """The rule of layers with scale and bias of the last dimensions, module.normalized_shape."""

    methods = ()
    how = _HOW
    center = False  #: the mean of a row is taken off

    def feature_dims(self, module: Any) -> int:
        return len(module.normalized_shape)

    def eps(self, module: Any, x: Tensor) -> float | None:
        """Return what is added to the variance of a row of x; None where xhat is more than a row over the root of its
        variance and that."""
        return None

    @abstractmethod
    def normalized(self, module: Any, x: Tensor) -> Tensor:
        """Return xhat of x, in x's type."""

    def kept(self, x: Tensor) -> Tensor:
        """Return x, or a copy where torch does not keep x: it may be changed in place before the backward pass."""
        return apart_from_autocast(x)

    def save(
        self, module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], batch: Batch
    ) -> tuple[tuple[Tensor, ...], Any]:
        x = tensor_argument(arguments, keywords)
        batch.check(x, self.feature_dims(module))
        return ((self.kept(x),) if is_trainable(module, "weight") else ()), batch

    def factors(self, module: Any, grad_output: Tensor, extra: Any, *saved: Tensor) -> dict[str, Factor]:
        batch: Batch = extra
        shape = grad_output.shape[grad_output.dim() - self.feature_dims(module) :]
        factors: dict[str, Factor] = {}

        def rows(x: Tensor) -> Tensor:
            return batch.tokens(x, len(shape)).flatten(-len(shape))

        grad = rows(grad_output)
        if saved:
            factors["weight"] = self._scale(module, grad, saved[0], rows, batch.offsets, shape)
        if is_trainable(module, "bias"):
            factors["bias"] = RowSum(grad, None, batch.offsets, shape)
        return factors

    def _scale(
        self,
        module: Any,
        grad: Tensor,
        x: Tensor,
        rows: Callable[[Tensor], Tensor],
        offsets: Tensor | None,
        shape: torch.Size,
    ) -> RowSum:
        eps = self.eps(module, x) if x.dtype == grad.dtype else None
        if eps is None:
            return RowSum(grad, rows(self.normalized(module, at_least_float32(x))), offsets, shape)

        def normalized(raw: Tensor) -> Tensor:
            features = at_least_float32(raw).unflatten(-1, shape)
            return self.normalized(module, features).flatten(-len(shape))

        return NormalizedRowSum(
            *(grad, rows(x)),
            eps=eps,
            center=self.center,
            normalized=normalized,
            offsets=offsets,
            shape=shape,
        )


class ChannelNormRule(Rule):
    """The rule of layers with scale and bias of the second dimension."""

    methods = ()
    how = _HOW

    @abstractmethod
    def normalized(self, module: Any, x: Tensor, *statistics: Tensor) -> Tensor:
        """Return xhat of x, in x's type, by the statistics of save_statistics()."""

    def save_statistics(self, module: Any) -> tuple[Tensor, ...]:
        """Return the buffers that the call reads."""
        return ()

    def kept(self, x: Tensor) -> Tensor:
        """Return x, or a copy, as in FeatureNormRule."""
        return x

    def dims(self, module: Any) -> int | None:
        """Return how many dimensions an input with a batch has, where that is certain."""
        return None

    def sample_dim(self, module: nn.Module, grad_output: Tensor, batch: Batch) -> int:
        return 0

    def save(
        self, module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], batch: Batch
    ) -> tuple[tuple[Tensor, ...], Any]:
        x = tensor_argument(arguments, keywords)
        check_channels(x, batch, self.dims(module))
        return ((self.kept(x), *self.save_statistics(module)) if is_trainable(module, "weight") else ()), None

    def factors(self, module: nn.Module, grad_output: Tensor, extra: Any, *saved: Tensor) -> dict[str, Factor]:
        factors: dict[str, Factor] = {}
        if saved:
            xhat = self.normalized(module, at_least_float32(saved[0]), *saved[1:])
            factors["weight"] = ChannelSum(grad_output, xhat)
        if is_trainable(module, "bias"):
            factors["bias"] = ChannelSum(grad_output)
        return factors
