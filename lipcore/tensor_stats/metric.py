"""The metric TensorStats: what users see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lipcore.metric.host_reads import OnDevice
from lipcore.metric.plan_lines import PlanLines
from lipcore.metric.protocol import PlanLine
from lipcore.metric.rank_part import RankPart
from lipcore.metric.results import MetricResult
from lipcore.models.arguments import check_choice, check_count
from lipcore.models.names import listed
from lipcore.tensor_stats.attention import AttentionChoice
from lipcore.tensor_stats.block import Numbers
from lipcore.tensor_stats.describe import add_extras, add_rows, histogram_of
from lipcore.tensor_stats.open_window import OpenWindow
from lipcore.tensor_stats.rank_part import TensorStatsPart
from lipcore.tensor_stats.router import RouterChoice
from lipcore.tensor_stats.sampled_steps import ONLY_NUMBERS
from lipcore.tensor_stats.watched import QUANTITIES, Names, Wishes, checked_names
from lipcore.trajectory.groups import Groups, by_block

_NO_PASS = (
    "no forward pass came through the model's hooks in the sampled steps: the loop calls another object, without "
    "gradients, in a compiled function or inside an activation checkpoint"
)


class TensorStats(OpenWindow):
    r"""Statistics of the elements of parameters, of their gradients and of modules' outputs, on every `every_steps`-th
    step.

    For every tensor x, over the elements of all sampled steps of a window together:

    * ``mean``, ``sd`` :math:`\sqrt{M_2/n}`, ``min``, ``max`` and ``kurtosis`` :math:`n M_4/M_2^2` (3 of a normal
      distribution, larger where few elements are large), with :math:`M_k = \sum (x - \bar x)^k` over the n finite
      elements; `Value.count` is n
    * ``zeros``: the share of elements that are 0; ``nonfinite``: how many were NaN or infinite, which enter nothing
      else
    * ``abs_p50`` and ``abs_p99``: quantiles of \|x\| to 1/16 of themselves, from a histogram with eight bins per power
      of two (:meth:`histogram`)

    They stand in the quantities ``parameter`` and ``gradient`` by parameter, by group and in total, and in ``output``
    by module and in total; "(model)" is what the model itself returns (under a Monitor's `prefix`, that). Parameters
    are looked at after the step; gradients at the end of the step's last backward pass, before anything clips, with a
    GradScaler's scale taken out; outputs in every forward pass in grad mode. What an activation checkpoint runs again
    does not come twice. Of a module that returns several tensors, the first floating one is measured, or that called
    "logits". Outputs inside compiled modules cannot be seen: :meth:`plan` and ``details["outputs_unseen"]`` name them,
    parameters and gradients are measured all the same. A step that a GradScaler skips does not count.

    One compiled pass over a tensor's memory gives all of this. Nothing but the numbers is kept: 16 KiB per tensor.

    On the same steps, where asked for (:meth:`plan` says what was found and what was not, and why):

    * ``attention_bound``: per head, :math:`\max_i\|q_i\| \max_j\|k_j\|` times the scale, which no attention logit
      exceeds: one-sided. It is read where the projections return queries and keys, since no hook sees the product. What
      is added to logits (masks, position biases) is not in it. ``attention="auto"`` finds projections by their names;
      what lies between them and the product it cannot see, so these numbers are labelled heuristic
    * ``logsumexp``: of the model's logits, mean and max over all positions
    * ``router_share`` and ``router_entropy``: which share of the tokens each expert of a mixture is chosen for by the
      largest of the router's logits; the entropies (in nats) of each token's softmax, on average, and of the shares.
      Limits of capacity and biases that are added later are not in them

    Args:
        model: only when the metric stands alone.
        parameters, gradients, outputs: which of them: True for all, False for none, or patterns of names, as in the
            shell ("blocks.*.weight"). Without patterns, outputs are those of all modules but nn.Sequential, which
            returns what its last module does.
        exclude: patterns of names that are left out of all three.
        groups: a function from parameter name to group name, default :func:`lipcore.by_block`; or a dict {group:
            regular expression}, as for Trajectory.
        every_steps: look at every k-th step; the others cost next to nothing.
        attention: {module or pattern: (queries, keys, heads) or (queries, keys, heads, scale)} with the names of the
            projections in that module, or (all, heads) for one that returns queries, keys and values as three equal
            parts; the scale is 1/sqrt(features of a head) by default. "auto": find them.
        router: {router or pattern: experts per token}, whose outputs are logits; "auto": find them.
        logits: True: what the model returns are logits; or the name of the module that returns them.
        scaler: a torch.amp.GradScaler, when the metric stands alone (a Monitor has its own).

    Raises:
        TypeError, ValueError: an argument of another kind than described, or a name that the model does not have.

    Source: moments by Chan, Golub, LeVeque (1983) and Pebay (2008); z-loss: Chowdhery et al., PaLM (2022).

    >>> layer = nn.Linear(2, 2)
    >>> with TensorStats(layer, every_steps=1) as stats:
    ...     _ = nn.init.constant_(layer.weight, 3.0)
    ...     layer(torch.ones(5, 2)).sum().backward()
    ...     stats.update()
    >>> stats.compute().parameter["weight"].mean.value, stats.compute().gradient["weight"].mean.value
    (3.0, 5.0)
    """

    name = "tensor_stats"

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        parameters: Names = True,
        gradients: Names = True,
        outputs: Names = True,
        exclude: str | Sequence[str] = (),
        groups: Groups = by_block,
        every_steps: int = 10,
        attention: AttentionChoice | str | None = None,
        router: RouterChoice | str | None = None,
        logits: bool | str = False,
        scaler: Any = None,
    ) -> None:
        check_count("every_steps", every_steps)
        if not (callable(groups) or isinstance(groups, Mapping)):
            raise TypeError(f"groups: expected a callable or a dict of expressions, got {type(groups).__name__}")
        left_out = checked_names("exclude", exclude)
        if isinstance(left_out, bool):
            raise TypeError(f"exclude: expected a pattern of names or a list of them, got {exclude!r}")
        wishes = Wishes(
            checked_names("parameters", parameters),
            checked_names("gradients", gradients),
            checked_names("outputs", outputs),
            [left_out] if isinstance(left_out, str) else left_out,
            groups,
            attention,
            router,
            logits,
        )
        super().__init__(wishes, every_steps)
        if model is not None:
            self._watch(model, scaler)

    # ---- results

    def plan(self) -> PlanLines:
        """Return what is measured, what was asked for and cannot be seen, and why."""
        if self._numbers is not None:
            return PlanLines([PlanLine("copy", "holds numbers, and watches nothing")])
        found = self._found
        nbytes = found.size.nbytes * (self._window_blocks + 1)
        rule = f"on every {self.every_steps}-th step" if self.every_steps > 1 else "on every step"
        lines = [PlanLine("state", f"{found.size.places} tensors, {rule}", nbytes)]
        for what, names in (
            ("parameters", [p.name for p in found.parameters]),
            ("gradients", [p.name for p in found.gradients]),
            ("outputs", found.places_of_outputs),
        ):
            if names:
                lines.append(PlanLine(what, f"{len(names)}: {listed(names, 4)}"))
        for why in dict.fromkeys(found.unseen.values()):
            names = [found.place_of(name) for name, reason in found.unseen.items() if reason == why]
            lines.append(PlanLine("outputs", f"not seen: {listed(names)}: {why}"))
        lines += [PlanLine(extra.kind, f"{extra.place}: {extra.problem or extra.rule}") for extra in found.extras]
        for kind, reasons in found.refused.items():
            lines += [PlanLine(kind, f"{place}: not measured: {why}") for place, why in reasons.items()]
        for kind in ("attention", "router"):
            if getattr(self._wishes, kind) is not None and not any(line.what == kind for line in lines):
                lines.append(PlanLine(kind, "not measured: no module was found by name; name it"))
        return PlanLines(lines)

    def on_device(self) -> list[OnDevice]:
        if self._numbers is not None:
            return []
        return [
            numbers.read
            for block in (*self._closed, self._open)
            for numbers in block.parts
            if numbers.device.type != "cpu"
        ]

    def _window(self) -> tuple[Numbers, int, int]:
        """Return the open window's numbers, sampled steps and forward passes."""
        blocks = (*self._closed, self._open)
        total = Numbers(self._found.size, torch.device("cpu"))
        for block in blocks:
            total.merge(block.on_host())
        return total, sum(block.steps for block in blocks), sum(block.passes for block in blocks)

    def finalize(self) -> MetricResult:
        """Return the open window's numbers; the class's docstring says what they are."""
        if self._numbers is not None:
            return self._numbers
        numbers, steps, passes = self._window()
        result = self._empty_result(steps, passes)
        add_rows(result, self._found.rows, numbers.rows, numbers.bins, self._untrue)
        add_extras(result, self._found, self._found.slices, numbers.sums, numbers.most)
        return result

    def _empty_result(self, steps: int, passes: int) -> MetricResult:
        """Return the open window's details without its numbers."""
        found = self._found
        result = MetricResult(self.name, every_steps=self.every_steps, sampled_steps=steps)
        if found.hooked:
            result.details["forward_passes"] = passes
            if steps and not passes:
                result.details["output_off"] = _NO_PASS
        for key, value in self._notes.items():
            result.details[key] = value
        if skipped := sum(self._skipped):
            result.details["skipped_steps"] = skipped
        if found.unseen:
            result.details["outputs_unseen"] = {found.place_of(name): why for name, why in found.unseen.items()}
        return result

    def histogram(self, quantity: str, place: str) -> dict[str, list[float] | list[int]]:
        """Return the histogram of the magnitudes of a tensor's finite elements over the open window.

        Args:
            quantity: "parameter", "gradient" or "output".
            place: its name there.

        Returns:
            {"edges": n + 1 magnitudes, "counts": of how many elements the magnitude is in [edges[i], edges[i + 1])},
            from the first bin that is used to the last one, eight per power of two. Zeros are in the bin that begins at
            0.

        Raises:
            ValueError: another quantity; KeyError: it has no such place.
        """
        check_choice("quantity", quantity, QUANTITIES)
        names = {(row[0], row[1]): i for i, row in enumerate(self._found.rows)}
        if (quantity, place) not in names:
            there = [name for kind, name in names if kind == quantity]
            raise KeyError(f"{quantity} has no place {place!r}; it has {listed(there)}")
        return histogram_of(self._window()[0].bins[names[quantity, place]])

    def rank_part(self) -> RankPart | str:
        """Return what the open window adds to that of all ranks."""
        if self._numbers is not None:
            return ONLY_NUMBERS
        numbers, steps, passes = self._window()
        holding, empty = self._holding if self._held else None, self._empty_result(steps, passes)
        return TensorStatsPart.of(self._found, holding, numbers, passes, self._untrue, empty)

    def __getstate__(self) -> dict[str, Any]:
        """Make what a copy or a pickle has: as it is before it is bound, then the open window's numbers and nothing
        else."""
        if self._watched is None:
            return self.__dict__
        kept = {"every_steps": self.every_steps, "_window_blocks": self._window_blocks, "off": self.off}
        return kept | {"_numbers": self.finalize(), "_watched": None, "_model": None, "_engine": None}
