"""Which of two true reasons is said where a gradient is no mean over known ranks: a rule of its own, or its ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from one_rank import one_rank
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lipcore.models import averaging
from lipcore.models.averaging import averaged_over

_RULE = "the {0} was given a rule of its own by which gradients are reduced"


def ddp() -> nn.Module:
    model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    model.register_comm_hook(None, lambda state, bucket: None)
    return model


def sharded(meshes: int = 1) -> nn.Module:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for i, layer in enumerate(model):
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,), mesh_dim_names=(f"m{i % meshes}",)))
        layer.set_gradient_divide_factor(3.0)
    return model


def unknown() -> nn.Module:
    return nn.Linear(2, 2)


#: The model, whether its process group is gone, whether ranks hold parts of it, and the reason.
CASES: dict[str, tuple[Callable[[], nn.Module], bool, bool, str]] = {
    "ddp": (ddp, False, False, _RULE.format("DistributedDataParallel")),
    "ddp of a gone group": (ddp, True, False, _RULE.format("DistributedDataParallel")),
    "sharded": (sharded, False, False, _RULE.format("fully_shard()ed model")),
    "sharded over several": (lambda: sharded(2), False, False, "its parameters lie on several device meshes"),
    "in parts": (sharded, False, True, _RULE.format("fully_shard()ed model")),
    "in parts over several": (lambda: sharded(2), False, True, _RULE.format("fully_shard()ed model")),
    "nobody knows": (unknown, False, False, "there are other ranks"),
    "parts that nobody shards": (unknown, False, True, ""),
}


@pytest.mark.parametrize("name", CASES)
def test_which_reason_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, gone, parts, reason = CASES[name]
    with one_rank():
        model = kind()
        if gone:
            monkeypatch.setattr(averaging, "ranks_of", lambda group: ())
        if parts:
            monkeypatch.setattr(averaging, "part_ranks", lambda *model: object())
            if "several" in name:
                monkeypatch.setattr(averaging, "averaging_ranks", lambda model: [{0}, {1}])
        ranks, why = averaged_over(model)
    assert why.startswith(reason)
    assert (ranks, bool(why)) == (() if reason else (0,), bool(reason))
