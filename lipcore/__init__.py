"""lipcore: measure what a neural network is learning while it trains, at almost no cost."""

from sys import modules as _modules

from lipcore import _connect

_connect.connect()

from lipcore import functional, integrations, layers  # noqa: E402
from lipcore.functional import reference  # noqa: E402
from lipcore.lipschitz import Lipschitz, local_lipschitz  # noqa: E402
from lipcore.metric.distribution import Distribution  # noqa: E402
from lipcore.metric.protocol import Metric  # noqa: E402
from lipcore.metric.values import Value  # noqa: E402
from lipcore.monitor import Monitor, watch  # noqa: E402
from lipcore.per_sample import PerSampleGradDots, PerSampleGradNorms  # noqa: E402
from lipcore.per_sample.clipping import clip_factors  # noqa: E402
from lipcore.per_sample.scores.sample_scores import SampleScores  # noqa: E402
from lipcore.recording import RecordError, open_run  # noqa: E402
from lipcore.tensor_stats import TensorStats  # noqa: E402
from lipcore.trajectory import Trajectory  # noqa: E402
from lipcore.trajectory.groups import by_block  # noqa: E402

_modules["lipcore.reference"] = reference  # for `import lipcore.reference`: the specification is a front page

__version__ = "0.1.0"
__all__ = [
    "Distribution",
    "Lipschitz",
    "Metric",
    "Monitor",
    "PerSampleGradDots",
    "PerSampleGradNorms",
    "RecordError",
    "SampleScores",
    "TensorStats",
    "Trajectory",
    "Value",
    "by_block",
    "clip_factors",
    "functional",
    "integrations",
    "layers",
    "local_lipschitz",
    "open_run",
    "reference",
    "watch",
]
_PACKAGES = ["alarms", "metric", "regions", "theory"]  # public, beside the names above


def __dir__() -> list[str]:
    """List the public names, without the packages inside that importing them has left here."""
    return [*__all__, *_PACKAGES, "__version__"]
