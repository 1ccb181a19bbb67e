// CountSketches of lists of tensors: one row of buckets per group of tensors, whatever their number and sizes.
#pragma once

#include <vector>

#include "kernels.h"
#include "tensor_view.h"

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
  bool opens_row;                   // the first of its row, which needs no buckets but the row's
};
struct SketchSchedule {
  std::vector<SketchPiece> pieces;  // those of an item are neighbours, in order
  std::vector<SketchTask> tasks;    // those of a row are neighbours
};
SketchSchedule schedule_sketch(const std::vector<SketchItem>& items, int64_t task_elements);

// Sketches a fixed list of tensors again and again. run() allocates nothing.
class SketchRunner {
 public:
  // Of the items only what cannot change is used: counts, first indices and rows.
  void plan(const std::vector<SketchItem>& items, int64_t rows, int64_t buckets, uint64_t seed);

  // sketches [rows, buckets]; a row with a non-finite element is NaN from end to end. weights has one entry per item.
  void run(const SketchItem* items, double* sketches, SketchWeight* weights);
  int64_t total() const { return total_; }

 private:
  void sketch(const SketchItem* items, const SketchTask& task, double* buckets);
  void reduce(size_t first, size_t last, double* sketches);

  SketchSchedule schedule_;
  std::vector<int64_t> places_;         // per task: which of the private buckets; -1 for the one that opens its row
  std::vector<int64_t> empty_rows_;     // no elements
  std::vector<SketchWeight> partials_;  // per piece
  std::vector<double> memory_;
  double* private_ = nullptr;  // in memory_, aligned
  size_t item_count_ = 0;
  int64_t buckets_ = 0, total_ = 0;
  uint64_t key_ = 0;
};

// False with a Python exception set.
bool check_buckets(int64_t buckets);
bool check_first_index(int64_t first_index, int64_t count, int64_t i);

// The stateless form: one row. out float64 [buckets], first_index one per tensor.
bool sketch(const std::vector<TensorView>& tensors, const std::vector<int64_t>& first_index, uint64_t seed,
            const TensorView& out);

}  // namespace lipcore
