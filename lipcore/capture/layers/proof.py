"""The first pass proves itself: of one sample's outputs alone, every layer must bring that sample's exact gradient and
nothing for the others.

Shapes cannot tell positions [T] from samples where T = B, and hooks do not see what a function does with a layer's
weight, what a hook did to an output, or that the model sorts or mixes its samples. One more backward pass, from one
sample's outputs, shows all of these.
"""

from __future__ import annotations

import functools
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lipcore import functional
from lipcore.capture.layers.coverage import UNSEEN, ParameterCoverage
from lipcore.capture.layers.layer_pass import ERROR, LayerPass
from lipcore.capture.layers.layer_site import LayerSite
from lipcore.capture.training_pass import in_backward
from lipcore.layers import Batch
from lipcore.models.outputs import nodes_of, tensors_of
from lipcore.models.restored import RandomPass, buffers_put_back, random_numbers_put_back
from lipcore.models.torch_internals import has_backward_hooks

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of a norm, relative
_TOLERANCE_HALF = 5e-2  # where activations are of half precision
_LEAST = 1e-3  # gradients under this share of the whole are compared with it: rounding is as large
_MIXED = (
    "of one sample's outputs alone, its gradient has parts at other samples ({0:.3g} of its norm). Either the layer is "
    "called without the batch dimension (name it in broadcast=), or the batch dimension is not where it is looked for "
    "(batch_dim=), or the model mixes its samples (statistics over the batch, sorting), and then there are no "
    "gradients per sample"
)
_OTHER = (
    "of one sample, its layer's calls bring a gradient of norm {0:.6g}, and autograd one of {1:.6g}: it is also used "
    "by something other than its layer's call (F.linear with its weight, functional_call with other tensors), or a "
    "hook changes what the layer returns"
)


def disproved(
    model: nn.Module, run: LayerPass, output: Any, coverage: ParameterCoverage, sites: list[LayerSite]
) -> dict[str, str] | None:
    """Return the parameters whose norms are wrong, and why; None where this pass can prove nothing: no output has a
    batch dimension, its graph allows no other backward pass (reentrant checkpoints, compiled regions that reuse memory,
    autograd Functions of the user's, which may free or reuse what they keep), or others would see it."""
    if not _is_private(model) or _has_functions(output):
        return None
    sample = run.batch.size // 2
    outputs, seeds = _of_sample(output, run.batch, sample)
    # A hook on a parameter rewrites its gradient, and no sample's.
    parameters = {name: p for name, p in coverage.measured().items() if not p._backward_hooks}
    while outputs:
        found = None
        with suppress(RandomPass), random_numbers_put_back(model), buffers_put_back(model):  # a checkpoint runs again
            found = _backward(run, outputs, seeds, parameters)
        if found is None:
            return None
        norms, probed, proof = found
        calls = torch.stack(
            [columns[-1].max() for columns in probed.values()] or [torch.ones((), device="cpu")]
        )  # NaN wins
        if bool((calls > 1).any()):
            return None  # refused when they are read
        if not proof.spoiled and not bool(calls.isnan().any()):
            rows = dict(proof.record(coverage.covered).norms_sq)
            for site in sites:
                if site.number in probed:
                    rows.update(zip(site.columns, probed[site.number][:-1], strict=False))
            if not rows:
                return None  # compiled before the hooks were there: refused after two steps
            half = any(t.dtype in (torch.float16, torch.bfloat16) for t in (*outputs, *parameters.values()))
            half |= torch.is_autocast_enabled(outputs[0].device.type)
            return _wrong(rows, norms, sample, half)
        # A layer's second output (attention weights) is among these, which need not enter the loss.
        outputs, seeds = outputs[:-1], seeds[:-1]
    return None


