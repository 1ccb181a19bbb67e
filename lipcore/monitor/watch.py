"""The front door: a Monitor that records what it sees."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from lipcore.alarms.alarms import Alarms
from lipcore.metric.protocol import Metric
from lipcore.models.arguments import check_choice, check_count
from lipcore.models.names import named_modules
from lipcore.models.ranks import rank, world_size
from lipcore.monitor.monitor import Monitor
from lipcore.recording.record import MAX_BYTES, RecordLevel, RunRecord, checked_config
from lipcore.recording.recorder import Recorder
from lipcore.recording.writers import made_writers


def watch(
    model: nn.Module | Mapping[str, nn.Module],
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    run: str | os.PathLike[str] | None = None,
    writers: Iterable[Any] = (),
    metrics: Iterable[Metric] | None = None,
    record_level: RecordLevel = "group",
    max_bytes: int = MAX_BYTES,
    config: Mapping[str, Any] | None = None,
    first_step: int = 1,
    **monitor: Any,
) -> Monitor:
    """Watch a model while it trains, and record what is seen.

    It returns a :class:`Monitor`; the loop stays as it is. With `run`, every closed window, the norms of every single
    step and what :meth:`Monitor.log` is given are written to ``<run>/rank<rank>.lipcore``, by a thread of its own, in
    blocks of at least 64 steps. :func:`lipcore.open_run` reads it, also meanwhile. ``monitor.state_dict()`` waits until
    everything so far is in the file, so that a checkpoint and the record end at the same step; going on from a
    checkpoint removes the steps behind it from the record, which are made again. Without `run` nothing is written.

    With several ranks each has a record of its own, with its own single steps: norms of the parts of the model that it
    holds, its loss. :meth:`Monitor.log`, which every rank then has to call at the same steps, merges windows that have
    closed (:meth:`Monitor.global_window`), and so does the end of the with block: records and writers have those of all
    ranks, and a rank's own where that fails, or where nobody calls it. ``group=None`` merges none.

    A record that cannot be written any more (a full disk) is warned of; the training goes on.

    Args:
        model, optimizer: as of :class:`Monitor`.
        run: the run's folder, "runs/a"; made where it does not exist. A run that begins at step 0 in the folder of an
            older one keeps that one's file beside its own.
        writers: what else gets every closed window's totals and groups, finite and valid numbers by name
            ("lipcore/trajectory/update_norm.mean/layers.0"): "tensorboard" (its file goes to `run`), "wandb", "mlflow",
            "trackio" (to the run that has begun there), a SummaryWriter, or any function of (numbers, step). They have
            threads of their own; one that fails or is too slow is given up with a warning. On several ranks the first
            alone has them.
        metrics: as of :class:`Monitor`.
        record_level: the finest places that are written: "group", or "tensor" for every parameter.
        max_bytes: where the file grows beyond, older steps become minimum, mean and maximum of 64 each.
        config: facts about the run, kept with it: a dict that JSON can hold. A report shows a text of the key "about"
            beside its title.
        first_step: the number that your loop gives its first step, for the writers.
        monitor: further arguments of :class:`Monitor`.

    Raises:
        TypeError, ValueError: as :class:`Monitor`; `run` is no path of a folder; `config` is no dict.
        ImportError: a writer's library is missing. RuntimeError: it has no run that has begun.
        RecordError: the record cannot be made, is another model's, or another process writes it.

    >>> import tempfile, torch
    >>> model = nn.Linear(3, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> folder = tempfile.mkdtemp()
    >>> with watch(model, optimizer, run=f"{folder}/a", window_steps=2) as monitor:
    ...     for _ in range(4):
    ...         loss = model(torch.ones(5, 3)).square().mean()
    ...         monitor.log(loss=loss)
    ...         loss.backward(); optimizer.step(); optimizer.zero_grad()
    >>> import lipcore
    >>> lipcore.open_run(f"{folder}/a").series("loss").steps.tolist()
    [1, 2, 3, 4]
    """
    checked_config(config)
    check_choice("record_level", record_level, get_args(RecordLevel))
    check_count("max_bytes", max_bytes, 1 << 20)
    check_count("first_step", first_step, 0)
    if run is None:
        _check_snapshot(monitor.get("alarms"))  # before the metrics and the alarms belong to a Monitor
    made = Monitor(model, optimizer, metrics, **monitor)
    here = rank()
    try:
        made._meets = not made._global.none_asked_for
        together = made._meets and world_size() > 1
        if here == 0:
            made._listeners += made_writers(writers, run, made._warn_of_record, first_step, of_all_ranks=together)
        if run is None:
            return made
        facts = {"model": type(made.model).__name__, "torch": torch.__version__, "rank": here}
        facts |= {"alarms": "off" if made.alarms is None else [*made.alarms.signals, "nonfinite"], **dict(config or {})}
        record = RunRecord(
            run,
            rank=here,
            ranks=world_size(),
            level=record_level,
            max_bytes=max_bytes,
            model=_fingerprint(made.model),
            config=facts,
        )
    except Exception:
        made.close()
        if made.alarms is not None:
            made.alarms._let_go()  # for who follows the message with the same ones
        raise
    made._attach_recorder(Recorder(record, made._warn_of_record))
    return made


def _check_snapshot(alarms: Any) -> None:
    """Check that an alarm's snapshot has something to write where there is no record."""
    snapshot = alarms.snapshot if isinstance(alarms, Alarms) else None
    if snapshot is not None and not snapshot.states:
        raise ValueError(
            "alarms: their snapshot would have nothing to write: there is no record; pass run=, or states=True to "
            "lipcore.alarms.Snapshot"
        )


def _fingerprint(model: nn.Module) -> str:
    """Return what tells a model from another: names and shapes of its parameters, as a digest."""
    found = ((f"{name}.{own}", p) for name, module in named_modules(model) for own, p in module._parameters.items())
    text = ";".join(f"{name}{list(p.shape)}" for name, p in found if p is not None)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
