"""A training of transformers' Trainer that goes on from a checkpoint with more ranks, all from its step."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from test_ranks_of_trainers import X, Y, begin, free_port, network
from torch import Tensor, nn
from torch.nn import functional as nnf

pytest.importorskip("transformers", reason="needs the extra `hf`")

SAVED, STEPS, WINDOW = 4, 9, 3


def train(rank: int, folder: str, port: int) -> None:
    import transformers

    import lipcore

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": nnf.cross_entropy(logits, labels), "logits": logits}

    ranks = 2 if port else 1
    if port:
        begin(rank, port)
    metrics = [lipcore.Trajectory(), lipcore.PerSampleGradNorms(loss_reduction="auto")]
    callback = lipcore.integrations.HFCallback(Path(folder, "run"), metrics=metrics, window_steps=WINDOW, timeout=20)
    arguments = transformers.TrainingArguments(
        str(Path(folder, "out")), max_steps=SAVED if ranks == 1 else STEPS, per_device_train_batch_size=4, use_cpu=True,
        report_to=[], save_strategy="steps", save_steps=SAVED, disable_tqdm=True, logging_steps=WINDOW,
        ddp_backend="gloo" if ranks > 1 else None,
    )  # fmt: skip
    data = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    trainer = transformers.Trainer(Classifier(), arguments, train_dataset=data, callbacks=[callback])
    trainer.train(resume_from_checkpoint=ranks > 1 or None)
    assert callback.monitor is not None
    found = [(window.scope, window.first_step, window.last_step) for window in callback.monitor.global_history]
    Path(folder, f"{ranks}.{rank}.json").write_text(json.dumps(found))


@pytest.mark.ci
def test_ranks_without_a_file_go_on_from_the_first_ones(tmp_path: Path) -> None:
    run_ranks(train, str(tmp_path), 0, ranks=1)
    assert json.loads((tmp_path / "1.0.json").read_text()) == [["global", 1, 3]]
    run_ranks(train, str(tmp_path), free_port(), ranks=2)
    for rank in range(2):
        assert json.loads((tmp_path / f"2.{rank}.json").read_text()) == [["global", 4, 6], ["global", 7, 9]]


def test_files_of_ranks_that_are_no_more_are_removed_with_the_save(tmp_path: Path) -> None:
    """Of a training with more ranks, whose checkpoint this one writes over."""
    from lipcore import Monitor
    from lipcore.integrations import HFCallback

    model = nn.Linear(2, 1)
    callback = HFCallback()
    callback._folder, callback._step = tmp_path, 3
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    for name in ("lipcore-rank0.pt", "lipcore-rank1.pt", "lipcore-rank12.pt", "lipcore-rankings.pt", "rng_state_1.pth"):
        (folder / name).touch()
    with Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1)) as monitor:
        callback.monitor = monitor
        callback._save()
    assert sorted(os.listdir(folder)) == ["lipcore-rank0.pt", "lipcore-rankings.pt", "rng_state_1.pth"]
    assert torch.load(folder / "lipcore-rank0.pt", weights_only=True)
