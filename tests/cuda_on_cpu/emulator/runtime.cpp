// The few functions of the CUDA runtime that lipcore's launch code calls.
#include "cuda_runtime_api.h"
#include "emulator/control.h"
#include "emulator/grid.h"

namespace emulator {

bool is_capturing(void* stream);

namespace {

int g_capability[kDevices] = {90, 90}, g_oldest = 0, g_lack = 0;
int g_toolkit = 13000, g_driver = 13000;
int64_t g_questions = 0;

// A driver of an older major version refuses everything but its version.
cudaError_t ready() {
  ++g_questions;
  return g_driver / 1000 < g_toolkit / 1000 ? cudaErrorInsufficientDriver : cudaSuccess;
}

}  // namespace

int capability() { return g_capability[current_launch() ? current_launch()->device : emulator_device()]; }

int find_code() {
  const cudaError_t error = ready();
  return error == cudaSuccess && capability() < g_oldest ? g_lack : error;
}

}  // namespace emulator

void emulator_set_capability(int capability) {
  for (int& one : emulator::g_capability) one = capability;
}
void emulator_set_capability_of(int device, int capability) { emulator::g_capability[device] = capability; }
int emulator_capability() { return emulator::capability(); }
void emulator_set_oldest(int capability, int error) {
  emulator::g_oldest = capability;
  emulator::g_lack = error;
}
void emulator_set_versions(int toolkit, int driver) {
  emulator::g_toolkit = toolkit;
  emulator::g_driver = driver;
}
int64_t emulator_questions() { return emulator::g_questions; }

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = emulator::g_toolkit;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = emulator::g_driver;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = emulator::kDevices;
  return emulator::ready();
}
cudaError_t cudaGetDevice(int* device) {
  *device = emulator_device();
  return emulator::ready();
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulator::kDevices) return cudaErrorInvalidDevice;
  emulator_set_device(device);
  return emulator::ready();
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const int capability = emulator::g_capability[device];
  if (attribute != cudaDevAttrSingleToDoublePrecisionPerfRatio) {
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? capability / 10 : capability % 10;
    return emulator::ready();
  }
  const bool of_data_centers = capability == 70 || capability == 80 || capability == 90 || capability == 100;
  *value = of_data_centers ? 2 : capability == 75 ? 32 : 64;
  return emulator::ready();
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = emulator::is_capturing(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "the emulator's findings say more"; }
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidResourceHandle:
      return "cudaErrorInvalidResourceHandle";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidDeviceFunction:
      return "cudaErrorInvalidDeviceFunction";
    case cudaErrorInsufficientDriver:
      return "cudaErrorInsufficientDriver";
    case cudaErrorNoKernelImageForDevice:
      return "cudaErrorNoKernelImageForDevice";
    default:
      return "cudaErrorLaunchFailure";
  }
}
