"""The frontier of a parameter: the nodes of the graph where a tensor without the batch first meets one with it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lipcore.capture.foreign_functions import function_of
from lipcore.capture.graph.row_moves import Moves, keeps_samples
from lipcore.capture.graph.row_views import RowViews
from lipcore.capture.graph.walk import VIEWS, Walk, shapes

_LISTS = ("CatBackward0", "StackBackward0")  # of samples, or of their pictures
_MAY_LACK = ("view", "SliceBackward0")  # in one of two graphs
_WRITE = "torch::autograd::CopySlices"
_ALONE = (
    "it is used for some of the samples, and the same model on one sample more uses it in another place; call its "
    "layer on all of them, and choose among what it returns (torch.where)"
)
_OTHER = "the model's graph is another one for one sample more ({0})"


_BY_SIZE = (
    ": torch.cdist has another formula from 26 rows on; give it the same one for all sizes, "
    "compute_mode='use_mm_for_euclid_dist', or use another batch size"
)


class GraphsDiffer(ValueError):
    """The reason why two graphs of one model are not the same but for shapes."""


FUSED = "its layer is fused, whose backward cannot be run once more; pass fused=False"
#: In the place of a dimension: all of the gradient is one sample's.
EVERYTHING = -1


@dataclass(frozen=True)
class Frontier:
    """The part of a graph that parameters without a rule are in, as places in the walk.

    Attributes:
        leaves: by place of a leaf, the parameter's name.
        free: places of nodes behind the frontier, leaves among them: those without the batch, and those where it cannot
            be told which rows are whose (a mixture's experts).
        nodes: places of frontier nodes, with the batch's dimension at each output; None for others.
        refused: why a parameter cannot be measured so.
        behind: by parameter, the free places that its gradient comes through.
        indexed: places of nodes that would move rows if their index were not each sample's own.
        loose: frontier nodes whose rows may be others' in a pass that is not proved.
        moved: free places of tensors with the batch, whose rows the model has chosen.
        turns: whether samples take turns in the rows of a frontier node, as far as views near it say.
        returned: free places of tensors that the model returns: nothing with the batch is behind them, or their rows
            are in an order of the model's own (the features of pictures).
    """

    leaves: dict[int, str]
    free: frozenset[int]
    nodes: dict[int, tuple[int | None, ...]]
    refused: dict[str, str]
    behind: dict[str, frozenset[int]]
    indexed: frozenset[int] = frozenset()
    loose: frozenset[int] = frozenset()
    moved: frozenset[int] = frozenset()
    turns: Mapping[int, bool] = field(default_factory=dict)
    returned: frozenset[int] = frozenset()

    def samples_kept(self, walk: Walk, samples: int) -> bool:
        """Return whether nodes that took each sample's own row do so in this pass's graph too."""
        return all(keeps_samples(walk.nodes[place], samples) for place in self.indexed)

    def met(self, name: str, walk: Walk) -> set[int]:
        """Return the frontier nodes of one parameter."""
        return {place for place in self.nodes if not self.behind[name].isdisjoint(walk.next[place])}

    def rows(self, place: int, walk: Walk) -> int:
        """Return how many rows the gradient at a frontier node has in a pass's graph."""
        each = zip(self.nodes[place], walk.shapes(place), strict=True)
        return next((1 if dim == EVERYTHING else shape[dim] for dim, shape in each if dim is not None), 0)


def frontier_of(
    walk: Walk,
    other: Walk,
    names: Mapping[int, str],
    samples: int,
    absorbed: Container[int] = (),
    *,
    joining: bool = False,
) -> Frontier:
    """Find the frontier by a graph of the same model on one sample more.

    Args:
        walk: the graph of `samples` samples.
        other: that of one more.
        names: of the parameters, by id.
        samples: B.
        absorbed: places that are to be behind the frontier, since their rows are in an order of the model's own.
        joining: so are those from where the model puts samples together again that it has taken apart.

    Raises:
        GraphsDiffer: with the place where they do.
    """
    computed = set[int]()
    pairs = paired(walk, other, names, samples, computed)
    before_input = walk.behind(computed)
    leaves = walk.parameters(names)
    parents: list[list[int]] = [[] for _ in walk.nodes]
    for place, children in enumerate(walk.next):
        for child in children:
            if child >= 0:
                parents[child].append(place)
    free, nodes, refused = set(leaves), dict[int, tuple[int | None, ...]](), dict[str, str]()
    behind: dict[str, frozenset[int]] = {}
    moves = Moves(walk, samples, joining=joining)
    loose: set[int] = set()

    def passes(place: int, *, strict: bool = True) -> bool:
        if place not in pairs:
            raise ValueError(_ALONE)
        mine, theirs = walk.shapes(place), shapes(pairs[place])
        at = _batch_at(mine, theirs, samples)
        if mine == theirs or place in absorbed or at is None:
            return True
        # Rows that are no samples, below nodes that choose rows anew in every pass: the next pass's may be others'.
        flat = any(d is not None and shape[d] != samples for d, shape in zip(at, mine, strict=True))
        return strict and place in (moves.below if flat else moves.inside)

    alone = _without_batch(walk, pairs) | {root for root in walk.roots if math.prod(walk.shapes(root)[0]) > 1}
    for leaf, name in leaves.items():
        try:
            if leaf not in pairs or any(p not in pairs for p in parents[leaf]):
                raise ValueError("the model's input was computed from it" if leaf in before_input else _ALONE)
            try:
                mine, met = _split(walk, leaf, parents, passes, alone)
            except ValueError:  # it is known of passes that are proved at least
                mine, met = _split(walk, leaf, parents, functools.partial(passes, strict=False), alone)
                loose |= met
            if not met <= pairs.keys():
                raise ValueError(_ALONE)
            found = {p: _batch_at(walk.shapes(p), shapes(pairs[p]), samples) or () for p in met}
        except ValueError as error:
            refused[name] = str(error)
            continue
        free |= mine
        nodes |= found
        behind[name] = frozenset(mine)
    kept = {place: name for place, name in leaves.items() if name not in refused}
    # Where another parameter's gradient comes through, it comes sample by sample.
    nodes = {place: at for place, at in nodes.items() if place not in free}
    moved = {p for p in free if p in absorbed or (p in pairs and walk.shapes(p) != shapes(pairs[p]))}
    views, turns = RowViews(walk, pairs, parents), dict[int, bool]()
    for place, at in nodes.items():
        dim = next((d for d in at if d is not None), 0)
        told = views.in_turns(place, dim) if walk.shapes(place)[0][dim : dim + 1] != (samples,) else None
        if told is not None:
            turns[place] = told
    sets = (frozenset(moves.indexed), frozenset(loose & moves.below), frozenset(moved))
    return Frontier(kept, frozenset(free), nodes, refused, behind, *sets, turns, frozenset(alone & free))


def frontier_of_one(walk: Walk, names: Mapping[int, str]) -> Frontier:
    """Return the frontier of a single sample: every node that uses a parameter, with all of its gradient."""
    leaves, refused = walk.parameters(names), dict[str, str]()
    nodes: dict[int, tuple[int | None, ...]] = {}
    for leaf, name in leaves.items():
        met = [place for place, behind in enumerate(walk.next) if leaf in behind]
        try:
            _check(walk, [leaf], met)
        except ValueError as error:
            refused[name] = str(error)
            continue
        nodes |= {place: tuple(EVERYTHING for _ in walk.shapes(place)) for place in met}
    kept = {place: name for place, name in leaves.items() if name not in refused}
    return Frontier(kept, frozenset(kept), nodes, refused, {name: frozenset({leaf}) for leaf, name in kept.items()})


def paired(
    walk: Walk, other: Walk, names: Mapping[int, str], samples: int, computed: set[int] | None = None
) -> dict[int, Any]:
    """Pair the nodes of two graphs. Where the model goes from sample to sample (a cat, an output that is a list), the
    other graph has an edge more, which has no partner. `computed` gets the places where the model's input was made.

    Raises:
        GraphsDiffer: with the place where they do.
    """
    pairs: dict[int, Any] = {}
    todo = list(zip(walk.roots, other.roots, strict=False))
    writes_here, writes_there = _writes(walk), _writes(other)
    while todo:
        x, y = todo.pop()
        if x in pairs:
            continue
        more = writes_there(y) - writes_here(x)
        if more > 0 and more * samples == writes_here(x):  # sample by sample: behind those of the last, which is more
            for _ in range(more):
                y = other.next[y][0]
        one, two = walk.nodes[x], other.nodes[y]
        leaf = getattr(two, "variable", None)
        if leaf is not None and id(leaf) not in names and not isinstance(leaf, nn.Parameter):
            if computed is not None:
                computed.add(x)
            continue  # an input of the model's, which the user may have computed from something
        own = getattr(one, "variable", None)
        if leaf is not None and own is not None and own is not leaf and {id(own), id(leaf)} <= names.keys():
            raise GraphsDiffer(_OTHER.format(f"parameter '{names[id(own)]}' against '{names[id(leaf)]}'"))
        pairs[x] = two
        mine, theirs = walk.next[x], other.next[y]
        kinds = _kind(one), _kind(two)
        # Where a single row is written (an expert's only one), python's setitem views it as no row; a slice that takes
        # all rows is none.
        if kinds[0] in _MAY_LACK and kinds[0] != kinds[1] and mine[0] >= 0:
            todo.append((mine[0], y))
            continue
        if kinds[1] in _MAY_LACK and kinds[0] != kinds[1] and theirs[0] >= 0:
            del pairs[x]
            todo.append((x, theirs[0]))
            continue
        each = len(mine) * (samples + 1) == len(theirs) * samples or kinds[0] in _LISTS
        if kinds[0] != kinds[1] or not (each or len(mine) == len(theirs)):
            by_size = _BY_SIZE if "CdistBackward0" in kinds else ""
            raise GraphsDiffer(_OTHER.format(f"{one.name()} against {two.name()}") + by_size)
        for u, v in zip(mine, theirs, strict=False):
            if (u < 0) != (v < 0) and kinds[0] not in _LISTS:  # a loop that ends here, and goes on there
                behind = walk.nodes[u] if v < 0 else other.nodes[v]
                raise GraphsDiffer(_OTHER.format(f"{one.name()} has {behind.name()} behind it in one of them alone"))
        todo += [(u, v) for u, v in zip(mine, theirs, strict=False) if u >= 0 and v >= 0]
    return pairs


def _writes(walk: Walk) -> Callable[[int], int]:
    """Return what tells how often the tensor that is made at a place was written into, one write behind the other."""
    known: dict[int, int] = {}

    def of(place: int) -> int:
        chain = []
        while place >= 0 and place not in known and walk.nodes[place].name() == _WRITE:
            chain.append(place)
            place = walk.next[place][0]
        count = known.get(place, 0)
        for each in reversed(chain):
            count += 1
            known[each] = count
        return count

    return of


def _kind(node: Any) -> str:
    """Return a node's name, the same for views that a reshape chooses among by strides."""
    name: str = node.name()
    return "view" if name in VIEWS else name


def _above(leaf: int, parents: list[list[int]], same: Callable[[int], bool]) -> set[int]:
    found, todo = {leaf}, [leaf]
    while todo:
        for parent in parents[todo.pop()]:
            if parent not in found and same(parent):
                found.add(parent)
                todo.append(parent)
    return found


def _without_batch(walk: Walk, pairs: Mapping[int, Any]) -> set[int]:
    """Return the roots that nothing with the batch is behind."""
    found = set()
    for root in walk.roots:
        behind, todo = {root}, [root]
        while todo and all(p in pairs and walk.shapes(p) == shapes(pairs[p]) for p in todo[-1:]):
            for child in walk.next[todo.pop()]:
                if child >= 0 and child not in behind:
                    behind.add(child)
                    todo.append(child)
        if not todo and root in pairs:
            found.add(root)
    return found


def _split(
    walk: Walk, leaf: int, parents: list[list[int]], passes: Callable[[int], bool], alone: Container[int]
) -> tuple[set[int], set[int]]:
    """Return the places behind the frontier that a leaf's gradient comes through, and its frontier nodes; `alone`:
    roots that may be among the places."""
    mine = _above(leaf, parents, passes)
    met = {p for x in mine for p in parents[x]} - mine
    _check(walk, mine, met, alone)
    return mine, met


def _check(walk: Walk, free: Collection[int], met: Iterable[int], alone: Container[int] = ()) -> None:
    if any(root in free and root not in alone for root in walk.roots):
        raise ValueError(
            "it comes to the model's output without meeting the batch, or without a place where it can be told which "
            "rows are whose (a penalty, or a parameter that is returned); return it expanded over the samples"
        )
    for place in (*free, *met):
        function = function_of(walk.nodes[place])
        if getattr(function, "makes_another", False):
            raise ValueError(FUSED)
        if function is not None:
            raise ValueError(
                f"it goes through the autograd Function {function.__name__}, whose backward cannot be run once more; "
                "register a rule for the layer that calls it"
            )


def _batch_at(
    mine: tuple[tuple[int, ...], ...], other: tuple[tuple[int, ...], ...], samples: int
) -> tuple[int | None, ...] | None:
    """Return the batch's dimension at each output of a node; None where it cannot be told which rows are whose."""
    if len(mine) != len(other):
        return None
    found: list[int | None] = []
    for one, two in zip(mine, other, strict=True):
        if one == two:
            found.append(None)
            continue
        dims = [i for i, (u, v) in enumerate(zip(one, two, strict=False)) if u != v]
        d = dims[0] if dims else 0
        if len(dims) != 1 or len(one) != len(two) or one[d] % samples or one[d] // samples * (samples + 1) != two[d]:
            return None
        found.append(d)
    return tuple(found)
