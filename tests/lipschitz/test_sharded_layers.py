"""Local Lipschitz constants of a model whose layers are sharded one by one, here over one rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from lipcore import Lipschitz, Monitor

dist = torch.distributed
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(torch.tanh(self.first(x)))
        return found


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def made(*, chain: bool, sharded: bool = True) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)) if chain else Net()
    if sharded:
        mesh = init_device_mesh("cpu", (1,))
        for module in (*(m for m in model.modules() if isinstance(m, nn.Linear)), model):
            fully_shard(module, mesh=mesh)
    found: nn.Module = model
    return found


def constant(monitor: Monitor, model: nn.Module) -> Any:
    """The largest constant of one window of a step on one batch."""
    model.zero_grad()
    model(torch.randn(5, 4, generator=torch.Generator().manual_seed(1))).square().mean().backward()
    monitor.step()
    window = monitor.close_window()
    assert window is not None
    ((_, values),) = window["lipschitz"].local_lipschitz.items()
    return values.max


@pytest.mark.parametrize("chain", [True, pytest.param(False, marks=pytest.mark.ci)])
def test_constants_are_those_of_the_whole_model(chain: bool) -> None:
    plain = made(chain=chain, sharded=False)
    expected = constant(Monitor(plain, metrics=[Lipschitz()]), plain)
    monitor = Monitor(model := made(chain=chain), metrics=[Lipschitz()])
    for _ in range(2):  # before and after it looks at the model anew
        if not chain:
            assert monitor.prove(torch.randn(5, 4)) == {"lipschitz": ""}
        found = constant(monitor, model)
        assert found.label == "exact"
        assert found.value == pytest.approx(expected.value, rel=1e-6)
        monitor.rebind()


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore:lipcore turned local_lipschitz off:UserWarning")
def test_without_a_proof_there_is_a_reason() -> None:
    monitor = Monitor(model := made(chain=False), metrics=[Lipschitz()])
    found = constant(monitor, model)
    assert not found.valid
    assert "call monitor.prove(batch) on all ranks" in found.note
    assert monitor.prove(torch.randn(5, 4)) == {"lipschitz": ""}
    assert constant(monitor, model).valid


@pytest.mark.ci
def test_a_batch_that_the_model_cannot_take() -> None:
    monitor = Monitor(model := made(chain=False), metrics=[Lipschitz()])
    answer = monitor.prove(torch.randn(5, 3))["lipschitz"]
    assert answer.startswith("a pass that is differentiated by the input raises RuntimeError: mat1 and mat2")
    found = constant(monitor, model)  # the training goes on
    assert found.note == answer
    assert monitor.prove(torch.randn(5, 4)) == {"lipschitz": ""}
    assert constant(monitor, model).valid
