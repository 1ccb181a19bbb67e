"""Rings of means: the quotient of two sums of a step, of each parameter, its group and all together."""

from __future__ import annotations

import torch

from lipcore.trajectory.mean_ring import MeanRing, quotients
from lipcore.trajectory.table import Table

RING = 4


def ring_of(steps: list[list[list[float]]]) -> tuple[Table, MeanRing]:
    """Return a ring of three parameters in two groups that has taken these steps, [parameters, 2] each."""
    table = Table([0, 0, 1], 2, RING, torch.device("cpu"))
    ring = MeanRing(table)
    for step in steps:
        ring.take(torch.tensor(step, dtype=torch.float64))
        table.cursor += 1
    return table, ring


def test_means_are_those_of_their_steps() -> None:
    steps = [[[k + 1.0, 1.0], [2.0 * k, 2.0], [4.0, k + 1.0]] for k in range(6)]
    table, ring = ring_of(steps)
    found = quotients(ring.recent, 2, 6, table)  # steps 0 and 1 were written over
    sums = torch.tensor(steps[2:], dtype=torch.float64)
    groups = torch.stack([sums[:, :2].sum(1), sums[:, 2], sums.sum(1)], dim=1)
    of_all = torch.cat([sums, groups], dim=1)
    torch.testing.assert_close(found, (of_all[..., 0] / of_all[..., 1]).sqrt(), rtol=1e-14, atol=0)


def test_a_step_that_was_not_taken_is_not_known() -> None:
    table, ring = ring_of([])
    assert torch.isnan(quotients(ring.recent, 0, 1, table)).all()


def test_what_is_not_known_of_a_parameter_is_not_in_its_group() -> None:
    nothing = float("nan")
    table, ring = ring_of([[[4.0, 1.0], [nothing, 5.0], [nothing, nothing]]])
    first, second, third, *groups, total = quotients(ring.recent, 0, 1, table)[0].tolist()
    assert (first, groups[0], total) == (2.0, 2.0, 2.0)
    assert all(one != one for one in (second, third, groups[1]))
