"""Per-sample gradients of one parameter in factored form: small beside the gradients themselves, exact when joined."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor

from lipcore.layers.projections import projected


class Factor(ABC):
    """The contribution of one call of a layer to the per-sample gradients of one of its parameters.

    A parameter that is used more than once in a forward pass (a module called twice, a tied weight) gets several: their
    gradients add up before the norm is taken, so squares must never be added; :meth:`join` makes one of two.
    """

    @property
    @abstractmethod
    def samples(self) -> int:
        """The number of samples, B."""

    @cached_property
    def shape(self) -> torch.Size:
        """Shape of the parameter."""
        return self.dense(0).shape

    @abstractmethod
    def norms_sq(self) -> Tensor:
        """Return the squared norm of every sample's gradient, float64 [B]. Pure, so that it can be traced."""

    def norms_sq_with(self, other: Factor) -> tuple[Tensor, Tensor] | None:
        """Return norms_sq() of both, in one pass over what the two have in common; None where they share nothing."""
        return None

    @property
    def how(self) -> str:
        """The way in which norms_sq() is computed, where there are several: "gram", "direct", ..."""
        return ""

    @abstractmethod
    def dense(self, sample: int) -> Tensor:
        """Return the gradient of one sample, float64, in the parameter's shape."""

    def weighted_sum(self, coefficients: Tensor) -> Tensor:
        r"""Return :math:`\sum_i c_i g_i` in the parameter's shape, float32 at least; B > 0 coefficients.

        This default takes one sample's gradient at a time, as those of dots() and gram() do; a kind of factor with a
        closed form has its own.
        """
        total = coefficients[0] * self.dense(0)
        for sample in range(1, self.samples):
            total = total + coefficients[sample] * self.dense(sample)
        return total

    def projected_sum(self) -> Tensor:
        """Return the projections (:mod:`lipcore.layers.projections`) of the sum of all samples' gradients; B > 0. A
        kind of factor that has them without the sum has its own."""
        tensor = next(self.tensors())
        return projected(self.weighted_sum(torch.ones(self.samples, dtype=torch.float64, device=tensor.device)))

    def dots(self, references: Tensor) -> Tensor:
        r"""Return :math:`\langle g_i, r_k \rangle`, float64 [K, B], for references [K, \*shape of the parameter]."""
        flat = references.detach().double().flatten(1)
        columns = [flat @ self.dense(sample).flatten() for sample in range(self.samples)]
        return torch.stack(columns, 1) if columns else flat.new_zeros(len(flat), 0)

    def gram(self) -> Tensor:
        r"""Return :math:`\langle g_i, g_j \rangle`, float64 [B, B]."""
        rows = [self.dots(self.dense(sample)[None])[0] for sample in range(self.samples)]
        return torch.stack(rows) if rows else torch.zeros(0, 0, dtype=torch.float64)

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors that the factor is made of."""
        for value in vars(self).values():
            for part in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(part, Tensor):
                    yield part
                elif isinstance(part, Factor):
                    yield from part.tensors()

    def join(self, other: Factor) -> Factor:
        """Return the sum of both gradients; of the same kind where there is a closed form."""
        return Sum([self, other])


class Sum(Factor):
    """A sum of factors for which there is no closed form: one sample's gradient at a time, exact and slow."""

    def __init__(self, parts: list[Factor]) -> None:
        self.parts = parts

    @property
    def samples(self) -> int:
        return self.parts[0].samples

    def norms_sq(self) -> Tensor:
        return torch.stack([self.dense(sample).square().sum() for sample in range(self.samples)])

    def dense(self, sample: int) -> Tensor:
        total = self.parts[0].dense(sample)
        for part in self.parts[1:]:
            total = total + part.dense(sample)
        return total

    def weighted_sum(self, coefficients: Tensor) -> Tensor:
        total = self.parts[0].weighted_sum(coefficients)
        for part in self.parts[1:]:
            total = total + part.weighted_sum(coefficients)
        return total

    def projected_sum(self) -> Tensor:
        return torch.stack([part.projected_sum() for part in self.parts]).sum(0)

    def dots(self, references: Tensor) -> Tensor:
        return torch.stack([part.dots(references) for part in self.parts]).sum(0)

    def join(self, other: Factor) -> Factor:
        return Sum([*self.parts, other])


#: What is made of the factors that come together, by key: a row of numbers per sample, [B], or several, [K, B].
Measure = Callable[[Mapping[str, Factor]], dict[str, Tensor]]


def norms_sq_of(factors: Mapping[str, Factor]) -> dict[str, Tensor]:
    """Return norms_sq() of each factor; a weight and a bias, or a scale and a shift, of one gradient are read
    together."""
    found: dict[str, Tensor] = {}
    for key, factor in factors.items():
        for other, partner in factors.items():
            if partner is factor or key in found or other in found:
                continue
            pair = factor.norms_sq_with(partner)
            if pair is not None:
                found[key], found[other] = pair
    return {key: found[key] if key in found else factor.norms_sq() for key, factor in factors.items()}
