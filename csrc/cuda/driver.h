// Whether this core's kernels can run here: the versions of CUDA, and the devices they were compiled for, in words.
#pragma once

#include <string>

namespace lipcore::cuda {

// What the kernels were built with, and what the driver takes.
std::string versions();

// Why no kernel can run, whatever the device, and what to do: there is no driver, or it is older than the toolkit.
// Empty where they may. Asks for versions alone: nothing is initialised, so that a process can fork behind it.
std::string driver_trouble();

// The same of one device, or that no kernel was compiled for it. Makes CUDA ready there.
std::string device_trouble(int device);

// device_trouble() where a call's error, a cudaError_t, has such a reason; else empty.
std::string reason_of(int error, int device);

}  // namespace lipcore::cuda
