"""Training loops as people write them: what is a step, and that it is counted once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import batches, mlp, mse, seeded, train
from paths import Path
from points import Points
from torch import Tensor, nn

from lipcore import Lipschitz, Monitor, Trajectory

DATA = batches(8, 4)


def model_of() -> nn.Module:
    return seeded(lambda: mlp(5, 7, 1))


def sgd(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, **settings)


def test_gradient_accumulation() -> None:
    model = model_of()
    optimizer, points = sgd(model), Points(model.named_parameters())
    with Monitor(model, optimizer, [Trajectory()]) as monitor:
        for i, (x, y) in enumerate(DATA):
            (mse(model(x), y) / 4).backward()
            if i % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
                points.look()
        window = monitor.compute()
    assert window.steps == 2
    points.check(window)


IMPLEMENTATIONS = {"for_loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_implementations_of_a_step(implementation: str, optimizer: Any) -> None:
    model = model_of()
    step = optimizer(model.parameters(), lr=0.01, **IMPLEMENTATIONS[implementation])
    points = Points(model.named_parameters())
    with Monitor(model, step, [Trajectory()]) as monitor:
        step.register_step_post_hook(lambda *_: points.look())
        train(model, DATA, step)
        points.check(monitor.compute())
    twin = model_of()
    plain = optimizer(twin.parameters(), lr=0.01, foreach=False)
    trajectory = Trajectory(twin)
    plain.register_step_post_hook(lambda *_: trajectory.update())
    train(twin, DATA, plain)
    assert trajectory.compute().path_length["total"].sum.value == pytest.approx(float(points.norms().sum()), rel=1e-4)


def test_nan_steps_are_flagged_and_left_out() -> None:
    model = model_of()
    optimizer, points, path = sgd(model), Points(model.named_parameters()), Path(model.named_parameters())
    optimizer.register_step_post_hook(lambda *_: path.look())
    with Monitor(model, optimizer, [Trajectory()]) as monitor:
        for i, (x, y) in enumerate(DATA):
            kept = model[0].weight.detach().clone()
            optimizer.zero_grad()
            mse(model(x), y).backward()
            if i == 3:
                model[0].weight.grad[1, 1] = math.nan
            optimizer.step()
            if i == 3:  # a loop that rolls back
                model[0].weight.data.copy_(kept)
                optimizer.state[model[0].weight]["momentum_buffer"].zero_()
            points.look()
        result = monitor.compute()["trajectory"]
    assert result.nonfinite_steps["0.weight"].sum.value == 1
    assert result.nonfinite_elements["0.weight"].sum.value == 1
    assert result.update_norm["0.weight"].last.count == 7
    for quantity in (
        "path_length",
        "variance",
        "distance",
    ):  # elements stood still and came back
        for reducer, truth in path.expected(["0.weight"])[quantity].items():
            assert result[quantity]["0.weight"][reducer].value == pytest.approx(float(truth), rel=1e-5)
    for place in ("0.bias", "2.weight", "2.bias"):
        assert result.path_length[place].sum.value == pytest.approx(float(points.norms(place).sum()), rel=1e-5)


# ---- several optimizers


class Signed(torch.optim.Optimizer):
    """Of no known kind, as Muon is."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad.sign(), alpha=-group["lr"])


def test_two_optimizers_make_one_step() -> None:
    model = model_of()
    pair = [Signed([model[0].weight]), torch.optim.AdamW([model[0].bias, *model[2].parameters()])]
    points = Points(model.named_parameters())
    with Monitor(model, pair, [Trajectory()], window_steps=3) as monitor:
        assert "Signed.step and AdamW.step" in str(monitor.plan())
        for x, y in DATA[:6]:
            for optimizer in pair:
                optimizer.zero_grad()
            mse(model(x), y).backward()
            for optimizer in pair:
                optimizer.step()
            points.look()
        assert [w.steps for w in monitor.history] == [3, 3]
        lengths = monitor.history.series("trajectory", "path_length", "total", "sum")
    assert lengths == pytest.approx([float(n.sum()) for n in points.norms().split(3)], rel=1e-5)


def test_optimizers_at_rates_of_their_own_are_refused() -> None:
    parts = {"generator": model_of(), "critic": model_of()}
    pair = [sgd(part) for part in parts.values()]
    monitor = Monitor(parts, pair, [Trajectory()])
    with pytest.warns(RuntimeWarning, match="stopped recording: optimizer: SGD has stepped twice before SGD stepped"):
        for i, (x, y) in enumerate(DATA):
            mse(parts["critic"](parts["generator"](x) + x), y).backward()
            pair[1].step()
            if i % 3 == 2:
                pair[0].step()
    with pytest.raises(ValueError, match="give each its own Monitor"):
        monitor.compute()
    monitor.close()


