"""Steps whose sums were made elsewhere, taken into a ledger on a device: as on the CPU, whatever the number of
tensors."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import assert_close, same_bits

from lipcore import _core


@pytest.mark.gpu
@pytest.mark.parametrize(("tensors", "groups"), [(1, 1), (6, 3), (40, 37), (300, 9), (2, 300), (170, 120)])
def test_steps_of_sums(tensors: int, groups: int) -> None:
    """The first ones are taken in by one block, the last by several launches."""
    torch.manual_seed(0)
    ledgers, tables = [], []
    for device in ("cpu", "cuda"):
        rows = torch.zeros(tensors + groups + 1, _core.LEDGER_COLUMNS, dtype=torch.float64)
        rows[:tensors, -1] = torch.arange(tensors) * 7 % groups
        recent = torch.zeros(3, len(rows), 2, dtype=torch.float64)
        tables.append([tensor.to(device) for tensor in (rows, recent, torch.zeros(2, dtype=torch.float64))])
        ledgers.append(_core.Ledger(*tables[-1], tensors))
    for step in range(5):
        sums = torch.rand(tensors, _core.STEP_COLUMNS, dtype=torch.float64)
        sums[:, 4] = 0
        if step % 2:
            sums[step % tensors, :4], sums[step % tensors, 4] = math.nan, 3
        for ledger, device in zip(ledgers, ("cpu", "cuda"), strict=True):
            ledger.observe(sums.to(device))
        (rows, recent, cursor), (there, recent_there, cursor_there) = tables
        assert float(cursor[0]) == float(cursor_there[0]) == step + 1
        assert_close(there, rows, eps=1e-13, k=1)
        assert_close(recent_there, recent, eps=1e-13, k=1)
        assert same_bits(there[:tensors].cpu(), rows[:tensors])
