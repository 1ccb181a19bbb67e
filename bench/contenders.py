"""One trajectory step by lipcore, by what one would write with torch, and by published tools: the same parameters, the
same statistics as far as each has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lipcore import _core
from lipcore.functional import reference
from lipcore.trajectory import Trajectory

Call = Callable[[], Any]


def lipcore(params: list[Tensor]) -> Call:
    return Trajectory((str(i), p) for i, p in enumerate(params)).update


class Torch:
    """The statistics with torch's own operations and lipcore's recurrence: float32 sums, as they are written
    everywhere, and for bfloat16 float32 deviations and differences, because bfloat16 ones have two digits."""

    def __init__(self, params: list[Tensor]) -> None:
        self.params = params
        self.prev = [p.clone() for p in params]
        self.deviation = [torch.zeros_like(p, dtype=torch.float32) for p in params]
        self.count = 1
        self.buffers: list[Tensor] = []

    def eager(self) -> Tensor:
        self.count += 1
        rows = []
        for w, p, d in zip(self.params, self.prev, self.deviation, strict=True):
            x = w.float()  # no copy of what is float32 already
            step = x - p
            before = step + d
            torch.mul(before, 1 - 1 / self.count, out=d)
            norms = torch.stack([step.norm().square(), torch.dot(before.view(-1), d.view(-1))])
            rows.append(torch.cat([norms, torch.stack([step.abs().max(), x.norm().square(), (~x.isfinite()).sum()])]))
            p.copy_(w)
        return torch.stack(rows)

    def reusing(self) -> Tensor:
        """The loop again, with three buffers made once: most of eager's time is page faults of its temporaries.
        It does not count non-finite values, for which there is no operation that allocates nothing."""
        self.count += 1
        if not self.buffers:
            self.buffers = list(torch.empty(3, max(p.numel() for p in self.params)))
        rows = []
        for w, p, d in zip(self.params, self.prev, self.deviation, strict=True):
            one, two, three = (buffer[: w.numel()].view(w.shape) for buffer in self.buffers)
            x = w if w.dtype == torch.float32 else three.copy_(w)
            step = torch.sub(x, p, out=one)
            before = torch.add(step, d, out=two)
            torch.mul(before, 1 - 1 / self.count, out=d)
            sums = [step.norm().square(), torch.dot(before.view(-1), d.view(-1)), step.abs_().max(), x.norm().square()]
            rows.append(torch.stack(sums))
            p.copy_(w)
        return torch.stack(rows)

    def foreach(self) -> Tensor:
        """Without the count of non-finite values, for which there is no such function."""
        self.count += 1
        params = [w.float() for w in self.params]
        step = torch._foreach_sub(params, self.prev)
        before = torch._foreach_add(step, self.deviation)
        torch._foreach_copy_(self.deviation, torch._foreach_mul(before, 1 - 1 / self.count))
        increments = [product.sum() for product in torch._foreach_mul(before, self.deviation)]
        columns = [torch._foreach_norm(step), increments]
        columns += [torch._foreach_norm(step, float("inf")), torch._foreach_norm(params)]
        torch._foreach_copy_(self.prev, self.params)
        return torch.stack([torch.stack(list(column)) for column in columns])


def eager(params: list[Tensor]) -> Call:
    return Torch(params).eager


def reusing(params: list[Tensor]) -> Call:
    return Torch(params).reusing


def foreach(params: list[Tensor]) -> Call:
    return Torch(params).foreach


def compiled(params: list[Tensor]) -> Call:
    """Compiled for these shapes and for the number of threads at the first call; one graph, no Python state in it."""
    state = Torch(params)
    torch._dynamo.reset()  # or a shape met before makes it generalise, which is slower
    function = torch.compile(_step, dynamic=False)
    share = torch.tensor(0.5)

    def call() -> Tensor:
        state.count += 1
        share.fill_(1 - 1 / state.count)
        found: Tensor = function(state.params, state.prev, state.deviation, share)
        return found

    call()
    return call


def _step(params: list[Tensor], prev: list[Tensor], deviation: list[Tensor], share: Tensor) -> Tensor:
    rows = []
    for w, p, d in zip(params, prev, deviation, strict=True):
        x = w.float()
        step = x - p.float()
        before = step + d
        after = before * share
        sums = [(step * step).sum(), (before * after).sum(), step.abs().amax()]
        rows.append(torch.stack([*sums, (x * x).sum(), (~x.isfinite()).sum().float()]))
        d.copy_(after)
        p.copy_(w)
    return torch.stack(rows)


def cockpit(params: list[Tensor]) -> Call:
    """cockpit-for-pytorch's UpdateSize and Distance, each by its own track(): what Cockpit.track() calls at every step,
    without the rest of its bookkeeping."""
    from cockpit import quantities
    from cockpit.utils.schedules import linear

    tracked = [quantities.UpdateSize(linear(1)), quantities.Distance(linear(1))]
    step = 0

    def call() -> list[Any]:
        nonlocal step
        for quantity in tracked:
            quantity.track(step, params, None)
        step += 1
        return tracked

    return call


CONTENDERS: dict[str, Callable[[list[Tensor]], Call]] = {
    "lipcore": lipcore,
    "eager": eager,
    "eager with buffers": reusing,
    "foreach": foreach,
    "compile": compiled,
    "cockpit": cockpit,
}


def check(params: list[Tensor]) -> None:
    """lipcore on slices of the parameters against float64, and the torch code against it as closely as it can."""
    torch.manual_seed(0)
    small = [p.flatten()[:5000].clone() for p in params[:3]]
    prev, deviation = [torch.randn_like(p) for p in small], [torch.randn(p.shape) for p in small]
    expected, *_ = reference.trajectory_step(small, prev, deviation, count=3)
    for write in (Torch.eager, Torch.reusing, Torch.foreach, _uncompiled):
        state = Torch(small)
        state.prev, state.deviation, state.count = _copy(prev), _copy(deviation), 2
        rows = write(state)
        if write is Torch.foreach:  # norms in columns
            rows = rows.T.clone()
            rows[:, [0, 3]] = rows[:, [0, 3]].square()
        torch.testing.assert_close(rows.double(), expected[:, : rows.shape[1]], rtol=1e-4, atol=0)
    out = torch.empty(len(small), _core.STEP_COLUMNS, dtype=torch.float64)
    _core.trajectory_step(small, prev, deviation, 3, out)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)


def _uncompiled(state: Torch) -> Tensor:
    return _step(state.params, state.prev, state.deviation, torch.tensor(state.count / (state.count + 1)))


def _copy(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]
