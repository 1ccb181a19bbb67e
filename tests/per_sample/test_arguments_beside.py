"""Models that are called with more than one tensor, some of which have samples elsewhere, or a size that is the batch's
by chance: the norms are those of one sample at a time."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from few import few
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from lipcore import Lipschitz, Monitor, PerSampleGradNorms

D, H, C = 6, 8, 3


class Model(nn.Module):
    """Layers with rules, one without (GRU), and parameters of its own."""

    def __init__(self, between: Callable[[Any, Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(D, H), nn.Linear(H, C)
        self.way, self.scale = nn.Parameter(torch.randn(H, H) * 0.4), nn.Parameter(torch.rand(H) + 0.5)
        self.gru, self.beside = nn.GRU(H, H, 2, batch_first=True), nn.Linear(D, H)
        self.between = between

    def forward(self, x: Tensor, beside: Any = None) -> Tensor:
        y: Tensor = self.head((self.between(self, self.first(x), beside) @ self.way).tanh() * self.scale)
        return y


def attention(model: Any, h: Tensor, mask: Tensor) -> Tensor:
    scores = (h @ model.way) @ h.transpose(1, 2)
    scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, -9.0)
    return (scores.softmax(-1) @ h).mean(1)


def positions(model: Any, h: Tensor, at: Tensor) -> Tensor:
    return (h * at[:, None]).mean(1)


def state(model: Any, h: Tensor, begun: Tensor) -> Tensor:
    y: Tensor = model.gru(h, begun)[0][:, -1]
    return y


def padding(model: Any, h: Tensor, mask: Tensor) -> Tensor:
    return (h * mask.t()[..., None]).sum(1)


def lengths(model: Any, h: Tensor, long: Tensor) -> Tensor:
    """Of h [T, B, H]."""
    inside = torch.arange(len(h))[:, None] < long
    return (h * inside[..., None]).sum(0) / long[:, None]


def both(model: Any, h: Tensor, other: Tensor) -> Tensor:
    y: Tensor = (h + model.beside(other)).tanh().mean(1)
    return y


def padded(model: Any, h: Tensor, _: Any) -> Tensor:
    rows = [row[: 1 + 2 * i % len(row)] * model.scale for i, row in enumerate(h)]
    return pad_sequence(rows, batch_first=True).mean(1)


def written(model: Any, h: Tensor, _: Any) -> Tensor:
    out = torch.zeros_like(h)
    for i, row in enumerate(h):
        out[i, : 1 + i] = row[: 1 + i] * model.scale
    return out.mean(1)


class Case(NamedTuple):
    """A model's middle; what it is called with beside x, made of x; the batch's dimension; whether all passes are
    proved, or like those that were."""

    between: Callable[[Any, Tensor, Any], Tensor]
    beside: Callable[[Tensor], Any]
    dim: int = 0
    clear: bool = True


CASES = {
    "state": Case(state, lambda x: torch.randn(2, len(x), H)),
    "mask": Case(attention, lambda x: torch.ones(x.shape[1], x.shape[1]).tril().bool()),
    "padded": Case(padded, lambda x: None, clear=False),
    "lengths": Case(lengths, lambda x: torch.arange(1, x.shape[1] + 1).clamp(max=len(x)), dim=1),
    "number mask": Case(attention, lambda x: torch.zeros(x.shape[1], x.shape[1]).tril() - 1),
    "positions": Case(positions, lambda x: torch.arange(1, x.shape[1] + 1)),
    "time first mask": Case(padding, lambda x: torch.rand(x.shape[1], len(x)) > 0.3),
    "slice": Case(both, lambda x: x[:, :1]),
    "detached": Case(both, lambda x: x.detach()),
    "same": Case(both, lambda x: x),
    "written": Case(written, lambda x: None, clear=False),
}
ROWS = [("state", 5, 5, False), ("mask", 5, 5, False), ("slice", 4, 5, True), ("padded", 4, 5, False)]
ROWS += [("lengths", 4, 5, False)]
ROWS += [
    (name, *sizes, lipschitz)
    for name, case in CASES.items()
    for sizes in ((4, 5), (5, 5), (2, 2))
    for lipschitz in (False, True)
    if (name, *sizes, lipschitz) not in ROWS and not (lipschitz and case.dim)  # which Lipschitz wants first
]


def one_by_one(model: Model, x: Tensor, beside: Any, labels: Tensor) -> Tensor:
    double = copy.deepcopy(model).double()
    beside = beside.double() if isinstance(beside, Tensor) and beside.is_floating_point() else beside
    found = []
    for loss in F.cross_entropy(double(x.double(), beside), labels, reduction="none"):
        gradients = torch.autograd.grad(loss, list(double.parameters()), allow_unused=True, retain_graph=True)
        found.append(sum(float(g.square().sum()) for g in gradients if g is not None) ** 0.5)
    return torch.tensor(found).double()


@pytest.mark.parametrize("row", few(ROWS, 5), ids=str)
def test_norms(row: tuple[str, int, int, bool]) -> None:
    name, samples, steps, lipschitz = row
    case = CASES[name]
    torch.manual_seed(0)
    model, norms = Model(case.between), PerSampleGradNorms(loss_reduction="sum", batch_dim=case.dim)
    metrics: list[Any] = [*([Lipschitz()] if lipschitz else []), norms]
    with Monitor(model, torch.optim.SGD(model.parameters(), 0.1), metrics, window_steps=None):
        for _ in range(3):
            x = torch.randn(*((samples, steps) if case.dim == 0 else (steps, samples)), D)
            beside, labels = case.beside(x), torch.randint(C, (samples,))
            expected = one_by_one(model, x, beside, labels)
            F.cross_entropy(model(x, beside), labels, reduction="sum").backward()
            torch.testing.assert_close(norms.per_sample, expected, rtol=1e-5, atol=1e-7)
            assert not (norms.unproved and case.clear)


class First(nn.Module):
    """Is called with the time of all samples before them."""

    def __init__(self, returns: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.time, self.layer, self.head, self.returns = nn.Linear(1, H), nn.Linear(D, H), nn.Linear(H, C), returns

    def forward(self, first: Any, *others: Any) -> Any:
        time = first["t"] if isinstance(first, dict) else first
        others = (first["seen"], *others) if isinstance(first, dict) else others
        x = others[0]
        while not isinstance(x, Tensor):
            x = x["x"] if isinstance(x, dict) else x[0]
        return self.returns(self.head((self.time(time[:, :1]) + self.layer(x)).tanh()))


GIVEN: dict[str, Callable[[Tensor, Tensor], tuple[Any, ...]]] = {
    "two": lambda t, x: (t, x),
    "dict in a dict": lambda t, x: ({"t": t, "seen": {"x": x}},),
    "dict beside": lambda t, x: (t, {"x": {"x": x}}),
    "tuple in a tuple": lambda t, x: (t, ((x,),)),
}
RETURNED: dict[str, Callable[[Tensor], Any]] = {
    "as it is": lambda y: y,
    "flat": lambda y: y.flatten(),
    "transposed": lambda y: y.t(),
    "one row": lambda y: y[None],
    "list": list,
    "a number": lambda y: y.square().sum(),
}


#: As wide as the batch, and all in one row: nothing tells that from a text [1, T] with positions [T, ...].
ALL = [(g, r, w) for w in (1, 5) for g in GIVEN for r in RETURNED if (r, w) != ("one row", 5)]


@pytest.mark.parametrize("case", few(ALL, 6), ids=str)
def test_a_first_tensor_of_one_row_is_not_taken_for_a_batch_of_one(case: tuple[str, str, int]) -> None:
    given, returned, wide = case
    model = First(RETURNED[returned])
    arguments = GIVEN[given](torch.rand(1, wide), torch.randn(5, D))
    with warnings.catch_warnings(), PerSampleGradNorms(model, loss_reduction="sum") as norms:
        warnings.simplefilter("ignore")
        result = model(*arguments)
        result = torch.stack(result) if isinstance(result, list) else result
        result.square().sum().backward()
        try:
            assert norms.unproved
        except ValueError as error:  # which is raised once
            if "samples" not in str(error):
                raise
