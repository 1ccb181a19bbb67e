"""Every way out that messages about optimizers, steps and parameters name is tried: the path comes, and is right."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from remedies import Remedy, try_it
from torch import Tensor, nn
from wrappers import Lookahead

from lipcore import Metric, Monitor, Trajectory
from lipcore.metric.results import MetricResult

Model = nn.Module
Step = Callable[[], Any]
STEPS = 12


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def sgd(model: Model, kind: Any = torch.optim.SGD, **settings: Any) -> torch.optim.Optimizer:
    return kind(model.parameters(), **({"lr": 0.1} | settings))


def backward(model: Model) -> None:
    model.zero_grad()
    x = torch.randn(5, 3, dtype=next(model.parameters()).dtype)
    model(x).square().mean().backward()


def place(tensors: Any) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


class Truth:
    """The points between the steps, as the loop sees them."""

    def __init__(self, tensors: Callable[[], Any]) -> None:
        self._tensors, self.points = tensors, [place(tensors())]

    def look(self) -> None:
        self.points.append(place(self._tensors()))

    def check(self, window: Any, rel: float = 1e-5) -> None:
        lengths = [float((b - a).norm()) for a, b in itertools.pairwise(self.points)]
        assert window["trajectory"].path_length["total"].sum.value == pytest.approx(sum(lengths), rel=rel)
        assert window.steps == len(lengths)


def loop(
    optimizer: Callable[[Model], Any],
    given: Callable[[Any], Any] = lambda optimizer: optimizer,
    *,
    by_hand: bool = False,
    model: Model | None = None,
    after: Callable[[Model], Any] = lambda model: None,
    **settings: Any,
) -> None:
    """Train with an optimizer, and give the Monitor what `given` makes of it; the path is right."""
    model = net() if model is None else model
    stepping = optimizer(model)
    truth = Truth(model.parameters)
    with Monitor(model, given(stepping), metrics=[Trajectory(**settings)], window_steps=None) as monitor:
        for _ in range(STEPS):
            backward(model)
            stepping.step()
            after(model)
            if by_hand:
                monitor.step()
            truth.look()
        window = monitor.compute()
        assert window is not None
        truth.check(window)


class Slotted:
    __slots__ = ("inner", "param_groups")

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.param_groups = inner, inner.param_groups

    def step(self) -> None:
        self.inner.step()


def scheduler(optimizer: torch.optim.Optimizer) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.optim.lr_scheduler.StepLR(optimizer, 100)


def nothing_of(_: Any) -> None:
    return None


STRANGER = net()
RMS = torch.optim.RMSprop

OPTIMIZERS: dict[str, tuple[bool, Remedy]] = {
    "a scheduler": (
        False,
        Remedy(
            lambda: loop(sgd, scheduler),
            r"pass the optimizer that it drives \(scheduler\.optimizer\)",
            lambda: loop(sgd, lambda optimizer: scheduler(optimizer).optimizer),
        ),
    ),
    "an optimizer of another model": (
        False,
        Remedy(
            lambda: loop(sgd, lambda optimizer: sgd(STRANGER)),
            "pass the optimizer of this very model, made after its parameters got their final form",
            lambda: loop(sgd),
        ),
    ),
    "no attributes": (
        False,
        Remedy(
            lambda: loop(lambda m: Slotted(sgd(m))),
            r"pass none and call monitor\.step\(\) after every step",
            lambda: loop(lambda m: Slotted(sgd(m)), nothing_of, by_hand=True),
        ),
    ),
    "what is inside a wrapper": (
        True,
        Remedy(
            lambda: loop(lambda m: Lookahead(sgd(m), 1), lambda wrapper: wrapper.optimizer),
            "Where there is a wrapper, pass it as optimizer=",
            lambda: loop(lambda m: Lookahead(sgd(m), 1)),
        ),
    ),
    "an object that never steps": (
        True,
        Remedy(
            lambda: loop(sgd, lambda optimizer: copy.copy(optimizer)),
            r"Pass as optimizer= the object whose step\(\) the loop calls",
            lambda: loop(sgd),
        ),
    ),
    "an object that never steps, by hand": (
        True,
        Remedy(
            lambda: loop(sgd, nothing_of),
            r"or pass none and call monitor\.step\(\) after every step",
            lambda: loop(sgd, nothing_of, by_hand=True),
        ),
    ),
    "no closed form, snapshots": (
        False,
        Remedy(
            lambda: loop(lambda m: sgd(m, RMS), mode="updates", source="optimizer"),
            "use snapshots or pass the updates yourself",
            lambda: loop(lambda m: sgd(m, RMS), mode="updates", source="snapshot"),
        ),
    ),
    "a wrapper's closed form": (
        False,
        Remedy(
            lambda: loop(lambda m: Lookahead(sgd(m)), mode="updates", source="optimizer"),
            "choose source='snapshot', or none",
            lambda: [loop(lambda m: Lookahead(sgd(m)), mode="updates", source=s) for s in ("snapshot", "auto")],
        ),
    ),
    "snapshots without an optimizer": (
        False,
        Remedy(
            lambda: loop(sgd, nothing_of, by_hand=True, mode="updates", source="snapshot"),
            "pass the optimizer, or choose another source",
            lambda: [
                loop(sgd, mode="updates", source="snapshot"),
                loop(sgd, nothing_of, by_hand=True, source="difference"),
            ],
        ),
    ),
    "a source that costs": (
        False,
        Remedy(
            lambda: loop(sgd, mode="exact", source="optimizer"),
            "choose mode 'updates' or 'sketch' with it",
            lambda: loop(sgd, mode="updates", source="optimizer"),
        ),
    ),
    "a budget that is too small": (
        False,
        Remedy(
            lambda: loop(sgd, mode="auto", memory_budget=8),
            "or mode 'updates', which needs none",
            lambda: loop(sgd, mode="updates"),
        ),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str) -> None:
    warned, remedy = OPTIMIZERS[name]
    try_it(remedy, warned=warned)


# ---- several optimizers


def out_of_step(each: bool) -> None:
    """Two optimizers, one of which steps twice as often."""
    model = net()
    parts = [model[0], model[2]]
    pair = [sgd(part) for part in parts]
    truths = [Truth(part.parameters) for part in parts]
    watched = list(zip(parts, pair, strict=True)) if each else [(model, pair)]
    monitors = [Monitor(m, o, metrics=[Trajectory()], window_steps=None) for m, o in watched]
    for turn in range(6):
        backward(model)
        for number in [0, 1] if turn % 2 else [0]:
            pair[number].step()
            truths[number].look()
    for monitor, truth in zip(monitors, truths, strict=each):
        truth.check(monitor.compute())
        monitor.close()


def test_two_optimizers_without_a_common_step() -> None:
    remedy = "give each its own Monitor, on the part of the model it updates"
    try_it(Remedy(lambda: out_of_step(False), remedy, lambda: out_of_step(True)))


# ---- parameters that change


def changing(change: Callable[[nn.Sequential], Any], rebind: bool) -> None:
    """The path of all that is trained in the end, from when it was told."""
    model = net()
    if change is unfrozen:
        model[0].requires_grad_(False)
    with Monitor(model, metrics=[Trajectory()], window_steps=None) as monitor:
        backward(model)
        move(model)
        monitor.step()
        change(model)
        if rebind:
            monitor.rebind()
        truth = Truth(lambda: [p for p in model.parameters() if p.requires_grad])
        for _ in range(3):
            move(model)
            monitor.step()
            truth.look()
        window = monitor.close_window()
        assert window is not None
        truth.check(window)


@torch.no_grad()
def move(model: Model) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter))


def unfrozen(model: nn.Sequential) -> None:
    model[0].requires_grad_(True)


def added(model: nn.Sequential) -> None:
    model.append(nn.Linear(1, 1))


def removed(model: nn.Sequential) -> None:
    model[0].register_parameter("bias", None)


CHANGES: dict[str, tuple[bool, Callable[[nn.Sequential], Any], str]] = {
    "unfrozen": (True, unfrozen, r"it is not in its numbers; call rebind\(\)"),
    "added": (True, added, r"it is not in its numbers; call rebind\(\)"),
    "removed": (False, removed, r"call rebind\(\) after such a change"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_parameters_that_change(name: str) -> None:
    warned, change, message = CHANGES[name]
    remedy = Remedy(lambda: changing(change, rebind=False), message, lambda: changing(change, rebind=True))
    try_it(remedy, warned=warned)


# ---- half precision


def half(masters: bool) -> None:
    """Steps that bfloat16 is too coarse for, with float32 copies in the optimizer's place."""
    model = net().bfloat16()
    copies = {name: p.detach().float() for name, p in model.named_parameters()}
    trajectory = Trajectory(masters=copies) if masters else Trajectory()
    truth = Truth(copies.values)
    with Monitor(model, metrics=[trajectory], window_steps=None) as monitor:
        for _ in range(STEPS):
            for (_, parameter), master in zip(model.named_parameters(), copies.values(), strict=True):
                master += 1e-5
                parameter.data.copy_(master)
            monitor.step()
            truth.look()
        window = monitor.compute()
    assert window is not None
    if masters:
        truth.check(window)


