"""The engine: hooks, clock, errors and windows of any metrics on one model. It knows no metric by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from copy import copy
from types import TracebackType
from typing import Any, TypeVar

from lipcore.capture.taps.tap_capture import inert_capture
from lipcore.metric.clock import Calls, Clock
from lipcore.metric.engine_hooks import EngineHooks
from lipcore.metric.ordinary import ordinary
from lipcore.metric.protocol import Metric
from lipcore.metric.rank_states import SavedRanks, saved
from lipcore.metric.state import checked_lacking, checked_starts, checked_steps
from lipcore.models.gathered import between_steps

Self = TypeVar("Self", bound="Engine")

_NOT_SAVED = (
    "windows that have closed wait for those of the other ranks, and are not in a state: after a resume no window of "
    "all ranks has steps {0}. Call monitor.global_window() (or monitor.log(), under watch) on all ranks before you save"
)
_WERE_WAITING = (
    "windows that had closed when this state was saved waited for those of the other ranks, and are not in it: no "
    "window of all ranks has steps {0}"
)


class Engine(EngineHooks):
    """Driver of metrics on one model while it trains: hooks only, the model and the loop stay as they are.

    The clock is the optimizer's step. Every step the metrics observe; a window of `window_steps` steps then closes by
    itself, or by :meth:`close_window`. Nothing is raised inside a forward or backward pass: an error stops the
    recording, warns, and is raised by the next call of a method of this class or at the end of the with block. So does
    a warning that the filters make an error of.

    Args:
        model: the module the loop calls.
        optimizer: one, or several that step in turn; a step is over when all have. Without: :meth:`step` is called.
        metrics: bound to the model here; their names are the keys of a window.
        window_steps: steps in a window; None: it is closed only by close_window().
        window_blocks: with more than one, windows slide: every window_steps / window_blocks steps one closes that
            covers the last window_steps steps (fewer at the start).
        history_limit: how many closed windows are kept.
        history_bytes: for how many bytes of them.
        scaler: a torch.amp.GradScaler whose scale is to be taken out of gradient norms; by default that of a trainer's
            wrapper around the optimizer.
        needs_steps: nothing is measured without steps, so that a loop in which none is seen is told.
        group: the ranks whose windows :meth:`global_window` merges.
        timeout: seconds that it waits for them.
        prefix: what stands before the names of parameters.
    """

    _version = 3

    @ordinary
    def rebind(self) -> None:
        """Look at the model anew, after parameters were added, removed, resized, frozen or unfrozen, or changed
        their dtype or device. The open window is closed; statistics of parameters that stayed the same go on, those
        of others start now."""
        self._step_end.take_waiting()
        self._failures.drop_own()
        if self._windows.block_steps:
            with warnings.catch_warnings():  # of parameters that are not watched: this is what is done about them
                warnings.simplefilter("ignore", UserWarning)
                self._close()
        self._failures.start_again()
        with between_steps(self.model):
            for metric in self.metrics.values():
                metric.rebind()
            self._find_step_calls()
            if not self._closed:
                self._unwatch()  # there may be other parameters, and the metrics may want other things
                self._watch()

    # ---- state and end

    @ordinary
    def state_dict(self) -> dict[str, Any]:
        """Return the state of the clock and of the metrics. Closed windows are results and not part of it.

        torch.distributed.checkpoint calls it: ``dcp.save({"lipcore": monitor, ...})`` on all ranks. It is also what
        each rank may write into a file of its own. No rank waits for another."""
        self._step_end.take_waiting()
        waiting = self._global.waiting
        if waiting:
            self._failures.warn(_NOT_SAVED.format(_steps_of(waiting)))
        lacking = self._global.lacking(self._windows.begin)
        own = self._own_state() | {"waiting": [list(steps) for steps in waiting], "lacking": lacking}
        state = saved(self.metrics, self._global.place, own)
        self._tell(lambda listener: listener.state_taken())
        return {"version": self._version, **self._windows.state(), **state}

    @ordinary
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of a Monitor with the same metrics on the same model. Where the state does not
        fit, raise a ValueError that names the first wrong key, and change nothing.

        Closed windows with steps behind the state's are dropped, popped or not: the run that made them is given up.

        From a checkpoint of torch.distributed.checkpoint (``dcp.load({"lipcore": monitor, ...})``) a training goes on
        with any number of ranks. A file that one rank has written by itself is that rank's: it has other samples in its
        open window, so that metrics of samples begin this window anew on another rank, with a warning, and are left
        out of it in global windows."""
        self._step_end.moved_by_hand()  # what loads a checkpoint writes into the parameters
        place = self._global.place
        starts = checked_starts(state, self._version, self._windows.blocks)
        ranks = SavedRanks(state, place)
        if ranks.names != sorted(self.metrics):
            raise ValueError(f"metrics: the state has {ranks.names}, this monitor has {sorted(self.metrics)}")
        take_own, lost = self._loaded_own(ranks.first), checked_steps(ranks.first.get("waiting", []))
        lacked = checked_lacking(ranks.taken_over)
        before = {name: metric.state_dict() for name, metric in self.metrics.items()}
        lacking: dict[str, str] = {}
        try:
            for name, metric in self.metrics.items():
                if why := _loaded(name, metric, ranks):
                    lacking[name] = why
        except Exception:
            for name, metric in self.metrics.items():  # all or nothing
                metric.load_state_dict(before[name])
            raise
        take_own()
        self._windows.load(state["step"], state["windows"], starts)
        self._all_counted = True
        self._global.forget(state["step"])
        if lacked is not None:
            self._global.go_on_lacking(lacked)
        self._leave_out(lacking)
        lost = [steps for steps in lost if tuple(steps) not in self._global.waiting]  # of this very run
        if lost:
            self._failures.warn(_WERE_WAITING.format(_steps_of(lost)))
        self._tell(lambda listener: listener.state_loaded(self._windows.step))

    def _own_state(self) -> dict[str, Any]:
        """Return what else this rank saves."""
        return {}

    def _loaded_own(self, own: dict[str, Any]) -> Callable[[], None]:
        """Check what :meth:`_own_state` gave, {} where it goes on from no rank; the function returned takes it over."""
        return lambda: None

    def _leave_out(self, lacking: dict[str, str]) -> None:
        """Leave metrics out of the global window that is open, for these reasons, and warn."""
        if self._windows.step == self._windows.begin:
            return
        for why in dict.fromkeys(lacking.values()):
            names = [name for name, each in lacking.items() if each == why and not self.metrics[name].off]
            if names:
                self._global.leave_out(names, self._windows.step, why)
                self._failures.warn(
                    f"{', '.join(names)}: {why}; they are left out here. Load a checkpoint that all ranks have saved "
                    "together (torch.distributed.checkpoint), the file that each rank has saved, or save at the end of "
                    "a window"
                )

    @ordinary
    def close(self) -> None:
        """Remove every hook and raise an error that was kept; results stay readable."""
        self._shut()
        self._failures.raise_kept()

    def _shut(self) -> None:
        """Remove every hook; errors that come to light are kept."""
        if not self._closed:
            self._step_end.take_waiting()
            if self._scaled is not None:
                self._scaled.look()
            self._closed = True
            self._unwatch()
            self._capture.close()
            for capture in self._layer_captures:
                capture.close()
            for metric in self.metrics.values():
                metric.flush()
            if not self._failures.all_stopped:
                self._windows.final = self._so_far()  # results refer to parameters, which may go on moving
            self._tell(lambda listener: listener.closed())

    def __getstate__(self) -> dict[str, Any]:
        """Make what a copy or a pickle has: all numbers so far and no model; it is closed, and records nothing."""
        self._step_end.take_waiting()
        windows = copy(self._windows)
        windows.final = windows.final if self._failures.all_stopped else self._so_far()
        watches = ("_clock", "_load_watch", "_gradient_watch", "_stage_watch", "_step_end", "_capture")
        gone = ("model", "_scaler", "_scaled", *watches)
        none: dict[str, list[Any]] = {
            name: []
            for name in (
                "_optimizers",
                "_tapping",
                "_step_calls",
                "_told_of_steps",
                "_layer_captures",
                "_output_watches",
            )
        }
        kept = {"_windows": windows, "_closed": True, "_wanting": {}, "_listeners": []}
        return self.__dict__ | dict.fromkeys(gone) | none | kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._clock = Clock([], Calls(self._after_step, self._after_skipped_step, self._stop_all))
        self._step_end = self._make_step_end(list)
        self._capture = inert_capture()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        self._abandon()

    def _abandon(self) -> None:
        """Close after an exception that has ended the loop, which goes first: errors that were kept are dropped."""
        if not self._closed:
            self._step_end.drop_waiting()  # the loop has raised in the middle of it
            for metric in self.metrics.values():
                metric.flush()
            self._shut()
        self._failures.drop_kept()


def _steps_of(windows: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{first} to {last}" for first, last in windows)


def _loaded(name: str, metric: Metric, ranks: SavedRanks) -> str:
    """Load a metric's states, and return what its open window lacks then; what it raises names the metric."""
    try:
        return metric.load_ranks(ranks.of(name))
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).removeprefix(f'{name}: ')}") from None
