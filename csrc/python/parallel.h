// Work is spread over torch's own thread pool, so that lipcore never adds threads of its own to a training process.
#pragma once

#include <cstdint>

namespace lipcore {

// Below this many elements a call stays on its thread and keeps the GIL: a fork-join costs more than the work.
constexpr int64_t kSerialElements = 65536;

// Finds torch's C symbols in the library at `path`, which must already be loaded. False when they are not there; then
// everything runs on the calling thread.
bool use_torch_threads(const char* path);

// Calls body(i, context) once for every i in [0, count), in any order, on torch's threads when `parallel` is true and a
// pool is there, else here. Safe after fork: a forked child has no pool and stays serial. body must not throw.
void parallel_for(int64_t count, bool parallel, void (*body)(int64_t i, void* context), void* context);

// The same with a callable; the lambda must outlive the call (it always does: the call waits).
template <class Body>
void parallel_for(int64_t count, bool parallel, const Body& body) {
  parallel_for(
      count, parallel, [](int64_t i, void* context) { (*static_cast<const Body*>(context))(i); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// How many threads torch would use; 1 without a pool.
int pool_size();

}  // namespace lipcore
