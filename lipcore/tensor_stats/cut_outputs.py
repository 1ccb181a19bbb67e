"""Outputs of which each rank has a part along the last dimension: numbers of whole rows cannot be read from them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from lipcore.models.tensor_parallel import part_ranks

_CUT = (
    "its last dimension lies in parts on {0} ranks (tensor parallelism), and numbers of whole rows cannot be read from "
    "a part; have the plan bring the whole to each rank (output_layouts=Replicate()), or leave this out"
)


class CutOutputs:
    """Modules of a model whose parameters a plan of tensor parallelism cuts along the outputs."""

    def __init__(self, model: nn.Module) -> None:
        self._ranks = 1
        self._widths: Mapping[int, set[int]] = {}  # of the parts, by id of the module
        try:
            parts = part_ranks(model, model.named_parameters())
        except ValueError:  # over several sets of ranks: metrics of single samples say so
            return
        if parts is None:
            return
        self._ranks = len(parts.ranks)
        found: dict[int, set[int]] = {}
        for name, parameter in model.named_parameters():
            if parts.cuts.get(name) == 0:
                module = model.get_submodule(name.rpartition(".")[0])
                found.setdefault(id(module), set()).update(_parts_of(len(parameter), self._ranks))
        self._widths = found

    def why_not(self, module: nn.Module, output: Tensor, *, whole_model: bool) -> str:
        """Return why whole rows are not in an output; "" where they are. Of the `whole_model` any of them may be the
        last layer."""
        if not self._widths or not output.dim():
            return ""
        own = set().union(*self._widths.values()) if whole_model else self._widths.get(id(module), set())
        return _CUT.format(self._ranks) if output.shape[-1] in own else ""


def _parts_of(size: int, ranks: int) -> set[int]:
    """Return how long the parts are into which torch cuts a dimension."""
    step = math.ceil(size / ranks)
    return {max(0, min(step, size - i * step)) for i in range(ranks)} - {0, size}
