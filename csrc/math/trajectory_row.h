// What is remembered of a parameter's (or a group's) movement from step to step: a row of float64 scalars. Host and
// device. A zeroed row is the identity of merge and the state before the first step.
#pragma once

#include <cmath>

#include "math/trajectory.h"

namespace lipcore {

struct TrajectoryRow {
  // Of the open window.
  double steps;        // steps observed, the non-finite ones not among them
  double path;         // sum of ||dw||
  double points;       // in the running mean: those of the open block
  double folded;       // of the window's earlier blocks, whose means were merged
  double m2;           // sum of ||w - mean||^2 within blocks, and between those that were merged
  double update_last;  // ||dw||
  double update_max;
  double max_abs_last;  // max |dw|
  double max_abs_max;
  double ratio_last;  // ||dw|| / ||w||, w after the step
  double ratio_sum;
  double ratio_max;
  double nonfinite_steps;     // steps left out because of NaN or infinite elements
  double nonfinite_elements;  // how many elements that were, over those steps
  double zero_steps;          // steps in which nothing moved
  // Since the reference point.
  double total_steps;
  double total_path;
  double distance;  // ||w - w0||: no step reads w0, so it is made when a window is asked for, and is not kept here
  double weight;    // ||w||
  // Of the row itself.
  double group;  // of a tensor: which group it adds to
};
constexpr int kTrajectoryColumns = 20;
static_assert(sizeof(TrajectoryRow) == kTrajectoryColumns * sizeof(double), "a row of the ledger tensor");

LIPCORE_INLINE double larger(double a, double b) { return b > a ? b : a; }

// A float32 deviation from the mean of a drifting weight grows and loses the increments, so it is kept per block, and
// blocks are merged by Chan's formula. A window's first block counts the point it starts from; a later one begins with
// its first step, since the point before belongs to the block before.
constexpr int kTrajectoryBlock = 512;  // 5e-5 of the variance after 1e5 steps in one block, 4e-7 in two hundred
constexpr double kContinues = -1;  // `points` before a window that goes on where another one ended: its start is that
                                   // one's last point, and merging the two must not count it twice
LIPCORE_INLINE bool starts_block(const TrajectoryRow& row) { return row.points <= 0; }
LIPCORE_INLINE double points_after_step(const TrajectoryRow& row) {
  return starts_block(row) ? (row.points == 0 && row.steps == 0 ? 2 : 1) : row.points + 1;
}
// The share that the points before have in the mean of n.
LIPCORE_INLINE double share_before(double n) { return (n - 1) / n; }

// A weight of norm zero that did not move has ratio 0; one that moved has no finite ratio, and infinity says so.
LIPCORE_INLINE double update_ratio(double update, double weight) { return update == 0 ? 0 : update / weight; }

// NaN is a tensor with non-finite elements; zeros beside a count of them, a group of nothing but such tensors.
LIPCORE_INLINE bool is_counted(const StepSums& step) {
  const bool anything = step.weight_sq > 0 || step.dw_sq > 0;
  return step.nonfinite > 0 ? anything : step.dw_sq == step.dw_sq;
}

LIPCORE_INLINE void add_point(TrajectoryRow* row, const StepSums& step) {
  row->points = points_after_step(*row);
  row->m2 = larger(row->m2 + step.m2_increment, 0);  // of points that hardly differ rounding can leave less
}

LIPCORE_INLINE void observe(TrajectoryRow* row, const StepSums& step) {
  if (step.nonfinite > 0) {
    row->nonfinite_steps += 1;
    row->nonfinite_elements += step.nonfinite;
    if (!is_counted(step)) {  // a group goes on with its finite members
      if (step.m2_increment == step.m2_increment) add_point(row, step);
      return;
    }
  }
  const double update = sqrt(step.dw_sq);
  const double weight = sqrt(step.weight_sq);
  const double ratio = update_ratio(update, weight);
  add_point(row, step);
  row->steps += 1;
  row->zero_steps += update == 0;
  row->path += update;
  row->update_last = update;
  row->update_max = larger(row->update_max, update);
  row->max_abs_last = step.max_abs_dw;
  row->max_abs_max = larger(row->max_abs_max, step.max_abs_dw);
  row->ratio_last = ratio;
  row->ratio_sum += ratio;
  row->ratio_max = larger(row->ratio_max, ratio);
  row->total_steps += 1;
  row->total_path += update;
  row->weight = weight;
}

// What is kept of a single step, for histories and quantiles: squares, because those of shards add up.
struct RecentStep {
  double dw_sq;  // NaN for a step that was left out
  double weight_sq;
};

LIPCORE_INLINE void observe_row(TrajectoryRow* row, RecentStep* recent, const StepSums& step) {
  observe(row, step);
  const double left_out = static_cast<double>(NAN);
  *recent = is_counted(step) ? RecentStep{step.dw_sq, step.weight_sq} : RecentStep{left_out, left_out};
}

// A group before its first finite member: the largest of no absolute values.
LIPCORE_INLINE StepSums no_member() { return {0, 0, -1, 0, 0}; }

// Sums of a group's step from its members'. A non-finite member adds its count, and to the variance, and the rest goes
// on.
LIPCORE_INLINE void merge_member(StepSums* group, const StepSums& member) {
  if (member.dw_sq == member.dw_sq) return merge(group, member);
  group->nonfinite += member.nonfinite;
  if (member.m2_increment == member.m2_increment) group->m2_increment += member.m2_increment;
}

// A group none of whose members is finite is left out of the step as a tensor is: it has not stood still at norm zero.
LIPCORE_INLINE void observe_group(TrajectoryRow* row, RecentStep* recent, StepSums sums) {
  if (sums.max_abs_dw < 0) {
    sums.max_abs_dw = 0;
    if (sums.nonfinite > 0) sums.dw_sq = NAN;
  }
  observe_row(row, recent, sums);
}

// The ledger as a kernel sees it; on a CUDA device, device pointers.
struct LedgerTables {
  TrajectoryRow* rows;  // of the tensors, then the groups, then the total
  int64_t tensors, groups;
  RecentStep* recent;  // [ring, rows]
  int64_t ring;
  double* cursor;  // [2]: how many steps were written to the ring; and for a CUDA kernel to keep it in
  LIPCORE_MEMBER int64_t row_count() const { return tensors + groups + 1; }
};

}  // namespace lipcore
