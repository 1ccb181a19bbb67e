"""Modes of Trajectory without state for each parameter, of parameters in parts, each beside one process that holds the
whole model, by definition, in float64."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from rank_situations import WINDOW, Columns, Data, data_of, errors, fsdp, made, planned
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lipcore import Monitor, Trajectory

STATS = ("update_norm", "path_length", "weight_norm", "grad_norm")
MODES: Mapping[str, dict[str, Any]] = {"updates": {}, "snapshot": {"source": "snapshot"}}
OPTIMIZERS: Mapping[str, Callable[[Any], Any]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=False),
    "AdamW foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=True),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
}


def trained(model: Any, batches: Sequence[Data], optimizer: str, trajectory: Trajectory) -> list[Any]:
    """Windows of all ranks of a run whose gradient is the mean over the batches of a step."""
    stepping = OPTIMIZERS[optimizer](model.parameters())
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Monitor(model, stepping, [trajectory], window_steps=WINDOW, timeout=20) as monitor:
            for step in range(2 * WINDOW):
                stepping.zero_grad()
                for data in batches:
                    x, y = data[step]
                    ((model(x) - y).square().mean() / len(batches)).backward()
                stepping.step()
                if (window := monitor.global_window()) is not None:
                    found.append(window)
    return found


def compared(rank: int, world: int, kind: str, mode: str, optimizer: str) -> dict[str, Any]:
    whole, model = made(Columns), made(Columns)
    data = data_of(range(world) if kind == "fsdp2" else [0])
    alone = trained_alone(whole, data, optimizer)
    cut = fsdp(model) if kind == "fsdp2" else planned(model, init_device_mesh("cpu", (world,)))
    own = data[rank : rank + 1] if kind == "fsdp2" else data
    windows = trained(cut, own, optimizer, Trajectory(mode="updates", stats=STATS, **MODES[mode]))
    return errors(windows, alone)


def trained_alone(model: nn.Module, data: Sequence[Data], optimizer: str) -> list[dict[str, float]]:
    """Norms of every window of a process of its own, by definition."""
    stepping = OPTIMIZERS[optimizer](model.parameters())
    names = [name for name, _ in model.named_parameters()]
    found: list[dict[str, float]] = []
    lengths = dict.fromkeys([*names, "total"], 0.0)
    for step in range(2 * WINDOW):
        stepping.zero_grad()
        for batch in data:
            x, y = batch[step]
            ((model(x) - y).square().mean() / len(data)).backward()
        before = [p.detach().clone() for p in model.parameters()]
        grads = dict(zip(names, [p.grad.norm() for p in model.parameters()], strict=True))  # type: ignore[union-attr]
        stepping.step()
        moved = [(p.detach() - old).norm() for p, old in zip(model.parameters(), before, strict=True)]
        updates = dict(zip(names, moved, strict=True))
        norms = {name: p.detach().norm() for name, p in model.named_parameters()}
        for each in (grads, updates, norms):
            each["total"] = torch.stack(list(each.values())).norm()
        lengths = {name: lengths[name] + float(updates[name]) for name in lengths}
        if (step + 1) % WINDOW == 0:
            numbers = {f"trajectory/path_length.sum/{name}": length for name, length in lengths.items()}
            for quantity, each in (("update_norm", updates), ("grad_norm", grads), ("weight_norm", norms)):
                numbers |= {f"trajectory/{quantity}.last/{name}": float(norm) for name, norm in each.items()}
            found.append(numbers)
            lengths = dict.fromkeys(lengths, 0.0)
    return found


def muon(rank: int, world: int, kind: str, mode: str) -> dict[str, Any]:
    """Beside the movement of the whole parameters of this very run: torch's Muon makes its steps from products in
    bfloat16, which are others (by some percent) where parameters are in parts. The last layer cannot be cut evenly."""
    model: Any = made(Columns)
    model = fsdp(model) if kind == "fsdp2" else planned(model, init_device_mesh("cpu", (world,)))
    square = [p for name, p in model.named_parameters() if name in ("a.weight", "b.weight")]
    others = [p for p in model.parameters() if not any(p is one for one in square)]
    optimizers = [torch.optim.Muon(square, lr=0.02), torch.optim.SGD(others, lr=0.1)]  # type: ignore[attr-defined]
    settings = {"mode": "exact"} if mode == "exact" else {"mode": "updates", **MODES[mode]}
    trajectory = Trajectory(stats=("update_norm", "path_length", "weight_norm"), **settings)  # type: ignore[arg-type]
    expected: list[dict[str, float]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Monitor(model, optimizers, [trajectory], window_steps=WINDOW, timeout=20) as monitor:
            lengths: dict[str, float] = {}
            for step in range(2 * WINDOW):
                for optimizer in optimizers:
                    optimizer.zero_grad()
                x, y = data_of([rank if kind == "fsdp2" else 0])[0][step]
                (model(x) - y).square().mean().backward()
                before = whole(model)
                for optimizer in optimizers:
                    optimizer.step()
                after = whole(model)
                moved = {name: float((after[name] - before[name]).norm()) for name in after}
                moved["total"] = float(torch.tensor(list(moved.values()), dtype=torch.float64).norm())
                lengths = {name: lengths.get(name, 0.0) + norm for name, norm in moved.items()}
                if (step + 1) % WINDOW == 0:
                    numbers = {f"trajectory/update_norm.last/{name}": norm for name, norm in moved.items()}
                    numbers |= {f"trajectory/path_length.sum/{name}": length for name, length in lengths.items()}
                    numbers |= {f"trajectory/weight_norm.last/{name}": float(p.norm()) for name, p in after.items()}
                    expected.append(numbers)
                    lengths = {}
                monitor.global_window()
            return errors(monitor.global_history, expected)


def whole(model: Any) -> dict[str, torch.Tensor]:
    """All parameters as they are now, put together."""
    parts = {name: p.detach() for name, p in model.named_parameters()}
    return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone() for name, p in parts.items()}


def situations(ranks: int) -> Iterator[tuple[str, int, Callable[[int, int], Any]]]:
    """Name, ranks and work of each. Beside a tensor-parallel plan torch steps what is in parts and what is whole in no
    one call of foreach or fused."""
    for kind in ("fsdp2", "tensor_parallel"):
        for mode in MODES:
            for optimizer in OPTIMIZERS if kind == "fsdp2" else ("AdamW",):
                work = functools.partial(compared, kind=kind, mode=mode, optimizer=optimizer)
                yield f"{kind}, {mode}, {optimizer}", ranks, work
        if hasattr(torch.optim, "Muon"):
            for mode in ("exact", *MODES):
                yield f"{kind}, {mode}, Muon", ranks, functools.partial(muon, kind=kind, mode=mode)
