"""One forward pass as the layer taps see it: what has come back from its backward pass, and the record made of it."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lipcore.capture.gradient_sums import GradientSums
from lipcore.capture.graph.another_size import Shapes
from lipcore.capture.graph.kept_tensors import KeptTensors
from lipcore.capture.graph.orders import Order
from lipcore.capture.graph.other_graph import Call
from lipcore.capture.graph.replay import Replay
from lipcore.capture.layers.compared_inputs import INPUT, seen_in
from lipcore.capture.layers.kept_factors import KeptFactors
from lipcore.capture.proof import NOTHING
from lipcore.capture.seeds import Begins
from lipcore.capture.self_calls import SelfCalls
from lipcore.layers import Batch, Factor, norms_sq_of
from lipcore.layers.factor import Measure
from lipcore.layers.factor_estimate import EstimatedOuter
from lipcore.models.copies import Before

#: Rows that are no parameter's norms: the gradient at a layer's output ("delta/<layer>") and at the model's, the
#: standard error of an estimated squared norm ("error/<parameter>"), and what ranks compare of a layer's input
#: ("input/<parameter>").
DELTA = "delta/"
OUTPUT = "output/"
ERROR = "error/"
_BESIDE = (DELTA, OUTPUT, ERROR, INPUT)
#: Why norms of some samples are NaN.
UNSEEN_ROWS = (
    "in every proof so far some samples had no gradient here, or one that is not finite, so that it is not known whose "
    "these rows are; they are NaN until a later pass proves them"
)
UNREACHED = "the model's outputs bring no gradient to layer '{0}' (a loss of its own inside the model)"
LEFT_OUT = (
    "layer '{0}' was not called in any pass that was proved so far (it is left out at random, perhaps); a proof of one "
    "of the next passes with it is to come"
)
#: Numbers of events in their order: a pass begins, a layer is left to the graph.
TURNS = itertools.count()
#: The number of a backward pass that was not seen to come into a graph: it did so in a reentrant checkpoint.
INNER = -2


class Rows(Mapping[str, Tensor]):
    """Rows by name that lie in one table, float64 [P, B]."""

    def __init__(self, names: tuple[str, ...], table: Tensor) -> None:
        self.names, self.table = names, table

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.table[self.names.index(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass
class LayerRecord:
    """The numbers that one backward pass brought, with the loss reduction's factor still in them."""

    samples: int  #: B
    #: Per parameter, float64 [B]: squared norm of the backpropagated per-sample gradient; or [K, B] where the options'
    #: `measure` makes other numbers of the factors.
    norms_sq: Mapping[str, Tensor]
    reasons: dict[str, str] = field(default_factory=dict)  #: why a parameter is not among them
    broken: str = ""  #: why not even the total is known
    task: int = 0  #: of the backward pass, different from those of others in the same step
    fresh: bool = False  #: no gradient was there when the backward pass began: it accumulates on nothing
    repeated: bool = False  #: not the first of its forward pass (retain_graph=True)
    observed: bool = False  #: its norms are in the distributions already
    unproved: str = ""  #: why it is not proved that these are single samples' norms
    served: bool = False  #: read from the gradients, without taps
    note: Any = None  #: what the options' `note_of` returned for its forward pass
    loss: Any = None  #: and `loss_of`
    hidden: str = ""  #: why those of some samples are NaN
    factors: KeptFactors | None = None  #: of the parameters' gradients, where the options say so
    began_with: bool = False  #: it was seen that gradients other than 0 were there when it began
    differs: str = ""  #: what else than the samples' gradients came to the parameters, when that was looked at last

    def explain(self, covered: Iterable[str], frozen: frozenset[str] = frozenset()) -> None:
        """Note a reason for every covered parameter that is not among the norms."""
        for name in covered:
            if name not in self.norms_sq and name not in self.reasons:
                why = "is frozen" if name in frozen else "no gradient reached it in this backward pass"
                self.reasons[name] = self.broken or why

    def leave_out(self, wrong: Mapping[str, str]) -> None:
        """Take out the numbers of these parameters, and note why."""
        if wrong:
            self.norms_sq = {name: row for name, row in self.norms_sq.items() if name not in wrong}
            self.reasons |= wrong

    def hide(self, unseen: Mapping[str, Tensor]) -> None:
        """Replace by NaN the numbers, other than 0, of samples that no proof has seen."""
        rows = dict(self.norms_sq)
        for name, samples in unseen.items():
            if name in rows:
                hidden = samples.to(rows[name].device) & ~(rows[name] < NOTHING)
                rows[name] = rows[name].masked_fill(hidden, torch.nan)
                if bool(hidden.any()):
                    self.reasons[name] = self.hidden = UNSEEN_ROWS
        self.norms_sq = rows


