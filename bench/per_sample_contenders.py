"""Ways to get the norm of every sample's gradient in a training step. Each is made of a task and an optimizer, and
returns a step: forward, loss, backward, norms [B] (None of the plain step), optimizer, gradients cleared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from per_sample_models import Task
from torch import Tensor
from torch.optim import Optimizer

import lipcore

Step = Callable[[], "Tensor | None"]


class Cannot(Exception):
    """Why this contender does not serve the model, or is not here."""


def plain(task: Task, optimizer: Optimizer) -> Step:
    def step() -> None:
        task.losses(task.model(task.x), task.y).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _lipcore(fused: bool = False, prove: bool = True) -> Callable[[Task, Optimizer], Step]:
    def make(task: Task, optimizer: Optimizer) -> Step:
        metric = lipcore.PerSampleGradNorms(
            task.model, loss_reduction="mean", fused=fused, prove=prove, batch_of_one="fast"
        )

        def step() -> Tensor:
            task.losses(task.model(task.x), task.y).mean().backward()
            norms = metric.per_sample
            optimizer.step()
            optimizer.zero_grad()
            return norms

        return step

    return make


def compiled(step: Callable[[Task, Optimizer], Step]) -> Callable[[Task, Optimizer], Step]:
    """Return the same with the model compiled."""

    def make(task: Task, optimizer: Optimizer) -> Step:
        # Else torch takes the graph of a model without hooks for one of the same class that has some.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        return step(replace(task, model=torch.compile(task.model, fullgraph=True)), optimizer)

    return make


def opacus(task: Task, optimizer: Optimizer) -> Step:
    try:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
    except ImportError as error:
        raise Cannot(f"Opacus is not installed ({error})") from error
    try:
        model = GradSampleModuleFastGradientClipping(task.model, max_grad_norm=1.0, use_ghost_clipping=True)
    except Exception as error:
        raise Cannot(str(error).splitlines()[0]) from error

    def step() -> Tensor:
        task.losses(model(task.x), task.y).mean().backward()
        norms = model.get_norm_sample()
        optimizer.step()
        optimizer.zero_grad()
        for parameter in model.parameters():
            parameter._norm_sample = None
        return norms

    return step


def backpack(task: Task, optimizer: Optimizer) -> Step:
    try:
        from backpack import backpack as context
        from backpack import extend
        from backpack.extensions import BatchL2Grad
    except ImportError as error:
        raise Cannot(f"BackPACK is not installed ({error})") from error
    if not isinstance(task.model, torch.nn.Sequential):
        raise Cannot("BackPACK extends chains of modules only")
    loss = torch.nn.MSELoss(reduction="sum") if task.y.is_floating_point() else torch.nn.CrossEntropyLoss()
    model, criterion = extend(task.model), extend(loss)

    def step() -> Tensor:
        with context(BatchL2Grad()):
            criterion(model(task.x), task.y).backward()
        squares = [parameter.batch_l2 for parameter in model.parameters()]
        norms = torch.stack(squares).sum(0).sqrt() * len(task.x)
        optimizer.step()
        optimizer.zero_grad()
        return norms

    try:
        step()
    except Exception as error:
        raise Cannot(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
    return step


def vmap(task: Task, optimizer: Optimizer) -> Step:
    from torch.func import functional_call, grad
    from torch.func import vmap as mapped

    parameters = dict(task.model.named_parameters())

    def loss_of(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return task.losses(functional_call(task.model, values, (x[None],)), y[None]).sum()

    per_sample = mapped(grad(loss_of), in_dims=(None, 0, 0))

    def step() -> Tensor:
        grads = per_sample({name: p.detach() for name, p in parameters.items()}, task.x, task.y)
        squares = [g.flatten(1).square().sum(1) for g in grads.values()]
        for name, parameter in parameters.items():
            parameter.grad = grads[name].mean(0)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(squares).sum(0).sqrt()

    return step


def loop(task: Task, optimizer: Optimizer) -> Step:
    """One sample at a time; gradients add up to what the batch's are."""
    parameters = list(task.model.parameters())

    def step() -> Tensor:
        norms, total = [], [torch.zeros_like(p) for p in parameters]
        for x, y in zip(task.x.split(1), task.y.split(1), strict=True):
            grads = torch.autograd.grad(task.losses(task.model(x), y).sum(), parameters)
            norms.append(torch.stack(torch._foreach_norm(grads)).norm())
            torch._foreach_add_(total, grads)
        torch._foreach_div_(total, len(task.x))
        for parameter, gradient in zip(parameters, total, strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(norms)

    return step


CONTENDERS: dict[str, Callable[[Task, Optimizer], Step]] = {
    "plain": plain,
    "lipcore": _lipcore(),
    "lipcore fused": _lipcore(fused=True),
    "Opacus ghost": opacus,
    "BackPACK": backpack,
    "vmap(grad)": vmap,
    "loop": loop,
}
#: Its first pass keeps everything for two backward passes, of which the first is the proof.
UNPROVED = {
    "lipcore without proof": _lipcore(prove=False),
    "lipcore fused without proof": _lipcore(fused=True, prove=False),
}
#: Against a plain step that is compiled too.
COMPILED = {"plain compiled": compiled(plain), "lipcore compiled": compiled(_lipcore())}
