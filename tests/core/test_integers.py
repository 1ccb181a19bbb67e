"""Ids, offsets and enumerators at the core's boundary: int64 tensors are what they are, numbers are checked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lipcore import _core


def embedding_norms(ids: object, offsets: Tensor | None = None) -> Tensor:
    packed = offsets is not None
    out = torch.zeros(2, dtype=torch.float64)
    _core.embedding_norms(ids, None, torch.ones(1, 4, 3) if packed else torch.ones(2, 2, 3), None, None, offsets, out)
    return out


def test_ids_and_offsets_are_int64() -> None:
    assert embedding_norms(torch.tensor([[1, 1], [0, 2]])).tolist() == [12, 6]
    assert embedding_norms(torch.tensor([[1, 1, 0, 2]]), torch.tensor([0, 2, 4])).tolist() == [12, 6]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_ids_of_a_floating_type_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"^indices: expected an int64 tensor, got {str(dtype)[6:]}; pass tensor.long"):
        embedding_norms(torch.ones(2, 2, dtype=dtype))
    with pytest.raises(TypeError, match=r"^offsets: expected an int64 tensor"):
        embedding_norms(torch.ones(1, 4, dtype=torch.int64), torch.tensor([0, 2, 4]).to(dtype))


def test_ids_with_gaps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^indices: is read as one run of memory; pass a contiguous"):
        embedding_norms(torch.ones(2, 4, dtype=torch.int64)[:, ::2])


def test_offsets_are_checked_by_the_core() -> None:
    out, x = torch.zeros(2, dtype=torch.float64), torch.ones(4, 3)
    for offsets in ([0, 2, 5], [1, 2, 4], [0, 5, 4]):
        with pytest.raises(ValueError, match=r"^offsets: expected"):
            _core.linear_norms(x, x, torch.tensor(offsets), 0, out)


@pytest.mark.parametrize("number", [-1, 4])
def test_enumerators_are_checked(number: int) -> None:
    x, out = torch.ones(2, 4, 3), torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"^method: expected one of 0 to 3, got {number}"):
        _core.linear_norms(x, x, None, number, out)
    with pytest.raises(ValueError, match=r"^method: redoes what was made on a CUDA device"):
        _core.linear_norms(x, x, None, 3, out)
    with pytest.raises(ValueError, match=rf"^terms: expected one of 0 to 2, got {number}"):
        _core.row_sum_norms(x, x, None, number, out)
