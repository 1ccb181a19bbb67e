"""Recording of the pieces of every activation in one forward pass, and a check that samples stay apart in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lipcore.models.checks import check_kind, finite_rows
from lipcore.models.names import named_modules, unwrap
from lipcore.models.outputs import one_per_sample
from lipcore.models.own_pass import fresh, own_pass, run
from lipcore.models.torch_internals import tree_leaves
from lipcore.regions.gates import Gate
from lipcore.regions.outside import OutsideTorch
from lipcore.regions.recorder import Recorder, is_continuous

Output = int | str | Callable[[Any], Tensor] | None


@contextmanager
def _following(model: nn.Module, path: list[str]) -> Iterator[None]:
    """Keep `path` ending with the name of the module that runs, while the context lasts."""

    def leave(*_: Any) -> None:  # what a hook returns would be taken for the module's output
        path.pop()

    handles = []
    try:
        for name, module in named_modules(model):
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: path.append(name)))
            handles.append(module.register_forward_hook(leave, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Recording:
    """Recording of what one forward pass showed."""

    gates: list[Gate]  #: in the order they ran
    head: str  #: the operation without linear pieces that the output went through at the end, or ""
    finite: Tensor  #: bool [B]: the output is
    inputs: list[Tensor]  #: of the gates, then the outputs, where asked for


def record_gates(model: nn.Module, x: Tensor, output: Output = None, *, keep_inputs: bool = False) -> Recording:
    """Record the gates of one forward pass, `output` included; ValueError where other operations come before the
    head."""
    check_kind(model)
    model = unwrap(model)
    path: list[str] = []
    recorder = Recorder(path, keep_inputs)
    # With gradients on: without them max_pool1d runs a kernel that keeps no indices.
    with own_pass(model), _following(model, path):
        _, given = fresh(x)
        recorder.followed.add(given, None)
        with recorder, OutsideTorch(recorder):
            result = run(model, given)
            if output is not None:
                result = one_per_sample(result, output, len(x))
    outputs = [leaf.detach() for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and is_continuous(leaf)]
    if not outputs:
        raise ValueError(
            f"output: no floating tensor was found in the {type(result).__name__} that the model returns; pass "
            "output=<callable that gives one value per sample>"
        )
    states = [recorder.followed[leaf] for leaf in outputs if leaf in recorder.followed]
    bent = min((state for state in states if state is not None), key=lambda state: state.smooth, default=None)
    if bent is not None and not bent.smooth:
        raise ValueError(bent.refusal())
    head = "" if bent is None else f"{bent.op} in {bent.where}"
    if not recorder.gates:
        raise ValueError(
            "model: no ReLU-family activation ran in its forward pass"
            + (f" ({head} did)" if head else "")
            + ", so it has no linear regions to tell apart"
        )
    for gate in recorder.gates:
        if len(gate.slope) != len(x):
            raise ValueError(
                f"model: activation '{gate.name}' has {len(gate.slope)} rows for {len(x)} samples; the batch must stay "
                "the first dimension"
            )
    finite = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for leaf in outputs:
        if leaf.dim() and len(leaf) == len(x):
            finite &= finite_rows(leaf).to(x.device)
    return Recording(recorder.gates, head, finite, [*recorder.inputs, *outputs] if keep_inputs else [])


def check_batch_axis(model: nn.Module, x: Tensor, output: Output = None) -> None:
    """Raise a ValueError where what one sample does depends on another. Two passes of two samples show it: with
    another sample behind it, and behind itself. A mean, a sum of the earlier ones and one of the later ones all
    differ between these places."""
    first, other = x[:1], _another(x)
    try:
        behind_itself, with_other = (
            record_gates(model, torch.cat([first, second]), output, keep_inputs=True) for second in (first, other)
        )
    except RuntimeError as error:
        raise ValueError(
            f"model: it runs with {len(x)} samples but not with two; the batch must be the first dimension and of any "
            "size"
        ) from error
    places = [*(f"activation '{gate.name}'" for gate in with_other.gates), *["its output"] * len(with_other.inputs)]
    for where, mine, theirs in zip(places, with_other.inputs, behind_itself.inputs, strict=False):
        if mine.dim() and len(mine) == 2 and not _same_row(mine, theirs):
            raise ValueError(
                f"model: {where} of one sample depends on the other samples of the batch; the batch must be the first "
                "dimension, and samples must not mix"
            )


def _another(x: Tensor) -> Tensor:
    """Make a sample that differs from the first in every entry and is in the same range; of indices, one that is
    allowed."""
    first = x[:1]
    if x.is_floating_point():
        return torch.where((2 * first - 1).abs() < 0.25, first / 2, 1 - first)  # near 1/2 they would be the same
    if x.dtype == torch.bool:
        return ~first
    differ = (x != first).reshape(len(x), -1).any(1)
    return x[differ][:1] if bool(differ.any()) else torch.zeros_like(first)


def _same_row(mine: Tensor, theirs: Tensor) -> bool:
    """Say whether the first sample of one pass and the second of the other are the same."""
    if mine.shape != theirs.shape or not mine.numel():
        return mine.shape == theirs.shape
    # Another kernel may round otherwise, but mixing shows in the leading digits.
    largest = max(float(torch.nan_to_num(part, 0.0, 0.0, 0.0).abs().max()) for part in (mine, theirs))
    slack = 100 * torch.finfo(mine.dtype).eps * largest
    return bool(torch.isclose(mine[0], theirs[1], rtol=0.0, atol=slack, equal_nan=True).all())
