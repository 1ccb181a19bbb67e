"""What a Trajectory does in a step, and where parameters are changed by something else than one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lipcore.metric.protocol import Needs
from lipcore.models.gathered import between_steps
from lipcore.models.ranks import world_size
from lipcore.trajectory.gradient_norms import BEFORE
from lipcore.trajectory.parameters import (
    find_watched,
    values_of,
)
from lipcore.trajectory.saving import Saved
from lipcore.trajectory.update_tracker import UpdateTracker
from lipcore.trajectory.whole import PathSoFar


class Stepped(Saved):
    """A Trajectory's steps."""

    def needs(self) -> Needs:
        """Say what it looks at, and when."""
        # Read in each optimizer's own hook: its state and gradients, and a GradScaler's verdict, are there alone.
        each = len(self._optimizers) > 1 or (self._scaler is not None and self._scaler.is_enabled())
        reads_state = self._built.choice.source == "optimizer" or self._built.unexplained is not None
        return Needs(
            gradients=self._reads_gradients,
            before_step=self._built.choice.source == "snapshot",
            used_gradients=self._built.gradients is not None,
            each_optimizer=reads_state and each,
            at_step=reads_state,
        )

    @property
    def _reads_gradients(self) -> bool:
        return self._built.gradients is not None and BEFORE in self._built.gradients.trackers

    def observe_gradients(self) -> None:
        """Take the gradients as they are now, after backward and before clipping, for ``grad_norm``. A Monitor with an
        optimizer calls it; stand-alone, call it yourself."""
        self._require_bound()
        if self._built.gradients and self._due:
            scale = self._scaler._scale if self._scaler is not None and self._scaler.is_enabled() else None
            self._built.gradients.observe_before_clipping(1.0 if scale is None else scale)

    def observe_taken_gradients(self) -> None:
        """Learn that there is no gradient as backward has left it: optimizers have stepped in that pass."""
        if self._built.gradients and self._due:
            self._built.gradients.observe_taken()

    @property
    def _due(self) -> bool:
        return (self._steps_seen + 1) % self.every_steps == 0

    def observe_late_move(self) -> None:
        """Count a step that was read before the parameters had come to rest."""
        self._late_moves += 1

    def before_step(self) -> None:
        """Copy the parameters right before the optimizer's step, where the source of updates is a snapshot."""
        for tracker in self._built.trackers.values() if self._due else ():
            tracker.before_step()

    def observe_used_gradients(self, optimizer: Optimizer) -> None:
        """Take the gradients as the optimizer's step uses them, for ``clipped_grad_norm``."""
        if self._built.gradients and self._due:
            self._built.gradients.observe_used(optimizer)

    def after_step_of(self, optimizer: Optimizer) -> None:
        """Take the update that one of several optimizers has made."""
        tracker = self._built.trackers.get("updates")
        if isinstance(tracker, UpdateTracker) and self._due:
            tracker.after_step_of(optimizer)
        if self._built.unexplained is not None and self._due:
            self._built.unexplained.after_step_of(optimizer)

    def observe_step(self) -> None:
        """Take the parameters as they are now for the next point of the trajectory."""
        if self._due:
            if not self._links.are_intact():
                self._follow()
            check = None if self._built.unexplained is None else self._built.unexplained.observe()
            for tracker in self._built.trackers.values():
                # Raises before anything has changed.
                if tracker.step() if check is None or not tracker.copies else tracker.step_with(check):
                    tracker.settle()
            if self._built.gradients:
                self._built.gradients.observe_step()
            self._single.step()
        self._steps_seen += 1

    @property
    def step_call(self) -> Callable[[], object]:
        """A function that does what :meth:`observe_step` does, without a look at the ways that are not taken."""
        self._require_bound()
        if self.every_steps != 1 or list(self._built.trackers) != ["exact"] or self._built.unexplained is not None:
            return self.observe_step
        tracker, step, gradients = self._tracker, self._tracker.step, self._built.gradients
        intact = self._links.are_intact

        def call() -> None:
            nonlocal tracker, step, gradients, intact
            if not intact():
                self._follow()
                tracker, step, gradients = self._tracker, self._tracker.step, self._built.gradients
                intact = self._links.are_intact
            if step():  # raises before anything has changed
                tracker.settle()
            if gradients is not None:
                gradients.observe_step()
            self._single.step()
            self._steps_seen += 1

        return call

    def observe_skipped_step(self) -> None:
        """Count a step that a GradScaler skipped, in the window in which that was found out."""
        self._skipped[-1] += 1

    def settle(self) -> None:
        """Close the open block of every parameter."""
        self._tracker.settle()

    def update(self, updates: Mapping[str, Tensor] | None = None) -> None:
        """Observe a step, when the metric stands alone: call this after every optimizer step and before zero_grad.

        Args:
            updates: with ``source="explicit"``, what was added to every parameter, by name.

        Raises:
            RuntimeError: not bound to a model.
            ValueError: a parameter was removed, or no longer fits its state (shape, dtype, device, layout); nothing was
                updated then.
        """
        self._require_bound()
        self._raise_error()
        explicit = self._built.choice.source == "explicit"
        if explicit != (updates is not None):
            raise ValueError(
                f"updates: {'expected a dict of update tensors' if explicit else 'only for source=explicit'}, got "
                f"{type(updates).__name__}"
            )
        if updates is not None:
            self._built.trackers["updates"].give(updates)  # type: ignore[attr-defined]
        if self._built.gradients and self._due:
            self._built.gradients.observe_used()
        self.observe_step()

    # ---- jumps and changes of the model

    def _follow(self) -> None:
        """Go on with the parameters of modules that were replaced, as with replaced parameters: what lies between them
        is an update."""
        watched = find_watched(self._model, self._groups, self._masters, self.prefix)
        names, shapes = ([one.name for one in members] for members in (watched, self._all)), self._shapes
        if len({tuple(found) for found in names}) > 1 or [one.tensor.shape for one in watched] != shapes:
            raise ValueError(
                "trajectory: a module was replaced by one with other parameters, which no state fits; call rebind()"
            )
        state, steps = self.state_dict(), self._single.before
        self._build(watched)
        self.load_state_dict(state)
        self._single.before = steps

    def rebind(self) -> None:
        """Look at the model anew after parameters were added, removed, resized, frozen, unfrozen, or changed dtype or
        device. A new window starts; the path since the reference, and the reference and statistics of parameters that
        kept their shape and dtype, go on; others start from now. Where ranks hold parts of parameters, or share them
        (`split_replicas`), windows of all ranks have no path since the reference from then on.

        Raises:
            ValueError: split_replicas, and nothing of some rank's share is left; on all ranks, and nothing changes.
        """
        self._require_bound()
        self.flush()
        before = self._built.trackers
        self._single.before += int(next(iter(before.values())).table.cursor[0])
        steps, rebased = self._steps_seen, self._rebased
        with between_steps(self._model):
            self._build(find_watched(self._model, self._groups, self._masters, self.prefix))
        for key, tracker in self._built.trackers.items():
            if key in before:
                tracker.inherit(before[key])
            if self._shares is not None and world_size() > 1:  # a group may have had members on other ranks
                tracker.forget_path()
        self._path_so_far = PathSoFar()  # that counts in steps of the trackers before; windows that wait have it
        self._steps_seen, self._rebased = steps, rebased
        self._trouble.forget()

    def rebase(self) -> None:
        """Go on from where the parameters are now, after something else than a step has changed them (weights
        loaded, an average of weights swapped in). A Monitor does this by itself after `load_state_dict`."""
        self._require_bound()
        if self.before_moves is not None:
            self.before_moves()
        jumps = [tracker.rebase() for tracker in self._built.trackers.values()]
        if self._built.unexplained is not None:
            self._built.unexplained.begin()
        if any(jumps):
            self._apart = self._apart or "rebase"
            self._jumps = sorted({*self._jumps, self._tracker.window_steps})[-2:]
        self._rebased += 1

    def set_reference(self, reference: nn.Module | Mapping[str, Tensor] | None = None) -> None:
        """Measure distance, and path length since the reference, from another point: from now, from another model's
        parameters, or from those in a state_dict.

        The variance is not touched by how far the reference is; but a sliding window keeps the means of its closed
        blocks in float32, as offsets from the reference: that of a trajectory which stays x standard deviations away
        has a relative error of about 1e-7 x there.

        Raises:
            ValueError: in mode "updates"; or a parameter is missing there, of another shape or not finite.
        """
        self._require_bound()
        tracker = self._tracker
        if tracker.copies is None:
            raise ValueError("reference: mode 'updates' keeps no reference point; use mode 'exact' or 'sketch'")
        here = {parameter.own_name: parameter.tensor for parameter in self._watched}
        values = values_of(here if reference is None else reference, self._watched, "reference")
        tracker.set_reference(values)
        self._apart = "" if all(map(torch.equal, values, here.values())) else "set_reference"
