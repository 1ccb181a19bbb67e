"""Which layers have per-sample gradients, and how they come about: one file per family of layers.

A layer of one's own needs a :class:`Rule`, which says what a call keeps and of which factors its parameters' per-sample
gradients consist. For y = x * scale, whose gradient is the sum of g * x over a sample's rows:

>>> import torch
>>> from lipcore import layers
>>> class Scale(torch.nn.Module):
...     def __init__(self, features):
...         super().__init__()
...         self.scale = torch.nn.Parameter(torch.ones(features))
...     def forward(self, x):
...         return x * self.scale
>>> class ScaleRule(layers.Rule):
...     def save(self, module, arguments, keywords, batch):
...         batch.check(arguments[0])
...         return (arguments[0],), batch
...     def factors(self, module, grad_output, batch, x):
...         return {"scale": layers.RowSum(batch.tokens(grad_output), batch.tokens(x), batch.offsets)}
>>> layers.register(Scale, ScaleRule())
>>> isinstance(layers.rule_for(Scale(3)), ScaleRule)
True

What else lipcore asks about a type of layer has a default and is declared in its rule too: methods to choose from,
when it mixes samples, whether an in-place activation may follow. See :class:`Rule`.

Factors: :class:`Outer` (a weight that multiplies rows), :class:`RowSum` and :class:`ChannelSum` (biases and scales),
:class:`Indexed` (tables of rows), :class:`Patches` (convolutions), :class:`Dense` (per-sample gradients as they are),
:class:`Blocks` (a parameter whose blocks of rows have different factors), :class:`Stacked` (one of parts, of which each
row meets one).
"""

from lipcore.layers import (
    attention,
    batch_norm,
    bilinear,
    convolution,
    embedding,
    embedding_bag,
    group_norm,
    instance_norm,
    layer_norm,
    linear,
    prelu,
    rms_norm,
    transposed_convolution,
)
from lipcore.layers.factor import Factor, Sum, norms_sq_of
from lipcore.layers.factor_dense import Blocks, Dense
from lipcore.layers.factor_indexed import Indexed, Tied
from lipcore.layers.factor_outer import Outer
from lipcore.layers.factor_patches import Patches
from lipcore.layers.factor_stacked import Stacked
from lipcore.layers.factor_sums import ChannelSum, RowSum
from lipcore.layers.registry import register, registered, rule_for
from lipcore.layers.rule import Batch, Rule

__all__ = [
    "Batch",
    "Blocks",
    "ChannelSum",
    "Dense",
    "Factor",
    "Indexed",
    "Outer",
    "Patches",
    "RowSum",
    "Rule",
    "Stacked",
    "Sum",
    "Tied",
    "attention",
    "batch_norm",
    "bilinear",
    "convolution",
    "embedding",
    "embedding_bag",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "linear",
    "norms_sq_of",
    "prelu",
    "register",
    "registered",
    "rms_norm",
    "rule_for",
    "transposed_convolution",
]
