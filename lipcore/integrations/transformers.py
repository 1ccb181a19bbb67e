"""The callback for transformers' Trainer."""

from __future__ import annotations

import inspect
import json
import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise ImportError("HFCallback needs transformers; pip install 'lipcore[hf]'") from error

from lipcore.integrations.totals import totals_of
from lipcore.metric.protocol import Metric
from lipcore.models.ranks import rank, world_size
from lipcore.models.wrapped import note_wrapper
from lipcore.monitor.defaults import default_metrics
from lipcore.monitor.monitor import Monitor
from lipcore.monitor.watch import watch

_FIRST, _ANY = "lipcore-rank0.pt", "lipcore-rank*.pt"
#: Those whose training has begun, and as far as they know not ended. Held: of a Trainer that is gone nobody else could
#: close the record, which the end of the process keeps open.
_watching: set[HFCallback] = set()


class UntoldEnd(Exception):
    """An end of a training of which nobody was told why: its record is closed by the next one."""


class HFCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Callback of transformers' Trainer that watches and records its training:
    ``Trainer(..., callbacks=[lipcore.integrations.HFCallback(run="runs/a")])``.

    The totals of each window, of all ranks, stand in the Trainer's own log too (``trainer.state.log_history``), and
    what the Trainer logs, its loss and learning rate, in the record. lipcore's state lies in each checkpoint, as
    ``lipcore-rank0.pt``, a file for each rank, before the Trainer has written that checkpoint's ``trainer_state.json``;
    ``train(resume_from_checkpoint=...)`` goes on from it, and the record rewinds with it. Where each rank holds whole
    parameters another number of ranks goes on from it too.

    Alarms with ``stop=True`` end the training by their ``AlarmStop``, at the end of the step in which they are known;
    on several ranks at the Trainer's next log. The record is closed then. The Trainer tells no callback
    of another exception, or of Ctrl-C: the record of such a training is closed when the next one in its folder begins,
    by ``callback.monitor.close()``, or when the process ends.

    Args:
        run: folder of the record, as of :func:`lipcore.watch`; None: none is written.
        metrics: default: Trajectory, and Lipschitz of the model's `logits` where that applies. Metrics are used for one
            training; of per-sample norms, ``PerSampleGradNorms(loss_reduction="auto")`` reads what the Trainer does to
            the loss.
        watching: further arguments of :func:`lipcore.watch`: writers, window_steps, record_level. An ``Alarms`` is used
            for one training too; make a new callback for the next.

    Attributes:
        monitor: the Monitor, from the beginning of the training on; None before.
    """

    def __init__(
        self, run: str | os.PathLike[str] | None = None, *, metrics: Iterable[Metric] | None = None, **watching: Any
    ) -> None:
        self.monitor: Monitor | None = None
        self._run, self._metrics, self._watching = run, metrics, watching
        self._folder, self._step, self._shown, self._thread = Path(), 0, -1, 0
        self._saved = -1  # the step of the last checkpoint that has lipcore's state of this training

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """Begin to watch; go on from the checkpoint that the Trainer goes on from."""
        self._abandon()
        for other in list(_watching):
            if self._is_of_same_run(other) and not other._is_running():
                other._abandon()
        if self._metrics is not None:
            metrics = list(self._metrics)
        else:  # hooks on the module inside a compiled one are never called, and a callback is given no other
            metrics = default_metrics(model, optimizer, output="logits", has_calls=not args.torch_compile)
        config = {"training_arguments": args.to_sanitized_dict()} | dict(self._watching.get("config") or {})
        watching = self._watching | {"config": config}
        trainer = self._trainer()
        if trainer is not None:
            note_wrapper(model, trainer.model_wrapped)
        self.monitor = watch(model, optimizer, run=self._run, metrics=metrics, **watching)
        self._thread = threading.get_ident()
        if self._run is not None:
            _watching.add(self)
        self._folder, self._step, self._shown = Path(args.output_dir), state.global_step, -1
        self._saved = -1
        if state.global_step:
            with self._ending():
                self._resume(args, state.global_step)

    def _resume(self, args: Any, step: int) -> None:
        given = args.resume_from_checkpoint
        folders = [*([Path(given)] if isinstance(given, str) else []), self._checkpoint(step)]
        # The first rank's serves one that is new, where ranks hold whole parameters; else its state refuses that.
        found = [folder / name for name in (self._name, _FIRST) for folder in folders]
        path = next((path for path in found if path.is_file()), None)
        if path is None:
            warnings.warn(
                f"lipcore goes on from step {step} without what it knew there: there is no "
                f"{folders[-1] / self._name}; it was not watching when that checkpoint was made, or the checkpoint "
                "lies elsewhere (resume_from_checkpoint= of the TrainingArguments says where)",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        assert self.monitor is not None
        self.monitor.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))

    # ---- the end, of which the Trainer does not always tell

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """End with an exception that is raised here: it ends the training, and nobody tells of it later."""
        try:
            yield
        except BaseException as error:
            _watching.discard(self)
            assert self.monitor is not None
            self.monitor.__exit__(type(error), error, error.__traceback__)
            raise

    def _abandon(self) -> None:
        """Close what a training has left open that was ended by an exception which nobody told of."""
        _watching.discard(self)
        monitor = self.monitor
        if monitor is not None and not monitor._closed:
            error = UntoldEnd("the Trainer told no callback what ended this training")
            monitor._tell(lambda listener: listener.interrupted(monitor._windows.step, error))
            monitor._abandon()

    def _is_of_same_run(self, other: HFCallback) -> bool:
        own, its = self._run, other._run
        return own is not None and its is not None and Path(own).absolute() == Path(its).absolute()

    def _is_running(self) -> bool:
        """Return whether this one's training goes on: further up here, or in another thread, as long as that lives."""
        if self._thread != threading.get_ident():
            return any(thread.ident == self._thread for thread in threading.enumerate())
        return self._trainer() is not None

    def _trainer(self) -> Trainer | None:
        """Return the Trainer of this one whose training goes on further up here: callbacks are not given theirs."""
        frame = inspect.currentframe()
        while frame is not None:
            trainer = frame.f_locals.get("self")
            if isinstance(trainer, Trainer) and self in trainer.callback_handler.callbacks:
                return trainer
            frame = frame.f_back
        return None

    # ---- checkpoints

    @property
    def _name(self) -> str:
        return f"lipcore-rank{rank()}.pt"

    def _checkpoint(self, step: int) -> Path:
        return self._folder / f"checkpoint-{step}"

    def _save(self) -> None:
        folder = self._checkpoint(self._step)
        written = self._saved == self._step and (folder / self._name).exists()
        if self.monitor is None or self.monitor._closed or written or not folder.is_dir():
            return  # a file that is there may be of another training, whose checkpoint the Trainer writes over
        half = folder / (self._name + "-half")
        torch.save(self.monitor.state_dict(), half)
        os.replace(half, folder / self._name)
        for name in _names_beyond(folder) if rank() == 0 else ():  # of an older training, with more ranks
            name.unlink(missing_ok=True)
        self._saved = self._step

    def state(self) -> dict[str, Any]:
        """Write lipcore's state into the checkpoint that the Trainer is making, which asks for this before it is done;
        return what its own file keeps."""
        with self._ending():
            self._save()
        kept = {"run": None if self._run is None else str(self._run)} | {
            name: value for name, value in self._watching.items() if _is_json(value)
        }
        return {"args": kept, "attributes": {}}

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the state of ranks that the Trainer does not ask for theirs."""
        with self._ending():
            self._save()

    # ---- the training

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep the number of the step, and stop for an alarm that is to stop the training."""
        self._step = state.global_step
        if self.monitor is None or self.monitor.alarms is None or not self.monitor.alarms._stop:
            return
        if (
            self.monitor._global.partners.find() is None
        ):  # else all ranks stop where they log; others would wait for one
            with self._ending():
                self.monitor._failures.raise_kept()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Record what the Trainer logs, and add the totals of the newest window to its log."""
        if self.monitor is None or self.monitor._closed:
            return
        numbers = {name: value for name, value in (logs or {}).items() if isinstance(value, (int, float))}
        if "loss" in numbers:  # else it is an evaluation's, or the summary at the end
            with self._ending():
                self.monitor.log(**numbers)
        window = self.monitor._newest
        if window is not None and window.index != self._shown and state.log_history:
            self._shown = window.index
            state.log_history[-1].update(totals_of(window))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End: merge the windows of all ranks that wait, take the hooks off, and close the record."""
        _watching.discard(self)
        if self.monitor is not None:
            self.monitor._conclude()


def _names_beyond(folder: Path) -> list[Path]:
    """Return the files in a checkpoint that are of ranks which this training does not have."""
    numbers = {path: path.name.removeprefix("lipcore-rank").removesuffix(".pt") for path in folder.glob(_ANY)}
    return [path for path, number in numbers.items() if number.isdecimal() and int(number) >= world_size()]


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
