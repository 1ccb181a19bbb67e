"""The rule of a module that has none, by a graph of its own: its forward is run once more in the backward pass, on the
input that its call has saved, and that graph is measured like a model's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lipcore.capture.graph.graph_ways import Followed, GraphWays
from lipcore.capture.graph.other_graph import Call
from lipcore.capture.graph.walk import Walk
from lipcore.capture.training_pass import in_backward
from lipcore.layers import Batch, Factor, Rule, norms_sq_of
from lipcore.models.containers import exchanged_leaves, leaves_of
from lipcore.models.pause import paused
from lipcore.models.restored import all_put_back, without_cached_casts

_TOLERANCE, _TOLERANCE_HALF = 1e-3, 5e-2  # of a norm, relative
_REFUSED = "its own graph, in which it is run once more in the backward pass, does not show its parameters: {0}"


@dataclass(frozen=True)
class _Call:
    """The rest of a call, into which its saved tensors are to be put back."""

    arguments: Any  # with an object in the place of each tensor
    batch: Batch
    autocast: tuple[bool, torch.dtype]


class _Place:
    """The place of a tensor that is saved."""


class OwnGraph(Rule):
    """The rule of one module's own parameters, for calls whose tensors a checkpoint keeps.

    Args:
        module: without parameters in modules inside it.
        keys: of its parameters.
        max_bytes, max_flops: as of :class:`GraphWays`.
    """

    methods = ()
    how = "a graph of its own, run in the backward pass"

    def __init__(self, module: nn.Module, keys: tuple[str, ...], max_bytes: int, max_flops: int | None) -> None:
        self.keys = keys
        self._ways = GraphWays(module, max_bytes=max_bytes, max_flops=max_flops, prove=True, whole=True)

    def save(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], batch: Batch
    ) -> tuple[tuple[Tensor, ...], Any]:
        tensors = [leaf for leaf in leaves_of((arguments, keywords)) if isinstance(leaf, Tensor)]
        if batch.offsets is not None or not any(_has_batch(tensor, batch) for tensor in tensors):
            raise ValueError(f"expected {batch.size} samples at dimension {batch.dim} of an argument")
        kind = tensors[0].device.type
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        places = exchanged_leaves(lambda leaf: _Place if isinstance(leaf, Tensor) else leaf, (arguments, keywords))
        # What is changed in place between the two runs is legal where the module keeps none of it.
        return tuple(tensor.detach().clone() for tensor in tensors), _Call(places, batch, autocast)

    def factors(self, module: nn.Module, grad_output: Tensor, extra: Any, *saved: Tensor) -> dict[str, Factor]:
        with _run_again(module, self.keys, extra, saved) as (output, parameters, call):
            return self._measured(output, parameters, call, extra.batch, grad_output, due=False)

    def refusal(
        self, module: nn.Module, output: Any, extra: Any, saved: tuple[Tensor, ...]
    ) -> tuple[str, dict[str, int]]:
        """Return why a call cannot be measured so, or "", and how often each parameter is used in it. One sample's
        gradient is compared with autograd's."""
        theirs, batch = output[0] if isinstance(output, tuple) and output else output, extra.batch
        if not isinstance(theirs, Tensor):
            return f"it returns a {type(output).__name__} whose first is no tensor", {}
        try:
            with _run_again(module, self.keys, extra, saved) as (mine, parameters, call):
                if not torch.equal(mine, theirs):
                    return "it makes something else when it is run again", {}
                generator = torch.Generator().manual_seed(0)
                grad = torch.randn(mine.shape, generator=generator).to(mine)
                factors = self._measured(mine, parameters, call, batch, grad, due=True)
                sample = batch.size // 2
                dim = self.sample_dim(module, grad, batch)
                alone = torch.zeros_like(grad)
                alone.select(dim, sample).copy_(grad.select(dim, sample))
                exact = torch.autograd.grad(mine, list(parameters.values()), alone, retain_graph=True)
                rows = norms_sq_of(factors)
                half = mine.dtype in (torch.float16, torch.bfloat16) or extra.autocast[0]
                for key, found in zip(parameters, exact, strict=True):
                    norm, row = float(found.double().norm()), float(rows[key].sqrt()[sample])
                    if not abs(norm - row) <= (_TOLERANCE_HALF if half else _TOLERANCE) * max(norm, row):
                        return f"of one sample, '{key}' has a gradient of norm {row:.6g}, and of {norm:.6g}", {}
                walk = Walk(mine)
                leaves = walk.parameters({id(parameter): key for key, parameter in parameters.items()})
                each = [child for behind in walk.next for child in behind]
                return "", {key: each.count(place) for place, key in leaves.items()}
        except (ValueError, RuntimeError) as error:
            return str(error), {}

    def _measured(
        self,
        output: Tensor,
        parameters: Mapping[str, nn.Parameter],
        call: Call,
        batch: Batch,
        grad: Tensor,
        *,
        due: bool,
    ) -> dict[str, Factor]:
        counts, errors = _Counts(), list[Exception]()
        found: Followed = self._ways.follow(output, call, batch, parameters, counts, errors.append, due=due)
        why = next(iter(found.refused.values()), "") or found.unproved
        if why or found.replay is None:
            raise ValueError(_REFUSED.format(why))
        torch.autograd.grad(output, list(parameters.values()), grad.to(output), retain_graph=due)
        if errors:
            raise errors[0]
        with torch.no_grad():
            return dict(found.replay.factors(counts.task))


class _Counts:
    """The answer that every backward pass is to be recorded, which notes its number."""

    task = -1

    def __call__(self) -> bool:
        self.task = in_backward()
        return True


@contextmanager
def _run_again(
    module: nn.Module, keys: tuple[str, ...], call: _Call, saved: tuple[Tensor, ...]
) -> Iterator[tuple[Tensor, dict[str, nn.Parameter], Call]]:
    """Run a module's forward on parameters of the same values, at which nobody's hooks are; within the with block these
    are in the module."""
    tensors = iter(saved)
    arguments, keywords = exchanged_leaves(lambda leaf: next(tensors) if leaf is _Place else leaf, call.arguments)
    before = {key: module._parameters[key] for key in keys}
    parameters = {key: nn.Parameter(p.detach()) for key, p in before.items() if p is not None}
    enabled, dtype = call.autocast
    with (
        all_put_back(module),
        torch.enable_grad(),
        torch.autocast(saved[0].device.type, dtype, enabled),
        without_cached_casts(),
        paused(),
    ):
        module._parameters.update(parameters)
        try:
            output = module.forward(*arguments, **keywords)
            output = output[0] if isinstance(output, tuple) else output
            yield output, parameters, Call(arguments, keywords)
        finally:
            module._parameters.update(before)


def _has_batch(tensor: Tensor, batch: Batch) -> bool:
    return tensor.dim() > batch.dim and tensor.shape[batch.dim] == batch.size
