"""Which trainable parameters have a rule, by structure and by the first forward pass's graph; and why others not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lipcore.layers import Rule, rule_for
from lipcore.names import named_modules

_WAYS_OUT = (
    "Ways out: on_unsupported='skip' measures the other parameters; lipcore.layers.register() takes a rule for your "
    "own layer; requires_grad_(False) freezes what is not trained"
)

_BATCH_STATISTICS = torch.nn.modules.batchnorm._BatchNorm


class Coverage:
    """Parameter by parameter: covered by which layer's rule, frozen, or not covered and why."""

    def __init__(self) -> None:
        self.tapped: list[tuple[str, nn.Module, Rule, dict[str, str]]] = []
        self.covered: dict[str, str] = {}  #: parameter -> "layer (Type)", or several of them for a tied one
        self.frozen: list[str] = []
        self.uncovered: dict[str, str] = {}  #: parameter -> why
        self.used: list[Tensor] = []  #: parameters in the graph of the first forward pass
        self._parameters: dict[str, tuple[nn.Module, str]] = {}

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters as they are now, by canonical name."""
        for name, (owner, key) in self._parameters.items():
            parameter = owner._parameters.get(key)
            if parameter is not None:
                yield name, parameter

    def uncover(self, name: str, reason: str) -> None:
        self.covered.pop(name, None)
        self.uncovered[name] = reason

    def check(self) -> None:
        """ValueError that names what is not covered."""
        if not self.uncovered:
            return
        named = [f"'{name}': {reason}" for name, reason in self.uncovered.items()]
        more = f"; and {len(named) - 5} more" if len(named) > 5 else ""
        raise ValueError(
            f"model: {len(named)} trainable parameter{'s' * (len(named) > 1)} cannot be measured per sample: "
            f"{'; '.join(named[:5])}{more}. {_WAYS_OUT}"
        )

    def check_single_use(self) -> None:
        """ValueError when a parameter is tied, which a compiled region cannot join."""
        for name, layers in self.covered.items():
            if " + " in layers:
                raise ValueError(
                    f"model: parameter '{name}' is shared by {layers}; inside torch.compile the two gradients cannot "
                    "be joined. Run the model in eager mode, or untie them"
                )

    def __str__(self) -> str:
        lines = [f"covered      {name}: {layer}" for name, layer in self.covered.items()]
        lines += [f"frozen       {name}" for name in self.frozen]
        lines += [f"not covered  {name}: {reason}" for name, reason in self.uncovered.items()]
        return "\n".join(lines)


def cover(model: nn.Module) -> Coverage:
    """What the modules' structure tells."""
    coverage = Coverage()
    names: dict[int, str] = {}
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
        if rule is None:
            continue
        parametrized = getattr(module, "parametrizations", None) is not None
        own: dict[str, str] = {}
        for key, parameter in module.named_parameters():
            if parametrized or not parameter.requires_grad:
                continue
            own[key] = names[id(parameter)]
        if len(list(module.children())) and not parametrized:
            inside_rule.update(id(child) for child in module.modules() if child is not module)
        reason = rule.refuses(module)
        if reason and not own and isinstance(module, _BATCH_STATISTICS):
            coverage.uncovered[module_name] = reason  # it spoils the other parameters' gradients
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
            owner, _ = coverage._parameters[name]
            coverage.uncovered[name] = _why(owner)
    return coverage


def _why(owner: nn.Module) -> str:
    kind = type(owner).__name__
    if kind == "ParametrizationList":
        return "is behind a parametrization (weight_norm, spectral_norm), whose gradient is not the layer's"
    return f"there is no rule for {kind}"


def audit_graph(output: Any, coverage: Coverage, calls: Counter[str], *, skip: bool) -> None:
    """Compare the graph behind a forward pass's output with the calls that came through hooks: a parameter that is used
    more often than it was tapped (F.linear on another layer's weight) would get a wrong norm."""
    uses = _uses(output)
    for name, parameter in coverage.parameters():
        if not parameter.requires_grad or name not in coverage.covered:
            continue
        used = uses.get(id(parameter), 0)
        if used:
            coverage.used.append(parameter)
        if used > max(1, calls[name]) or (used and not calls[name]):
            coverage.uncover(
                name,
                f"is used {used} times in the forward pass, but only {calls[name]} times by its own layer's call "
                "(a function such as F.linear is given it directly)",
            )
    if not skip:
        coverage.check()


def _uses(output: Any) -> dict[int, int]:
    """Edges of the graph into each parameter, by id; a cast that autocast keeps for several uses counts once a use."""
    edges: Counter[Any] = Counter()
    casts: list[tuple[Any, Any]] = []
    leaves: dict[Any, Tensor] = {}
    todo = [leaf.grad_fn for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        for child, _ in node.next_functions:
            if child is None:
                continue
            variable = getattr(child, "variable", None)
            if variable is not None:
                leaves[child] = variable
                if node.name() == "ToCopyBackward0":
                    casts.append((node, child))
            edges[child] += 1
            if child not in seen:
                seen.add(child)
                todo.append(child)
    uses = {id(leaf): edges[child] for child, leaf in leaves.items()}
    for cast, child in casts:
        uses[id(leaves[child])] += max(0, edges[cast] - 1)
    return uses