class LayerPass:
    """A forward pass in grad mode, from its beginning until its backward pass has ended.

    Each call of a layer brings factors of the per-sample gradients of its parameters. They become norms at once, but
    where a parameter is used again in this pass: then they wait until the backward pass ends, and are joined first.

    Args:
        batch: the samples.
        frozen: parameters that are not measured in this pass.
        measure: what makes rows of factors.
        keep: the record gets the factors too.
    """

    def __init__(
        self,
        batch: Batch,
        frozen: frozenset[str] = frozenset(),
        measure: Measure = norms_sq_of,
        keep: bool = False,
    ) -> None:
        self.batch = batch
        self.number = next(TURNS)  # of its beginning
        self.keep = keep
        self._measure = measure
        self.frozen = frozen
        self.by_graph: Collection[str] = ()  # parameters whose norms the layers' rules do not bring
        self.replay: Replay | None = None  # and what brings them
        self.calls: Counter[str] = Counter()  # uses of each parameter, as far as modules' calls show them
        self.left_to_graph: frozenset[str] = frozenset()  # parameters that were so when it began
        self.tapped: defaultdict[int, list[str]] = defaultdict(list)  # by number of the site, how its calls were
        self.shapes: Shapes = defaultdict(list)  # of the outputs of tapped layers, where a proof is due
        self.probes: dict[int, Tensor] = {}  # by number of the site, for compiled regions
        self.output_sq: Tensor | None = None  # beside probes: of the model's output
        self.fresh = (-1, False)  # in which backward pass, and whether no gradients were there when it began
        self.began_with = (-1, False)  # in which backward pass, and whether gradients other than 0 were seen there then
        self.proves = False  # a batch of one that is tapped to see whether the gradients tell the same
        self.task = -1  # the backward pass that the rows came from
        self.entered = INNER  # the backward pass that came into its graph last
        self.inner_only = False  # whose end nobody will tell: its rows came from a checkpoint's own backward passes
        self.finished_task = -1
        self.refused_task = -1  # a backward pass that does not count
        self.call: Call | None = None  # until its end
        self.kept: KeptTensors | None = None  # what it keeps inside checkpoints
        self.before: Before | None = None  # of a pass that is to be proved: what it begins with
        self.begins: Begins | None = None  # where proofs of it begin; None: at all that the model returns
        self.due = self.mixes = False  # a proof is due in it; the proof has found that its samples are mixed
        self.self_calls = SelfCalls()
        self.adds_up = False  # its samples' gradients are to be added up, and compared with the parameters'
        self.sums: GradientSums | None = None  # where that is done
        self.kind: tuple[int, int] | None = None  # dimensions of the input and samples, where it may be proved
        self.shape: tuple[int, ...] = ()  # of the input
        # Of graphs, that this thread had made when the forward pass began; then, that it has made. -1: it is compiled.
        self.nodes = -1
        self.taps = 0  # calls of tapped layers
        self.begun = 0  # as of gradients_begun(): when it began; then, within it
        self.order: Order | None = None  # of its samples, where it puts them together again
        self.compared = ""  # the parameter whose layer's input ranks compare
        self.note: Any = None  # what the options' note_of returned
        self.loss: Any = None  # and loss_of
        self.unproved = ""  # why its norms are not proved
        # By a proof of its own, which also tells of the passes before it; and why such a proof has failed.
        self.proved, self.disproved = False, ""
        # Outputs that bring parts of several samples to some parameters, and what is wrong if a gradient comes to them.
        self.suspects: list[tuple[list[Tensor], dict[str, str]]] = []
        self.unreached: dict[str, set[str]] = {}  # layers that the model's outputs bring no gradient to: rows
        self.left_out: Container[str] = ()  # of these, layers that were not called in any proof
        self.came: set[str] = set()  # layers whose gradient came in the last backward pass
        self.unseen: dict[str, Tensor] = {}  # by row, samples that no proof has seen
        self.chained = False  # its input depends on the model's parameters
        self.broken = ""
        self.spoiled = ""  # the same, for every backward pass to come
        self._rows: dict[str, Tensor] = {}
        self._held: dict[str, Factor] = {}
        self._kept = KeptFactors()

    @property
    def batches(self) -> list[Batch]:
        """The batches that a layer's call in this pass may be of."""
        return [self.batch]

    def begin_task(self, task: int) -> bool:
        """Note that a number comes back in this backward pass; return True when it is the first."""
        if self.task == task:
            return False
        self.task = task
        self._rows.clear()  # left by a backward pass that broke off
        self._held.clear()
        self._kept = KeptFactors()
        self.came.clear()
        if self.sums is not None:
            self.sums.begin(task)
        return True

    def add_factor(self, name: str, factor: Factor) -> None:
        self.add_factors({name: factor})

    def add_factors(self, factors: dict[str, Factor]) -> None:
        """Take in the factors of per-sample gradients that one call of a layer brought."""
        at_once = {}
        for name, factor in factors.items():
            if name in self.frozen or name in self.by_graph:
                continue
            if self.calls[name] > 1:
                held = self._held.get(name)
                self._held[name] = factor if held is None else held.join(factor)
            else:
                at_once[name] = factor
        if (seen := seen_in(factors[self.compared]) if self.compared in factors else None) is not None:
            self._rows[INPUT + self.compared] = seen
        for name, row in self._measured(at_once).items():
            self.add_row(name, row)
            self._add_error(name, at_once[name])
        self._take(at_once)

    def _measured(self, factors: Mapping[str, Factor]) -> dict[str, Tensor]:
        """Return what is made of factors; of samples that no proof has seen, NaN where the gradient is not 0."""
        rows = self._measure(factors)
        if self._measure is norms_sq_of:  # which show by themselves where that is
            return rows
        for name in (rows.keys() & self.unseen.keys()).difference(self.by_graph):
            norms_sq = factors[name].norms_sq()
            hidden = self.unseen[name].to(norms_sq.device) & ~(norms_sq < NOTHING)
            rows[name] = rows[name].masked_fill(hidden, torch.nan)
        return rows

    def _take(self, factors: Mapping[str, Factor]) -> None:
        if self.sums is not None:
            self.sums.add_factors(factors)
        self.keep_factors(factors)

    def keep_factors(self, factors: Mapping[str, Factor]) -> None:
        """Keep factors for the record where they are wanted."""
        for name, factor in factors.items() if self.keep else ():
            self._kept.add(name, factor)

    def _add_error(self, name: str, factor: Factor) -> None:
        error = factor.standard_error if isinstance(factor, EstimatedOuter) else None
        if error is not None:
            self.add_row(ERROR + name, error)

    def add_row(self, name: str, norms_sq: Tensor) -> None:
        if name in self.frozen:
            return
        if (name in self._rows or name in self._held) and not name.startswith(_BESIDE):
            self.broken = (
                f"parameter '{name}' was used again in a part of the forward pass that could not be followed, so the "
                "squares cannot be joined"
            )
        elif name in self._rows:  # a layer's second call: which of its outputs would it be?
            norms_sq = torch.full_like(norms_sq, torch.nan)
        self._rows[name] = norms_sq

    def record(self, covered: Collection[str]) -> LayerRecord:
        """Return the record of these parameters: every norm that came back, and why the others did not."""
        with torch.no_grad():
            for name, factor in self._held.items():
                self._rows |= self._measured({name: factor})
                self._add_error(name, factor)
            self._take(self._held)
            self._held.clear()
            if self.replay is not None and self.replay.whole:
                factors = self.replay.factors(self.task)
                self._rows |= self._measured(factors)
                self._take(factors)
            elif self.replay is not None:
                self._rows |= self.replay.norms_sq(self.task)
        rows = {name: row for name, row in self._rows.items() if name in covered or name.startswith(_BESIDE)}
        broken = self.broken or self.spoiled
        fresh, repeated = self.fresh == (self.task, True), self.finished_task != -1
        record = LayerRecord(self.batch.size, rows, {}, broken, self.task, fresh, repeated)
        record.began_with = self.began_with == (self.task, True)
        record.unproved = self.unproved or (self.replay.unproved if self.replay is not None else "")
        for name, why in self.replay.hidden(rows).items() if self.replay is not None else ():
            record.reasons[name] = record.hidden = why
        record.note, record.loss = self.note, self.loss
        record.factors = self._kept if self.keep else None
        record.explain(covered, self.frozen)
        by_graph = set(self.by_graph)
        unseen = {name: samples for name, samples in self.unseen.items() if name not in by_graph}
        if unseen:
            record.hide(unseen)
        reached = next(
            (
                layer
                for layer, names in self.unreached.items()
                if layer in self.came and not (names - by_graph).isdisjoint(rows)
            ),
            None,
        )
        if reached is not None:
            record.unproved = record.unproved or (LEFT_OUT if reached in self.left_out else UNREACHED).format(reached)
        self._rows, self.broken = {}, ""
        self.finished_task = self.task
        return record


class Recomputation(LayerPass):
    """The passes that an activation checkpoint may run again, when there are several. A checkpoint that keeps its
    tensors for the first run's backward only needs the same ones again, for which the pass's batch must be of the right
    size; a checkpoint with a backward pass of its own cannot be assigned to one pass."""

    def __init__(self, passes: set[LayerPass]) -> None:
        super().__init__(next(iter(passes)).batch)
        first = next(iter(passes))
        self.note, self.loss, self.number = first.note, first.loss, first.number
        self.compared = first.compared
        self.left_to_graph = first.left_to_graph
        self.passes = passes

    @property
    def batches(self) -> list[Batch]:
        return [run.batch for run in self.passes]

    def spoil(self, reason: str) -> None:
        for run in self.passes:
            run.spoiled = reason
