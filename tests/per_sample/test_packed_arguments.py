"""Models that are called with a dataclass or a mapping of a library, and models that add up their loss sample by
sample."""

from __future__ import annotations

import copy
import warnings
from collections import UserDict
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from few import few
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lipcore import Lipschitz, PerSampleGradNorms
from lipcore.models.containers import exchanged_leaves

B, C = 6, 3
X = torch.randn(B, 5, generator=torch.Generator().manual_seed(0))
Y = torch.randint(C, (B,), generator=torch.Generator().manual_seed(1))


@dataclass
class Batch:
    x: Any
    lengths: Tensor | None = None
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Frozen:
    x: Any


@dataclass
class Slim:
    __slots__ = ("x",)
    x: Any


PACKED: dict[str, Callable[[Tensor], Any]] = {
    "dataclass": lambda x: Batch(x, torch.ones(len(x)), ["a"]),
    "mapping of a library": lambda x: UserDict(x=x),
    "in a list of a dict": lambda x: {"x": [Batch(Frozen(x))]},
    "frozen": Frozen,
    "slots": Slim,
}


def unpacked(given: Any) -> Tensor:
    while not isinstance(given, Tensor):
        given = given[0] if isinstance(given, list) else given["x"] if hasattr(given, "keys") else given.x
    return given


class Net(nn.Module):
    """A model with parameters of its own, which no rule is for."""

    def __init__(self, returns: Callable[[Tensor, Tensor | None], Any] = lambda h, _: h) -> None:
        super().__init__()
        self.body, self.returns = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, C)), returns
        self.way, self.scale = nn.Parameter(torch.randn(5, C)), nn.Parameter(torch.randn(C))

    def forward(self, given: Any, y: Tensor | None = None) -> Any:
        x = unpacked(given)
        if isinstance(given, Batch):
            given.names.append("seen")  # passes of lipcore's own do not
        return self.returns(self.body(x) + (x @ self.way) * self.scale, y)


def truth(model: Net) -> Tensor:
    found, double = [], copy.deepcopy(model).double()
    double.returns = lambda h, _: h
    for i in range(B):
        loss = F.cross_entropy(double(X[i : i + 1].double()), Y[i : i + 1])
        gradients = torch.autograd.grad(loss, list(double.parameters()))
        found.append(sum(float(g.square().sum()) for g in gradients) ** 0.5)
    return torch.tensor(found).double()


def made(*arguments: Any) -> Net:
    torch.manual_seed(0)
    return Net(*arguments)


@pytest.mark.parametrize("name", few(PACKED, 3))
def test_the_batch_is_found_in_what_the_model_is_given(name: str) -> None:
    model, given = made(), PACKED[name](X.clone())
    with PerSampleGradNorms(model, loss_reduction="mean") as norms:
        F.cross_entropy(model(given), Y).backward()
        torch.testing.assert_close(norms.per_sample, truth(model), rtol=1e-5, atol=1e-7)
        assert not norms.unproved
        assert not norms.coverage().uncovered
    assert torch.equal(unpacked(given), X)
    assert getattr(given, "names", ["a", "seen"]) == ["a", "seen"]


class Attributes(dict[str, Any]):
    """A dict whose keys are attributes."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.__dict__ = self


@dataclass
class Derived:
    """What the model reads is no field."""

    given: Any

    def __post_init__(self) -> None:
        self.x = self.given * 2


class Store(MutableMapping[str, Any]):
    """A mapping that keeps its items in an attribute, which a copy of it shares."""

    def __init__(self, **given: Any) -> None:
        self.given = given

    def __getitem__(self, key: str) -> Any:
        return self.given[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.given[key] = value

    def __delitem__(self, key: str) -> None:
        del self.given[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.given)

    def __len__(self) -> int:
        return len(self.given)


@dataclass
class Loop:
    x: Any
    itself: Any = None

    def __post_init__(self) -> None:
        self.itself = self


class Fresh(UserDict[str, Any]):
    """Reads its tensors anew each time."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key).clone()


NOT_ANEW: dict[str, Callable[[Tensor], Any]] = {
    "keys that are attributes": lambda x: Attributes(x=x),
    "an attribute that is no field": Derived,
    "a store of its own": lambda x: Store(x=x),
    "itself": Loop,
    "tensors that are read anew": lambda x: Fresh(x=x),
}


@pytest.mark.parametrize("size", [1, B])
@pytest.mark.parametrize("name", NOT_ANEW)
def test_containers_that_cannot_be_made_anew_prove_nothing_and_stay_as_they_are(name: str, size: int) -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, C)

        def forward(self, given: Any) -> Tensor:
            rows: Tensor = self.inner(given.x if hasattr(given, "x") else given["x"])
            return rows - rows.mean(0).detach()

    model, given = Mixing(), NOT_ANEW[name](X[:size].clone())
    before = {key: each for key, each in vars(given).items() if isinstance(each, Tensor)}
    with PerSampleGradNorms(model, loss_reduction="mean") as norms:
        F.cross_entropy(model(given), Y[:size]).backward()
        assert size == 1 or "which another pass may change" in norms.unproved
    for key, each in before.items():
        assert getattr(given, key) is each
    if isinstance(given, Store):
        assert torch.equal(given["x"], X[:size])
    with pytest.raises(ValueError, match=f"a {type(given).__name__}, which cannot be made anew"):
        exchanged_leaves(lambda leaf: leaf, [given])


