"""Every way out that messages about local Lipschitz constants name is tried: the constant comes, and is float64's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from any_models import constants
from models import Graph
from remedies import Remedy, try_it
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lipcore import Lipschitz, Monitor, local_lipschitz

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
Output = Callable[[Any], Tensor]


def net(*middle: nn.Module, last: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), *middle, nn.Tanh(), nn.Linear(6, last))


def graph(rule: Callable[..., Any], **parts: nn.Module) -> Graph:
    torch.manual_seed(0)
    return Graph(rule, **({"a": nn.Linear(3, 6), "b": nn.Linear(6, 1)} | parts))


# ---- at given points


def at_points(model: nn.Module, x: Tensor = X, by: Output = lambda out: out, **settings: Any) -> None:
    """The constants are right at these points."""
    found = local_lipschitz(model, x, **settings)
    expected = constants(copy.deepcopy(model), x, by)
    assert torch.allclose(found, expected, rtol=1e-5)


def jacobians(model: nn.Module) -> None:
    found = local_lipschitz(model, X, quantity="jacobian")
    twin = copy.deepcopy(model).double()
    for row, x in zip(found, X.double(), strict=True):
        expected = torch.linalg.matrix_norm(torch.autograd.functional.jacobian(twin, x), 2)
        assert torch.allclose(row, expected, rtol=1e-5)


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return net()


def normalised(**settings: Any) -> nn.Sequential:
    return net(nn.BatchNorm1d(6, **settings))


def trained_normalised() -> nn.Module:
    """BatchNorm that has seen some batches, in eval mode."""
    model = normalised(track_running_stats=True)
    model(X)
    return model.eval()


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


def centred(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.b((h - h.mean(0)).tanh())


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(net())


def as_it_is() -> None:
    assert torch.allclose(local_lipschitz(scripted(), X), constants(net(), X), rtol=1e-5)


PAIR = graph(lambda m, x: {"logits": m.b(m.a(x).tanh()), "inputs": x})

POINTS: dict[str, Remedy] = {
    "BatchNorm in train mode": Remedy(
        lambda: local_lipschitz(normalised(), X),
        r"BatchNorm1d in train mode, which mixes samples; call model\.eval\(\)$",
        lambda: at_points(normalised().eval()),
    ),
    "BatchNorm without running statistics": Remedy(
        lambda: local_lipschitz(normalised(track_running_stats=False).eval(), X),
        "without running statistics, which mixes samples in eval mode too; put GroupNorm or LayerNorm in its place",
        lambda: [at_points(net(nn.GroupNorm(2, 6))), at_points(net(nn.LayerNorm(6)))],
    ),
    "BatchNorm without running statistics, trained with them": Remedy(
        lambda: local_lipschitz(normalised(track_running_stats=False), X),
        r"or train it with track_running_stats=True and call model\.eval\(\)",
        lambda: at_points(trained_normalised()),
    ),
    "Dropout": Remedy(
        lambda: local_lipschitz(net(nn.Dropout()), X),
        r"output is random; call model\.eval\(\)",
        lambda: at_points(net(nn.Dropout()).eval()),
    ),
    "noise": Remedy(
        lambda: local_lipschitz(net(Noise()), X),
        r"draws random numbers, so its output is random; call model\.eval\(\)",
        lambda: at_points(net(Noise()).eval()),
    ),
    "statistics over the batch": Remedy(
        lambda: local_lipschitz(graph(centred).eval(), X),
        "so it has no constant of its own; leave out what mixes samples",
        lambda: at_points(graph(lambda m, x: m.b(m.a(x).tanh()))),
    ),
    "inference tensors": Remedy(
        lambda: local_lipschitz(made_in_inference_mode(), X),
        "was made under torch.inference_mode.*; build or load the model outside",
        lambda: at_points(net()),
    ),
    "several outputs, by index": Remedy(
        lambda: local_lipschitz(net(last=4), X),
        "pass output=<index or callable>",
        lambda: at_points(net(last=4), by=lambda out: out[:, 2], output=2),
    ),
    "several outputs, by a callable": Remedy(
        lambda: local_lipschitz(net(last=4), X),
        "pass output=<index or callable>",
        lambda: at_points(net(last=4), by=lambda out: out.max(1).values, output=lambda out: out.max(1).values),
    ),
    "several outputs, jacobian": Remedy(
        lambda: local_lipschitz(net(last=4), X),
        "or quantity='jacobian'",
        lambda: jacobians(net(last=4)),
    ),
    "a dict": Remedy(
        lambda: local_lipschitz(PAIR, X),
        "pass output=.* or one of its keys, 'logits', 'inputs'",
        lambda: at_points(PAIR, by=lambda out: out["logits"], output="logits"),
    ),
    "another dtype": Remedy(
        lambda: local_lipschitz(net(), X.double()),
        r"pass x\.to\(<that dtype>\)",
        lambda: at_points(net(), X.double().to(torch.float32)),
    ),
    "no device": Remedy(
        lambda: local_lipschitz(net(), X.to("meta")),
        "on the meta device and has no data; pass a tensor with data",
        lambda: at_points(net(), X),
    ),
    "TorchScript, in the Monitor": Remedy(
        lambda: Monitor(scripted()),
        r"is a TorchScript module, whose calls no hook sees; .*local_lipschitz\(model, x\).* take it as it is",
        as_it_is,
    ),
}


@pytest.mark.parametrize("name", POINTS)
def test_at_points(name: str) -> None:
    try_it(POINTS[name])


# ---- in training


def in_training(
    model: nn.Module,
    *inputs: Tensor,
    by: Output = lambda out: out,
    call: Any = None,
    at: int = 0,
    rest: str = "",
    **settings: Any,
) -> Any:
    """Make a step under a Monitor; with `rest` ("right"), the mean constant is right in the input number `at`."""
    inputs = inputs or (X,)
    expected = _expected(model, inputs, by, at) if rest == "right" else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Monitor(model, optimizer, metrics=[Lipschitz(**settings)]) as monitor:
        for _ in range(3):
            by((call or nn.Module.__call__)(model, *inputs)).square().sum().backward()
            optimizer.step()
        window = monitor.compute()
    if expected is not None:
        found = window["lipschitz"].local_lipschitz.values()
        assert float(next(iter(found)).mean.value) == pytest.approx(float(expected.mean()), rel=1e-5)
    return window


def _expected(model: nn.Module, inputs: tuple[Tensor, ...], by: Output, at: int) -> Tensor:
    twin, found = copy.deepcopy(model).double(), []
    for i in range(len(inputs[0])):
        sample = [x[i : i + 1].double() if x.is_floating_point() else x[i : i + 1] for x in inputs]
        sample[at].requires_grad_()
        found.append(torch.autograd.grad(by(twin(*sample)).sum(), sample[at])[0].norm())
    return torch.stack(found)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.net(x * z)


def by_keyword(model: nn.Module, *inputs: Tensor) -> Tensor:
    return model(**dict(zip("xz", inputs, strict=True)))


def auxiliary(m: Any, x: Tensor) -> dict[str, Tensor]:
    main = m.b(m.a(x).tanh())
    return {"main": main, "sum": main + m.c(x)}


AUXILIARY = graph(auxiliary, c=nn.Linear(3, 1))


def checkpointed(reentrant: bool) -> nn.Module:
    return graph(lambda m, x: m.b(checkpoint(lambda h: m.a(h).tanh(), x, use_reentrant=reentrant)))


def probed() -> None:
    """A probe in eval mode beside the heuristic numbers of training."""
    model = normalised()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Monitor(model, metrics=[Lipschitz()]) as monitor:
            model(X).square().sum().backward()
            monitor.step()
            monitor.probe(X, "far")
            window = monitor.close_window()
    expected = constants(copy.deepcopy(model).eval(), X).mean()
    found = window["probes"].local_lipschitz["far"].mean
    assert found.label == "exact"
    assert found.value == pytest.approx(float(expected), rel=1e-5)


TRAINING: dict[str, tuple[bool, Remedy]] = {
    "BatchNorm in train mode": (
        True,
        Remedy(
            lambda: in_training(normalised()),
            r"BatchNorm in train mode .* follow fixed points in eval mode, monitor\.probe\(x, name\)",
            probed,
        ),
    ),
    "BatchNorm in train mode, replaced": (
        True,
        Remedy(
            lambda: in_training(normalised()),
            "or use GroupNorm or LayerNorm",
            lambda: [in_training(net(m), rest="right") for m in (nn.GroupNorm(2, 6), nn.LayerNorm(6))],
        ),
    ),
    "BatchNorm without running statistics": (
        True,
        Remedy(
            lambda: in_training(normalised(track_running_stats=False).eval()),
            "BatchNorm without running statistics .*For exact ones put GroupNorm or LayerNorm in its place",
            lambda: in_training(net(nn.GroupNorm(2, 6)), rest="right"),
        ),
    ),
    "two inputs": (
        True,
        Remedy(
            lambda: in_training(Two(), X, X.flip(0), call=by_keyword),
            "name the one to differentiate by: input='<argument or keyword>'",
            lambda: in_training(Two(), X, X.flip(0), call=by_keyword, input="z", at=1, rest="right"),
        ),
    ),
    "a dict": (
        False,
        Remedy(
            lambda: in_training(PAIR, by=lambda out: out["logits"]),
            "name the one that is meant by its key or attribute",
            lambda: in_training(PAIR, by=lambda out: out["logits"], output="logits", rest="right"),
        ),
    ),
    "several outputs": (
        False,
        Remedy(
            lambda: in_training(net(last=4), quantity="scalar"),
            "or quantity='residual' for a one-sided bound",
            lambda: in_training(net(last=4), quantity="residual")["lipschitz"].local_lipschitz,
        ),
    ),
    "reentrant checkpoints": (
        True,
        Remedy(
            lambda: in_training(checkpointed(True), X.clone().requires_grad_()),
            r"use checkpoint\(\.\.\., use_reentrant=False\)",
            lambda: in_training(checkpointed(False), rest="right"),
        ),
    ),
    "an auxiliary output": (
        True,
        Remedy(
            lambda: in_training(AUXILIARY, by=lambda out: out["sum"], output="main"),
            r"name the output that the loss is made of: output=\.\.\.",
            lambda: in_training(AUXILIARY, by=lambda out: out["sum"], output="sum", rest="right"),
        ),
    ),
}


@pytest.mark.parametrize("name", TRAINING)
def test_in_training(name: str) -> None:
    warned, remedy = TRAINING[name]
    try_it(remedy, warned=warned)
