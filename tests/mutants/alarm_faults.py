"""Small faults in alarms, snapshots, the flight recorder and the rings of means, as data; run.py plants them."""

from __future__ import annotations

from faults import Mutant

_SNAPSHOTS, _AMID, _AFTER = "alarms/test_snapshot.py", "alarms/test_snapshots_amid.py", "alarms/test_samples_after.py"
_SCALER = "trajectory/test_trajectory_scaler.py"
_UNEXPLAINED, _FLIGHT, _LATE = "alarms/test_unexplained.py", "recording/test_flight.py", "monitor/test_late_names.py"

ALARM_MUTANTS = (
    # ---- when steps are looked at, and with what they are compared
    Mutant(
        "a loop that seldom logs is waited for",
        "lipcore/alarms/waiting.py",
        "max(self._logged, logged_to, self._newest - _MOST)",
        "max(self._logged, self._newest - _MOST)",
        ("alarms/test_alarm_lag.py::test_lag",),
    ),
    Mutant(
        "what is logged waits for the next call",
        "lipcore/monitor/logged_queue.py",
        "        if self._waiting or self._copied is not None:\n            self._look(last)\n",
        "",
        ("alarms/test_alarm_lag.py::test_a_loss_that_is_seldom_logged_is_looked_at_when_it_comes",),
    ),
    Mutant(
        "a layer that does not move is compared with steps in which it does",
        "lipcore/alarms/still.py",
        "usual = still & (~self._moved | (step - self._last <= _MEMORY))",
        "usual = still & ~self._moved",
        ("alarms/test_still.py",),
    ),
    Mutant(
        "a layer that does not move is never told",
        "lipcore/alarms/still.py",
        "(step - self._last <= _MEMORY)",
        "(step - self._last <= 10 * _MEMORY)",
        ("alarms/test_still.py::test_one_that_has_always_moved_is_told_once",),
    ),
    # ---- snapshots
    Mutant(
        "a file has its name before it is whole",
        "lipcore/recording/snapshots.py",
        'with half.open("wb") as file:',
        'with target.open("wb") as file:',
        (f"{_SNAPSHOTS}::test_what_cannot_be_written_is_warned_of_and_the_training_goes_on",),
    ),
    Mutant(
        "states are written where an optimizer has yet to step",
        "lipcore/monitor/alarmed.py",
        "if amid and not (self._closed or ends):",
        "if amid and self._closed and ends:",
        (f"{_SNAPSHOTS}::test_states_are_not_of_two_steps_where_several_optimizers_step_in_turn",),
    ),
    Mutant(
        "states are written where SAM has gone up",
        "lipcore/metric/steps.py",
        "        self.away = True\n",
        "        self.away = False\n",
        (f"{_AMID}::test_states_are_not_those_that_sam_goes_up_to",),
    ),
    Mutant(
        "states are written where others were loaded",
        "lipcore/monitor/alarmed.py",
        "        self._set_by_hand = True\n",
        "",
        (f"{_AMID}::test_weights_that_are_swapped_in_between_two_steps_are_not_taken_for_the_trainings",),
    ),
    Mutant(
        "states have the step of their alarm",
        "lipcore/recording/snapshots.py",
        '            "step": step,\n',
        '            "step": event.step,\n',
        (f"{_SNAPSHOTS}::test_states_and_the_last_steps_of_the_record",),
    ),
    Mutant(
        "the files that were written first are kept",
        "lipcore/recording/snapshots.py",
        "[: -self._wanted.keep]",
        "[self._wanted.keep :]",
        (f"{_SNAPSHOTS}::test_as_many_are_kept_as_are_asked_for_and_none_of_alarms_that_follow",),
    ),
    Mutant(
        "an alarm long before another has no files",
        "lipcore/recording/snapshots.py",
        "0 <= event.step - step <= QUIET",
        "event.step - step <= QUIET",
        (f"{_SNAPSHOTS}::test_an_earlier_alarm_that_is_heard_of_late_has_its_files",),
    ),
    Mutant(
        "an alarm in the last step has no files",
        "lipcore/monitor/alarmed.py",
        "        super()._shut()\n        self._write_snapshot()\n",
        "        super()._shut()\n",
        (f"{_AMID}::test_so_does_one_that_an_error_ends_there",),
    ),
    Mutant(
        "what a killed process has left half stays",
        "lipcore/recording/snapshots.py",
        'f"step*/{self._name}.*-half*"',
        'f"step*/{self._name}*-halves"',
        (f"{_AMID}::test_what_a_killed_process_has_left_half_goes",),
    ),
    Mutant(
        "an excerpt lacks the block in which its steps begin",
        "lipcore/recording/excerpt.py",
        '"steps": "last >= :first",',
        '"steps": "first > :first",',
        ("recording/test_excerpt.py",),
    ),
    # ---- samples after an alarm
    Mutant(
        "the hooks stay on for one step more",
        "lipcore/alarms/samples.py",
        "made >= self._first + self._steps - 1:",
        "made >= self._first + self._steps:",
        (f"{_AFTER}::test_hooks_are_there_in_those_steps_alone_and_windows_have_their_samples",),
    ),
    Mutant(
        "samples are named in the step before theirs",
        "lipcore/alarms/samples.py",
        "one = _Step(self._step, ",
        "one = _Step(self._step - 1, ",
        (f"{_AFTER}::test_the_largest_of_the_steps_after_an_alarm_are_named",),
    ),
    Mutant(
        "norms that were taken back are named",
        "lipcore/alarms/samples.py",
        "    found = [one for one in found if not one.taken_back]\n",
        "",
        (f"{_AFTER}::test_norms_since_the_last_good_proof_alone_are_taken_back",),
    ),
    Mutant(
        "samples are named without their doubt",
        "lipcore/alarms/samples.py",
        "facts.aside(doubt)",
        "facts.aside()",
        (f"{_AFTER}::test_what_is_not_proved_is_said_beside_the_samples",),
    ),
    Mutant(
        "rows of the second micro-batch begin anew",
        "lipcore/alarms/samples.py",
        "rows.append(np.arange(count))",
        "rows.append(np.concatenate([np.arange(len(part)) for part in one.norms]))",
        (f"{_AFTER}::test_micro_batches_are_one_step",),
    ),
    Mutant(
        "a checkpoint leaves the hooks on",
        "lipcore/alarms/samples.py",
        "        if self._first is not None:\n            self._metric.rest()\n",
        "",
        (f"{_AFTER}::test_a_checkpoint_ends_it",),
    ),
    # ---- the flight recorder
    Mutant(
        "a GradScaler's scale is that which it makes of the step",
        "lipcore/recording/flight.py",
        "None if scale is None else scale.detach().clone()",
        "None if scale is None else scale.detach()",
        (f"{_FLIGHT}::test_the_scale_with_which_each_step_was_made",),
    ),
    Mutant(
        "learning rates of a step that is read late are the next one's",
        "lipcore/recording/flight.py",
        "(rates, given), self._noted = self._noted, None",
        "(_, given), self._noted = self._noted, None; rates = [_rate(g) for g in _groups(self._optimizers[0])]",
        (f"{_LATE}::test_the_record_has_them_at_their_steps",),
    ),
    Mutant(
        "what is logged while a step waits is of that step",
        "lipcore/metric/engine_steps.py",
        "return self._windows.step + self._step_end.waits",
        "return self._windows.step",
        (f"{_LATE}::test_the_record_has_them_at_their_steps",),
    ),
    Mutant(
        "the norms of samples lose their doubt on their way to the file",
        "lipcore/recording/flight.py",
        "                self._doubts[self._step] = doubt\n",
        "                pass\n",
        ("report/test_doubts.py::test_a_doubt_comes_with_the_norms_of_its_step",),
    ),
    # ---- movement that the optimizer did not make, in the step's own pass or in turns, and rings of means
    Mutant(
        "movement has a pass of its own in every training",
        "lipcore/trajectory/unexplained.py",
        "if not by_each and self._has_taken():",
        "if by_each and self._has_taken():",
        ("alarms/test_movement_ways.py",),
    ),
    Mutant(
        "the first parameters have every turn",
        "lipcore/trajectory/unexplained.py",
        "self._turn = (self._turn + 1) % self.turns",
        "self._turn = 0 % self.turns",
        (f"{_UNEXPLAINED}::test_in_turns_what_lasts_is_found_once_and_what_does_not_where_its_turn_is",),
    ),
    Mutant(
        "scores of the turn before stay",
        "lipcore/trajectory/unexplained.py",
        "            self._scores.fill_(torch.nan)\n",
        "            pass\n",
        (f"{_UNEXPLAINED}::test_in_turns_nothing_is_known_of_those_whose_turn_it_is_not",),
    ),
    Mutant(
        "copies outlive the training",
        "lipcore/trajectory/unexplained.py",
        "self._over, self._copies, self._by_each = True, None, False",
        "self._over, self._by_each = True, False",
        (f"{_UNEXPLAINED}::test_the_end_lets_the_copies_go",),
    ),
    Mutant(
        "the last step of an optimizer that was skipped counts again",
        "lipcore/trajectory/sources.py",
        "            if held:\n",
        "            if False:\n",
        (f"{_SCALER}::test_what_a_skipped_optimizer_of_two_did_before_is_not_counted_again",),
    ),
    Mutant(
        "a gradient counts that a skipped optimizer did not get",
        "lipcore/trajectory/gradient_norms.py",
        "if 0 < len({id(optimizer) for optimizer in self._stepping}) < len(self._optimizers):",
        "if not self._optimizers:",
        (f"{_SCALER}::test_what_a_skipped_optimizer_of_two_did_before_is_not_counted_again",),
    ),
    Mutant(
        "what lasts is told again where a turn takes long",
        "lipcore/alarms/unexplained.py",
        "max(QUIET, turns)",
        "QUIET",
        ("alarms/test_bounded.py::test_what_lasts_is_told_once_where_turns_take_long",),
    ),
    Mutant(
        "a mean is in the place of the next step",
        "lipcore/trajectory/mean_ring.py",
        "self._table.cursor[:1].long() % len(self.recent)",
        "(self._table.cursor[:1].long() + 1) % len(self.recent)",
        ("trajectory/test_mean_ring.py::test_means_are_those_of_their_steps",),
    ),
    Mutant(
        "a parameter that is not known makes its group unknown",
        "csrc/bindings/trajectory.cpp",
        "if (finite) sum->above += pairs[j].above",
        "sum->above += pairs[j].above",
        ("trajectory/test_mean_ring.py::test_what_is_not_known_of_a_parameter_is_not_in_its_group",),
    ),
)
