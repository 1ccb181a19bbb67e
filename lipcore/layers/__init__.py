"""Which layers have per-sample gradients, and how they come about: one file per family of layers."""

from lipcore.layers.factor import Factor, Sum
from lipcore.layers.rule import Batch, Rule

__all__ = ["Batch", "Factor", "Rule", "Sum"]
