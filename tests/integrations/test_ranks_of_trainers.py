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

STEPS, BATCH = int(os.environ.get("LIPCORE_TEST_STEPS", "4")), 4
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


ONE_WINDOW = {"window_steps": None}


def by_lightning(folder: Path, seen: Seen, watching: Any = ONE_WINDOW) -> Any:
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

    callback = lipcore.integrations.LightningCallback(metrics=metrics(), **watching)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gloo"), max_steps=STEPS,
        accumulate_grad_batches=2, callbacks=[callback, *closing(callback, watching)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(TensorDataset(X, Y), batch_size=BATCH))
    return trainer.callbacks


def by_transformers(folder: Path, seen: Seen, watching: Any = ONE_WINDOW) -> Any:
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

    callback = lipcore.integrations.HFCallback(metrics=metrics(), **watching)
    arguments = transformers.TrainingArguments(
        str(folder / "out"), max_steps=STEPS, per_device_train_batch_size=BATCH, gradient_accumulation_steps=2,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, ddp_backend="gloo",
        logging_strategy="no" if watching is ONE_WINDOW else "steps", logging_steps=3,
    )  # fmt: skip
    data = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    callbacks = [callback, *closing(callback, watching)]
    trainer = transformers.Trainer(Classifier(), arguments, train_dataset=data, callbacks=callbacks)
    trainer.train()
    callback.history = trainer.state.log_history
    return trainer.callback_handler.callbacks


def closing(callback: Any, watching: Any) -> list[Any]:
    """Make a callback for either trainer that closes the one window of all ranks before the other one ends."""
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

    return [Closes()] if watching is ONE_WINDOW else []


def begin(rank: int, port: int) -> None:
    """Be one of two processes as torchrun starts them."""
    torch.set_num_threads(1)
    one = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    os.environ.update({name: str(value) for name, value in one.items()})
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="one", GLOO_SOCKET_IFNAME="lo"
    )


def train(rank: int, folder: str, trainer: str, port: int) -> None:
    begin(rank, port)
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


def train_recorded(rank: int, folder: str, trainer: str, port: int) -> None:
    import lipcore

    begin(rank, port)
    watching = {"window_steps": 3, "run": Path(folder, "run")}
    callbacks = (by_lightning if trainer == "lightning" else by_transformers)(Path(folder), Seen(), watching)
    monitor = next(one.monitor for one in callbacks if hasattr(one, "monitor"))
    with lipcore.open_run(Path(folder, "run"), rank) as run:
        recorded = [(window.scope, window.first_step, window.last_step) for window in run.windows]
    logs = [entry for one in callbacks for entry in getattr(one, "history", [])]
    found = {
        "recorded": recorded,
        "logged": [{name: value for name, value in entry.items() if "lipcore/" in name} for entry in logs],
        "global": [{f"lipcore/{name}": value for name, value in w.flat().items()} for w in monitor.global_history],
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@pytest.mark.parametrize("trainer", ["lightning", "transformers"])
def test_windows_are_of_all_ranks_up_to_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: str) -> None:
    """Steps 4 to 6 end with the training: nothing is logged behind them."""
    monkeypatch.setenv("LIPCORE_TEST_STEPS", "6")  # of the ranks, which import this file anew
    run_ranks(train_recorded, str(tmp_path), trainer, free_port())
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for one in ranks:
        assert one["recorded"] == [["global", 1, 3], ["global", 4, 6]]
        assert one["global"] == ranks[0]["global"]
        told = [entry for entry in one["logged"] if entry]
        assert len(told) == (0 if trainer == "lightning" else 2)
        for entry, window in zip(told, one["global"], strict=False):
            assert f"lipcore/{NAME}/norm.mean/total" in entry
            assert entry.items() <= window.items()


@pytest.mark.parametrize("trainer", ["lightning", "transformers"])
def test_the_noise_scale_under_ddp(tmp_path: Path, trainer: str) -> None:
    """Against the samples' gradients of both ranks, one at a time in float64 (McCandlish et al. 2018, appendix A)."""
    run_ranks(train, str(tmp_path), trainer, free_port())
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
