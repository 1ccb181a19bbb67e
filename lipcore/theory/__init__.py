"""Quantities of Loukas, Poiitis and Jegelka, "What training reveals about neural network complexity" (NeurIPS 2021,
arXiv 2106.04186), from the windows of a Monitor: each a :class:`lipcore.metric.results.Value`, labelled exact,
one-sided (a bound) or heuristic."""

from lipcore.theory.assumptions import SigmoidHead, Slack, sigmoid_head, slack
from lipcore.theory.bias_motion import BiasVariance, bias_variance
from lipcore.theory.bias_path import BiasDistance, bias_distance
from lipcore.theory.dimension import intrinsic_dimension, log_covering_number
from lipcore.theory.equal_loss import AtLoss, at_loss
from lipcore.theory.generalization import Generalization, generalization
from lipcore.theory.global_bound import GlobalBound, lipschitz_bound
from lipcore.theory.spectral_product import spectral_norm_product
from lipcore.theory.training import Sandwich, Steadiness, sandwich, steadiness

__all__ = [
    "AtLoss",
    "BiasDistance",
    "BiasVariance",
    "Generalization",
    "GlobalBound",
    "Sandwich",
    "SigmoidHead",
    "Slack",
    "Steadiness",
    "at_loss",
    "bias_distance",
    "bias_variance",
    "generalization",
    "intrinsic_dimension",
    "lipschitz_bound",
    "log_covering_number",
    "sandwich",
    "sigmoid_head",
    "slack",
    "spectral_norm_product",
    "steadiness",
]
