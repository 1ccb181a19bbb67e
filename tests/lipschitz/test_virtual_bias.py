"""The path of a bias that the first layer does not have is that of a twin whose bias is kept at 0 in the forward
pass."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Graph, seeded
from oracle import same_bits
from states import opened
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lipcore import Lipschitz, Monitor, Trajectory
from lipcore.metric.results import MetricResult

SGD = torch.optim.SGD


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def mlp(bias: bool = False) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7, bias=bias), nn.ReLU(inplace=True), nn.Linear(7, 1))


def cnn(bias: bool = False) -> nn.Module:
    first = nn.Conv2d(2, 3, 3, bias=bias)
    return nn.Sequential(first, nn.GroupNorm(1, 3), nn.GELU(), nn.Flatten(), nn.Linear(3 * 9, 1))


def transformer(bias: bool = False) -> nn.Module:
    rest = nn.Sequential(nn.LayerNorm(6), nn.Tanh(), nn.Flatten(), nn.Linear(24, 1))
    return nn.Sequential(nn.Linear(5, 6, bias=bias), *rest)


def residual(bias: bool = False) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = m.stem(x).relu()
        return m.head((hidden + m.block(hidden).tanh()).mean((2, 3)))

    parts = {"stem": nn.Conv2d(2, 4, 3, bias=bias), "block": nn.Conv2d(4, 4, 3, padding=1), "head": nn.Linear(4, 1)}
    return Graph(forward, **parts)


MODELS: dict[str, tuple[Callable[..., nn.Module], str, Tensor]] = {
    "mlp": (mlp, "0", data(6, 5)),
    "cnn": (cnn, "0", data(6, 2, 5, 5)),
    "sequence": (transformer, "0", data(6, 4, 5)),
    "residual": (residual, "stem", data(6, 2, 5, 5)),
}
Loop = Callable[[nn.Module, torch.optim.Optimizer, Tensor], None]


def plain(m: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    m(x).square().mean().backward()
    optimizer.step()


def zeroed_late(m: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    out = m(x)
    optimizer.zero_grad(set_to_none=False)
    out.square().mean().backward()
    optimizer.step()


def accumulated(m: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    for part in x.chunk(3):
        m(part).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def never_zeroed(m: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    m(x).square().mean().backward()
    optimizer.step()


def two_passes(m: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    (m(x[:3]) * m(x[3:])).mean().backward()
    optimizer.step()


def dropped(m: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    m(x).sum().backward()  # for another model's step, say: these gradients are cleared
    plain(m, optimizer, x)


def twice(m: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    loss = m(x).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()


def others_ask(m: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    x = x.clone().requires_grad_()
    torch.autograd.grad(m(x).sum(), x)
    with torch.no_grad():
        m(x)
    m(x).square().mean().backward()
    optimizer.step()


def penalty(m: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    x = x.clone().requires_grad_()
    out = m(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    (out.square().mean() + slope.square().mean()).backward()
    optimizer.step()


def recomputed(m: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    checkpoint(m, x, use_reentrant=False).square().mean().backward()
    optimizer.step()


LOOPS: dict[str, Loop] = {
    f.__name__: f
    for f in (
        *(plain, zeroed_late, accumulated, never_zeroed, two_passes, dropped, twice, others_ask, penalty),
        recomputed,
    )
}


def twin(model: nn.Module, name: str, loop: Loop, x: Tensor, steps: int, rate: float) -> MetricResult:
    """The path of a bias that is there, with its updates taken out of the model after every step."""
    optimizer = SGD(model.parameters(), lr=rate)
    bias = model.get_submodule(name).bias
    assert isinstance(bias, Tensor)
    with torch.no_grad():
        bias.zero_()
    virtual = torch.zeros_like(bias)
    path = Trajectory([("bias", virtual)])
    for _ in range(steps):
        loop(model, optimizer, x)
        with torch.no_grad():
            virtual += bias
            bias.zero_()
        path.update()
    return path.compute()


def weights_of(model: nn.Module, other: nn.Module) -> nn.Module:
    model.load_state_dict(other.state_dict(), strict=False)
    return model


def watched(
    model: nn.Module, loop: Loop, x: Tensor, steps: int = 4, optimizer: Any = None, **settings: Any
) -> tuple[MetricResult, list[str]]:
    optimizer = optimizer or SGD(model.parameters(), lr=0.1)
    metric = Lipschitz(virtual_bias=True, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Monitor(model, optimizer, metrics=[metric]) as monitor:
            for _ in range(steps):
                loop(model, optimizer, x)
            window = monitor.compute()
    assert window is not None
    return window["lipschitz"], [str(warning.message) for warning in caught if "virtual" in str(warning.message)]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("model", MODELS)
def test_the_path_is_that_of_a_twin_with_the_bias(model: str, loop: str) -> None:
    build, name, x = MODELS[model]
    mine = seeded(build, dtype=torch.float64)
    theirs = weights_of(seeded(lambda: build(bias=True), dtype=torch.float64), mine)
    undisturbed = copy.deepcopy(mine)
    optimizer = SGD(undisturbed.parameters(), lr=0.1)
    expected = twin(theirs, name, LOOPS[loop], x, 4, 0.1)
    result, warned = watched(mine, LOOPS[loop], x)
    assert not warned
    place = f"{name}.bias"
    for quantity in ("update_norm", "path_length", "distance", "directness", "variance"):
        found = result[f"virtual_bias_{quantity}"][place]
        assert set(found) == set(expected[quantity]["bias"])
        for reducer, value in expected[quantity]["bias"].items():
            assert found[reducer].value == pytest.approx(value.value, rel=1e-9), (quantity, reducer)
            assert found[reducer].count == value.count
            assert found[reducer].valid
            assert f"virtual: '{name}' has no bias" in found[reducer].note
    for _ in range(4):
        LOOPS[loop](undisturbed, optimizer, x)
    for one, other in zip(mine.parameters(), undisturbed.parameters(), strict=True):
        assert same_bits(one, other)


@pytest.mark.parametrize("maximize", [False, True])
def test_a_schedule_and_the_direction_are_followed(maximize: bool) -> None:
    def scheduled(m: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        optimizer.param_groups[0]["maximize"] = maximize
        plain(m, optimizer, x)
        optimizer.param_groups[0]["lr"] *= 0.5

    mine = seeded(mlp, dtype=torch.float64)
    theirs = weights_of(seeded(lambda: mlp(bias=True), dtype=torch.float64), mine)
    expected = twin(theirs, "0", scheduled, data(6, 5), 3, 0.1)
    result, _ = watched(mine, scheduled, data(6, 5), steps=3)
    for quantity in ("path_length", "distance"):
        for reducer, value in expected[quantity]["bias"].items():
            found = result[f"virtual_bias_{quantity}"]["0.bias"][reducer]
            assert found.value == pytest.approx(value.value, rel=1e-9)


def test_half_precision_and_autocast_are_right_to_their_precision() -> None:
    x, model = data(6, 5).float(), seeded(mlp)
    theirs = weights_of(seeded(lambda: mlp(bias=True)), model)

    def loop(m: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = m(x).float().square().mean()
        loss.backward()
        optimizer.step()

    expected = twin(theirs, "0", loop, x, 4, 0.1)
    result, _ = watched(model, loop, x)
    found = result.virtual_bias_path_length["0.bias"]["sum"].value
    assert found == pytest.approx(expected.path_length["bias"]["sum"].value, rel=1e-2)


# ---- windows and states


def test_windows_and_what_goes_on_over_them() -> None:
    x, model = data(6, 5), seeded(mlp, dtype=torch.float64)
    optimizer = SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, metrics=[Lipschitz(virtual_bias=True)], window_steps=2) as monitor:
        for _ in range(6):
            plain(model, optimizer, x)
    lengths = [window["lipschitz"].virtual_bias_path_length["0.bias"] for window in monitor.history]
    assert [length["sum"].value for length in lengths] == pytest.approx(
        [
            b - a
            for a, b in zip(
                [0, *(v["cumulative"].value for v in lengths)], (v["cumulative"].value for v in lengths), strict=False
            )
        ]
    )
    assert [window["lipschitz"].virtual_bias_variance["0.bias"]["last"].count for window in monitor.history] == [3] * 3


def test_a_state_continues_bit_for_bit() -> None:
    x, found = data(6, 5), []
    for restart in (False, True):
        model = seeded(mlp, dtype=torch.float64)
        optimizer = SGD(model.parameters(), lr=0.1)
        monitor = Monitor(model, optimizer, metrics=[Lipschitz(virtual_bias=True)])
        for step in range(6):
            if step == 3 and restart:
                state = monitor.state_dict()
                monitor.close()
                monitor = Monitor(model, optimizer, metrics=[Lipschitz(virtual_bias=True)])
                monitor.load_state_dict(state)
                assert opened(monitor.state_dict())["metrics"]["lipschitz"]["virtual_bias"].keys() == {"value", "path"}
            plain(model, optimizer, x)
        found.append(monitor.compute()["lipschitz"])
        monitor.close()
    for quantity in ("update_norm", "path_length", "distance", "variance"):
        one, other = (result[f"virtual_bias_{quantity}"]["0.bias"] for result in found)
        assert {name: value.value for name, value in one.items()} == {
            name: value.value for name, value in other.items()
        }


def test_a_state_that_does_not_fit_is_refused() -> None:
    model = seeded(mlp, dtype=torch.float64)
    metric = Lipschitz(model, virtual_bias=True)
    state = metric.state_dict()
    with pytest.raises(ValueError, match="virtual_bias: expected a state with 'value' and 'path'"):
        metric.load_state_dict(state | {"virtual_bias": {"value": 1}})
    metric.close()


# ---- what has no such path


def clipped(m: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    m(x).square().mean().backward()
    nn.utils.clip_grad_norm_(m.parameters(), 1e-3)
    optimizer.step()


def by_closure(m: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = m(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.zero_grad()


class Shrinking(SGD):
    """Plain SGD by its settings, and another step."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.mul_(0.9)


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, Loop, str]] = {
    "momentum": (mlp, lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9), plain, "SGD has momentum=0.9"),
    "decay": (mlp, lambda m: SGD(m.parameters(), lr=0.1, weight_decay=0.1), plain, "SGD has weight_decay=0.1"),
    "adam": (mlp, lambda m: torch.optim.Adam(m.parameters()), plain, "stepped by Adam; its path is defined for plain"),
    "derived": (mlp, lambda m: Shrinking(m.parameters(), lr=0.1), plain, "stepped by Shrinking"),
    "frozen": (mlp, lambda m: SGD(m[2].parameters(), lr=0.1), plain, "no optimizer would step a bias of '0'"),
    "clipped": (mlp, lambda m: SGD(m.parameters(), lr=0.1), clipped, "changed between the backward pass and the step"),
    "closure": (mlp, lambda m: SGD(m.parameters(), lr=0.1), by_closure, "did not move by .*closure"),
    "a bias of its own": (
        lambda: mlp(bias=True),
        lambda m: SGD(m.parameters(), lr=0.1),
        plain,
        r"Trajectory\(\) follows '0.bias'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_such_path_is_off_by_name(name: str) -> None:
    build, optimizer, loop, message = REFUSED[name]
    model = seeded(build, dtype=torch.float64)
    result, warned = watched(model, loop, data(6, 5), optimizer=optimizer(model))
    assert len(warned) == 1
    assert warned[0].startswith("lipcore does not follow the virtual bias:")
    reason = result.details["virtual_bias_off"]
    assert re.search(message, reason)
    for quantity in ("update_norm", "path_length", "distance", "directness", "variance"):
        (values,) = result[f"virtual_bias_{quantity}"].values()
        assert all(not value.valid and value.value != value.value and value.note == reason for value in values.values())
    assert result.normalized_gradient_norm["model:Linear"].mean.valid  # the others go on
    assert reason in repr(result)


def test_steps_by_hand_have_no_known_rate() -> None:
    model = seeded(mlp, dtype=torch.float64)
    with (
        pytest.warns(UserWarning, match="pass optimizer="),
        Monitor(model, metrics=[Lipschitz(virtual_bias=True)]) as monitor,
    ):
        model(data(6, 5)).sum().backward()
        monitor.step()
        assert "pass optimizer=" in monitor.compute()["lipschitz"].details["virtual_bias_off"]


def test_a_weight_that_something_else_moves_too_is_noticed() -> None:
    model = seeded(mlp, dtype=torch.float64)
    optimizer = SGD(model.parameters(), lr=0.1)
    step = optimizer.register_step_post_hook(lambda *_: model[0].weight.data.mul_(0.9))
    result, warned = watched(model, plain, data(6, 5), optimizer=optimizer)
    step.remove()
    assert "did not move by lr times its gradient" in warned[0]
    assert not result.virtual_bias_distance["0.bias"]["last"].valid


def test_a_compiled_model_is_refused(fresh_dynamo: Any) -> None:
    model = torch.compile(seeded(mlp, dtype=torch.float64), backend="aot_eager")
    result, warned = watched(model, plain, data(6, 5))
    assert "the model is compiled" in warned[0]
    assert "the model is compiled" in result.details["virtual_bias_off"]


def test_an_embedding_has_none() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(8, 1))
    result, _ = watched(model, plain, torch.randint(7, (6, 2)))
    assert "whose output no bias is added to" in result.details["virtual_bias_off"]


def test_nothing_is_there_that_was_not_asked_for() -> None:
    model = seeded(mlp, dtype=torch.float64)
    metric = Lipschitz(model)
    model(data(6, 5)).sum().backward()
    metric.update()
    assert not [name for name in metric.compute() if name.startswith("virtual")]
    assert "virtual_bias" not in metric.state_dict()
    metric.close()


@pytest.mark.filterwarnings("ignore:BatchNorm in train mode")
def test_before_a_batch_norm_in_train_mode_a_bias_does_nothing() -> None:
    parts = (nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 1))
    model = seeded(lambda: nn.Sequential(*parts), dtype=torch.float64)
    result, _ = watched(model, plain, data(6, 2, 5, 5))
    assert result.virtual_bias_path_length["0.bias"]["sum"].value < 1e-12
    result, _ = watched(model.eval(), plain, data(6, 2, 5, 5))
    assert result.virtual_bias_path_length["0.bias"]["sum"].value > 1e-4
