"""The steps of torch.optim.SGD, Adam and AdamW as formulas in what they leave behind.

Written after torch/optim/{sgd,adam,adamw}.py of torch 2.13. The for-loop, foreach, fused, capturable and differentiable
implementations differ in two things that matter here, and both are followed: what happens to `.grad`, and in which
precision bias corrections are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lipcore.functional.update_rules import Scalar, UpdateRule
from lipcore.models.torch_internals import default_to_fused_or_foreach

Group = dict[str, Any]
Move = tuple[Tensor | None, Tensor | None, UpdateRule]  #: the tensors a and b of a parameter, and its rule

HELD: Move = (None, None, UpdateRule())  #: of a parameter that was not stepped


def move_of(optimizer: Optimizer, group: Group, w: Tensor, memo: dict[Any, Any]) -> Move:
    """Return what moved w in the step that was just made. `memo`, empty at the start of a step, keeps what a group's
    parameters have in common.

    Raises:
        ValueError: saying what of the step cannot be read.
    """
    grad = w.grad
    if grad is None:
        return HELD
    if group["fused"] and (reason := why_not_fused(type(optimizer), w)):
        raise ValueError(reason)
    return CLOSED_FORMS[type(optimizer)](group, grad, optimizer.state.get(w) or {}, memo)


def why_not_fused(kind: type, w: Tensor) -> str | None:
    """Return why the fused step of such a parameter is not what its state says; None where it is."""
    if kind is SGD:
        if w.is_cpu and w.dtype in (torch.bfloat16, torch.float16):
            # pytorch issue 191763: full vectors of the parameter are not updated, momentum is not what it should be
            return f"torch's fused SGD does not step {w.dtype} on the CPU as its formula says; use fused=False"
    elif w.dtype == torch.float16:
        return (
            "the fused step uses second moments before they are rounded to float16, where small ones become 0; use "
            "fused=False, snapshots, or float32 parameters"
        )
    return None


def _number(x: Any) -> Scalar:
    """Return a hyper-parameter as a float; one that lies on the GPU stays there, as a 0-dimensional tensor."""
    if not isinstance(x, Tensor):
        return float(x)
    return float(x) if x.is_cpu else x.detach().reshape(())


def _sgd(group: Group, grad: Tensor, state: Group, memo: dict[Any, Any]) -> Move:
    known = memo.get(id(group))
    if known is None:
        known = memo[id(group)] = _sgd_rule(group)
    rule, reads_grad, reads_buffer = known
    buffer = state.get("momentum_buffer")
    if buffer is None and group["momentum"] != 0:
        return HELD
    if not reads_grad:
        return buffer, None, rule
    if grad.layout != torch.strided:
        raise ValueError(
            f"its gradient is sparse ({grad.layout}), so SGD's update cannot be read from it; use sparse=False, or "
            "snapshots"
        )
    return grad.resolve_neg(), buffer if reads_buffer else None, rule


def _sgd_rule(group: Group) -> tuple[UpdateRule, bool, bool]:
    """Return the rule of a group, and whether it reads the gradient and the momentum buffer."""
    rate, decay, momentum = _number(group["lr"]), _number(group["weight_decay"]), _number(group["momentum"])
    signed = -rate if group["maximize"] else rate
    if group["momentum"] == 0:
        return UpdateRule.of_step(signed, shrink=rate * decay), True, False
    if not group["nesterov"]:
        return UpdateRule(rate, momentum=True), False, True  # weight decay, sign and dampening are in the buffer
    if decay == 0 and not group["maximize"] and _is_foreach(group):
        # torch._foreach_add_(device_grads, bufs, alpha=momentum): here .grad itself has become g + momentum * buffer.
        return UpdateRule(rate), True, False
    return UpdateRule.of_step(signed, rate * momentum, rate * decay, momentum=True), True, True


def _is_foreach(group: Group) -> bool:
    """Return whether torch.optim.sgd.sgd() has taken its foreach implementation."""
    if group["foreach"] is None and group["fused"] is None:
        # The rule itself, not a copy of it.
        stepped = [p for p in group["params"] if p.grad is not None]
        return default_to_fused_or_foreach(stepped, differentiable=False, use_fused=False)[1]
    return bool(group["foreach"])


def _adam(group: Group, grad: Tensor, state: Group, memo: dict[Any, Any]) -> Move:
    if not state:
        return HELD
    step: Tensor = state["step"]
    # Parameters of a group mostly share their count. On the GPU it is not known here, and each has its own tensor.
    key = id(group), step.item() if step.is_cpu else id(step)
    if key not in memo:
        memo[key] = _adam_rule(group, step)
    rule = memo[key]
    if rule is None:
        return HELD
    return state["exp_avg"], state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"], rule


def _adam_rule(group: Group, step: Tensor) -> UpdateRule | None:
    """Return the rule of a group; None when no step has been made yet: a GradScaler skipped the first ones.

    Hyper-parameters that are tensors stay tensors as long as they do in torch: a float32 learning rate gives a float32
    step size, whatever the parameter's dtype.
    """
    lr, decay = group["lr"], group["weight_decay"]
    if group["fused"] or not isinstance(lr, Tensor):
        lr = _number(lr)
    correction1, correction2 = _bias_corrections(group, step)
    root = _number(correction2**0.5)
    if isinstance(root, float) and root == 0:
        return None
    shrink: Scalar = 0.0  # Adam's own weight decay, the L2 kind, is in the moments
    if group.get("decoupled_weight_decay") and decay != 0:
        shrink = 1 - _number(1 - lr * decay) if isinstance(lr, Tensor) else lr * _number(decay)
    correction = _number(correction1)
    return UpdateRule.of_step(
        _number(lr / correction1) * correction,
        shrink=shrink,
        adaptive=True,
        first_scale=1 / correction,
        second_scale=1 / root,
        eps=_number(group["eps"]),
    )


def _bias_corrections(group: Group, step: Tensor) -> tuple[Any, Any]:
    """Return 1 - beta^step of both betas in the arithmetic of the implementation. At step 1 float32's 1 - 0.999 is off
    by 1.3e-5, so float64 would be wrong where torch did not use it."""
    beta1, beta2 = group["betas"]
    if group["fused"]:
        count = float(step) if step.is_cpu else step.double()
        return 1 - _number(beta1) ** count, 1 - _number(beta2) ** count
    if group["capturable"] or group["differentiable"]:
        return 1 - beta1**step, 1 - beta2**step
    count = step.item()
    return 1 - beta1**count, 1 - beta2**count


CLOSED_FORMS: dict[type, Callable[[Group, Tensor, Group, dict[Any, Any]], Move]] = {
    SGD: _sgd,
    Adam: _adam,
    AdamW: _adam,
}


def supported(optimizer: Any) -> str | None:
    """Return why an optimizer's updates cannot be had from its state; None when they can.

    Closed forms are of exactly torch.optim.SGD, Adam and AdamW. What a subclass's step does nobody knows.
    """
    kind = type(optimizer)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if not isinstance(optimizer, Optimizer):
        return f"{name} is not a torch.optim.Optimizer"
    if kind not in CLOSED_FORMS:
        base = next((known.__name__ for known in (AdamW, Adam, SGD) if isinstance(optimizer, known)), None)
        derived = f", a subclass of {base} whose step may do anything," if base else ""
        return f"{name}{derived} has no closed form here (torch.optim.SGD, Adam and AdamW do, unless subclassed)"
    for i, group in enumerate(optimizer.param_groups):
        for parameter in group["params"] if group["fused"] else ():
            if (reason := why_not_fused(kind, parameter)) is not None:
                return f"{name}: parameter group {i}: {reason}"
        decay = group["weight_decay"]
        if isinstance(decay, Tensor) and (decay.requires_grad or decay.device.type != "cpu"):
            return (
                f"{name}: weight_decay of parameter group {i} is a tensor that "
                f"{'requires gradients' if decay.requires_grad else f'lies on {decay.device}'}; pass a number"
            )
    return None
