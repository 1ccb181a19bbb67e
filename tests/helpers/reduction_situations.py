"""Situations of several ranks in when, by which rule and over whom their gradients are reduced, each beside one float64
process that computes the gradient of every sample by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from pipeline import STAGES, run_stage, stage_of
from rank_situations import STEPS, WINDOW, data_of, fsdp, made
from sample_situations import DDP, NAME, Truth, compared, mean_loss, merged, monitored, quiet
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lipcore import PerSampleGradNorms

#: Sets up a model before a micro-batch, which is the last one of its step or not.
Setting = Callable[[Any, bool], Any]


def accumulated(model: Any, rank: int, world: int, setting: Setting, dtype: torch.dtype = torch.float64) -> Any:
    """Two micro-batches per step."""
    batches = data_of(range(world))
    optimizer, monitor = monitored(model, scale=0.5, window_steps=WINDOW // 2)
    found = []
    with monitor:
        for step in range(STEPS // 2):
            optimizer.zero_grad()
            for part in range(2):
                x, y = (each.to(dtype) for each in batches[rank][2 * step + part])
                setting(model, part == 1)
                (0.5 * mean_loss(model(x), y)).backward()
            optimizer.step()
            if (window := monitor.global_window()) is not None:
                found.append(window)
    return compared(found, Truth(made(), micro=2).windows(batches))


def always(model: Any, last: bool) -> None:
    """Each micro-batch is reduced."""


def synced(model: Any, last: bool) -> None:
    model.set_requires_gradient_sync(last)


def at_once(**settings: Any) -> Any:
    """The model as one, which fully_shard() keeps gathered between forward and backward pass."""
    from torch.distributed.fsdp import fully_shard

    return fully_shard(made(), **settings)


def sharded(model: nn.Module, **settings: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for layer in (model.a, model.b, model):
        fully_shard(layer, **settings)
    return model


def at_once_reduced(rank: int, world: int) -> Any:
    return accumulated(at_once(), rank, world, always)


def at_once_synced(rank: int, world: int) -> Any:
    return accumulated(at_once(), rank, world, synced)


def kept_gathered(rank: int, world: int) -> Any:
    return accumulated(sharded(made(), reshard_after_forward=False), rank, world, always)


def kept_by_backward(rank: int, world: int) -> Any:
    def setting(model: Any, last: bool) -> None:
        model.set_reshard_after_backward(last)

    return accumulated(sharded(made()), rank, world, setting)


def in_another_dtype(rank: int, world: int) -> Any:
    """Gradients that wait to be reduced are kept in the dtype that they are reduced in, beside the parameters."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(reduce_dtype=torch.float64)
    model = sharded(made().float(), mp_policy=policy)
    return accumulated(model, rank, world, synced, torch.float32)


def within_replicas(rank: int, world: int) -> Any:
    """Gradients of the first micro-batch are reduced within one replica alone."""

    def setting(model: Any, last: bool) -> None:
        model.set_requires_all_reduce(last)

    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards"))
    return accumulated(fsdp(made(), mesh), rank, world, setting)


def cut_again(rank: int, world: int) -> Any:
    """Between forward and backward pass the parameters lie on two of the four ranks."""
    return accumulated(sharded(made(), reshard_after_forward=2), rank, world, always)


def left_out(
    model: Any,
    rank: int,
    world: int,
    before: Callable[[Any, int], Any] = lambda *_: None,
    windows: int = 1,
    empties: Callable[[int], bool] = lambda _: True,
) -> dict[str, Any]:
    """What windows say of steps that were left out of the noise scale.

    Args:
        before: called with model and step before each forward pass, behind zero_grad().
        empties: whether a step begins with that.
    """
    optimizer, monitor = monitored(model)
    found = []
    with monitor:
        for step, (x, y) in enumerate(data_of(range(world))[rank][: windows * WINDOW]):
            if empties(step):
                optimizer.zero_grad()
            before(model, step)
            mean_loss(model(x), y).backward()
            optimizer.step()
            if (window := monitor.global_window()) is not None:
                found.append(window)
    noise = [window[NAME].noise_scale["total"].mean for window in found]
    return {
        "said": [window[NAME].details["noise_scale_skipped"] for window in found],
        "counts": [int(each.count) for each in noise],
        "norms": [window[NAME].norm["total"].mean.valid for window in found],
    }


def never_synced(rank: int, world: int) -> Any:
    """The last two steps of the window reduce nothing: their gradients wait. The first of the next one has them too."""

    def before(model: Any, step: int) -> None:
        model.set_requires_gradient_sync(step not in (2, 3))

    return left_out(sharded(made()), rank, world, before, windows=2)


