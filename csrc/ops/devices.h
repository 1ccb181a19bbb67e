// What this core knows of CUDA devices. Only .cpp files below csrc/ops and csrc/trajectory ask whether
// LIPCORE_WITH_CUDA is defined, so that all other objects serve a core with CUDA as well as one without.
#pragma once

#include <string>

namespace lipcore {

bool cuda_built();
int cuda_device_count();  // 0 without CUDA, without a GPU and without a driver

// Whether per-sample norms multiply 16-bit numbers on this device's tensor cores; false with an exception set where
// nobody can say.
bool cuda_multiplies_16_bit(int device, bool* does);

// What the kernels were built with, and which CUDA the driver takes; "not built" without CUDA.
std::string cuda_versions();

// Why none of this core's kernels can run here, or not on this device, and what to do; empty where they may, and
// without CUDA. The first asks for versions alone: nothing is initialised, so that a process can fork behind it.
std::string cuda_trouble();
std::string cuda_trouble_on(int device);

// Raises that this core was built without CUDA; false.
bool refuse_device(const char* name);

}  // namespace lipcore
