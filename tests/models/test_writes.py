"""Writes into tensors during a pass of lipcore's own: seen, put back, and never refused by a graph of the user's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lipcore import local_lipschitz
from lipcore.models.held import Held
from lipcore.models.restored import RandomPass, all_put_back
from lipcore.models.writes import writes_put_back

WRITES: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda w: w.mul_(2),
    "through data": lambda w: w.data.mul_(2),
    "through a view": lambda w: w.view(-1)[1:3].zero_(),
    "out=": lambda w: torch.mul(w, 2, out=w),
    "foreach": lambda w: torch._foreach_add_([w], 1.0),
    "renormalised rows": lambda w: torch.embedding_renorm_(w, torch.tensor([1]), 0.1, 2.0),
    "exchanged": lambda w: setattr(w, "data", torch.zeros(2)),
    "exchanged, then written": lambda w: (setattr(w, "data", w.data.clone()), w.data.mul_(2)),
    "written, then exchanged": lambda w: (w.mul_(2), setattr(w, "data", torch.zeros(3, 4))),
    "transposed": lambda w: w.t_(),
    "functorch": lambda w: torch.vmap(lambda row: row.mul_(2))(w),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_is_put_back_with_its_version(name: str) -> None:
    weight = nn.Parameter(torch.arange(12.0).reshape(3, 4))
    before, version, place = weight.detach().clone(), weight._version, weight.data_ptr()
    loss = weight.square().sum()  # the graph keeps it
    with writes_put_back([weight]), torch.no_grad():
        WRITES[name](weight)
        assert weight.shape != before.shape or not torch.equal(weight, before)
    assert torch.equal(weight, before)
    assert (weight._version, weight.data_ptr()) == (version, place)
    loss.backward()
    assert torch.equal(weight.grad, 2 * before)  # type: ignore[arg-type]


def test_all_tensors_of_one_storage_are_put_back() -> None:
    flat = torch.arange(6.0)
    one, other = nn.Parameter(flat[:3]), nn.Parameter(flat[3:])
    with writes_put_back([one, other]), torch.no_grad():
        flat.mul_(2)
    assert torch.equal(flat, torch.arange(6.0))


def test_after_an_error_too() -> None:
    weight = nn.Parameter(torch.ones(3))
    with pytest.raises(KeyError), writes_put_back([weight]), torch.no_grad():
        weight.zero_()
        raise KeyError
    assert torch.equal(weight, torch.ones(3))


def test_numbers_of_a_module_s_own_generator_are_random_numbers() -> None:
    model = nn.Linear(2, 2)
    model.dice = torch.Generator()  # type: ignore[assignment]
    with pytest.raises(RandomPass), all_put_back(model):
        torch.rand(1, generator=model.dice)  # type: ignore[arg-type]


def test_what_is_not_the_model_s() -> None:
    """A variable around a function is others' too, and entries that stand for modules elsewhere are not gone into."""
    seen: list[int] = []
    model = nn.Linear(2, 2)
    model.note = lambda: seen.append(1)  # type: ignore[assignment]
    with all_put_back(model):
        model.note()  # type: ignore[operator]
    assert seen == [1]
    assert Held(model).modules == [model]


class Moves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight.data.mul_(0.9)
        result: Tensor = self.layer(x)
        return result


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_models_run_as_they_are_written(fullgraph: bool) -> None:
    model, x = Moves(), torch.randn(4, 3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    compiled(x)
    before = model.layer.weight.detach().clone()
    found = local_lipschitz(compiled, x)
    assert torch.equal(model.layer.weight, before)
    torch.testing.assert_close(found, (0.9 * before.double()).norm().expand(4), rtol=1e-6, atol=0)
