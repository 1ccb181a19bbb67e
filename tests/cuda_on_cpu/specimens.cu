// Small kernels that each do one thing that a GPU would not forgive, or that show one thing of the emulator: for
// test_emulator.py.
#include <cuda_runtime.h>

#include <cub/block/block_reduce.cuh>

#include "cuda/mma.cuh"
#include "emulator/control.h"

namespace {

constexpr int kThreads = 64;
using Reduce = cub::BlockReduce<double, kThreads, cub::BLOCK_REDUCE_WARP_REDUCTIONS>;

// ---- what is found

__global__ void read_beyond(double* x, int64_t count) { x[0] = x[count + 8]; }

__global__ void write_beside(double* x, int64_t count) {
  if (threadIdx.x == 7) reinterpret_cast<char*>(x + count)[0] = 0;
}

__global__ void two_barriers(double* x, int64_t) {
  if (threadIdx.x < kThreads / 2)
    __syncthreads();
  else
    __syncthreads();
  x[threadIdx.x] = 0;
}

__global__ void missing_lane(double* x, int64_t) {
  if (threadIdx.x != 3) x[threadIdx.x] = __shfl_xor_sync(~0u, 1.0, 1);
  __syncthreads();
}

__global__ void lane_that_left(double* x, int64_t) {
  if (threadIdx.x == 3) return;
  x[threadIdx.x] = __shfl_xor_sync(~0u, 1.0, 1);
}

__global__ void foreign_mask(double* x, int64_t) {
  x[threadIdx.x] = threadIdx.x % 32 < 16 ? __shfl_xor_sync(0xffffu, 1.0, 1) : __shfl_xor_sync(0x7fff0000u, 1.0, 1);
}

__global__ void misaligned(double* x, int64_t) {
  const uint4 word = __ldcs(reinterpret_cast<const uint4*>(x + 1));
  x[0] = word.x;
}

// ---- what is shown

__global__ void result_of_all(double* x, int64_t) {
  __shared__ Reduce::TempStorage storage;
  x[threadIdx.x] = Reduce(storage).Sum(1.0);
}

__global__ void unwritten_shared(double* x, int64_t) {
  __shared__ double shared[kThreads];
  if (threadIdx.x % 2 == blockIdx.x) x[threadIdx.x] = shared[threadIdx.x];
  shared[threadIdx.x] = 0;
}

__global__ void number_of_block(double* x, int64_t count) {
  __shared__ double seen;
  if (threadIdx.x == 0) seen = x[count - 1];
  __syncthreads();
  if (threadIdx.x == 0) {
    x[blockIdx.x] = seen;
    x[count - 1] = seen + 1;
  }
}

__global__ void lanes(double* x, int64_t) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const unsigned odd = __ballot_sync(~0u, lane % 2);
  x[threadIdx.x] = __shfl_down_sync(~0u, lane, 1) + 100 * __shfl_up_sync(~0u, lane, 2) +
                   10000 * __shfl_sync(~0u, lane, 7) + 1e6 * (odd >> lane & 1u);
}

uint16_t bfloat16(int x) {
  const auto value = static_cast<float>(x);
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

// x[block][i][j] = sum_k (i - 2 k) (j + 3 k): block 0 has factors whose rows run along k, block 1 their transposes.
__global__ void matrix_product(double* x, int64_t) {
  alignas(16) __shared__ uint16_t a[16][16], b[16][16];
  const int lane = static_cast<int>(threadIdx.x);
  if (lane >= 32) return;
  const bool transposed = blockIdx.x == 1;
  for (int i = lane; i < 256; i += 32) {
    const int m = i / 16, k = i % 16;
    (transposed ? a[k][m] : a[m][k]) = bfloat16(m - 2 * k);
    (transposed ? b[k][m] : b[m][k]) = bfloat16(m + 3 * k);
  }
  __syncwarp();
  const int first = lane / 8 % 2 * 8, second = lane / 16 * 8, row = lane % 8;
  uint32_t of_a[4], of_b[4];
  if (transposed) {
    lipcore::cuda::load_matrices<true>(&a[second + row][first], of_a);
    lipcore::cuda::load_matrices<true>(&b[first + row][second], of_b);
  } else {
    lipcore::cuda::load_matrices<false>(&a[first + row][second], of_a);
    lipcore::cuda::load_matrices<false>(&b[second + row][first], of_b);
  }
  const uint32_t half[2] = {of_b[0], of_b[1]};
  float c[4] = {};
  lipcore::cuda::add_matrix_product<lipcore::cuda::Bfloat16>(of_a, half, c[0], c[1], c[2], c[3]);
  for (int i = 0; i < 4; ++i)
    x[blockIdx.x * 128 + (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = static_cast<double>(c[i]);
}

// What is there before the first of two copies is waited for, between both, and behind both.
__global__ void copies(double* x, int64_t) {
  alignas(16) __shared__ double shared[4];
  if (threadIdx.x) return;
  for (double& one : shared) one = 5;
  lipcore::cuda::copy_async(shared, x, 16);
  lipcore::cuda::commit_copies();
  lipcore::cuda::copy_async(shared + 2, x + 2, 8);
  lipcore::cuda::commit_copies();
  double seen[12];
  memcpy(seen, shared, sizeof shared);
  lipcore::cuda::wait_for_copies<1>();
  memcpy(seen + 4, shared, sizeof shared);
  lipcore::cuda::wait_for_copies<0>();
  memcpy(seen + 8, shared, sizeof shared);
  memcpy(x + 4, seen, sizeof seen);
}

__global__ void copies_for_nobody(double* x, int64_t) {
  alignas(16) __shared__ double shared[2];
  lipcore::cuda::copy_async(shared, x, 16);
  lipcore::cuda::commit_copies();
}

struct Specimen {
  void (*kernel)(double*, int64_t);
  unsigned blocks, threads;
};
constexpr Specimen kSpecimens[] = {
    {&read_beyond, 1, kThreads},
    {&write_beside, 1, kThreads},
    {&two_barriers, 1, kThreads},
    {&missing_lane, 1, kThreads},
    {&lane_that_left, 1, kThreads},
    {&foreign_mask, 1, kThreads},
    {&misaligned, 1, kThreads},
    {&result_of_all, 1, kThreads},
    {&unwritten_shared, 2, kThreads},
    {&number_of_block, 5, kThreads},
    {&lanes, 1, kThreads},
    {&matrix_product, 2, kThreads},
    {&copies, 1, kThreads},
    {&copies_for_nobody, 1, 1},
    {&lanes, 0, kThreads},
    {&lanes, 1, 2048},
};

}  // namespace

extern "C" int emulator_run_specimen(int number, double* x, int64_t count) {
  const Specimen& specimen = kSpecimens[number];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(specimen.blocks);
  config.blockDim = dim3(specimen.threads);
  config.stream = static_cast<cudaStream_t>(emulator_current_stream(emulator_device()));
  return cudaLaunchKernelEx(&config, specimen.kernel, x, count);
}
