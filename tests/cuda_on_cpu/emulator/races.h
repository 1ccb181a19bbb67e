// Tells the thread sanitizer which GPU thread runs and what a barrier orders. The emulator itself is built without
// -fsanitize=thread, because its own bookkeeping is no kernel's business; hence a macro of its own.
#pragma once

#if defined(EMULATOR_FINDS_RACES)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace emulator::races {

#if defined(EMULATOR_FINDS_RACES)
// To make a fiber of the sanitizer takes a millisecond, so a block takes over those of an earlier one; that orders the
// two, and with four sets in turn neighbours are never ordered by it.
constexpr int kSets = 4;
constexpr unsigned kNoOrder = 1;  // a switch of fibers orders nothing by itself

inline void* current() { return __tsan_get_current_fiber(); }
inline void* create() { return __tsan_create_fiber(0); }
inline void switch_to(void* fiber) { __tsan_switch_to_fiber(fiber, kNoOrder); }
inline void acquire(void* place) { __tsan_acquire(place); }
inline void release(void* place) { __tsan_release(place); }
#else
constexpr int kSets = 1;

inline void* current() { return nullptr; }
inline void* create() { return nullptr; }
inline void switch_to(void*) {}
inline void acquire(void*) {}
inline void release(void*) {}
#endif

}  // namespace emulator::races
