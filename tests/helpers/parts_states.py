"""Situations of ranks that hold parts of the parameters (tensor parallelism) in which something goes wrong, or goes on:
what becomes of scores, of windows that wait, of copies and states."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from parts_situations import Heads
from rank_situations import WINDOW, Columns, data_of, made, planned
from sample_situations import DDP, NAME, mean_loss, monitored, quiet
from torch.distributed.device_mesh import init_device_mesh

from lipcore import Monitor, PerSampleGradNorms
from lipcore.distributed.rank_axis import Place
from lipcore.metric.rank_states import RankStates


def tensor_parallel(world: int, kind: Any = Columns) -> Any:
    return planned(made(kind), init_device_mesh("cpu", (world,)))


def steps(
    model: Any, optimizer: Any, numbers: range, metric: Any = None, ids: Callable[[int], Any] | None = None
) -> None:
    """Train steps of these numbers, the samples of each named by its own ids."""
    data = data_of([0])[0]
    for step in numbers:
        x, y = data[step % len(data)]
        if metric is not None:
            metric.set_ids([10 * step + i for i in range(len(x))] if ids is None else ids(step))
        optimizer.zero_grad()
        mean_loss(model(x), y).backward()
        if isinstance(model, Heads):
            torch.distributed.all_reduce(model.norm.weight.grad)
        optimizer.step()


def ids_of(metric: Any) -> list[int]:
    found: list[int] = metric.sync_scores().to_numpy()["ids"].tolist()
    return found


def refused(ask: Callable[[], Any]) -> str:
    """Why something is refused."""
    try:
        ask()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def other_ids_once(rank: int, world: int) -> dict[str, Any]:
    """Ranks name the samples of step 0 otherwise; the samples of later steps have scores."""
    model, metric = tensor_parallel(world), PerSampleGradNorms(loss_reduction="mean")
    optimizer, monitor = monitored(model, metrics=[metric])
    with monitor:
        steps(model, optimizer, range(1), metric, lambda step: [rank, 1 + rank, 2 + rank])
        said = refused(metric.sync_scores)
        steps(model, optimizer, range(1, 3), metric)
        return {"said": said, "ids": ids_of(metric)}


def squares_that_do_not_add_up(rank: int, world: int) -> dict[str, Any]:
    model, metric = tensor_parallel(world, partial(Heads, bent=True)), PerSampleGradNorms(loss_reduction="mean")
    optimizer, monitor = monitored(model, metrics=[metric])
    with monitor:
        steps(model, optimizer, range(WINDOW), metric)
        monitor.global_window()
        return {"ids": metric.scores.to_numpy()["ids"].tolist() + ids_of(metric)}


def frozen(rank: int, world: int) -> dict[str, Any]:
    """A layer is frozen in the first window, which no rank has merged yet."""
    model, metric = tensor_parallel(world), PerSampleGradNorms(loss_reduction="mean")
    optimizer, monitor = monitored(model, metrics=[metric])
    with monitor:
        steps(model, optimizer, range(2), metric)
        model.c.requires_grad_(False)
        monitor.rebind()
        window = monitor.global_window()
        steps(model, optimizer, range(2, 2 + WINDOW), metric)
        later = monitor.global_window()
        assert window is not None
        assert later is not None
        places = [sorted(each[NAME].norm) for each in (window, later)]
        return {"steps": [window.first_step, window.last_step], "places": places, "ids": len(ids_of(metric))}


def proof_fails_within(rank: int, world: int) -> dict[str, Any]:
    """A proof that fails on all ranks takes back the first steps of a window, which then goes on."""
    found = {}
    for name, model in (("ddp", DDP(made(Columns))), ("parts", tensor_parallel(world))):
        metric = PerSampleGradNorms(loss_reduction="mean")
        optimizer, monitor = monitored(model, metrics=[metric])
        with monitor:
            steps(model, optimizer, range(2))
            metric._window.unproved.tapped = True
            metric.observe_proof("a test", served=False)
            steps(model, optimizer, range(2, WINDOW))
            window = monitor.global_window()
        assert window is not None
        found[name] = [window[NAME].details["noise_scale_skipped"], window[NAME].norm["total"].missing.value]
    return found


def copied(rank: int, world: int) -> dict[str, Any]:
    """Copies know that their norms are those of parts."""
    model, metric, found = tensor_parallel(world), PerSampleGradNorms(loss_reduction="mean"), dict[str, Any]()
    optimizer, monitor = monitored(model, metrics=[metric])
    with monitor:
        steps(model, optimizer, range(2), metric)
        ids_of(metric)
        for make in (copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))):
            again, other = make(metric), make(metric)
            assert "in_parts" in again.finalize().details
            assert again.sync_scores().to_numpy()["count"].tolist() == [1] * 6
            for name, ask in (("merge", lambda: again.merge(other)), ("sync_norms", again.sync_norms)):
                found[name] = refused(ask)
        pickle.loads(pickle.dumps(monitor))
    return found


def other_blocks(rank: int, world: int) -> dict[str, Any]:
    """A metric goes on in a Monitor whose windows have other blocks."""
    model, metric = tensor_parallel(world), PerSampleGradNorms(loss_reduction="mean")
    optimizer, monitor = monitored(model, metrics=[metric])
    with monitor:
        steps(model, optimizer, range(WINDOW))
    metric_alone = PerSampleGradNorms(loss_reduction="mean")
    found = []
    for each in (metric, metric_alone):
        twin = tensor_parallel(world)
        optimizer, monitor = monitored(twin, metrics=[each], window_blocks=2)
        with monitor:
            steps(twin, optimizer, range(2 * WINDOW))
            window = monitor.global_window()
        assert window is not None
        found.append(window[NAME].norm["total"].mean.value)
    return {"norms": found}


def waits_in_a_state(rank: int, world: int) -> dict[str, Any]:
    """What no rank has added up of closed windows is in a state."""
    model, metric = tensor_parallel(world), PerSampleGradNorms(loss_reduction="mean")
    optimizer, monitor = monitored(model, metrics=[metric])
    with monitor:
        steps(model, optimizer, range(WINDOW + 1), metric)
        state = monitor.state_dict()
    metric = PerSampleGradNorms(loss_reduction="mean")
    monitor = Monitor(model, optimizer, metrics=[metric], window_steps=WINDOW, timeout=20)
    with monitor:
        monitor.load_state_dict(state)
        steps(model, optimizer, range(WINDOW + 1, 2 * WINDOW), metric)
        return {"ids": len(ids_of(metric))}


def from_one_process(rank: int, world: int) -> dict[str, Any]:
    """Scores of one process go on where ranks hold parts."""
    alone, metric = made(Columns), PerSampleGradNorms(loss_reduction="mean")
    optimizer, monitor = monitored(alone, metrics=[metric], group=None)
    with monitor:
        steps(alone, optimizer, range(WINDOW), metric)
        _, state = metric.split_state(metric.state_dict(), Place(0, 1, (0,)))
    metric_of_parts = PerSampleGradNorms(loss_reduction="mean")
    model = tensor_parallel(world)
    optimizer, monitor = monitored(model, metrics=[metric_of_parts])
    with monitor:
        place, saved = Place(rank, world, tuple(range(world))), {0: state} if rank == 0 else {}
        metric_of_parts.load_ranks(RankStates(place, 1, metric.empty_state(state), {}, saved))
        steps(model, optimizer, range(WINDOW, WINDOW + 2), metric_of_parts)
        return {"ids": len(ids_of(metric_of_parts))}


def situations(ranks: int) -> Iterator[tuple[str, int, Callable[[int, int], Any]]]:
    """Name, ranks and work of each."""
    for work in (other_ids_once, squares_that_do_not_add_up, frozen, proof_fails_within, copied, other_blocks,
                 waits_in_a_state, from_one_process):  # fmt: skip
        yield work.__name__, ranks, quiet(work)
