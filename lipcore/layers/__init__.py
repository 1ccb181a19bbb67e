"""Which layers have per-sample gradients, and how they come about: one file per family of layers.

A layer of your own needs a :class:`Rule`: what of a call to keep, and which factors make the per-sample gradients::

    class Scale(torch.nn.Module):
        def __init__(self, features):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(features))

        def forward(self, x):
            return self.scale * x

    class ScaleRule(lipcore.layers.Rule):
        def save(self, module, arguments, keywords, batch):
            return (batch.tokens(arguments[0]),), batch

        def factors(self, module, grad_output, batch, x):
            return {"scale": lipcore.layers.RowSum(batch.tokens(grad_output), x)}

    lipcore.layers.register(Scale, ScaleRule())
"""

from lipcore.layers.factor import Factor, Sum
from lipcore.layers.factors import ChannelSum, Dense, Indexed, Outer, Patches, RowSum
from lipcore.layers.registry import register, rule_for
from lipcore.layers.rule import Batch, Rule

from lipcore.layers import convolution, embedding, linear, normalization, prelu  # noqa: F401  # isort: skip

__all__ = [
    "Batch",
    "ChannelSum",
    "Dense",
    "Factor",
    "Indexed",
    "Outer",
    "Patches",
    "RowSum",
    "Rule",
    "Sum",
    "register",
    "rule_for",
]
