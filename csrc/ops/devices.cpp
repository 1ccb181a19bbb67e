#include "ops/devices.h"

#include "python/tensor_view.h"

#if defined(LIPCORE_WITH_CUDA)
#include "cuda/launch.h"
#endif

namespace lipcore {

#if defined(LIPCORE_WITH_CUDA)
bool cuda_built() { return true; }
int cuda_device_count() { return cuda::device_count(); }
bool cuda_multiplies_16_bit(int device, bool* does) { return cuda::multiplies_16_bit({dlpack::kCUDA, device}, does); }
#else
bool cuda_built() { return false; }
int cuda_device_count() { return 0; }
bool cuda_multiplies_16_bit(int, bool* does) {
  *does = false;
  return true;
}
#endif

bool refuse_device(const char* name) {
  return fail({name},
              "is on a CUDA device, but this lipcore was built without CUDA; rebuild with LIPCORE_CUDA=ON or pass "
              "%s.cpu()",
              name);
}

}  // namespace lipcore
