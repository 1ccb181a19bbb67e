#include "emulator/memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

#include "emulator/control.h"
#include "emulator/device.h"
#include "emulator/grid.h"

namespace emulator {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kAlign = 16;               // of the widest access; a GPU's allocator would align to 256 and hide it
constexpr size_t kBlock = 512;              // of torch's allocator: a multiple of it serves every size
constexpr unsigned char kUnwritten = 0xff;  // NaN in every floating dtype: who reads before anybody wrote sees it
constexpr unsigned char kBeside = 0xcb;     // between the allocation's ends and the guard pages

struct Allocation {
  char* begin;
  size_t bytes;
  char* map;  // the first guard page
  size_t map_bytes;
  int device;
};

std::mutex g_mutex;
int64_t g_allocations = 0, g_driver_allocations = 0;
int64_t g_on_device[kDevices];                      // how many allocations
std::multiset<size_t> g_kept[kDevices];             // sizes of what torch's allocator would have at hand
std::map<const char*, Allocation>& allocations() {  // by begin
  static auto* const all = new std::map<const char*, Allocation>;
  return *all;
}

#if defined(__SANITIZE_ADDRESS__)
// The sanitizer's own guards are exact to the byte.
Allocation make(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, kAlign, bytes) != 0) std::abort();
  return {static_cast<char*>(memory), bytes, static_cast<char*>(memory), bytes, 0};
}
void unmake(const Allocation& allocation) { std::free(allocation.begin); }
void protect(const Allocation&, int) {}
#else
Allocation make(size_t bytes) {
  const size_t body = (bytes + kPage - 1) / kPage * kPage, all = body + 2 * kPage;
  void* memory = mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  auto* map = static_cast<char*>(memory);
  mprotect(map, kPage, PROT_NONE);
  mprotect(map + kPage + body, kPage, PROT_NONE);
  std::memset(map + kPage, kBeside, body);
  return {map + kPage + (body - bytes) / kAlign * kAlign, bytes, map, all, 0};
}
void unmake(const Allocation& allocation) {
  const char* first = allocation.map + kPage;
  const char* last = allocation.map + allocation.map_bytes - kPage;
  for (const char* p = first; p < last; ++p)
    if ((p < allocation.begin || p >= allocation.begin + allocation.bytes) &&
        static_cast<unsigned char>(*p) != kBeside) {
      finding("something was written %td bytes from the start of %zu bytes of device memory", p - allocation.begin,
              allocation.bytes);
      break;
    }
  munmap(allocation.map, allocation.map_bytes);
}
void protect(const Allocation& allocation, int access) {
  mprotect(allocation.map + kPage, allocation.map_bytes - 2 * kPage, access);
}
#endif

void protect_from(int device, int access) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  if (g_on_device[device] == static_cast<int64_t>(allocations().size())) return;
  for (const auto& [begin, allocation] : allocations())
    if (allocation.device != device) protect(allocation, access);
}

}  // namespace

// As torch's allocator does for small sizes, without splitting what is larger.
size_t block_of(size_t bytes) { return (bytes + kBlock - 1) / kBlock * kBlock; }

std::string describe_address(const void* address) {
  const auto* at = static_cast<const char*>(address);
  const std::lock_guard<std::mutex> lock(g_mutex);
  for (const auto& [begin, allocation] : allocations())
    if (at >= allocation.map && at < allocation.map + allocation.map_bytes)
      return std::to_string(at - begin) + " bytes from the start of " + std::to_string(allocation.bytes) +
             " bytes of device memory" +
             (current_launch() && current_launch()->device != allocation.device
                  ? " of cuda:" + std::to_string(allocation.device)
                  : "");
  return "in no device memory";
}

void keep_for_the_next(const void* begin) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  const auto found = allocations().find(static_cast<const char*>(begin));
  if (found != allocations().end()) g_kept[found->second.device].insert(block_of(found->second.bytes));
}

void release_memory(void* begin) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  const auto found = allocations().find(static_cast<char*>(begin));
  if (found == allocations().end()) return finding("device memory that is not allocated was freed");
  unmake(found->second);
  --g_on_device[found->second.device];
  allocations().erase(found);
}

void* allocate_memory(int64_t bytes, int device) {
  Allocation made = make(static_cast<size_t>(bytes > 0 ? bytes : 1));
  made.device = device;
  std::memset(made.begin, kUnwritten, made.bytes);
  const std::lock_guard<std::mutex> lock(g_mutex);
  allocations()[made.begin] = made;
  ++g_allocations;
  ++g_on_device[device];
  const auto kept = g_kept[device].find(block_of(made.bytes));
  if (kept != g_kept[device].end())
    g_kept[device].erase(kept);
  else
    ++g_driver_allocations;
  return made.begin;
}

void take_from_others(int device) { protect_from(device, PROT_NONE); }
void give_back_to_others(int device) { protect_from(device, PROT_READ | PROT_WRITE); }

}  // namespace emulator

int64_t emulator_allocations() { return emulator::g_allocations; }
void emulator_empty_cache() {
  const std::lock_guard<std::mutex> lock(emulator::g_mutex);
  for (auto& kept : emulator::g_kept) kept.clear();
}
int64_t emulator_driver_allocations() { return emulator::g_driver_allocations; }

int emulator_device_of(const void* pointer) {
  const auto* at = static_cast<const char*>(pointer);
  const std::lock_guard<std::mutex> lock(emulator::g_mutex);
  auto after = emulator::allocations().upper_bound(at);
  if (after == emulator::allocations().begin()) return -1;
  const emulator::Allocation& before = (--after)->second;
  return at < before.begin + before.bytes ? before.device : -1;
}
