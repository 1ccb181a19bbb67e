"""lipcore's own passes: what they refuse by name, rows that are not finite, and what is left as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Graph
from torch import Tensor, nn
from torch.nn import functional as F

from lipcore import Monitor, local_lipschitz, theory
from lipcore.models.own_pass import own_pass
from lipcore.regions import Coverage, activation_patterns


def net(*middle: nn.Module, last: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), *middle, nn.ReLU(), nn.Linear(6, last))


def every(model: nn.Module, x: Tensor) -> dict[str, Callable[[], Any]]:
    return {
        "constants": lambda: local_lipschitz(model, x),
        "patterns": lambda: activation_patterns(model, x),
        "coverage": lambda: Coverage(model, x),
    }


CALLS = ("constants", "patterns", "coverage")
X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
MHA = Graph(lambda m, x: m.a(x, x, x)[0].relu().sum(1), a=nn.MultiheadAttention(3, 1, 0.1, batch_first=True))


def inference_model() -> nn.Module:
    with torch.inference_mode():
        return net()


def spread() -> nn.Module:
    """One part without data."""
    model = net()
    model[2].to("meta")
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "dropout": (lambda: net(nn.Dropout(0.1)), X, r"'1' is a Dropout in train mode, whose output is random.*eval\(\)"),
    "rrelu": (lambda: net(nn.RReLU()), X, "'1' is a RReLU in train mode"),
    "alpha dropout": (lambda: net(nn.AlphaDropout(0.1)), X, "'1' is a AlphaDropout in train mode"),
    "attention dropout": (lambda: MHA, torch.randn(5, 2, 3), "'a' is a MultiheadAttention in train mode"),
    "batch norm": (lambda: net(nn.BatchNorm1d(6)), X, "'1' is a BatchNorm1d in train mode, which mixes samples"),
    "double": (net, X.double(), "x: its dtype is torch.float64, but the model's parameters are torch.float32"),
    "half model": (lambda: net().bfloat16(), X, "x: its dtype is torch.float32, but .* torch.bfloat16"),
    "meta x": (net, X.to("meta"), "x: it is on the meta device"),
    "meta model": (lambda: net().to("meta"), X, "x: it is on cpu, but parameter '0.weight' .* on meta"),
    "meta part": (spread, X, "model: parameter '2.weight' is on the meta device and has no data"),
    "inference parameters": (inference_model, X, "model: '0.weight' was made under torch.inference_mode"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_everywhere(name: str, call: str) -> None:
    build, x, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        every(build(), x)[call]()


def image_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1))


WIDTHS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "linear": (net, (5, 4), r"x: expected shape \[N, ..., 3\] for module '0', Linear\(.*, got \[5, 4\]"),
    "one vector": (net, (5,), r"x: expected shape \[N, ..., 3\] .*, got \[5\]"),
    "channels": (image_net, (5, 2, 4, 4), r"x: expected shape \[N, 3, H, W\] for module '0', Conv2d.*\[5, 2, 4, 4\]"),
    "no batch": (image_net, (2, 4, 4), r"x: expected shape \[N, 3, H, W\] .*, got \[2, 4, 4\]"),
}


@pytest.mark.parametrize("call", [*CALLS, "query", "product", "probe"])
@pytest.mark.parametrize("name", [*WIDTHS, "double"])
def test_inputs_that_do_not_fit_are_named(name: str, call: str) -> None:
    build, shape, message = WIDTHS.get(name, (net, (5, 3), "x: its dtype is torch.float64, but the model's"))
    model, x = build(), torch.randn(shape).to(torch.float64 if name == "double" else torch.float32)
    calls = every(model, x) | {
        "query": lambda: Coverage(model, torch.randn(4, 3, 4, 4) if build is image_net else X).query(x),
        "product": lambda: theory.spectral_norm_product(model, x),
        "probe": lambda: Monitor(model).probe(x, "points"),
    }
    with pytest.raises(ValueError, match=message):
        calls[call]()


@pytest.mark.parametrize("call", CALLS)
def test_the_models_own_error_passes(call: str) -> None:
    model = Graph(lambda m, x: m.body(x), body=net())  # whose first layer is known only once it has run
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        every(model, torch.randn(5, 4))[call]()


@pytest.mark.parametrize("call", CALLS)
def test_under_inference_mode(call: str) -> None:
    model = net()
    truth = every(model, X)[call]()
    with torch.inference_mode():
        found = every(model, X.clone())[call]()
        assert torch.is_inference_mode_enabled()
    if call == "constants":
        assert torch.equal(found, truth)
    assert repr(found) == repr(truth)


def test_dropout_that_does_nothing_is_accepted() -> None:
    assert torch.equal(local_lipschitz(net(nn.Dropout(0.0)), X), local_lipschitz(net(), X))


class InPlace(nn.Module):
    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.change, self.rest = change, net()

    def forward(self, x: Tensor) -> Any:
        self.change(x)
        return self.rest(x)


IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "relu": F.relu_,
    "add": lambda x: x.add_(1.0),
    "a column": lambda x: x[:, 0].mul_(2.0),
    "normalised": lambda x: x.sub_(0.5).div_(0.25),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_model_may_work_in_place_on_its_input(name: str) -> None:
    change = IN_PLACE[name]
    model, x = InPlace(change), X.clone()
    point = X.clone().requires_grad_()
    copy = point.clone()
    change(copy)
    (truth,) = torch.autograd.grad(model.rest(copy).sum(), point)
    assert torch.allclose(local_lipschitz(model, x), truth.double().norm(dim=1))
    assert activation_patterns(model, x).layers
    assert torch.equal(x, X)


@pytest.mark.parametrize("quantity", ["scalar", "jacobian"])
def test_a_row_that_is_not_finite_has_no_constant(quantity: str) -> None:
    """ReLU passes no gradient at NaN, so that the number would be finite."""
    x = X.clone()
    x[1, 0], x[3, 2] = math.nan, -math.inf
    found = local_lipschitz(net(), x, quantity=quantity)
    assert found.isnan().tolist() == [False, True, False, True, False]
    assert torch.equal(found[::2], local_lipschitz(net(), X, quantity=quantity)[::2])
    broken = net()
    with torch.no_grad():
        broken[0].weight.fill_(math.nan)
    assert local_lipschitz(broken, X, quantity=quantity).isnan().all()
    with pytest.raises(ValueError, match=r"x: it has NaN or infinity in 2 of 5 rows \(row 1, 3\)"):
        activation_patterns(net(), x)
    with pytest.raises(ValueError, match=r"model: its output has NaN or infinity in 5 of 5 rows \(row 0, 1, 2"):
        activation_patterns(broken, X)


def test_a_squeezed_output_of_one_sample() -> None:
    model = Graph(lambda m, x: m.body(x).squeeze(), body=net())
    assert torch.equal(local_lipschitz(model, X[:1]), local_lipschitz(model.body, X[:1]))
    assert Coverage(model, X).query(X[:1]).status.tolist() == ["train"]


def spectral() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 6)), nn.ReLU(), nn.Linear(6, 1))


def old_spectral() -> nn.Module:
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 6)), nn.ReLU(), nn.Linear(6, 1))


def counting() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.calls = m.calls + 1  # replaced, not changed in place
        return m.body(x)

    model = Graph(forward, body=net())
    model.register_buffer("calls", torch.zeros(()))
    return model


def instance() -> nn.Module:
    return Graph(
        lambda m, x: m.body(x) + m.norm(x[:, None])[:, 0].sum(1, keepdim=True) * 0,
        body=net(),
        norm=nn.InstanceNorm1d(1, track_running_stats=True),
    )


@pytest.mark.parametrize(
    ("build", "training"),
    [(spectral, True), (old_spectral, True), (instance, True), (counting, True), (counting, False)],
)
def test_buffers_are_left_as_they_were(build: Callable[[], nn.Module], training: bool) -> None:
    torch.manual_seed(0)
    model = build().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = local_lipschitz(model, X)
    assert torch.equal(first, local_lipschitz(model, X))
    activation_patterns(model, X)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    model(X)
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Average(nn.Module):
    """A buffer that is changed without a new version."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.data.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.body(x - self.mean.clone())


