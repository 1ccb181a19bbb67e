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

}  // namespace

bool has_tensor_cores() {
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, &gram_tiles<MmaProduct<Bfloat16, 64>, true>) != cudaSuccess) {
    cudaGetLastError();  // the launch that follows will say it
    return false;
  }
  return attributes.ptxVersion >= kMmaPtx;
}

Status launch_mma_tiles(const WeightWork& work, double* partials, void* stream) {
  return work.norms.x.dtype == DType::kBfloat16 ? launch_mma_of<Bfloat16>(work, partials, stream)
                                                : launch_mma_of<Float16>(work, partials, stream);
}

}  // namespace lipcore::cuda
