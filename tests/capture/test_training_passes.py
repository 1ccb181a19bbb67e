"""What counts as a training pass: one table of calls on a watched model, for every engine that watches it.

None of them may be disturbed by the hooks, nor disturb what is recorded before and after, whether it comes first or
between two steps, on a first layer that trains or is frozen, eager or compiled, on this thread or another.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from few import spread
from models import Custom, Graph, batches, mlp, seeded, sgd
from threads import at_once
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from lipcore import Lipschitz, Monitor, PerSampleGradNorms, Trajectory
from lipcore.metric.protocol import Metric

# ---- the table


@dataclass(frozen=True)
class Call:
    """What a user does with a model beside training it."""

    run: Callable[[nn.Module, Tensor], Any]
    trains: bool = False  # its backward pass accumulates the gradients of a forward pass, which so is a training pass
    eager: bool = False  # torch.compile does not take it


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in getattr(model, "_orig_mod", model).named_parameters()}


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def func_grad_of_parameters(model: nn.Module, x: Tensor) -> Any:
    return torch.func.grad(lambda p: functional_call(model, p, (x,)).sum())(parameters_of(model))


def per_sample_grads(model: nn.Module, x: Tensor) -> Any:
    def loss(p: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, p, (sample[None],)).sum()

    return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters_of(model), x)


def forward_mode(model: nn.Module, x: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def jit_trace(model: nn.Module, x: Tensor) -> Any:
    return torch.jit.trace(model, (x,))(x)


def add_graph(model: nn.Module, x: Tensor) -> Any:
    return torch.jit.trace(model, (x,), strict=False).graph is not None  # what SummaryWriter.add_graph() calls


def export(model: nn.Module, x: Tensor) -> Any:
    return torch.export.export(model, (x,), strict=False).module()(x)


def export_strictly(model: nn.Module, x: Tensor) -> Any:
    return torch.export.export(model, (x,), strict=True).module()(x)


def compiled_around_it(model: nn.Module, x: Tensor) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="eager", fullgraph=True)(x)


def fake_tensors(model: nn.Module, x: Tensor) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return model(mode.from_tensor(x)).shape


def grad_of_parameters(model: nn.Module, x: Tensor) -> Any:
    return torch.autograd.grad(model(x).sum(), trained(model))


def grad_of_one(model: nn.Module, x: Tensor) -> Any:
    return torch.autograd.grad(model(x).sum(), trained(model)[-2])


def grad_of_inputs(model: nn.Module, x: Tensor) -> Any:
    x = leaf(x)
    return torch.autograd.grad(model(x).sum(), x)


def penalty(model: nn.Module, x: Tensor) -> Any:
    x = leaf(x)
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return slope.square().sum()


def penalty_trained_on(model: nn.Module, x: Tensor) -> Any:
    penalty(model, x).backward()


def loss_and_penalty(model: nn.Module, x: Tensor) -> Any:
    x = leaf(x)
    output = model(x)
    (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    (output.sum() + slope.square().sum()).backward()


def hessian_vector(model: nn.Module, x: Tensor) -> Any:
    grads = torch.autograd.grad(model(x).square().sum(), trained(model), create_graph=True)
    return torch.autograd.grad([g.sum() for g in grads], trained(model), allow_unused=True)


def into_one(model: nn.Module, x: Tensor) -> Any:
    model(x).sum().backward(inputs=trained(model)[:1])


def into_all(model: nn.Module, x: Tensor) -> Any:
    model(x).sum().backward(inputs=trained(model))


def into_the_input(model: nn.Module, x: Tensor) -> Any:
    x = leaf(x)
    model(x).sum().backward(inputs=[x])
    return x.grad


def attack(model: nn.Module, x: Tensor) -> Any:
    for _ in range(3):
        (slope,) = grad_of_inputs(model, x)
        x = x + 0.1 * slope.sign()
    return x


def functional_jacobian(model: nn.Module, x: Tensor) -> Any:
    return torch.autograd.functional.jacobian(model, x)


def without_grad(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        model(x)
    with torch.inference_mode():
        return model(x).clone()


def copied_and_trained(model: nn.Module, x: Tensor) -> Any:
    copied = copy.deepcopy(model)
    copied(x).sum().backward()
    return [p.grad for p in copied.parameters()]


def kept_graph(model: nn.Module, x: Tensor) -> Any:
    loss = model(x).sum()
    torch.autograd.grad(loss, trained(model), retain_graph=True)
    loss.backward()


CALLS = {
    "func.grad of parameters": Call(func_grad_of_parameters),
    "func.grad of inputs": Call(lambda m, x: torch.func.grad(lambda z: m(z).sum())(x)),
    "vmap(grad)": Call(per_sample_grads, eager=True),
    "vmap": Call(lambda m, x: torch.func.vmap(m)(x), eager=True),
    "jacrev": Call(lambda m, x: torch.func.jacrev(m)(x), eager=True),
    "jacfwd": Call(lambda m, x: torch.func.jacfwd(m)(x), eager=True),
    "hessian": Call(lambda m, x: torch.func.hessian(lambda z: m(z).sum())(x), eager=True),
    "jvp": Call(lambda m, x: torch.func.jvp(m, (x,), (torch.ones_like(x),))[1], eager=True),
    "vjp": Call(lambda m, x: torch.func.vjp(m, x)[1](torch.ones(len(x), 1)), eager=True),
    "forward AD": Call(forward_mode, eager=True),
    "jit.trace": Call(jit_trace, eager=True),
    "add_graph": Call(add_graph, eager=True),
    "export": Call(export, eager=True),
    "export strictly": Call(export_strictly, eager=True),
    "make_fx": Call(lambda m, x: make_fx(m)(x)(x), eager=True),
    "compiled around it": Call(compiled_around_it, eager=True),
    "fake tensors": Call(fake_tensors, eager=True),
    "autograd.grad of parameters": Call(grad_of_parameters),
    "autograd.grad of one": Call(grad_of_one),
    "autograd.grad of inputs": Call(grad_of_inputs),
    "attack": Call(attack),
    "penalty": Call(penalty, eager=True),
    "penalty trained on": Call(penalty_trained_on, eager=True),
    "loss and penalty": Call(loss_and_penalty, eager=True),
    "Hessian-vector product": Call(hessian_vector, eager=True),
    "backward(inputs=one)": Call(into_one),
    "backward(inputs=all)": Call(into_all),
    "backward(inputs=input)": Call(into_the_input),
    "functional.jacobian": Call(functional_jacobian),
    "no_grad and inference_mode": Call(without_grad),
    "a copy is trained": Call(copied_and_trained, eager=True),
    "autograd.grad, then backward": Call(kept_graph, trains=True, eager=True),
}


# ---- who watches


def read_lipschitz(metric: Any) -> tuple[int, float]:
    result = metric.finalize().normalized_gradient_norm
    found = next(iter(result.values()), None)
    return (0, 0.0) if found is None else (found.sum.count, found.sum.value)


def read_norms(metric: Any) -> tuple[int, float]:
    found = metric.finalize().norm["total"]
    return found.mean.count, found.mean.value


#: metric, and how many samples it has recorded, with a number that changes when one of them does.
ENGINES: dict[str, tuple[Callable[[], Metric], Callable[[Any], tuple[int, float]]]] = {
    "taps": (lambda: Lipschitz(batch_of_one="exact"), read_lipschitz),
    "shortcut": (lambda: Lipschitz(batch_of_one="fast"), read_lipschitz),
    "layers": (lambda: PerSampleGradNorms(loss_reduction="mean", batch_of_one="fast"), read_norms),
}


def frozen() -> nn.Sequential:
    model = mlp(5, 7, 6, 1, activation=nn.Tanh)
    model[0].requires_grad_(False)
    return model


def compiled() -> nn.Module:
    torch._dynamo.reset()
    model: nn.Module = torch.compile(mlp(5, 7, 1, activation=nn.Tanh), backend="aot_eager")
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "chain": lambda: mlp(5, 7, 6, 1, activation=nn.Tanh),
    "found_by_running": Custom,
    "frozen_first": frozen,
    "compiled": compiled,
}


def run(
    engine: str, kind: str, call: Call | None, *, first: bool, size: int
) -> tuple[tuple[int, float], Any, list[Tensor]]:
    """Train, call, train: what was recorded, what the call returned, and the weights."""
    make, read = ENGINES[engine]
    model = seeded(MODELS[kind])
    optimizer = sgd(model)
    metric = make()
    torch.manual_seed(2)
    x, result = torch.randn(size, 5), None
    with Monitor(model, optimizer, metrics=[metric, Trajectory()]) as monitor:
        for step, (batch, y) in enumerate(batches(6, size)):
            if call is not None and step == (0 if first else 4):
                result = call.run(model, x)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(batch), y).backward()
            optimizer.step()
        monitor.flush()
        found = read(metric)
    return found, result, [p.detach() for p in model.parameters()]


@functools.cache
def run_without(engine: str, kind: str, size: int) -> tuple[tuple[int, float], Any, list[Tensor]]:
    return run(engine, kind, None, first=False, size=size)


def same(one: Any, other: Any) -> bool:
    leaves, others = torch.utils._pytree.tree_leaves(one), torch.utils._pytree.tree_leaves(other)
    return len(leaves) == len(others) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(leaves, others, strict=True)
    )


# A combination tells something only where the engine takes another way through its code.
WAYS = [
    *((engine, "chain", when, 3) for engine in ("taps", "layers") for when in ("first", "between")),
    *((engine, "chain", "between", 1) for engine in ENGINES),  # served from the gradients by then
    ("shortcut", "chain", "first", 1),
    *((engine, "found_by_running", "first", 3) for engine in ("taps", "layers")),
    *((engine, "frozen_first", when, 3) for engine in ("taps", "layers") for when in ("first", "between")),
    *((engine, "compiled", "between", 3) for engine in ("taps", "layers")),
]


# A compiled row takes seconds; this is a transform. Calls that compile or export take long too: `make test` has their
# first way, and of strict export nothing, which traces as what is compiled does.
SLOW_CALLS = ("compiled around it", "export", "fake tensors")
OF_CI = ("export strictly",)
COMPILED_SOON = ("func.grad of inputs",)


def rows() -> list[Any]:
    slow, others = [], []
    for name, call in CALLS.items():
        for way in WAYS:
            if not (call.eager and way[1] == "compiled"):
                late = way[1] == "compiled" and name not in COMPILED_SOON
                late |= name in OF_CI or (name in SLOW_CALLS and way != WAYS[0])
                late |= way[1] == "frozen_first" and way[2] == "between"
                row = pytest.param(name, *way, marks=[pytest.mark.ci] if late else [])
                (slow if name in SLOW_CALLS else others).append(row)
    return [*slow, *spread(others, 3)]


def test_every_call_has_a_row_without_the_mark() -> None:
    assert CALLS.keys() - {row.values[0] for row in rows() if not row.marks} == set(OF_CI)


@pytest.mark.parametrize(("name", "engine", "kind", "when", "size"), rows())
def test_only_training_passes_are_recorded(name: str, engine: str, kind: str, when: str, size: int) -> None:
    call, first = CALLS[name], when == "first"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch.jit
        warnings.filterwarnings("error", message="lipcore")
        plain, _, weights = run_without(engine, kind, size)
        found, result, trained_to = run(engine, kind, call, first=first, size=size)
        alone = call.run(unwatched(kind, first=first, size=size), input_of(size))
    assert same(weights, trained_to)
    assert same(result, alone)
    assert plain[0] == 6 * size
    assert found[0] == (6 + call.trains) * size
    if not call.trains:
        assert found[1] == pytest.approx(plain[1], rel=1e-6)  # some of one sample are read from gradients of float32


def input_of(size: int) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(size, 5)


def unwatched(kind: str, *, first: bool, size: int) -> nn.Module:
    """The model as it is where the call comes."""
    model = seeded(MODELS[kind])
    optimizer = sgd(model)
    for batch, y in batches(6, size)[: 0 if first else 4]:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(batch), y).backward()
        optimizer.step()
    return model


# Forward AD, jit.trace and functional_call() are not here: to torch they belong to the process, or to the model.
@pytest.mark.parametrize("name", ["func.grad of inputs", "jacrev", "autograd.grad of inputs", "penalty"])
@pytest.mark.parametrize("engine", ["taps", "layers"])
def test_another_thread_does_it_meanwhile(engine: str, name: str) -> None:
    make, read = ENGINES[engine]
    model, metric = seeded(MODELS["chain"]), make()

    def training() -> None:
        for batch, y in batches(20, 3):
            nn.functional.mse_loss(model(batch), y).backward()

    def other() -> None:
        for _ in range(10):
            CALLS[name].run(model, torch.randn(4, 5))

    with Monitor(model, metrics=[metric]) as monitor:
        at_once(lambda work: work(), [training, other])
        monitor.step()
        assert read(metric)[0] == 60


def test_a_transform_inside_the_forward_pass_is_no_pass_of_its_own() -> None:
    """The model's slope is part of its output, as networks of physics have it; with a sparse matrix on the way."""

    def rule(m: Any, x: Tensor) -> Tensor:
        slope = torch.func.vmap(torch.func.grad(lambda z: m.body(z).sum()))(x)
        mixed = torch.sparse.mm(torch.eye(len(x)).to_sparse(), m.first(x))
        return m.last(mixed.tanh()) + 0 * slope.sum(1, keepdim=True)

    model = seeded(lambda: Graph(rule, first=nn.Linear(5, 7), body=nn.Linear(5, 1), last=nn.Linear(7, 1)))
    optimizer, metric = sgd(model), Lipschitz(input="first")
    with Monitor(model, optimizer, metrics=[metric]):
        for batch, y in batches(4, 3):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(batch), y).backward()
            optimizer.step()
        assert read_lipschitz(metric)[0] == 12


def test_a_loop_that_only_calls_autograd_grad_is_told_why_nothing_is_recorded() -> None:
    model = seeded(MODELS["chain"])
    optimizer = sgd(model)
    with Monitor(model, optimizer) as monitor:
        with pytest.warns(RuntimeWarning, match=r"no sample for lipschitz so far: .*autograd\.grad"):
            for batch, y in batches(3, 4):
                grads = torch.autograd.grad(nn.functional.mse_loss(model(batch), y), trained(model))
                for parameter, grad in zip(trained(model), grads, strict=True):
                    parameter.grad = grad
                optimizer.step()
        window = monitor.compute()
    assert "autograd.grad" in window["lipschitz"].details["unrecorded_because"][0]
    assert window["lipschitz"].details["unrecorded_forwards"] == 3
    assert window["trajectory"].path_length["total"].sum.value > 0
