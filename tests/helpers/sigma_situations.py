"""Situations of several ranks that hold a first weight in parts: its singular values beside those of the whole
weight."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from rank_situations import Columns, data_of, fsdp, made, planned
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from lipcore import Lipschitz, Monitor, Trajectory, theory
from lipcore.lipschitz.singular_values import singular_values

NAME, WINDOW = "lipschitz", 2


class Small(nn.Module):
    """A linear first layer of any size."""

    def __init__(self, inputs: int = 6, outputs: int = 8) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(inputs, outputs), nn.Linear(outputs, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Image(nn.Module):
    """A convolution first; more filters than ranks can cut evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 5, 3, padding=1), nn.Linear(5, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)).mean((2, 3)))))


def rows(inputs: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(3, inputs, generator=generator).double() for _ in range(2 * WINDOW)]


def images(rank: int = 0) -> list[Tensor]:
    return [x.reshape(3, 2, 5, 5 + rank) for x in rows(2 * 5 * (5 + rank))]


def measured(model: Any, batches: list[Tensor], **settings: Any) -> dict[str, Any]:
    """What global windows say of the first weight, and what the whole of it has at their close; and Corollary 1."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metrics = [Lipschitz(**settings), Trajectory()]
    found, expected, windows = [], [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Monitor(model, optimizer, metrics, window_steps=WINDOW, timeout=20) as monitor:
            for x in batches:
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
                if (window := monitor.global_window()) is not None:
                    windows.append(window)
                    found.append(dict(window[NAME].details["singular_values"]))
                    whole: Any = model.a.weight.full_tensor().detach()
                    twin = Image().double().a if isinstance(model, Image) else nn.Linear(*whole.T.shape).double()
                    twin.weight.data = whole
                    expected.append(asdict(singular_values(twin, x.shape)))  # type: ignore[arg-type]
            plan = [line.rule for line in monitor.plan().lines[NAME] if line.what == "sigma of W_1"]
    details = windows[-1][NAME].details
    bound = theory.lipschitz_bound(windows)
    largest = max(float(each["largest"]) for each in expected)
    return {
        "found": found,
        "expected": expected,
        "plan": plan,
        "off": details.get("normalized_gradient_norm_off", ""),
        "bound": [bound.bound.value, largest * bound.phi.value, bound.bound.label, bound.bound.note],
        "places": list(windows[-1][NAME].normalized_gradient_norm),
    }


def mesh_of(*sizes: int) -> Any:
    return init_device_mesh("cpu", sizes, mesh_dim_names=("one", "other")[: len(sizes)])


def fsdp2(rank: int, world: int) -> Any:
    return measured(fsdp(made(Small)), rows())


def more_inputs(rank: int, world: int) -> Any:
    """Few outputs, so that the weight itself is what has the fewest numbers."""
    return measured(fsdp(made(lambda: Small(40, 8))), rows(40))


def convolution(rank: int, world: int) -> Any:
    return measured(fsdp(made(Image)), images())


def images_of_other_shapes(rank: int, world: int) -> Any:
    return measured(fsdp(made(Image)), images(rank))


def too_many_inputs(rank: int, world: int) -> Any:
    return measured(fsdp(made(lambda: Small(520, 600))), rows(520))


def asked_for(rank: int, world: int) -> Any:
    return measured(fsdp(made(lambda: Small(520, 600))), rows(520), sigma=True)


def tensor_parallel(rank: int, world: int) -> Any:
    """Cut by outputs; nothing else can be measured there."""
    return measured(planned(made(Columns), mesh_of(world)), rows(), sigma=True)


def tensor_parallel_by_inputs(rank: int, world: int) -> Any:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    plan: Any = {"a": RowwiseParallel(input_layouts=Replicate())}
    return measured(parallelize_module(made(Small), mesh_of(world), plan), rows(), sigma=True)


def hsdp(rank: int, world: int) -> Any:
    return measured(fsdp(made(Small), mesh_of(2, world // 2)), rows())


def tensor_parallel_and_fsdp2(rank: int, world: int) -> Any:
    mesh = mesh_of(2, world // 2)
    return measured(fsdp(planned(made(Columns), mesh["other"]), mesh["one"]), rows(), sigma=True)


def by_inputs_and_fsdp2(rank: int, world: int) -> Any:
    """Cut along both dimensions: neither Gram matrix adds up."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    mesh = mesh_of(2, world // 2)
    plan: Any = {"a": RowwiseParallel(input_layouts=Replicate())}
    return measured(fsdp(parallelize_module(made(Small), mesh["other"], plan), mesh["one"]), rows(), sigma=True)


def other_settings(rank: int, world: int) -> Any:
    """One rank asks for what costs much."""
    return measured(fsdp(made(Small)), rows(), sigma=bool(rank))


def a_sequence(rank: int, world: int) -> Any:
    """Names of places are those of one process."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    from torch.distributed.fsdp import fully_shard

    for layer in (model[0], model[2], model):
        fully_shard(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Monitor(model, optimizer, [Lipschitz()], window_steps=1, timeout=20) as monitor:
            model(data_of([0])[0][0][0]).square().mean().backward()
            optimizer.step()
            window = monitor.global_window()
    assert window is not None
    details = window[NAME].details
    return {"place": list(window[NAME].normalized_gradient_norm), "layer": details["first_bias"]["layer"]}


def situations(ranks: int) -> Iterator[tuple[str, int, Callable[[int, int], Any]]]:
    """Name, ranks and work of each."""
    two = (fsdp2, more_inputs, convolution, images_of_other_shapes, too_many_inputs, asked_for, tensor_parallel,
           tensor_parallel_by_inputs, other_settings, a_sequence)  # fmt: skip
    for work in two if ranks == 2 else (hsdp, tensor_parallel_and_fsdp2, by_inputs_and_fsdp2):
        yield work.__name__, ranks, work