# ---- several modules


@pytest.mark.parametrize("by", ["monitor", "hand"])
def test_a_dict_of_modules(by: str) -> None:
    parts = {"encoder": seeded(lambda: mlp(5, 4)), "head": seeded(lambda: mlp(4, 1))}
    optimizer = torch.optim.SGD([p for part in parts.values() for p in part.parameters()], lr=0.1)
    points = Points((f"{key}.{n}", p) for key, part in parts.items() for n, p in part.named_parameters())
    monitor = Monitor(parts, optimizer) if by == "monitor" else None
    trajectory = monitor.metrics["trajectory"] if monitor else Trajectory(parts)
    for x, y in DATA:
        optimizer.zero_grad()
        mse(parts["head"](parts["encoder"](x)), y).backward()
        optimizer.step()
        points.look()
        if monitor is None:
            trajectory.update()
    result = trajectory.compute()
    points.check(result)
    assert {"encoder.0", "head.0"} < set(result.path_length)
    parts["head"].add_module("late", nn.Linear(2, 2))
    with pytest.warns(UserWarning, match=r"parameter 'head\.late\.\w+' is trainable but was not .*rebind"):
        trajectory.compute()
    if monitor:
        monitor.close()


def test_lipschitz_is_refused_for_a_dict_of_modules() -> None:
    parts = {"encoder": mlp(5, 4), "head": mlp(4, 1)}
    with pytest.raises(ValueError, match="model: lipschitz watches the forward pass of one module, not of a dict"):
        Monitor(parts, metrics=[Trajectory(), Lipschitz()])


# ---- schedules, closures, compiled models


def test_a_schedule() -> None:
    model = model_of()
    optimizer, points = sgd(model), Points(model.named_parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)
    with Monitor(
        model,
        optimizer,
        [
            Trajectory(),
        ],
    ) as monitor:
        for x, y in DATA:
            train(model, [(x, y)], optimizer)
            schedule.step()
            points.look()
        assert monitor.compute().steps == len(DATA)
        points.check(monitor.compute())


CLOSURES: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "lbfgs": lambda model: torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4),
    "sgd": sgd,
}


@pytest.mark.parametrize("kind", CLOSURES)
def test_a_step_with_a_closure_is_one_step(kind: str) -> None:
    model = model_of()
    optimizer, points = CLOSURES[kind](model), Points(model.named_parameters())
    evaluations = 0
    with Monitor(model, optimizer, [Trajectory()]) as monitor:
        for x, y in DATA:

            def closure() -> Tensor:
                nonlocal evaluations
                evaluations += 1
                optimizer.zero_grad()
                loss = mse(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
            points.look()
        window = monitor.compute()
    assert window.steps == len(DATA)
    assert (evaluations > len(DATA)) == (kind == "lbfgs")
    points.check(window)


@pytest.mark.parametrize("watch", ["compiled", "inner"])
def test_a_compiled_model(watch: str) -> None:
    torch._dynamo.reset()
    inner = model_of()
    compiled = torch.compile(inner, backend="aot_eager")
    optimizer, points = sgd(inner), Points(inner.named_parameters())
    with Monitor(compiled if watch == "compiled" else inner, optimizer, [Trajectory()]) as monitor:
        for x, y in DATA:
            train(compiled, [(x, y)], optimizer)
            points.look()
        points.check(monitor.compute())


@pytest.mark.parametrize("source", ["difference", "optimizer", "snapshot"])
@pytest.mark.parametrize("every", [2, 3])
def test_every_steps(every: int, source: str) -> None:
    """The difference sees chords; the others see single steps."""
    model = model_of()
    optimizer, points, singles = sgd(model), Points(model.named_parameters()), Points(model.named_parameters())
    with Monitor(model, optimizer, [Trajectory(source=source, every_steps=every)]) as monitor:
        for i, (x, y) in enumerate(DATA):
            train(model, [(x, y)], optimizer)
            if (i + 1) % every == 0:
                points.look()
                singles.look()
            else:
                singles.jump()
        result = monitor.compute()["trajectory"]
    (points if source == "difference" else singles).check(result, distance=source == "difference")
    assert "path_length" not in result
    assert ("chord_length" in result) == (source == "difference")
    assert result.update_norm["total"].last.count == len(DATA) // every
