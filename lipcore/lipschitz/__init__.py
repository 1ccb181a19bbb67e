"""Local Lipschitz constants and the normalised first-layer gradient length."""

from lipcore.lipschitz.metric import Lipschitz, PerSample
from lipcore.lipschitz.pointwise import local_lipschitz

__all__ = ["Lipschitz", "PerSample", "local_lipschitz"]
