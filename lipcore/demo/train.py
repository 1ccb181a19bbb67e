"""All runs of the demo, over a few processes, under a progress bar."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lipcore.demo.runs import Run, TaskResult, train
from lipcore.demo.tasks import Task

_MOST_WORKERS = 4  # each costs an import of torch, which more of them would not win back
_epochs_done: Any = None  # in a worker: per task, shared with the process that shows the progress


def train_all(tasks: Sequence[Task], records: Path) -> list[TaskResult]:
    """Train every task at every level and seed, and record the first seed of each in a folder of `records`; the numbers
    do not depend on how many processes share the work."""
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    epochs_done = context.Array("q", len(tasks))
    jobs = [(i, level, seed) for i, task in enumerate(tasks) for level in task.levels for seed in task.seed_numbers]
    workers = min(_available_cores(), len(jobs), _MOST_WORKERS)
    with _pool(ProcessPoolExecutor(workers, context, _begin, (epochs_done,))) as pool:
        with _interrupts_ignored():  # which workers inherit: Ctrl-C is for this process alone, and it ends them
            futures = [
                pool.submit(_work, tasks[i], i, level, seed, _record(records, tasks[i], level, seed))
                for i, level, seed in jobs
            ]
        _show_progress(futures, tasks, epochs_done)
        runs = [future.result() for future in futures]
    return [
        TaskResult(task, [run for (j, _, _), run in zip(jobs, runs, strict=True) if j == i])
        for i, task in enumerate(tasks)
    ]


def _show_progress(futures: list[Future[Run]], tasks: Sequence[Task], epochs_done: Any) -> None:
    """Show the progress until all runs are done, or one has failed."""
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(TextColumn("epochs"), TimeElapsedColumn()),
    )
    with Progress(*columns) as progress:
        bars = [progress.add_task(task.title, total=task.epochs * len(task.levels) * task.seeds) for task in tasks]
        pending: set[Future[Run]] = set(futures)
        while pending:
            finished, pending = wait(pending, timeout=0.2)
            for bar, epochs in zip(bars, epochs_done, strict=True):
                progress.update(bar, completed=epochs)
            if any(future.exception() is not None for future in finished):
                return


def _begin(epochs_done: Any) -> None:
    global _epochs_done
    _epochs_done = epochs_done
    torch.set_num_threads(1)  # these networks are too small to be worth a second one


def _record(records: Path, task: Task, level: float, seed: int) -> Path | None:
    return records / f"{task.name}-{level:g}" if seed == task.seed_numbers[0] else None


def _work(task: Task, index: int, level: float, seed: int, record: Path | None) -> Run:
    def after_epoch() -> None:
        with _epochs_done.get_lock():
            _epochs_done[index] += 1

    return train(task, level, seed, after_epoch, record)


@contextmanager
def _pool(pool: ProcessPoolExecutor) -> Iterator[ProcessPoolExecutor]:
    """Make a pool of workers that ends at once when the block is left by an exception; shutdown() alone would wait for
    their runs."""
    others = set(multiprocessing.active_children())
    try:
        yield pool
    except BaseException:
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
