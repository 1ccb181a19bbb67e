"""Hooks: the right numbers whatever the training loop does, and a training that does not notice them."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Graph, Wrapper, batches, cnn, mlp, mse, observe, reference, relative_error, seeded, train
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

from lipcore import Lipschitz, Monitor, Trajectory
from lipcore.results import MetricResult, Window

# ---- helpers


def served(monitor: Monitor) -> int:
    """How many batches of one the shortcut has taken over."""
    shortcut = monitor._capture._shortcut
    return 0 if shortcut is None else shortcut.served


def assert_same(found: Window | MetricResult, expected: Window | MetricResult, rel: float = 1e-12) -> None:
    one, other = found.flat("tensor"), expected.flat("tensor")
    assert one.keys() == other.keys()
    for key, value in other.items():
        assert one[key] == pytest.approx(value, rel=rel, abs=0, nan_ok=True), key


def assert_unhooked(model: nn.Module) -> None:
    for module in model.modules():
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        ):
            assert not hooks
    for parameter in model.parameters():
        assert not parameter._backward_hooks
        assert not getattr(parameter, "_post_accumulate_grad_hooks", None)


def ratios_of(window: Window | MetricResult) -> tuple[int, float, float]:
    """(samples, sum of r, mean of lambda) of the only place."""
    result = window["lipschitz"] if isinstance(window, Window) else window
    (place,) = result.normalized_gradient_norm
    r = result.normalized_gradient_norm[place]
    return r.sum.count, r.sum.value, result.local_lipschitz[place].mean.value


# ---- training is bit for bit what it was


def with_dropout() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 8), nn.Dropout(0.1), nn.Linear(8, 1)
    )


def frozen_first() -> nn.Sequential:
    model = mlp(5, 7, 6, 1)
    model[0].requires_grad_(False)
    return model


def frozen_weight() -> nn.Sequential:
    model = mlp(5, 7, 6, 1)
    model[0].weight.requires_grad_(False)
    return model


def in_place() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.LayerNorm(7), nn.Linear(7, 1))


def found_by_running() -> Graph:
    return Graph(lambda m, x: m.b(m.drop(m.a(x).relu_())), b=nn.Linear(7, 1), a=nn.Linear(5, 7), drop=nn.Dropout(0.3))


def images(count: int, size: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(size, 1, 8, 8, generator=generator), torch.randn(size, 1, generator=generator))
        for _ in range(count)
    ]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9, weight_decay=1e-3)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], list[tuple[Tensor, Tensor]]]]] = {
    "mlp": (lambda: mlp(5, 7, 6, 1), batches),
    "cnn": (cnn, images),
    "dropout": (with_dropout, batches),
    "frozen_first": (frozen_first, batches),
    "frozen_weight": (frozen_weight, batches),
    "in_place": (in_place, batches),
    "found_by_running": (found_by_running, batches),
}


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("optimizer_of", [sgd, adam], ids=["momentum", "adam"])
@pytest.mark.parametrize("name", MODELS)
def test_training_is_bitwise_unchanged(name: str, optimizer_of: Callable[..., Any], size: int) -> None:
    build, data = MODELS[name]

    def run(metrics: list[Any] | None, *, watched: bool) -> tuple[list[Tensor], list[Tensor], Tensor]:
        model = seeded(build)
        optimizer = optimizer_of(model)
        torch.manual_seed(5)
        monitor = Monitor(model, optimizer, metrics=metrics, window_steps=3) if watched else None
        train(model, data(20, size), optimizer)
        if monitor is not None:
            assert monitor.compute()["lipschitz"]
            monitor.close()
            assert sum(window["lipschitz"].skipped[place].sum.count for window, place in places(monitor)) == 18 * size
        state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return [p.detach() for p in model.parameters()] + grads, state, torch.get_rng_state()

    plain = run(None, watched=False)
    for metrics in (None, [Lipschitz(shortcut=False)]):
        watched = run(metrics, watched=True)
        for mine, theirs in zip(plain[:2], watched[:2], strict=True):
            assert len(mine) == len(theirs)
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        assert torch.equal(plain[2], watched[2])


def places(monitor: Monitor) -> list[tuple[Window, str]]:
    return [(window, next(iter(window["lipschitz"].skipped))) for window in monitor.history]


@pytest.mark.parametrize("build", [lambda: mlp(5, 7, 1), found_by_running], ids=["chain", "custom"])
def test_nothing_is_left_on_the_model(build: Callable[[], nn.Module]) -> None:
    model = seeded(build)
    keys = list(model.state_dict())
    attributes = {id(m): set(m.__dict__) for m in model.modules()} | {
        id(p): set(p.__dict__) for p in model.parameters()
    }
    optimizer = sgd(model)
    with Monitor(model, optimizer) as monitor:
        for size in (1, 4):
            train(model, batches(3, size), optimizer)
        assert list(model.state_dict()) == keys
        for thing in [*model.modules(), *model.parameters()]:
            assert set(thing.__dict__) == attributes[id(thing)]
    assert_unhooked(model)
    assert not optimizer._optimizer_step_post_hooks
    before = monitor.compute().to_dict()
    train(model, batches(2, 4), optimizer)
    assert monitor.compute().to_dict() == before


def test_an_unused_monitor_can_be_closed() -> None:
    for build in (lambda: mlp(5, 7, 1), found_by_running):
        model = seeded(build)
        monitor = Monitor(model)
        monitor.close()
        monitor.close()
        assert_unhooked(model)


def test_the_monitor_does_not_keep_a_model_alive_that_nobody_has_any_more() -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    optimizer = sgd(model)
    monitor = Monitor(model, optimizer)
    train(model, batches(2, 4), optimizer)
    alive = weakref.ref(model)
    del model, optimizer, monitor
    gc.collect()
    assert alive() is None


def test_activations_are_not_kept_alive() -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    with Monitor(model, metrics=[Lipschitz()]):
        x = torch.randn(4, 5)
        out = model(x)
        out.sum().backward()
        alive = [weakref.ref(x), weakref.ref(out)]
        del x, out
        gc.collect()
        assert [ref() for ref in alive] == [None, None]


# ---- copies


def clone_by_deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def clone_by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def clone_by_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


class Custom(nn.Module):
    """Its first layer is found by running it; picklable."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(7, 1)
        self.first = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


