"""lipcore: measure what a neural network is learning while it trains, at almost no cost."""

from lipcore import _setup

_setup.connect()

from lipcore import functional, layers, reference  # noqa: E402
from lipcore.clipping import clip_factors  # noqa: E402
from lipcore.distribution import Distribution  # noqa: E402
from lipcore.lipschitz import Lipschitz  # noqa: E402
from lipcore.metric import Metric  # noqa: E402
from lipcore.monitor import Monitor  # noqa: E402
from lipcore.names import by_block  # noqa: E402
from lipcore.per_sample import PerSampleGradNorms  # noqa: E402
from lipcore.pointwise import local_lipschitz  # noqa: E402
from lipcore.sample_scores import SampleScores  # noqa: E402
from lipcore.trajectory import Trajectory  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "Distribution",
    "Lipschitz",
    "Metric",
    "Monitor",
    "PerSampleGradNorms",
    "SampleScores",
    "Trajectory",
    "by_block",
    "clip_factors",
    "functional",
    "layers",
    "local_lipschitz",
    "reference",
]
