// What is sketched, and how the work is cut into tasks. Plain data, for both devices.
#pragma once

#include <cstdint>
#include <vector>

#include "math/sketch.h"

namespace lipcore {

// One tensor: flat memory whose elements have the global indices first_index, first_index + 1, ...
struct SketchItem {
  const void* w;
  DType dtype;
  int64_t count;
  int64_t first_index;
  int64_t row;  // the sketch it is added to
};

struct SketchWeight {
  double weight_sq;  // sum w^2
  double nonfinite;  // number of NaN and infinite elements
};
constexpr int kSketchWeightColumns = 2;
static_assert(sizeof(SketchWeight) == kSketchWeightColumns * sizeof(double), "a row of SketchPlan's weights");

// A row's elements are cut into tasks of about the same size, each of which has buckets of its own; small tensors share
// one. Fixed by the sizes alone, so that results do not depend on the number of threads.
struct SketchPiece {
  int64_t item, begin, count;
};
struct SketchTask {
  int64_t row;
  int64_t first_piece, last_piece;  // [first, last)
  int64_t place;                    // among the buckets of tasks; -1 for the first of its row, which fills the row's
};
struct SketchSchedule {
  std::vector<SketchPiece> pieces;  // those of an item are neighbours, in order
  std::vector<SketchTask> tasks;    // those of a row are neighbours, and so are their places
  int64_t places;
};
// No more than `wave` places are used at a time: their numbers start again after so many tasks.
SketchSchedule schedule_sketch(const std::vector<SketchItem>& items, int64_t task_elements, int64_t wave);

}  // namespace lipcore
