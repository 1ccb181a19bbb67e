"""Proofs that all ranks run together, of a batch that the user gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lipcore.capture.layers.asked_proof import AskedProof
from lipcore.capture.layers.layer_capture import LayerCapture
from lipcore.capture.training_pass import given_pass
from lipcore.distributed.group import Group
from lipcore.distributed.partners import Partners
from lipcore.models.gathered import in_parts, let_go
from lipcore.models.ranks import world_size
from lipcore.models.restored import all_put_back, without_cached_casts

_CALL = "monitor.prove()"
_STOPPED, _RAISED = "it has stopped", "on another rank the forward pass raised an error"
_INACTIVE = "this step is not recorded (every_steps)"


def prove_together(
    model: nn.Module,
    captures: Mapping[str, LayerCapture],
    batch: Any,
    partners: Partners,
    step: int,
    off: Iterable[str],
    inputs: Mapping[str, Callable[[Any, Any], str]],
) -> dict[str, str]:
    """Return, by metric, what the proof of a batch has left unproved, and on which rank; the same on all ranks.

    Args:
        captures: of the metrics of single samples.
        batch: of this rank.
        partners: the other ranks.
        step: the number of steps that this rank has made.
        off: metrics that have stopped.
        inputs: by metric whose numbers are about the model's input, what proves them of the arguments and keywords of a
            call, in passes of its own.
    """
    arguments, keywords = _as_call(batch)
    group = partners.find()
    _check_mesh(model, group, partners)
    off = set(off)
    state = {name: _state(capture, stopped=name in off) for name, capture in captures.items()}
    state |= {name: _STOPPED if name in off else "" for name in inputs}
    headers = _met(partners, group, step, {"version": 1, "call": _CALL, "metrics": list(map(list, state.items()))})
    _check_alike(headers, group)
    able = {name: capture for name, capture in captures.items() if not state[name]}
    error: Exception | None = None
    found, asked = dict(state), dict[str, AskedProof]()
    with ExitStack() as stack:
        stack.callback(let_go, model)
        for capture in able.values():
            stack.enter_context(capture.awake())
        try:
            asked = _run(model, arguments, keywords, able) if captures else {}
        except Exception as raised:  # the other ranks wait for a word of this one
            error = raised
            why = f"the forward pass raised {type(raised).__name__}: {str(raised)[:200]}"
            found |= dict.fromkeys([name for name, off in state.items() if not off], why)
        waits = {name: name in asked and asked[name].waits for name in able}
        second = {"version": 1, "call": f"{_CALL}, its second part", "waits": waits, "raised": error is not None}
        ready = _met(partners, group, step, second)
        for name, proof in asked.items():
            together = all(other["waits"].get(name) for other in ready)
            found[name] = able[name].finish_proof(proof, together=together)
        if not any(other["raised"] for other in ready):
            found |= {name: prove(arguments, keywords) for name, prove in inputs.items() if not state[name]}
        elif error is None:
            found |= {name: _RAISED for name in inputs if not state[name]}
    told = _met(partners, group, step, {"version": 1, "call": f"{_CALL}, what it found", "found": found})
    if error is not None:
        raise error
    if group is None:
        return found
    return {name: _of_all(name, told, group) for name in (*captures, *inputs)}


def _run(
    model: nn.Module, arguments: Any, keywords: Any, captures: Mapping[str, LayerCapture]
) -> dict[str, AskedProof]:
    """Run the forward pass, and return the proofs in it; what it changes gets its value back."""
    with ExitStack() as stack:
        stack.enter_context(all_put_back(model, random=True, writes=False))
        stack.enter_context(_unsynchronised(model))
        stack.enter_context(given_pass())
        asked = {name: stack.enter_context(capture.proving()) for name, capture in captures.items()}
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(without_cached_casts())
        model(*arguments, **keywords)
    return asked


@contextmanager
def _unsynchronised(model: nn.Module) -> Iterator[None]:
    """Keep DistributedDataParallel from waiting for the backward pass of a forward pass that has none."""
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        yield
        return
    before = model.require_forward_param_sync
    with model.no_sync():
        yield
    model.require_forward_param_sync = before


def _as_call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


def _state(capture: LayerCapture, *, stopped: bool) -> str:
    """Return why this rank cannot take part in a metric's proof, or ""."""
    if stopped or not capture.watches:
        return _STOPPED
    return "" if capture.active or capture.resting else _INACTIVE


def _check_mesh(model: nn.Module, group: Group | None, partners: Partners) -> None:
    """Raise where ranks that hold parts of the model would not take part, and so would be waited for."""
    held = in_parts(model, ((name, "", parameter) for name, parameter in model.named_parameters()))
    meshes = [p.device_mesh.mesh.flatten().tolist() for *_, p in held if hasattr(p, "device_mesh")]
    apart = partners.none_asked_for and world_size() > 1
    here = set(() if group is None else group.ranks)
    for ranks in meshes:
        if len(ranks) > 1 and (apart or not here.issuperset(ranks)):
            raise ValueError(
                f"group: the model's parameters are spread over ranks {', '.join(map(str, ranks[:8]))}, all of which "
                "have to run a proof together; pass these, or all, as group= of the Monitor"
            )


def _met(partners: Partners, group: Group | None, step: int, header: dict[str, Any]) -> Sequence[dict[str, Any]]:
    return [header] if group is None else partners.meet(group, _CALL, step, header)


def _check_alike(headers: Sequence[Mapping[str, Any]], group: Group | None) -> None:
    """Raise ValueError, on all ranks alike, where these would not run the same passes."""
    if group is None:
        return
    first = headers[0]
    for rank, other in zip(group.ranks, headers, strict=True):
        if other["call"] != first["call"]:
            raise ValueError(
                f"{_CALL}: ranks are at {first['call']} (rank {group.ranks[0]}) and {other['call']} (rank {rank}); all "
                "ranks have to make the same call"
            )
    for rank, other in zip(group.ranks, headers, strict=True):
        if other["metrics"] != first["metrics"]:
            mine, theirs = (_words(header["metrics"]) for header in (first, other))
            raise ValueError(
                f"{_CALL}: rank {group.ranks[0]} would prove {mine}, and rank {rank} {theirs}, so no rank has run "
                "anything; the ranks of a model need the same metrics, which go on everywhere, at the same step"
            )


def _words(metrics: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{name} (not: {why})" if why else name for name, why in metrics) or "nothing"


def _of_all(name: str, told: Sequence[Mapping[str, Any]], group: Group) -> str:
    each = ((rank, header["found"][name]) for rank, header in zip(group.ranks, told, strict=True))
    return "; ".join(f"rank {rank}: {why}" for rank, why in each if why)
