// The kernels of weight_norms, of whatever multiplies two tiles (fma_product.cuh, mma_product.cuh): a block makes a
// tile of one sample's gradient, or of both Gram matrices of its tokens, in registers, squares it and adds up.
#pragma once

#include "cuda/weight_sides.cuh"

namespace lipcore::cuda {

// 64 sums a thread leave room for one block on a multiprocessor.
template <class Product>
constexpr int kBlocksOfTiles = Product::kTile > 64 ? 1 : 2;

// Nor is there more beside both Gram matrices in float64: with two, sm_90 spills those of patches and sm_100 all.
template <class Product>
constexpr int kBlocksOfGram = sizeof(typename Product::Sum) == 8 ? 1 : kBlocksOfTiles<Product>;

// Calls visit(i, j) for this thread's elements of a tile with so many rows and columns left: beyond them an infinite
// factor has met a zero.
template <class Product, class Visit>
__device__ __forceinline__ void for_each_element(int64_t rows, int64_t columns, const Visit& visit) {
#pragma unroll
  for (int i = 0; i < Product::kRows; ++i)
#pragma unroll
    for (int j = 0; j < Product::kColumns; ++j)
      if (Product::row_of(i) < rows && Product::column_of(j) < columns) visit(i, j);
}

// One unit of one sample, which a block works on at a time.
struct Task {
  int64_t sample, unit;
  RowRange tokens;
};

__device__ __forceinline__ Task task_at(const WeightWork& work, int64_t place) {
  Task task;
  task.sample = divide(place, work.units, &task.unit);
  task.tokens = tokens_of(work.norms, task.sample);
  return task;
}

template <class Product, bool kPatches>
__device__ __forceinline__ double tile_squares(const WeightWork& work, const Task& task, double x_scale,
                                               double grad_scale, typename Product::Memory& memory) {
  constexpr int kTile = Product::kTile;
  const int64_t down = (work.norms.shape.outputs + kTile - 1) / kTile, across = (work.columns + kTile - 1) / kTile;
  int64_t tile, column;
  const int64_t group = divide(task.unit, down * across, &tile);
  const int64_t row = divide(tile, across, &column);
  Side grad = grad_side(work, task.sample, group, task.tokens), x = x_side(work, task.sample, group, task.tokens);
  grad.scale = grad_scale;
  x.scale = x_scale;
  typename Product::Sum sums[Product::kRows][Product::kColumns] = {};
  Product::template multiply<kPatches>(grad, x, row * kTile, column * kTile, memory, sums);
  double total = 0;
  for_each_element<Product>(grad.channels - row * kTile, x.channels - column * kTile,
                            [&](int i, int j) { total = add_product(total, sums[i][j], sums[i][j]); });
  return total;
}

// A block per sample and tile of its weight gradient.
template <class Product, bool kPatches>
__global__ void __launch_bounds__(kThreads, kBlocksOfTiles<Product>)
    tiles(const __grid_constant__ WeightWork work, double* partials) {
  __shared__ typename Product::Memory memory;
  const Block team{&memory.storage};
  for (int64_t place = blockIdx.x; place < work.norms.samples * work.units; place += gridDim.x) {
    const double mine = tile_squares<Product, kPatches>(work, task_at(work, place), 1, 1, memory);
    const double total = team.sum(mine);
    if (threadIdx.x == 0) partials[place] = total;
  }
}

// A block per tile of the batch's weight gradient: every sample's tile is made, squared and added to it in turn.
template <class Product>
__global__ void __launch_bounds__(kThreads, kBlocksOfTiles<Product>)
    total_tiles(const __grid_constant__ WeightWork work, double* partials) {
  using Sum = typename Product::Sum;
  constexpr int kTile = Product::kTile;
  __shared__ typename Product::Memory memory;
  const WeightNorms& norms = work.norms;
  const Block team{&memory.storage};
  const bool valid = offsets_ascend(norms.samples, norms.shape.out[2], norms.offsets, team);
  for (int64_t unit = blockIdx.x; unit < work.units; unit += gridDim.x) {
    int64_t column;
    const int64_t row = divide(unit, (work.columns + kTile - 1) / kTile, &column) * kTile;
    column *= kTile;
    Sum total[Product::kRows][Product::kColumns] = {};
    const int64_t rows = norms.shape.outputs - row, columns = work.columns - column;
    for (int64_t sample = 0; sample < norms.samples; ++sample) {
      const RowRange tokens = tokens_of(norms, sample);
      Sum sums[Product::kRows][Product::kColumns] = {};
      Product::template multiply<false>(grad_side(work, sample, 0, tokens), x_side(work, sample, 0, tokens), row,
                                        column, memory, sums);
      double squares = 0;
      for_each_element<Product>(rows, columns, [&](int i, int j) {
        squares = add_product(squares, sums[i][j], sums[i][j]);
        total[i][j] += sums[i][j];
      });
      squares = team.sum(squares);
      if (threadIdx.x == 0) partials[sample * work.units + unit] = squares;
    }
    auto* to = static_cast<Sum*>(norms.total);
    for_each_element<Product>(rows, columns, [&](int i, int j) {
      to[(row + Product::row_of(i)) * norms.total_stride + column + Product::column_of(j)] =
          valid ? total[i][j] : static_cast<Sum>(nan(""));
    });
  }
}

// A block per sample, group and pair of tiles of tokens, the second not behind the first.
template <class Product, bool kPatches>
__global__ void __launch_bounds__(kThreads, kBlocksOfGram<Product>)
    gram_tiles(const __grid_constant__ WeightWork work, double* partials) {
  using Sum = typename Product::Sum;
  constexpr int kTile = Product::kTile;
  __shared__ typename Product::Memory memory;
  const Block team{&memory.storage};
  for (int64_t place = blockIdx.x; place < work.norms.samples * work.units; place += gridDim.x) {
    const auto [sample, unit, tokens] = task_at(work, place);
    int64_t row = 0, rest;
    const int64_t group = divide(unit, work.units / work.norms.shape.groups, &rest);
    for (; rest > row; ++row) rest -= row + 1;
    const Side x = transposed(x_side(work, sample, group, tokens));
    const Side grad = transposed(grad_side(work, sample, group, tokens));
    Sum of_x[Product::kRows][Product::kColumns] = {}, of_grad[Product::kRows][Product::kColumns] = {};
    Product::template multiply<kPatches>(x, x, row * kTile, rest * kTile, memory, of_x);
    Product::template multiply<kPatches>(grad, grad, row * kTile, rest * kTile, memory, of_grad);
    GramSums sums{};
    const auto add = [&](int i, int j) {
      sums.total = add_product(sums.total, of_x[i][j], of_grad[i][j]);
      if (row != rest || Product::row_of(i) != Product::column_of(j)) return;
      sums.diagonal = add_product(sums.diagonal, of_x[i][j], of_grad[i][j]);
      sums.x += static_cast<double>(of_x[i][j]);
      sums.grad += static_cast<double>(of_grad[i][j]);
    };
    for_each_element<Product>(tokens.count - row * kTile, tokens.count - rest * kTile, add);
    if (row != rest) sums.total *= 2;
    double* to = partials + place * work.parts;
    double each[4] = {sums.total, sums.diagonal, sums.x, sums.grad};
    for (int part = 0; part < 4; ++part) {
      const double total = team.sum(each[part]);
      if (threadIdx.x == 0) to[part] = total;
    }
  }
}

// Queues the kernel that this work asks for.
template <class Product>
Status launch_tiles(const WeightWork& work, double* partials, void* stream) {
  const int64_t blocks = blocks_for(work.norms.samples * work.units);
  const bool patches = Product::kAlwaysPatches || !work.x.flat || !work.grad.flat;
  if constexpr (Product::kGram)
    if (work.norms.gram) {
      const char* doing = "multiplying Gram matrices";
      if constexpr (!Product::kAlwaysPatches)
        if (!patches) return launch(doing, &gram_tiles<Product, false>, blocks, stream, work, partials);
      return launch(doing, &gram_tiles<Product, true>, blocks, stream, work, partials);
    }
  if constexpr (Product::kTotal)
    if (work.norms.total)
      return launch("making a weight gradient", &total_tiles<Product>, blocks_for(work.units), stream, work, partials);
  const char* doing = "squaring weight gradients";
  if constexpr (!Product::kAlwaysPatches)
    if (!patches) return launch(doing, &tiles<Product, false>, blocks, stream, work, partials);
  return launch(doing, &tiles<Product, true>, blocks, stream, work, partials);
}

}  // namespace lipcore::cuda
