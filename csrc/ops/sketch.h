// CountSketches of lists of tensors: one row of buckets per group of tensors, whatever their number and sizes.
#pragma once

#include <vector>

#include "kernels.h"
#include "ops/sketch_schedule.h"
#include "python/tensor_view.h"

namespace lipcore {

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
  void reduce(int64_t first, int64_t last, double* sketches);

  SketchSchedule schedule_;
  std::vector<int64_t> empty_rows_;     // no elements
  std::vector<SketchWeight> partials_;  // per piece
  std::vector<double> memory_;
  double* private_ = nullptr;  // in memory_, aligned
  size_t item_count_ = 0;
  int64_t wave_ = 1, buckets_ = 0, total_ = 0;
  uint64_t key_ = 0;
};

// False with a Python exception set.
bool check_buckets(int64_t buckets);
bool check_first_index(int64_t first_index, int64_t count, int64_t i);

// The stateless form: one row. out float64 [buckets], first_index one per tensor.
bool sketch(const std::vector<TensorView>& tensors, const std::vector<int64_t>& first_index, uint64_t seed,
            const TensorView& out);

}  // namespace lipcore
