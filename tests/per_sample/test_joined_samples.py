"""Models that take their samples apart and put them together again, from some pass on in another order than before."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pytest
import torch
from helpers.few import few
from per_sample_oracle import one_at_a_time
from torch import Tensor, nn
from torch.nn import functional as nnf

from lipcore import PerSampleGradNorms

SAMPLES = 4
ORDER = "no pass that puts its samples into this order was proved yet"
WRITES = "the model writes the rows of its samples one after the other"
pytestmark = pytest.mark.filterwarnings("ignore:lipcore:UserWarning")
Join = Callable[[Tensor, Sequence[int]], Tensor]


def stacked(x: Tensor, order: Sequence[int]) -> Tensor:
    rows = x.unbind(0)
    return torch.stack([rows[i] for i in order])


def selected(x: Tensor, order: Sequence[int]) -> Tensor:
    return torch.stack([x[i] for i in order])


def listed(x: Tensor, order: Sequence[int]) -> Tensor:
    by_sample = dict(enumerate(x))
    return torch.vstack([by_sample[i] for i in order])


def sliced(x: Tensor, order: Sequence[int]) -> Tensor:
    return torch.cat([x[i : i + 1] for i in order])


def narrowed(x: Tensor, order: Sequence[int]) -> Tensor:
    return torch.cat([x.narrow(0, i - len(x), 1) for i in order])


def split(x: Tensor, order: Sequence[int]) -> Tensor:
    parts = x.split(1)
    return torch.cat([parts[i] for i in order])


def split_by_sizes(x: Tensor, order: Sequence[int]) -> Tensor:
    """For orders that begin somewhere and go round."""
    first, second = x.split([order[0], len(x) - order[0]])
    return torch.cat([second, first])


def tensor_split(x: Tensor, order: Sequence[int]) -> Tensor:
    return torch.cat(x.tensor_split([order[0]])[::-1])


def around(x: Tensor, order: Sequence[int]) -> Tensor:
    return torch.cat([x[order[0] :], x[: order[0]]])


def rolled(x: Tensor, order: Sequence[int]) -> Tensor:
    return x.roll(-order[0], 0)


def multiplied(x: Tensor, order: Sequence[int]) -> Tensor:
    return torch.eye(len(x), dtype=x.dtype)[list(order)] @ x


def added_to(x: Tensor, order: Sequence[int]) -> Tensor:
    return torch.addmm(x.new_zeros(1), torch.eye(len(x), dtype=x.dtype)[list(order)], x)


def looked_up(x: Tensor, order: Sequence[int]) -> Tensor:
    return nnf.embedding(torch.tensor(order), x)


def flat(x: Tensor, order: Sequence[int]) -> Tensor:
    return torch.cat([x[i] for i in order]).view(x.shape)


def rolled_flat(x: Tensor, order: Sequence[int]) -> Tensor:
    return x.reshape(-1).roll(-order[0] * x.shape[1], 0).view(x.shape)


VALUES = (multiplied, added_to, looked_up)  # read in every pass
JOINS = [
    stacked,
    sliced,
    rolled,
    multiplied,
    added_to,
    looked_up,
    flat,
    rolled_flat,
    selected,
    listed,
    narrowed,
    split,
    split_by_sizes,
    tensor_split,
    around,
]


class Linear(nn.Linear):
    """A type that no rule is for."""

    def forward(self, x: Tensor) -> Tensor:
        return nnf.linear(x, self.weight + 0, self.bias)


class Joins(nn.Module):
    """One layer sees the samples in the order of `now`."""

    def __init__(self, join: Join, layer: type[nn.Linear]) -> None:
        super().__init__()
        self.join, self.now = join, range(SAMPLES)
        self.inside, self.head = layer(5, 5), nn.Linear(5, 3)

    def order(self, samples: int) -> list[int]:
        return [i for i in self.now if i < samples] + list(range(SAMPLES, samples))

    def forward(self, x: Tensor) -> Tensor:
        now = self.order(len(x))
        hidden = self.inside(self.join(x, now)).tanh()
        return self.head(self.join(hidden, [now.index(i) for i in range(len(x))]))


def steps(model: Joins, orders: Sequence[Sequence[int]]) -> list[tuple[bool, str]]:
    """Return for each pass whether its norms are right, and why they are not proved."""
    torch.manual_seed(0)
    found = []
    with PerSampleGradNorms(model, loss_reduction="mean") as norms:
        for order in orders:
            model.now = order  # type: ignore[assignment]
            x, y = torch.randn(SAMPLES, 5), torch.randint(3, (SAMPLES,))
            nnf.cross_entropy(model(x), y).backward()
            right = torch.allclose(norms.per_sample, one_at_a_time(model, x, y), rtol=1e-4)
            found.append((right, norms.unproved))
            model.zero_grad()
    return found


AS_GIVEN, ROUND, BACK = (0, 1, 2, 3), (1, 2, 3, 0), (3, 0, 1, 2)


@pytest.mark.parametrize("layer", [nn.Linear, Linear])
@pytest.mark.parametrize("join", few(JOINS, 4))
def test_another_order_in_later_passes(join: Join, layer: type[nn.Linear]) -> None:
    found = steps(Joins(join, layer), [AS_GIVEN] * 3 + [ROUND, BACK] * 3)
    assert found[:3] == [(True, "")] * 3
    assert all(right or unproved for right, unproved in found)  # never silently
    assert found[3] == (True, "") if join in VALUES else found[3][1] == ORDER
    assert found[-4:] == [(True, "")] * 4  # whatever the order is from now on


def test_one_order_in_all_passes_is_left_to_the_rule() -> None:
    model = Joins(stacked, nn.Linear)
    model.now = BACK  # type: ignore[assignment]
    with PerSampleGradNorms(model, loss_reduction="mean") as norms:
        nnf.cross_entropy(model(torch.randn(SAMPLES, 5)), torch.randint(3, (SAMPLES,))).backward()
        assert "inside.weight: inside (graph)" in str(norms.coverage())
    model.now = AS_GIVEN  # type: ignore[assignment]
    with PerSampleGradNorms(model, loss_reduction="mean") as norms:
        for _ in range(8):
            nnf.cross_entropy(model(torch.randn(SAMPLES, 5)), torch.randint(3, (SAMPLES,))).backward()
            assert not norms.unproved
        assert "(graph)" not in str(norms.coverage())


class Writes(Joins):
    def forward(self, x: Tensor) -> Tensor:
        now = self.order(len(x))
        hidden, out = self.inside(x[now]).tanh(), torch.zeros_like(x)
        for place, i in enumerate(now):
            out[i] = hidden[place]
        return self.head(out)


def test_places_that_the_graph_does_not_show() -> None:
    found = steps(Writes(stacked, nn.Linear), [AS_GIVEN] * 3 + [ROUND, BACK] * 3)
    assert found[0] == (True, "")
    assert all(WRITES in unproved for _, unproved in found[1:])


class SomeOneByOne(nn.Module):
    """Stochastic depth by lists."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        keep = sorted(torch.randperm(len(x))[: len(x) // 2].tolist())
        more = self.inside(torch.stack([x[i] for i in keep])).tanh()
        rows = list(x.unbind(0))
        for place, i in enumerate(keep):
            rows[i] = rows[i] + more[place]
        return self.head(torch.stack(rows))


@pytest.mark.filterwarnings("ignore:lipcore stopped")
@pytest.mark.parametrize("seed", few(range(8), 2))
def test_some_samples_by_lists_are_right_or_refused_with_a_reason(seed: int) -> None:
    torch.manual_seed(seed)
    model, x, y = SomeOneByOne(), torch.randn(5, 5), torch.randint(3, (5,))
    with PerSampleGradNorms(model, loss_reduction="mean") as norms:
        losses = nnf.cross_entropy(model(x), y, reduction="none")
        losses.mean().backward(retain_graph=True)
        try:
            found = norms.per_sample
        except ValueError as error:
            refusal = str(error)
        else:
            refusal = ""
    if refusal:
        assert re.search("'inside.bias'.*(in another place|another one for one sample more)", refusal)
        return
    each = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    torch.testing.assert_close(
        found, torch.stack([torch.cat([g.flatten() for g in row]).norm() for row in each]).double()
    )