def half_synced(rank: int, world: int) -> Any:
    """Only the first of the two backward passes of each step is reduced."""
    model = sharded(made())

    def before(model: Any, step: int) -> None:
        model.set_requires_gradient_sync(True)
        x, y = data_of(range(world))[rank][step]
        mean_loss(model(x), y).backward()
        model.set_requires_gradient_sync(False)

    return left_out(model, rank, world, before)


def not_emptied(rank: int, world: int) -> Any:
    """Every second step begins with the gradients of the one before, beside parameters that are gathered."""
    return left_out(at_once(), rank, world, empties=lambda step: step % 2 == 0)


def late_hook(rank: int, world: int) -> Any:
    """In the second window a communication hook adds gradients up, and takes no mean."""

    def added(_: Any, bucket: Any) -> Any:
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])

    added.__annotations__.clear()  # torch knows no names of types

    def before(model: Any, step: int) -> None:
        if step == WINDOW + 1:
            model.register_comm_hook(None, added)

    return left_out(DDP(made()), rank, world, before, windows=2)


def late_divisor(rank: int, world: int) -> Any:
    """A step of the second window has another divisor, and the next one again none."""

    def before(model: Any, step: int) -> None:
        for layer in (model.a, model.b, model):
            layer.set_gradient_divide_factor(1.0 if step == WINDOW + 1 else None)

    return left_out(fsdp(made()), rank, world, before, windows=2)


def hook_on_one_rank(rank: int, world: int) -> Any:
    """Rank 1 alone has a communication hook, which does as DDP does."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    model = DDP(made())
    if rank == 1:
        model.register_comm_hook(None, allreduce_hook)
    return norms_of(merged(model, data_of(range(world))[rank]), Truth(made()).windows(data_of(range(world))))


def stages_of_replicas(rank: int, world: int) -> Any:
    """Two stages of a pipeline, each with its gradient averaged over two ranks of its own."""
    halves = [list(range(world // 2)), list(range(world // 2, world))]
    groups = [dist.new_group(half) for half in halves]
    number, replica = divmod(rank, world // 2)
    stage = DDP(stage_of(made(), number), process_group=groups[number])
    peer = halves[1 - number][replica]
    batches = data_of(halves[0])
    optimizer, monitor = monitored(stage, prefix=f"stages.{number}")
    found = []
    with monitor:
        for x, y in batches[replica]:
            optimizer.zero_grad()
            run_stage(stage, number, x, y, peer)
            optimizer.step()
            if (window := monitor.global_window()) is not None:
                found.append(window)
    expected = []
    for numbers in Truth(made()).windows(batches):
        split = {key.rpartition("/"): value for key, value in numbers.items()}
        expected.append({f"{key}/{STAGES[place]}": v for (key, _, place), v in split.items() if place in STAGES})
    return norms_of(found, expected)


def norms_of(windows: Sequence[Any], expected: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The errors of norms, and why there is no noise scale."""
    norms = [{key: value for key, value in each.items() if "/norm." in key} for each in expected]
    assert all("noise_scale" not in window[NAME] for window in windows)
    return compared(windows, norms) | {"said": windows[-1][NAME].details["noise_scale_off"]}


class Heads(nn.Module):
    """Two heads, of which a pass uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.head = "c"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = getattr(self, self.head)(torch.tanh(self.a(x)))
        return found


def old_gradients(rank: int, world: int) -> dict[str, Any]:
    """A head has a gradient of before, and none in the first pass that is recorded: the errors of its norms."""
    from torch.distributed.fsdp import fully_shard

    x, found = data_of(range(world))[rank][0][0], {}
    whole = made(Heads)
    whole.head, squares = "b", []
    for i in range(len(x)):
        whole.zero_grad()
        whole(x[i : i + 1]).square().mean().backward()
        squares.append(sum(p.grad.square().sum() for p in whole.parameters() if p.grad is not None))
    for keeps in (None, True, False):
        for before in ("old", "zeros"):
            model = fully_shard(made(Heads), reshard_after_forward=keeps)
            model(x).square().mean().backward()
            if before == "zeros":
                model.zero_grad(set_to_none=False)
            model.head = "b"
            with PerSampleGradNorms(model, loss_reduction="mean") as norms:
                model(x).square().mean().backward()
                error = (norms.per_sample - torch.stack(squares).sqrt()).abs().max()
            found[f"{before} {keeps}"] = float(error)
    return found


def situations(ranks: int) -> Iterator[tuple[str, int, Callable[[int, int], Any]]]:
    """Name, ranks and work of each that needs so many."""
    two = (at_once_reduced, at_once_synced, kept_gathered, kept_by_backward, in_another_dtype, never_synced,
           half_synced, not_emptied, late_hook, late_divisor,
           hook_on_one_rank, old_gradients)  # fmt: skip
    for work in two if ranks == 2 else (within_replicas, cut_again, stages_of_replicas):
        yield work.__name__, ranks, quiet(work)
