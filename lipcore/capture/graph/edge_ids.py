"""Whose the gradient behind a node is, from whose that at the node is: one table for all kinds of nodes."""

from __future__ import annotations

from torch import Tensor

from lipcore.capture.graph import ids_of_indices, ids_of_shapes
from lipcore.capture.graph.ids_step import Rule, Step, is_one, narrowed, summed_to
from lipcore.models.torch_internals import saved


def ids_behind(step: Step) -> Tensor | None:
    """Return the ids at what is behind one edge of a node."""
    name = step.node.name().partition("Backward")[0]
    if name in ("Split", "SplitWithSizes"):
        return ids_of_shapes.of_split(step)
    if name == "Unbind":
        return ids_of_shapes.of_unbind(step)
    rule, first = _RULES.get(name), step.ids[0]
    if rule is None or first is None:
        return None
    found = rule(step, first)
    if found is None and (less := narrowed(first)).shape != first.shape:
        found = rule(step, less)
    return found


def _pointwise(step: Step, ids: Tensor) -> Tensor | None:
    return summed_to(ids, step.shape)


def _product(left: int) -> Rule:
    """Return the rule of nodes that make a b of a [..., M, K] and b [..., K, N]; `left` is the number of a's edge."""

    def rule(step: Step, ids: Tensor) -> Tensor | None:
        if len(step.shape) != ids.dim() or step.edge not in (left, left + 1):
            return None
        if ids.numel() == 1 and step.edge != left:
            return None  # an expert's only sample: its rows are fewer than its weight's
        summed = ids.dim() - (1 if step.edge == left else 2)
        return ids if is_one(ids, [summed]) else None

    return rule


def _grouped(step: Step, ids: Tensor) -> Tensor | None:
    return ids if step.edge == 0 and len(step.shape) == ids.dim() == 2 and is_one(ids, [1]) else None


def _normed(step: Step, ids: Tensor) -> Tensor | None:
    last = len(saved(step.node, "normalized_shape") or ()) or ids.dim()
    return ids if step.edge == 0 and is_one(ids, range(ids.dim() - last, ids.dim())) else None


def _attended(step: Step, ids: Tensor) -> Tensor | None:
    return summed_to(ids, step.shape) if is_one(ids, range(1, ids.dim())) else None


_ATTENTION = ("FlashAttention", "FlashAttentionForCpu", "EfficientAttention", "CudnnAttention")
_POINTWISE = (
    *("Add", "Sub", "Rsub", "Mul", "Div", "Neg", "Abs", "Pow", "Sqrt", "Rsqrt", "Reciprocal", "Exp", "Log", "Sin"),
    *("Cos", "Tanh", "Erf", "Silu", "Gelu", "Relu", "LeakyRelu", "Elu", "Mish", "Hardtanh", "Hardswish", "Sigmoid"),
    *("LogSigmoid", "Softplus", "Threshold", "Clamp", "ClampMin", "Minimum", "Maximum", "Where", "MaskedFill"),
    *("NativeDropout", "Clone", "ToCopy", "Alias", "Expand"),
)
_RULES: dict[str, Rule] = {
    **dict.fromkeys(_POINTWISE, _pointwise),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Topk", "Sort", "Cumsum"), ids_of_shapes.along),
    **dict.fromkeys(("Sum", "Mean", "Max", "Min", "Amax", "Amin"), ids_of_shapes.reduced),
    **dict.fromkeys(("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze"), ids_of_shapes.viewed),
    **dict.fromkeys(("Transpose", "T"), ids_of_shapes.transposed),
    "Permute": ids_of_shapes.permuted,
    "ConstantPadNd": ids_of_shapes.padded,
    "Slice": ids_of_shapes.sliced,
    "Select": ids_of_shapes.selected,
    "Cat": ids_of_shapes.joined,
    "Stack": ids_of_shapes.stacked,
    "Index": ids_of_indices.indexed,
    "IndexPut": ids_of_indices.put,
    **dict.fromkeys(("IndexAdd", "IndexCopy"), ids_of_indices.added_at),
    "IndexSelect": ids_of_indices.taken,
    "MaskedScatter": ids_of_indices.masked,
    "Gather": ids_of_indices.gathered,
    **dict.fromkeys(("Scatter", "ScatterAdd"), ids_of_indices.scatter),
    **dict.fromkeys(("Mm", "Bmm"), _product(0)),
    **dict.fromkeys(("Addmm", "Baddbmm"), _product(1)),
    "GroupedMm": _grouped,
    **{f"ScaledDotProduct{kind}": _attended for kind in _ATTENTION},
    **dict.fromkeys(("NativeLayerNorm", "FusedRmsNorm"), _normed),
}
