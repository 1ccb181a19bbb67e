#include "cuda/driver.h"

#include <cuda_runtime_api.h>

#include "cuda/kernels.h"

namespace lipcore::cuda {
namespace {

constexpr int kOldestToolkit = 12;  // that builds lipcore

// The architectures, as nvcc was told them: CMakeLists.txt.
std::string built_for() { return LIPCORE_CUDA_BUILT_FOR; }

// As CUDA numbers its versions, 1000 * major + 10 * minor; the driver's is 0 where there is none.
int toolkit_version() {
  int version = 0;
  if (cudaRuntimeGetVersion(&version) != cudaSuccess) cudaGetLastError();
  return version;
}
int driver_version() {
  int version = 0;
  if (cudaDriverGetVersion(&version) == cudaSuccess) return version;
  cudaGetLastError();
  return 0;
}
std::string in_words(int version) {
  return "CUDA " + std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string of_this_build() { return "lipcore's CUDA kernels, built with " + in_words(toolkit_version()); }

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  if (cudaDeviceGetAttribute(&value, name, device) != cudaSuccess) cudaGetLastError();
  return value;
}

// Errors of a kernel whose code is not there for the device, or not in a form that the driver takes.
bool lacks_code(int error) {
  return error == cudaErrorInvalidDeviceFunction || error == cudaErrorInvalidKernelImage ||
         error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion;
}

std::string kernel_trouble(int device, const std::string& words) {
  const int number =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
  const std::string arch = std::to_string(number);
  return of_this_build() + " for the architectures " + built_for() + ", cannot run on cuda:" + std::to_string(device) +
         ", an sm_" + arch + " (" + words + "): rebuild lipcore with LIPCORE_CUDA=ON LIPCORE_CUDA_ARCHS=" + arch +
         ", by a toolkit of a major version that the driver takes (up to " + in_words(driver_version()) +
         "). On the CPU it measures as before.";
}

}  // namespace

std::string versions() {
  const int driver = driver_version();
  return "built with " + in_words(toolkit_version()) + " for " + built_for() +
         (driver ? "; the driver takes up to " + in_words(driver) : "; no driver");
}

// Within a major version every driver runs what a later toolkit has compiled for its devices.
std::string driver_trouble() {
  const int toolkit = toolkit_version() / 1000, driver = driver_version() / 1000;
  if (driver >= toolkit) return "";
  const std::string newer = "CUDA " + std::to_string(toolkit);
  if (driver == 0)
    return of_this_build() + ", cannot run: there is no NVIDIA driver (libcuda.so.1). Install one that takes " + newer +
           ", or start the container with its GPUs. On the CPU lipcore measures as before.";
  return of_this_build() + ", cannot run: the NVIDIA driver takes up to " + in_words(driver_version()) +
         ". Install a driver that takes " + newer +
         (driver >= kOldestToolkit ? ", or rebuild lipcore by a toolkit of CUDA " + std::to_string(driver) +
                                         " (LIPCORE_CUDA=ON CUDACXX=/path/to/nvcc)"
                                   : "") +
         ". On the CPU it measures as before.";
}

std::string device_trouble(int device) {
  std::string trouble = driver_trouble();
  if (!trouble.empty()) return trouble;
  int before = -1;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  const auto found = error == cudaSuccess ? static_cast<cudaError_t>(find_kernels().code) : error;
  if (before >= 0 && cudaSetDevice(before) != cudaSuccess) cudaGetLastError();
  if (!lacks_code(found)) error = found;  // of the device, such as no memory to load its code into
  if (error != cudaSuccess) {
    cudaGetLastError();
    return "cuda:" + std::to_string(device) + " cannot be used: " + cudaGetErrorString(error);
  }
  return found == cudaSuccess ? "" : kernel_trouble(device, cudaGetErrorString(found));
}

std::string reason_of(int error, int device) {
  return error == cudaErrorInsufficientDriver || lacks_code(error) ? device_trouble(device) : "";
}

}  // namespace lipcore::cuda
