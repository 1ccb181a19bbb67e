"""Backward passes of lipcore's own in sharded models leave the training as it is: where modules have not run yet, and
where such a pass breaks off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sharded_nets import Net, sharded
from torch import Tensor

from lipcore import Lipschitz, Monitor, PerSampleGradNorms, Trajectory
from lipcore.metric.protocol import Metric

dist = torch.distributed
pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed"),
    pytest.mark.usefixtures("group_of_one_rank"),
]


class Seldom(Net):
    """A layer runs in later passes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.aside, self.passes = torch.nn.Linear(8, 8), 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        self.passes += 1
        return self.last(self.aside(hidden) if self.passes > 2 else hidden)


class AllAtOnce(torch.autograd.Function):
    """An identity that takes no gradients of some samples alone, as a pass for which memory is missing takes none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        if not bool(grad.any(1).all()):
            raise RuntimeError("a sample without gradient")
        return grad


class BreaksOff(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(AllAtOnce.apply(torch.tanh(self.first(x))))


def trained(kind: type[Net], *metrics: Metric) -> list[Tensor]:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    torch.manual_seed(0)
    model = sharded(kind(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, metrics=[*metrics, Trajectory()], window_steps=None) if metrics else None
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
    if monitor is not None:
        monitor.close()
        assert monitor.compute() is not None
        assert not monitor.metrics["trajectory"].off
    return [parameter.full_tensor().detach() for parameter in model.parameters()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [Seldom, BreaksOff])
@pytest.mark.filterwarnings("ignore:lipcore turned local_lipschitz off:UserWarning")
def test_the_training_is_bit_for_bit_the_same(kind: type[Net]) -> None:
    plain = trained(kind)
    for metric in (Lipschitz(input="first"), PerSampleGradNorms(loss_reduction="mean", on_unsupported="skip")):
        assert all(map(torch.equal, trained(kind, metric), plain)), metric.name
