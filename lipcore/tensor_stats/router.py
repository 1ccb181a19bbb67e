"""Where a mixture of experts sends its tokens, from what its routers return."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lipcore.metric.results import MetricResult, Value
from lipcore.models.arguments import is_integer
from lipcore.models.names import named_modules, with_prefix
from lipcore.tensor_stats.extra import Extra, matching_modules

#: By the name of a router or a pattern of such: to how many experts a token goes. Routers return logits.
RouterChoice = Mapping[str, int]

_ROUTERS = ("gate", "router")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_TOP_K = ("top_k", "num_experts_per_tok", "topk")
FOUND = "found by the names of modules: taken to be logits, of which the largest choose"


class RouterShares(Extra):
    """Shares of tokens per expert, by the `top_k` largest logits of each token, and the entropies of both.

    Args:
        place: name of the router.
        experts: how many logits it returns; None: as many as come first.
        named: by the user.
    """

    kind = "router"

    def __init__(self, place: str, experts: int, top_k: int, *, named: bool) -> None:
        self.place, self.experts, self.top_k, self.named = place, experts, top_k, named
        self.modules = (place,)
        self.sums, self.most = experts + 2, 0

    @classmethod
    def described(cls, place: str, sums: int, most: int, *, named: bool) -> RouterShares:
        return cls(place, sums - 2, 1, named=named)

    @property
    def rule(self) -> str:
        return f"top {self.top_k} of {self.experts} logits{'' if self.named else ', found by name'}"

    def read(self, module: str, output: Tensor) -> tuple[Tensor, Tensor]:
        if output.dim() < 2 or output.shape[-1] != self.experts:
            raise ValueError(f"'{module}' returns {list(output.shape)}, not logits of {self.experts} experts")
        logits = output.reshape(-1, self.experts).float()
        usable = logits.isfinite().all(1)
        logits = torch.where(usable.unsqueeze(1), logits, 0.0)
        chosen = torch.zeros(self.experts, dtype=torch.int64, device=logits.device)
        top = logits.topk(self.top_k, dim=1).indices
        chosen.scatter_add_(0, top.reshape(-1), usable.long().repeat_interleave(self.top_k))
        logs = logits.log_softmax(1)
        entropy = torch.where(usable, -(logs.exp() * logs).sum(1), 0.0).double().sum()
        numbers = torch.cat([chosen.double(), usable.sum().double().reshape(1), entropy.reshape(1)])
        return numbers, numbers[:0]

    def add_to(self, result: MetricResult, sums: Tensor, most: Tensor) -> None:
        tokens = int(sums[self.experts])
        if not tokens:
            return
        label, note = ("exact", "") if self.named else ("heuristic", FOUND)
        shares = (sums[: self.experts] / sums[: self.experts].sum()).tolist()

        def value(number: float) -> Value:
            return Value(number, tokens, label, note=note)  # type: ignore[arg-type]

        for expert, share in enumerate(shares):
            result.add("router_share", f"{self.place}[{expert}]", "tensor", mean=value(share))
        result.add("router_share", self.place, "group", min=value(min(shares)), max=value(max(shares)))
        of_shares = -sum(share * math.log(share) for share in shares if share > 0)
        entropies = {"tokens": value(float(sums[-1]) / tokens), "shares": value(of_shares)}
        result.add("router_entropy", self.place, "group", **entropies)


def find_routers(model: nn.Module, choice: RouterChoice | str | None) -> tuple[list[RouterShares], dict[str, str]]:
    """Return what is to be watched, and why it is not where a router was seen.

    Raises:
        TypeError, ValueError: a choice that cannot be read, or that names nothing in the model.
    """
    if choice is None:
        return [], {}
    if choice == "auto":
        return _found(model)
    modules = dict(named_modules(model))
    shares = []
    for pattern, names, top_k in matching_modules(model, choice, "router"):
        for name in names:
            experts = _outputs_of(modules[name])
            if experts is None:
                raise ValueError(f"router: {name!r} is a {type(modules[name]).__name__}, not a linear layer to experts")
            if not is_integer(top_k) or not 1 <= top_k <= experts:
                raise ValueError(f"router: expected of {pattern!r} 1 to {experts} experts per token, got {top_k!r}")
            shares.append(RouterShares(name, experts, top_k, named=True))
    return shares, {}


def _outputs_of(module: nn.Module) -> int | None:
    """Return the features that a linear layer, or a module with one weight [experts, features], returns."""
    if isinstance(module, nn.Linear):
        return module.out_features
    weight = module._parameters.get("weight")
    return weight.shape[0] if weight is not None and weight.dim() == 2 else None


def _found(model: nn.Module) -> tuple[list[RouterShares], dict[str, str]]:
    shares, refused = [], {}
    for name, module in named_modules(model):
        children = dict(module.named_children())
        router = next((part for part in _ROUTERS if part in children), None)
        if router is None or "experts" not in children:
            continue
        place, gate = with_prefix(name, router), children[router]
        inside = children["experts"]
        experts = len(inside) if isinstance(inside, nn.ModuleList) else _number((module, inside, gate), _EXPERTS)
        top_k = _number((module, gate), _TOP_K)
        is_logits = isinstance(gate, nn.Linear) or type(gate).__name__.endswith("TopKRouter")
        if not is_logits:
            refused[place] = f"a {type(gate).__name__} may return something else than logits; name it"
        elif experts is None or _outputs_of(gate) != experts:
            refused[place] = "it does not say how many experts it chooses from"
        elif top_k is None or top_k > experts:
            choice = f"router={{{place!r}: <experts per token>}}"
            refused[place] = f"it does not say to how many experts a token goes; name it: {choice}"
        else:
            shares.append(RouterShares(place, experts, top_k, named=False))
    return shares, refused


def _number(owners: tuple[Any, ...], keys: tuple[str, ...]) -> int | None:
    values = (getattr(owner, key, None) for owner in owners for key in keys)
    return next((int(value) for value in values if value is not None and is_integer(value) and value > 0), None)
