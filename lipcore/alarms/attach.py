"""Alarms and what brings them their numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from lipcore.alarms.alarms import Alarms
from lipcore.alarms.unexplained import SIGNAL
from lipcore.metric.listener import Listener
from lipcore.metric.protocol import Metric
from lipcore.models.arguments import check_choice
from lipcore.per_sample.grad_norms import PerSampleGradNorms
from lipcore.trajectory.metric import Trajectory

AlarmChoice = Literal["default"]


def checked_alarms(alarms: Alarms | AlarmChoice | None, metrics: Iterable[Metric]) -> Alarms | None:
    """Return the alarms that are asked for.

    Raises:
        ValueError: no such choice; these Alarms belong to another Monitor; no Trajectory that looks at every step
            brings what they need; no metric of single samples where they are to be named.
    """
    if alarms is None:
        return None
    if not isinstance(alarms, Alarms):
        check_choice("alarms", alarms, ("default",), optional=True, why="; or an Alarms")
        alarms = Alarms()
    if alarms._keep is not None:
        raise ValueError("alarms: these Alarms belong to another Monitor; make one Alarms per Monitor")
    trajectory = trajectory_of(metrics)
    if alarms.needs_norms and trajectory is None:
        raise ValueError(
            "alarms: update_norm and grad_norm come from a Trajectory, and metrics has none; add lipcore.Trajectory(), "
            'or pass Alarms(signals=["loss"])'
        )
    if "rms_t" in alarms.signals and not (trajectory is not None and trajectory.knows_rms_t):
        raise ValueError(
            "alarms: rms_t comes from a Trajectory that reads the optimizer's state, and metrics has none; add "
            'lipcore.Trajectory(source="optimizer", stats=["update_norm", "grad_norm", "rms_t"])'
        )
    norms = norms_of(metrics)
    if alarms.per_sample is not None and norms is None:
        raise ValueError(
            "alarms: per_sample= switches a metric of single samples' gradient norms on, and metrics has none; add "
            'lipcore.PerSampleGradNorms(loss_reduction="mean"), or what your loss does over the batch'
        )
    if alarms.per_sample is not None and norms is not None and norms._every != 1:
        raise ValueError(
            "alarms: per_sample= measures every step after an alarm, and the PerSampleGradNorms one of "
            f"{norms._every}; make it with every_steps=1"
        )
    if trajectory is not None and trajectory.every_steps != 1:
        raise ValueError(
            f"alarms: they look at every step, and the Trajectory at one of {trajectory.every_steps}; make it with "
            "every_steps=1"
        )
    return alarms


def prepare_for(alarms: Alarms | None, metrics: Iterable[Metric]) -> None:
    """Have the Trajectory, before it is bound, look for what alarms need besides norms, and a metric of single samples
    rest until an alarm where they are to be named. Either does so no more where these alarms do not ask for it, since
    another Monitor may have asked that could not be made, or is closed."""
    trajectory, norms = trajectory_of(metrics), norms_of(metrics)
    if norms is not None:
        norms.on_call(alarms is not None and alarms.per_sample is not None)
    if trajectory is not None:
        trajectory.look_for(movement=alarms is not None and SIGNAL in alarms.signals, normalized=alarms is not None)


def trajectory_of(metrics: Iterable[Metric]) -> Trajectory | None:
    """Return the Trajectory among metrics; None where there is none."""
    return next((metric for metric in metrics if isinstance(metric, Trajectory)), None)


def norms_of(metrics: Iterable[Metric]) -> PerSampleGradNorms | None:
    """Return the metric of single samples' gradient norms among metrics; None where there is none."""
    return next((metric for metric in metrics if isinstance(metric, PerSampleGradNorms)), None)


class AlarmsListener(Listener):
    """Listener by which Alarms hear of checkpoints and of the end, the Trajectory that looks for them of that, and who
    stops for them, `go_behind`, of checkpoints."""

    def __init__(self, alarms: Alarms, trajectory: Trajectory | None, go_behind: Callable[[int], None]) -> None:
        self._alarms, self._trajectory, self._go_behind = alarms, trajectory, go_behind

    def state_loaded(self, step: int) -> None:
        self._alarms._go_behind(step)
        self._go_behind(step)

    def ranks_part(self) -> None:
        self._alarms._part()

    def closed(self) -> None:
        self._alarms._end()
        if self._trajectory is not None:
            self._trajectory.look_no_more()
