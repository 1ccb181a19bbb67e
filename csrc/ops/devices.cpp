#include "ops/devices.h"

#include "python/tensor_view.h"

#if defined(LIPCORE_WITH_CUDA)
#include "cuda/driver.h"
#include "cuda/launch.h"
#endif

namespace lipcore {

#if defined(LIPCORE_WITH_CUDA)
bool cuda_built() { return true; }
int cuda_device_count() { return cuda::device_count(); }
bool cuda_multiplies_16_bit(int device, bool* does) { return cuda::multiplies_16_bit({dlpack::kCUDA, device}, does); }
std::string cuda_versions() { return cuda::versions(); }
std::string cuda_trouble() { return cuda::driver_trouble(); }
std::string cuda_trouble_on(int device) { return cuda::device_trouble(device); }
#else
bool cuda_built() { return false; }
int cuda_device_count() { return 0; }
bool cuda_multiplies_16_bit(int, bool* does) {
  *does = false;
  return true;
}
std::string cuda_versions() { return "not built"; }
std::string cuda_trouble() { return ""; }
std::string cuda_trouble_on(int) { return ""; }
#endif

bool refuse_device(const char* name) {
  return fail({name},
              "is on a CUDA device, but this lipcore was built without CUDA; rebuild with LIPCORE_CUDA=ON or pass "
              "%s.cpu()",
              name);
}

}  // namespace lipcore
