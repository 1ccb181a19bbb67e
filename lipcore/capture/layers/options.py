"""How a metric wants all layers tapped."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from lipcore.capture.layers.batch_of import NoteOf, OffsetsOf
from lipcore.layers.factor import Measure, norms_sq_of
from lipcore.models.named_output import OutputChoice
from lipcore.models.names import listed


@dataclass(frozen=True)
class LayerOptions:
    """Settings of a LayerCapture.

    Attributes:
        batch_dim: batch dimension of the model's input, and of activations whose features come last.
        offsets_of: takes the model's arguments and keywords to the document boundaries of packed sequences.
        broadcast: names of layers that are called without the batch dimension.
        methods: per layer name, the method its factors are to use.
        fused: take over the weight gradient of Linears that see sequences.
        normalized: also bring the norms of the gradients at the layers' outputs and at the model's.
        skip_uncovered: leave out parameters that no rule covers instead of failing.
        prove: run a backward pass of one sample through the first pass's graph, and compare.
        output: where proofs begin: a module's name, or a key, attribute or function of what the model returns.
        note_of: takes the model's arguments and keywords to what the record of the pass is to hold of them.
        loss_of: takes what the model has returned, the number of samples, and whether backward passes of lipcore's own
            may go through the graph, to what the record keeps of its loss.
        max_replay_bytes: the most that gradients of single samples may take where they come from the autograd graph;
            0: none do.
        max_replay_flops: the most that replays for one parameter may take in one pass there; None: any number.
        fast_batch_of_one: serve batches of one from the parameters' gradients, where that has proved right.
        measure: what is made of the factors; squared norms are what the other settings speak of.
        keep_factors: records keep the factors until the next forward pass begins.
    """

    batch_dim: int = 0
    offsets_of: OffsetsOf | None = None
    broadcast: tuple[str, ...] = ()
    methods: Mapping[str, str] = field(default_factory=dict)
    fused: bool = False
    normalized: bool = False
    skip_uncovered: bool = False
    prove: bool = True
    output: OutputChoice | None = None
    note_of: NoteOf | None = None
    loss_of: Callable[[Any, int, bool], Any] | None = None
    fast_batch_of_one: bool = False
    max_replay_bytes: int = 0
    max_replay_flops: int | None = None
    measure: Measure = norms_sq_of
    keep_factors: bool = False


def check_names(options: LayerOptions, names: Collection[str], *, compiled: bool) -> None:
    """Raise ValueError for an argument that names none of these layers, which are those that are tapped, or for a
    method that compiled models lack."""
    known = listed(list(names))
    for argument, given in (("methods", options.methods), ("broadcast", options.broadcast)):
        for name in given:
            if name not in names:
                raise ValueError(f"{argument}: the model has no tapped layer {name!r}; it has {known}")
    if compiled and "estimate" in options.methods.values():
        raise ValueError(
            "methods: a compiled model has no 'estimate', whose random numbers would be part of its graph; leave it "
            "out, or run the model in eager mode"
        )
