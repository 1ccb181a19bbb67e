"""The ranks over which a plan of tensor parallelism has cut a model's parameters, and along which dimension each is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lipcore.models.chains import home_of
from lipcore.models.dtensors import is_in_parts
from lipcore.models.gathered import fully_sharded
from lipcore.models.ranks import rank, ranks_of, under_process_group
from lipcore.models.torch_internals import fsdp_groups

MESH_GONE = (
    "its parameters lie on a device mesh whose process group is gone (destroy_process_group()), and which is of no "
    "other: close() the Monitor, make model, optimizer and Monitor anew on a mesh of the ranks that train now, and "
    "load the states of all three (torch.distributed.checkpoint)"
)
_SEVERAL = (
    "model: its parameters are cut over several sets of ranks ({0} and {1}), as in a plan of tensor parallelism on "
    "more than one mesh dimension; samples' gradients are added up over one set alone. Leave metrics of single samples "
    "out"
)


@dataclass(frozen=True)
class PartRanks:
    """The ranks that hold parts of the parameters of one model, and see the same samples.

    Attributes:
        ranks: their global numbers.
        place: of this rank among them.
        handle: what collectives take as `group`.
        cuts: parameter -> the dimension along which it is cut; the others are held alike.
        on_mesh: those that are DTensors of these ranks, cut or not.
    """

    ranks: tuple[int, ...]
    place: int
    handle: Any = field(repr=False, compare=False)
    cuts: Mapping[str, int] = field(compare=False)
    on_mesh: frozenset[str] = field(compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"handle": None}  # a process group is of one process

    @property
    def gone(self) -> str:
        """Reason why the ranks cannot add up what they have; "" where their process group is there."""
        return "" if ranks_of(self.handle) else f"model: {MESH_GONE}"

    @property
    def counts(self) -> bool:
        """True on the one rank that counts samples, and what all hold alike."""
        return self.place == 0


def part_ranks(model: nn.Module, parameters: Iterable[tuple[str, Tensor]]) -> PartRanks | None:
    """Return the ranks that hold parts of a model's parameters; None where a rank has them whole, but for what
    fully_shard() gathers.

    Args:
        model: what has them.
        parameters: (name, tensor) of each.

    Raises:
        ValueError: parameters are cut over several sets of ranks, or over a mesh of a process group that is gone.
    """
    if not under_process_group():
        return None
    sharded = _sharded_over(model)
    anywhere = set().union(*averaging_ranks(model))  # of one that was replaced, until fully_shard() has noticed it
    groups: dict[tuple[int, ...], Any] = {}
    cuts: dict[str, int] = {}
    on_mesh: set[str] = set()
    for name, tensor in parameters:
        for dim, placement in enumerate(getattr(tensor, "placements", ())):
            handle, ranks = _group_along(tensor.device_mesh, dim)  # type: ignore[attr-defined]
            if len(ranks) > 1 and not sharded.get(id(tensor), anywhere).issuperset(ranks):
                groups.setdefault(ranks, handle)
                on_mesh.add(name)
                if (cut := getattr(placement, "dim", None)) is not None:
                    cuts[name] = cut % tensor.dim()
    if not groups:
        return None
    if len(groups) > 1:
        first, second, *_ = groups
        raise ValueError(_SEVERAL.format(list(first), list(second)))
    ((ranks, handle),) = groups.items()
    return PartRanks(ranks, ranks.index(rank()), handle, cuts, frozenset(on_mesh))


def _group_along(mesh: Any, dim: int) -> tuple[Any, tuple[int, ...]]:
    """Return the process group along a dimension of a mesh, and its ranks. A mesh knows its groups by names, under
    which there may be other ones, or none, once they were destroyed."""
    handle = None
    with suppress(KeyError, ValueError, RuntimeError):  # as torch's versions say of a name that they do not know
        handle = mesh.get_group(dim)
    ranks = () if handle is None else ranks_of(handle)
    here = mesh.get_coordinate()
    if here is None or sorted(ranks) != sorted(mesh.mesh[(*here[:dim], slice(None), *here[dim + 1 :])].tolist()):
        raise ValueError(f"model: {MESH_GONE}")
    return handle, ranks


def runs_in_parts(module: nn.Module) -> bool:
    """Return whether the function in the place of a module's forward calls the class's own on DTensors, since a plan of
    transformers' (`tp_plan=`) has cut its parameters: it makes them of what comes in, and of what goes out what the
    plan says, and changes no numbers."""
    forward = vars(module).get("forward")
    home = home_of(forward).split(".")
    if home[0] != "transformers" or home[-1] != "tensor_parallel":
        return False
    inside = (cell.cell_contents for cell in getattr(forward, "__closure__", None) or ())
    own = any(getattr(value, "__func__", None) is type(module).forward for value in inside)
    return own and any(is_in_parts(p) for p in module._parameters.values() if p is not None)


def averaging_ranks(model: nn.Module) -> list[set[int]]:
    """Return the sets of ranks among which fully_shard() gathers and reduces, as far as this rank is concerned: one,
    where all modules are sharded over the same."""
    groups = (group for module in fully_sharded(model) for group in fsdp_groups(module))
    found = {frozenset(group.mesh_info.mesh.mesh.flatten().tolist()) for group in groups}
    return [set(ranks) for ranks in sorted(found, key=sorted)]


def _sharded_over(model: nn.Module) -> dict[int, set[int]]:
    """Return the ranks among which fully_shard() gathers a parameter, by the id of its part."""
    found: dict[int, set[int]] = {}
    for module in fully_sharded(model):
        for group in fsdp_groups(module):
            ranks = set(group.mesh_info.mesh.mesh.flatten().tolist())
            found |= dict.fromkeys((id(each.sharded_param) for each in group.fsdp_params), ranks)
    return found
