"""Sums over the updates of many small tensors by torch's operations for lists, for tensors on a device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lipcore.functional.update_rules import UpdateRule, sums_on_device
from lipcore.models.torch_internals import (
    foreach_add_,
    foreach_div_,
    foreach_mul,
    foreach_mul_,
    foreach_norm,
    foreach_sqrt,
    foreach_sub,
)

#: Elements of tensors that are taken together, six copies of which are held; a larger tensor is taken alone.
_TOGETHER = 1 << 22

Entry = tuple[Tensor, Tensor | None, Tensor | None, UpdateRule]


def sums_together(entries: Sequence[Entry]) -> tuple[Tensor, Tensor]:
    """Return rows and mean squares of :func:`lipcore.functional.update_sums`; at least one entry, all on one device."""
    rows, normalized = [], []
    for some in _groups(entries):
        found = _sums_of_group(some) if len(some) > 1 else tuple(part.unsqueeze(0) for part in sums_on_device(*some[0]))
        rows.append(found[0])
        normalized.append(found[1])
    return (rows[0], normalized[0]) if len(rows) == 1 else (torch.cat(rows), torch.cat(normalized))


def _groups(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Split entries, in their order, into those that are taken together."""
    group: list[Entry] = []
    elements, kind = 0, None
    for entry in entries:
        its_kind, size = _kind(entry), entry[0].numel()
        if group and (its_kind is None or its_kind != kind or elements + size > _TOGETHER):
            yield group
            group, elements = [], 0
        group.append(entry)
        elements, kind = elements + size, its_kind
    if group:
        yield group


def _kind(entry: Entry) -> tuple[object, ...] | None:
    """Return what entries that are taken together have in common; None for one that is taken alone."""
    w, a, b, rule = entry
    if not w.numel() or any(isinstance(scalar, Tensor) for scalar in rule):
        return None
    return rule.adaptive, *(None if t is None else t.dtype for t in (w, a, b))


def _sums_of_group(entries: Sequence[Entry]) -> tuple[Tensor, Tensor]:
    rules = [rule for *_, rule in entries]
    dtypes = {t.dtype for t in entries[0][:3] if t is not None}
    work = torch.float64 if torch.float64 in dtypes else torch.float32
    weights = [w.detach().to(work) for w, *_ in entries]
    first = [None if a is None else a.detach().to(work) for _, a, *_ in entries]
    second = [None if b is None else b.detach().to(work) for _, _, b, _ in entries]
    moved = foreach_mul(weights, [rule.decay for rule in rules])
    mean_squares: list[Tensor] | None = None
    if rules[0].adaptive:
        denominators = foreach_sqrt(second)
        foreach_mul_(denominators, [rule.second_scale for rule in rules])
        foreach_add_(denominators, [rule.eps for rule in rules])
        directions = foreach_mul(first, [rule.first_scale for rule in rules])
        foreach_div_(directions, denominators)
        norms = _norms(directions, 2)
        mean_squares = foreach_mul(norms, norms)
        foreach_div_(mean_squares, [float(w.numel()) for w in weights])
        foreach_mul_(directions, [rule.rate for rule in rules])
        foreach_add_(moved, directions)
    else:
        for tensors, factors in ((first, [rule.rate for rule in rules]), (second, [rule.mix for rule in rules])):
            if tensors[0] is not None:
                foreach_add_(moved, foreach_mul(tensors, factors))
    columns = [_norms(moved, 2), _norms(weights, 2), _norms(moved, torch.inf), _nonfinite(weights, moved)]
    table = torch.stack([number for column in columns for number in column]).unflatten(0, (4, len(entries)))
    table[:2].square_()
    zero = table.new_zeros(len(entries))
    rows = torch.stack([table[0], zero, zero, table[2], table[1], table[3]], dim=1)
    unusable = table[3] != 0
    rows[:, :5].masked_fill_(unusable.unsqueeze(1), torch.nan)
    if mean_squares is None:
        return rows, zero.fill_(torch.nan)
    return rows, torch.stack(mean_squares).masked_fill_(unusable, torch.nan)


def _norms(tensors: list[Tensor], order: float) -> list[Tensor]:
    norms: list[Tensor] = foreach_norm(tensors, order, dtype=torch.float64)
    return norms


def _nonfinite(weights: list[Tensor], moved: list[Tensor]) -> list[Tensor]:
    """Return the number of elements where either is not finite, float64."""
    apart = foreach_sub(weights, weights)  # 0, or NaN
    foreach_add_(apart, foreach_sub(moved, moved))
    flat = torch.cat([tensor.reshape(-1) for tensor in apart]).isnan().double()
    return _norms(list(flat.split([tensor.numel() for tensor in apart])), 1)
