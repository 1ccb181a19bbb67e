"""Models that put their samples into an order of their own and back, whose first batches happen to be in order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from per_sample_oracle import one_at_a_time
from torch import Tensor, nn
from torch.nn import functional as nnf

from lipcore import PerSampleGradNorms

SAMPLES = 6


class Reorders(nn.Module):
    """`there` and `back` bring rows into the order of an index, and out of it again."""

    def __init__(self, there: Callable[..., Tensor], back: Callable[..., Tensor]) -> None:
        super().__init__()
        self.before, self.inside, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.there, self.back = there, back

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        hidden = self.there(self.before(x), order)
        return self.head(self.back(torch.tanh(self.inside(hidden)), order))


def of_index(x: Tensor, order: Tensor) -> Tensor:
    return x[order]


def inverse_of_index(x: Tensor, order: Tensor) -> Tensor:
    return x[order.argsort()]


def select(x: Tensor, order: Tensor) -> Tensor:
    return x.index_select(0, order.argsort())


def put(x: Tensor, order: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[order] = x
    return out


def copied(x: Tensor, order: Tensor) -> Tensor:
    return torch.zeros_like(x).index_copy(0, order, x)


def gathered(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(0, order.argsort()[:, None].expand_as(x))


def scattered(x: Tensor, order: Tensor) -> Tensor:
    return torch.zeros_like(x).scatter(0, order[:, None].expand_as(x), x)


def multiplied(x: Tensor, order: Tensor) -> Tensor:
    return torch.eye(len(x), dtype=x.dtype)[order].T @ x


BACK = {f.__name__: f for f in (inverse_of_index, select, put, copied, gathered, scattered, multiplied)}


def batches() -> list[tuple[Tensor, Tensor]]:
    """The first one in order already."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(SAMPLES, 4, generator=generator) for _ in range(3)]
    found[0] = found[0][found[0][:, 0].argsort()]
    return [(x, torch.randint(3, (SAMPLES,), generator=generator)) for x in found]


def check_steps(model: nn.Module) -> PerSampleGradNorms:
    with PerSampleGradNorms(model, loss_reduction="mean") as norms:
        for x, y in batches():
            nnf.cross_entropy(model(x), y).backward()
            torch.testing.assert_close(norms.per_sample, one_at_a_time(model, x, y), rtol=1e-5, atol=0)
            assert not norms.unproved
    return norms


@pytest.mark.parametrize("back", BACK)
def test_a_first_batch_in_order(back: str) -> None:
    torch.manual_seed(0)
    norms = check_steps(Reorders(of_index, BACK[back]))
    assert "head.weight: head (Linear)" in str(norms.coverage())
    assert "inside.weight: inside (graph)" in str(norms.coverage())


class Picks(nn.Module):
    """Takes a place of its own in each sample, which moves no sample."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.head = nn.Linear(2, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inside(x.unflatten(1, (2, 2)))
        return self.head(hidden[torch.arange(len(x)), x[:, 0].gt(0).long()].flip(0).flip(0))


def test_what_moves_no_samples_is_left_to_its_rules() -> None:
    torch.manual_seed(0)
    assert "(graph)" not in str(check_steps(Picks()).coverage())


def test_where_no_graph_serves_it_is_refused_by_name() -> None:
    torch.manual_seed(0)
    model = Reorders(of_index, inverse_of_index)
    x, y = batches()[0]
    with PerSampleGradNorms(model, loss_reduction="mean", max_replay_bytes=0) as norms:
        nnf.cross_entropy(model(x), y).backward()
        with pytest.raises(ValueError, match="'before.weight'.*another order between this layer and its output"):
            _ = norms.per_sample
    with PerSampleGradNorms(model, loss_reduction="mean", max_replay_bytes=0, on_unsupported="skip") as norms:
        nnf.cross_entropy(model(x), y).backward()
        assert set(norms.per_parameter) == {"head.weight", "head.bias"}
