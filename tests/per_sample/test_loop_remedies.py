"""Every way out that messages of PerSampleGradNorms about losses, settings and loops name is tried: the numbers come,
and are right."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from remedies import Remedy, try_it
from torch import Tensor, nn
from torch.nn import functional as F

from lipcore import Monitor, PerSampleGradNorms
from lipcore.per_sample.clipping import clip_factors

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 2, 1, -100, 2, 0])
KEPT = Y >= 0


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def truth(model: nn.Module, x: Tensor = X, y: Tensor = Y) -> Tensor:
    """Norms of single samples' summed cross-entropies, in float64."""
    exact, found = copy.deepcopy(model).double(), []
    for row, label in zip(x.double().split(1), y.split(1), strict=True):
        loss = F.cross_entropy(exact(row), label, reduction="sum")
        grads = torch.autograd.grad(loss, [p for p in exact.parameters() if p.requires_grad])
        found.append(torch.cat([g.flatten() for g in grads]).norm())
    return torch.stack(found)


def is_right(found: Tensor, expected: Tensor) -> None:
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)


Loss = Callable[[Tensor], Tensor]


def mean(z: Tensor) -> Tensor:
    return F.cross_entropy(z, Y)


def step(loss: Loss = mean, before: Callable[..., Any] | None = None, **options: Any) -> None:
    """One pass of a metric that stands alone; its norms are right."""
    model = net()
    with PerSampleGradNorms(model, **{"loss_reduction": "mean", **options}) as norms:
        value = loss(model(X))
        if before is not None:
            before(norms, value)
        value.backward()
        is_right(norms.per_sample, truth(model))


def set_loss(norms: PerSampleGradNorms, loss: Tensor) -> None:
    norms.set_loss(loss)


def unread() -> None:
    """The number is NaN, and the reason is raised."""
    model = net()
    with PerSampleGradNorms(model, loss_reduction="auto") as norms:
        mean(model(X)).backward()
        assert norms.per_sample.isnan().all()
        raise ValueError(norms.broken)


def penalised(z: Tensor) -> Tensor:
    """Two parts, of which one is 0."""
    return mean(z) + 0 * z.sum()


def summed(z: Tensor) -> Tensor:
    return F.cross_entropy(z, Y, reduction="sum")


