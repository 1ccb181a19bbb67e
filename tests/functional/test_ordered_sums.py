"""Sums of the rows that belong together: the way of devices against that of the CPU."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest
import torch
from oracle import assert_close
from torch import Tensor

import lipcore
from lipcore.functional.ordered_sums import sum_by_index
from lipcore.models.device_index import DeviceIndices

INDICES = {
    "sorted": [0, 0, 1, 3, 3, 3],
    "mixed": [3, 0, 3, 1, 0, 3],
    "one": [2, 2, 2],
    "none": [],
}


@pytest.fixture
def not_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "is_cpu", property(lambda tensor: False), raising=False)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("case", INDICES)
def test_sums_by_index(not_on_the_cpu: None, case: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    index = torch.tensor(INDICES[case], dtype=torch.int64)
    rows = torch.randn(len(index), *shape, dtype=torch.float64)
    expected = torch.zeros(5, *shape, dtype=torch.float64).index_add_(0, index, rows)
    assert_close(sum_by_index(rows, index, 5), expected, eps=1e-15, k=1)


def test_values_that_are_not_finite_stay_in_their_own_sum(not_on_the_cpu: None) -> None:
    rows = torch.tensor([1.0, torch.inf, 2.0, torch.nan])
    found = sum_by_index(rows, torch.tensor([0, 2, 0, 1]), 4)
    assert_close(found, torch.tensor([3.0, torch.nan, torch.inf, 0.0]), eps=0.0, k=1)


@pytest.mark.parametrize("case", INDICES)
def test_runs_of_an_index_that_the_host_knows(case: str) -> None:
    order, offsets = DeviceIndices().runs(torch.device("cpu"), INDICES[case], 5)
    ordered = torch.tensor(INDICES[case], dtype=torch.int64)
    ordered = ordered if order is None else ordered[order]
    assert (order is None) == (case != "mixed")
    assert [ordered[a:b].unique().tolist() for a, b in itertools.pairwise(offsets)] == [
        [k] if k in INDICES[case] else [] for k in range(5)
    ]


#: Files with sums by index that are not made on a device, or are of integers.
ON_THE_HOST = {
    "functional/reference.py",
    "functional/ordered_sums.py",
    "functional/tensor_stats_rows.py",
    "tensor_stats/router.py",
    "layers/embedding_bag.py",
    "per_sample/noise/rank_noise.py",
}


def test_sums_of_floats_by_index_are_made_in_order() -> None:
    """index_add and its like add in any order on a GPU, put_ raises under torch.use_deterministic_algorithms()."""
    root = Path(lipcore.__file__).parent
    unordered = {"index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_reduce", "index_reduce", "put_"}
    found = {
        str(file.relative_to(root))
        for file in root.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in unordered
    }
    assert found == ON_THE_HOST