def test_buffers_changed_through_data_are_put_back() -> None:
    model = Average()
    version = model.mean._version
    local_lipschitz(model, X)
    assert torch.equal(model.mean, torch.zeros(3))
    assert model.mean._version == version


NOISE = Graph(lambda m, x: m.body(x + torch.randn_like(x)), body=net()).eval()


@pytest.mark.parametrize("call", CALLS)
def test_random_numbers_are_refused_and_put_back(call: str) -> None:
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="model: .* (draws random numbers|calls randn_like), so its output is random"):
        every(NOISE, X)[call]()
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_is_not_hidden_by_random_numbers() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        torch.rand(1)
        raise KeyError("own")

    state = torch.get_rng_state()
    with pytest.raises(KeyError, match="own"):
        local_lipschitz(Graph(forward, body=net()), X)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("inside", [False, True], ids=["around", "around and inside"])
def test_autocast_and_what_it_has_cached_is_not_used(inside: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return m.body(x)

    model = Graph(forward, body=net())
    with torch.autocast("cpu", torch.bfloat16):
        model(X).sum().backward()  # weights are cached
        with torch.no_grad():
            model.body[0].weight.mul_(2.0)
        found = local_lipschitz(model, X)
        with own_pass(model):
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_cache_enabled()
    assert torch.equal(found, local_lipschitz(model, X))


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "batch norm": lambda h: F.batch_norm(h, None, None, training=True),
    "mean": lambda h: h - h.mean(0),
    "earlier ones": lambda h: h.cumsum(0),
    "later ones": lambda h: h.flip(0).cumsum(0).flip(0),
    "neighbour": lambda h: h + h.roll(1, 0),
    "distant": lambda h: h + h.roll(8, 0),
    "attention over the batch": lambda h: F.scaled_dot_product_attention(h[None], h[None], h[None])[0],
}


@pytest.mark.parametrize("quantity", ["scalar", "jacobian"])
@pytest.mark.parametrize("name", MIXING)
def test_samples_that_mix_are_refused(name: str, quantity: str) -> None:
    middle = MIXING[name]
    body = net()
    model = Graph(lambda m, x: m.body[1:](middle(m.body[0](x))), body=body)
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match="output for one sample depends on other samples of the batch"):
        local_lipschitz(model, x, quantity=quantity)
    with pytest.raises(ValueError, match="output for one sample depends on other samples of the batch"):
        Monitor(model).probe(x, "points")
    assert local_lipschitz(body, x).shape == (16,)


def test_a_sample_with_an_infinity_does_not_seem_to_mix() -> None:
    x = X.clone()
    x[0], x[1] = math.inf, math.nan
    assert local_lipschitz(net(), x).isnan().tolist() == [True, True, False, False, False]
