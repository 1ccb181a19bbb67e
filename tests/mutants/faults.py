"""Small faults over the whole engine, as data: what stands in a file, what is put in its place, and who must see it.

A fault is one that a person could make and that leaves everything running. Its text stands exactly once in its file
(tests/project/test_mutants.py), so that one whose place was rewritten is noticed and written anew.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Args:
        file: from the root of the tree.
        text: stands exactly once in the file.
        replacement: takes its place.
        tests: "file::function" below tests/; at least one of them must fail.
    """

    name: str
    file: str
    text: str
    replacement: str
    tests: tuple[str, ...]

    @property
    def compiled(self) -> bool:
        """Whether the core has to be built again."""
        return self.file.startswith("csrc/")

    def applied(self, source: str) -> str:
        """The file with the fault; ValueError where its text does not stand there exactly once."""
        found = source.count(self.text)
        if found != 1:
            raise ValueError(
                f"{self.name}: {self.file} has this text {found} times, expected once; write the fault anew in "
                f"tests/mutants/faults.py: {self.text!r}"
            )
        return source.replace(self.text, self.replacement)


MUTANTS = (
    # ---- the compiled core: kernels
    Mutant(
        "the last element of a row is left out",
        "csrc/cpu/sample_norms.cpp",
        "memcpy(tail, x + full, static_cast<size_t>(count - full) * sizeof tail[0]);",
        "memcpy(tail, x + full, static_cast<size_t>(count - full - 1) * sizeof tail[0]);",
        ("functional/test_sample_norms.py::test_rows",),
    ),
    Mutant(
        "squares of a step in float32",
        "csrc/cpu/trajectory_step.cpp",
        "sums->dw_sq = add_square(sums->dw_sq, m.step);",
        "sums->dw_sq = sums->dw_sq + widen(m.step * m.step);",
        ("functional/test_trajectory_step.py::test_sums_are_of_float64",),
    ),
    Mutant(
        "elements that are not finite move",
        "csrc/cpu/trajectory_step.cpp",
        "standing[i] = finite ? w[i] : w_prev[i];",
        "standing[i] = w[i];",
        ("functional/test_trajectory_step.py::test_non_finite_elements",),
    ),
    Mutant(
        "the point of a step that is left out is forgotten",
        "csrc/math/trajectory_row.h",
        "if (step.m2_increment == step.m2_increment) add_point(row, step);",
        "",
        ("trajectory/test_trajectory_left_out.py::test_steps_that_were_left_out",),
    ),
    Mutant(
        "a group's variance lacks members that are left out",
        "csrc/math/trajectory_row.h",
        "if (member.m2_increment == member.m2_increment) group->m2_increment += member.m2_increment;",
        "",
        ("trajectory/test_trajectory_left_out.py::test_steps_that_were_left_out",),
    ),
    Mutant(
        "Nesterov's step without the buffer",
        "csrc/math/update.h",
        "return {(shrunk + c.rate * a) + c.mix * b, shrunk};",
        "return {shrunk + c.rate * a, shrunk};",
        ("functional/test_update_sums.py::test_sizes",),
    ),
    Mutant(
        "padding of a root divides nothing by nothing",
        "csrc/cpu/update_sums.cpp",
        "for (int64_t k = rest; k < 16; ++k) lanes[k] = 1;",
        "for (int64_t k = rest; k < 16; ++k) lanes[k] = 0;",
        ("functional/test_update_sums.py::test_eps_may_be_zero",),
    ),
    Mutant(
        "padding of a root is in the second moment",
        "csrc/cpu/update_sums.cpp",
        "observe_16(now, E::read(last[1]), second, E::read(last[2]))",
        "observe_16(now, E::read(last[1]), second, second)",
        ("functional/test_update_sums.py::test_sizes",),
    ),
    Mutant(
        "gradients are divided by what is left without eps",
        "csrc/cpu/update_sums.cpp",
        "g / max_abs(c.eps, second_root(b, c))",
        "g / (c.eps + second_root(b, c))",
        ("functional/test_update_sums.py::test_the_ratio_of_a_step_by_hand",),
    ),
    Mutant(
        "what a parameter did is compared with twice the update",
        "csrc/cpu/update_sums.cpp",
        "(w - previous) + moved",
        "(w - previous) + (moved + moved)",
        ("functional/test_update_sums.py::test_gradients_and_parameters_before_the_step",),
    ),
    Mutant(
        "one instruction set in another's place",
        "csrc/dispatch.cpp",
        "g_kernels = avx512 ? &kAvx512 : &kAvx2;",
        "g_kernels = avx512 ? &kAvx2 : &kBase;",
        ("project/test_determinism.py::test_the_environment_chooses_the_instruction_set",),
    ),
    Mutant(
        "the first elements of a sketch hash as if they began a pair",
        "csrc/cpu/sketch.cpp",
        "memcpy(padded + offset, w, static_cast<size_t>(count) * sizeof *w);",
        "memcpy(padded, w, static_cast<size_t>(count) * sizeof *w);",
        ("functional/test_sketch.py::test_sizes_and_offsets",),
    ),
    Mutant(
        "columns of a sum of terms lose their second half",
        "csrc/cpu/row_sum_norms.cpp",
        "if (kScale) scale[c] += sum_lanes(product[0] + product[1]);",
        "if (kScale) scale[c] += sum_lanes(product[0]);",
        ("functional/test_row_sum_norms.py::test_channels",),
    ),
    Mutant(
        "the mean of a normalised row is rounded before it is taken off",
        "csrc/cpu/row_sum_norms.cpp",
        "(E::read(x + i) - high - low) * factor);",
        "(E::read(x + i) - high) * factor);",
        ("functional/test_norm_layer_norms.py::test_rows_far_from_zero_and_an_element_far_from_its_row",),
    ),
    Mutant(
        "the last rows of a Gram matrix count twice",
        "csrc/cpu/row_dots.h",
        "for (int64_t k = 0; k < kDotSide * rows; ++k)",
        "for (int64_t k = 0; k < kDots; ++k)",
        ("functional/test_linear_norms.py",),
    ),
    Mutant(
        "zeros around an image on one side less",
        "csrc/cpu/conv_pack.h",
        "if (d) to += shape.padding[d - 1] * image.stride[d];",
        "if (d == 3) to += shape.padding[d - 1] * image.stride[d];",
        ("functional/test_conv_norms.py::test_against_the_reference",),
    ),
    # ---- what it refuses, and when it looks away
    Mutant(
        "memory with gaps may be written to",
        "csrc/python/tensor_view.cpp",
        "if (access == Access::kWrite && !view->is_dense())",
        "if (access == Access::kWrite && view->ndim < 1)",
        ("core/test_gatekeeper.py::test_tensors_that_do_not_belong_together",),
    ),
    Mutant(
        "the last byte of a storage is not missed",
        "csrc/python/tensor_view.cpp",
        "const int64_t needed = (last + 1) * item_size(view.dtype);",
        "const int64_t needed = last * item_size(view.dtype);",
        ("core/test_gatekeeper.py::test_not_a_usable_tensor",),
    ),
    Mutant(
        "a forward pass inside a backward pass is a training pass",
        "csrc/python/training_pass.cpp",
        "return task != -1 ? 0 : is_plain_run();",
        "return is_plain_run();",
        (
            "capture/test_capture_eager.py::test_everything_checkpointed",
            "per_sample/test_per_sample_training.py::test_checkpoints",
            "per_sample/test_per_sample_training.py::test_the_whole_model_under_a_checkpoint",
        ),
    ),
    Mutant(
        "a batch of several is read from bias gradients",
        "csrc/batch_of_one/bias_gradients.cpp",
        "if (x.ndim != 2 || x.shape[0] != 1) return kTapped;",
        "if (x.ndim != 2) return kTapped;",
        (
            "capture/test_shortcut.py::test_a_loop_that_changes_is_found_out_within_256_steps",
            "capture/test_shortcut.py::test_the_shortcut_brings_what_the_taps_bring",
            "capture/test_shortcut.py::test_the_shortcut_is_taken_where_it_can_be",
        ),
    ),
    # ---- statistics
    Mutant(
        "merged moments forget the distance of their means",
        "csrc/math/moments.h",
        "into->m2 += from.m2 + difference * difference * (into->count * from.count / count);",
        "into->m2 += from.m2;",
        ("metric/test_distribution.py::test_merging_is_observing_everything",),
    ),
    Mutant(
        "a bin is named by its lower end",
        "csrc/math/log_bins.h",
        "return bin + 1 < (kPages - 1) * kBinsPerPage ? 0.5 * (low + bin_low(bin + 1)) : low;",
        "return low;",
        (
            "metric/test_distribution.py::test_against_numpy",
            "metric/test_distribution.py::test_bins_are_ordered_and_narrow",
        ),
    ),
    Mutant(
        "a quantile's rank is rounded down",
        "csrc/distribution.cpp",
        "const auto target = static_cast<int64_t>(std::floor(rank + 0.5));",
        "const auto target = static_cast<int64_t>(std::floor(rank - 0.5));",
        (
            "metric/test_distribution.py::test_against_numpy",
            "metric/test_distribution.py::test_quantiles_of_smooth_streams_to_one_percent",
        ),
    ),
    Mutant(
        "path length of squares",
        "csrc/math/trajectory_row.h",
        "row->path += update;",
        "row->path += step.dw_sq;",
        ("trajectory/test_trajectory.py::test_training",),
    ),
    Mutant(
        "a block's mean is merged with half its weight",
        "csrc/math/fold.h",
        "return gap * gap;",
        "return 0.5 * gap * gap;",
        (
            "trajectory/test_trajectory_windows.py::test_a_drift_without_noise",
            "trajectory/test_trajectory_windows.py::test_sliding",
            "trajectory/test_trajectory_merge.py::test_intervals_are_one_window",
        ),
    ),
    # ---- capture
    Mutant(
        "two uses of a weight do not wait for each other",
        "lipcore/capture/layers/layer_pass.py",
        "if self.calls[name] > 1:",
        "if self.calls[name] > 2:",
        ("per_sample/test_per_sample_eager.py::test_a_shared_weight_with_its_own_biases",),
    ),
    Mutant(
        "what a broken backward pass left is counted with the next one's",
        "lipcore/capture/layers/layer_pass.py",
        "        self._rows.clear()  # left by a backward pass that broke off\n        self._held.clear()\n",
        "",
        ("per_sample/test_per_sample_graphs.py::test_a_backward_pass_that_raised_and_is_made_again",),
    ),
    Mutant(
        "a pass whose graph is differentiated twice counts",
        "lipcore/capture/layers/passes.py",
        "return not run.spoiled",
        "return True",
        (
            "per_sample/test_per_sample_graphs.py::test_create_graph_has_no_number_but_a_reason",
            "per_sample/test_per_sample_graphs.py::test_a_gradient_penalty_is_never_a_wrong_number",
            "capture/test_training_passes.py::test_only_training_passes_are_recorded",
        ),
    ),
    Mutant(
        "a backward pass through a graph that was kept brings its ratios again",
        "lipcore/capture/taps/forward_hook.py",
        "if grad is None or micro.delivered or not collector.recording or site.lost:",
        "if grad is None or not collector.recording or site.lost:",
        ("capture/test_capture_eager.py::test_two_backward_passes_through_one_graph_are_one_record",),
    ),
    Mutant(
        "autograd.grad is a training pass",
        "lipcore/capture/taps/collector.py",
        "self.refused.add(NOT_ACCUMULATED)\n            return False\n",
        "self.refused.add(NOT_ACCUMULATED)\n",
        ("capture/test_training_passes.py::test_only_training_passes_are_recorded",),
    ),
    Mutant(
        "a backward pass through a graph that was kept is the first",
        "lipcore/capture/layers/layer_pass.py",
        "self.finished_task != -1\n",
        "False\n",
        ("per_sample/test_per_sample_noise.py::test_a_gradient_that_is_not_the_mean_of_the_samples_gradients",),
    ),
    # ---- per sample
    Mutant(
        "what was done to a loss later is forgotten",
        "lipcore/per_sample/watched_loss.py",
        "product(self._read.number / self._gradient,",
        "product(self._read.number,",
        ("per_sample/test_loss_of_output.py::test_it_is_read_whatever_is_done_to_it_later",),
    ),
    Mutant(
        "losses that are divided by different numbers are added",
        "lipcore/per_sample/loss_factor.py",
        "return first if math.isclose(first.number, second.number, rel_tol=_SAME) else None",
        "return first",
        ("per_sample/test_loss_siblings.py::test_what_is_not_known_is_refused_by_name",),
    ),
    Mutant(
        "nothing but the factor's sign is confirmed",
        "lipcore/per_sample/loss_confirmation.py",
        "(error <= bound)",
        "(error < torch.inf)",
        ("per_sample/test_loss_of_output.py::test_a_wrong_factor_is_seen",),
    ),
    Mutant(
        "a mean over the batch is taken for a sum",
        "lipcore/per_sample/loss_reduction.py",
        'terms: Any = 1 if self.reduction == "sum" else samples',
        "terms: Any = 1",
        ("per_sample/test_per_sample_eager.py::test_against_one_sample_at_a_time",),
    ),
    Mutant(
        "the scaler's factor is taken in again",
        "lipcore/per_sample/loss_reduction.py",
        "scale.double().reciprocal()",
        "scale.double()",
        ("per_sample/test_per_sample_training.py::test_a_scaler_and_its_skipped_steps",),
    ),
    # ---- trainers
    Mutant(
        "what was done to a loss after it was set is left in",
        "lipcore/per_sample/watched_loss.py",
        "product(self._read.number / self._gradient, ",
        "product(self._read.number, ",
        ("per_sample/test_loss_graph.py::test_what_is_done_to_a_loss_after_it_was_set",),
    ),
    Mutant(
        "a number of terms counts although the loss contradicts it",
        "lipcore/per_sample/loss_reduction.py",
        "if isinstance(returned, WatchedLoss) and returned.contradicts(factor, terms, task):",
        "if False:",
        ("per_sample/test_loss_graph.py::test_a_number_of_terms_that_the_models_loss_contradicts",),
    ),
    Mutant(
        "the scaler of a trainer's wrapper is not looked for",
        "lipcore/metric/engine_hooks.py",
        "scaler = scaler_inside(self._optimizers) if scaler is None else scaler",
        "scaler = None if scaler is None else scaler",
        ("metric/test_scalers_of_wrappers.py::test_the_wrappers_scaler_is_found",),
    ),
    Mutant(
        "a fused step that a scaler has skipped is one",
        "lipcore/metric/clock.py",
        "if not (isinstance(found_inf, Tensor) and found_inf.is_cpu and bool(found_inf)):",
        "if found_inf is None or found_inf.is_cpu:",
        ("metric/test_scalers_of_wrappers.py::test_the_wrappers_scaler_is_found",),
    ),
    Mutant(
        "SAM's step ends before its second_step does",
        "lipcore/metric/steps.py",
        "if self._open or self._second:",
        "if self._open:",
        ("metric/test_steps.py::test_steps_are_those_of_the_loop",),
    ),
    Mutant(
        "the mean gradient's square with the factor taken once",
        "lipcore/per_sample/noise/noise_sums.py",
        "found * (scale * scale)",
        "found * scale",
        ("per_sample/test_per_sample_monitor.py::test_the_noise_scale_takes_in_all_micro_batches_of_a_step",),
    ),
    Mutant(
        "scores of several epochs have the variance within them alone",
        "lipcore/per_sample/scores/sample_scores.py",
        "m2 = m2 + moments[:, 1] + difference**2 * had * share",
        "m2 = m2 + moments[:, 1]",
        ("per_sample/test_sample_scores.py::test_against_lists",),
    ),
    Mutant(
        "an embedding and its head meet once",
        "lipcore/layers/factor_indexed.py",
        "(squares + 2 * self._cross())",
        "(squares + self._cross())",
        ("layers/test_layer_sharing.py::test_embedding_tied_to_a_head",),
    ),
    Mutant(
        "the padding has its part in a weighted sum",
        "lipcore/layers/factor_indexed.py",
        "grad = grad.masked_fill((self.indices == self.padding_idx).unsqueeze(-1), 0)",
        "pass",
        ("layers/test_factor_products.py::test_layer",),
    ),
    Mutant(
        "a sample without a norm goes into a weighted sum",
        "lipcore/per_sample/weighted_sum.py",
        "missing = record.norms_sq[name].isnan() & (coefficients != 0)",
        "missing = torch.zeros_like(coefficients, dtype=torch.bool)",
        ("per_sample/test_weighted_sums.py::test_a_sample_without_a_number_is_nan_unless_it_is_left_out",),
    ),
    Mutant(
        "factors that were written into are used",
        "lipcore/capture/layers/kept_factors.py",
        "if _versions(factor.tensors()) != self._versions[name]:",
        "if False:",
        ("per_sample/test_weighted_sums.py::test_what_was_written_into_is_refused",),
    ),
    Mutant(
        "samples that no proof has seen have inner products",
        "lipcore/capture/layers/layer_pass.py",
        "hidden = self.unseen[name].to(norms_sq.device) & ~(norms_sq < NOTHING)",
        "hidden = torch.zeros_like(norms_sq, dtype=torch.bool)",
        ("per_sample/test_per_sample_dots.py::test_samples_that_no_proof_has_seen_are_nan",),
    ),
    Mutant(
        "an odd number of zeros goes before",
        "lipcore/layers/convolution.py",
        "(total // 2, total - total // 2)",
        "(total - total // 2, total // 2)",
        ("layers/test_layer_rules.py::test_layer",),
    ),
    # ---- windows, states, labels
    Mutant(
        "a state of another shape is taken over",
        "lipcore/metric/state.py",
        "if not isinstance(theirs, Tensor) or theirs.shape != mine.shape or theirs.dtype != mine.dtype:",
        "if not isinstance(theirs, Tensor) or theirs.dtype != mine.dtype:",
        (
            "trajectory/test_trajectory_state.py::test_a_state_that_does_not_fit_changes_nothing",
            "trajectory/test_trajectory_state.py::test_state_of_another_model_is_refused",
        ),
    ),
    Mutant(
        "a sliding window closes a block late",
        "lipcore/metric/windows.py",
        "self.block_steps >= self.steps // self.blocks",
        "self.block_steps > self.steps // self.blocks",
        (
            "trajectory/test_trajectory_windows.py::test_sliding",
            "monitor/test_monitor.py::test_windows_close_by_themselves",
        ),
    ),
    Mutant(
        "an iterated sigma_1 makes no bound one-sided",
        "lipcore/lipschitz/sandwich.py",
        'lower_label = weakest([label, "one-sided"])',
        "lower_label = label",
        (
            "lipschitz/test_lipschitz_sandwich.py::test_the_lower_side_divides_by_the_bound_of_an_iterated_sigma_1",
            "lipschitz/test_lipschitz_sandwich.py::test_sandwich_of_a_convolution_has_only_its_lower_side",
        ),
    ),
    # ---- theory and regions
    Mutant(
        "half of the covering number's term",
        "lipcore/theory/generalization.py",
        "math.log(4 * math.log(2))",
        "math.log(2 * math.log(2))",
        ("theory/test_theory_generalization.py::test_theorem_3",),
    ),
    Mutant(
        "windows that share a step both count",
        "lipcore/theory/windows.py",
        "window.last_step < kept[-1].first_step",
        "window.last_step <= kept[-1].first_step",
        ("theory/test_theory_windows.py::test_every_step_counts_once",),
    ),
    Mutant(
        "regions that differ in a second bit are one",
        "lipcore/regions/patterns.py",
        "for part in (gate.slope, gate.second) if part is not None]",
        "for part in (gate.slope,) if part is not None]",
        (
            "regions/test_regions.py::test_bits_are_those_of_the_input_of_the_activation",
            "regions/test_regions.py::test_counts_churn_and_activity",
            "regions/test_regions.py::test_the_slope_of_the_pattern_is_torchs_on_every_border",
        ),
    ),
    Mutant(
        "a combination's bound counts its parts by their sign",
        "lipcore/regions/bounds.py",
        "np.abs(scaled) @ self._costs[columns]",
        "scaled @ self._costs[columns]",
        ("regions/test_coverage.py::test_bounds_are_never_below_the_truth",),
    ),
    # ---- several ranks
    Mutant(
        "a replica counts on every rank that holds it",
        "lipcore/trajectory/rank_part.py",
        "for i, name in enumerate(self.names) if name in owners.mine]",
        "for i, name in enumerate(self.names)]",
        ("distributed/test_global_windows.py::test_right",),
    ),
    Mutant(
        "a gradient that each rank has whole counts as a part on each",
        "lipcore/distributed/gradient_parts.py",
        "    for dim in cut:\n",
        "    for dim in ():\n",
        ("distributed/test_gradient_parts.py::test_all_that_read_gradients_count_a_part_once",),
    ),
    Mutant(
        "what is in parts twice is cut as if it were so once",
        "lipcore/distributed/gradient_parts.py",
        "return None if cut & kept else cut",
        "return cut",
        ("distributed/test_gradient_parts.py::test_no_rank_knows_its_part",),
    ),
    Mutant(
        "owners of one group speak for another",
        "lipcore/metric/rank_part.py",
        "self._ranks = ranks",
        "self._ranks = self._ranks or ranks",
        ("distributed/test_global_windows.py::test_right",),
    ),
    Mutant(
        "a rank that gives up and the last one that comes decide differently",
        "lipcore/distributed/meeting.py",
        """return stands.decode()""",
        """return stands.decode() and decision""",
        ("distributed/test_meeting.py::test_a_decision_is_made_once",),
    ),
    Mutant(
        "ranks that train models of their own are one",
        "lipcore/distributed/ownership.py",
        "if its_bits != piece.bits:",
        "if False:",
        (
            "distributed/test_one_process.py::test_what_does_not_fit_together_is_named",
            "distributed/test_global_windows.py::test_refused",
        ),
    ),
    Mutant(
        "every rank has the same weight in the noise scale of all",
        "lipcore/per_sample/noise/rank_noise.py",
        "weights[:, 0].square() * samples,",
        "weights[:, 0] * samples,",
        ("distributed/test_global_samples.py::test_right",),
    ),
    Mutant(
        "the noise scale of all ranks does not look whether they share a gradient",
        "lipcore/per_sample/noise/rank_noise.py",
        "why = NOT_REDUCED if abs(whole - shared) > 0 else",
        'why = "" if abs(whole - shared) > 0 else',
        ("distributed/test_global_samples.py::test_norms_without_a_noise_scale",),
    ),
    Mutant(
        "bins of all ranks stand one beside their place",
        "lipcore/metric/rank_distributions.py",
        "used - int(most[_LESS_FIRST])",
        "used + 1 - int(most[_LESS_FIRST])",
        ("distributed/test_many_ranks.py::test_distributions_of_many_ranks_are_those_of_all_values",),
    ),
    Mutant(
        "a rank keeps to itself what it has to take back",
        "lipcore/metric/global_windows.py",
        "return [each for each in found if each not in self._told]",
        "return []",
        ("distributed/test_global_samples.py::test_all_ranks_take_back_what_one_takes_back",),
    ),
    Mutant(
        "a pass that speaks to other ranks is proved as if it did not",
        "lipcore/capture/layers/proofs.py",
        "silence = as_all_run(self._model) if self.sharded else without_communication()",
        "silence = all_put_back(self._model, random=True, writes=False)",
        ("distributed/test_global_samples.py::test_left_out",),
    ),
    Mutant(
        "under FSDP2 nobody looks whether the model itself speaks to other ranks",
        "lipcore/models/own_collectives.py",
        "    if heard.spoke:",
        "    if False:",
        ("distributed/test_global_samples.py::test_left_out",),
    ),
    Mutant(
        "the constant of a pipeline's stage stands for the model's",
        "lipcore/lipschitz/rank_part.py",
        "len(owners.everywhere) == len(owners.names) else STAGES",
        "len(owners.everywhere) <= len(owners.names) else STAGES",
        ("distributed/test_global_lipschitz.py::test_left_out",),
    ),
    Mutant(
        "a first weight that several ranks hold alike counts on each of them",
        "lipcore/lipschitz/rank_part.py",
        "parts.addend(counts=counts_it)",
        "parts.addend(counts=True)",
        ("distributed/test_global_sigma.py::test_those_of_the_whole_weight",),
    ),
    Mutant(
        "the smallest singular value of a wide matrix is an eigenvalue that none of its has",
        "lipcore/lipschitz/weight_in_parts.py",
        "values[size - min(shape)]",
        "values[0]",
        ("lipschitz/test_weight_in_parts.py::test_those_of_the_whole_matrix",),
    ),
    Mutant(
        "windows of a run that is given up stay when a state is loaded",
        "lipcore/metric/windows.py",
        "self.history.forget(step)",
        "pass",
        ("monitor/test_monitor.py::test_windows_of_a_run_that_is_given_up_go_when_its_monitor_loads_a_state",),
    ),
    Mutant(
        "steps before the ring come back in the place of later ones",
        "lipcore/trajectory/kept_steps.py",
        "part = block[at - first : end - first]",
        "part = block[: end - first]",
        ("distributed/test_long_windows.py::test_steps_come_back_in_order",),
    ),
    # ---- statistics of tensors
    Mutant(
        "the third power of a block has the other sign",
        "csrc/cpu/tensor_stats.cpp",
        "  merge(stats, block);\n}",
        "  block.m3 = -block.m3;\n  merge(stats, block);\n}",
        ("functional/test_tensor_stats.py::test_sizes",),
    ),
    Mutant(
        "the fourth power forgets what the means differ by",
        "csrc/math/tensor_stats.h",
        "6 * d_n * d_n * (a * a * from.m2 + b * b * into->m2)",
        "6 * d_n * d_n * (a * a * from.m2)",
        ("functional/test_tensor_stats.py::test_sizes",),
    ),
    Mutant(
        "the last element of an odd number is in no pair and in no bin",
        "csrc/cpu/tensor_stats.cpp",
        "if (count % 2 && last > base) ++bins[last];",
        "",
        ("functional/test_tensor_stats.py::test_histograms_of_long_runs",),
    ),
    Mutant(
        "what lies below the window of a table of pairs is in no bin",
        "csrc/cpu/tensor_stats.cpp",
        "        add_low(x, count, base, bins);\n",
        "",
        ("functional/test_tensor_stats.py::test_histograms_of_long_runs",),
    ),
    Mutant(
        "the window moves and forgets what it has counted",
        "csrc/cpu/tensor_stats.cpp",
        "      unfold();\n      if (++moves",
        "      used = false;\n      if (++moves",
        ("functional/test_tensor_stats.py::test_histograms_of_long_runs",),
    ),
    Mutant(
        "counts of subnormal numbers stay in a thread's table",
        "csrc/ops/tensor_stats.cpp",
        "tensor_bin_of(std::max(std::abs(row.min), std::abs(row.max))) + 1, kSubnormal)",
        "tensor_bin_of(std::max(std::abs(row.min), std::abs(row.max))) + 1, 1)",
        ("functional/test_tensor_stats.py::test_numbers_that_a_processor_takes_for_zero",),
    ),
    Mutant(
        "what is merged stays in the step's table",
        "csrc/ops/tensor_stats.cpp",
        "    if (gone) from[i] = TensorStats{};\n",
        "",
        ("functional/test_tensor_stats.py::test_tables_merge_by_place",),
    ),
    Mutant(
        "hooks on modules stay there after the pass",
        "lipcore/capture/outputs.py",
        "        self._take_off()\n        if self._root and",
        "        if self._root and",
        ("tensor_stats/test_stats_metric.py::test_every_number_of_every_place",),
    ),
    Mutant(
        "gradients of several micro-batches add up twice",
        "lipcore/tensor_stats/sampled_steps.py",
        "if self._has_gradients:\n            for numbers",
        "if not self._has_gradients:\n            for numbers",
        ("tensor_stats/test_stats_metric.py::test_of_several_backward_passes_the_last_gradient_counts",),
    ),
    Mutant(
        "a skipped step counts",
        "lipcore/tensor_stats/sampled_steps.py",
        "self._skipped[-1] += 1\n        self._step.clear()",
        "self._skipped[-1] += 1",
        ("tensor_stats/test_stats_metric.py::test_a_scaler",),
    ),
    Mutant(
        "keys of one head are taken for another's",
        "lipcore/tensor_stats/attention.py",
        "keys.repeat_interleave(self.heads // len(keys))",
        "keys.repeat(self.heads // len(keys))",
        ("tensor_stats/test_stats_of_models.py::test_the_bound_of_every_head",),
    ),
    Mutant(
        "ranks' sums are of powers about their own means",
        "lipcore/tensor_stats/rank_part.py",
        "m3 + 3 * d * m2 + n * d2 * d",
        "m3 + n * d2 * d",
        ("tensor_stats/test_stats_ranks.py::test_parts_of_ranks_add_up",),
    ),
)
