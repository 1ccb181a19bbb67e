"""The proofs of one model: when a pass is proved, what is known from earlier ones, and what other passes carry."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lipcore.capture.graph.orders import WRITES, Orders
from lipcore.capture.layers.asked_proof import ASK, NOT_YET, AskedProof, Disproved
from lipcore.capture.layers.batch_places import BatchPlaces, misplaced, seen_places
from lipcore.capture.layers.findings import Findings, done_of
from lipcore.capture.layers.layer_pass import LayerPass
from lipcore.capture.layers.layer_site import LayerSite
from lipcore.capture.layers.pass_graph import Graph
from lipcore.capture.layers.past_output import past_output
from lipcore.capture.layers.proof_output import ProofOutput
from lipcore.capture.layers.proof_schedule import ProofSchedule
from lipcore.capture.layers.proved_operations import ProvedOperations, kinds_of_nodes
from lipcore.capture.layers.sample_proof import Verdict, verdict
from lipcore.capture.output_places import is_clear
from lipcore.capture.own_nodes import gradients_begun, nodes_of_others
from lipcore.capture.proof_ranks import SHARDED_SINCE, Ranks
from lipcore.capture.sample_ids import SampleIds
from lipcore.capture.seeds import Begins, Seeds, seeds_of
from lipcore.models.copies import Before, not_looked_for
from lipcore.models.dtensors import await_values
from lipcore.models.gathered import is_spread
from lipcore.models.memory import free_bytes
from lipcore.models.named_output import OutputChoice
from lipcore.models.outputs import on_backward, tensors_of
from lipcore.models.own_collectives import as_all_run
from lipcore.models.ranks import EXCHANGES, Communicates, under_process_group, without_communication
from lipcore.models.restored import all_put_back

NO_OUTPUT = (
    "none of the model's outputs has a batch dimension (it returns its loss alone); name the module inside that makes "
    "its predictions, output='<module>', or let it return them too"
)
NOT_RUN_OUTPUT = (
    "the module that output= names did not run in the pass, or is inside a compiled region; name another one, or let "
    "the model return its output too, and name that"
)
NOT_ASKED = "prove=False was passed"
_FAILED = "its graph allows no other backward pass ({0})"
_MEMORY = "another backward pass needs about {0} MB, and {1} MB are free"
_OTHERS_OPEN = "on another rank the pass left something open before"
_UNFINISHED = "the proof that was asked for has not come to its end"
_ONE_SAMPLE = "a batch of one sample has nothing to prove; pass two or more"
_OFFSETS = "the samples are packed sequences"
_ALONE = "the model is sharded, and not all of its ranks have this metric, or were here in time; call Monitor.prove()"
_OTHER_PASSES = "the model is sharded, and on another rank the batch or the graph allows no such passes"
_WRAPPERS = ("FullyShardedDataParallel",)  # whose hooks expect one backward pass
_PAST = (
    "the loss reaches layer '{0}' past the output that proofs begin at (output=); name the one by which all of it comes"
)


class Proofs:
    """The proofs of one model's passes.

    With `graph`, parameters that are wrong by their rule are measured from the autograd graph, and the proof goes on.
    Nothing is raised but ValueErrors about the model, which its owner keeps for the user's next call.

    Attributes:
        bytes: the memory that the last proof took beside what the pass itself keeps, roughly.
        sharded: parameters of the model are spread over ranks.
        orders: of the samples, in passes that were proved.
        operations: of these passes.
        asked: the user's prove() whose pass is under way, on all ranks; None in the training's.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[LayerSite],
        *,
        prove: bool,
        skip: bool,
        graph: bool = False,
        output: OutputChoice | None = None,
        orders: Orders | None = None,
    ) -> None:
        self.bytes = 0
        self.asked: AskedProof | None = None
        self._model, self._sites = model, sites
        self._wanted, self._skip, self._graph = prove, skip, graph
        self._output = ProofOutput(model, output)
        self._places = BatchPlaces(model, self._output)
        self.sharded = is_spread(model)
        self._refused = next((type(m).__name__ for m in model.modules() if type(m).__name__ in _WRAPPERS), "")
        self._schedule = ProofSchedule()
        self._begun: tuple[int, int] | None = None  # the kind of a pass that is to be proved, until it has ended
        self._known: dict[tuple[int, int], Findings] = {}
        self.orders = orders or Orders()
        self.operations = ProvedOperations(self.orders, self._schedule, sharded=self.sharded)
        self._ranks = Ranks(model) if self.sharded and prove and under_process_group() else None
        if self._ranks is not None:
            self._ranks.announce(1)
        self._asked = 0  # proofs
        self._by_number = True  # passes are proved that nobody asks for

    @property
    def together(self) -> bool:
        """True where a due proof must be run on this rank because other ranks run it too."""
        return self._ranks is not None

    @property
    def alone(self) -> bool:
        """True where this rank may run backward passes that other ranks do not."""
        return self._wanted and not self.sharded and not self._refused

    def attach(self) -> None:
        """Put a hook on the module that was named as output."""
        self._output.attach()

    def detach(self) -> None:
        """Take that hook off."""
        self._output.detach()

    def withdraw(self) -> None:
        """Prove no further passes, and tell the other ranks."""
        if self._ranks is not None:
            self._ranks.withdraw(self._schedule.passes)

    def await_call(self) -> None:
        """Prove what is asked for alone where ranks share a model, as others rest while this one records passes."""
        self._by_number = self._ranks is None
        self.withdraw()

    def begin(self, run: LayerPass, arguments: tuple[Any, ...], keywords: dict[str, Any], first: Tensor | None) -> None:
        """Keep the arguments and the state that a pass begins with, where it is to be proved."""
        if not self._wanted or first is None:
            run.unproved = "" if run.batch.size == 1 else NOT_ASKED
            return
        if self._begun is not None and self._ranks is None:  # a pass that was to be proved, and raised
            self._schedule.ask_again(self._begun)
        self._begun = None
        run.kind = first.dim(), run.batch.size
        run.shape = tuple(first.shape)
        due = self.asked is not None or (self._schedule.due(tuple(first.shape), run.batch.size) and self._by_number)
        run.adds_up = self.asked is None and (due or self._schedule.adds_up(self._model))
        if self._ranks is not None and self.asked is None and self._schedule.due_next():
            self._ranks.announce(self._schedule.passes + 1)
        if not due or (run.chained and self._ranks is None):
            return
        if not self.sharded and is_spread(self._model):  # a pass of ours alone would leave its parts half gathered
            raise ValueError(SHARDED_SINCE)
        try:
            together = self.asked is not None and self.sharded
            run.before = Before(self._model, arguments, keywords, first, run.batch.dim, together=together)
            self._output.listen()
            run.due, self._begun = True, run.kind
        except Exception as error:  # no memory for a copy of the batch
            if self._ranks is not None:
                self.miss()
                raise
            known = self._known.setdefault(run.kind, Findings())
            known.reason = _FAILED.format(f"{type(error).__name__}: {str(error)[:200]}")

    def ask(self) -> AskedProof:
        """Begin a proof that the user asks for; the same call on all ranks."""
        self._asked += 1
        self.asked = AskedProof()
        return self.asked

    @property
    def _proof(self) -> str:
        """The name of the proof under way, the same on all ranks."""
        return str(self._schedule.passes) if self.asked is None else f"asked/{self._asked}"

    def miss(self) -> None:
        """Tell the other ranks of a sharded model that this one runs none of the passes of a proof that is due, where
        it has not told them what it does."""
        if self._ranks is not None:
            self._ranks.miss(self._proof)

    def end(self, run: LayerPass, output: Any) -> dict[str, str]:
        """Prove a pass that is to be proved, and note on any pass the findings about its kind; return the parameters
        whose norms are wrong, with the reason.

        Raises:
            Disproved: samples depend on each other in a way that spoils all norms.
            ValueError: the model returns nothing of the name that was given as output.
        """
        if run.kind is None:
            return {}
        before, run.before = run.before, None
        self._begun = None
        compiled = run.nodes < 0
        run.nodes = kinds_of_nodes(output) if compiled else nodes_of_others() - run.nodes
        run.begun = gradients_begun() - run.begun
        wrong: dict[str, str] = {}
        if before is not None:
            known = self._known.setdefault(run.kind, Findings())
            chosen = self._output.of(output)
            try:
                wrong = self._prove(run, chosen, before, known)
            finally:
                self.miss()
            if chosen is not None and chosen is not output:
                self._watch_past(run, output, chosen, known)
        if run.batch.size > 1:
            found = self._known.get(run.kind)
            why = NOT_YET if self._by_number else ASK
            run.unproved = why.format(run.batch.size) if found is None else found.reason or found.past
            if found is not None:
                run.unseen, run.unreached, run.left_out = found.unseen, found.unreached, found.left_out
                left_out = any(run.tapped.get(number) for number in found.left_out.values())  # has a reason of its own
                proved = before is not None
                other = self.operations.other(run, output, proved=proved, compiled=compiled, by_zero=found.by_zero)
                if before is None and other and not (left_out or run.unproved):
                    run.unproved = other
                if before is None and (other or left_out) and other != WRITES:
                    self._schedule.ask_soon(run.kind)
        return wrong

    @property
    def know_larger(self) -> bool:
        """True where batches of several samples were proved, and so that the first tensor has them."""
        return any(size > 1 and not known.reason for (_, size), known in self._known.items())

    def ask_soon(self, run: LayerPass) -> None:
        """Have one of the next passes proved that are like this one: it had what no proof has seen."""
        if run.kind is not None and self._wanted:
            self._schedule.ask_soon(run.kind)

    def _prove(self, run: LayerPass, output: Any, before: Before, known: Findings) -> dict[str, str]:
        if run.batch.size < 2 and not self.sharded:  # whose passes run on every rank
            return {}
        if self.asked is None and self._ranks is not None and self._ranks.is_out and not known.reason:
            return {}  # proved when the user asked for it; this pass cannot be
        await_values(tensors_of(output) if self.sharded else ())  # before ranks are counted that have announced it
        seen = None if is_clear(output, run.batch) else self._places.look(run, output)
        try:
            graph = Graph(run, output, self._sites)
            seeds = seeds_of(output, run.batch, seen_places(seen))
            found = self._weighed(run, output, seeds, graph, before.bytes)
            # A tensor of parameters alone may be as large as the batch.
            if found.wrong and seen is None and not self.sharded:
                seen = self._places.look(run, output)
                elsewhere = seeds_of(output, run.batch, seen_places(seen))
                if elsewhere.differ(seeds):
                    seeds, found = elsewhere, self._weighed(run, output, elsewhere, graph, before.bytes)
        except Disproved:
            raise
        except Exception as error:
            known.reason = _FAILED.format(f"{type(error).__name__}: {str(error)[:200]}")
            return {}
        if self._output.is_named:
            run.begins = Begins(output, run.batch, seen_places(seen), named=True)
        if seen is not None and not seeds.outputs:
            found.wrong |= misplaced(run, self._sites, seen.shapes)
        if run.batch.size < 2:
            return {}
        if found.open and run.kind is not None:
            self._schedule.ask_again(run.kind)
        # What is measured from the autograd graph is proved there.
        known.take(run, found, self._sites, others=self._graph and (not graph.tapped or bool(found.wrong)))
        if found.wrong and found.entered:
            run.suspects.append((found.entered, found.wrong))
        elif found.wrong and not (self._skip or self._graph):
            return found.wrong
        try:
            self._look_at_copies(run, output, seeds, before, known)
        except Disproved:
            if not found.wrong or found.entered:
                raise
            run.mixes = True  # and what is wrong says where
        run.proved = not (known.reason or (found.wrong and not found.entered))
        return {} if found.entered else found.wrong

    def _watch_past(self, run: LayerPass, returned: Any, output: Any, known: Findings) -> None:
        """Notice when a gradient comes to a layer past the output that was proved."""
        known.past = ""
        for tensor, layer in past_output(run, returned, output, self._sites):
            on_backward(tensor, functools.partial(known.came_past, run, _PAST.format(layer.name)))

    def _weighed(self, run: LayerPass, output: Any, seeds: Seeds, graph: Graph, kept: int) -> Verdict:
        reason = graph.refused
        if self._refused:
            reason = f"{self._refused} allows no other backward pass; use fully_shard"
        elif not seeds.outputs:
            reason = NO_OUTPUT if output is not None else NOT_RUN_OUTPUT
        elif not reason and not under_process_group():  # what is free differs by rank
            self.bytes = graph.bytes + kept
            free = free_bytes(seeds.outputs[0].device)
            if free is not None and free < self.bytes:
                reason = _MEMORY.format(-(-self.bytes >> 20), free >> 20)
        if self._ranks is not None:
            passes = f"from {len(seeds.outputs)}, {'some' if graph.tapped or run.probes else 'no'} layers"
            reason = self._settled(reason, passes)
        if reason:
            return Verdict(reason)
        found = Verdict()
        try:
            # The ranks of a sharded model have agreed to go through it together.
            silence = as_all_run(self._model) if self.sharded else without_communication()
            with all_put_back(self._model, random=True, writes=graph.runs_forward), silence:
                found = verdict(run, seeds, graph, self._sites, fixed=self.sharded)
        except Communicates:
            raise Disproved(EXCHANGES) from None
        except Exception as error:
            return Verdict(_FAILED.format(f"{type(error).__name__}: {str(error)[:200]}"))
        return found

    def _settled(self, reason: str, passes: str) -> str:
        """Return why no passes are run, on all ranks of a sharded model or none; `reason`: why not on this one."""
        assert self._ranks is not None
        if self.asked is None and not self._ranks.agree(self._schedule.passes):
            return reason or _ALONE
        together = self._ranks.settle(self._proof, "" if reason else passes)
        return reason if together else reason or _OTHER_PASSES

    def _look_at_copies(self, run: LayerPass, output: Any, seeds: Seeds, before: Before, known: Findings) -> None:
        if known.reason:
            return
        if run.batch.offsets is not None:
            known.reason = not_looked_for(_OFFSETS)
            return
        tensors = list(tensors_of(output))
        places = {id(tensor): i for i, tensor in enumerate(tensors)}
        suspected = {id(tensor) for outputs, _ in run.suspects for tensor in outputs}
        pairs = zip(seeds.outputs, seeds.dims, seeds.samples, strict=True)
        rows = [(places[id(t)], dim, whose) for t, dim, whose in pairs if id(t) not in suspected]
        if self.asked is not None and self.sharded and before.refused:
            known.reason = not_looked_for(before.refused)
            return
        if self.asked is not None and self.sharded:  # the pass has to be over on all ranks before another one begins
            self.asked.later = functools.partial(self._look_together, run, output, rows, before, known)
            return
        if self.sharded and done_of(run) in known.together:
            return
        why, wrong = before.difference(output, rows, self._run_again)
        if why and not wrong:
            known.reason = not_looked_for(why)
        elif wrong and self._skip:
            known.reason = run.disproved = why
        elif wrong and len(wrong) == len(rows):
            raise Disproved(f"model: {why}")
        elif wrong:
            every = {name: why for site in self._sites for name in site.names.values()}
            run.suspects.append(([tensors[i] for i in wrong], every))

    def _look_together(
        self,
        run: LayerPass,
        output: Any,
        rows: Sequence[tuple[int, int, Tensor]],
        before: Before,
        known: Findings,
        together: bool,
    ) -> str:
        why, wrong = before.difference(output, rows, self._run_again) if together else (_OTHERS_OPEN, [])
        known.together.discard(done_of(run))
        if not why:
            known.together.add(done_of(run))
            known.reason = ""
            self._note_asked(run)
            return ""
        known.reason = why if wrong else not_looked_for(why)
        if wrong and not self._skip:
            raise Disproved(f"model: {why}")
        return known.reason

    def close_asked(self, run: LayerPass, stopped: str) -> None:
        """Note what a pass that was asked for, and is over, has left unproved; `stopped`: why nothing is recorded."""
        assert self.asked is not None
        self.asked.answer = stopped or run.unproved or (_ONE_SAMPLE if run.batch.size < 2 else "")
        if not self.asked.waits:
            self._note_asked(run)
        elif run.kind is not None:
            self._known[run.kind].reason = not_looked_for(_UNFINISHED)  # until it is finished

    def _note_asked(self, run: LayerPass) -> None:
        """Note that following passes are like one that was asked for, or do something else."""
        if run.proved:
            self.operations.note(run)

    def _run_again(self, call: Callable[[], Any]) -> Any:
        self._output.listen()
        return self._output.of(call())

    def sample_ids(self, kind: tuple[int, int] | None) -> Mapping[str, list[SampleIds]]:
        """Return, for passes of a kind (:attr:`LayerPass.kind`), which samples the rows of every layer's gradient are
        of: one entry per call of the layer, in the order of the graph. Layers that no gradient came to are left out;
        nothing is known of passes of which none was proved."""
        known = self._known.get(kind) if kind is not None else None
        return {} if known is None else known.ids

    def __str__(self) -> str:
        if not self._wanted:
            return f"not proved: {NOT_ASKED}"
        found = (known.reason or known.past for known in self._known.values())
        reasons = list(dict.fromkeys(reason for reason in found if reason))
        when = "proved: every sample, in passes 1, 64, 128, ... and where shapes are new"
        took = f", with about {-(-self.bytes // 1024)} KB beside the pass" if self.bytes else ""
        return f"not proved: {'; '.join(reasons)}" if reasons else when + took
