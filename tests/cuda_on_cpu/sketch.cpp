// The one kernel with dynamic shared memory declares it `extern`; here is the array, as large as a launch may ask for.
#include "cuda/sketch.cu"

namespace lipcore::cuda {
namespace {
alignas(16) thread_local double buckets[(48 << 10) / sizeof(double)];
}  // namespace
}  // namespace lipcore::cuda
