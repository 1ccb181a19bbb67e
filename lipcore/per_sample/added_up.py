"""Squares of parts of samples' gradients, added up when a user asks for it, by the ranks that hold the parts."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lipcore.distributed.agreed import Agreed
from lipcore.distributed.contribution import Contribution, Sizes, contribute
from lipcore.distributed.packed import Packed
from lipcore.distributed.partial_sums import Partial
from lipcore.distributed.partners import Partners
from lipcore.models.tensor_parallel import PartRanks
from lipcore.per_sample.part_rows import PartRows, PassRows, bits_of, unlike_row, why_unlike
from lipcore.per_sample.pass_norms import PassNorms

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
_LOST = (
    "{0}: what ranks hold parts of could not be added up, since an error was raised on one of them ({1}); what waits "
    "for it waits on"
)
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
    names = zlib.crc32(repr((norms.names, list(norms.inputs), norms.record.broken)).encode())
    agreed, differ = _meet(parts, what, step, timeout, [norms.samples, names])
    if differ:
        alike = differ[2] == differ[4]  # samples, on this rank and on the other
        raise ValueError((_OTHER_LAYERS if alike else _OTHER).format(*differ, "samples", ""))
    if norms.record.broken:
        return norms
    last = _LastPass(norms, parts)
    unlike = _brought_together(last, agreed)
    if unlike[0]:
        raise ValueError(f"{what}: {why_unlike(last.alike[unlike[0] - 1])}")
    result = copy.copy(norms)
    result.__dict__.pop("squares", None)
    result.rows, result.parts = last.whole.to(norms.rows.device), None
    return result


def add_up_waiting(rows: PartRows, what: str, step: int, timeout: float) -> None:
    """Add up the squares of samples with ids that wait for it. A collective of the ranks that hold parts; what
    :func:`whole_norms` raises."""
    waiting = rows.waiting
    agreed, differ = _meet(rows.ranks, what, step, timeout, bits_of(waiting))
    if differ:
        rows.give_up_waiting()
        raise ValueError(_OTHER.format(*differ, "micro-batches that wait", _LEFT_OUT))
    if not waiting:
        return
    unlike = _brought_together(_Waiting(waiting, rows.ranks), agreed)
    for each, layer in zip(waiting, unlike, strict=True):  # near the bound one rank may find it so and another not
        each.unlike = each.layers[layer - 1] if layer else ""
    if named := next((each.unlike for each in waiting if each.unlike), ""):
        raise ValueError(f"{what}: {why_unlike(named)}")


class _LastPass:
    """The squares of a backward pass, as :class:`Contribution` asks for them.

    Attributes:
        alike: the layers of what all ranks hold alike, and whose inputs are.
        whole: squares of whole gradients, once they are added up; this rank's before.
    """

    def __init__(self, norms: PassNorms, parts: PartRanks) -> None:
        self._held = [i for i, name in enumerate(norms.names) if name not in parts.cuts]
        self.alike = [*(norms.layer_index.layer_of[norms.names[i]] for i in self._held), *norms.inputs]
        self.whole = norms.rows
        self._norms, self._parts, self._unlike = norms, parts, -1

    def sizes(self) -> Sizes:
        count = (2 * len(self._norms.names) + len(self._norms.inputs)) * self._norms.samples
        return Sizes(1, lambda _: 0, count, self._parts.handle, count)

    def partials(self) -> list[Partial]:
        norms, parts = self._norms, self._parts
        mine = torch.tensor([parts.counts or name in parts.cuts for name in norms.names], device="cpu")
        rows = norms.rows.cpu()
        alike = torch.cat([rows, *(row.cpu().unsqueeze(0) for row in norms.inputs.values())])
        both = torch.cat([rows.masked_fill(~mine.unsqueeze(1), 0), alike])
        return [Partial(both, parts.handle, lambda total, _: self._take(total, alike))]

    def _take(self, total: Tensor, alike: Tensor) -> None:
        count = len(self._norms.names)
        whole, every = total[:count], total[count:]
        held = [*self._held, *range(count, len(alike))]
        self._unlike = unlike_row(every[held], alike[held], len(self._parts.ranks))
        self.whole = whole.clone()

    def packed(self) -> Packed:
        return Packed([], [torch.tensor([1.0 + self._unlike], dtype=torch.float64, device="cpu")])


class _Waiting:
    """Squares that wait, as :class:`Contribution` asks for them."""

    def __init__(self, rows: Sequence[PassRows], ranks: PartRanks) -> None:
        self._rows, self._ranks = rows, ranks

    def sizes(self) -> Sizes:
        count = sum(rows.numbers for rows in self._rows)
        return Sizes(len(self._rows), lambda _: 0, count, self._ranks.handle, count)

    def partials(self) -> list[Partial]:
        return [rows.partial(self._ranks) for rows in self._rows]

    def packed(self) -> Packed:
        found = [1.0 + rows.layers.index(rows.unlike) if rows.unlike else 0.0 for rows in self._rows]
        return Packed([], [torch.tensor(found, dtype=torch.float64, device="cpu")])


def _brought_together(part: _LastPass | _Waiting, agreed: Agreed) -> list[int]:
    """Have the ranks add up a part's squares; return by number, from 1, which of what they hold alike is not: 0 for
    none. ValueError on all of them where one has raised for it."""
    contribution = Contribution(part)
    contribute([contribution], agreed)
    if contribution.lost:
        raise ValueError(_LOST.format(agreed.what, contribution.words))
    return [int(number) for number in contribution.together.largest[0].tolist()]


def _meet(parts: PartRanks, what: str, step: int, timeout: float, samples: list[int]) -> tuple[Agreed, tuple[Any, ...]]:
    """Meet the other ranks; return the call, and which of them have other samples, for words on that, () where none
    has. Where ranks differ, each of them sees one that is not as itself."""
    if parts.handle is None:
        raise RuntimeError(_COPY.format(what))
    if parts.gone:
        raise ValueError(parts.gone)
    partners = Partners(parts.handle, timeout)
    group = partners.find()
    assert group is not None
    header: dict[str, Any] = {"version": 1, "call": what, "samples": samples}
    agreed, headers = Agreed(partners, group, what, step), partners.meet(group, what, step, header)
    for rank, other in zip(group.ranks, headers, strict=True):
        if other != header:
            mine = parts.ranks[parts.place]
            theirs = other.get("samples", ["none"])[0]
            return agreed, (what, list(group.ranks), samples[0], mine, theirs, rank)
    return agreed, ()
