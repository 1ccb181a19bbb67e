"""The factor between a backpropagated gradient and the gradient of a sample's loss, without waiting for a device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: Weights of terms are summed in float32, and not always in the same order.
_SAME = 1e-6
_DIFFERENT = (
    "loss_reduction='auto': the loss adds parts that are divided by different numbers; pass loss_reduction='mean' or "
    "'sum' with loss_terms= or scale= in place of 'auto'"
)


@dataclass(frozen=True)
class LossFactor:
    """A factor, number * tensor: what is known on the host is kept apart from what only the device knows, since
    comparing the latter on the host would synchronise."""

    number: float
    tensor: Tensor | None = None  #: float64, one number; None: 1
    doubt: str = ""  #: why the tensor may be NaN

    @property
    def tensors(self) -> list[Tensor]:
        """Factors that only the device knows."""
        return [] if self.tensor is None else [self.tensor]

    @property
    def value(self) -> float | Tensor:
        return self.number if self.tensor is None else self.tensor * self.number

    def only_where(self, known: Tensor, doubt: str) -> LossFactor:
        """Return the factor where that is true, on the device, and else NaN."""
        tensor = torch.where(known, 1.0 if self.tensor is None else self.tensor, torch.nan)
        return LossFactor(self.number, tensor.double(), doubt)

    @property
    def reason(self) -> str:
        """Reason why it is NaN, or ""; waits for the device."""
        return self.doubt if self.doubt and self.tensor is not None and bool(self.tensor.isnan()) else ""

    def differs(self, other: LossFactor) -> bool:
        """Return whether the host knows that the other factor is another one."""
        return self.number != other.number or (self.tensor is None) != (other.tensor is None)

    def equals(self, other: LossFactor) -> Tensor | None:
        """Return, of two factors that do not differ(), whether the device's tensors are equal, on the device; None
        where there are none."""
        if self.tensor is None or other.tensor is None:
            return None
        return self.tensor == other.tensor


def of_host(tensor: Tensor) -> float | Tensor:
    """Return one number as a float where reading it does not synchronise, and as a float64 tensor otherwise."""
    tensor = tensor.detach().reshape(())
    return float(tensor) if tensor.is_cpu else tensor.double()


def product(number: float, *parts: float | Tensor, doubt: str = "") -> LossFactor:
    """Return the number times all other factors; `doubt`: why one of them may be NaN."""
    tensor: Tensor | None = None
    for part in parts:
        if isinstance(part, Tensor):
            tensor = part if tensor is None else tensor * part
        else:
            number *= part
    return LossFactor(number, tensor, doubt)


def agreed(first: LossFactor, second: LossFactor) -> LossFactor | None:
    """Return the factor that both are; None where they differ. What only the device can compare becomes NaN there
    where it differs."""
    if first.tensor is None and second.tensor is None:
        return first if math.isclose(first.number, second.number, rel_tol=_SAME) else None
    one, other = (torch.as_tensor(f.value, dtype=torch.float64, device=_device(first, second)) for f in (first, second))
    same = torch.isclose(one, other, rtol=_SAME, atol=0.0)
    return LossFactor(1.0, one).only_where(same, _DIFFERENT)


def _device(*factors: LossFactor) -> torch.device:
    return next(f.tensor.device for f in factors if f.tensor is not None)
