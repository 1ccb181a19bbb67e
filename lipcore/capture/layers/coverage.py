"""Which trainable parameters have a rule, by structure and by the first forward pass's graph; and why others not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from lipcore.layers import Rule, rule_for
from lipcore.layers.alike import rule_alike
from lipcore.layers.registry import why_no_rule
from lipcore.models.checks import check_kind
from lipcore.models.copies import TAKE_OFF, is_for_a_hook
from lipcore.models.names import named_modules

_SHOWN = 5  # parameters, and reasons, that an error names
_RULE = "lipcore.layers.register() takes a rule for the module that uses them"
_GRAPH = "max_replay_bytes= above 0 measures them from the autograd graph"
_COMPILED = ", and torch.compile leaves no autograd graph to measure it from"
_UNCOMPILED = (
    "the autograd graph of the module that was compiled measures them: make the metric of that module, and call it, "
    "not the compiled one, in the steps that are to be measured"
)
_SKIP, _FREEZE = (
    "on_unsupported='skip' measures the other parameters",
    "requires_grad_(False) freezes what is not trained",
)

#: What differs where one thing is wrong with several layers: which of them, and shapes.
_THIS_ONE = re.compile(r"module '[^']*' \([^)]*\): |\[[\d, ]*\]")

_CONTAINER = (
    "is in a {0}, which is never called and so can have no rule; a rule for the module that uses it serves where the "
    "parameters are that module's own attributes"
)
OUTSIDE = (
    "has a gradient that no sample's row has brought: the loss uses it itself (the model returns it, or a penalty); "
    "return it expanded over the samples, x.expand(B, ...), or use it in forward(); penalties are for the optimizer's "
    "weight_decay"
)
REENTRANT = (
    "has a gradient that no sample's row has brought, and the model has a checkpoint with use_reentrant=True, whose "
    "graph is made in the backward pass alone; use use_reentrant=False"
)
GIVEN = (
    "forward() itself gives it a gradient (.grad = ..., or a backward pass inside), and no sample's row brings one; "
    "set it after the loss's backward pass"
)
UNSEEN = (
    "has a gradient, but none came from its layer's hooks: its call was not seen, or its rule forgets the parameter"
)


class ParameterCoverage:
    """The state of every parameter: covered by which layer's rule, frozen, or not covered and why."""

    def __init__(self) -> None:
        self.tapped: list[tuple[str, nn.Module, Rule, dict[str, str]]] = []
        self.covered: dict[str, str] = {}  #: parameter -> "layer (Type)", or several of them for a tied one
        self.frozen: list[str] = []
        self.may_mix: list[tuple[str, nn.Module, Rule]] = []  #: layers that mix samples in some mode (BatchNorm)
        self._mixed_before: set[str] = set()  # of these, in that mode when the model was looked at
        self.uncovered: dict[str, str] = {}  #: parameter -> why
        self.by_graph: dict[str, str] = {}  #: parameter that is measured from the autograd graph -> why no rule serves
        self.graph_is_off = False  #: the graph might measure parameters, and was not asked to
        self._compiled = False  # there is no graph that might
        self._mixing: set[str] = set()  # of the uncovered ones, those of layers that mix samples
        self._without_rule: set[str] = set()  # of the uncovered ones, those that the graph may measure
        self._parameters: dict[str, tuple[nn.Module, str]] = {}
        self._trainable: dict[str, bool] = {}  # of these, when the model was looked at

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters as they are now, by canonical name."""
        for name, (owner, key) in self._parameters.items():
            parameter = owner._parameters.get(key)
            if parameter is not None:
                yield name, parameter

    def places(self) -> Iterator[tuple[dict[str, nn.Parameter | None], str, nn.Parameter]]:
        """Yield every parameter as it is now, with the dict that holds it and its key there."""
        for owner, key in self._parameters.values():
            parameter = owner._parameters.get(key)
            if parameter is not None:
                yield owner._parameters, key, parameter

    def measured(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are covered and not frozen at present."""
        return {name: p for name, p in self.parameters() if name in self.covered and p.requires_grad}

    def frozen_since(self) -> frozenset[str]:
        """Return the parameters that were frozen after the model was looked at; raise ValueError for one that was
        unfrozen, or that is computed from others."""
        for name, (owner, key) in self._parameters.items():
            parameter = owner._parameters.get(key)
            if parameter is None or parameter.requires_grad is not self._trainable.get(name) or not parameter.is_leaf:
                break
        else:
            return frozenset()
        for name, parameter in self.parameters():
            if not parameter.is_leaf:
                raise ValueError(
                    f"model: parameter '{name}' is computed from other tensors in this call (functional_call), whose "
                    "gradients are others than its own; call the model itself, or run that call under torch.no_grad()"
                )
        now = {name: parameter.requires_grad for name, parameter in self.parameters()}
        frozen = set()
        for name, before in self._trainable.items():
            if name not in now or now[name] > before:
                what = "was frozen when the model was looked at, and is trained now"
                what = what if name in now else "is not there any more (parametrized, pruned, removed)"
                raise ValueError(
                    f"model: parameter '{name}' {what}; call Monitor.rebind(), or make a new metric afterwards"
                )
            if before and not now[name]:
                frozen.add(name)
        return frozenset(frozen)

    def mixing(self) -> str:
        """Return a text naming a layer that mixes samples since its mode changed (BatchNorm in train mode), or ""."""
        for name, module, rule in self.may_mix:
            if name not in self._mixed_before and (reason := rule.refuses(module)):
                return f"module '{name}' ({type(module).__name__}): {reason}"
        return ""

    def uncover(self, name: str, reason: str) -> None:
        self.covered.pop(name, None)
        self.by_graph.pop(name, None)
        self.uncovered[name] = reason
        if self._mixing:  # what a proof finds in a model with such a layer
            self._mixing.add(name)

    def leave_to_graph(self, name: str, why: str) -> None:
        """Have a parameter measured from the autograd graph, whatever rules its layers have."""
        self.uncovered.pop(name, None)
        self.by_graph[name] = why
        self.covered[name] = f"{name.rpartition('.')[0] or 'model'} (graph)"

    def leave_to_own_graph(self, name: str, module: nn.Module) -> None:
        """Have a parameter measured by its module's own graph, which is run again in the backward pass."""
        self.by_graph.pop(name, None)
        self.covered[name] = f"{name.rpartition('.')[0] or 'model'} ({type(module).__name__}, in a graph of its own)"

    def leave_rest_to_graph(self) -> None:
        """Have the parameters without a rule measured from the autograd graph."""
        for name, why in list(self.uncovered.items()):
            if name in self._without_rule:
                self.leave_to_graph(name, why)

    def tell_compiled(self) -> None:
        """Say, of the parameters without a rule, that the model is compiled, so that the graph does not show them."""
        self._compiled = True
        for name in self._without_rule & self.uncovered.keys():
            self.uncovered[name] += _COMPILED

    def check(self) -> None:
        """Raise ValueError that names the parameters without a rule."""
        if not self.uncovered:
            return
        count, by_reason = len(self.uncovered), dict[str, list[str]]()
        for name, reason in self.uncovered.items():
            by_reason.setdefault(_THIS_ONE.sub("", reason), []).append(name)
        named = [_named(names, self.uncovered[names[0]]) for names in by_reason.values()][:_SHOWN]
        left = count - sum(map(len, [*by_reason.values()][:_SHOWN]))
        more = f"; and {left} more" if left else ""
        # Of layers that mix samples no rule measures anything, and they mix them when they are frozen too.
        others = [] if self.uncovered.keys() <= self._mixing else [_RULE, _FREEZE]
        ways = [_SKIP, *others] if self.covered else others[:1]  # beside these there is nothing to measure
        if any(is_for_a_hook(reason) for reason in self.uncovered.values()):
            ways.insert(0, TAKE_OFF)
        if self.graph_is_off and not self._without_rule.isdisjoint(self.uncovered):
            ways.insert(0, _GRAPH)
        if self._compiled and not self._without_rule.isdisjoint(self.uncovered):
            ways.insert(0, _UNCOMPILED)
        raise ValueError(
            f"model: {count} trainable parameter{'s' * (count > 1)} cannot be measured per sample: "
            f"{'; '.join(named)}{more}" + (f". Ways out: {'; '.join(ways)}" if ways else "")
        )

    @property
    def share(self) -> str:
        """The share of the trainable parameters that is measured, in words; "" where that is all."""
        trained = {name: parameter.numel() for name, parameter in self.parameters() if parameter.requires_grad}
        measured = [name for name in trained if name in self.covered]
        if len(measured) == len(trained):
            return ""
        elements = sum(trained[name] for name in measured) / max(1, sum(trained.values()))
        # Never rounded up to all of it.
        percent = int(1000 * elements) / 10
        return f"{len(measured)} of {len(trained)} trainable parameters, {percent:g} % of their elements"

    def __str__(self) -> str:
        lines = [f"measured     {self.share}"] if self.share else []
        lines += [f"covered      {name}: {layer}" for name, layer in self.covered.items()]
        lines += [f"frozen       {name}" for name in self.frozen]
        lines += [f"not covered  {name}: {reason}" for name, reason in self.uncovered.items()]
        return "\n".join(lines)


