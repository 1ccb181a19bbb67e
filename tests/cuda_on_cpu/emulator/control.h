// What tests ask of the emulator, through ctypes.
#pragma once

#include <cstdint>

extern "C" {

// ---- findings
int64_t emulator_findings();
const char* emulator_finding(int64_t index);  // its words; equal ones are kept once
void emulator_clear_findings();

// ---- memory
void* emulator_allocate(int64_t bytes, int device);               // of the stream that is current there
void emulator_record_use(void* begin, void* stream, int device);  // freed memory waits for this stream too
void emulator_free(void* begin);              // once what is queued on the streams that use it has run
int emulator_device_of(const void* pointer);  // -1: the host's
int64_t emulator_allocations();               // so far
void emulator_empty_cache();                  // torch's allocator has nothing at hand any more
int64_t emulator_driver_allocations();        // of these, what torch's allocator would not have had at hand

// ---- the devices
int emulator_device();  // the current one
void emulator_set_device(int device);
void emulator_set_capability(int capability);  // of all, major * 10 + minor
void emulator_set_capability_of(int device, int capability);
int emulator_capability();
void emulator_set_oldest(int capability, int error);  // for which kernels were compiled; what older devices say
void emulator_set_versions(int toolkit, int driver);  // 1000 * major + 10 * minor; driver 0: there is none
int64_t emulator_questions();                         // to the runtime so far, that initialise it

// ---- streams. Null is the device's default one.
void* emulator_make_stream(int device);
void* emulator_current_stream(int device);
void emulator_set_stream(int device, void* stream);
int64_t emulator_record(void* stream, int device);  // the event's number
void emulator_wait(void* stream, int device, int64_t event);
void emulator_await_event(int64_t event);                    // the host waits
void emulator_synchronize_stream(void* stream, int device);  // for this one alone and what it waits for
void emulator_synchronize_device(int device);

// ---- launches
void emulator_set_order(int kind, uint64_t seed);  // of threads and blocks: 0 ascending, 1 descending, 2 shuffled
void emulator_set_deferred(int on);                // launches wait until somebody waits for their stream
void emulator_synchronize();
void emulator_begin_capture();
int64_t emulator_end_capture();  // the graph's number
void emulator_replay(int64_t graph);
int64_t emulator_launches();  // that have run
int64_t emulator_blocks();
}
