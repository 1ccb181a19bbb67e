"""The list of forward passes under way in all threads: it keeps none of them."""

from __future__ import annotations

import gc
import weakref

import torch

from lipcore.capture.self_calls import OtherThreads


class Run:
    """A forward pass."""


def test_passes_that_never_end_are_forgotten() -> None:
    threads = OtherThreads[Run]()
    for _ in range(5):
        run = Run()
        threads.begin(run)
        for inner in range(3):
            ended = Run()
            threads.begin(ended)
            assert threads.end(ended, torch.ones(2)) == [], inner
    left = weakref.ref(run)
    del run, ended
    gc.collect()
    assert left() is None
    last = Run()
    threads.begin(last)
    assert len(threads._within) == 1


def test_a_pass_with_the_id_of_one_that_never_ended_has_called_nothing() -> None:
    threads, seen = OtherThreads[Run](), set()
    made = torch.ones(2, requires_grad=True) * 2
    for _ in range(100):
        run = Run()
        again = id(run) in seen
        seen.add(id(run))
        threads.begin(run)
        if again:
            assert threads.end(run, made * 2) == []
            return
        inner = Run()
        threads.begin(inner)
        threads.end(inner, made)
        del run, inner
    raise AssertionError("no id came twice")
