"""Training loops at batch one, from ordinary to odd: each is one step of a loop that a Monitor watches."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from models import mse
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.optim import Optimizer

Scenario = Callable[[nn.Module, Optimizer, Tensor, Tensor, int], None]


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


def ordinary_step(loss_of: Callable[[nn.Module, Tensor, Tensor, int], Tensor]) -> Scenario:
    """zero_grad, this loss, backward, step."""

    @functools.wraps(loss_of)
    def run(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, step: int) -> None:
        optimizer.zero_grad()
        loss_of(model, x, y, step).backward()
        optimizer.step()

    return run


# ---- an ordinary step on some loss


@ordinary_step
def plain(model: nn.Module, x: Tensor, y: Tensor, step: int) -> Tensor:
    return mse(model(x), y)


@ordinary_step
def evaluations_in_between(model: nn.Module, x: Tensor, y: Tensor, step: int) -> Tensor:
    loss = mse(model(x), y)
    model.eval()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            model(x + 1)
            model(torch.cat([x, x]))
    model.train()
    return loss


@ordinary_step
def stumbling(model: nn.Module, x: Tensor, y: Tensor, step: int) -> Tensor:
    try:
        return mse(model(x), y)
    except ZeroDivisionError:
        return mse(model(x), y)


@ordinary_step
def two_forwards_one_backward(model: nn.Module, x: Tensor, y: Tensor, step: int) -> Tensor:
    return mse(model(x), y) + 3 * mse(model(x + 1), y)


@ordinary_step
def penalty_on_parameters(model: nn.Module, x: Tensor, y: Tensor, step: int) -> Tensor:
    return mse(model(x), y) + 0.1 * sum(p.square().sum() for p in model.parameters())


@ordinary_step
def gradient_of_a_part_first(model: nn.Module, x: Tensor, y: Tensor, step: int) -> Tensor:
    loss = mse(model(x), y)
    torch.autograd.grad(1000 * loss, model[-1].weight, retain_graph=True)
    return loss


@ordinary_step
def gradient_of_another_loss_first(model: nn.Module, x: Tensor, y: Tensor, step: int) -> Tensor:
    output = model(x)
    torch.autograd.grad(output.exp().sum(), list(model.parameters()), retain_graph=True)
    return mse(output, y)


@ordinary_step
def by_keyword(model: nn.Module, x: Tensor, y: Tensor, step: int) -> Tensor:
    return mse(model(input=x) if step % 2 else model(x), y)


@ordinary_step
def output_changed_in_place(model: nn.Module, x: Tensor, y: Tensor, step: int) -> Tensor:
    output = model(x)
    output *= 3
    output -= y
    return output.square().mean()


@ordinary_step
def a_part_called_directly(model: nn.Module, x: Tensor, y: Tensor, step: int) -> Tensor:
    return mse(model(x), y) + 0.0 * model[0](x).sum()


# ---- other things happen around it


def abandoned_forwards(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    if step % 2:
        model(x + 1)
    plain(model, optimizer, x, y, step)
    model(x - 1)


def sizes_in_turn(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    size = (1, 3, 1, 1, 2)[step % 5]
    plain(model, optimizer, x.repeat(size, 1) + torch.arange(size).reshape(-1, 1), y.repeat(size, 1), step)


def bias_gradient_hook(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    handle = model[0].bias.register_hook(lambda grad: 100 * grad) if step >= 2 else None
    plain_then_remove(handle, model, optimizer, x, y, step)


def a_hook_of_someone_else(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    handle = model[-1].register_forward_hook(lambda module, arguments, output: output * 3) if step % 3 == 1 else None
    plain_then_remove(handle, model, optimizer, x, y, step)


def plain_then_remove(handle: Any, *arguments: Any) -> None:
    plain(*arguments)
    if handle is not None:
        handle.remove()


def bias_replaced(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    if step == 2:
        model[0].bias = nn.Parameter(model[0].bias.detach() + 1)
    plain(model, optimizer, x, y, step)


def frozen_in_turn(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    model[0].bias.requires_grad_(step % 3 != 1)
    model[-1].bias.requires_grad_(step % 3 != 2)
    plain(model, optimizer, x, y, step)


def weight_pruned(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    if step == 3:
        prune.l1_unstructured(model[0], "weight", 0.3)
    plain(model, optimizer, x, y, step)


def weight_parametrized(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    if step == 3:
        parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    plain(model, optimizer, x, y, step)


# ---- another backward, or another order


def clip_values(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    optimizer.zero_grad()
    mse(model(x), y).backward()
    nn.utils.clip_grad_value_(model.parameters(), 1e-4)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-5)
    optimizer.step()


def backward_twice(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    optimizer.zero_grad()
    loss = mse(model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()


def accumulation(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    for shift in range(3):
        mse(model(x + shift), y).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=bool(step % 2))


def graph_of_the_gradient(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, step: int) -> None:
    optimizer.zero_grad()
    loss = mse(model(x), y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: backward(create_graph=True) may leak
        loss.backward(create_graph=True)
    for parameter in model.parameters():
        parameter.grad = parameter.grad.detach()
    optimizer.step()


SCENARIOS: dict[str, Scenario] = {
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
        graph_of_the_gradient,
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