def cover(model: nn.Module, *, alike: bool = False) -> ParameterCoverage:
    """Find the parameters of a model that have a rule, by the structure of its modules; with `alike` also by what
    modules of types without a rule compute."""
    coverage = ParameterCoverage()
    names: dict[int, str] = {}
    check_kind(model)
    modules = list(named_modules(model))
    for module_name, module in modules:
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in names:
                name = f"{module_name}.{key}" if module_name else key
                names[id(parameter)] = name
                coverage._parameters[name] = (module, key)
    inside_rule: set[int] = set()  # children whose parameters their parent's rule covers
    for module_name, module in modules:
        rule = None if id(module) in inside_rule else rule_for(module)
        if rule is None and alike and id(module) not in inside_rule:
            rule = rule_alike(module)
        if rule is None:
            continue
        if rule.may_mix_samples:
            coverage.may_mix.append((module_name, module, rule))
        parametrized = getattr(module, "parametrizations", None) is not None
        own, left = dict[str, str](), dict[str, str]()  # parameters of the rule, and of the graph with the reason
        for key, parameter in module.named_parameters():
            if parametrized or not parameter.requires_grad:
                continue
            if parameter.is_complex():
                left[names[id(parameter)]] = "it is complex, and the rules are for real numbers"
            elif _makes_another(module, key):
                left[names[id(parameter)]] = _why(module, key)
            elif reason := rule.leaves(module):
                left[names[id(parameter)]] = reason
            else:
                own[key] = names[id(parameter)]
        coverage.uncovered |= left
        coverage._without_rule |= left.keys()
        if len(list(module.children())) and not parametrized:
            inside_rule.update(id(child) for child in module.modules() if child is not module)
        reason = rule.refuses(module)
        if reason and rule.may_mix_samples:
            coverage._mixed_before.add(module_name)
            if not own:
                coverage.uncovered[module_name] = reason  # it spoils the other parameters' gradients
            coverage._mixing |= set(own.values()) or {module_name}
        for name in own.values() if reason else ():
            coverage.uncovered.setdefault(name, reason)
        if reason or not own:
            continue
        coverage.tapped.append((module_name, module, rule, own))
        layer = f"{module_name or 'model'} ({type(module).__name__})"
        for name in own.values():
            coverage.covered[name] = f"{coverage.covered[name]} + {layer}" if name in coverage.covered else layer
    for name, parameter in coverage.parameters():
        if not parameter.requires_grad:
            coverage.frozen.append(name)
        elif name not in coverage.covered and name not in coverage.uncovered:
            coverage.uncovered[name] = _why(*coverage._parameters[name])
            coverage._without_rule.add(name)
    coverage._trainable = {name: parameter.requires_grad for name, parameter in coverage.parameters()}
    return coverage


def _named(names: Sequence[str], reason: str) -> str:
    """Say once why some parameters are not covered."""
    first, *others = names
    also = [f"'{name}'" for name in others[:_SHOWN]]
    also += [f"{len(others) - _SHOWN} more"] if len(others) > _SHOWN else []
    return f"'{first}': {reason}" + (f" (so too {', '.join(also)})" if also else "")


def _makes_another(module: nn.Module, key: str) -> bool:
    """Return whether a parameter is the one that pruning or the older weight_norm computes a plain tensor from."""
    return any(isinstance(value, Tensor) and key.startswith(f"{name}_") for name, value in module.__dict__.items())


def _why(owner: nn.Module, key: str) -> str:
    kind = type(owner).__name__
    if _makes_another(owner, key):
        return f"is not used by {kind} itself, which has a tensor that is computed from it (pruning, weight_norm)"
    if kind == "ParametrizationList":
        return "is behind a parametrization (weight_norm, spectral_norm), whose gradient is not the layer's"
    if isinstance(owner, (nn.ParameterList, nn.ParameterDict)):
        return _CONTAINER.format(kind)
    return why_no_rule(owner)
