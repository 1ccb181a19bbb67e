"""Instruction sets and numbers of threads, each of which can be forced."""

from __future__ import annotations

import contextlib

import torch
from oracle import same_bits

from lipcore import _core


def supported_isas() -> list[str]:
    """The instruction sets that this CPU and this build offer, slowest first."""
    before, found = _core.isa(), []
    for name in ("base", "avx2", "avx512"):
        try:
            _core.use_isa(name)
        except ValueError:
            continue
        found.append(name)
    _core.use_isa(before)
    return found


ISAS = supported_isas()

WAYS = [(isa, threads) for isa in ISAS for threads in (1, 2)]


@contextlib.contextmanager
def forced(isa, threads):
    before = _core.isa(), torch.get_num_threads()
    _core.use_isa(isa)
    torch.set_num_threads(threads)
    assert _core.pool_size() == threads
    try:
        yield
    finally:
        _core.use_isa(before[0])
        torch.set_num_threads(before[1])


def assert_same_in_all_ways(compute):
    """compute() -> list of tensors."""
    results = {}
    for way in WAYS:
        with forced(*way):
            results[way] = compute()
    first = results[WAYS[0]]
    assert len(WAYS) >= 2
    for way, result in results.items():
        for i, (a, b) in enumerate(zip(first, result, strict=True)):
            assert same_bits(a, b), f"result {i} of {way} differs from that of {WAYS[0]}"
