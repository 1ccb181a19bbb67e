"""Packed documents (`cu_seqlens=`) of which the model makes one output each, and layers that are called on these."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from few import few
from torch import Tensor, nn
from torch.nn import functional as F

from lipcore import PerSampleGradNorms, layers
from lipcore.layers import registry

LENGTHS = [3, 2, 4]
BOUNDARIES = torch.tensor([0, 3, 5, 9])
IDS = torch.randint(20, (9,), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2])


def documents(x: Tensor, boundaries: Tensor) -> list[Tensor]:
    ends = boundaries.tolist()
    return [x[begin:end] for begin, end in itertools.pairwise(ends)]


class Own(nn.Linear):
    """A layer with a rule of the user's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Documents(nn.Module):
    def __init__(self, pool: Callable[[Documents, Tensor, Tensor], Tensor], kind: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.pool = pool
        self.table, self.body, self.norm = nn.Embedding(20, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.head = kind(8, 3)

    def forward(self, ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        return self.pool(self, self.body(self.table(ids)).tanh(), cu_seqlens)


def pooled_first(model: Documents, x: Tensor, boundaries: Tensor) -> Tensor:
    y: Tensor = model.head(model.norm(torch.stack([each.mean(0) for each in documents(x, boundaries)])))
    return y


def pooled_last(model: Documents, x: Tensor, boundaries: Tensor) -> Tensor:
    return torch.stack([each.sum(0) for each in documents(model.head(model.norm(x)), boundaries)])


def first_rows(model: Documents, x: Tensor, boundaries: Tensor) -> Tensor:
    y: Tensor = model.head(model.norm(x[boundaries[:-1]]))
    return y


def of_both_kinds(model: Documents, x: Tensor, boundaries: Tensor) -> Tensor:
    rows = model.head(model.norm(x))  # of documents, and once more one for each
    return torch.stack([each.mean(0) for each in documents(rows, boundaries)]) + model.head(x[boundaries[:-1]])


def padded(model: Documents, x: Tensor, boundaries: Tensor) -> Tensor:
    """As many rows as all documents have, but not theirs."""
    rows = torch.stack([F.pad(each[:3], (0, 0, 0, 3 - len(each[:3]))) for each in documents(x, boundaries)])
    y: Tensor = model.head(model.norm(rows)).mean(1)
    return y


POOLS = {"first": pooled_first, "last": pooled_last, "first rows": first_rows, "both": of_both_kinds}


def truth(model: Documents) -> Tensor:
    double, found = copy.deepcopy(model).double(), []
    for i, ids in enumerate(IDS.split(LENGTHS)):
        loss = F.cross_entropy(double(ids, torch.tensor([0, len(ids)])), LABELS[i : i + 1])
        gradients = torch.autograd.grad(loss, list(double.parameters()))
        found.append(sum(float(g.square().sum()) for g in gradients) ** 0.5)
    return torch.tensor(found).double()


@pytest.fixture(autouse=True)
def registry_put_back() -> object:
    before = dict(registry._rules)
    yield
    registry._rules.clear()
    registry._rules.update(before)


@pytest.mark.parametrize("own", few([False, True], 1))
@pytest.mark.parametrize("name", few(POOLS, 2))
def test_norms_of_documents_with_one_output_each(name: str, own: bool) -> None:
    layers.register(Own, registry._rules[nn.Linear])
    torch.manual_seed(0)
    model = Documents(POOLS[name], Own if own else nn.Linear)
    with PerSampleGradNorms(model, loss_reduction="mean", cu_seqlens="cu_seqlens") as norms:
        F.cross_entropy(model(IDS, cu_seqlens=BOUNDARIES), LABELS).backward()
        torch.testing.assert_close(norms.per_sample, truth(model), rtol=1e-5, atol=1e-7)
        assert norms.unproved.endswith("the samples are packed sequences")  # nothing else is left open
        assert not norms.coverage().uncovered


def test_as_many_other_rows_as_the_documents_have_are_not_taken_for_theirs() -> None:
    torch.manual_seed(0)
    model = Documents(padded)
    with PerSampleGradNorms(model, loss_reduction="mean", cu_seqlens="cu_seqlens") as norms:
        with pytest.warns(RuntimeWarning, match="stopped recording"):
            F.cross_entropy(model(IDS, cu_seqlens=BOUNDARIES), LABELS).backward()
        with pytest.raises(ValueError, match=r"'head.weight'.*parts at other samples|'norm.weight'"):
            _ = norms.per_sample
