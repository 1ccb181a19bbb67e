"""The logsumexp of a model's logits: what a z-loss keeps small, and what grows before a softmax overflows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lipcore.metric.results import MetricResult, Value
from lipcore.models.names import find_module
from lipcore.tensor_stats.extra import ROOT, Extra

_CHUNK = 1 << 22  # logits that are held in float32 at a time


class LogSumExp(Extra):
    """Mean and maximum of log sum exp over the last dimension of logits.

    Args:
        module: whose output they are; "" for the model's own.
    """

    kind = "logits"

    def __init__(self, module: str) -> None:
        self.place, self.modules = module or ROOT, (module,)
        self.sums, self.most = 3, 1

    @classmethod
    def described(cls, place: str, sums: int, most: int, *, named: bool) -> LogSumExp:
        found = cls("")
        found.place = place
        return found

    @property
    def rule(self) -> str:
        return "log sum exp over the last dimension, of every position"

    def read(self, module: str, output: Tensor) -> tuple[Tensor, Tensor]:
        if output.dim() < 2 or output.shape[-1] < 2:
            raise ValueError(f"{module or 'the model'} returns {list(output.shape)}, which are not logits of classes")
        rows = output.reshape(-1, output.shape[-1])
        step = max(1, _CHUNK // rows.shape[1])
        parts = [part.to(torch.promote_types(part.dtype, torch.float32)).logsumexp(1) for part in rows.split(step)]
        values = (torch.cat(parts) if parts else rows.new_zeros(0)).double()
        finite = values.isfinite()
        kept = torch.where(finite, values, 0.0)
        highest = torch.where(finite, values, -torch.inf)
        most = highest.amax().reshape(1) if len(values) else values.new_full((1,), -torch.inf)
        return torch.stack([kept.sum(), finite.sum().double(), (~finite).sum().double()]), most

    def add_to(self, result: MetricResult, sums: Tensor, most: Tensor) -> None:
        total, count, nonfinite = sums.tolist()
        if count:
            values = {"mean": total / count, "max": float(most)}
            result.add("logsumexp", self.place, "total", **{k: Value(v, int(count)) for k, v in values.items()})
        if nonfinite:
            result.add("logsumexp_nonfinite", self.place, "total", sum=Value(nonfinite, int(count + nonfinite)))


def find_logits(model: nn.Module, choice: bool | str) -> list[LogSumExp]:
    """Return what is to be watched; ValueError for the name of no module."""
    if choice is False:
        return []
    if choice is not True and not isinstance(choice, str):
        raise TypeError(f"logits: expected True, False or the name of a module, got {type(choice).__name__}")
    return [LogSumExp("" if choice is True else find_module(model, choice, "logits")[0])]
