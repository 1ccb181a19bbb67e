// The kernels of weight_norms for 16-bit numbers on devices whose tensor cores take both kinds: from sm_80 on.
#include "cuda/mma_product.cuh"
#include "cuda/weight_tiles.cuh"

namespace lipcore::cuda {
namespace {

template <class E>
Status launch_mma_of(const WeightWork& work, double* partials, void* stream) {
  return work.tile > 64 ? launch_tiles<MmaProduct<E, 128>>(work, partials, stream)
                        : launch_tiles<MmaProduct<E, 64>>(work, partials, stream);
}

// CUDA asks the device for its code of this kernel.
cudaError_t ask_for_a_kernel(cudaFuncAttributes* attributes) {
  const cudaError_t error = cudaFuncGetAttributes(attributes, &gram_tiles<MmaProduct<Bfloat16, 64>, true>);
  if (error != cudaSuccess) cudaGetLastError();  // reported here: the next one who asks must not find it
  return error;
}

}  // namespace

// Without any kernel the launch that follows will say it.
bool has_tensor_cores() {
  cudaFuncAttributes attributes{};
  return ask_for_a_kernel(&attributes) == cudaSuccess && attributes.ptxVersion >= kMmaPtx;
}

Status find_kernels() {
  cudaFuncAttributes attributes{};
  return {static_cast<int>(ask_for_a_kernel(&attributes)), "looking for its kernels"};
}

Status launch_mma_tiles(const WeightWork& work, double* partials, void* stream) {
  return work.norms.x.dtype == DType::kBfloat16 ? launch_mma_of<Bfloat16>(work, partials, stream)
                                                : launch_mma_of<Float16>(work, partials, stream);
}

}  // namespace lipcore::cuda
