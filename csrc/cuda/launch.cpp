#include "cuda/launch.h"

#include <cuda_runtime_api.h>

#include "cuda/on_device.h"

namespace lipcore::cuda {
namespace {

// Their chunks lie one behind the other; returns how many there are.
int64_t lay_out(const std::vector<TrajectoryItem>& items, std::vector<TensorEntry>* entries) {
  int64_t chunks = 0;
  entries->clear();
  entries->reserve(items.size());
  for (const TrajectoryItem& item : items) {
    entries->push_back({item.w, item.w_prev, item.deviation, item.m2, item.count, chunks, item.dtype});
    chunks += (item.count + kCudaChunk - 1) / kCudaChunk;
  }
  return chunks;
}

// Device memory for the tables; `sums` when the caller has none of its own for the results.
bool make_tables(dlpack::Device device, int64_t tensors, int64_t chunks, bool sums, TorchMemory* memory,
                 StepTables* tables) {
  using Memory = TorchMemory;
  const int64_t bytes = Memory::size_of<TensorEntry>(tensors) + Memory::size_of<ChunkEntry>(chunks) +
                        Memory::size_of<StepSums>(chunks) + (sums ? Memory::size_of<StepSums>(tensors) : 0);
  if (!memory->allocate(device, bytes)) return false;
  tables->tensors = memory->take<TensorEntry>(tensors);
  tables->chunks = memory->take<ChunkEntry>(chunks);
  tables->partials = memory->take<StepSums>(chunks);
  if (sums) tables->sums = memory->take<StepSums>(tensors);
  tables->tensor_count = tensors;
  tables->chunk_count = chunks;
  return true;
}

}  // namespace

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

bool sample_norms(const Rows& rows, dlpack::Device device, double* out) {
  OnDevice on("sample_norms");
  if (!on.enter(device)) return false;
  TorchMemory memory;
  const int64_t scratch = sample_norms_scratch(rows);
  if (scratch && !memory.allocate(device, TorchMemory::size_of<double>(scratch))) return false;
  return on.check(sample_norms(rows, out, scratch ? memory.take<double>(scratch) : nullptr, on.stream()));
}

bool row_sum_norms(const RowSums& sums, dlpack::Device device, double* out) {
  OnDevice on("row_sum_norms");
  if (!on.enter(device)) return false;
  TorchMemory memory;
  const int64_t scratch = row_sum_norms_scratch(sums);
  if (scratch && !memory.allocate(device, TorchMemory::size_of<double>(scratch))) return false;
  return on.check(row_sum_norms(sums, out, scratch ? memory.take<double>(scratch) : nullptr, on.stream()));
}

bool multiplies_16_bit(dlpack::Device device, bool* does) {
  OnDevice on("weight_norms");
  if (!on.enter(device)) return false;
  *does = has_tensor_cores();
  return true;
}

bool weight_norms(WeightNorms norms, dlpack::Device device, double* out) {
  OnDevice on("weight_norms");
  if (!on.enter(device)) return false;
  norms.tensor_cores = has_tensor_cores();
  TorchMemory memory;
  const int64_t scratch = weight_norms_scratch(norms);
  if (scratch && !memory.allocate(device, TorchMemory::size_of<double>(scratch))) return false;
  return on.check(weight_norms(norms, out, scratch ? memory.take<double>(scratch) : nullptr, on.stream()));
}

bool redo_weight_norms(const WeightNorms& norms, dlpack::Device device, double* out) {
  OnDevice on("weight_norms");
  return on.enter(device) && on.check(redo_weight_norms(norms, out, on.stream()));
}

bool embedding_norms(const EmbeddingNorms& norms, dlpack::Device device, double* out) {
  OnDevice on("embedding_norms");
  if (!on.enter(device)) return false;
  TorchMemory memory;
  const int64_t scratch = embedding_norms_scratch(norms);
  if (scratch && !memory.allocate(device, TorchMemory::size_of<double>(scratch))) return false;
  return on.check(embedding_norms(norms, out, scratch ? memory.take<double>(scratch) : nullptr, on.stream()));
}

bool tensor_stats(const std::vector<TensorStatsItem>& items, dlpack::Device device, TensorStats* rows, int64_t* bins) {
  OnDevice on("tensor_stats");
  if (items.empty()) return true;
  if (!on.enter(device)) return false;
  std::vector<StatsTensor> tensors;
  int64_t chunks = 0;
  for (const TensorStatsItem& item : items) {
    tensors.push_back({item.rows.data, item.rows.length, chunks, item.place, static_cast<int64_t>(item.rows.dtype)});
    chunks += (item.rows.length + kCudaChunk - 1) / kCudaChunk;
  }
  const auto count = static_cast<int64_t>(tensors.size());
  TorchMemory memory;
  if (!memory.allocate(device, TorchMemory::size_of<StatsTensor>(count) + TorchMemory::size_of<TensorStats>(chunks)))
    return false;
  StatsTables tables{memory.take<StatsTensor>(count), memory.take<TensorStats>(chunks), rows, bins, count, chunks};
  return on.check(upload_words(tensors.data(), count * static_cast<int64_t>(sizeof(StatsTensor)), tables.tensors,
                               on.stream())) &&
         on.check(run_tensor_stats(tables, on.stream()));
}

bool trajectory_step(const std::vector<TrajectoryItem>& items, dlpack::Device device, StepSums* out) {
  if (items.empty()) return true;
  OnDevice on("trajectory_step");
  if (!on.enter(device)) return false;
  std::vector<TensorEntry> entries;
  const int64_t chunks = lay_out(items, &entries);
  TorchMemory memory;
  StepTables tables{};
  if (!make_tables(device, static_cast<int64_t>(items.size()), chunks, false, &memory, &tables)) return false;
  tables.sums = out;
  return on.check(upload_tensors(tables, entries.data(), true, on.stream())) &&
         on.check(run_step(tables, items[0].share, on.stream()));
}

bool observe_sums(const LedgerTables& ledger, const StepSums* sums, dlpack::Device device) {
  OnDevice on("trajectory");
  return on.enter(device) && on.check(observe_sums(ledger, sums, on.stream()));
}

bool observe_rows(const ObservedTable& table, dlpack::Device device, ObservedRow* rows, int64_t* bins) {
  OnDevice on("observe_rows");
  if (!on.enter(device)) return false;
  ObserveTables out{rows, bins, nullptr, chunks_of(table.count)};
  TorchMemory memory;
  if (out.chunks > 1) {
    const int64_t partials = table.places * out.chunks;
    if (!memory.allocate(device, TorchMemory::size_of<ObservedRow>(partials))) return false;
    out.partials = memory.take<ObservedRow>(partials);
  }
  return on.check(observe_rows(table, out, on.stream()));
}

bool StepRunner::plan(const std::vector<TrajectoryItem>& items, dlpack::Device device, const LedgerTables& ledger) {
  OnDevice on("trajectory");
  if (!on.enter(device)) return false;
  device_ = device;
  const int64_t chunks = lay_out(items, &entries_);
  if (!make_tables(device, static_cast<int64_t>(items.size()), chunks, true, &memory_, &tables_)) return false;
  tables_.ledger = ledger;
  return on.check(upload_tensors(tables_, entries_.data(), true, on.stream()));
}

bool StepRunner::step(const std::vector<TrajectoryItem>& items, bool moved) {
  OnDevice on("trajectory");
  if (!on.enter(device_)) return false;
  auto capturing = cudaStreamCaptureStatusNone;
  if (!on.check(cudaStreamIsCapturing(static_cast<cudaStream_t>(on.stream()), &capturing), "asking about its stream"))
    return false;
  // A captured step must bring its pointers along, because steps outside the graph may leave others in the table; and
  // it will leave its own there whenever the graph is replayed, which nobody tells us.
  captured_ = captured_ || capturing != cudaStreamCaptureStatusNone;
  stale_ = stale_ || moved || captured_;
  if (stale_) {
    for (size_t i = 0; i < items.size(); ++i) {
      entries_[i].w = items[i].w;
      entries_[i].w_prev = items[i].w_prev;
      entries_[i].deviation = items[i].deviation;
      entries_[i].m2 = items[i].m2;
    }
    if (!on.check(upload_tensors(tables_, entries_.data(), false, on.stream()))) return false;
    stale_ = false;
  }
  return on.check(run_step(tables_, 0, on.stream()));
}

}  // namespace lipcore::cuda
