"""Steps on a device: nothing in them waits for it, and nothing is copied to it or from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from devices import EMULATED, nothing_waits
from torch import Tensor, nn

import lipcore
from lipcore.metric.host_copy import HostCopy
from lipcore.metric.late_moves import LateMoves


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)).cuda()


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    x, y = torch.randn(8, 10).cuda(), torch.randn(8, 1).cuda()

    def step() -> None:
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.mark.gpu
@pytest.mark.skipif(not EMULATED, reason="asks the emulator")
def test_a_copy_is_made_on_the_stream_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, stream, asked = torch.ones(3).cuda(), torch.cuda.current_stream(), []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: asked.append(device) or stream)
    (copied,) = HostCopy(tensor).tensors()
    assert copied.tolist() == [1, 1, 1]
    assert asked == [tensor.device]
    assert tensor.data_ptr() in stream.recorded


@pytest.mark.gpu
def test_a_monitor() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    step = step_of(model, optimizer)
    with lipcore.Monitor(model, optimizer, window_steps=100) as monitor:
        for _ in range(3):
            step()
        with nothing_waits():
            for _ in range(3):
                step()
        window = monitor.close_window()
    assert window["trajectory"].path_length["total"].sum.value > 0
    (place,) = window["lipschitz"].local_lipschitz
    assert window["lipschitz"].local_lipschitz[place].mean.value > 0


@pytest.mark.gpu
def test_per_sample_norms() -> None:
    model = mlp()
    step = step_of(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    with lipcore.PerSampleGradNorms(model, loss_reduction="mean") as norms:
        for _ in range(3):
            step()
        with nothing_waits():
            for _ in range(3):
                step()
        assert (norms.per_sample > 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("moving", [False, True])
def test_weights_that_move_after_a_step_are_noticed_later(moving: bool) -> None:
    weights, noticed = torch.ones(5).cuda(), []
    moves = LateMoves(lambda: [weights], lambda: noticed.append("after"), lambda: noticed.append("without"))
    with nothing_waits():
        for _ in range(4):
            moves.step(compare=True)
            if moving:
                weights.add_(1)
            torch.cuda.synchronize()
            moves.backward_begins()
    assert noticed == ["after"] * moving


@pytest.mark.gpu
def test_weights_that_move_without_a_step_are_noticed_later() -> None:
    weights, noticed = torch.ones(5).cuda(), []
    moves = LateMoves(lambda: [weights], lambda: noticed.append("after"), lambda: noticed.append("without"))
    with nothing_waits():
        for _ in range(64):
            weights.add_(1)
            torch.cuda.synchronize()
            moves.backward_begins()
    assert noticed == ["without"]


class Unscaling(torch.optim.Optimizer):
    """Takes a scale out of the gradients itself, as a fused optimizer under a GradScaler."""

    def __init__(self, parameters: Iterable[Tensor], grad_scale: Tensor | float) -> None:
        super().__init__(parameters, {})
        self.grad_scale = grad_scale

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            assert parameter.grad is not None
            parameter.sub_(parameter.grad / self.grad_scale)


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1.0, 8.0, torch.tensor(8.0)], ids=["none", "number", "tensor"])
def test_gradients_of_several_optimizers(scale: Tensor | float) -> None:
    model = mlp()
    optimizers = [Unscaling(model[i].parameters(), scale) for i in (0, 2, 4)]
    x, y = torch.randn(8, 10).cuda(), torch.randn(8, 1).cuda()

    def step() -> None:
        nn.functional.mse_loss(model(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()

    with lipcore.Monitor(model, optimizers, [lipcore.Trajectory(stats=["grad_norm", "clipped_grad_norm"])]) as monitor:
        for _ in range(3):
            step()
        with nothing_waits():
            for _ in range(3):
                step()
        result = monitor.compute()["trajectory"]
    before, used = result["grad_norm"]["total"]["mean"], result["clipped_grad_norm"]["total"]["mean"]
    assert before.count == used.count == 6
    assert used.value * float(scale) == pytest.approx(before.value, rel=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["norms", "monitor"])
def test_a_captured_step_has_no_per_sample_norms(kind: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    step = step_of(model, optimizer)
    norms = lipcore.PerSampleGradNorms(loss_reduction="mean") if kind == "monitor" else None
    metric: Any = (
        lipcore.PerSampleGradNorms(model, loss_reduction="mean")
        if norms is None
        else lipcore.Monitor(model, optimizer, [norms, lipcore.Trajectory(mode="updates")])
    )
    with pytest.raises(RuntimeError, match="captured into a CUDA graph.*without the graph"), metric:
        step()
        with (
            pytest.warns(RuntimeWarning, match="stopped recording.*captured into a CUDA graph"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            step()