def test_a_module_in_a_checkpoint_may_be_called_with_any_container() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.way = nn.Parameter(torch.randn(5, C))

        def forward(self, given: Any) -> Tensor:
            return (given.x if hasattr(given, "x") else given["x"]) @ self.way

    class Outer(nn.Module):
        def __init__(self, packed: Callable[[Tensor], Any]) -> None:
            super().__init__()
            self.first, self.inner, self.packed = nn.Linear(5, 5), Inner(), packed

        def inside(self, x: Tensor) -> Tensor:
            given = self.packed(x)
            y: Tensor = self.inner(given)
            assert (given.x if hasattr(given, "x") else given["x"]) is x or isinstance(given, (Derived, Fresh))
            return y

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.inside, self.first(x), use_reentrant=False)

    for packed in (*NOT_ANEW.values(), lambda x: MappingProxyType({"x": x})):
        model = Outer(packed)
        with warnings.catch_warnings(), PerSampleGradNorms(model, loss_reduction="mean", on_unsupported="skip"):
            warnings.simplefilter("ignore")
            for _ in range(3):
                F.cross_entropy(model(X), Y).backward()


@pytest.mark.parametrize("kind", [SimpleNamespace, lambda x: MappingProxyType({"x": x})])
def test_what_is_not_looked_into_is_named(kind: Callable[..., Any]) -> None:
    with PerSampleGradNorms(made(), loss_reduction="mean") as norms:
        model, given = norms._capture.model, kind(x=X)  # type: ignore[union-attr]
        with pytest.warns(RuntimeWarning, match="stopped recording"):
            F.cross_entropy(model(given), Y).backward()
        with pytest.raises(
            ValueError, match=f"{type(given).__name__}.*in a dict or dataclass|'way'.*{type(given).__name__}"
        ):
            _ = norms.per_sample


def test_lipschitz_constants_of_a_model_that_is_given_a_dataclass() -> None:
    class Critic(Net):
        def forward(self, given: Any, y: Tensor | None = None) -> Any:
            return super().forward(given).sum(1)

    torch.manual_seed(0)
    model, x = Critic(), X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x)
    with Lipschitz(model, input="x") as metric:
        model(Batch(X.clone())).square().mean().backward()
        torch.testing.assert_close(metric.per_sample.local_lipschitz.float(), gradient.norm(dim=1))  # type: ignore[union-attr]


def one_by_one(h: Tensor, y: Tensor) -> Tensor:
    return sum((F.cross_entropy(h[i : i + 1], y[i : i + 1]) for i in range(len(h))), torch.zeros(()))


def in_a_loop(h: Tensor, y: Tensor) -> Tensor:
    loss: Any = 0.0
    for logits, target in zip(h, y, strict=True):
        loss = loss + F.cross_entropy(logits[None], target[None])
    return loss  # type: ignore[no-any-return]


LOSSES: dict[str, tuple[str, Callable[..., Any]]] = {
    "dict": ("sum", lambda h, y: {"loss": one_by_one(h, y), "logits": h}),
    "tuple": ("sum", lambda h, y: (in_a_loop(h, y), h)),
    "mean": ("mean", lambda h, y: {"loss": in_a_loop(h, y) / len(h), "logits": h}),
    "two numbers": ("sum", lambda h, y: {"loss": one_by_one(h, y), "mean": in_a_loop(h, y) / len(h), "logits": h}),
}


@pytest.mark.parametrize("reduction", ["given", "auto"])
@pytest.mark.parametrize("name", few(LOSSES, 2))
def test_a_loss_that_is_added_up_sample_by_sample(name: str, reduction: str) -> None:
    kind, returns = LOSSES[name]
    model = made(returns)
    with PerSampleGradNorms(model, loss_reduction=kind if reduction == "given" else "auto") as norms:
        for _ in range(2):
            found = model(X, Y)
            (found[0] if isinstance(found, tuple) else found["loss"]).backward()
            torch.testing.assert_close(norms.per_sample, truth(model), rtol=1e-5, atol=1e-7)
            assert not norms.unproved
            assert not norms.coverage().uncovered


def test_a_parameter_that_the_loss_uses_alone_is_still_followed() -> None:
    """A number that is made of a parameter beside the other outputs stays in the graph that is looked at."""
    model = made(lambda h, y: {"loss": one_by_one(h, y), "logits": h})
    model.returns = lambda h, y: {"loss": F.cross_entropy(h * model.scale, y), "logits": h}
    with PerSampleGradNorms(model, loss_reduction="mean") as norms:
        model(X, Y)["loss"].backward()
        double = copy.deepcopy(model).double()
        expected = []
        for i in range(B):
            h = double.body(X[i : i + 1].double()) + (X[i : i + 1].double() @ double.way) * double.scale
            loss = F.cross_entropy(h * double.scale, Y[i : i + 1])
            gradients = torch.autograd.grad(loss, list(double.parameters()))
            expected.append(sum(float(g.square().sum()) for g in gradients) ** 0.5)
        torch.testing.assert_close(norms.per_sample, torch.tensor(expected).double(), rtol=1e-5, atol=1e-7)
