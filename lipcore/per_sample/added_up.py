"""Squares of parts of samples' gradients, added up when a user asks for it, by the ranks that hold the parts."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lipcore.distributed.partial_sums import Partial, add_up
from lipcore.distributed.partners import Partners
from lipcore.models.tensor_parallel import PartRanks
from lipcore.per_sample.part_rows import PartRows, PassRows, bits_of, unlike_row
from lipcore.per_sample.pass_norms import PassNorms
from lipcore.per_sample.rank_part import UNLIKE

#: Why the last pass's norms cannot be read.
ASK = (
    "{0}: parts of the model's parameters lie on ranks {1} (tensor parallelism), and the norm of a sample is the root "
    "of a sum over them; call sync_norms() on each of these ranks first, behind the same backward pass"
)
_OTHER = (
    "{0}: ranks {1} hold parts of the same gradients, and have recorded other samples ({2} {6} on rank {3}, {4} on "
    "rank {5}, or other sizes or ids); give these ranks the same batches and ids{7}"
)
_OTHER_LAYERS = (
    "{0}: ranks {1} hold parts of the same gradients, and ranks {3} and {5} have not recorded the same layers of this "
    "pass, or one could not record it (norms.broken says why); give these ranks the same metric and settings"
)
_LEFT_OUT = ". These micro-batches are left out of the scores"
_COPY = "{0}: this is a copy of a metric, which does not reach the other ranks; call it on the original"


def whole_norms(norms: PassNorms, what: str, step: int, timeout: float) -> PassNorms:
    """Return the norms of a backward pass with what all ranks hold of them. A collective of these ranks.

    Args:
        what: for which call, in words.
        step: the number of steps that this rank has made.
        timeout: seconds to wait for the others.

    Raises:
        RuntimeError: a rank has not come, or is elsewhere. No collective was started.
        ValueError: ranks have other samples, or have not seen the same of them.
    """
    parts = norms.parts
    assert parts is not None
    names = zlib.crc32(repr((norms.names, norms.record.broken)).encode())
    if differ := _meet(parts, what, step, timeout, [norms.samples, names]):
        alike = differ[2] == differ[4]  # samples, on this rank and on the other
        raise ValueError((_OTHER_LAYERS if alike else _OTHER).format(*differ, "samples", ""))
    if norms.record.broken:
        return norms
    mine = torch.tensor([parts.counts or name in parts.cuts for name in norms.names], dtype=torch.bool, device="cpu")
    rows = norms.rows.cpu()
    added = rows.masked_fill(~mine.unsqueeze(1), 0)
    found: list[Tensor] = []
    add_up([Partial(torch.cat([added, rows]), parts.handle, lambda total, _: found.append(total))])
    whole, every = found[0].split(len(rows))
    alike = [i for i, name in enumerate(norms.names) if name not in parts.cuts]
    unlike = unlike_row(every[alike], rows[alike], len(parts.ranks))
    flag = torch.tensor([float(unlike >= 0)], dtype=torch.float64, device="cpu")
    add_up([Partial(flag, parts.handle, lambda total, _: found.append(total))])
    if float(found[1]):
        layer = norms.layer_index.layer_of[norms.names[alike[max(unlike, 0)]]]
        raise ValueError(f"{what}: {UNLIKE.format(layer)}")
    result = copy.copy(norms)
    result.__dict__.pop("squares", None)
    result.rows, result.parts = whole.to(norms.rows.device), None
    return result


def add_up_waiting(rows: PartRows, what: str, step: int, timeout: float) -> None:
    """Add up the squares of samples with ids that wait for it. A collective of the ranks that hold parts; what
    :func:`whole_norms` raises."""
    waiting = rows.waiting
    if differ := _meet(rows.ranks, what, step, timeout, bits_of(waiting)):
        rows.give_up_waiting()
        raise ValueError(_OTHER.format(*differ, "micro-batches that wait", _LEFT_OUT))
    add_up([each.partial(rows.ranks) for each in waiting])
    _agree(waiting, rows.ranks)
    unlike = next((each.unlike for each in waiting if each.unlike), "")
    if unlike:
        raise ValueError(f"{what}: {UNLIKE.format(unlike)}")


def _agree(waiting: Sequence[PassRows], ranks: PartRanks) -> None:
    """Have all ranks say the same of what they hold alike: near the bound one rank may find it so and another not."""

    def take(found: Tensor, _: Tensor) -> None:
        for rows, count in zip(waiting, found.tolist(), strict=True):
            rows.unlike = (rows.unlike or rows.layers[0]) if count else ""

    if waiting:
        found = [float(bool(each.unlike)) for each in waiting]
        add_up([Partial(torch.tensor(found, dtype=torch.float64, device="cpu"), ranks.handle, take)])


def _meet(parts: PartRanks, what: str, step: int, timeout: float, samples: list[int]) -> tuple[Any, ...]:
    """Meet the other ranks; return which of them have other samples, for words on that, () where none has. Where
    ranks differ, each of them sees one that is not as itself."""
    if parts.handle is None:
        raise RuntimeError(_COPY.format(what))
    partners = Partners(parts.handle, timeout)
    group = partners.find()
    assert group is not None
    header: dict[str, Any] = {"version": 1, "call": what, "samples": samples}
    headers = partners.meet(group, what, step, header)
    for rank, other in zip(group.ranks, headers, strict=True):
        if other != header:
            mine = parts.ranks[parts.place]
            return what, list(group.ranks), samples[0], mine, other.get("samples", ["none"])[0], rank
    return ()
