"""Gradients that single samples' gradients are multiplied with."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lipcore.layers import Factor
from lipcore.models.bits import bits_of
from lipcore.models.names import listed

#: A gradient by parameter name; parameters without one may be None.
Gradient = Mapping[str, Tensor | None]


class References:
    """K gradients, and what makes the inner products with them of layers' factors: rows [K, B] per parameter.

    The tensors are copied, since a ``.grad`` that they come from is written into by the next backward pass.

    Args:
        given: one gradient, or a sequence of several.

    Attributes:
        single: it was one, and not a sequence.
    """

    def __init__(self, given: Any) -> None:
        self.single = isinstance(given, Mapping)
        several = [given] if self.single else given
        if not isinstance(several, Sequence) or isinstance(several, str) or not several:
            raise TypeError(f"reference: expected {_EXPECTED}, got {_kind(given)}")
        self._rows: dict[str, Tensor] = {}
        for k, gradient in enumerate(several):
            if not isinstance(gradient, Mapping):
                raise TypeError(f"{self._at(k)}: expected {_EXPECTED}, got {_kind(gradient)}")
            for name, tensor in gradient.items():
                self._check(k, name, tensor, several[0])
        self.columns = len(several)
        for name, first in several[0].items():
            if first is None:
                continue
            for k, gradient in enumerate(several):
                if gradient.get(name) is None:
                    raise ValueError(
                        f"{self._at(k)}: has no {name!r}, which {self._at(0)} has; give zeros where it does not count"
                    )
            dtype = torch.promote_types(first.dtype, torch.float32)
            self._rows[name] = torch.stack([gradient[name].detach().to(dtype) for gradient in several])

    def _at(self, k: int, name: str = "") -> str:
        return ("reference" if self.single else f"reference[{k}]") + (f"[{name!r}]" if name else "")

    def _check(self, k: int, name: Any, tensor: Any, first: Gradient) -> None:
        """Raise for what is no gradient of a parameter, or another one's than the first reference has."""
        if tensor is None:
            return
        plain = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.layout == torch.strided
        if not plain or hasattr(tensor, "placements"):
            raise TypeError(
                f"{self._at(k, name)}: expected a dense floating-point tensor of the parameter's shape, got "
                f"{_kind(tensor)}; to_dense() a sparse one, full_tensor() a sharded one"
            )
        other = first.get(name)
        if other is None or (other.shape, other.device) != (tensor.shape, tensor.device):
            what = "nothing" if other is None else f"{list(other.shape)} on {other.device}"
            raise ValueError(
                f"{self._at(k, name)}: {list(tensor.shape)} on {tensor.device}, where {self._at(0)} has {what}; all "
                "references are of the same parameters"
            )

    def check(self, parameters: Mapping[str, Tensor], measured: Collection[str]) -> None:
        """Raise ValueError unless they are gradients of these parameters, and of all measured ones."""
        for name, rows in self._rows.items():
            parameter = parameters.get(name)
            if parameter is None:
                raise ValueError(
                    f"{self._at(0, name)}: the model has no parameter of that name (a shared one goes by its first, "
                    f"one in a wrapper such as DDP by its name inside); it has {listed(list(parameters))}"
                )
            if parameter.shape != rows.shape[1:] or parameter.device != rows.device:
                raise ValueError(
                    f"{self._at(0, name)}: expected shape {list(parameter.shape)} on {parameter.device}, as the "
                    f"parameter, got {list(rows.shape[1:])} on {rows.device}"
                )
        missing = [name for name in measured if name not in self._rows]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise ValueError(
                f"{self._at(0)}: expected a gradient of every measured parameter, found none of "
                f"{', '.join(map(repr, missing[:5]))}{more}; give zeros where a parameter does not count, or freeze it"
            )

    @property
    def nbytes(self) -> int:
        """Bytes that the copies take."""
        return sum(rows.nbytes for rows in self._rows.values())

    def bits(self) -> Tensor:
        """Return a sum of the elements' bits, int64: the same for the same references. Queued where they are."""
        found = torch.zeros((), dtype=torch.int64, device="cpu")
        for name in sorted(self._rows):
            added = bits_of(self._rows[name]) * (2 * zlib.crc32(name.encode()) + 1)
            found = found.to(added.device) + added
        return found

    def __call__(self, factors: Mapping[str, Factor]) -> dict[str, Tensor]:
        """Return the inner products of each factor's gradients with the references, float64 [K, B]."""
        found = {}
        for name, factor in factors.items():
            rows = self._rows[name]
            with torch.autocast(rows.device.type, enabled=False):
                found[name] = factor.dots(rows)
        return found


_EXPECTED = "a dict of parameter names to tensors, or a list of such dicts"


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        sharded = "a DTensor" if hasattr(value, "placements") else "a tensor"
        return f"{sharded} of {value.dtype}, {str(value.layout).removeprefix('torch.')}"
    return f"an empty {type(value).__name__}" if isinstance(value, Sequence) and not value else type(value).__name__
