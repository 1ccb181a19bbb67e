"""How the parameters move: path length, update norm, distance from a reference, variance of the trajectory.

metric.py is what users see; a Tracker (tracker.py) keeps the numbers of a list of tensors, from copies of them
(copies.py) or from sums that a source brings (updates.py); parts.py says which tensors and groups; sketched.py tracks
sketches in place of the parameters.
"""

from lipcore.trajectory.metric import Trajectory
from lipcore.trajectory.shards import merge_shards
from lipcore.trajectory.step_ring import StepHistory
from lipcore.trajectory.step_stream import StepArrays

__all__ = ["StepArrays", "StepHistory", "Trajectory", "merge_shards"]
