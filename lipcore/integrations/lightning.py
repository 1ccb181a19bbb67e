"""The callback for Lightning's Trainer."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule
except ImportError as error:
    raise ImportError("LightningCallback needs lightning; pip install 'lipcore[lightning]'") from error

import torch
from torch import Tensor, nn

from lipcore.metric.protocol import Metric
from lipcore.models.gathered import holds_parts
from lipcore.models.names import find_module
from lipcore.models.ranks import world_size
from lipcore.models.wrapped import note_wrapper
from lipcore.monitor.monitor import Monitor
from lipcore.monitor.watch import watch

_RANK_0_ALONE = (
    "lipcore's state is not in this checkpoint: Lightning keeps what callbacks have on rank 0, and each rank holds "
    "other parts of the parameters. A training that goes on from it begins lipcore anew. To go on in the middle of a "
    "window, save and load callback.monitor beside it, on all ranks: dcp.save({'lipcore': monitor}, checkpoint_id=...)"
)
_WITHOUT = (
    "lipcore goes on from step {0} without what it knew there: its state is not in that checkpoint (it was not "
    "watching when that was made, or ranks held parts of the parameters)"
)


class LightningCallback(Callback):  # type: ignore[misc]
    """Callback of Lightning's Trainer that watches and records its training:
    ``lightning.Trainer(callbacks=[lipcore.integrations.LightningCallback(run="runs/a")])``.

    The loss that `training_step` returns is in the record (with manual optimization, what `manual_backward` is given).
    lipcore's state is in each checkpoint, beside that of other
    callbacks; ``trainer.fit(ckpt_path=...)`` goes on from it, and the record rewinds with it. Where ranks hold parts of
    the parameters (FSDP2) it is not there, since Lightning keeps that of rank 0 alone, and a warning says so. An
    exception, an alarm with ``stop=True`` and Ctrl-C close the record.

    Args:
        run: folder of the record, as of :func:`lipcore.watch`; None: none is written.
        module: name of the module that `training_step` calls, as "net" of ``self.net(x)``; "" for the LightningModule
            itself, as in ``self(x)``. Default: the only module inside that has parameters, or the LightningModule where
            it has a `forward()` of its own.
        metrics: default: those of :func:`lipcore.watch`. Metrics are used for one training.
        watching: further arguments of :func:`lipcore.watch`: writers, window_steps, record_level. An ``Alarms`` is used
            for one training too; make a new callback for the next.

    Raises:
        ValueError: when the training begins: it cannot be told which module `training_step` calls.

    Attributes:
        monitor: the Monitor, from the beginning of the training on; None before.
    """

    def __init__(
        self,
        run: str | os.PathLike[str] | None = None,
        *,
        module: str | None = None,
        metrics: Iterable[Metric] | None = None,
        **watching: Any,
    ) -> None:
        self.monitor: Monitor | None = None
        self._run, self._module, self._metrics, self._watching = run, module, metrics, watching
        self._loaded: dict[str, Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Begin to watch; go on from the checkpoint that the Trainer goes on from."""
        if self.monitor is not None:
            self.monitor._abandon()
        name = _called_by(pl_module) if self._module is None else self._module
        prefix, model = find_module(pl_module, name, "module") if name else ("", pl_module)
        note_wrapper(model, trainer.strategy.model)
        self.monitor = watch(
            *(model, pl_module.optimizers()), run=self._run, metrics=self._metrics, prefix=prefix, **self._watching
        )
        if self._loaded is not None:
            state, self._loaded = self._loaded, None
            self.monitor.load_state_dict(state)
        elif trainer.ckpt_path:
            warnings.warn(_WITHOUT.format(trainer.global_step), RuntimeWarning, stacklevel=2)

    def on_before_backward(self, trainer: Any, pl_module: LightningModule, loss: Tensor) -> None:
        """Record the loss of this micro-batch, as it was before Lightning divided and scaled it."""
        if self.monitor is not None:
            self.monitor._log({"loss": _returned(trainer, pl_module, loss)}, loss)

    def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """End: merge the windows of all ranks that wait, take the hooks off, and close the record."""
        if self.monitor is not None:
            self.monitor._conclude()

    def on_exception(self, trainer: Any, pl_module: LightningModule, exception: BaseException) -> None:
        """End: the training has."""
        if self.monitor is not None:
            self.monitor.__exit__(type(exception), exception, exception.__traceback__)

    def state_dict(self) -> dict[str, Any]:
        """Return lipcore's state, which Lightning puts into its checkpoint."""
        if self.monitor is None:
            return {}
        model = self.monitor.model
        if world_size() > 1 and holds_parts(model):
            warnings.warn(_RANK_0_ALONE, RuntimeWarning, stacklevel=2)
            return {}
        return {"monitor": self.monitor.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state until the training begins."""
        self._loaded = state_dict.get("monitor")


def _returned(trainer: Any, pl_module: LightningModule, loss: Tensor) -> Tensor:
    """Return the loss that `training_step` made, of the one that Lightning calls backward() on: divided by the number
    of micro-batches of a step where Lightning optimizes, also in steps that have fewer, and times the scaler's scale.
    """
    found = loss.detach()
    found = found.to(torch.promote_types(found.dtype, torch.float32))
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and scaler.is_enabled():
        found = found / scaler.scale(torch.ones_like(found))  # the scale itself could only be had by waiting for it
    return found * trainer.accumulate_grad_batches if pl_module.automatic_optimization else found


def _called_by(pl_module: LightningModule) -> str:
    """Return the name of the module that `training_step` calls, as far as that can be told before it does."""
    inside: list[str] = [name for name, child in pl_module.named_children() if any(True for _ in child.parameters())]
    own = type(pl_module).forward is not nn.Module.forward and type(pl_module).forward is not LightningModule.forward
    if own or any(True for _ in pl_module.parameters(recurse=False)):
        return ""
    if len(inside) == 1:
        return inside[0]
    names = ", ".join(map(repr, inside)) or "none"
    raise ValueError(
        "module: it cannot be told which module training_step() calls; name it, LightningCallback(module='...'). With "
        f"parameters there are {names}; '' is the LightningModule itself, where training_step() calls self(...)"
    )
