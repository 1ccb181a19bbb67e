"""The callback of transformers' Trainer, against a loop by hand."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

import lipcore

transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")
pytest.importorskip("accelerate", reason="needs the extra `trainers` (make test-ci)")
pytestmark = pytest.mark.ci

DATA = [
    {"x": x, "labels": y}
    for x, y in zip(torch.randn(64, 6, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3, strict=True)
]


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"logits": logits} | ({} if labels is None else {"loss": nnf.cross_entropy(logits, labels)})


def arguments(out: Path, **more: Any) -> Any:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "use_cpu": True,
        "report_to": [],
        "seed": 3,
        "logging_steps": 4,
        "save_strategy": "no",
        "disable_tqdm": True,
        "data_seed": 3,
    }
    return transformers.TrainingArguments(str(out), **settings | more)


def trained(out: Path, callback: Any, resume: Any = None, **more: Any) -> Any:
    trainer = transformers.Trainer(
        Classifier(), arguments(out, **more), train_dataset=list(DATA), callbacks=[] if callback is None else [callback]
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_records_the_training_and_leaves_it_as_it_is(tmp_path: Path, accumulate: int) -> None:
    more = {"gradient_accumulation_steps": accumulate, "max_grad_norm": 0.5}
    plain = trained(tmp_path / "plain", None, **more)
    callback = lipcore.integrations.HFCallback(run=tmp_path / "run", window_steps=4)
    watched = trained(tmp_path / "out", callback, **more)
    assert torch.equal(weights(plain), weights(watched))
    steps = 16 // accumulate
    with lipcore.open_run(tmp_path / "run") as run:
        norms = run.series("update_norm", "total")
        assert norms.steps.tolist() == list(range(1, steps + 1))
        assert np.isfinite(norms.values).all()
        assert [window.steps for window in run.windows] == [4] * (steps // 4)
        assert run.config["training_arguments"]["gradient_accumulation_steps"] == accumulate
        logged = [entry for entry in watched.state.log_history if "loss" in entry]
        losses = run.series("loss")
        assert losses.steps.tolist() == [entry["step"] for entry in logged]
        assert np.allclose(losses["total"], [entry["loss"] for entry in logged], rtol=1e-6)
        means = run.series("update_norm.mean", "total")["total"]
        mine = [entry["lipcore/trajectory/update_norm.mean/total"] for entry in logged]
        assert np.allclose(mine, means)
        assert (run.series("local_lipschitz.max").values > 0).all()
    assert not watched.model._forward_hooks


def test_values_are_those_of_a_loop(tmp_path: Path) -> None:
    more = {"lr_scheduler_type": "constant", "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0}
    trained(tmp_path / "out", lipcore.integrations.HFCallback(run=tmp_path / "run", window_steps=4), **more)
    norms = lipcore.open_run(tmp_path / "run").series("update_norm", "total")["total"]
    before, found = None, []

    class Steps(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            nonlocal before
            now = torch.cat([p.detach().double().flatten() for p in model.parameters()])
            before = (
                torch.cat([p.detach().double().flatten() for p in Classifier().parameters()])
                if before is None
                else before
            )
            found.append(float((now - before).norm()))
            before = now

    trained(tmp_path / "again", Steps(), **more)
    assert np.allclose(norms, found, rtol=1e-5)


def test_resuming_makes_one_history(tmp_path: Path) -> None:
    more = {"save_strategy": "steps", "save_steps": 6}
    whole = lipcore.integrations.HFCallback(run=tmp_path / "whole", window_steps=4)
    reference = trained(tmp_path / "a", whole, **more)

    class Stop(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 9:
                raise KeyboardInterrupt

    callback = lipcore.integrations.HFCallback(run=tmp_path / "run", window_steps=4)
    trainer = transformers.Trainer(
        Classifier(), arguments(tmp_path / "b", **more), train_dataset=list(DATA), callbacks=[callback, Stop()]
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    callback.monitor.close()  # as the end of the process does
    assert (tmp_path / "b" / "checkpoint-6" / "lipcore-rank0.pt").is_file()
    assert not list((tmp_path / "b" / "checkpoint-6").glob("*half"))
    again = lipcore.integrations.HFCallback(run=tmp_path / "run", window_steps=4)
    resumed = trained(tmp_path / "b", again, resume=True, **more)
    assert torch.equal(weights(reference), weights(resumed))
    one, other = lipcore.open_run(tmp_path / "whole"), lipcore.open_run(tmp_path / "run")
    assert [(start.kind, start.step) for start in other.starts] == [("start", 0), ("rewind", 6)]
    for name in ("update_norm", "weight_norm", "update_norm.mean", "path_length.cumulative"):
        mine, theirs = one.series(name), other.series(name)
        assert mine.steps.tolist() == theirs.steps.tolist()
        assert np.allclose(mine.values, theirs.values, rtol=1e-6, equal_nan=True)


def test_a_training_in_the_same_folder_writes_over_the_state_of_the_one_before(tmp_path: Path) -> None:
    found = []
    for rate in (5e-5, 1e-3):
        callback = lipcore.integrations.HFCallback(window_steps=4)
        trained(tmp_path / "out", callback, save_strategy="steps", save_steps=6, learning_rate=rate)
        found.append((tmp_path / "out" / "checkpoint-6" / "lipcore-rank0.pt").read_bytes())
    assert found[0] != found[1]


def test_a_checkpoint_without_lipcore(tmp_path: Path) -> None:
    more = {"save_strategy": "steps", "save_steps": 6}
    trained(tmp_path / "out", None, **more)
    callback = lipcore.integrations.HFCallback(window_steps=4)
    with pytest.warns(RuntimeWarning, match="lipcore goes on from step 16 without what it knew there: there is no"):
        trained(tmp_path / "out", callback, resume=True, **more)


def test_per_sample_norms_read_what_the_trainer_does(tmp_path: Path) -> None:
    norms = lipcore.PerSampleGradNorms(loss_reduction="auto")
    callback = lipcore.integrations.HFCallback(metrics=[lipcore.Trajectory(), norms], window_steps=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        trained(tmp_path / "out", callback, gradient_accumulation_steps=2, num_train_epochs=1)
    assert callback.monitor is not None
    window = callback.monitor.compute()
    assert window is not None
    assert window["per_sample_grad_norm"].norm["total"].mean.count == 64


def test_a_language_model(tmp_path: Path) -> None:
    settings = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    tokens = torch.randint(32, (16, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    callback = lipcore.integrations.HFCallback(run=tmp_path / "run", window_steps=2)
    trainer = transformers.Trainer(
        model, arguments(tmp_path / "out", per_device_train_batch_size=4), train_dataset=data, callbacks=[callback]
    )
    trainer.train()
    run = lipcore.open_run(tmp_path / "run")
    assert len(run.series("update_norm")) == 8
    assert "local_lipschitz.max" in run.quantities