def test_half_precision() -> None:
    try_it(Remedy(lambda: half(False), "pass masters=", lambda: half(True)), warned=True)


# ---- what a Trajectory is asked for


def scripted() -> Model:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(net())


def alone(made_of: Callable[[Model], Any], model: Model, ask: Callable[[Trajectory], Any], **settings: Any) -> Any:
    trajectory = Trajectory(made_of(model), **settings)
    truth = Truth(model.parameters)
    for _ in range(3):
        backward(model)
        move(model)
        trajectory.observe_gradients()
        trajectory.update()
        truth.look()
    path = trajectory.compute().path_length["total"].sum.value
    lengths = [float((b - a).norm()) for a, b in itertools.pairwise(truth.points)]
    assert path == pytest.approx(sum(lengths), rel=1e-5)
    return ask(trajectory), truth.points


def itself(model: Model) -> Any:
    return model


def variances() -> None:
    settings = {"stats": ["element_variance", "path_length"]}
    found, points = alone(itself, net(), lambda t: t.element_variance(), **settings)
    expected = torch.stack(points).var(0, correction=0)
    assert torch.allclose(place(found.values()), expected, rtol=1e-4)


def gradients(every_time: bool) -> None:
    """The mean norm, over steps of which the second is observed every time or not at all."""
    model, norms = net(), []
    trajectory = Trajectory(model, stats=["grad_norm"])
    for turn in range(2):
        backward(model)
        if every_time or not turn:
            trajectory.observe_gradients()
        norms.append(float(place(p.grad for p in model.parameters()).norm()))
        move(model)
        trajectory.update()
    found = trajectory.compute().grad_norm["total"].mean
    assert found.value == pytest.approx(sum(norms) / 2, rel=1e-5)


