"""Local Lipschitz constants of a model whose layers are sharded one by one, here over one rank."""

from __future__ import annotations

from typing import Any

import pytest
import sharded_nets
import torch
from sharded_nets import Net
from torch import nn
from torch.utils.checkpoint import checkpoint

from lipcore import Lipschitz, Monitor, PerSampleGradNorms, Trajectory

dist = torch.distributed
pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed"),
    pytest.mark.usefixtures("group_of_one_rank"),
]


def made(*, chain: bool, sharded: bool = True, kind: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)) if chain else kind()
    return sharded_nets.sharded(model) if sharded else model


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


class Skip(Net):
    """A way past the first layer that can be switched on."""

    def __init__(self) -> None:
        super().__init__()
        self.aside, self.on = nn.Linear(4, 1), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = super().forward(x)
        return found + self.aside(x) if self.on else found


@pytest.mark.filterwarnings("ignore:lipcore turned local_lipschitz off:UserWarning")
def test_a_way_past_the_first_layer_that_opens_later() -> None:
    """A proof is of the operations that it has seen."""
    model: Any = made(chain=False, kind=Skip)
    monitor = Monitor(model, metrics=[Lipschitz()])
    assert monitor.prove(torch.randn(5, 4)) == {"lipschitz": ""}
    assert constant(monitor, model).label == "exact"
    model.on = True
    found = constant(monitor, model)
    assert not found.valid
    assert "other operations than that of monitor.prove(batch)" in found.note
    assert "by more ways than" in monitor.prove(torch.randn(5, 4))["lipschitz"]
    model.on = False
    assert not constant(monitor, model).valid  # nothing has shown that this pass is as the first
    assert monitor.prove(torch.randn(5, 4)) == {"lipschitz": ""}
    assert constant(monitor, model).valid


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore:lipcore turned local_lipschitz off:UserWarning")
def test_a_hook_that_comes_later_in_a_chain() -> None:
    model: Any = made(chain=True)
    monitor = Monitor(model, metrics=[Lipschitz()])
    assert constant(monitor, model).label == "exact"
    batch = torch.randn(5, 4)
    handle = model[2].register_forward_hook(lambda module, into, out: out + batch[:, :1])
    found = constant(monitor, model)
    assert not found.valid
    assert "call monitor.prove(batch) on all ranks" in found.note
    handle.remove()
    assert monitor.prove(torch.randn(5, 4)) == {"lipschitz": ""}
    assert constant(monitor, model).valid


class Attention(nn.Module):
    """Casts, views and checkpoints may differ between passes that do the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.at = nn.Linear(4, 8), nn.Linear(8, 1), nn.Parameter(torch.randn(1, 1, 8))
        self.between = nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x.unsqueeze(1)) + self.at
        found: torch.Tensor = self.last(checkpoint(self.between, hidden, use_reentrant=False).mean(1))
        return found


@pytest.mark.ci
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_passes_that_do_the_same_are_known_again(amp: bool, beside: bool) -> None:
    model = made(chain=False, kind=Attention)
    metrics = [Lipschitz(), *([PerSampleGradNorms(loss_reduction="mean", on_unsupported="skip")] if beside else [])]
    monitor = Monitor(model, metrics=metrics)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        assert monitor.prove(torch.randn(5, 4))["lipschitz"] == ""
        for _ in range(2):
            model(torch.randn(3, 4)).square().mean().backward()  # the second takes what autocast has kept
            assert constant(monitor, model).valid


@pytest.mark.filterwarnings("ignore:lipcore turned local_lipschitz off:UserWarning")
@pytest.mark.parametrize("named", ["", pytest.param("first", marks=pytest.mark.ci)])
def test_no_gradients_begin_at_a_frozen_layer(named: str) -> None:
    """Inputs that require gradients have fully_shard() reduce the layers behind it at another time than on ranks
    without the metric, and the gradients of two layers would be mixed up."""
    model: Any = made(chain=False)
    model.first.requires_grad_(False)
    asked: list[bool] = []
    model.last.register_forward_pre_hook(lambda module, into: asked.append(into[0].requires_grad))
    monitor = Monitor(model, metrics=[Lipschitz(input=named or None), Trajectory()], window_steps=None)
    with pytest.warns(match="its output requires no gradient"), pytest.raises(ValueError, match="name a layer that"):
        for _ in range(2):
            model(torch.randn(5, 4)).square().mean().backward()
            monitor.step()
    assert asked
    assert not any(asked)


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore:lipcore turned local_lipschitz off:UserWarning")
@pytest.mark.filterwarnings("ignore:lipcore.*its output requires no gradient")
def test_the_default_goes_on_beside_a_frozen_layer() -> None:
    model: Any = made(chain=False)
    model.first.requires_grad_(False)
    with Monitor(model, window_steps=None) as monitor:
        for _ in range(2):
            model(torch.randn(5, 4)).square().mean().backward()
            monitor.step()
        window = monitor.close_window()
    assert window is not None
    assert "its output requires no gradient" in window.off["lipschitz"]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.1), pytest.param(torch.float64, 1e-8, marks=pytest.mark.ci)]
)
def test_the_first_check_has_the_tolerance_of_its_pass(dtype: torch.dtype, tolerance: float) -> None:
    metric = Lipschitz()
    monitor = Monitor(model := made(chain=True).to(dtype), metrics=[metric])
    model(torch.randn(5, 4, dtype=dtype)).square().mean().backward()
    assert metric._at_input.tolerance == tolerance
    monitor.close()


@pytest.mark.ci
def test_integers_need_no_check() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: Any = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 1))
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
    monitor = Monitor(model, metrics=[Lipschitz()])
    for _ in range(2):
        model(torch.randint(0, 5, (3, 2))).square().mean().backward()
        monitor.step()
    window = monitor.close_window()
    assert window is not None
    ((_, values),) = window["lipschitz"].local_lipschitz.items()
    assert values.max.label == "exact"


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore:lipcore turned local_lipschitz off:UserWarning")
def test_a_hook_on_the_layer_is_told_by_its_own_reason() -> None:
    model: Any = made(chain=False)
    handle = model.first.register_forward_hook(lambda module, into, out: None)
    monitor = Monitor(model, metrics=[Lipschitz(input="first")])
    assert "the first layer (Linear) may return something else" in constant(monitor, model).note
    assert "hooks of others" in monitor.prove(torch.randn(5, 4))["lipschitz"]
    handle.remove()
    assert monitor.prove(torch.randn(5, 4)) == {"lipschitz": ""}
    assert constant(monitor, model).valid


class Counting(Net):
    """It adds a number up over the ranks in its forward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(torch.ones(1))
        return super().forward(x)


def test_a_pass_that_speaks_to_other_ranks_is_told_once() -> None:
    """What it says is not known: the words have both, and what to do."""
    model = made(chain=False, sharded=False, kind=Counting)
    monitor = Monitor(model, metrics=[Lipschitz()])
    with pytest.warns(match="other ranks") as said:
        model(torch.randn(5, 4)).square().mean().backward()
    assert len(said) == 1
    assert "outside of forward()" in str(said[0].message)
    with pytest.raises(ValueError, match="exchanges activations"):
        monitor.close()
