"""Which files are written after an alarm, for whoever looks into it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lipcore.models.arguments import check_count


@dataclass(frozen=True)
class Snapshot:
    """Files to write after an alarm, in a folder of their own for each, ``<folder>/step<step of the alarm>``; every
    rank writes its own: ``rank<rank>.lipcore``, the last 512 steps of the record of :func:`lipcore.watch`, which
    :func:`lipcore.open_run` and ``lipcore postmortem`` read; with `states` ``rank<rank>.pt``, which ``torch.load``
    reads: the alarm ("alarm"), how many steps had been made ("step"), ``model.state_dict()`` ("model"), those of the
    optimizers ("optimizers", a list) and of the GradScaler ("scaler"), and of torch's random generator ("rng_state").
    Of parameters that ranks share they have this rank's part.

    They are written at the end of a step, in the next call of a method of the Monitor, or when the optimizer is about
    to make the next step, never inside a forward or backward pass, and, with several optimizers, not where some of them
    have stepped and others have not yet; nor between SAM's two steps, nor where weights were loaded since the last step
    (an average that is swapped in), nor while parameters that are spread over ranks are gathered for a pass. Where the
    training ends there the file says so ("amid_step"), and so does a warning. The training waits for it, and stays what
    it was. A file is there whole or not at all. What cannot be written (a full disk) is warned of. An alarm in the 20
    steps after one whose files were written has none; where a rank hears late of an alarm before that one, it writes
    its files then.

    Args:
        folder: of this run alone; made where it does not exist.
        states: write the states too.
        keep: of how many alarms a rank keeps its files; those that were written first are removed.

    Raises:
        TypeError, ValueError: an argument is no such thing.
    """

    folder: str | os.PathLike[str]
    states: bool = False
    keep: int = 3

    def __post_init__(self) -> None:
        if not isinstance(self.folder, (str, os.PathLike)) or not str(self.folder).strip():
            raise TypeError(f"folder: expected the path of a folder, got {self.folder!r}")
        if Path(self.folder).exists() and not Path(self.folder).is_dir():
            raise ValueError(f"folder: expected the path of a folder, and {self.folder} is a file")
        if not isinstance(self.states, bool):
            raise TypeError(f"states: expected True or False, got {self.states!r}")
        check_count("keep", self.keep)
