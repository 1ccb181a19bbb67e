"""Steps as people make them: every wrapper's path is that of the weights between its steps."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from wrappers import Accelerated, Averaging, Lookahead, LookaheadWithoutInit, Sam, SamThatMovesOn, SamWithoutInit, mlp

from lipcore import Monitor, PerSampleGradNorms, Trajectory

SGD = {"lr": 0.1, "momentum": 0.9}
X = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
Y = X.sin().sum(1, keepdim=True)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **SGD)


def loss(model: nn.Module) -> Tensor:
    return nn.functional.mse_loss(model(X), Y)


def plain(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()


def by_closure(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step(lambda: loss(model).backward())


def in_two(model: nn.Module, optimizer: Any) -> None:
    loss(model).backward()
    optimizer.first_step()
    loss(model).backward()
    optimizer.second_step()


def accumulated(model: nn.Module, optimizer: Any) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


def replaced(model: nn.Module) -> Any:
    optimizer = sgd(model)

    def step() -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(p.grad, alpha=-0.05)

    optimizer.step = step  # type: ignore[assignment,method-assign]
    return optimizer


def counted(model: nn.Module) -> Any:
    """A step that was replaced by one that calls it."""
    optimizer = sgd(model)
    own = optimizer.step

    def step(*arguments: Any) -> Any:
        result = own(*arguments)
        with torch.no_grad():
            for p in model.parameters():
                p.clamp_(-0.5, 0.5)
        return result

    optimizer.step = step  # type: ignore[method-assign]
    return optimizer


def scheduled(model: nn.Module) -> Any:
    optimizer = sgd(model)
    torch.optim.lr_scheduler.StepLR(optimizer, 3)
    return optimizer


WAYS: dict[str, tuple[Callable[[nn.Module], Any], Callable[[nn.Module, Any], None]]] = {
    "plain": (sgd, plain),
    "with a closure": (sgd, by_closure),
    "scheduled": (scheduled, plain),
    "Lookahead": (lambda m: Lookahead(sgd(m)), plain),
    "Lookahead, an Optimizer without its constructor": (lambda m: LookaheadWithoutInit(sgd(m)), plain),
    "Lookahead in Lookahead": (lambda m: Lookahead(Lookahead(sgd(m), 2), 3), plain),  # type: ignore[arg-type]
    "SAM by closure": (lambda m: Sam(m.parameters(), torch.optim.SGD, **SGD), by_closure),
    "SAM in two": (lambda m: Sam(m.parameters(), torch.optim.SGD, **SGD), in_two),
    "SAM that moves on by closure": (lambda m: SamThatMovesOn(m.parameters(), torch.optim.SGD, **SGD), by_closure),
    "SAM that moves on in two": (lambda m: SamThatMovesOn(m.parameters(), torch.optim.SGD, **SGD), in_two),
    "SAM without constructor by closure": (
        lambda m: SamWithoutInit(m.parameters(), torch.optim.SGD, **SGD),
        by_closure,
    ),
    "SAM without init in two": (lambda m: SamWithoutInit(m.parameters(), torch.optim.SGD, **SGD), in_two),
    "averaging": (lambda m: Averaging(sgd(m)), plain),
    "accelerated": (lambda m: Accelerated(sgd(m), 3), accumulated),
    "replaced step": (replaced, plain),
    "replaced step that calls its own": (counted, plain),
}
STEPS = 12


def path_of(name: str) -> tuple[float, list[Tensor]]:
    """The truth: the weights between the steps."""
    make, step = WAYS[name]
    model = mlp()
    optimizer, points = make(model), [nn.utils.parameters_to_vector(model.parameters()).detach().double()]
    for _ in range(STEPS):
        step(model, optimizer)
        points.append(nn.utils.parameters_to_vector(model.parameters()).detach().double())
    length = sum(float((b - a).norm()) for a, b in itertools.pairwise(points))
    return length, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("source", ["difference", "snapshot"])
@pytest.mark.parametrize("name", WAYS)
def test_steps_are_those_of_the_loop(name: str, source: str) -> None:
    make, step = WAYS[name]
    model = mlp()
    optimizer, metric = make(model), Trajectory(source=source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Monitor(model, optimizer, metrics=[metric], window_steps=None) as monitor:
            for _ in range(STEPS):
                step(model, optimizer)
            window = monitor.compute()
    length, weights = path_of(name)
    assert window.steps == STEPS
    assert window["trajectory"].path_length["total"].sum.value == pytest.approx(length, rel=1e-5)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))


@pytest.mark.parametrize("name", WAYS)
def test_nothing_is_left_behind(name: str) -> None:
    make, step = WAYS[name]
    model = mlp()
    optimizer = make(model)
    before = {method: vars(optimizer).get(method) for method in ("step", "second_step")}
    monitor = Monitor(model, optimizer, metrics=[Trajectory()])
    monitor.close()
    assert all(vars(optimizer).get(method) is own for method, own in before.items())
    step(model, optimizer)


@pytest.mark.parametrize("name", ["Lookahead", "SAM by closure", "averaging"])
def test_a_copied_or_pickled_optimizer_steps_as_it_does_itself(name: str) -> None:
    make, _ = WAYS[name]
    model = mlp()
    optimizer = make(model)
    with Monitor(model, optimizer, metrics=[Trajectory()], window_steps=None):
        for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            assert other.step.__self__ is other
            assert type(other) is type(optimizer)


def test_a_second_step_that_raises_is_none() -> None:
    model = mlp()
    optimizer = SamThatMovesOn(model.parameters(), torch.optim.SGD, **SGD)
    with Monitor(model, optimizer, [Trajectory()], window_steps=None) as monitor:
        in_two(model, optimizer)
        base, optimizer.base_optimizer = optimizer.base_optimizer, None  # type: ignore[assignment]
        loss(model).backward()
        optimizer.first_step()
        with pytest.raises(AttributeError, match="NoneType"):
            optimizer.second_step()
        optimizer.base_optimizer = base
        in_two(model, optimizer)
        window = monitor.compute()
    assert window is not None
    assert window.steps == 2


def test_a_scheduler_that_is_made_after_the_monitor() -> None:
    for make in (sgd, lambda m: Lookahead(sgd(m)), counted):
        model = mlp()
        optimizer = make(model)
        with Monitor(model, optimizer, metrics=[Trajectory()], window_steps=None) as monitor:
            inner = getattr(optimizer, "optimizer", optimizer)
            scheduler = torch.optim.lr_scheduler.StepLR(inner, 2)
            for _ in range(4):
                plain(model, optimizer)
                scheduler.step()
            assert monitor.compute().steps == 4
        plain(model, optimizer)


def test_a_step_that_raises_is_none() -> None:
    model = mlp()
    optimizer = Lookahead(sgd(model))
    with Monitor(model, optimizer, metrics=[Trajectory()], window_steps=None) as monitor:
        plain(model, optimizer)
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
        optimizer.optimizer.step()  # by itself
        plain(model, optimizer)
        assert monitor.compute().steps == 3


# ---- weights that move outside the step that is watched


def test_the_inner_optimizer_given_by_hand() -> None:
    """From the step after which the slow weights are seen to move on, steps are read when they are at rest."""
    model = mlp()
    wrapper = Lookahead(sgd(model))
    monitor = Monitor(model, wrapper.optimizer, metrics=[Trajectory()], window_steps=None)
    with pytest.warns(RuntimeWarning, match=r"moved after SGD\.step number 5 was over .* pass it as optimizer="):
        for _ in range(6):
            plain(model, wrapper)
    first = monitor.close_window()
    assert first["trajectory"].details["moved_after_steps"] == 1
    points = [nn.utils.parameters_to_vector(model.parameters()).detach().double()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            plain(model, wrapper)
            points.append(nn.utils.parameters_to_vector(model.parameters()).detach().double())
    window = monitor.close_window()
    assert window.steps == 10
    assert "moved_after_steps" not in window["trajectory"].details
    length = sum(float((b - a).norm()) for a, b in itertools.pairwise(points))
    assert window["trajectory"].path_length["total"].sum.value == pytest.approx(length, rel=1e-5)
    monitor.close()


def test_weights_clipped_after_the_step() -> None:
    model = mlp()
    optimizer = sgd(model)
    with Monitor(model, optimizer, metrics=[Trajectory()], window_steps=None) as monitor:
        with pytest.warns(RuntimeWarning, match=r"number 1 was over"):
            for _ in range(8):
                plain(model, optimizer)
                with torch.no_grad():
                    for p in model.parameters():
                        p.clamp_(-0.2, 0.2)
        assert monitor.compute().steps == 8


@pytest.mark.parametrize("after", [0, 3])
def test_an_optimizer_that_never_steps(after: int) -> None:
    """One warning, after a few backward passes, when the weights move without it."""
    model = mlp()
    given, other = sgd(model), sgd(model)
    with Monitor(model, given, metrics=[Trajectory()], window_steps=None) as monitor:
        with pytest.warns(RuntimeWarning, match=r"no step, although the parameters move: SGD\.step\(\) was never seen"):
            for i in range(17):
                loss(model).backward()
                if i >= after:
                    other.step()
                    other.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(40):
                plain(model, other)
        monitor.flush()


def test_a_step_by_hand_that_is_never_called() -> None:
    model = mlp()
    optimizer = sgd(model)
    with Monitor(model, metrics=[Trajectory()]):
        with pytest.warns(RuntimeWarning, match=r"monitor\.step\(\) was never called"):
            for _ in range(9):
                plain(model, optimizer)


def test_many_micro_batches_before_the_first_step_are_nothing_to_warn_of() -> None:
    model = mlp()
    optimizer = sgd(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Monitor(model, optimizer, metrics=[Trajectory()], window_steps=None) as monitor:
            for _ in range(200):
                loss(model).backward()
            optimizer.step()
            assert monitor.compute().steps == 1


def test_a_state_that_is_loaded_between_steps_is_no_late_move() -> None:
    model = mlp()
    optimizer, other = sgd(model), mlp().state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Monitor(model, optimizer, metrics=[Trajectory()], window_steps=None) as monitor:
            for _ in range(3):
                plain(model, optimizer)
                model.load_state_dict(other)
            assert monitor.compute().steps == 3


# ---- refusals


def test_what_is_no_optimizer_is_named() -> None:
    model = mlp()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    with pytest.raises(TypeError, match=r"StepLR is a learning rate scheduler; .*scheduler\.optimizer"):
        Monitor(model, scheduler)
    with pytest.raises(TypeError, match=r"got Linear"):
        Monitor(model, nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"got type"):
        Monitor(model, torch.optim.SGD)
    assert "step" not in vars(model)
    Monitor(model, scheduler.optimizer).close()
    prepared = SimpleNamespace(get_last_lr=scheduler.get_last_lr, optimizers=[optimizer])  # accelerate's
    with pytest.raises(TypeError, match=r"SimpleNamespace is a learning rate scheduler; .*scheduler\.optimizers"):
        Monitor(model, prepared)  # type: ignore[arg-type]
    Monitor(model, prepared.optimizers).close()


def test_an_optimizer_of_another_model_is_named() -> None:
    with pytest.raises(ValueError, match=r"SGD updates 4 tensors, none of which is a parameter of the model"):
        Monitor(mlp(), sgd(mlp()))


def test_a_snapshot_needs_an_optimizer() -> None:
    with pytest.raises(ValueError, match=r"optimizer: trajectory looks at the parameters right before every step"):
        Monitor(mlp(), metrics=[Trajectory(mode="updates", source="snapshot")])


@pytest.mark.parametrize("make", [lambda m: Lookahead(sgd(m)), lambda m: Averaging(sgd(m))])
def test_a_wrappers_step_has_no_closed_form(make: Callable[[nn.Module], Any]) -> None:
    """The state of what is inside it says nothing of what it adds."""
    model = mlp()
    with pytest.raises(ValueError, match=r"optimizer: source 'optimizer' needs"):
        Monitor(model, make(model), metrics=[Trajectory(mode="updates", source="optimizer")])
    optimizer = make(model)
    with Monitor(model, optimizer, metrics=[Trajectory(mode="updates")], window_steps=None) as monitor:
        plain(model, optimizer)
        assert monitor.compute()["trajectory"].details["source"] == "snapshot"


def test_a_trainers_wrapper_passes_the_closed_form_on() -> None:
    model = mlp()
    optimizer = Accelerated(sgd(model), 1)
    with Monitor(model, optimizer, metrics=[Trajectory(mode="updates")], window_steps=None) as monitor:
        plain(model, optimizer)
        assert monitor.compute()["trajectory"].details["source"] == "optimizer"


def test_a_metric_that_stands_alone_needs_no_steps() -> None:
    model = mlp()
    optimizer = sgd(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with PerSampleGradNorms(model, loss_reduction="mean") as norms:
            for _ in range(20):
                plain(model, optimizer)
            assert norms.per_sample.shape == (16,)


# ---- optimizers that call one another


class Mine(torch.optim.SGD):
    """A subclass whose step() calls the one that it has from torch: torch's hooks run around both."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def nested(kind: str, model: nn.Module) -> Any:
    torch.optim.SGD(mlp().parameters(), lr=0.1)  # from here on SGD's own step() calls hooks too
    if kind == "alone":
        return Mine(model.parameters(), **SGD)
    if kind == "in Lookahead":
        return Lookahead(Mine(model.parameters(), **SGD))
    return Sam(model.parameters(), Mine, **SGD)


