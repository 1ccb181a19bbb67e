// What tests ask of the emulator, through ctypes.
#pragma once

#include <cstdint>

extern "C" {

// ---- findings
int64_t emulator_findings();
const char* emulator_finding(int64_t index);  // its words; equal ones are kept once
void emulator_clear_findings();

// ---- memory
void* emulator_allocate(int64_t bytes);
void emulator_free(void* begin);  // once everything queued has run
int emulator_is_device(const void* pointer);
int64_t emulator_allocations();         // so far
void emulator_empty_cache();            // torch's allocator has nothing at hand any more
int64_t emulator_driver_allocations();  // of these, what torch's allocator would not have had at hand

// ---- the device
void emulator_set_capability(int capability);  // major * 10 + minor
int emulator_capability();
void emulator_set_oldest(int capability);             // for which kernels were compiled
void emulator_set_versions(int toolkit, int driver);  // 1000 * major + 10 * minor; driver 0: there is none
int64_t emulator_questions();                         // to the runtime so far, that initialise it

// ---- launches
void emulator_set_order(int kind, uint64_t seed);  // of threads and blocks: 0 ascending, 1 descending, 2 shuffled
void emulator_set_deferred(int on);                // launches wait for emulator_synchronize()
void emulator_synchronize();
void emulator_begin_capture();
int64_t emulator_end_capture();  // the graph's number
void emulator_replay(int64_t graph);
int64_t emulator_launches();  // that have run
int64_t emulator_blocks();
}
