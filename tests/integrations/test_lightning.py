"""The callback of Lightning's Trainer, against a loop by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.utils.data import DataLoader, TensorDataset

import lipcore

lightning = pytest.importorskip("lightning", reason="needs the extra `trainers` (make test-ci)")
pytestmark = [pytest.mark.ci, pytest.mark.filterwarnings("ignore")]

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(64) % 3


class Inside(lightning.LightningModule):  # type: ignore[misc]
    """A module whose training_step() calls a module inside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nnf.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Itself(Inside):
    """One whose training_step() calls itself."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nnf.cross_entropy(self(batch[0]), batch[1])


class Two(Inside):
    """One with two modules inside."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(3, 3)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nnf.cross_entropy(self.other(self.net(batch[0])), batch[1])


def trained(module: Any, folder: Path, callbacks: list[Any], ckpt: Any = None, **more: Any) -> Any:
    data = DataLoader(TensorDataset(X, Y), batch_size=8)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    settings: dict[str, Any] = {"accelerator": "cpu", "max_epochs": 2, "enable_checkpointing": False}
    trainer = lightning.Trainer(default_root_dir=folder, callbacks=callbacks, **quiet, **settings | more)
    trainer.fit(module, data, ckpt_path=ckpt)
    return trainer


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("kind", [Inside, Itself])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_records_the_training_and_leaves_it_as_it_is(tmp_path: Path, kind: type[Inside], accumulate: int) -> None:
    plain, watched = kind(), kind()
    trained(plain, tmp_path, [], accumulate_grad_batches=accumulate, gradient_clip_val=0.5)
    callback = lipcore.integrations.LightningCallback(run=tmp_path / "run", window_steps=4)
    trained(watched, tmp_path, [callback], accumulate_grad_batches=accumulate, gradient_clip_val=0.5)
    assert torch.equal(weights(plain), weights(watched))
    with lipcore.open_run(tmp_path / "run") as run:
        steps = 16 // accumulate
        norms = run.series("update_norm")
        assert norms.steps.tolist() == list(range(1, steps + 1))
        assert norms.places == ["net.0", "net.2", "total"]
        assert run.series("loss").steps.tolist() == list(range(1, steps + 1))
        assert (run.series("local_lipschitz.max").values > 0).all()


class ByHand(Inside):
    """One with manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize("kind", [Inside, ByHand])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_the_loss_is_the_one_that_training_step_made(tmp_path: Path, kind: type[Inside], precision: str) -> None:
    """Of steps of two and of three micro-batches, the last of an epoch having fewer; Lightning divides by the number
    that was asked for, and scales. Norms of samples are read from what backward() is called on."""
    made: list[float] = []

    class Told(kind):  # type: ignore[misc,valid-type]
        def training_step(self, batch: Any, index: int) -> Any:
            loss = nnf.cross_entropy(self.net(batch[0]).float(), batch[1])
            made.append(float(loss.detach()))
            if kind is Inside:
                return loss
            self.manual_backward(loss)
            if index % 2:
                self.optimizers().step()
                self.optimizers().zero_grad()
            return None

    every = {0: 2, 1: 3} if kind is Inside else {}
    norms = lipcore.PerSampleGradNorms(loss_reduction="auto")
    callbacks: list[Any] = [
        lipcore.integrations.LightningCallback(
            run=tmp_path / "run", metrics=[lipcore.Trajectory(), norms], window_steps=1
        )
    ]
    if every:
        callbacks.append(lightning.pytorch.callbacks.GradientAccumulationScheduler(every))
    more: dict[str, Any] = {}
    if precision == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        more = {"plugins": lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)}
    trained(Told(), tmp_path, callbacks, **more)
    parts = [2] * 4 + [3, 3, 2] if every else [2] * 8
    expected = [np.mean(part) for part in np.split(np.array(made), np.cumsum(parts)[:-1])]
    with lipcore.open_run(tmp_path / "run") as run:
        found = run.series("loss")
        assert found.steps.tolist() == list(range(1, len(parts) + 1))
        assert np.allclose(found["total"], expected, rtol=1e-6, atol=0)
        of_samples = [window["per_sample_grad_norm"].norm["total"].mean for window in run.windows]
    assert sum(norm.count for norm in of_samples) == 128
    assert all(0.1 < norm.value < 10 for norm in of_samples)


def test_a_module_that_has_to_be_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="module: it cannot be told .* there are 'net', 'other'"):
        trained(Two(), tmp_path, [lipcore.integrations.LightningCallback()])
    callback = lipcore.integrations.LightningCallback(run=tmp_path / "run", module="net", window_steps=4)
    trained(Two(), tmp_path, [callback])
    assert len(lipcore.open_run(tmp_path / "run").series("update_norm")) == 16


def test_resuming_makes_one_history(tmp_path: Path) -> None:
    class Stop(lightning.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "at8.ckpt")
            if trainer.global_step == 11:
                raise ZeroDivisionError

    whole, resumed = Inside(), Inside()
    trained(whole, tmp_path, [lipcore.integrations.LightningCallback(run=tmp_path / "whole", window_steps=4)])
    with pytest.raises(ZeroDivisionError):
        trained(
            Inside(), tmp_path, [lipcore.integrations.LightningCallback(run=tmp_path / "run", window_steps=4), Stop()]
        )
    again = lipcore.integrations.LightningCallback(run=tmp_path / "run", window_steps=4)
    trained(resumed, tmp_path, [again], ckpt=tmp_path / "at8.ckpt")
    assert torch.equal(weights(whole), weights(resumed))
    one, other = lipcore.open_run(tmp_path / "whole"), lipcore.open_run(tmp_path / "run")
    assert [(start.kind, start.step) for start in other.starts] == [("start", 0), ("rewind", 8)]
    for name in ("update_norm", "loss", "update_norm.mean", "path_length.cumulative"):
        mine, theirs = one.series(name), other.series(name)
        assert mine.steps.tolist() == theirs.steps.tolist()
        assert np.array_equal(mine.values, theirs.values, equal_nan=True)


def test_state_of_parts_is_not_in_a_checkpoint_that_rank_0_alone_writes(tmp_path: Path, monkeypatch: Any) -> None:
    class Save(lightning.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "at8.ckpt")

    with monkeypatch.context() as several:  # as under FSDP2
        several.setattr("lipcore.integrations.lightning.world_size", lambda: 2)
        several.setattr("lipcore.integrations.lightning.holds_parts", lambda model: True)
        with pytest.warns(RuntimeWarning, match="lipcore's state is not in this checkpoint: .* dcp.save"):
            trained(Inside(), tmp_path, [lipcore.integrations.LightningCallback(window_steps=4), Save()])
    again = lipcore.integrations.LightningCallback(window_steps=4)
    with pytest.warns(RuntimeWarning, match="lipcore goes on from step 8 without what it knew there"):
        trained(Inside(), tmp_path, [again], ckpt=tmp_path / "at8.ckpt")
    assert again.monitor is not None
    assert [window.last_step for window in again.monitor.history] == [4, 8]
