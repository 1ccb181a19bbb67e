// Small kernels that each do one thing that a GPU would not forgive, or that show one thing of the emulator: for
// test_emulator.py.
#include <cuda_runtime.h>

#include <cub/block/block_reduce.cuh>

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
    {&lanes, 0, kThreads},
    {&lanes, 1, 2048},
};

}  // namespace

extern "C" int emulator_run_specimen(int number, double* x, int64_t count) {
  const Specimen& specimen = kSpecimens[number];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(specimen.blocks);
  config.blockDim = dim3(specimen.threads);
  return cudaLaunchKernelEx(&config, specimen.kernel, x, count);
}
