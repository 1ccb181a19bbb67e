"""Trainers on two ranks: their callbacks know the wrapper around the model: whose samples are in its gradient."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional as nnf

pytest.importorskip("lightning", reason="needs the extra `trainers` (make test-ci)")
pytest.importorskip("transformers", reason="needs the extra `hf`")
pytestmark = pytest.mark.ci

STEPS, BATCH = 4, 4
X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(64) % 3
NAME = "per_sample_grad_norm"


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


class Seen:
    """Every sample's gradient of each batch, in float64, as flat lists."""

    def __init__(self) -> None:
        self.gradients: list[list[list[float]]] = []

    def batch(self, net: nn.Module, x: Tensor, y: Tensor) -> None:
        exact = network().double()
        exact.load_state_dict({name: value.double() for name, value in net.state_dict().items()})
        rows = []
        for i in range(len(x)):
            loss = nnf.cross_entropy(exact(x[i : i + 1].double()), y[i : i + 1])
            found = torch.autograd.grad(loss, list(exact.parameters()))
            rows.append(torch.cat([g.flatten() for g in found]).tolist())
        self.gradients.append(rows)


def metrics() -> list[Any]:
    import lipcore

    return [lipcore.Trajectory(), lipcore.PerSampleGradNorms(loss_reduction="auto")]


def by_lightning(folder: Path, seen: Seen) -> Any:
    import lightning
    from lightning.pytorch.strategies import DDPStrategy
    from torch.utils.data import DataLoader, TensorDataset

    import lipcore

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, index: int) -> Tensor:
            seen.batch(self.net, *batch)
            return nnf.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = lipcore.integrations.LightningCallback(metrics=metrics(), window_steps=None)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gloo"), max_steps=STEPS,
        accumulate_grad_batches=2, callbacks=[callback, closing(callback)], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(TensorDataset(X, Y), batch_size=BATCH))
    return trainer.callbacks


def by_transformers(folder: Path, seen: Seen) -> Any:
    import transformers

    import lipcore

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            logits = self.net(x)
            if self.training:
                seen.batch(self.net, x, labels)  # type: ignore[arg-type]
            return {"loss": nnf.cross_entropy(logits, labels), "logits": logits}  # type: ignore[arg-type]

    callback = lipcore.integrations.HFCallback(metrics=metrics(), window_steps=None)
    arguments = transformers.TrainingArguments(
        str(folder / "out"), max_steps=STEPS, per_device_train_batch_size=BATCH, gradient_accumulation_steps=2,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, ddp_backend="gloo", logging_strategy="no",
    )  # fmt: skip
    data = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    trainer = transformers.Trainer(Classifier(), arguments, train_dataset=data, callbacks=[callback, closing(callback)])
    trainer.train()
    return trainer.callback_handler.callbacks


def closing(callback: Any) -> Any:
    """Make a callback for either trainer that closes the window of all ranks before the other one ends."""
    import lightning
    import transformers

    kind = lightning.Callback if isinstance(callback, lightning.Callback) else transformers.TrainerCallback

    class Closes(kind):  # type: ignore[misc,valid-type]
        window: Any = None

        def at_step(self, step: int) -> None:
            if step == STEPS and self.window is None:
                callback.monitor.close_window()
                self.window = callback.monitor.global_window()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.at_step(state.global_step)

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.at_step(trainer.global_step)

    return Closes()


def train(rank: int, folder: str, trainer: str, port: int) -> None:
    torch.set_num_threads(1)
    one = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    os.environ.update({name: str(value) for name, value in one.items()})
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="one", GLOO_SOCKET_IFNAME="lo"
    )
    seen = Seen()
    callbacks = (by_lightning if trainer == "lightning" else by_transformers)(Path(folder), seen)
    window = next(one.window for one in callbacks if type(one).__name__ == "Closes")
    result = window[NAME]
    found = {
        "gradients": seen.gradients,
        "scope": window.scope,
        "off": result.details.get("noise_scale_off", ""),
        "signal": result.gradient_sq["total"].mean.value if "gradient_sq" in result else None,
        "trace": result.gradient_noise["total"].mean.value if "gradient_noise" in result else None,
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("trainer", ["lightning", "transformers"])
def test_the_noise_scale_under_ddp(tmp_path: Path, trainer: str) -> None:
    """Against the samples' gradients of both ranks, one at a time in float64 (McCandlish et al. 2018, appendix A)."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    run_ranks(train, str(tmp_path), trainer, port)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [one["off"] for one in ranks] == ["", ""]
    assert {one["scope"] for one in ranks} == {"global"}
    signal = trace = 0.0
    for step in range(STEPS):
        each = torch.tensor(
            [row for one in ranks for batch in one["gradients"][2 * step : 2 * step + 2] for row in batch],
            dtype=torch.float64,
        )
        samples = len(each)
        assert samples == 4 * BATCH
        small, big = float(each.square().sum(1).mean()), float(each.mean(0).square().sum())
        signal += (samples * big - small) / (samples - 1) / STEPS
        trace += (small - big) / (1 - 1 / samples) / STEPS
    for one in ranks:
        assert one["signal"] == pytest.approx(signal, rel=1e-4)
        assert one["trace"] == pytest.approx(trace, rel=1e-4)
