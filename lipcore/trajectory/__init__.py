"""The metric of how the parameters move: path length, update norm, distance from a reference and variance, per
parameter, per group and in total."""

from lipcore.trajectory.metric import Trajectory
from lipcore.trajectory.shards import merge_shards
from lipcore.trajectory.step_ring import StepHistory
from lipcore.trajectory.step_stream import StepArrays

__all__ = ["StepArrays", "StepHistory", "Trajectory", "merge_shards"]
