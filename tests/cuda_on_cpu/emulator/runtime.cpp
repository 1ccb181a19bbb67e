// The few functions of the CUDA runtime that lipcore's launch code calls.
#include "cuda_runtime_api.h"
#include "emulator/control.h"

namespace emulator {

bool is_capturing();

namespace {
int g_capability = 90;
}  // namespace

int capability() { return g_capability; }

}  // namespace emulator

void emulator_set_capability(int capability) { emulator::g_capability = capability; }
int emulator_capability() { return emulator::g_capability; }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  const int capability = emulator::capability();
  const bool of_data_centers = capability == 70 || capability == 80 || capability == 90 || capability == 100;
  *value = of_data_centers ? 2 : capability == 75 ? 32 : 64;
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulator::is_capturing() ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "the emulator's findings say more"; }
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration" : "cudaErrorLaunchFailure";
}
