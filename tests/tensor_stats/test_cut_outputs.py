"""Outputs that a plan of tensor parallelism leaves in parts: numbers of whole rows are left out by name, and a loss
that is made of logits in parts is no error of the loop's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ways
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module

from lipcore import Monitor, PerSampleGradNorms, TensorStats

pytestmark = pytest.mark.ci
HEADS, WIDTH, CLASSES = 4, 16, 32


class Attention(nn.Module):
    num_heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.wq, self.wk, self.wv))
        out: Tensor = self.wo(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok, self.attn, self.output = nn.Embedding(CLASSES, WIDTH), Attention(), nn.Linear(WIDTH, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        x = self.tok(words)
        out: Tensor = self.output(x + self.attn(x))
        return out


def train(rank: int, folder: str, name: str, *, whole: bool = False, auto: bool = False) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Words()
    head = ColwiseParallel(output_layouts=Replicate() if whole else Shard(-1), use_local_output=whole)
    columns = {f"attn.{layer}": ColwiseParallel() for layer in ("wq", "wk", "wv")}
    plan: Any = {**columns, "attn.wo": RowwiseParallel(), "output": head}
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)
    norms = PerSampleGradNorms(loss_reduction="auto")
    stats = TensorStats(every_steps=1, attention="auto", logits=True)
    rows = []
    with Monitor(model, optimizer, [norms if auto else stats], window_steps=2, timeout=20) as monitor:
        for step in range(2):
            words = torch.randint(CLASSES, (3, 6), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            with loss_parallel():
                out = model(words)
                loss = F.cross_entropy(out.flatten(0, 1), words.flatten())
                if auto:
                    monitor.log(loss=loss)
                loss.backward()
            rows += [out.detach().logsumexp(-1)] if whole else []
            optimizer.step()
        window = monitor.global_window()
    assert window is not None
    if auto:
        return {"trained": True}
    found = window["tensor_stats"]
    means = {key: each.mean.value for key, each in found.logsumexp.items()} if "logsumexp" in found else {}
    told = {"off": str(dict(found.details)), "heads": "attention_bound" in found, "means": means}
    return told | {"right": float(torch.cat(rows).mean()) if whole else None}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    ways: dict[str, dict[str, Any]] = {"parts": {}, "whole": {"whole": True}, "auto": {"auto": True}}
    return run_ways(Path(tmp_path_factory.mktemp("ranks")), train, ways)


def test_logits_and_heads_in_parts_are_left_out_by_name(found: dict[str, list[Any]]) -> None:
    for one in found["parts"]:
        assert not one["means"]
        assert not one["heads"]
        assert "the model: its last dimension lies in parts on 2 ranks" in one["off"]
        assert "attn.wq: its last dimension lies in parts on 2 ranks" in one["off"]


def test_logits_that_the_plan_brings_whole_are_right(found: dict[str, list[Any]]) -> None:
    for one in found["whole"]:
        (mean,) = one["means"].values()
        assert mean == pytest.approx(one["right"], rel=1e-5)
        assert not one["heads"]


def test_a_loss_of_logits_in_parts_raises_nothing_in_the_loop(found: dict[str, list[Any]]) -> None:
    assert found["auto"] == [{"trained": True}] * 2
