"""lambda at the input of a layer inside a compiled model, where W_1 is not all that the layer does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from any_models import constants
from few import few
from models import Graph, mlp, relative_error, seeded
from oracle import same_bits
from torch import Tensor, nn

from lipcore import Lipschitz, Monitor
from lipcore.metric.results import MetricResult

BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, 0.1 * self.weight, self.bias)


class InPlace(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


class ByName(nn.Linear):
    def forward(self, *, values: Tensor) -> Tensor:
        return 3 * super().forward(values)


class Rows(nn.Module):
    """Has a layer on other rows than samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = Scaled(1, 3), nn.Linear(15, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.layer(x.reshape(-1, 1)).tanh().reshape(len(x), -1))
        return out


def data(size: int = 5) -> Tensor:
    return torch.randn(size, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def around(layer: nn.Linear, call: Callable[[nn.Module, Tensor], Tensor] = lambda layer, h: layer(h)) -> Graph:
    return Graph(
        lambda m, x: m.last(call(m.layer, m.norm(x)).tanh()), norm=nn.LayerNorm(5), layer=layer, last=nn.Linear(7, 1)
    )


def frozen() -> Graph:
    model = around(Scaled(5, 7))
    model.norm.requires_grad_(False)
    model.layer.requires_grad_(False)
    return model


MODELS: dict[str, Callable[[], Graph]] = {
    "another forward": lambda: around(Scaled(5, 7)),
    "in place": lambda: around(InPlace(5, 7)),
    "by keyword": lambda: around(ByName(5, 7), lambda layer, h: layer(values=h)),
    "frozen before it": frozen,
    "in-place activation": lambda: Graph(
        lambda m, x: m.last(m.layer(x[:, :, None]).relu_().flatten(1)), layer=nn.Linear(1, 3), last=nn.Linear(15, 1)
    ),
}


def behind(model: Graph) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """What is behind the layer's input, and what makes that input."""
    if not hasattr(model, "norm"):
        return Graph(lambda m, h: m.inner.last(m.inner.layer(h).relu().flatten(1)), inner=model), lambda x: x[
            :, :, None
        ]
    named = isinstance(model.layer, ByName)
    return Graph(
        lambda m, h: m.inner.last((m.inner.layer(values=h) if named else m.inner.layer(h)).tanh()), inner=model
    ), model.norm


def observed(model: nn.Module, batches: list[Tensor], **settings: Any) -> tuple[Tensor, MetricResult, list[str]]:
    metric = Lipschitz(input="layer", **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Monitor(model, metrics=[metric]) as monitor:
            for x in batches:
                model(x).square().sum().backward()
                monitor.step()
            result = monitor.compute()["lipschitz"]
            lambdas = metric.per_sample.local_lipschitz
    return lambdas, result, [str(w.message) for w in caught if "lipcore" in str(w.message)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", few(MODELS, 1))
def test_it_is_the_gradient_at_the_layers_input(name: str, backend: str, fresh_dynamo: Any) -> None:
    build = MODELS[name]
    rest, makes = behind(seeded(build, dtype=torch.float64))
    expected = constants(rest, makes(data()).detach())
    inner = seeded(build, dtype=torch.float64)
    model = torch.compile(inner, fullgraph=True, backend=backend)
    lambdas, result, warned = observed(model, [data()] * 3, lambda_every=1)
    assert relative_error(lambdas, expected) <= 1e-11
    (values,) = result.local_lipschitz.values()
    assert values["mean"].label == "exact"
    assert values["mean"].count == 15
    assert not warned
    assert sum(fresh_dynamo["graph_break"].values()) == 0
    torch._dynamo.reset()
    bare = torch.compile(seeded(build, dtype=torch.float64), fullgraph=True, backend=backend)
    for _ in range(3):
        bare(data()).square().sum().backward()
    for one, other in zip(inner.parameters(), bare.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or (same_bits(one.grad, other.grad) if backend == "aot_eager" else True)


@pytest.mark.ci
def test_passes_with_and_without_it_are_two_graphs(fresh_dynamo: Any) -> None:
    model = torch.compile(seeded(MODELS["another forward"], dtype=torch.float64), fullgraph=True, backend="aot_eager")
    _, result, _ = observed(model, [data()] * 9, lambda_every=3)
    (values,) = result.local_lipschitz.values()
    assert values["mean"].count == 15
    assert fresh_dynamo["stats"]["unique_graphs"] == 2
    assert sum(fresh_dynamo["graph_break"].values()) == 0


@pytest.mark.ci
def test_other_sizes_of_the_batch_take_one_more_graph(fresh_dynamo: Any) -> None:
    model = torch.compile(seeded(MODELS["another forward"], dtype=torch.float64), fullgraph=True, backend="aot_eager")
    _, result, _ = observed(model, [data(size) for size in (5, 6, 7, 8, 5)], lambda_every=1)
    (values,) = result.local_lipschitz.values()
    assert values["mean"].count == 31
    assert fresh_dynamo["stats"]["unique_graphs"] <= 3


def test_a_layer_on_other_rows_is_refused_by_name_and_the_way_out_works(fresh_dynamo: Any) -> None:
    build = Rows
    model = torch.compile(seeded(build, dtype=torch.float64), fullgraph=True, backend="aot_eager")
    message = r"input: the layer 'layer' is called on 25 rows for 5 samples.*input='<argument>'"
    with (
        pytest.warns(RuntimeWarning, match="stopped recording"),
        pytest.raises(ValueError, match=message),
        Monitor(model, metrics=[Lipschitz(input="layer")]),
    ):
        model(data()).square().sum().backward()
    torch._dynamo.reset()
    model = torch.compile(seeded(build, dtype=torch.float64), fullgraph=True, backend="aot_eager")
    found = Lipschitz(input="x", lambda_every=1)
    with pytest.warns(UserWarning, match="normalized_gradient_norm off"), Monitor(model, metrics=[found]) as monitor:
        model(data()).square().sum().backward()
        monitor.step()
        lambdas = found.per_sample.local_lipschitz
    assert relative_error(lambdas, constants(seeded(build, dtype=torch.float64), data())) <= 1e-11


def test_a_plain_layer_still_takes_the_product(fresh_dynamo: Any) -> None:
    def build() -> Graph:
        parts = {"norm": nn.LayerNorm(5), "layer": nn.Linear(5, 7), "rest": mlp(7, 4, 1)}
        return Graph(lambda m, x: m.rest(m.layer(m.norm(x)).tanh()), **parts)

    model = torch.compile(seeded(build, dtype=torch.float64), fullgraph=True, backend="aot_eager")
    metric = Lipschitz(input="layer")
    with Monitor(model, metrics=[metric]) as monitor:
        for _ in range(3):
            model(data()).square().sum().backward()
            monitor.step()
    assert metric._at_input.by_product
    assert fresh_dynamo["stats"]["unique_graphs"] == 1
