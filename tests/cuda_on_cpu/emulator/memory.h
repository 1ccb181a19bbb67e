// Device memory: every allocation between two pages that nobody may touch.
#pragma once

#include <string>

namespace emulator {

// Where an address lies, in words.
std::string describe_address(const void* address);

// Somebody has freed it, whatever is queued may still use it: torch's allocator would hand it out again.
void keep_for_the_next(const void* begin);

// Gives it back at once.
void release_memory(void* begin);

}  // namespace emulator