def _backward(
    run: LayerPass, outputs: list[Tensor], seeds: list[Tensor], parameters: dict[str, nn.Parameter]
) -> tuple[dict[str, Norm], dict[int, Tensor], LayerPass] | None:
    """Return the norm of each parameter's gradient, what came to the probes, and what the layers brought; None where
    the graph does not allow it."""
    norms: dict[str, Norm] = {}
    task = []  # of this backward pass: others, in other threads, go through the parameters' hooks meanwhile

    def taken(name: str, gradient: Tensor) -> Tensor:
        if in_backward() not in task:
            return gradient
        # All gradients at once, beside all activations, would be the largest memory of the training.
        norms[name] = Norm(gradient.dtype, functional.sample_norms(_values(gradient)[None])[0])
        return gradient if gradient.is_sparse else gradient.new_zeros(()).expand(gradient.shape)

    handles = [output.register_hook(lambda _: task.append(in_backward())) for output in outputs]
    handles += [p.register_hook(functools.partial(taken, name)) for name, p in parameters.items()]
    run.proof = proof = LayerPass(run.batch, run.frozen)
    proof.calls = run.calls
    wanted = [*parameters.values(), *run.probes.values()]
    try:
        with torch.autocast(outputs[0].device.type, enabled=False):
            found = torch.autograd.grad(outputs, wanted, seeds, retain_graph=True, allow_unused=True)
    except RuntimeError:
        return None
    finally:
        run.proof = None
        for handle in handles:
            handle.remove()
    columns = dict(zip(run.probes, found[len(parameters) :], strict=True))
    for name in parameters:
        norms.setdefault(name, Norm(torch.float64, torch.zeros((), dtype=torch.float64, device="cpu")))
    return norms, {number: rows for number, rows in columns.items() if rows is not None}, proof


class Norm(NamedTuple):
    dtype: torch.dtype
    value: Tensor


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _is_private(model: nn.Module) -> bool:
    """Return whether nobody would take this for the training's backward pass: not with hooks on modules' backward
    passes, nor those of sharded models. (Hooks on tensors cannot be asked for: they see one more pass.)"""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    return not has_backward_hooks(model)


def _has_functions(output: Any) -> bool:
    """Return whether an autograd Function that is neither torch's nor lipcore's is in the graph."""
    for node in nodes_of(output):
        kind = getattr(type(node), "_forward_cls", None)
        if kind is not None and kind.__module__.split(".")[0] not in ("torch", "lipcore"):
            return True
    return False


def _of_sample(output: Any, batch: Batch, sample: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs with a batch dimension, and for each random gradients at this sample alone."""
    outputs, seeds = [], []
    generator = torch.Generator().manual_seed(0)
    rows, begin, end = batch.size, sample, sample + 1
    if batch.offsets is not None:
        rows, begin, end = (int(n) for n in (batch.offsets[-1], batch.offsets[sample], batch.offsets[sample + 1]))
    for tensor in tensors_of(output):
        dim = batch.dim if batch.offsets is None and tensor.dim() > batch.dim else 0
        if tensor.is_leaf or not tensor.is_floating_point() or not tensor.dim() or tensor.shape[dim] != rows:
            continue
        if dim and tensor.shape[0] == rows:
            continue  # [B, B, ...]: which of them is the batch?
        seed = torch.zeros_like(tensor)
        part = seed.narrow(dim, begin, end - begin)
        part.copy_(torch.randn(part.shape, generator=generator, device="cpu"))
        outputs.append(tensor)
        seeds.append(seed)
    return outputs, seeds


def _wrong(rows: dict[str, Tensor], norms: dict[str, Norm], sample: int, half: bool) -> dict[str, str]:
    exact = {name: float(norm.value) for name, norm in norms.items()}
    total = max(exact.values(), default=0.0)
    wrong = {}
    for name, norm in exact.items():
        row = rows[name].sqrt().cpu() if name in rows else torch.zeros(0, device="cpu")
        mine = float(row[sample]) if len(row) else 0.0
        others = float(row.sum()) - mine if len(row) else 0.0
        tolerance = _TOLERANCE_HALF if half else _TOLERANCE.get(norms[name].dtype, _TOLERANCE_HALF)
        slack = tolerance * max(norm, mine, _LEAST * total)
        if name not in rows and not norm <= slack:
            wrong[name] = UNSEEN
        elif not others <= slack:
            wrong[name] = _MIXED.format(others / max(mine + others, 1e-300))
        elif ERROR + name not in rows and not abs(mine - norm) <= slack:  # an estimate is not the norm
            wrong[name] = _OTHER.format(mine, norm)
    return wrong
