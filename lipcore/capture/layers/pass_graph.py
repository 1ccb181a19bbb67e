"""The graph behind a model's output, as far as a proof looks at it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from lipcore.capture.checkpoints import runs_forward
from lipcore.capture.foreign_functions import is_foreign
from lipcore.capture.layers.layer_pass import LayerPass
from lipcore.capture.layers.layer_site import LayerSite
from lipcore.capture.once_only import why_once_only
from lipcore.models.outputs import nodes_of

_TENSORS = 6  # of the largest size that a backward pass holds at once, about, with what they are reduced in


class Graph:
    """The graph that a forward pass has left behind the model's output.

    Attributes:
        tapped: nodes with a layer of this capture.
        foreign: nodes of autograd Functions of the user's.
        runs_forward: a backward pass may run code of the forward pass again.
        refused: why the graph allows no other backward pass, or "".
        dtypes: the dtypes of gradients in the graph.
        bytes: the memory that a backward pass through the graph takes, roughly.
    """

    def __init__(self, run: LayerPass, output: Any, sites: Sequence[LayerSite]) -> None:
        mine = {id(site) for site in sites}
        self.tapped: list[Any] = []
        self.foreign: list[Any] = []
        self.runs_forward = False
        self.refused = ""
        self.dtypes: set[torch.dtype] = set()
        largest = 0
        for node in nodes_of(output):
            for data in node._input_metadata:
                self.dtypes.add(data.dtype)
                largest = max(largest, data.dtype.itemsize * math.prod(map(int, data.shape)))
            if id(getattr(node, "site", None)) in mine and getattr(node, "run", None) is run:
                self.tapped.append(node)
            self.runs_forward = self.runs_forward or runs_forward(node)
            once = why_once_only(node)
            if once:
                self.refused = once
            elif is_foreign(node):
                self.foreign.append(node)
        self.bytes = _TENSORS * largest
