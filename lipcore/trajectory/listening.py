"""What a Trajectory tells of single steps, as training goes on, and what alarms have it look for."""

from __future__ import annotations

from dataclasses import replace

from lipcore.trajectory.binding import Bound
from lipcore.trajectory.step_stream import OnStep, checked_callback


class Listened(Bound):
    """A Trajectory's callbacks."""

    @property
    def on_step(self) -> OnStep | None:
        """A callback ``on_step(first_step, arrays)`` for the steps from now on, each once and in order, in blocks of at
        least 64 (from a CUDA device 256, one block later); what is left comes with :meth:`flush`, :meth:`close`,
        :meth:`state_dict` and the close of a Monitor.

        ``first_step`` is the number of the block's first step, from 1; ``arrays`` a dict of float64 arrays [steps,
        places] with "update_norm", "weight_norm" (after the step), "grad_norm" and "clipped_grad_norm", NaN where a
        step has none, with "rms_t" where `stats` has it, and with "normalized_update_rms" where alarms look at an
        optimizer's state; ``arrays.places`` names the columns. The arrays are the
        callback's to keep. No step waits for a device; the callback itself runs in the training thread. What it raises
        is kept and raised by your next call, a warning says so, and it is not called any more.
        """
        return self._single.on_step

    @on_step.setter
    def on_step(self, on_step: OnStep | None) -> None:
        on_step = checked_callback(on_step)
        self.flush()
        self._raise_error()
        self._single.on_step = on_step
        if self._watched:
            self._single.start(self._built)

    def listen(self, listener: OnStep, *, prompt: bool = False) -> None:
        """Call this too for the steps from now on, as `on_step` is and before it, without its being the user's; a
        `prompt` one as soon as it costs little, and not in blocks."""
        self.flush()
        (self._single.prompt if prompt else self._single.listeners).append(listener)
        if self._watched:
            self._single.start(self._built)

    def look_for(self, *, movement: bool, normalized: bool) -> None:
        """Look, once bound, in every step for movement that the optimizers did not make; keep, with
        ``source="optimizer"``, the RMS of normalised updates of each step. One that is bound stays as it is."""
        if not self._watched:
            self._wanted = replace(self._wanted, explains=movement, normalizes=normalized)

    def look_no_more(self) -> None:
        """End the look for movement, whose copies go: no step comes any more, behind a rebind() neither."""
        self._wanted = replace(self._wanted, explains=False)
        if self._built.unexplained is not None:
            self._built.unexplained.end()

    @property
    def checks_movement(self) -> bool:
        """True where some parameter is checked for it."""
        return self._built.unexplained is not None and self._built.unexplained.checked > 0

    @property
    def movement_turns(self) -> int:
        """Number of steps in which each parameter is checked for it once."""
        return 1 if self._built.unexplained is None else self._built.unexplained.turns

    @property
    def why_unchecked(self) -> str:
        """Reasons why parameters are not checked for it, each once; "" where all are."""
        check = self._built.unexplained
        if check is None:
            choice = self._built.choice
            return (
                f"mode {choice.mode!r} with source {choice.source!r} has numbers of groups, not of "
                'parameters; pass metrics=[lipcore.Trajectory()], whose mode is "exact", or Trajectory(mode="updates")'
            )
        return "; ".join(dict.fromkeys(check.why_not.values()))

    def hurry(self) -> None:
        """Hand what waits to the listeners of :meth:`listen` at the next steps, not only when there is a block."""
        self._single.hurry()

    def flush(self) -> None:
        """Hand all steps so far to :attr:`on_step`. Waits for a device."""
        self._single.flush()

    def close(self) -> None:
        """Hand over what is left of the steps and call :attr:`on_step` no more; what it raised is raised here."""
        self._single.stop()
        self._raise_error()

    def take_error(self) -> Exception | None:
        return self._single.take_error()

    def _raise_error(self) -> None:
        error = self.take_error()
        if error is not None:
            raise error
