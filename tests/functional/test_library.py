"""The operations inside compiled graphs: torch.ops.lipcore.* pass torch's own checks, and functional ops trace into
them."""

from __future__ import annotations

import pytest
import torch

from lipcore import functional
from lipcore.functional import reference

INPUTS = {
    "sample_norms": (torch.linspace(-1, 1, 12).reshape(3, 4),),
    "normalized_norms": (torch.linspace(-1, 1, 12).reshape(3, 4), torch.tensor([0.5, 0.0, 2.0])),
}


@pytest.mark.parametrize("name", INPUTS)
def test_opcheck(name: str) -> None:
    inputs = tuple(x.abs() + 1 for x in INPUTS[name])  # opcheck calls NaN a difference
    torch.library.opcheck(getattr(torch.ops.lipcore, name).default, inputs)


@pytest.mark.parametrize("name", INPUTS)
def test_functional_ops_trace_without_a_graph_break(name: str) -> None:
    function = torch.compile(getattr(functional, name), fullgraph=True, backend="aot_eager")
    inputs = tuple(x.clone().requires_grad_() for x in INPUTS[name])
    torch.testing.assert_close(function(*inputs), getattr(reference, name)(*inputs), rtol=1e-12, atol=0, equal_nan=True)
