"""Samples that are rows of a sparse tensor (bags of words)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from few import few
from torch import Tensor, nn
from torch.nn import functional as F

from lipcore import PerSampleGradNorms
from lipcore.models.sparse_rows import bytes_of, rows_at

B, WORDS, C = 5, 8, 3
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": Tensor.to_sparse_coo,
    "csr": Tensor.to_sparse_csr,
    "csc": Tensor.to_sparse_csc,
    "bsr": lambda x: x.to_sparse_bsr((1, 2)),
}


class Words(nn.Module):
    def __init__(self, call: Callable[[Words, Tensor], Tensor]) -> None:
        super().__init__()
        self.call, self.weight, self.head = call, nn.Parameter(torch.randn(WORDS, 4)), nn.Linear(4, C)
        self.layer = nn.Linear(WORDS, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.call(self, x).tanh())
        return y


CALLS: dict[str, Callable[[Words, Tensor], Tensor]] = {
    "mm": lambda model, x: torch.sparse.mm(x, model.weight),
    "layer": lambda model, x: model.layer(x),
    "@": lambda model, x: x @ model.weight,
    "dense": lambda model, x: x.to_dense() @ model.weight,
}
CASES = [(call, layout) for layout in ("coo", "csr") for call in CALLS]


@pytest.mark.parametrize("case", few(CASES, 3), ids="-".join)
def test_norms(case: tuple[str, str]) -> None:
    call, layout = case
    torch.manual_seed(0)
    model, labels = Words(CALLS[call]), torch.randint(C, (B,))
    x = torch.randn(B, WORDS) * (torch.rand(B, WORDS) > 0.5)
    with PerSampleGradNorms(model, loss_reduction="mean") as norms:
        for _ in range(2):
            F.cross_entropy(model(LAYOUTS[layout](x)), labels).backward()
        assert not norms.unproved
        found = norms.per_sample
    for i in range(B):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1].to_sparse_coo()), labels[i : i + 1]).backward()
        square = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
        assert float(found[i]) == pytest.approx(square**0.5, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_any_layout(layout: str) -> None:
    x = torch.randn(4, 6)
    sparse, places = LAYOUTS[layout](x), torch.tensor([2, 2, 0])
    found = rows_at(sparse, 0, places)
    assert found.layout is sparse.layout
    assert torch.equal(found.to_dense(), x[places])
    assert bytes_of(sparse) == bytes_of(sparse.to_sparse_coo()) == x.numel() * (4 + 16)
    assert bytes_of(x) == x.nbytes
