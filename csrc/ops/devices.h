// What this core knows of CUDA devices. Only .cpp files below csrc/ops and csrc/trajectory ask whether
// LIPCORE_WITH_CUDA is defined, so that all other objects serve a core with CUDA as well as one without.
#pragma once

namespace lipcore {

bool cuda_built();
int cuda_device_count();  // 0 without CUDA, without a GPU and without a driver

// Whether per-sample norms multiply 16-bit numbers on this device's tensor cores; false with an exception set where
// nobody can say.
bool cuda_multiplies_16_bit(int device, bool* does);

// Raises that this core was built without CUDA; false.
bool refuse_device(const char* name);

}  // namespace lipcore
