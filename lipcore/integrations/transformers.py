"""The callback for transformers' Trainer."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise ImportError("HFCallback needs transformers; pip install 'lipcore[hf]'") from error

from lipcore.integrations.totals import totals_of
from lipcore.metric.protocol import Metric
from lipcore.models.ranks import rank
from lipcore.monitor.defaults import default_metrics
from lipcore.monitor.monitor import Monitor
from lipcore.monitor.watch import watch


class HFCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Callback of transformers' Trainer that watches and records its training:
    ``Trainer(..., callbacks=[lipcore.integrations.HFCallback(run="runs/a")])``.

    The totals of each window stand in the Trainer's own log too (``trainer.state.log_history``), and what the Trainer
    logs, its loss and learning rate, in the record. lipcore's state lies in each checkpoint, as ``lipcore-rank0.pt``,
    before the Trainer has written that checkpoint's ``trainer_state.json``; ``train(resume_from_checkpoint=...)`` goes
    on from it, and the record rewinds with it.

    Args:
        run: folder of the record, as of :func:`lipcore.watch`; None: none is written.
        metrics: default: Trajectory, and Lipschitz of the model's `logits` where that applies. Metrics are used for one
            training; of per-sample norms, ``PerSampleGradNorms(loss_reduction="auto")`` reads what the Trainer does to
            the loss.
        watching: further arguments of :func:`lipcore.watch`: writers, window_steps, record_level.

    Attributes:
        monitor: the Monitor, from the beginning of the training on; None before.
    """

    def __init__(
        self, run: str | os.PathLike[str] | None = None, *, metrics: Iterable[Metric] | None = None, **watching: Any
    ) -> None:
        self.monitor: Monitor | None = None
        self._run, self._metrics, self._watching = run, metrics, watching
        self._folder, self._step, self._shown = Path(), 0, -1

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """Begin to watch; go on from the checkpoint that the Trainer goes on from."""
        if self.monitor is not None:
            self.monitor.close()
        if self._metrics is not None:
            metrics = list(self._metrics)
        else:  # hooks on the module inside a compiled one are never called, and a callback is given no other
            metrics = default_metrics(model, optimizer, output="logits", has_calls=not args.torch_compile)
        config = {"training_arguments": args.to_sanitized_dict()} | dict(self._watching.get("config") or {})
        watching = self._watching | {"config": config}
        self.monitor = watch(model, optimizer, run=self._run, metrics=metrics, **watching)
        self._folder = Path(args.output_dir)
        if state.global_step:
            self._resume(args, state.global_step)

    def _resume(self, args: Any, step: int) -> None:
        given = args.resume_from_checkpoint
        folders = [Path(given)] if isinstance(given, str) else []
        found = [folder / self._name for folder in [*folders, self._checkpoint(step)]]
        path = next((path for path in found if path.is_file()), None)
        if path is None:
            warnings.warn(
                f"lipcore goes on from step {step} without what it knew there: there is no {found[-1]}; it was not "
                "watching when that checkpoint was made, or the checkpoint lies elsewhere (resume_from_checkpoint= of "
                "the TrainingArguments says where)",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        assert self.monitor is not None
        self.monitor.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))

    # ---- checkpoints

    @property
    def _name(self) -> str:
        return f"lipcore-rank{rank()}.pt"

    def _checkpoint(self, step: int) -> Path:
        return self._folder / f"checkpoint-{step}"

    def _save(self) -> None:
        folder = self._checkpoint(self._step)
        if self.monitor is None or not folder.is_dir() or (folder / self._name).exists():
            return
        half = folder / (self._name + "-half")
        torch.save(self.monitor.state_dict(), half)
        os.replace(half, folder / self._name)

    def state(self) -> dict[str, Any]:
        """Write lipcore's state into the checkpoint that the Trainer is making, which asks for this before it is done;
        return what its own file keeps."""
        self._save()
        kept = {"run": None if self._run is None else str(self._run)} | {
            name: value for name, value in self._watching.items() if _is_json(value)
        }
        return {"args": kept, "attributes": {}}

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the state of ranks that the Trainer does not ask for theirs."""
        self._save()

    # ---- the training

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep the number of the step."""
        self._step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Record what the Trainer logs, and add the totals of the newest window to its log."""
        if self.monitor is None or self.monitor._closed:
            return
        numbers = {name: value for name, value in (logs or {}).items() if isinstance(value, (int, float))}
        if "loss" in numbers:  # else it is an evaluation's, or the summary at the end
            self.monitor.log(**numbers)
        window = self.monitor.history[-1] if self.monitor.history else None
        if window is not None and window.index != self._shown and state.log_history:
            self._shown = window.index
            state.log_history[-1].update(totals_of(window))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End: take the hooks off, and close the record."""
        if self.monitor is not None:
            self.monitor.close()


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
