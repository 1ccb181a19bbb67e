// Shared memory is a block's alone and holds rubbish when it begins.
#pragma once

namespace emulator {

// Fills the shared memory of all kernels with NaN.
void spoil_shared_memory();

}  // namespace emulator
