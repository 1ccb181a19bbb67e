"""First layers whose output is a view of what they have computed: another order, a part, the same elements twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import reference, seeded
from torch import Tensor, nn

from lipcore import Lipschitz, Monitor


class Viewed(nn.Linear):
    """Linear layer that returns a view of its output."""

    def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__(5, 8)
        self.view = view

    def forward(self, x: Tensor) -> Tensor:
        return self.view(super().forward(x))


class Strange(torch.autograd.Function):
    """Function whose output is a view of a tensor that no gradient passes, as what to_local() makes of a DTensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach().view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "of another shape": lambda y: y.view(-1, 2, 4),
    "transposed": lambda y: y.t().contiguous().t(),  # what a layer does that has its channels last
    "permuted": lambda y: y.view(-1, 2, 4).permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "a part": lambda y: y[:, 2:6],
    "every other one": lambda y: y.view(-1, 4, 2)[:, :, 1],
    "a part of what is transposed": lambda y: y.t().contiguous()[1:7:2].t(),
    "the same twice": lambda y: y[:, None, :3].expand(-1, 2, 3),
    "overlapping": lambda y: y.unfold(1, 3, 1),
    "of a function of its own": Strange.apply,
}
#: Which torch lets nobody change in place.
FIXED = ("the same twice", "overlapping", "of a function of its own")
CASES = [(name, in_place) for name in VIEWS for in_place in (False, True) if not (in_place and name in FIXED)]


@pytest.mark.parametrize(("name", "in_place"), CASES)
def test_constants_are_those_of_the_view(name: str, in_place: bool) -> None:
    def make() -> nn.Module:
        last = nn.LazyLinear(1)
        model = nn.Sequential(Viewed(VIEWS[name]), nn.LeakyReLU(0.3, inplace=in_place), nn.Flatten(), last)
        model(torch.zeros(1, 5))
        return model

    model = seeded(make, dtype=torch.float64)
    x = torch.randn(6, 5, dtype=torch.float64)
    norms, constants = reference(model, x)
    metric = Lipschitz(input="0", lambda_every=1)
    with Monitor(model, metrics=[metric]):
        for _ in range(2):  # the first one is checked in other ways
            model.zero_grad()
            (3 * model(x)).sum().backward()
            found = metric.per_sample
            assert torch.allclose(found.normalized_gradient_norm.double(), norms, rtol=1e-6)
            assert torch.allclose(found.local_lipschitz.double(), constants, rtol=1e-6)
