"""The blocks of docs/distributed.md run on two ranks too, with the model wrapped as its first block says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ways

DOCS = Path(__file__).resolve().parents[2] / "docs" / "distributed.md"
_MODEL = re.compile(r"^(model|again) = (nn\.Sequential\(.*\))  #.*$", re.MULTILINE)


def wrapped(model: Any, way: str) -> Any:
    if way == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if way == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        return fully_shard(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})


def run_blocks(rank: int, folder: str, name: str) -> int:
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    names: dict[str, Any] = {"wrapped": wrapped, "__name__": "blocks"}
    for block in blocks:
        torch.manual_seed(0)  # alike models on all ranks
        exec(_MODEL.sub(rf'\1 = wrapped(\2, "{name}")', block), names)
    return len(blocks)


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore")
def test_they_run(tmp_path: Path) -> None:
    found = run_ways(tmp_path, run_blocks, {"ddp": {}, "fsdp2": {}, "tensor_parallel": {}})
    assert found == {name: [4, 4] for name in found}
