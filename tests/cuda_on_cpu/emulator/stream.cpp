// The one stream: launches run at once, wait until somebody looks, or are captured.
#include <mutex>
#include <vector>

#include "cuda_runtime_api.h"
#include "emulator/control.h"
#include "emulator/device.h"
#include "emulator/grid.h"
#include "emulator/memory.h"

namespace emulator {
namespace {

constexpr size_t kMostDynamicShared = 48 << 10;  // without a kernel's opting in
constexpr unsigned kMostBlocks = 0x7fffffffu;

using Work = std::function<int()>;

std::recursive_mutex g_mutex;
bool g_deferred = false, g_capturing = false;
std::vector<Work>& queue() {
  static auto* const all = new std::vector<Work>;
  return *all;
}
std::vector<std::vector<Work>>& graphs() {
  static auto* const all = new std::vector<std::vector<Work>>;
  return *all;
}

bool allowed(const Launch& launch) {
  const dim3 g = launch.grid, b = launch.block;
  const int64_t threads = static_cast<int64_t>(b.x) * b.y * b.z;
  if (g.x > 0 && g.y > 0 && g.z > 0 && g.x <= kMostBlocks && g.y <= 65535 && g.z <= 65535 && threads > 0 &&
      threads <= kMostThreads && launch.dynamic_shared <= kMostDynamicShared)
    return true;
  finding("no GPU launches %s with a grid of %u x %u x %u, blocks of %u x %u x %u and %zu bytes of shared memory",
          name_of_kernel(launch.kernel).c_str(), g.x, g.y, g.z, b.x, b.y, b.z, launch.dynamic_shared);
  return false;
}

}  // namespace

int submit(Launch launch) {
  const std::lock_guard<std::recursive_mutex> lock(g_mutex);
  if (!allowed(launch)) return cudaErrorInvalidConfiguration;
  if (const int error = find_code()) return error;
  if (!g_capturing && !g_deferred) return run_grid(launch);
  Work work = [launch = std::move(launch)] { return run_grid(launch); };
  (g_capturing ? graphs().back() : queue()).push_back(std::move(work));
  return cudaSuccess;
}

bool is_capturing() { return g_capturing; }

}  // namespace emulator

using emulator::g_mutex;

void emulator_set_deferred(int on) {
  emulator_synchronize();
  emulator::g_deferred = on != 0;
}

void emulator_synchronize() {
  const std::lock_guard<std::recursive_mutex> lock(g_mutex);
  std::vector<emulator::Work> work;
  work.swap(emulator::queue());
  for (const emulator::Work& item : work) item();
}

// Ordered in the stream: what was queued may still read it. What is freed under capture belongs to the graph, which is
// never destroyed here.
void emulator_free(void* begin) {
  const std::lock_guard<std::recursive_mutex> lock(g_mutex);
  if (emulator::g_capturing) return;
  emulator::keep_for_the_next(begin);
  emulator::queue().push_back([begin] {
    emulator::release_memory(begin);
    return 0;
  });
  if (!emulator::g_deferred) emulator_synchronize();
}

void emulator_begin_capture() {
  emulator_synchronize();
  emulator::graphs().emplace_back();
  emulator::g_capturing = true;
}

int64_t emulator_end_capture() {
  emulator::g_capturing = false;
  return static_cast<int64_t>(emulator::graphs().size()) - 1;
}

void emulator_replay(int64_t graph) {
  const std::lock_guard<std::recursive_mutex> lock(g_mutex);
  emulator_synchronize();
  for (const emulator::Work& item : emulator::graphs()[static_cast<size_t>(graph)]) item();
}