@pytest.mark.parametrize("source", ["difference", "snapshot"])
@pytest.mark.parametrize(("kind", "step"), [("alone", plain), ("in Lookahead", plain), ("in SAM", in_two)])
def test_a_step_that_calls_another_is_one(kind: str, step: Callable[[nn.Module, Any], None], source: str) -> None:
    model = mlp()
    optimizer, points = nested(kind, model), [nn.utils.parameters_to_vector(model.parameters()).detach().double()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Monitor(model, optimizer, [Trajectory(source=source)], window_steps=None) as monitor:
            for _ in range(6):
                step(model, optimizer)
                points.append(nn.utils.parameters_to_vector(model.parameters()).detach().double())
            window = monitor.compute()
    length = sum(float((b - a).norm()) for a, b in itertools.pairwise(points))
    assert window is not None
    assert window.steps == 6
    assert window["trajectory"].path_length["total"].sum.value == pytest.approx(length, rel=1e-5)
    assert window["trajectory"].unmoved_steps["total"].sum.value == 0


def test_a_scaler_may_ask_for_the_signature_of_a_watched_step() -> None:
    model = mlp()
    optimizer = Accelerated(torch.optim.Adam(model.parameters(), lr=0.1, fused=True), 1)
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with Monitor(model, optimizer, [Trajectory()], window_steps=None, scaler=scaler) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(loss(model)).backward()
            scaler.step(optimizer)
            scaler.update()
        window = monitor.compute()
    assert window is not None
    assert window.steps == 3


@pytest.mark.parametrize("first", [0, 1])
def test_two_monitors_on_one_wrapper_leave_nothing_whichever_goes_first(first: int) -> None:
    model = mlp()
    optimizer = Lookahead(sgd(model))
    for _ in range(3):
        monitors = [Monitor(model, optimizer, [Trajectory()], window_steps=None) for _ in range(2)]
        plain(model, optimizer)
        assert [monitor.compute().steps for monitor in monitors] == [1, 1]  # type: ignore[union-attr]
        monitors[first].close()
        monitors[1 - first].close()
        assert "step" not in vars(optimizer)


def test_a_step_that_raises_leaves_no_old_snapshot() -> None:
    model = mlp()
    optimizer = sgd(model)
    with Monitor(model, optimizer, [Trajectory(mode="updates", source="snapshot")], window_steps=None) as monitor:
        plain(model, optimizer)
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
        model.load_state_dict(mlp().state_dict())
        before = nn.utils.parameters_to_vector(model.parameters()).detach().double()
        plain(model, optimizer)
        moved = (nn.utils.parameters_to_vector(model.parameters()).detach().double() - before).norm()
        window = monitor.compute()
    assert window is not None
    assert window["trajectory"].update_norm["total"].last.value == pytest.approx(float(moved), rel=1e-5)


# ---- steps that are read late


def clipped(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.clamp_(-0.2, 0.2)


def late(model: nn.Module, optimizer: Any, **settings: Any) -> Monitor:
    """A Monitor that has noticed that the loop clips weights after the step, and read all that was before."""
    monitor = Monitor(model, optimizer, [Trajectory(**settings)], window_steps=None)
    with pytest.warns(RuntimeWarning, match="moved after"):
        for _ in range(2):
            plain(model, optimizer)
            clipped(model)
    monitor.close_window()
    return monitor


def test_a_load_and_a_rebase_come_after_the_step_that_was_put_off() -> None:
    for load in (lambda model, monitor: model.load_state_dict(other), lambda model, monitor: by_hand(model, monitor)):
        model, other = mlp(), {k: v + 1 for k, v in mlp().state_dict().items()}

        def by_hand(model: nn.Module, monitor: Monitor) -> None:
            monitor.metrics["trajectory"].before_moves()  # what rebase() does first
            for p in model.parameters():
                p.data.add_(1)
            monitor.metrics["trajectory"].rebase()  # type: ignore[attr-defined]

        optimizer = sgd(model)
        monitor = late(model, optimizer)
        length = 0.0
        for _ in range(3):
            start = nn.utils.parameters_to_vector(model.parameters()).detach().double()
            plain(model, optimizer)
            clipped(model)
            length += float((nn.utils.parameters_to_vector(model.parameters()).detach().double() - start).norm())
            load(model, monitor)
        window = monitor.close_window()
        assert window is not None
        assert window.steps == 3
        assert window["trajectory"].path_length["total"].sum.value == pytest.approx(length, rel=1e-5)
        monitor.close()


@pytest.mark.parametrize("way", ["state_dict", "rebind", "deepcopy", "pickle", "load_state_dict"])
def test_no_step_that_was_put_off_is_lost(way: str) -> None:
    model = mlp()
    optimizer = sgd(model)
    monitor = late(model, optimizer)
    for _ in range(3):
        plain(model, optimizer)
        clipped(model)
    if way == "state_dict":
        assert monitor.state_dict()["step"] == 5
    elif way == "rebind":
        monitor.rebind()
        assert monitor.history[-1].steps == 3
    elif way == "load_state_dict":
        monitor.load_state_dict(monitor.state_dict())
    else:
        other = copy.deepcopy(monitor) if way == "deepcopy" else pickle.loads(pickle.dumps(monitor))
        assert other.compute().steps == 3
    window = monitor.compute()
    assert way == "rebind" or (window is not None and window.steps == 3)
    monitor.close()


def test_closed_forms_are_read_when_the_step_is_over() -> None:
    model = mlp()
    optimizer, metric = sgd(model), Trajectory(mode="updates", source="optimizer")
    with Monitor(model, optimizer, [metric], window_steps=None) as monitor:
        length = 0.0
        with pytest.warns(RuntimeWarning, match=r"trajectory reads the optimizer's own state, so steps are read as"):
            for _ in range(6):
                before = nn.utils.parameters_to_vector(model.parameters()).detach().double()
                plain(model, optimizer)
                length += float((nn.utils.parameters_to_vector(model.parameters()).detach().double() - before).norm())
                clipped(model)
        window = monitor.compute()
    assert window is not None
    assert window["trajectory"].path_length["total"].sum.value == pytest.approx(length, rel=1e-4)


def test_backward_passes_inside_a_closure_alone() -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value

    with Monitor(model, optimizer, [Trajectory()], window_steps=None) as monitor:
        with pytest.warns(RuntimeWarning, match=r"moved after LBFGS\.step number 1"):
            optimizer.step(closure)
            clipped(model)
            optimizer.step(closure)
            clipped(model)
        monitor.close_window()
        points = [nn.utils.parameters_to_vector(model.parameters()).detach().double()]
        for _ in range(4):
            optimizer.step(closure)
            clipped(model)
            points.append(nn.utils.parameters_to_vector(model.parameters()).detach().double())
        window = monitor.close_window()
    length = sum(float((b - a).norm()) for a, b in itertools.pairwise(points))
    assert window is not None
    assert window["trajectory"].path_length["total"].sum.value == pytest.approx(length, rel=1e-5)


def test_steps_of_sam_under_accumulation_are_nothing_to_warn_of() -> None:
    model = mlp()
    optimizer = Sam(model.parameters(), torch.optim.SGD, **SGD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Monitor(model, optimizer, [Trajectory()], window_steps=None) as monitor:
            for _ in range(2):
                for part in (optimizer.first_step, optimizer.second_step):
                    for _ in range(4):
                        loss(model).backward()
                    part()
            window = monitor.compute()
    assert window is not None
    assert window.steps == 2


def test_rounding_is_no_movement() -> None:
    model = mlp()
    optimizer = sgd(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Monitor(model, optimizer, [Trajectory()], window_steps=None):
            for _ in range(8):
                plain(model, optimizer)
                with torch.no_grad():
                    for p in model.parameters():
                        p.mul_(3).div_(3)


def test_optimizers_inside_the_backward_pass_whose_steps_are_counted_by_hand() -> None:
    model = mlp()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()  # type: ignore[index]
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    points = [nn.utils.parameters_to_vector(model.parameters()).detach().double()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Monitor(model, metrics=[Trajectory()], window_steps=None) as monitor:
            for _ in range(8):
                loss(model).backward()
                monitor.step()
                points.append(nn.utils.parameters_to_vector(model.parameters()).detach().double())
            window = monitor.compute()
    length = sum(float((b - a).norm()) for a, b in itertools.pairwise(points))
    assert window is not None
    assert window["trajectory"].path_length["total"].sum.value == pytest.approx(length, rel=1e-5)
