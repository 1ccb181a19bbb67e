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

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulator::is_capturing() ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "the emulator's findings say more"; }
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration" : "cudaErrorLaunchFailure";
}
