// Device memory: every allocation between two pages that nobody may touch.
#pragma once

#include <cstdint>
#include <string>

namespace emulator {

// On a device.
void* allocate_memory(int64_t bytes, int device);

// No kernel of a device reaches another one's memory: takes it away while one runs, and gives it back.
void take_from_others(int device);
void give_back_to_others(int device);

// Where an address lies, in words.
std::string describe_address(const void* address);

// Somebody has freed it, whatever is queued may still use it: torch's allocator would hand it out again.
void keep_for_the_next(const void* begin);

// Gives it back at once.
void release_memory(void* begin);

}  // namespace emulator
