"""Writer of what is kept of alarms: the record's last steps, and states of the training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lipcore.alarms.budget import QUIET
from lipcore.alarms.event import AlarmEvent
from lipcore.alarms.snapshot import Snapshot
from lipcore.metric.listener import Listener
from lipcore.models.ranks import has_dtensors, is_fsdp1
from lipcore.recording.excerpt import replace_whole
from lipcore.recording.record import RunRecord

_RECORD, _STATES = ".lipcore", ".pt"
_GATHERED = (
    "the states are not written: for a pass that has begun parameters that are spread over ranks were gathered, and to "
    "spread them again on this rank alone would leave the others waiting"
)
_COLLECTIVE = (
    "the states are not written: those of FullyShardedDataParallel come from all ranks together, and this one alone "
    "may have the alarm; fully_shard() has states of each rank"
)


class Snapshots(Listener):
    """Files of the last alarms of one rank.

    Args:
        wanted: where, and what.
        rank: of this process.
        model: whose state is written.
        optimizers: likewise.
        scaler: a GradScaler, or None.
        warn: told, in words, what could not be written.
    """

    def __init__(
        self,
        wanted: Snapshot,
        rank: int,
        model: nn.Module,
        optimizers: Sequence[Any],
        scaler: Any,
        warn: Callable[[str], None],
    ) -> None:
        self._wanted, self._name, self._warn = wanted, f"rank{rank}", warn
        self._folder = Path(wanted.folder).absolute()  # of now: a loop may go to another one
        self._model, self._optimizers, self._scaler = model, optimizers, scaler
        parameters = model.named_parameters(remove_duplicate=False)
        self._spread = {name for name, p in parameters if type(p).__name__ == "DTensor"} if wanted.states else set()
        self._waiting: list[AlarmEvent] = []  # for their files
        self._taken: list[int] = []  # steps of the alarms that have waited, of those that wait too

    @property
    def due(self) -> bool:
        """True while an alarm's files wait to be written."""
        return bool(self._waiting)

    @property
    def all_spread(self) -> bool:
        """True while no parameter that is spread over ranks is gathered for a pass: state_dict() would spread it again,
        and this rank gather it once more than the others."""
        if not self._spread:
            return True
        now = dict(self._model.named_parameters(remove_duplicate=False))
        return all(type(now[name]).__name__ == "DTensor" for name in self._spread & now.keys())

    def hear(self, event: AlarmEvent) -> None:
        """Have an alarm's files written, but where they would be those of an alarm shortly before. Alarms of other
        ranks may come after later ones of this rank."""
        if not any(0 <= event.step - step <= QUIET for step in self._taken):
            self._taken.append(event.step)
            self._waiting.append(event)

    def state_loaded(self, step: int) -> None:
        self._waiting = [event for event in self._waiting if event.step <= step]
        self._taken = [taken for taken in self._taken if taken <= step]

    def write(self, step: int, record: RunRecord | None, *, amid_step: bool = False) -> None:
        """Write the files of the alarms that wait. Nothing is raised. Waits for a device.

        Args:
            step: how many were made.
            record: of the run, where there is one.
            amid_step: some parameters have moved since, in a step that was not over, or not counted, at the end of all,
                or were loaded.
        """
        waiting, self._waiting = self._waiting, []
        for event in waiting[-self._wanted.keep :]:  # those before would be removed at once
            self._write_of(event, step, record, amid_step=amid_step)

    def _write_of(self, event: AlarmEvent, step: int, record: RunRecord | None, *, amid_step: bool) -> None:
        folder = self._folder / f"step{event.step}"
        parts: list[tuple[str, Callable[[Path], None]]] = []
        if record is not None:
            parts.append((_RECORD, record.write_excerpt))
        if self._wanted.states and is_fsdp1(self._model):
            self._warn(f"the snapshot of the alarm in step {event.step}: {_COLLECTIVE}")
        elif self._wanted.states and not self.all_spread:
            self._warn(f"the snapshot of the alarm in step {event.step}: {_GATHERED}")
        elif self._wanted.states:
            parts.append((_STATES, lambda target: self._write_states(target, step, event, amid_step=amid_step)))
            if amid_step:
                self._warn(
                    f"the states in the snapshot of the alarm in step {event.step} are not of the end of step {step}: "
                    "some parameters have moved since, in a step that was not over, or not counted, when the training "
                    "ended, or were loaded; who goes on from them makes a part of it twice, or from other weights"
                )
        elif record is None:
            self._warn(
                f"the snapshot of the alarm in step {event.step} has nothing to write: there is no record; pass "
                "run= to lipcore.watch(), or states=True to Snapshot"
            )
        for ending, write in parts:
            try:
                _write_into(folder, f"{self._name}{ending}", write)
            except Exception as raised:  # noqa: PERF203
                error = _of_the_system(raised)
                self._warn(
                    f"the snapshot of the alarm in step {event.step} lacks {folder / (self._name + ending)}, which "
                    f"could not be written ({type(error).__name__}: {error}); the training goes on"
                )
        self._remove_older()

    def _write_states(self, target: Path, step: int, event: AlarmEvent, *, amid_step: bool) -> None:
        found: dict[str, Any] = {
            "alarm": asdict(event),
            "step": step,
            "amid_step": amid_step,
            "model": self._model.state_dict(),
            "optimizers": [one.state_dict() for one in self._optimizers if hasattr(one, "state_dict")],
            "rng_state": torch.get_rng_state(),
        }
        if self._scaler is not None:
            found["scaler"] = self._scaler.state_dict()
        half = target.with_name(target.name + "-half")
        try:
            with half.open("wb") as file:  # by which what the system says comes through
                torch.save(_of_this_rank(found) if has_dtensors(self._model) else found, file)
            replace_whole(half, target)
        finally:
            with contextlib.suppress(OSError):
                half.unlink(missing_ok=True)

    def _remove_older(self) -> None:
        """Remove this rank's files of all but the alarms that were written last."""
        found: dict[Path, float] = {}
        for ending in (_RECORD, _STATES):
            for path in self._folder.glob(f"step*/{self._name}{ending}"):
                with contextlib.suppress(OSError):
                    found[path.parent] = max(found.get(path.parent, 0.0), path.stat().st_mtime_ns)
        for path in self._folder.glob(f"step*/{self._name}.*-half*"):  # of a process that was killed as it wrote
            with contextlib.suppress(OSError):
                path.unlink()
                path.parent.rmdir()
        for folder in sorted(found, key=lambda folder: found[folder])[: -self._wanted.keep]:
            with contextlib.suppress(OSError):
                for ending in (_RECORD, _STATES):
                    (folder / f"{self._name}{ending}").unlink(missing_ok=True)
                folder.rmdir()  # not where other ranks have files in it


def _write_into(folder: Path, name: str, write: Callable[[Path], None]) -> None:
    """Write a file into a folder, which is made; once more where another rank, whose last file it was, has removed it
    in between."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        write(folder / name)
    except Exception:
        if folder.is_dir():
            raise
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / name)


def _of_the_system(error: BaseException) -> BaseException:
    """Return what the system has said (a full disk), where torch says of it that it cannot go on."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return error if found is None else found


def _of_this_rank(state: Any) -> Any:
    """Return a state with plain tensors in the place of distributed ones: this rank's part."""
    if type(state).__name__ == "DTensor":
        return state.to_local()
    if isinstance(state, Mapping):
        return {key: _of_this_rank(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)) and type(state) in (list, tuple):
        return type(state)(_of_this_rank(value) for value in state)
    return state
