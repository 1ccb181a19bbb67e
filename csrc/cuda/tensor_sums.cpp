#include "cuda/tensor_sums.h"

#include "cuda/on_device.h"
#include "cuda/torch_memory.h"

namespace lipcore::cuda {
namespace {

// Numbers the chunks of tensors one after the other and gives them, and the tensors, room on the device.
template <class Tensor, class Partial>
bool make_room(dlpack::Device device, std::vector<Tensor>* tensors, TorchMemory* memory, Partial** partials,
               ChunkSpan** spans) {
  int64_t chunks = 0;
  for (Tensor& tensor : *tensors) {
    tensor.first_chunk = chunks;
    chunks += chunks_of(tensor.count);
  }
  const auto count = static_cast<int64_t>(tensors->size());
  if (!memory->allocate(device, TorchMemory::size_of<Partial>(chunks) + TorchMemory::size_of<ChunkSpan>(count)))
    return false;
  *partials = memory->take<Partial>(chunks);
  *spans = memory->take<ChunkSpan>(count);
  return true;
}

}  // namespace

bool square_sums(const std::vector<TensorView>& tensors, dlpack::Device device, StepSums* rows) {
  OnDevice on("square_sums");
  if (!on.enter(device)) return false;
  std::vector<SquareTensor> list;
  list.reserve(tensors.size());
  for (const TensorView& tensor : tensors) list.push_back({tensor.data, tensor.numel, 0, tensor.dtype});
  TorchMemory memory;
  SquareTables tables{nullptr, nullptr, rows};
  return make_room(device, &list, &memory, &tables.partials, &tables.spans) &&
         on.check(square_sums(tables, list, on.stream()));
}

bool update_sums(const std::vector<UpdateItem>& items, dlpack::Device device, StepSums* rows, double* squares) {
  OnDevice on("update_sums");
  if (!on.enter(device)) return false;
  std::vector<UpdateTensor> list;
  list.reserve(items.size());
  for (const UpdateItem& item : items) {
    UpdateTensor tensor{};
    tensor.w = item.w.data;
    tensor.dtype = tensor.first_dtype = tensor.second_dtype = item.w.dtype;
    tensor.gradient_dtype = tensor.previous_dtype = item.w.dtype;
    if (item.has_first) tensor.first = item.first.data, tensor.first_dtype = item.first.dtype;
    if (item.has_second) tensor.second = item.second.data, tensor.second_dtype = item.second.dtype;
    if (item.has_gradient) tensor.gradient = item.gradient.data, tensor.gradient_dtype = item.gradient.dtype;
    if (item.has_previous) tensor.previous = item.previous.data, tensor.previous_dtype = item.previous.dtype;
    tensor.count = item.w.numel;
    tensor.form = form_of(item);
    tensor.has_momentum = item.has_momentum;
    tensor.has_gradient = item.has_gradient, tensor.has_previous = item.has_previous;
    const UpdateScalars& s = item.scalars;
    const double values[kUpdateScalars] = {s.rate, s.mix, s.decay, s.first_scale, s.second_scale, s.eps};
    for (int i = 0; i < kUpdateScalars; ++i)
      tensor.scalars[i] = {values[i], item.scalar_at[i].data, item.scalar_at[i].dtype};
    list.push_back(tensor);
  }
  TorchMemory memory;
  UpdateTables tables{nullptr, nullptr, rows, squares};
  return make_room(device, &list, &memory, &tables.partials, &tables.spans) &&
         on.check(update_sums(tables, list, on.stream()));
}

bool observe_squares(const double* squares, int64_t columns, dlpack::Device device, double* table) {
  OnDevice on("trajectory");
  return on.enter(device) && on.check(observe_squares(squares, columns, table, on.stream()));
}

bool fold_means(const BlockMeans& block, const std::vector<TensorView>& earlier, dlpack::Device device,
                const double* share, double* gap_sq) {
  OnDevice on("fold_means");
  if (!on.enter(device)) return false;
  std::vector<FoldTensor> list;
  list.reserve(earlier.size());
  for (size_t i = 0; i < earlier.size(); ++i)
    list.push_back({block.last[i].data, block.reference[i].data, block.deviation[i].data,
                    static_cast<double*>(earlier[i].data), earlier[i].numel, 0, block.last[i].dtype});
  TorchMemory memory;
  FoldTables tables{nullptr, nullptr, share, gap_sq};
  return make_room(device, &list, &memory, &tables.partials, &tables.spans) &&
         on.check(fold_means(tables, list, on.stream()));
}

}  // namespace lipcore::cuda
