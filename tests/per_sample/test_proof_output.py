"""Models that return their loss: proofs begin at the output that `output=` names, and what is behind it is the loss."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lipcore import Lipschitz, Monitor, PerSampleGradNorms

SIZE = 6


class Model(nn.Module):
    """Returns its loss; `way` is what happens between the body and the head."""

    def __init__(self, way: Callable[[Any, Tensor], Tensor] | None = None, returns: str = "loss") -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 7), nn.Tanh())
        self.head, self.way, self.returns = nn.Linear(7, 3), way, returns

    def forward(self, x: Tensor, y: Tensor) -> Any:
        hidden = self.body(x)
        logits = self.head(hidden if self.way is None else self.way(self, hidden))
        loss = F.cross_entropy(logits, y)
        if self.returns == "past":
            loss = loss + hidden.mean(0).square().sum()
        parts = {"loss": loss, "logits": logits, "hidden": hidden, "centred": hidden - hidden.mean(0)}
        return parts if self.returns == "dict" else loss


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(SIZE, 5, generator=generator), torch.randint(3, (SIZE,), generator=generator)


def made(*arguments: Any, **settings: Any) -> Model:
    torch.manual_seed(0)
    return Model(*arguments, **settings)


def alone(model: nn.Module) -> Tensor:
    """The norm of every sample's gradient, one at a time."""
    norms = []
    for x, y in zip(*data(), strict=True):
        gradients = torch.autograd.grad(model(x[None], y[None]), list(model.parameters()))
        norms.append(torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt())
    return torch.stack(norms)


def measured(model: nn.Module, loss: Callable[[Any], Tensor] = lambda out: out, **settings: Any) -> PerSampleGradNorms:
    with PerSampleGradNorms(model, loss_reduction="mean", **settings) as norms:
        for _ in range(2):
            loss(model(*data())).backward()
            assert norms.per_sample.shape == (SIZE,)
    return norms


def test_without_it_nothing_is_proved_and_the_way_out_is_named() -> None:
    norms = measured(made())
    assert "output='<module>'" in norms.unproved
    assert norms.compute().norm["total"]["mean"].label == "heuristic"


@pytest.mark.parametrize("name", ["head", "body", "body.0"])
def test_a_module_inside(name: str) -> None:
    norms = measured(made(), output=name)
    assert relative_error(norms.per_sample, alone(made())) <= 1e-5
    total = norms.compute().norm["total"]["mean"]
    if name == "head":
        assert not norms.unproved
        assert total.label == "exact"
    else:  # the head lies behind it
        assert "reaches layer 'head' past the output" in norms.unproved
        assert total.label == "heuristic"


@pytest.mark.parametrize("choice", ["logits", "head", lambda out: out["logits"]], ids=["key", "module", "function"])
def test_a_part_of_what_is_returned(choice: Any) -> None:
    norms = measured(made(returns="dict"), lambda out: out["loss"], output=choice)
    assert not norms.unproved
    assert relative_error(norms.per_sample, alone(Returning(made(returns="dict")))) <= 1e-5


class Returning(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = self.inner(x, y)["loss"]
        return loss


def test_samples_that_mix_or_move_before_it_are_refused_by_name() -> None:
    ways: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "parts at other samples": lambda m, h: h - h.mean(0),
        "row 0 is that of sample 5": lambda m, h: h.flip(0),
        "when the other samples are exchanged": lambda m, h: h - h.mean(0).detach(),
    }
    for message, way in ways.items():
        with pytest.warns(RuntimeWarning, match="stopped recording"), pytest.raises(ValueError, match=message):
            measured(made(way), output="head")


def test_a_loss_that_comes_past_it_is_not_proved() -> None:
    norms = measured(made(returns="past"), output="head")
    assert "the loss reaches layer 'body.0' past the output" in norms.unproved
    assert norms.compute().norm["total"]["mean"].label == "heuristic"
    used = measured(made(returns="dict"), lambda out: out["loss"] + out["hidden"].sum(), output="logits")
    assert not used.unproved  # it lies on the way to the logits
    used = measured(made(returns="dict"), lambda out: out["loss"] + out["centred"][0].sum(), output="logits")
    assert "past the output" in used.unproved


def test_every_later_pass_says_so_too() -> None:
    model = made(returns="past")
    with PerSampleGradNorms(model, loss_reduction="mean", output="head") as norms:
        for _ in range(4):
            model(*data()).backward()
            assert "past the output" in norms.unproved


@pytest.mark.parametrize(
    ("choice", "kind", "message"),
    [
        ("haed", ValueError, "output: there is no 'haed' in what the model returns"),
        (3, TypeError, "output: expected the name of a module, a key or a function, got 3"),
    ],
)
def test_what_is_not_there(choice: Any, kind: type[Exception], message: str) -> None:
    with warnings.catch_warnings(), pytest.raises(kind, match=message):
        warnings.simplefilter("ignore")
        measured(made(), output=choice)
    if kind is ValueError:
        with pytest.raises(ValueError, match="output: "):
            PerSampleGradNorms(nn.Sequential(nn.Linear(2, 2)), loss_reduction="mean", output=choice)


def test_a_module_that_does_not_run_proves_nothing() -> None:
    model = made()
    model.unused = nn.Linear(2, 2)
    with PerSampleGradNorms(model, loss_reduction="mean", output="unused") as norms:
        model(*data()).backward()
        assert "did not run in the pass" in norms.unproved


def test_inside_a_checkpoint_and_a_compiled_model(fresh_dynamo: Any) -> None:
    model = made(lambda m, h: checkpoint(torch.tanh, h, use_reentrant=False))
    assert not measured(model, output="head").unproved
    compiled = torch.compile(made(), backend="aot_eager")
    assert "inside a compiled region" in measured(compiled, output="head").unproved
    compiled = torch.compile(made(returns="dict"), backend="aot_eager")
    assert not measured(compiled, lambda out: out["loss"], output="logits").unproved


def test_it_leaves_nothing_behind() -> None:
    model = made()
    with PerSampleGradNorms(model, loss_reduction="mean", output="head"):
        model(*data()).backward()
        copied = pickle.loads(pickle.dumps(model))
        for other in (copy.deepcopy(model), copied):
            other(*data()).backward()
    assert not model.head._forward_hooks


def test_lipschitz_names_the_way_out_too() -> None:
    model = made()
    message = r"output='<module>'"
    with (
        pytest.warns((UserWarning, RuntimeWarning), match=message),
        pytest.raises(ValueError, match=message),
        Monitor(model, metrics=[Lipschitz()]) as monitor,
    ):
        model(*data()).backward()
    with Monitor(model, metrics=[Lipschitz(output="head")]) as monitor:
        model(*data()).backward()
        monitor.step()
        value = monitor.compute()["lipschitz"].local_lipschitz["head:Linear"].mean
    assert value.valid
    assert value.count == SIZE
