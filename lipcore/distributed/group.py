"""The ranks whose numbers are merged: their process group, its store, and the device on which it reduces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lipcore.models.ranks import rank, ranks_of, under_process_group
from lipcore.models.torch_internals import default_store

#: What users pass as `group=`: "auto" is the default process group, where there is one; None merges nothing.
AUTO = "auto"


@dataclass(frozen=True)
class Group:
    """A process group as this rank sees it."""

    handle: Any  #: what collectives take as `group`; None: the default process group
    ranks: tuple[int, ...]  #: global numbers of its members
    place: int  #: this rank's place among them

    @property
    def size(self) -> int:
        """Number of its members."""
        return len(self.ranks)

    @property
    def name(self) -> str:
        """Name of the group, the same on all its members."""
        return "-".join(map(str, self.ranks)) if self.size < torch.distributed.get_world_size() else "world"

    @property
    def device(self) -> torch.device:
        """Device of the tensors that its collectives take."""
        return device_of(self.handle)

    @property
    def store(self) -> Any:
        """Store by which its members find each other."""
        return default_store()


def device_of(handle: Any) -> torch.device:
    """Return the device of the tensors that collectives of a process group take."""
    if torch.distributed.get_backend(handle) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def checked_group(group: Any) -> Any:
    """Return the argument `group`, a one-dimensional DeviceMesh as its process group; TypeError or ValueError for what
    cannot be one."""
    if group is None or (isinstance(group, str) and group == AUTO):
        return group
    if isinstance(group, str) or not torch.distributed.is_available():
        raise _no_group(group)
    if isinstance(group, torch.distributed.ProcessGroup):
        return group
    if not isinstance(group, torch.distributed.device_mesh.DeviceMesh):
        raise _no_group(group)
    if group.ndim == 1:
        return group.get_group()
    if sorted(group.mesh.flatten().tolist()) == list(range(torch.distributed.get_world_size())):
        return AUTO
    raise ValueError(
        f"group: a mesh of {group.ndim} dimensions that is not the whole world has no process group of its own; pass "
        "torch.distributed.new_group(mesh.mesh.flatten().tolist()), which every rank has to make"
    )


def _no_group(group: Any) -> TypeError:
    return TypeError(
        f"group: expected 'auto', None, a torch.distributed.ProcessGroup or a DeviceMesh, got {group!r}; 'auto' is the "
        "default process group"
    )


def found_group(group: Any) -> Group | None:
    """Return the group of a checked argument as it is now; None where this process stands alone: by group=None, without
    a process group, or in one of a single rank.

    Raises:
        ValueError: this rank is not in the group, or the group is gone.
    """
    if group is None or not under_process_group():
        return None
    handle = None if group == AUTO else group
    ranks, here = ranks_of(handle), rank()
    if not ranks:
        raise ValueError(
            "group: this process group is gone (destroy_process_group()); take monitor.state_dict(), close() the "
            "Monitor, and load the state into a new one with group= of the ranks that train now"
        )
    if here not in ranks:
        raise ValueError(
            f"group: rank {here} is not in it (ranks {_listed(ranks)}); pass another group on this rank, or group=None"
        )
    return Group(handle, ranks, ranks.index(here)) if len(ranks) > 1 else None


def _listed(ranks: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown}, ... {ranks[-1]}"
