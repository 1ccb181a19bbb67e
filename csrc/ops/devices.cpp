#include "ops/devices.h"

#include "python/tensor_view.h"

#if defined(LIPCORE_WITH_CUDA)
#include "cuda/launch.h"
#endif

namespace lipcore {

#if defined(LIPCORE_WITH_CUDA)
bool cuda_built() { return true; }
int cuda_device_count() { return cuda::device_count(); }
#else
bool cuda_built() { return false; }
int cuda_device_count() { return 0; }
#endif

bool refuse_device(const char* name) {
  return fail({name},
              "is on a CUDA device, but this lipcore was built without CUDA; rebuild with LIPCORE_CUDA=ON or pass "
              "%s.cpu()",
              name);
}

}  // namespace lipcore