def continued() -> None:
    """A new one goes on from the state of the original."""
    model = net()
    truth = Truth(model.parameters)
    original = Trajectory(model, stats=["path_length"])
    for trajectory in (original, None):
        if trajectory is None:
            trajectory = Trajectory(model, stats=["path_length"])
            trajectory.load_state_dict(original.state_dict())
        move(model)
        trajectory.update()
        truth.look()
    lengths = [float((b - a).norm()) for a, b in itertools.pairwise(truth.points)]
    assert trajectory.compute().path_length["total"].sum.value == pytest.approx(sum(lengths), rel=1e-5)


class Counter(Metric):
    name = "counter"

    def __init__(self) -> None:
        self.steps = 0

    def bind(self, model: nn.Module) -> None: ...
    def plan(self) -> list[Any]:
        return []

    def observe_step(self) -> None:
        self.steps += 1

    def finalize(self) -> MetricResult:
        return MetricResult(self.name, steps=self.steps)

    def reset(self) -> None:
        self.steps = 0


def counted() -> None:
    counter = Counter()
    with Monitor(net(), metrics=[counter]) as monitor:
        monitor.step()
        assert counter.compute().details["steps"] == 1


ASKED: dict[str, Remedy] = {
    "TorchScript": Remedy(
        lambda: Trajectory(scripted()),
        r"Trajectory\(model\.named_parameters\(\)\) take it as it is",
        lambda: alone(lambda m: list(m.named_parameters()), scripted(), itself, stats=["path_length"]),
    ),
    "variance per element": Remedy(
        lambda: Trajectory(net()).element_variance(), r'stats=\["element_variance", \.\.\.\] in mode "exact"', variances
    ),
    "sketches": Remedy(
        lambda: Trajectory(net(), mode="sketch").sketches,
        'kept only with mode="sketch" and keep_every=',
        lambda: Trajectory(net(), mode="sketch", keep_every=1).sketches,
    ),
    "a copy": Remedy(
        lambda: copy.deepcopy(Trajectory(net())).update(),
        r"make a new Trajectory and load_state_dict\(\) of the original",
        continued,
    ),
    "no model": Remedy(
        lambda: Trajectory().update(),
        r"pass one to Trajectory\(model\) or to Monitor\(model, metrics=",
        lambda: alone(itself, net(), itself, stats=["path_length"]),
    ),
    "a metric of one's own that is updated": Remedy(
        lambda: Counter().update(), r"pass it as Monitor\(model, optimizer, metrics=\[\.\.\.\]\)", counted
    ),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_a_trajectory_is_asked_for(name: str) -> None:
    try_it(ASKED[name])


def test_gradients_that_were_not_observed() -> None:
    try_it(
        Remedy(lambda: gradients(False), r"Call observe_gradients\(\) after backward", lambda: gradients(True)),
        warned=True,
    )
