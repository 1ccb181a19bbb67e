"""Writers: experiment loggers that get the numbers of every closed window, without the training waiting for them."""

from __future__ import annotations

import atexit
import os
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from lipcore.metric.listener import Listener
from lipcore.metric.window import Window
from lipcore.recording.numbers_of import numbers_of

WriterName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
Write = Callable[[Mapping[str, float], int], object]
_WAITING = 64  # windows that a slow writer may be behind
_AT_THE_END = 60.0  # seconds that close() waits for it


class Writer(Listener):
    """Listener that hands the numbers of every window to an experiment logger, in a thread of its own.

    One that raises, or falls behind by 64 windows, is given up with a warning; everything else goes on.

    Args:
        name: of the logger, for the warning.
        write: gets numbers by name and the number of the step.
        warn: told, once, that it was given up.
        first_step: the number that the loop gives the first step.
        close: ends the logger; called in its thread.
        of_all_ranks: windows of all ranks are to be written, not this rank's.
    """

    def __init__(
        self,
        name: str,
        write: Write,
        warn: Callable[[str], None],
        first_step: int = 1,
        close: Callable[[], object] | None = None,
        *,
        of_all_ranks: bool = False,
    ) -> None:
        self.name, self.failed = name, ""
        self._write, self._warn, self._close, self._shift = write, warn, close, first_step - 1
        self._told, self._of_all_ranks = False, of_all_ranks
        self._queue: queue.Queue[tuple[Window, int] | None] = queue.Queue(_WAITING)
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._work, name=f"lipcore {name}", daemon=True)
        self._thread.start()
        # A loop that raises ends no Monitor, and TensorBoard's file lacks the last two minutes until it is closed.
        atexit.register(self.closed)

    def window_closed(self, window: Window) -> None:
        if not self._of_all_ranks:
            self._hand_on(window)

    def windows_met(self, window: Window) -> None:
        if self._of_all_ranks:
            self._hand_on(window)

    def ranks_part(self) -> None:
        self._of_all_ranks = False

    def _hand_on(self, window: Window) -> None:
        if self._process != os.getpid():
            return
        if not self.failed:
            try:
                self._queue.put_nowait((window, window.last_step + self._shift))
            except queue.Full:
                self.failed = f"it is {_WAITING} windows behind"
        self._tell()

    def state_taken(self) -> None:
        self._tell()

    def closed(self) -> None:
        atexit.unregister(self.closed)
        if self._process != os.getpid() or not self._thread.is_alive():
            return
        try:
            self._queue.put(None, timeout=_AT_THE_END)
            self._thread.join(_AT_THE_END)
        except queue.Full:
            self.failed = self.failed or f"it is {_WAITING} windows behind"
        if self._thread.is_alive():
            self.failed = self.failed or f"it has not ended within {_AT_THE_END:g} seconds"
        self._tell()

    def _tell(self) -> None:
        if self.failed and not self._told:
            self._told = True
            self._warn(f"the writer {self.name!r} gets no more numbers, and the training goes on: {self.failed}")

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if not self.failed:
                window, step = item
                self._try(lambda window=window, step=step: self._write(numbers_of(window), step))  # type: ignore[misc]
        if self._close is not None:
            self._try(self._close)

    def _try(self, call: Callable[[], object]) -> None:
        """Call what belongs to the logger; what it raises is kept, since a thread has nobody to raise to."""
        try:
            call()
        except BaseException as error:
            self.failed = self.failed or f"{type(error).__name__}: {error}"


