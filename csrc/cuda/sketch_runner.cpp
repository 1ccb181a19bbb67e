#include "cuda/sketch_runner.h"

#include <algorithm>

#include "cuda/on_device.h"

namespace lipcore::cuda {
namespace {

template <class T>
bool upload(const OnDevice& on, const std::vector<T>& host, T* device) {
  return on.check(upload_words(host.data(), static_cast<int64_t>(host.size() * sizeof(T)), device, on.stream()));
}

}  // namespace

bool sketch(const std::vector<SketchItem>& items, dlpack::Device device, int64_t buckets, uint64_t seed, double* out) {
  SketchRunner runner;
  return runner.plan(items, device, 1, buckets, seed, out, nullptr) && runner.step(items, false);
}

bool SketchRunner::plan(const std::vector<SketchItem>& items, dlpack::Device device, int64_t rows, int64_t buckets,
                        uint64_t seed, double* sketches, SketchWeight* weights) {
  OnDevice on("sketch");
  if (!on.enter(device)) return false;
  device_ = device;
  int64_t total = 0;
  for (const SketchItem& item : items) total += item.count;
  const SketchSchedule schedule = schedule_sketch(items, sketch_task_elements(total, buckets), INT64_MAX);
  tensors_.clear();
  for (const SketchItem& item : items)
    tensors_.push_back({item.w, item.first_index, 0, 0, static_cast<int64_t>(item.dtype)});
  for (size_t p = 0; p < schedule.pieces.size(); ++p) {
    SketchTensor& tensor = tensors_[schedule.pieces[p].item];
    if (tensor.last_piece == tensor.first_piece) tensor.first_piece = static_cast<int64_t>(p);
    tensor.last_piece = static_cast<int64_t>(p) + 1;
  }
  std::vector<SketchRow> row_table(static_cast<size_t>(rows), SketchRow{0, 0, 1});
  for (const SketchTask& task : schedule.tasks) {
    SketchRow& row = row_table[task.row];
    row.empty = 0;
    if (task.place < 0) continue;
    if (row.last_place == row.first_place) row.first_place = task.place;
    row.last_place = task.place + 1;
  }
  const auto pieces = static_cast<int64_t>(schedule.pieces.size()), tasks = static_cast<int64_t>(schedule.tasks.size());
  const auto tensors = static_cast<int64_t>(items.size());
  const int64_t slices = sketch_slices(buckets);
  using Memory = TorchMemory;
  const int64_t bytes = Memory::size_of<SketchTensor>(tensors) + Memory::size_of<SketchPiece>(pieces) +
                        Memory::size_of<SketchTask>(tasks) + Memory::size_of<SketchRow>(rows) +
                        Memory::size_of<SketchWeight>(pieces * slices) +
                        Memory::size_of<double>(schedule.places * buckets) + Memory::size_of<int64_t>(rows) +
                        (weights ? 0 : Memory::size_of<SketchWeight>(tensors));
  if (!memory_.allocate(device, std::max<int64_t>(bytes, 64))) return false;
  tables_.tensors = memory_.take<SketchTensor>(tensors);
  tables_.pieces = memory_.take<SketchPiece>(pieces);
  tables_.tasks = memory_.take<SketchTask>(tasks);
  tables_.row_table = memory_.take<SketchRow>(rows);
  tables_.partials = memory_.take<SketchWeight>(pieces * slices);
  tables_.private_ = memory_.take<double>(schedule.places * buckets);
  tables_.not_finite = memory_.take<int64_t>(rows);
  tables_.sketches = sketches;
  tables_.weights = weights ? weights : memory_.take<SketchWeight>(tensors);
  tables_.tensor_count = tensors;
  tables_.piece_count = pieces;
  tables_.task_count = tasks;
  tables_.place_count = schedule.places;
  tables_.rows = rows;
  tables_.buckets = buckets;
  tables_.slices = slices;
  tables_.key = sketch_key(seed);
  stale_ = captured_ = false;
  const std::vector<int64_t> finite(static_cast<size_t>(rows), 0);
  return upload(on, tensors_, tables_.tensors) && upload(on, schedule.pieces, tables_.pieces) &&
         upload(on, schedule.tasks, tables_.tasks) && upload(on, row_table, tables_.row_table) &&
         upload(on, finite, tables_.not_finite);
}

bool SketchRunner::step(const std::vector<SketchItem>& items, bool moved) {
  OnDevice on("sketch");
  if (!on.enter(device_)) return false;
  auto capturing = cudaStreamCaptureStatusNone;
  if (!on.check(cudaStreamIsCapturing(static_cast<cudaStream_t>(on.stream()), &capturing), "asking about its stream"))
    return false;
  // As in StepRunner: a captured step brings its pointers along, and leaves them behind at every replay.
  captured_ = captured_ || capturing != cudaStreamCaptureStatusNone;
  stale_ = stale_ || moved || captured_;
  if (stale_) {
    for (size_t i = 0; i < items.size(); ++i) tensors_[i].w = items[i].w;
    if (!upload(on, tensors_, tables_.tensors)) return false;
    stale_ = false;
  }
  return on.check(run_sketch(tables_, on.stream()));
}

}  // namespace lipcore::cuda
