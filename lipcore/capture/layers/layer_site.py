"""One tapped layer: its rule, its parameters' names, and the two ways in which its gradient comes back."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from lipcore import _core, functional
from lipcore.capture.compiled import armed
from lipcore.capture.graph.another_size import AnotherSize, another_size
from lipcore.capture.graph.own_graph import OwnGraph
from lipcore.capture.identity import InPlaceAfter, PassedOn
from lipcore.capture.layers.compiled_uses import coded, used
from lipcore.capture.layers.fused_linear import INSIDE, FusedLinear, can_fuse
from lipcore.capture.layers.layer_call import LayerCall, call_of, expanded, saved_of, tensor_of, with_tensor
from lipcore.capture.layers.layer_pass import DELTA, TURNS, LayerPass
from lipcore.capture.layers.options import LayerOptions
from lipcore.capture.layers.other_outputs import watch, watch_probed, why_not
from lipcore.capture.layers.packed import batch_of_call
from lipcore.capture.layers.passes import Passes
from lipcore.capture.layers.placed_call import Misplaced, Placing, check_inputs, here, own_inputs
from lipcore.capture.layers.site_functions import InertHook, Probed, Refused, Strayed, Tapped
from lipcore.capture.own_nodes import counted
from lipcore.capture.proof import is_proof
from lipcore.capture.training_pass import accumulates_everything, in_backward, is_plain_run
from lipcore.layers import Batch, Factor, Outer, Rule, norms_sq_of
from lipcore.layers.factor_estimate import EstimatedOuter, Signs
from lipcore.layers.registry import type_with_rule
from lipcore.models.dtensors import local_of
from lipcore.models.tensor_parallel import PartRanks
from lipcore.models.torch_internals import ANY_FORWARD_HOOKS

_BROADCAST = "; broadcast= names layers that are called without the batch dimension"
_PREPENDED = (
    "another forward hook runs before lipcore's and may change the output before it is seen (one registered with "
    "prepend=True after lipcore's, or by register_module_forward_hook()); register it on the module, before the metric "
    "is attached or without prepend"
)
_COMPUTED = "is called with a tensor that is computed from its parameter (functional_call), whose gradient is another"
ROOT = "model"  #: what the model itself is called where it is a layer
_numbers = itertools.count(1 << 40)  # apart from those of capture.site


class LayerSite:
    """A hooked module with a rule, which brings the factors of its parameters' gradients to the pass they belong to.

    Args:
        passes: the model's forward passes.
        name: the module's name, as in messages and in the options.
        names: the parameter's key in the module -> its canonical name.
        options: the settings for all layers.
        signs: the random signs of estimates, the same for all layers.
        parts: the ranks that hold parts of parameters; None where there are none.

    Attributes:
        how: the way in which the weight's norms are computed, once that is known.
        broadcast: True where the layer's output has no batch dimension and is expanded here.
    """

    def __init__(
        self,
        passes: Passes,
        name: str,
        module: nn.Module,
        rule: Rule,
        names: dict[str, str],
        options: LayerOptions,
        signs: Signs,
        parts: PartRanks | None = None,
    ) -> None:
        self.name, self.module, self.rule, self.names = name, module, rule, names
        self.how = ""
        self.broadcast = name in options.broadcast
        self.number = next(_numbers)
        self.key = str(self.number)  # as a compiled region's graph holds it
        #: The names of the rows of a probe that compiled regions bring: those of all layers that have parameters in
        #: common with this one, and last, how many regions brought some.
        self.columns: list[str] = []
        self._from, self._left_at = -1, math.inf
        self._passes = passes
        # As attributes of its own: a compiled region looks at every attribute of what it reads these from.
        self._batch_dim, self._fused, self._normalized = options.batch_dim, options.fused, options.normalized
        self._method, self._signs = options.methods.get(name), signs
        self._placing = None if parts is None else Placing.of(module, rule, names, parts)

    def __reduce__(self) -> tuple[Callable[[], InertHook], tuple[()]]:
        return InertHook, ()  # a copied or pickled model is not watched

    @property
    def in_place_after(self) -> InPlaceAfter:
        """The way in which an in-place operation may follow: none behind a tuple's view or an expanded output."""
        if not self.rule.in_place_after or self.broadcast:
            return False
        # A layer of the user's may keep its output for its own backward pass, which a changed version would refuse.
        return type(self.module).forward.__module__.startswith("torch.nn.modules.") or "copy"

    @property
    def rows(self) -> list[str]:
        """The names of the rows that the layer brings: the parameters' norms, and that of its output's gradient."""
        return [*self.names.values(), *([DELTA + self.name] if self._normalized else [])]

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._trace(module, arguments, keywords, output)
        return self._tap(module, arguments, keywords, output)

    @counted
    def _tap(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        passes = self._passes
        own = another_size()
        if own is not None:
            return self._alike(own, module, arguments, keywords, output)
        inner = in_backward() != -1
        if not is_plain_run():
            return None
        if not (inner or passes.tapping or passes.current is not None):
            return None
        run = passes.pass_of_recomputation() if inner else passes.current
        if run is not None and not inner:
            run.calls.update(self.names.values())
            run.taps += self._from < 0  # others came later, by lipcore's own choice
            run.tapped[self.number].append("")
            if run.due:
                shown = tensor_of(output)
                run.shapes[self.number].append(() if shown is None else tuple(shown.shape))
        if run is not None and not self._from <= run.number <= self._left_at:
            return None
        if not torch.is_grad_enabled():
            return None
        tensor = tensor_of(output)
        if tensor is None or not tensor.requires_grad:
            return None
        if _precedes(module, self):
            passes.fail(_named(ValueError(_PREPENDED), self))
            return None
        if run is None:
            if inner:
                passes.unfollowed()
            if inner or _core.paused():
                return None
            return with_tensor(output, Strayed.apply(tensor, self))  # type: ignore[no-untyped-call]
        refusal = ""
        try:
            refusal = self.rule.refuses(module)
            if refusal:
                raise ValueError(refusal)
            if any(getattr(module._parameters.get(key), "grad_fn", None) is not None for key in self.names):
                raise ValueError(_COMPUTED)
            arguments, keywords = own_inputs(arguments, keywords, self._placing)
            call = self._call_of(module, arguments, keywords, tensor, run.batches)
            if call.saved:
                check_inputs(arguments, keywords, self._placing)
        except Exception as error:
            if inner and self._left_at < math.inf:
                return None  # as in the forward pass
            if isinstance(error, ValueError) and self._may_leave and not inner and not refusal:
                passes.leave_to_graph(self.names.values(), str(_named(error, self)))
                self.leave_to_graph()
                return None
            if isinstance(error, ValueError) and passes.skips and not inner and not refusal and not self.broadcast:
                try:
                    passes.leave_out(self.names.values(), str(_named(error, self)))
                except ValueError as nothing:
                    passes.fail(nothing)
                self.leave_to_graph()
                return None
            hint = isinstance(error, ValueError) and "pass batch_dim=" in str(error)
            passes.fail(_named(ValueError(f"{error}{_BROADCAST}") if hint else error, self))
            return None
        watch(output, functools.partial(self._other_output_used, run))
        fuses = self._fused and self._placing is None and can_fuse(self.rule, module, call.arguments, call.batch)
        fuses = fuses and _site_of(tensor) is None and run.left_to_graph.isdisjoint(self.names.values())
        if not inner:
            run.tapped[self.number][-1] = "fused" if fuses else "passed on"
        if fuses:
            return with_tensor(output, self._fuse(module, call, run, inner))
        tapped = Tapped.apply(call.output, self, run, call.extra, inner, *call.saved)  # type: ignore[no-untyped-call]
        return with_tensor(output, tapped)

    def _fuse(self, module: Any, call: LayerCall, run: LayerPass | None, inner: bool) -> Tensor:
        bias = module.bias if isinstance(module.bias, Tensor) else None
        fused: Tensor = FusedLinear.apply(
            *(call.arguments[0], module.weight, bias, call.output.detach(), self, run, inner)
        )  # type: ignore[no-untyped-call]
        return fused

    def _alike(self, own: AnotherSize, module: nn.Module, arguments: Any, keywords: Any, output: Any) -> Any:
        """Return the output of a call in a pass of lipcore's own, tapped as the same call of the last pass was:
        in-place operations that follow make other nodes behind a view."""
        made, last, tensor = own.calls[self.number], self._passes.last, tensor_of(output)
        own.shapes[self.number].append(() if tensor is None else tuple(tensor.shape))
        own.calls[self.number] += 1
        how = "" if last is None else next(iter(last.tapped.get(self.number, [])[made : made + 1]), "")
        if not how or tensor is None or self.broadcast:
            return None
        if how != "fused":
            return with_tensor(output, PassedOn.apply(tensor, self.in_place_after))  # type: ignore[no-untyped-call]
        with suppress(ValueError):
            call = self._call_of(module, arguments, keywords, tensor, [own.batch])
            return with_tensor(output, self._fuse(module, call, None, False))
        return None

    def tap_from_now(self) -> None:
        """Tap no call in passes that have begun before, since a checkpoint in them has not seen it either."""
        self._from = next(TURNS)

    def leave_to_graph(self) -> None:
        """Tap no call in passes that begin from now on, since the graph measures the layer's parameters. In those under
        way a checkpoint counts on what the layer has done the first time."""
        self._left_at = min(self._left_at, next(TURNS))

    @property
    def _may_leave(self) -> bool:
        """True where calls that do not fit the rule go to the graph; not where the user has said how it is called."""
        return self._passes.graph_serves and not self.broadcast and not self.has_own_rule

    def _call_of(
        self, module: nn.Module, arguments: Any, keywords: Any, output: Tensor, batches: list[Batch]
    ) -> LayerCall:
        return call_of(self.rule, module, arguments, keywords, output, batches, broadcast=self.broadcast)

    def _other_output_used(self, run: LayerPass) -> None:
        if not self._passes.recording or is_proof() or not accumulates_everything():
            return
        error = _named(ValueError(why_not(self.rule)), self)
        if self._may_leave:  # from the next pass on
            self.leave_to_graph()
            run.spoiled = self._passes.leave(self.names.values(), error, graph=True)
        else:
            self._passes.fail(error)

    def came_back(self, run: LayerPass, grad: Tensor, extra: Any, inner: bool, saved: tuple[Tensor, ...]) -> None:
        """Take in the gradient at the layer's output. This runs in the backward pass, in which nothing may be
        raised."""
        passes = self._passes
        if is_proof() or not passes.recording or not passes.comes_back(run, inner):
            return
        try:
            with torch.no_grad():
                grad = here(grad, self._placing)
                factors = self.rule.factors(self.module, grad, extra, *saved)
                own = {self.names[key]: self._tuned(factor) for key, factor in factors.items() if key in self.names}
                self.how = self.how or next((factor.how for factor in own.values() if factor.how), "")
                run.came.add(self.name)
                run.add_factors(own)
                if self._normalized:
                    run.add_row(DELTA + self.name, self.squares_of(grad, run.batch))
        except Exception as error:
            graph = isinstance(error, ValueError) and isinstance(self.rule, OwnGraph)
            if graph or (isinstance(error, Misplaced) and (self._may_leave or passes.skips)):
                self.leave_to_graph()
                run.spoiled = passes.leave(self.names.values(), _named(error, self), graph=graph or self._may_leave)
                return
            passes.fail(_named(error, self))

    def _tuned(self, factor: Factor) -> Factor:
        """Return the factor, set to the method that the user asked for at this layer."""
        if self._method == "estimate":
            return EstimatedOuter(factor, self._signs) if isinstance(factor, Outer) else factor
        if self._method is not None and hasattr(factor, "method"):
            factor.method = self._method
        return factor

    def fused_came_back(self, run: LayerPass, grad: Tensor, x: Tensor, inner: bool) -> Tensor | None:
        """Return the weight's gradient, with the norms taken on the way; None where torch is to compute it."""
        passes, batch = self._passes, run.batch
        weight = self.names["weight"]
        if is_proof() or not passes.recording or not passes.comes_back(run, inner):
            return None
        try:
            with torch.no_grad():
                tokens, grads = batch.tokens(x), batch.tokens(grad)
                factors = self.rule.factors(self.module, grad, batch, x)
                run.came.add(self.name)
                if "bias" in self.names:
                    run.add_factor(self.names["bias"], factors["bias"])
                if self._normalized:
                    run.add_row(DELTA + self.name, self.squares_of(grad, batch))
                if run.calls[weight] > 1:  # to be joined
                    run.add_factor(weight, factors["weight"])
                    return None
                if functional.linear.made_in_one_pass(tokens, grads):
                    self.how = INSIDE
                elif not self.how:
                    self.how = factors["weight"].how
                weight_grad, norms_sq = functional.linear_weight_grad(tokens, grads, offsets=batch.offsets)
                run.add_row(weight, norms_sq)
                run.keep_factors({weight: factors["weight"]})
                if run.sums is not None:
                    run.sums.add(weight, weight_grad)
                return weight_grad
        except Exception as error:
            passes.fail(_named(error, self))
            return None

    @property
    def has_own_rule(self) -> bool:
        """True where the user has said that the rule is that of the layer: it is not lipcore's, or the layer not
        torch's."""
        kind = type_with_rule(self.module)
        theirs = kind is not None and not kind.__module__.startswith("torch.")
        return theirs or not type(self.rule).__module__.startswith("lipcore.")

    def strayed(self) -> None:
        """Take in that a gradient came to a call outside the model's forward pass."""
        self._passes.strayed(self.names.values())

    def squares_of(self, grad: Tensor, batch: Batch) -> Tensor:
        """Return the squared norm of every sample's part of a gradient at the output, float64 [B]."""
        grad = local_of(grad)
        batch = batch_of_call(batch, grad, self.rule.feature_dims(self.module))
        if batch.offsets is None:
            return functional.sample_norms(grad.movedim(self.rule.sample_dim(self.module, grad, batch), 0)).square()
        rows = functional.sample_norms(grad.reshape(-1, grad.shape[-1])).square()
        return torch.stack([part.sum() for part in rows.tensor_split(batch.offsets[1:-1].cpu())])

    # ---- compiled regions: a probe takes the place of the pass

    def _trace(self, module: nn.Module, arguments: Any, keywords: Any, output: Any) -> Any:
        probe = armed.get(self.number)
        tensor = tensor_of(output)
        if probe is None or tensor is None:
            return None
        batch = Batch(probe.shape[1], self._batch_dim)
        if self.broadcast:
            batch, arguments, tensor = expanded(batch, arguments, tensor)
        elif self._passes.as_long_as_large and _may_be_positions(arguments):
            raise ValueError(
                f"module '{self.name}' ({type(module).__name__}): is called on shape {list(arguments[0].shape)}, "
                "and the model's input has as many positions as samples, so which of them these are cannot be told "
                "inside torch.compile; name the layer in broadcast= if they are positions, or use another batch size"
            )
        try:
            saved, extra = saved_of(self.rule, module, arguments, keywords, batch)
        except ValueError:  # raised, it would end the user's forward pass; what is said in it is not known here
            return with_tensor(output, Refused.apply(tensor, probe, self))  # type: ignore[no-untyped-call]
        code = coded(extra)
        if code is None:  # a layer of a rule of the user's own, which can be called once
            probed = Probed.apply(tensor, probe, self, extra, *saved)  # type: ignore[no-untyped-call]
        else:
            probed = used(tensor, probe, self.key, code, *saved)
        return watch_probed(with_tensor(output, probed), probe)

    def reduce(self, grad: Tensor, extra: Any, saved: tuple[Tensor, ...], samples: int) -> Tensor:
        """Return the gradient of a compiled region's probe, where one call brings it: float64 [columns, B]."""
        factors: dict[str, Factor] = self.rule.factors(self.module, grad, extra, *saved)
        nothing = torch.full((samples,), torch.nan, dtype=torch.float64, device=grad.device)
        rows = norms_sq_of({self.names[key]: factor for key, factor in factors.items() if key in self.names})
        if self._normalized:
            rows[DELTA + self.name] = self.squares_of(grad, Batch(samples, self._batch_dim))
        return torch.stack([*[rows.get(name, nothing) for name in self.columns[:-1]], torch.ones_like(nothing)])

    def brought(
        self, grad: Tensor, samples: int, extra: Any, saved: tuple[Tensor, ...]
    ) -> tuple[dict[str, Factor], dict[str, Tensor]]:
        """Return, while a compiled region's backward pass is recorded, the factors of one call and the rows beside
        them; neither, and recording ends, where the rule fails."""
        try:
            factors = self.rule.factors(self.module, grad, extra, *saved)
            own = {self.names[key]: self._tuned(factor) for key, factor in factors.items() if key in self.names}
            batch = Batch(samples, self._batch_dim)
            return own, {DELTA + self.name: self.squares_of(grad, batch)} if self._normalized else {}
        except Exception as error:
            self._passes.fail(_named(error, self))
            return {}, {}


def _precedes(module: nn.Module, site: LayerSite) -> bool:
    """Return whether a hook that is no tap runs before this site's, and may have changed the output."""
    if ANY_FORWARD_HOOKS:  # they run before a module's own
        return True
    for hook in module._forward_hooks.values():
        if hook is site:
            return False
        if not isinstance(hook, LayerSite):
            return True
    return False


def _site_of(output: Tensor) -> LayerSite | None:
    """Return the site of another metric that has tapped this output already; None where there is none."""
    site = getattr(output.grad_fn, "site", None)
    return site if isinstance(site, LayerSite) else None


def _may_be_positions(arguments: tuple[Any, ...]) -> bool:
    first = arguments[0] if arguments else None
    return isinstance(first, Tensor) and not first.is_floating_point() and first.dim() == 1


def _named(error: Exception, site: LayerSite) -> Exception:
    text = f"module '{site.name}' ({type(site.module).__name__}): {error}"
    return type(error)(text) if isinstance(error, (ValueError, TypeError)) else RuntimeError(text)
