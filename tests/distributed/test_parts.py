"""What ranks add to the window of all, added up in one process without any ranks: short rows of the tests that start
them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from lipcore import Monitor, PerSampleGradDots, Trajectory
from lipcore.distributed.ownership import Ownership, describe
from lipcore.distributed.packed import folded
from lipcore.metric import Metric
from lipcore.metric.rank_part import RankPart
from lipcore.metric.results import MetricResult


def parts_of(metrics: Sequence[Metric], train: Callable[[int, nn.Module], None]) -> list[Any]:
    """The parts of ranks that hold the same parameters, after `train(rank, model)`."""
    parts: list[Any] = []
    for rank, metric in enumerate(metrics):
        torch.manual_seed(0)
        model = nn.Linear(3, 2).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Monitor(model, optimizer, metrics=[metric], window_steps=9):
            train(rank, model)
            optimizer.step()
            parts.append(metric.rank_part())
    return parts


def together(parts: Sequence[RankPart]) -> MetricResult:
    """What all ranks read, from the one of rank 0."""
    ranks = tuple(range(len(parts)))
    told = [part.told for part in parts]
    for rank, part in enumerate(parts):
        assert part.holding is not None
        part.holding.turn_to(ranks)
        descriptions = [describe(part.holding._parameters())] * len(parts)
        part.holding.ownership = Ownership.of(descriptions, ranks, rank)
        part.hear(told)
        assert not part.refused()
    return parts[0].result(folded(lambda: [part.packed() for part in parts]))


def dots(seed: int) -> PerSampleGradDots:
    given = torch.Generator().manual_seed(seed)
    reference = {
        "weight": torch.randn(2, 3, generator=given).double(),
        "bias": torch.randn(2, generator=given).double(),
    }
    return PerSampleGradDots(reference=reference, loss_reduction="sum")


def test_products_of_all_samples() -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).double()
    found: list[float] = []
    metrics = [dots(0), dots(0)]

    def train(rank: int, model: nn.Module) -> None:
        model(x[:2] if rank == 0 else x[2:]).square().sum().backward()
        found.extend(metrics[rank].per_sample.tolist())

    result = together(parts_of(metrics, train))["dot"]["total"]
    assert result.mean.count == 5
    assert result.mean.value == pytest.approx(sum(found) / 5, rel=1e-12)
    assert (result.min.value, result.max.value) == (min(found), max(found))
    assert result.negative.value == pytest.approx(sum(dot < 0 for dot in found) / 5)


def test_products_with_other_references_are_refused() -> None:
    parts = parts_of([dots(0), dots(1)], lambda rank, model: model(torch.ones(2, 3).double()).sum().backward())
    for part in parts:
        part.holding.turn_to((0, 1))
        part.hear([part.told for part in parts])
        assert part.refused().startswith("reference: rank 1 has multiplied its samples with other references")


def bits_after(metric: PerSampleGradDots, calls: str) -> int:
    """Which references a window had, after (p)asses, optimizer (s)teps, window (r)esets, and (c)hanges to those of seed
    2."""
    model = nn.Linear(3, 2).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = {name: rows[0] for name, rows in dots(2)._references._rows.items()}
    with Monitor(model, optimizer, metrics=[metric], window_steps=9):
        does = {
            "p": lambda: model(torch.ones(2, 3).double()).sum().backward(),
            "s": optimizer.step,
            "r": metric.reset,
            "c": lambda: metric.set_reference(other),
        }
        for call in calls:
            does[call]()
        return metric.rank_part().told["reference"][1]  # type: ignore[union-attr]


def test_windows_have_the_references_that_were_used_in_them() -> None:
    for same in ("c", "psrc", "pscr", "pscrps", "psrcps"):
        assert bits_after(dots(0), same) == bits_after(dots(1), same), same
    for others in ("", "psc", "psrsc", "psrpc", "pcrs", "prc"):
        assert bits_after(dots(0), others) != bits_after(dots(1), others), others
    assert bits_after(dots(0), "psrc") != bits_after(dots(0), "psrpsc")


def sketched() -> Trajectory:
    return Trajectory(mode="sketch", buckets=256, stats=["update_norm", "weight_norm", "distance", "grad_norm"])


def test_sketches_of_what_all_ranks_hold_count_once() -> None:
    metrics = [sketched(), sketched()]

    def train(rank: int, model: nn.Module) -> None:
        model(torch.ones(2, 3).double()).square().sum().backward()

    result = together(parts_of(metrics, train))
    own = metrics[0].compute()
    assert sorted(result) == sorted(own) == ["distance", "grad_norm", "update_norm", "weight_norm"]
    for quantity in own:
        expected, found = own[quantity]["total"].last, result[quantity]["total"].last
        assert found.value == pytest.approx(expected.value, rel=1e-12)
        assert (found.label, found.error is None) == (expected.label, expected.error is None)
        assert (found.error or 0.0) == pytest.approx(expected.error or 0.0, rel=1e-12)


def test_sketches_that_number_elements_in_another_way_are_refused() -> None:
    model = nn.Linear(3, 2)
    metric = Trajectory(model, mode="sketch", buckets=256)
    state = metric.state_dict()
    with pytest.raises(ValueError, match="numbered: the state's sketches number the elements of parts in another way"):
        metric.load_state_dict({**state, "numbered": [1, 2]})
    metric.load_state_dict(state)