class WithItems(nn.Module):
    """As transformers' models: the loss is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, items: Any = None) -> tuple[Tensor, Tensor]:
        z = self.net(x)
        return summed(z) / (5 if items is None else items), z


def with_items(given: bool) -> None:
    model = WithItems()
    with PerSampleGradNorms(model, loss_reduction="mean", loss_terms="items") as norms:
        model(X, items=torch.tensor(5))[0].backward() if given else model(X)[0].backward()
        if norms.broken:
            raise ValueError(norms.broken)
        is_right(norms.per_sample, truth(model.net))


LOSSES: dict[str, Remedy] = {
    "no loss was set": Remedy(
        unread, r"call set_loss\(loss\) before loss\.backward\(\)", lambda: step(before=set_loss, loss_reduction="auto")
    ),
    "a part that is not known": Remedy(
        lambda: step(penalised, before=set_loss, loss_reduction="auto"),
        "pass loss_reduction='mean' or 'sum' with loss_terms= or scale= in place of 'auto'",
        lambda: [
            step(penalised, loss_terms=int(KEPT.sum())),
            step(lambda z: summed(z) / 8, loss_reduction="sum", scale=1 / 8),
        ],
    ),
    "a loss for a reduction that needs none": Remedy(
        lambda: step(before=set_loss), "is for loss_reduction='auto'", lambda: step(loss_terms=5)
    ),
    "a mask": Remedy(
        lambda: step(loss_terms=torch.tensor(True)), r"count a mask by its sum\(\)", lambda: step(loss_terms=KEPT.sum())
    ),
    "terms of a sum": Remedy(
        lambda: step(summed, loss_reduction="sum", loss_terms=5),
        "leave it out",
        lambda: step(summed, loss_reduction="sum"),
    ),
    "auto and terms": Remedy(
        lambda: step(loss_reduction="auto", loss_terms=5),
        "leave one of them out",
        lambda: [step(before=set_loss, loss_reduction="auto"), step(loss_terms=5)],
    ),
    "a keyword that was not there": Remedy(
        lambda: with_items(False), "called without that keyword, or with None", lambda: with_items(True)
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    try_it(LOSSES[name])


# ---- settings, and models that change


def alone(**options: Any) -> None:
    PerSampleGradNorms(net(), loss_reduction="mean", **options)


def every_second_step() -> None:
    model, norms = net(), PerSampleGradNorms(loss_reduction="mean", loss_terms=5, every_steps=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, metrics=[norms]) as monitor:
        for _ in range(2):
            optimizer.zero_grad()
            expected = truth(model)
            mean(model(X)).backward()
            if monitor._windows.step == 0:
                is_right(norms.per_sample, expected)
            optimizer.step()


def watched_twice(close: bool) -> None:
    model = net()
    norms = PerSampleGradNorms(model, loss_reduction="mean", loss_terms=5)
    if close:
        norms.close()
    with Monitor(model, metrics=[norms]):
        mean(model(X)).backward()
        is_right(norms.per_sample, truth(model))


def changed(how: Callable[[nn.Sequential], Any], remedy: str = "") -> None:
    """A model that changes between two passes."""
    model, x = net(), X
    if how is unfrozen:
        model[0].requires_grad_(False)
    norms = PerSampleGradNorms(loss_reduction="mean", loss_terms=5)
    monitor = Monitor(model, metrics=[norms])
    mean(model(x)).backward()
    monitor.step()
    how(model)
    if remedy == "rebind":
        monitor.rebind()
    elif remedy == "anew":
        monitor.close()
        norms = PerSampleGradNorms(loss_reduction="mean", loss_terms=5)
        monitor = Monitor(model, metrics=[norms])
    model.zero_grad()
    mean(model(x)).backward()
    monitor.step()
    is_right(norms.per_sample, truth(model))
    monitor.close()


def unfrozen(model: nn.Sequential) -> None:
    model[0].requires_grad_(True)


def replaced(model: nn.Sequential) -> None:
    model[2] = nn.Linear(6, 3)


def functional_call(how: str) -> None:
    model = net()
    with PerSampleGradNorms(model, loss_reduction="mean", loss_terms=5) as norms:
        if how == "computed":
            weights = {name: 2 * p for name, p in model.named_parameters()}
            mean(torch.func.functional_call(model, weights, (X,))).backward()
        elif how == "no_grad":
            with torch.no_grad():
                torch.func.functional_call(model, {name: 2 * p for name, p in model.named_parameters()}, (X,))
        mean(model(X)).backward()
        is_right(norms.per_sample, truth(model))


def normalised(asked: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    with PerSampleGradNorms(model, loss_reduction="sum", normalized=asked) as norms:
        model(X).square().sum().backward()
        found = norms.normalized["0"]
        u = model[0](X).detach().double().requires_grad_()
        out = copy.deepcopy(model[1:]).double()(u)
        (delta,) = torch.autograd.grad(out.sum(), u)
        is_right(found, delta.norm(dim=1))


def compiled_in_place() -> None:
    model = net()
    model.compile(backend="eager")
    PerSampleGradNorms(model, loss_reduction="mean")


def compiled() -> None:
    torch.compiler.reset()
    model = net()
    twin = torch.compile(model, backend="eager")
    with PerSampleGradNorms(twin, loss_reduction="mean", loss_terms=5) as norms:
        mean(twin(X)).backward()
        is_right(norms.per_sample, truth(model))


def never_measured() -> Tensor:
    return torch.tensor([1.0, float("nan"), 4.0], dtype=torch.float64)


SETTINGS: dict[str, Remedy] = {
    "every_steps alone": Remedy(
        lambda: alone(every_steps=2), r"give the metric to Monitor\(model, optimizer, metrics=", every_second_step
    ),
    "watched twice": Remedy(
        lambda: watched_twice(False),
        r"close\(\) that one first, or make a metric of its own",
        lambda: watched_twice(True),
    ),
    "unfrozen, rebind()": Remedy(
        lambda: changed(unfrozen), r"call Monitor\.rebind\(\)", lambda: changed(unfrozen, "rebind")
    ),
    "unfrozen, anew": Remedy(
        lambda: changed(unfrozen), "or make a new metric afterwards", lambda: changed(unfrozen, "anew")
    ),
    "replaced, rebind()": Remedy(
        lambda: changed(replaced), r"call Monitor\.rebind\(\)", lambda: changed(replaced, "rebind")
    ),
    "functional_call": Remedy(
        lambda: functional_call("computed"),
        r"call the model itself, or run that call under torch\.no_grad\(\)",
        lambda: [functional_call("itself"), functional_call("no_grad")],
    ),
    "normalized": Remedy(
        lambda: normalised(False), "pass normalized=True and run a backward pass", lambda: normalised(True)
    ),
    "compiled in place": Remedy(
        compiled_in_place, r"use compiled = torch\.compile\(model\) and pass `compiled`", compiled
    ),
    "a factor that is missing": Remedy(
        lambda: clip_factors(never_measured(), 2.0, missing="raise"),
        "leave them out with missing='zero'",
        lambda: is_right(
            clip_factors(never_measured(), 2.0, missing="zero"), torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
        ),
    ),
    "copied": Remedy(
        lambda: pickle.loads(pickle.dumps(PerSampleGradNorms(net(), loss_reduction="mean"))).coverage(),
        "pass model=, or give it to a Monitor",
        lambda: step(loss_terms=5),
    ),
    "update() of a Monitor's": Remedy(
        lambda: PerSampleGradNorms(loss_reduction="mean").update(),
        r"to use it alone call PerSampleGradNorms\(model, \.\.\.\)",
        lambda: PerSampleGradNorms(net(), loss_reduction="mean").update(),
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_and_changes(name: str) -> None:
    try_it(SETTINGS[name])


# ---- the noise scale

LABELS = Y.clamp(min=0)
Loop = Callable[[nn.Module], Any]


def noise(loop: Loop, prepared: Callable[[nn.Module], Any] = lambda model: None, **options: Any) -> None:
    """Raise what left steps out, which stands in the window too; else |G|^2 is that of single samples' gradients."""
    model = net()
    prepared(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    norms = PerSampleGradNorms(**({"loss_reduction": "mean"} | options))
    with Monitor(model, optimizer, metrics=[norms]) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            loop(model)
            optimizer.step()
        window = monitor.compute()
    result = window["per_sample_grad_norm"]
    is_right(norms.per_sample, truth(model, y=LABELS))
    if options.get("noise_scale") is False:
        assert "gradient_sq" not in result
        return
    for reason, count in result.details["noise_scale_skipped"].items():
        assert count == 3
        assert f"3 steps left out; {reason}" in repr(window)
        assert f"3 steps  left out of the noise scale; {reason}" in repr(norms)
        raise ValueError(reason)
    grads = torch.stack([_gradient(x, y) for x, y in zip(X.split(1), LABELS.split(1), strict=True)])
    expected = (6 * grads.mean(0).square().sum() - grads.square().sum(1).mean()) / 5
    assert result.gradient_sq["total"]["mean"].value == pytest.approx(float(expected), rel=1e-4)


def _gradient(x: Tensor, y: Tensor) -> Tensor:
    model = net().double()
    F.cross_entropy(model(x.double()), y).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def backward(model: nn.Module) -> None:
    F.cross_entropy(model(X), LABELS).backward()


def watch(model: nn.Module) -> list[Any]:
    """Hooks on parameters that log gradients, as wandb.watch() puts them there."""
    return [p.register_hook(lambda gradient: gradient.norm() and None) for p in model.parameters()]


def watch_and_unwatch(model: nn.Module) -> None:
    for handle in watch(model):
        handle.remove()


def zeroed(set_to_none: bool) -> Loop:
    def loop(model: nn.Module) -> None:
        backward(model)
        model.zero_grad(set_to_none=set_to_none)
        backward(model)

    return loop


NOISE: dict[str, Remedy] = {
    "hooks, removed": Remedy(
        lambda: noise(backward, watch),
        r"parameters have hooks, .*remove them \(another tool's: wandb\.unwatch\(\)\)",
        lambda: noise(backward, watch_and_unwatch),
    ),
    "hooks, without the noise scale": Remedy(
        lambda: noise(backward, watch),
        "or pass noise_scale=False",
        lambda: noise(backward, watch, noise_scale=False),
    ),
    "zeroed in place": Remedy(
        lambda: noise(zeroed(False)),
        r"zero_grad\(set_to_none=True\) where the earlier ones are to be forgotten",
        lambda: noise(zeroed(True)),
    ),
}


@pytest.mark.parametrize("name", NOISE)
def test_the_noise_scale(name: str) -> None:
    try_it(NOISE[name])


def test_hooks_are_told_once() -> None:
    with warnings.catch_warnings(record=True) as seen, pytest.raises(ValueError, match="parameters have hooks"):
        warnings.simplefilter("always")
        noise(backward, watch)
    (warning,) = seen
    assert str(warning.message).startswith(
        "lipcore leaves steps out of the gradient noise scale: parameters have hooks"
    )


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error_waits_for_the_next_call() -> None:
    with pytest.raises(UserWarning, match="lipcore leaves steps out"):
        noise(backward, watch)
