"""What `lipcore doctor` prints: the versions and devices that a question about a run begins with."""

from __future__ import annotations

import importlib.util
import platform
import sqlite3
from collections.abc import Mapping
from importlib import metadata

import numpy as np
import torch

import lipcore
from lipcore import _core

#: Libraries by the extra that brings them.
EXTRAS = {
    "demo": ("matplotlib", "sklearn", "rich"),
    "theory": ("scipy", "rich"),
    "report": ("bokeh",),
    "hf": ("transformers", "accelerate"),
    "lightning": ("lightning",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
}


def findings() -> dict[str, str]:
    """Return what there is, by name."""
    found = {
        "lipcore": lipcore.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "numpy": np.__version__,
        "sqlite": sqlite3.sqlite_version,
        "instruction set": f"{_core.isa()} (LIPCORE_ISA chooses another)",
        "torch's threads": f"{torch.get_num_threads()}; lipcore uses {_core.pool_size()} of them",
        "CUDA kernels": _cuda(),
    }
    owners = metadata.packages_distributions()  # reads every distribution there is
    return found | {f"extra {name}": _extra(libraries, owners) for name, libraries in EXTRAS.items()}


def _cuda() -> str:
    if not _core.cuda_built:
        return "not built (LIPCORE_CUDA=ON builds them)"
    devices = _core.cuda_device_count()
    found = f"{_core.cuda_versions()}; {devices} devices, torch sees {torch.cuda.device_count()}"
    troubles = [_core.cuda_trouble()] if devices == 0 else [_core.cuda_trouble_on(device) for device in range(devices)]
    return ". ".join([found, *filter(None, troubles)])


def _extra(libraries: tuple[str, ...], owners: Mapping[str, list[str]]) -> str:
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        return f"no: {', '.join(missing)} missing"
    return ", ".join(f"{name} {metadata.version(owners.get(name, [name])[0])}" for name in libraries)
