"""All runs of the demo, over a few processes, under a progress bar."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lipcore.demo.runs import Run, TaskResult, train
from lipcore.demo.tasks import Task

_MOST_WORKERS = 4  # each starts by importing torch; the runs of the default demo keep no more of them busy
_shared: Any = None  # in a worker: (epochs done per task, whether to stop)


class _StopError(Exception):
    """Raised in a worker whose result nobody wants any more."""


def train_all(tasks: Sequence[Task]) -> list[TaskResult]:
    """Every task at every level and seed; the numbers do not depend on how many processes share the work."""
    # Spawned, as torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    done, stop = context.Array("q", len(tasks)), context.Event()
    jobs = [(i, level, seed) for i, task in enumerate(tasks) for level in task.levels for seed in task.seed_numbers]
    workers = min(_available_cores(), len(jobs), _MOST_WORKERS)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=((done, stop),))
    try:
        with _uninterrupted():  # workers inherit it: Ctrl-C is for this process, which tells them to stop
            futures = [pool.submit(_work, tasks[i], i, level, seed) for i, level, seed in jobs]
        _follow(futures, tasks, done)
        runs = [future.result() for future in futures]
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    return [
        TaskResult(task, [run for (j, _, _), run in zip(jobs, runs, strict=True) if j == i])
        for i, task in enumerate(tasks)
    ]


def _follow(futures: list[Future[Run]], tasks: Sequence[Task], done: Any) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as progress:
        bars = [progress.add_task(task.title, total=task.epochs * len(task.levels) * task.seeds) for task in tasks]
        pending: set[Future[Run]] = set(futures)
        while pending:
            finished, pending = wait(pending, timeout=0.2)
            for bar, epochs in zip(bars, done, strict=True):
                progress.update(bar, completed=epochs)
            if any(future.exception() is not None for future in finished):
                return


def _begin(shared: Any) -> None:
    global _shared
    _shared = shared
    torch.set_num_threads(1)  # these networks are too small to be worth a second one


def _work(task: Task, index: int, level: float, seed: int) -> Run:
    done, stop = _shared

    def after_epoch() -> None:
        if stop.is_set():
            raise _StopError
        with done.get_lock():
            done[index] += 1

    return train(task, level, seed, after_epoch)


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _uninterrupted() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
