// Streams: what is queued on one of them runs in its order, and as late as may be. Nobody but events orders two of
// them: what a stream should have waited for and did not has not happened yet.
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
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

struct Stream {
  int device;
  int64_t queued, done;
  std::deque<Work> work;
};

struct Event {
  Stream* stream;
  int64_t position;  // passed when the stream has done as much
};

std::recursive_mutex g_mutex;
bool g_deferred = false;
int g_device = 0;
Stream* g_captured = nullptr;
Stream* g_current[kDevices];  // torch's, per device; null: the default one

std::deque<Stream>& streams() {  // the devices' default ones first
  static auto* const all = [] {
    auto* made = new std::deque<Stream>;
    for (int device = 0; device < kDevices; ++device) made->push_back({device, 0, 0, {}});
    return made;
  }();
  return *all;
}
std::vector<Event>& events() {
  static auto* const all = new std::vector<Event>;
  return *all;
}
std::vector<std::vector<Work>>& graphs() {
  static auto* const all = new std::vector<std::vector<Work>>;
  return *all;
}
std::map<const void*, std::set<Stream*>>&
users() {  // of device memory: which streams it must wait for when it is freed
  static auto* const all = new std::map<const void*, std::set<Stream*>>;
  return *all;
}

Stream* stream_of(void* handle, int device) {
  return handle ? static_cast<Stream*>(handle) : &streams()[static_cast<size_t>(device)];
}
Stream* current() { return stream_of(g_current[g_device], g_device); }

void run_up_to(Stream* stream, int64_t position) {
  while (stream->done < position && !stream->work.empty()) {
    const Work item = std::move(stream->work.front());
    stream->work.pop_front();
    item();
    ++stream->done;
  }
}

void queue(Stream* stream, Work item) {
  stream->work.push_back(std::move(item));
  ++stream->queued;
  if (!g_deferred) run_up_to(stream, stream->queued);
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
  Stream* stream = stream_of(launch.stream, g_device);
  if (stream->device != g_device) return cudaErrorInvalidResourceHandle;
  launch.device = g_device;
  if (!g_deferred && stream != g_captured) return run_grid(launch);
  Work work = [launch = std::move(launch)] { return run_grid(launch); };
  if (stream == g_captured)
    graphs().back().push_back(std::move(work));
  else
    queue(stream, std::move(work));
  return cudaSuccess;
}

bool is_capturing(void* stream) { return g_captured && stream_of(stream, g_device) == g_captured; }

}  // namespace emulator

using emulator::g_mutex;
using Lock = std::lock_guard<std::recursive_mutex>;

void emulator_set_deferred(int on) {
  emulator_synchronize();
  emulator::g_deferred = on != 0;
}

// ---- devices and their streams

int emulator_device() { return emulator::g_device; }
void emulator_set_device(int device) { emulator::g_device = device; }

void* emulator_make_stream(int device) {
  const Lock lock(g_mutex);
  emulator::streams().push_back({device, 0, 0, {}});
  return &emulator::streams().back();
}
void* emulator_current_stream(int device) { return emulator::g_current[device]; }
void emulator_set_stream(int device, void* stream) {
  emulator::g_current[device] = static_cast<emulator::Stream*>(stream);
}

void emulator_synchronize_stream(void* stream, int device) {
  const Lock lock(g_mutex);
  emulator::Stream* waited = emulator::stream_of(stream, device);
  emulator::run_up_to(waited, waited->queued);
}
void emulator_synchronize_device(int device) {
  const Lock lock(g_mutex);
  for (emulator::Stream& stream : emulator::streams())
    if (stream.device == device) emulator::run_up_to(&stream, stream.queued);
}
void emulator_synchronize() {
  for (int device = 0; device < emulator::kDevices; ++device) emulator_synchronize_device(device);
}

int64_t emulator_record(void* stream, int device) {
  const Lock lock(g_mutex);
  emulator::Stream* recorded = emulator::stream_of(stream, device);
  emulator::events().push_back({recorded, recorded->queued});
  return static_cast<int64_t>(emulator::events().size()) - 1;
}
void emulator_wait(void* stream, int device, int64_t event) {
  const Lock lock(g_mutex);
  const emulator::Event waited = emulator::events()[static_cast<size_t>(event)];
  emulator::queue(emulator::stream_of(stream, device), [waited] {
    emulator::run_up_to(waited.stream, waited.position);
    return 0;
  });
}
void emulator_await_event(int64_t event) {
  const Lock lock(g_mutex);
  const emulator::Event waited = emulator::events()[static_cast<size_t>(event)];
  emulator::run_up_to(waited.stream, waited.position);
}

// ---- memory belongs to the stream that was current

void* emulator_allocate(int64_t bytes, int device) {
  void* begin = emulator::allocate_memory(bytes, device);
  const Lock lock(g_mutex);
  emulator::users()[begin] = {emulator::stream_of(emulator::g_current[device], device)};
  return begin;
}
void emulator_record_use(void* begin, void* stream, int device) {
  const Lock lock(g_mutex);
  const auto found = emulator::users().find(begin);
  if (found != emulator::users().end()) found->second.insert(emulator::stream_of(stream, device));
}

// Ordered in the streams that use it, and in no other: what was queued there may still read it. What is freed under
// capture belongs to the graph, which is never destroyed here.
void emulator_free(void* begin) {
  const Lock lock(g_mutex);
  if (emulator::g_captured) return;
  emulator::keep_for_the_next(begin);
  const std::set<emulator::Stream*> waited = emulator::users()[begin];
  emulator::users().erase(begin);
  if (waited.empty()) return emulator::release_memory(begin);
  const auto left = std::make_shared<size_t>(waited.size());
  for (emulator::Stream* stream : waited)
    emulator::queue(stream, [begin, left] {
      if (--*left == 0) emulator::release_memory(begin);
      return 0;
    });
}

// ---- graphs

void emulator_begin_capture() {
  emulator_synchronize();
  emulator::graphs().emplace_back();
  emulator::g_captured = emulator::current();
}

int64_t emulator_end_capture() {
  emulator::g_captured = nullptr;
  return static_cast<int64_t>(emulator::graphs().size()) - 1;
}

void emulator_replay(int64_t graph) {
  const Lock lock(g_mutex);
  emulator::run_up_to(emulator::current(), emulator::current()->queued);
  for (const emulator::Work& item : emulator::graphs()[static_cast<size_t>(graph)]) item();
}
