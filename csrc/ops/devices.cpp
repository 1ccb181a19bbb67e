#include "ops/devices.h"

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

}  // namespace lipcore
