"""What of a layer's call is on this rank, where a plan of tensor parallelism has cut its parameters (DTensors).

The gradient of a part of a parameter comes of parts of the input and of the output's gradient, without a word of other
ranks, where these lie as the rule says. Then the squares of the parts add up to those of the whole. Where a rank has
other positions or samples (sequence parallelism), its rows make an addend of the gradient, whose squares do not add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lipcore.capture.layers.coverage import ParameterCoverage
from lipcore.capture.layers.options import LayerOptions
from lipcore.layers import Rule
from lipcore.layers.factor import norms_sq_of
from lipcore.layers.rule import Cut
from lipcore.models.dtensors import is_one_block, local_of
from lipcore.models.tensor_parallel import PartRanks

SKIP = "on_unsupported='skip' leaves its parameters out"
_LIES = (
    "{0} lies on its ranks as {1}, and not {2}, so that a rank's rows make a part of the sum that a sample's gradient "
    "is (sequence parallelism, or partial sums that are passed on), and squares of such do not add up; " + SKIP
)
_UNKNOWN = (
    "{0} lies on its ranks as {1}, and its parameters are plain tensors (DistributedDataParallel(device_mesh=) makes "
    "such of parts), so that nobody knows of what they are parts; use fully_shard() beside a tensor-parallel plan"
)
_NO_CUT = (
    "lies in parts on several ranks (tensor parallelism, cut along dimension {0}), and a {1} has no gradient of its "
    "part that would add up; " + SKIP
)
_WHOLE_BESIDE_CUT = (
    "is whole on ranks that have the gradient at its {0}'s output in parts, since another parameter there is cut "
    "(tensor parallelism), so that its gradient is gathered from them; cut it as the other one is, or " + SKIP
)
_NO_RULE = "is a DTensor (tensor parallelism), and no layer's rule measures it: {0}; " + SKIP
_OTHER_FEATURES = (
    "its input of shape {} has not the {} features that its parameters on this rank are for (tensor parallelism that "
    "cuts what comes in within the layer); " + SKIP
)
_NOT_OF_PARTS = (
    "{0}: the model's parameters lie in parts on several ranks (tensor parallelism), which add up squared norms of "
    "whole gradients alone; leave it out"
)
_COMPILED = (
    "model: is compiled, and its parameters lie in parts on several ranks (tensor parallelism): what they add up stays "
    "inside the compiled graph; run the model in eager mode where samples' gradients are to be measured"
)
_WHOLE = Cut()
#: Nodes behind which a tensor is another view of the same values, or a copy.
_VIEWS = frozenset(
    {f"{name}Backward0" for name in ("View", "UnsafeView", "Transpose", "Permute", "Clone", "ToCopy", "Unsqueeze")}
    | {f"{name}Backward0" for name in ("Slice", "Split", "Unbind", "Select", "Unflatten", "Alias")}
    | {"TappedBackward", "PassedOnBackward"}
)


class Misplaced(ValueError):
    """A call's tensors do not lie on the ranks as its parameters' gradients need it."""


@dataclass(frozen=True)
class Placing:
    """Places of a layer's input and output on the ranks, by the cuts of its parameters.

    Attributes:
        features: of the whole input or output that is cut; 0: none is.
        first, count: of these, the rank's own; -1: they are not one block.
    """

    cut: Cut
    features: int = 0
    first: int = 0
    count: int = 0

    @classmethod
    def of(cls, module: nn.Module, rule: Rule, names: Mapping[str, str], parts: PartRanks) -> Placing:
        """Find it for a layer whose parameters are called `names` by key."""
        cut = cut_of(rule, names, parts)
        for key, name in names.items():
            dim, parameter = parts.cuts.get(name), module._parameters.get(key)
            if dim is not None and parameter is not None and rule.cuts.get(key, {}).get(dim) == cut != _WHOLE:
                whole = parameter.shape[dim]
                each = -(-whole // len(parts.ranks))  # as torch cuts, but for packed parameters
                first = min(parts.place * each, whole)
                return cls(cut, whole, first if is_one_block(parameter) else -1, min(each, whole - first))
        return cls(cut)

    def own(self, tensor: Any, cut: int) -> Any:
        """Return this rank's features of a plain tensor, which a plan may gather or cut within the layer's forward."""
        if hasattr(tensor, "placements") or tensor.shape[cut] != self.features or self.first < 0:
            return tensor
        return tensor.narrow(cut, self.first, self.count)


def own_inputs(
    arguments: tuple[Any, ...], keywords: dict[str, Any], placing: Placing | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a layer's call with this rank's features of the first tensor."""
    if placing is None or (cut := placing.cut.input) is None:
        return arguments, keywords
    for i, value in enumerate(arguments):
        if isinstance(value, Tensor):
            return (*arguments[:i], placing.own(value, cut), *arguments[i + 1 :]), keywords
    for name, value in keywords.items():
        if isinstance(value, Tensor):
            return arguments, keywords | {name: placing.own(value, cut)}
    return arguments, keywords


