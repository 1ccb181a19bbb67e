// Device memory: every allocation between two pages that nobody may touch.
#pragma once

#include <string>

namespace emulator {

// Where an address lies, in words.
std::string describe_address(const void* address);

// Gives it back at once.
void release_memory(void* begin);

}  // namespace emulator