@pytest.mark.parametrize("when", ["before_the_first_step", "in_mid_run"])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("build", [lambda: mlp(5, 7, 1), Custom], ids=["chain", "custom"])
@pytest.mark.parametrize("clone", [clone_by_deepcopy, clone_by_pickle, clone_by_save])
def test_a_copy_of_a_watched_model_is_not_watched(
    clone: Callable[[nn.Module], nn.Module], build: Callable[[], nn.Module], size: int, when: str
) -> None:
    model = seeded(build)
    optimizer = sgd(model)
    with Monitor(model, optimizer) as monitor:
        if when == "in_mid_run":
            train(model, batches(2, size), optimizer)
        twin = clone(model)
        before = monitor.compute().to_dict()
        train(twin, batches(3, size), sgd(twin))
        train(twin, batches(2, 3), sgd(twin))
        assert monitor.compute().to_dict() == before
        train(model, batches(3, size), optimizer)
        count, _, _ = ratios_of(monitor.compute())
        assert count == size * (5 if when == "in_mid_run" else 3)
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_copy_can_be_watched_by_itself() -> None:
    model = seeded(lambda: mlp(5, 7, 1), dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = reference(model, x)
    with Monitor(model, metrics=[Lipschitz()]) as monitor:
        twin = copy.deepcopy(model)
        for found, wanted in zip(observe(twin, x), expected, strict=True):
            assert relative_error(found, wanted) <= 1e-12
        assert ratios_of(monitor.compute())[0] == 0


def test_optimizer_copies_do_not_tick_the_clock() -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    optimizer = sgd(model)
    with Monitor(model, optimizer) as monitor:
        train(model, batches(2, 4), optimizer)
        twin = pickle.loads(pickle.dumps(optimizer))
        twin.step()
        assert monitor.compute().steps == 2


# ---- the shortcut brings what the taps bring


class Stumbling(nn.Module):
    """Raises in every third forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls % 3 == 0:
            raise ZeroDivisionError
        return x


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    optimizer.zero_grad()
    mse(model(x), y).backward()
    optimizer.step()


def clip_values(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    optimizer.zero_grad()
    mse(model(x), y).backward()
    nn.utils.clip_grad_value_(model.parameters(), 1e-4)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-5)
    optimizer.step()


def abandoned_forwards(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    if step % 2:
        model(x + 1)
    plain(model, optimizer, x, y, step)
    model(x - 1)


def backward_twice(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    optimizer.zero_grad()
    loss = mse(model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()


def sizes_in_turn(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    size = (1, 3, 1, 1, 2)[step % 5]
    plain(model, optimizer, x.repeat(size, 1) + torch.arange(size).reshape(-1, 1), y.repeat(size, 1), step)


def evaluations_in_between(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    optimizer.zero_grad()
    loss = mse(model(x), y)
    model.eval()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            model(x + 1)
            model(torch.cat([x, x]))
    model.train()
    loss.backward()
    optimizer.step()


def stumbling(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    optimizer.zero_grad()
    try:
        loss = mse(model(x), y)
    except ZeroDivisionError:
        loss = mse(model(x), y)
    loss.backward()
    optimizer.step()


def two_forwards_one_backward(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, step: int
) -> None:
    optimizer.zero_grad()
    (mse(model(x), y) + 3 * mse(model(x + 1), y)).backward()
    optimizer.step()


def accumulation(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    for shift in range(3):
        mse(model(x + shift), y).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=bool(step % 2))


def penalty_on_parameters(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    optimizer.zero_grad()
    (mse(model(x), y) + 0.1 * sum(p.square().sum() for p in model.parameters())).backward()
    optimizer.step()


def late_penalty(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    (plain if step < 70 else penalty_on_parameters)(model, optimizer, x, y, step)


def gradient_of_a_part_first(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, step: int
) -> None:
    optimizer.zero_grad()
    loss = mse(model(x), y)
    torch.autograd.grad(1000 * loss, model[-1].weight, retain_graph=True)
    loss.backward()
    optimizer.step()


def gradient_of_another_loss_first(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, step: int
) -> None:
    optimizer.zero_grad()
    output = model(x)
    torch.autograd.grad(output.exp().sum(), list(model.parameters()), retain_graph=True)
    mse(output, y).backward()
    optimizer.step()


def gradient_penalty(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    optimizer.zero_grad()
    x = x.clone().requires_grad_()
    output = model(x)
    (gradient,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    (mse(output, y) + gradient.square().sum()).backward()
    optimizer.step()


def graph_of_the_gradient(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    optimizer.zero_grad()
    loss = mse(model(x), y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: backward(create_graph=True) may leak
        loss.backward(create_graph=True)
    for parameter in model.parameters():
        parameter.grad = parameter.grad.detach()
    optimizer.step()


def backward_into_some(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    optimizer.zero_grad()
    mse(model(x), y).backward(inputs=[model[0].weight, model[0].bias])
    optimizer.step()


def bias_gradient_hook(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    handle = model[0].bias.register_hook(lambda grad: 100 * grad) if step >= 2 else None
    plain(model, optimizer, x, y, step)
    if handle is not None:
        handle.remove()


def bias_replaced(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    if step == 2:
        model[0].bias = nn.Parameter(model[0].bias.detach() + 1)
    plain(model, optimizer, x, y, step)


def frozen_in_turn(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    model[0].bias.requires_grad_(step % 3 != 1)
    model[-1].bias.requires_grad_(step % 3 != 2)
    plain(model, optimizer, x, y, step)


def by_keyword(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    optimizer.zero_grad()
    mse(model(input=x) if step % 2 else model(x), y).backward()
    optimizer.step()


def output_changed_in_place(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, step: int
) -> None:
    optimizer.zero_grad()
    output = model(x)
    output *= 3
    output -= y
    output.square().mean().backward()
    optimizer.step()


def weight_pruned(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    if step == 3:
        prune.l1_unstructured(model[0], "weight", 0.3)
    plain(model, optimizer, x, y, step)


def weight_parametrized(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    if step == 3:
        parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    plain(model, optimizer, x, y, step)


def a_hook_of_someone_else(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    handle = model[-1].register_forward_hook(lambda module, arguments, output: output * 3) if step % 3 == 1 else None
    plain(model, optimizer, x, y, step)
    if handle is not None:
        handle.remove()


def a_part_called_directly(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    optimizer.zero_grad()
    loss = mse(model(x), y)
    loss = loss + 0.0 * model[0](x).sum()
    loss.backward()
    optimizer.step()


SCENARIOS: dict[str, Callable[..., None]] = {
    f.__name__: f
    for f in (
        plain,
        clip_values,
        abandoned_forwards,
        backward_twice,
        sizes_in_turn,
        evaluations_in_between,
        stumbling,
        two_forwards_one_backward,
        accumulation,
        penalty_on_parameters,
        gradient_of_a_part_first,
        gradient_of_another_loss_first,
        gradient_penalty,
        graph_of_the_gradient,
        backward_into_some,
        bias_gradient_hook,
        bias_replaced,
        frozen_in_turn,
        by_keyword,
        output_changed_in_place,
        weight_pruned,
        weight_parametrized,
        a_hook_of_someone_else,
        a_part_called_directly,
    )
}
# What a sample's own numbers do not depend on: these are compared with float64 autograd at every step.
TRACKED = sorted(
    set(SCENARIOS) - {"sizes_in_turn", "accumulation", "two_forwards_one_backward", "a_hook_of_someone_else"}
)


def chain_of_three(name: str) -> nn.Sequential:
    if name == "stumbling":
        return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), Stumbling(), nn.Linear(7, 1))
    activation = nn.Softplus if name == "gradient_penalty" else nn.ReLU
    return mlp(5, 7, 6, 1, activation=activation)


def run_scenario(
    name: str,
    optimizer_of: Callable[..., Any],
    expect: Callable[[nn.Module, Tensor], None] | None = None,
    **settings: Any,
) -> Window:
    model = seeded(lambda: chain_of_three(name), dtype=torch.float64)
    optimizer = optimizer_of(model)
    with Monitor(model, optimizer, metrics=[Lipschitz(**settings)]) as monitor:
        for step, (x, y) in enumerate(batches(10, 1)):
            if expect is not None:
                expect(model, x.double())
            SCENARIOS[name](model, optimizer, x.double(), y.double(), step)
        return monitor.compute()


@pytest.mark.parametrize("optimizer_of", [sgd, adam], ids=["momentum_decay", "adam"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_shortcut_brings_what_the_taps_bring(name: str, optimizer_of: Callable[..., Any]) -> None:
    shortcut, taps = (run_scenario(name, optimizer_of, shortcut=yes) for yes in (True, False))
    assert ratios_of(taps)[0] > 0
    assert ratios_of(shortcut) == pytest.approx(ratios_of(taps), rel=1e-12)
    assert_same(shortcut, taps)


@pytest.mark.parametrize("name", TRACKED)
def test_the_taps_bring_what_autograd_brings(name: str) -> None:
    r, lambdas = [], []

    def expect(model: nn.Module, x: Tensor) -> None:
        bare = chain_of_three("plain" if name != "gradient_penalty" else name).double()
        if name == "stumbling":
            bare = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Identity(), nn.Linear(7, 1)).double()
        linear = [m for m in model if isinstance(m, nn.Linear)]
        for mine, theirs in zip([m for m in bare if isinstance(m, nn.Linear)], linear, strict=True):
            pruned = hasattr(theirs, "weight_orig")  # its weight is made anew in every forward pass
            mine.weight.data.copy_(theirs.weight_orig * theirs.weight_mask if pruned else theirs.weight)
            mine.bias.data.copy_(theirs.bias)
        if name == "weight_pruned" and len(r) == 3:
            prune.l1_unstructured(bare[0], "weight", 0.3)
            prune.remove(bare[0], "weight")
        if name == "weight_parametrized" and len(r) == 3:
            bare[0].weight.data.tanh_()
        if name == "bias_replaced" and len(r) == 2:
            bare[0].bias.data.add_(1)
        found = reference(bare, x)
        r.append(float(found[0]))
        lambdas.append(float(found[1]))

    window = run_scenario(name, sgd, expect, shortcut=False)
    count, total, mean = ratios_of(window)
    assert count == 10
    assert total == pytest.approx(sum(r), rel=1e-12)
    assert mean == pytest.approx(sum(lambdas) / 10, rel=1e-12)


def test_the_shortcut_is_taken_where_it_can_be() -> None:
    model = seeded(lambda: mlp(5, 7, 6, 1))
    optimizer = sgd(model)
    with Monitor(model, optimizer, metrics=[Lipschitz()]) as monitor:
        train(model, batches(5, 1), optimizer)
        assert served(monitor) == 4  # the first one is tapped too, to see that both bring the same
        assert not model[0]._forward_hooks
        train(model, batches(2, 4), optimizer)
        assert served(monitor) == 4
        train(model, batches(60, 1), optimizer)
        assert served(monitor) == 64
        assert ratios_of(monitor.compute())[0] == 73
        train(model, batches(200, 1), optimizer)
        assert served(monitor) == 263  # the 257th was checked too


@pytest.mark.parametrize("scenario", ["late_penalty", "two_forwards_late"])
def test_a_loop_that_changes_is_found_out_within_256_steps(scenario: str) -> None:
    def two_forwards_late(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, step: int) -> None:
        (plain if step < 70 else two_forwards_one_backward)(model, optimizer, x, y, step)

    step_of = late_penalty if scenario == "late_penalty" else two_forwards_late
    model = seeded(lambda: mlp(5, 7, 6, 1))
    twin = seeded(lambda: mlp(5, 7, 6, 1))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, twin)]
    with (
        Monitor(model, optimizers[0], metrics=[Lipschitz()]) as monitor,
        Monitor(twin, optimizers[1], metrics=[Lipschitz(shortcut=False)]) as taps,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        for step, (x, y) in enumerate(batches(400, 1)):
            step_of(model, optimizers[0], x, y, step)
            step_of(twin, optimizers[1], x, y, step)
            if step in (69, 340):
                window, expected = monitor.close_window(), taps.close_window()
                if step == 69:
                    assert ratios_of(window) == pytest.approx(ratios_of(expected), rel=1e-9)
        assert ratios_of(monitor.compute()) == pytest.approx(ratios_of(taps.compute()), rel=1e-9)
    if scenario == "late_penalty":
        assert ["more than the loss of one sample" in str(w.message) for w in caught] == [True]
    else:
        assert window["lipschitz"].details["unrecorded_forwards"] == 1  # the one that gave it away


def reshaping() -> nn.Sequential:
    # The last layer sees two rows of one sample: its bias gradient adds them up.
    return nn.Sequential(nn.Linear(5, 6), nn.Unflatten(1, (2, 3)), nn.Linear(3, 1))


@pytest.mark.parametrize("shortcut", [True, False], ids=["shortcut", "taps"])
def test_a_chain_with_several_values_per_sample_is_refused_at_batch_one(shortcut: bool) -> None:
    model = seeded(reshaping)
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(ValueError, match=r"shape \[1, 2, 1\]"),
        Monitor(model, metrics=[Lipschitz(shortcut=shortcut)]),
    ):
        model(torch.randn(1, 5)).square().sum().backward()


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Unflatten(1, (2, 3)), nn.Linear(3, 1), nn.Flatten(), nn.Linear(2, 1)),
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Softmax(dim=1), nn.LayerNorm(6), nn.Dropout(0.0), nn.Linear(6, 1)),
        lambda: nn.Sequential(nn.Linear(5, 1), nn.Linear(1, 1)),
        lambda: nn.Sequential(nn.Sequential(nn.Linear(5, 6), nn.ReLU()), nn.Sequential(nn.Tanh(), nn.Linear(6, 1))),
    ],
    ids=["rows_inside", "softmax_layernorm", "two_layers", "nested"],
)
def test_shortcut_on_unusual_chains(build: Callable[[], nn.Module]) -> None:
    model = seeded(build, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64)
    first = "0.0" if isinstance(model[0], nn.Sequential) else "0"
    expected_r, expected_lambda = reference(model, x, first=first)
    for shortcut in (True, False):
        model.zero_grad()
        with Monitor(model, metrics=[Lipschitz(shortcut=shortcut)]) as monitor:
            for row in x.split(1):
                model.zero_grad()
                model(row).square().sum().backward()
                monitor.step()
            count, total, mean = ratios_of(monitor.compute())
        assert count == 3
        assert total == pytest.approx(float(expected_r.sum()), rel=1e-12)
        assert mean == pytest.approx(float(expected_lambda.mean()), rel=1e-12)


# ---- what goes past the first layer


def input_skip(concatenated: bool = False) -> Graph:
    def rule(m: Any, x: Tensor) -> Tensor:
        h = m.first(x).relu()
        return m.head(torch.cat([h, x], 1) if concatenated else h + x)

    return Graph(rule, first=nn.Linear(5, 5), head=nn.Linear(10 if concatenated else 5, 1))


@pytest.mark.parametrize("concatenated", [False, True], ids=["added", "concatenated"])
def test_an_input_skip_is_said_once_and_labelled(concatenated: bool) -> None:
    model = seeded(lambda: input_skip(concatenated), dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    expected_r, _ = reference(model, x, first="first")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Monitor(model, metrics=[Lipschitz()], window_steps=1) as monitor:
            for _ in range(3):
                model(x).sum().backward()
                monitor.step()
    assert [("past the first layer 'first'" in str(w.message)) for w in caught] == [True]
    for window in monitor.history:
        result = window["lipschitz"]
        assert result.normalized_gradient_norm["model"].mean.label == "exact"
        assert result.normalized_gradient_norm["model"].mean.value == pytest.approx(float(expected_r.mean()), rel=1e-12)
        assert result.local_lipschitz["model"].mean.label == "heuristic"
        assert result.sandwich["model"].lower.label == "heuristic"


# ---- several at once


def test_two_monitors_on_one_model() -> None:
    model = seeded(lambda: mlp(5, 7, 6, 1), dtype=torch.float64)
    data = [(x.double(), y.double()) for x, y in batches(6, 1)]
    expected = []
    with Monitor(model, metrics=[Lipschitz()]) as one:
        with Monitor(model, metrics=[Lipschitz(input="2")]) as two:
            for x, y in data:
                twin = mlp(5, 7, 6, 1).double()
                twin.load_state_dict(model.state_dict())
                expected.append([float(reference(twin, x, first=name)[0]) for name in ("0", "2")])
                model.zero_grad()
                mse(model(x), y).backward()
                one.step()
                two.step()
        assert ratios_of(two.compute())[:2] == pytest.approx((6, sum(e[1] for e in expected)), rel=1e-12)
        assert ratios_of(one.compute())[:2] == pytest.approx((6, sum(e[0] for e in expected)), rel=1e-12)
        model.zero_grad()
        mse(model(data[0][0]), data[0][1]).backward()
        one.step()
        assert ratios_of(one.compute())[0] == 7
    assert_unhooked(model)


def test_two_lipschitz_metrics_in_one_monitor_need_two_names() -> None:
    class Hidden(Lipschitz):
        name = "hidden"

    model = seeded(lambda: mlp(5, 7, 6, 1), dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = [reference(model, x, first=name) for name in ("0", "2")]
    with Monitor(model, metrics=[Lipschitz(), Hidden(input="2")]) as monitor:
        model(x).sum().backward()
        window = monitor.compute()
    for name, (r, _) in zip(("lipschitz", "hidden"), expected, strict=True):
        assert window[name].normalized_gradient_norm["model:Linear"].mean.value == pytest.approx(
            float(r.mean()), rel=1e-12
        )


@pytest.mark.parametrize("size", [1, 4])
def test_two_models_in_two_threads(size: int) -> None:
    def run(seed: int, results: dict[int, Any]) -> None:
        generator_free = [(x + seed, y) for x, y in batches(60, size)]
        model = models[seed]
        optimizer = sgd(model)
        with Monitor(model, optimizer) as monitor:
            train(model, generator_free, optimizer)
            results[seed] = monitor.compute()

    one_after_the_other: dict[int, Any] = {}
    models = {seed: seeded(lambda: mlp(5, 7, 6, 1), seed) for seed in (0, 1)}
    for seed in (0, 1):
        run(seed, one_after_the_other)
    models = {seed: seeded(lambda: mlp(5, 7, 6, 1), seed) for seed in (0, 1)}
    together: dict[int, Any] = {}
    threads = [threading.Thread(target=run, args=(seed, together)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (0, 1):
        assert ratios_of(together[seed])[0] == 60 * size
        assert together[seed].to_dict() == one_after_the_other[seed].to_dict()


# ---- activation checkpointing


class Checkpointed(nn.Module):
    """Two blocks and a head; `around` names the block that is recomputed in the backward pass."""

    def __init__(self, around: str, reentrant: bool) -> None:
        super().__init__()
        self.head = nn.Linear(6, 1)
        self.first = nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True))
        self.middle = nn.Sequential(nn.Linear(7, 6), nn.Tanh())
        self.around, self.reentrant = around, reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for name in ("first", "middle"):
            block = getattr(self, name)
            h = checkpoint(block, h, use_reentrant=self.reentrant) if self.around == name else block(h)
        return self.head(h)


@pytest.mark.parametrize("named", [True, False], ids=["named", "found"])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("around", ["first", "middle"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_activation_checkpointing(reentrant: bool, around: str, size: int, named: bool) -> None:
    model = seeded(lambda: Checkpointed(around, reentrant), dtype=torch.float64)
    bare = seeded(lambda: Checkpointed("", reentrant), dtype=torch.float64)
    x = torch.randn(3, size, 5, dtype=torch.float64)
    expected_r, expected_lambda = reference(bare, x.flatten(0, 1), first="first.0")
    gradients = []
    for watched in (False, True):
        model.zero_grad()
        metric = Lipschitz(input="first.0" if named else None)
        monitor = Monitor(model, metrics=[metric]) if watched else None
        for batch in x:
            model(batch.clone().requires_grad_()).square().sum().backward()
            if monitor is not None:
                monitor.step()
        gradients.append([p.grad.clone() for p in model.parameters()])
        if monitor is not None:
            result = monitor.compute()["lipschitz"]
            monitor.close()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert result.details["first_layer"] == "first.0"
    count, total, mean = ratios_of(result)
    assert count == 3 * size
    assert total == pytest.approx(float(expected_r.sum()), rel=1e-12)
    assert mean == pytest.approx(float(expected_lambda.mean()), rel=1e-12)
    assert result.details["unrecorded_forwards"] == 0


@pytest.mark.parametrize("named", [True, False], ids=["named", "found"])
def test_everything_checkpointed(named: bool) -> None:
    body = seeded(lambda: Checkpointed("", True), dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = reference(body, x, first="first.0")
    model = Graph(lambda m, x: checkpoint(m.body, x, use_reentrant=True).squeeze(1), body=body)
    points = x.clone().requires_grad_()
    for found, wanted in zip(observe(model, points, input="body.first.0" if named else None), expected, strict=True):
        assert relative_error(found, wanted) <= 1e-12


def test_the_first_layer_is_the_first_that_gradients_can_reach() -> None:
    def rule(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = m.backbone(x).relu()
        return m.head(m.hidden(features).relu())

    model = seeded(
        lambda: Graph(rule, backbone=nn.Linear(5, 6), hidden=nn.Linear(6, 7), head=nn.Linear(7, 1)), dtype=torch.float64
    )
    x = torch.randn(4, 5, dtype=torch.float64)
    features = model.backbone(x).relu().detach()
    rest = Graph(lambda m, h: m.head(m.hidden(h).relu()), hidden=model.hidden, head=model.head)
    expected = reference(rest, features, first="hidden")
    for found, wanted in zip(observe(model, x), expected, strict=True):
        assert relative_error(found, wanted) <= 1e-12


# ---- wrappers


def test_wrappers_keep_names_and_keys() -> None:
    data = batches(4, 3)

    def run(wrap: Callable[[nn.Module], nn.Module], build: Callable[[], nn.Module]) -> Window:
        model = wrap(seeded(build))
        optimizer = sgd(model)
        with Monitor(model, optimizer) as monitor:
            train(model, data, optimizer)
            return monitor.compute()

    for build in (lambda: mlp(5, 7, 6, 1), Custom):
        expected = run(lambda model: model, build)
        for wrap in (
            Wrapper,
            lambda model: Wrapper(Wrapper(model)),
            lambda model: nn.DataParallel(model, device_ids=[]),
        ):
            found = run(wrap, build)
            assert_same(found, expected)
            assert found["lipschitz"].details == expected["lipschitz"].details


def test_names_with_a_wrappers_prefix_are_understood() -> None:
    model = Wrapper(seeded(lambda: mlp(5, 7, 6, 1)))
    with Monitor(model, metrics=[Lipschitz(input="module.2", output="module.4")]) as monitor:
        model(torch.randn(3, 5)).sum().backward()
        result = monitor.compute()["lipschitz"]
    assert result.details["first_layer"] == "2"
    assert list(result.normalized_gradient_norm) == ["4:Linear"]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_distributed_data_parallel(tmp_path: Any) -> None:
    data = batches(4, 3)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        windows = []
        for wrap in (lambda model: model, nn.parallel.DistributedDataParallel):
            model = wrap(seeded(lambda: mlp(5, 7, 6, 1)))
            optimizer = sgd(model)
            with Monitor(model, optimizer) as monitor:
                train(model, data, optimizer)
                windows.append(monitor.compute())
            assert not windows[-1].local
        assert_same(windows[1], windows[0])
    finally:
        torch.distributed.destroy_process_group()


# ---- torch.compile


@pytest.fixture
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


def compiled_run(
    build: Callable[[], nn.Module], backend: str, data: list[Any], **settings: Any
) -> tuple[Window, nn.Module]:
    inner = seeded(build)
    model = torch.compile(inner, fullgraph=True, backend=backend)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.01)
    with Monitor(model, optimizer, metrics=[Lipschitz(**settings), Trajectory()]) as monitor:
        for x, y in data:
            train(model, [(x, y)], optimizer)
            with torch.no_grad():
                model(x)
        return monitor.compute(), inner


def in_place_mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 1))


def circular() -> nn.Sequential:
    first = nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")
    return nn.Sequential(first, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(128, 1))


def tokens() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (5, 1)), nn.Linear(1, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(15, 1)
    )


COMPILED: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Any], str]] = {
    "mlp": (in_place_mlp, batches, "0"),
    "cnn": (cnn, images, "0"),
    "frozen": (frozen_first, batches, "0"),
    "circular": (circular, images, "0"),
    "tokens": (tokens, batches, "1"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_models(name: str, backend: str, fresh_dynamo: Any) -> None:
    build, data_of, first = COMPILED[name]
    data = data_of(4, 3)
    found, inner = compiled_run(build, backend, data, input=first)
    assert sum(fresh_dynamo["graph_break"].values()) == 0
    assert fresh_dynamo["stats"]["unique_graphs"] <= 3  # training, evaluation, and one more
    model = seeded(build)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, optimizer, metrics=[Lipschitz(input=first), Trajectory()]) as monitor:
        train(model, data, optimizer)
        expected = monitor.compute()
    assert_same(found, expected, rel=2e-5)
    assert ratios_of(found)[0] == 12
    for mine, theirs in zip(inner.parameters(), model.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-7)


def test_compiled_training_is_bitwise_unchanged_and_recompiles_are_bounded(fresh_dynamo: Any) -> None:
    def run(watched: bool) -> list[Tensor]:
        torch._dynamo.reset()
        fresh_dynamo.clear()
        inner = seeded(lambda: mlp(5, 7, 6, 1))
        model = torch.compile(inner, fullgraph=True, backend="aot_eager")
        optimizer = torch.optim.SGD(inner.parameters(), lr=0.01)
        monitor = Monitor(model, optimizer) if watched else None
        for size in (4, 4, 3, 2, 5, 6, 4):
            train(model, batches(2, size), optimizer)
        if monitor is not None:
            assert ratios_of(monitor.compute())[0] == 2 * 28
            monitor.close()
        return [p.detach().clone() for p in inner.parameters()]

    plain_run, watched_run = run(False), run(True)
    assert fresh_dynamo["stats"]["unique_graphs"] <= 3  # the first size, any size, and one more
    assert all(torch.equal(a, b) for a, b in zip(plain_run, watched_run, strict=True))


def test_what_cannot_be_done_with_compiled_models_is_said() -> None:
    inner = seeded(Custom)
    with pytest.raises(ValueError, match="input: the first layer of a compiled model cannot be found by watching"):
        Monitor(torch.compile(inner, backend="eager"), metrics=[Lipschitz()])
    assert_unhooked(inner)
    in_place_compiled = seeded(lambda: mlp(5, 7, 1))
    in_place_compiled.compile(backend="eager")
    with pytest.raises(ValueError, match=r"model: was compiled in place by model\.compile\(\)"):
        Monitor(in_place_compiled, metrics=[Lipschitz()])


def test_a_monitor_attached_after_the_first_compiled_call_says_so(fresh_dynamo: Any) -> None:
    model = torch.compile(seeded(lambda: mlp(5, 7, 1)), backend="eager")
    optimizer = sgd(model)
    train(model, batches(2, 4), optimizer)
    with (
        pytest.warns(RuntimeWarning, match="stopped recording"),
        pytest.raises(ValueError, match=r"before its first call \(or torch\._dynamo\.reset\(\)\)"),
        Monitor(model, optimizer, metrics=[Lipschitz()]),
    ):
        train(model, batches(3, 4), optimizer)


# ---- errors never reach the training


def test_no_backward_recorded_is_an_error_that_says_what_to_do() -> None:
    inner = seeded(lambda: mlp(5, 7, 1))
    undisturbed = copy.deepcopy(inner)
    outer = Wrapper(inner)
    optimizer, twin_optimizer = sgd(inner), sgd(undisturbed)
    monitor = Monitor(outer, optimizer, metrics=[Lipschitz(), Trajectory()])
    data = batches(4, 3)
    with pytest.warns(RuntimeWarning, match="lipcore stopped recording: model: two optimizer steps were made"):
        train(inner, data, optimizer)  # not through `outer`
    train(undisturbed, data, twin_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(inner.parameters(), undisturbed.parameters(), strict=True))
    with pytest.raises(ValueError, match="Call the very object that was passed as model"):
        monitor.compute()
    monitor.compute()  # raised once
    monitor.close()
    assert_unhooked(outer)


@pytest.mark.parametrize("call", ["compute", "close_window", "pop_window", "step", "flush", "close", "end_of_with"])
def test_a_kept_error_is_raised_by_the_next_call(call: str) -> None:
    model = seeded(lambda: mlp(5, 7, 3))
    monitor = Monitor(model, metrics=[Lipschitz()])
    with pytest.warns(RuntimeWarning, match="stopped recording"):
        model(torch.randn(2, 5)).sum().backward()
    with pytest.raises(ValueError, match="one value per sample is needed"):
        if call == "end_of_with":
            with monitor:
                pass
        else:
            getattr(monitor, call)()
    monitor.close()
    assert_unhooked(model)


def test_an_exception_in_the_with_block_goes_first() -> None:
    model = seeded(lambda: mlp(5, 7, 3))
    with pytest.warns(RuntimeWarning), pytest.raises(ZeroDivisionError), Monitor(model, metrics=[Lipschitz()]):
        model(torch.randn(2, 5)).sum().backward()
        raise ZeroDivisionError
    assert_unhooked(model)


@pytest.mark.parametrize("size", [1, 4])
def test_weights_that_became_nan_do_not_stop_the_training(size: int) -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, optimizer, window_steps=2) as monitor:
        train(model, batches(3, size), optimizer)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        train(model, batches(5, size), optimizer)
        assert len(monitor.history) == 4
        last = monitor.history[-1]
        assert last["lipschitz"].skipped["model:Linear"].sum.value == 2 * size
        assert last["lipschitz"].normalized_gradient_norm["model:Linear"].mean.count == 0