def cut_of(rule: Rule, names: Mapping[str, str], parts: PartRanks) -> Cut:
    """Return how input and output of a layer lie, by the cuts of its parameters: `names` by key."""
    found = (rule.cuts.get(key, {}).get(parts.cuts[name]) for key, name in names.items() if name in parts.cuts)
    return next(filter(None, found), _WHOLE)


def refuse_options(options: LayerOptions, *, compiled: bool) -> None:
    """Raise ValueError for what is not to be had where parameters are cut."""
    asked = {
        "normalized": options.normalized,
        "keep_factors": options.keep_factors,
        "methods": "estimate" in options.methods.values(),
        "reference": options.measure is not norms_sq_of,
    }
    for argument, wanted in asked.items():
        if wanted:
            raise ValueError(_NOT_OF_PARTS.format(argument))
    if compiled:
        raise ValueError(_COMPILED)


def leave_out_uncut(coverage: ParameterCoverage, parts: PartRanks) -> None:
    """Uncover the parameters in parts that no rule measures as such."""
    for _, module, rule, names in coverage.tapped:
        cut = cut_of(rule, names, parts)
        for key, name in names.items():
            dim, kind = parts.cuts.get(name), type(module).__name__
            if dim is not None and rule.cuts.get(key, {}).get(dim) != cut:
                coverage.uncover(name, _NO_CUT.format(dim, kind))
            elif dim is None and cut.output is not None:
                coverage.uncover(name, _WHOLE_BESIDE_CUT.format(kind))
    by_graph = coverage.by_graph
    for name, tensor in coverage.parameters():
        if hasattr(tensor, "placements") and name in by_graph and name in parts.on_mesh:
            coverage.uncover(name, _NO_RULE.format(by_graph[name]))


def check_inputs(arguments: Sequence[Any], keywords: Mapping[str, Any], placing: Placing | None) -> None:
    """Raise Misplaced where the tensors that a layer is called with do not lie as its rule says; ValueError where they
    lie in parts and `placing` is None: no parameter of the model does."""
    expected = None if placing is None else placing.cut.input
    for value in (*arguments, *keywords.values()):
        if isinstance(value, Tensor):
            placed = value if placing is None or hasattr(value, "placements") else _placed_before(value)
            if placed is not None:
                _check("its input", placed, expected, known=placing is not None)
            elif placing is not None and expected is not None and value.shape[expected] != placing.count:
                raise Misplaced(_OTHER_FEATURES.format(list(value.shape), placing.count))
            expected = None  # the others are whole


def _placed_before(tensor: Tensor) -> Any:
    """Return how the DTensor lies of whose values on this rank a tensor is another view (a projection's heads); None
    where nothing shows one."""
    node: Any = tensor.grad_fn
    while node is not None:
        if hasattr(node, "dtensor_spec"):  # to_local()
            return node.dtensor_spec
        node = node.next_functions[0][0] if node.name() in _VIEWS else None
    return None


def here(grad: Tensor, placing: Placing | None) -> Tensor:
    """Return this rank's values of the gradient at a layer's output; Misplaced where they are not what its parameters'
    gradient comes of. No collective."""
    cut = None if placing is None else placing.cut.output
    if placing is not None and cut is not None:
        grad = _cut_along(grad, cut) if hasattr(grad, "placements") else placing.own(grad, cut)
    _check("the gradient at its output", grad, cut, known=placing is not None)
    return local_of(grad)


def _cut_along(grad: Any, cut: int) -> Any:
    """Return a whole DTensor cut along a dimension; any other one as it is."""
    if not all(placement.is_replicate() for placement in grad.placements) or grad.device_mesh.ndim != 1:
        return grad
    from torch.distributed.tensor import Shard

    return grad.redistribute(placements=[Shard(grad.dim() + cut)])


def _check(what: str, tensor: Any, cut: int | None, *, known: bool) -> None:
    dim = None if cut is None else tensor.dim() + cut
    for i, placement in enumerate(getattr(tensor, "placements", ())):
        right = placement.is_replicate() if dim is None else placement.is_shard(dim)
        if not right and tensor.device_mesh.size(i) > 1:
            expected = "whole" if dim is None else f"cut along dimension {dim}"
            if not known:
                raise ValueError(_UNKNOWN.format(what, placement))
            raise Misplaced(_LIES.format(what, placement, expected))
