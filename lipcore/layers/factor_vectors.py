"""Gradients of small parameters, which are made as they are: one vector per sample."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from lipcore.layers.factor import Factor
from lipcore.layers.factor_products import vector_dots, vector_gram, vector_sum


class Vectors(Factor):
    """Base of factors whose gradients are smaller than what they are made of."""

    @abstractmethod
    def vectors(self) -> Tensor:
        """Return the gradients, [B, N], in float32 at least, as torch sums the batch's."""

    def weighted_sum(self, coefficients: Tensor) -> Tensor:
        return vector_sum(self.vectors(), coefficients, self.shape)

    def dots(self, references: Tensor) -> Tensor:
        return vector_dots(self.vectors(), references)

    def gram(self) -> Tensor:
        return vector_gram(self.vectors())