def made_writers(
    writers: Iterable[Any],
    run: str | os.PathLike[str] | None,
    warn: Callable[[str], None],
    first_step: int,
    *,
    of_all_ranks: bool = False,
) -> list[Writer]:
    """Return the writers of a run.

    Args:
        writers: names ("tensorboard", "wandb", "mlflow", "trackio"), which the tool's own module is imported for;
            functions of (numbers, step); or the tools' own objects: a SummaryWriter, a run of W&B's.
        run: folder of the run; TensorBoard's file goes there.
        warn, first_step, of_all_ranks: as of :class:`Writer`.

    Raises:
        TypeError, ValueError: one of them is no writer.
        ImportError: the library is missing; the message names the extra.
        RuntimeError: W&B, MLflow or trackio have no run that has begun.
    """
    if isinstance(writers, (str, bytes)) or not isinstance(writers, Iterable):
        raise TypeError(f"writers: expected a list of names or functions, got {writers!r}")
    made: list[tuple[str, Write, Callable[[], object] | None]] = []
    for writer in writers:  # all are looked at before a thread is begun
        if isinstance(writer, str):
            if writer not in _BY_NAME:
                raise ValueError(f"writers: expected one of {', '.join(get_args(WriterName))}, got {writer!r}")
            made.append((writer, *_BY_NAME[writer](run)))
        elif hasattr(writer, "add_scalar"):
            made.append((type(writer).__name__, _to_summary(writer), writer.flush))
        elif hasattr(writer, "log") and not callable(writer):
            made.append((type(writer).__name__, _to_log(writer), None))
        elif callable(writer):
            made.append((getattr(writer, "__name__", type(writer).__name__), writer, None))
        else:
            raise TypeError(f"writers: expected a name or a function of (numbers, step), got {type(writer).__name__}")
    return [Writer(name, write, warn, first_step, close, of_all_ranks=of_all_ranks) for name, write, close in made]


Made = tuple[Write, "Callable[[], object] | None"]


def _to_summary(summary: Any) -> Write:
    def write(numbers: Mapping[str, float], step: int) -> None:
        for name, number in numbers.items():
            summary.add_scalar(name, number, step)

    return write


def _to_log(run: Any) -> Write:
    return lambda numbers, step: run.log(dict(numbers), step=step)


def _tensorboard(run: str | os.PathLike[str] | None) -> Made:
    if run is None:
        raise ValueError("writers: 'tensorboard' needs run=, where its file goes; or pass a SummaryWriter")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise _missing("tensorboard") from error
    summary = SummaryWriter(str(Path(run)))
    return _to_summary(summary), summary.close


def _wandb(run: str | os.PathLike[str] | None) -> Made:
    try:
        import wandb
    except ImportError as error:
        raise _missing("wandb") from error
    if wandb.run is None:
        raise RuntimeError("writers: 'wandb' writes to the run that has begun; call wandb.init() before")
    current = wandb.run
    # Not by W&B's own step, which may only grow: the loop logs with another one.
    current.define_metric("lipcore/step")
    current.define_metric("lipcore/*", step_metric="lipcore/step")
    return (lambda numbers, step: current.log({**numbers, "lipcore/step": step})), None


def _mlflow(run: str | os.PathLike[str] | None) -> Made:
    try:
        import mlflow
        from mlflow.entities import Metric
    except ImportError as error:
        raise _missing("mlflow") from error
    import time

    active = mlflow.active_run()  # of this thread: the writer's own would have none
    if active is None:
        raise RuntimeError("writers: 'mlflow' writes to the run that has begun; call mlflow.start_run() before")
    client, number = mlflow.MlflowClient(), active.info.run_id

    def write(numbers: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(_allowed(name), value, now, step) for name, value in numbers.items()]
        for begin in range(0, len(metrics), 1000):  # what one call takes
            client.log_batch(number, metrics[begin : begin + 1000])

    return write, None


def _allowed(name: str) -> str:
    """Return a name with MLflow's characters alone."""
    return "".join(c if c.isalnum() or c in "_-. /:" else "_" for c in name)


def _trackio(run: str | os.PathLike[str] | None) -> Made:
    try:
        import trackio.context_vars
    except ImportError as error:
        raise _missing("trackio") from error

    current = trackio.context_vars.current_run.get()
    if current is None:
        raise RuntimeError("writers: 'trackio' writes to the run that has begun; call trackio.init() before")
    return (lambda numbers, step: current.log(dict(numbers), step=step)), None


_BY_NAME: Mapping[str, Callable[[str | os.PathLike[str] | None], Made]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}


def _missing(name: str) -> ImportError:
    return ImportError(f"writers: {name!r} needs its library; pip install 'lipcore[{name}]'")
