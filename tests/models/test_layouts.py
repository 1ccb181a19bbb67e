"""Copies with the layout of another tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lipcore.models.layouts import laid_out_like

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(1, 2),
    "time first in memory": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "features cut off": lambda x: x[..., :3],
    "every second step": lambda x: x[:, ::2],
    "every second sample": lambda x: x[::2],
    "expanded": lambda x: x[:, :1].expand(-1, 4, -1),
    "columns of a large table": lambda x: x.new_ones(4, 6, 10_000)[..., 70:75],
    "unfolded": lambda x: x[..., 0].unfold(1, 3, 1),
    "channels last": lambda x: x[..., None].contiguous(memory_format=torch.channels_last)[..., 0],
}


@pytest.mark.parametrize("name", VIEWS)
def test_more_rows_are_laid_out_alike(name: str) -> None:
    view = VIEWS[name](torch.randn(4, 6, 5))
    more = torch.cat([view, view[-1:]])
    found = laid_out_like(more, view)
    assert torch.equal(found, more)
    assert found.untyped_storage().nbytes() <= 8 * more.numel() * more.element_size()
    assert found.is_contiguous() == view.is_contiguous()
    if name != "unfolded":
        order = [sorted(range(3), key=lambda d: (x.stride(d), x.shape[d])) for x in (found, view)]
        assert order[0] == order[1]
        assert [s == 0 for s in found.stride()] == [s == 0 for s in view.stride()]
