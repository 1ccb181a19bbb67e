#include "emulator/grid.h"

#include <algorithm>
#include <condition_variable>
#include <map>
#include <mutex>
#include <random>
#include <thread>

#include "cuda_runtime_api.h"
#include "emulator/block.h"
#include "emulator/control.h"
#include "emulator/faults.h"
#include "emulator/memory.h"
#include "emulator/races.h"
#include "emulator/shared_memory.h"

namespace emulator {
namespace {

enum class Direction { kAscending, kDescending, kShuffled };

Block g_blocks[races::kSets];
Block* g_block = nullptr;
const Launch* g_launch = nullptr;
Direction g_direction = Direction::kAscending;
uint64_t g_seed = 0;
int64_t g_launches = 0, g_blocks_run = 0;
char g_begin, g_end;       // of a launch, for the thread sanitizer
char* g_shared = nullptr;  // stands for the running block's shared memory

template <class T>
std::vector<T> in_order(int64_t count, std::mt19937_64* random) {
  std::vector<T> order(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i)
    order[static_cast<size_t>(i)] = static_cast<T>(g_direction == Direction::kDescending ? count - 1 - i : i);
  if (g_direction == Direction::kShuffled) std::shuffle(order.begin(), order.end(), *random);
  return order;
}

bool run_block(const Launch& launch, unsigned number, const std::vector<int>& threads) {
  g_block = &g_blocks[g_blocks_run++ % races::kSets];
  spoil_shared_memory();
  const bool ended = g_block->run(launch, number, threads);
  g_block = nullptr;
  return ended;
}

#if defined(EMULATOR_FINDS_RACES)
// Neighbouring blocks each on an OS thread of their own, one after the other, so that each has thread_locals, that is
// shared memory, of its own, and global memory is all they share. Those that get the same thread_locals are ordered.
char* place_of_shared_memory() {
  static thread_local char here;
  static auto* const places = new std::map<void*, char>;
  return &(*places)[&here];
}

bool run_blocks(const Launch& launch, const std::vector<unsigned>& blocks, const std::vector<int>& threads) {
  bool ended = true;
  for (size_t first = 0; first < blocks.size() && ended; first += races::kSets) {
    const size_t last = std::min(first + races::kSets, blocks.size());
    size_t turn = first;
    std::mutex mutex;
    std::condition_variable moved;
    std::vector<std::thread> alive;
    for (size_t i = first; i < last; ++i)
      alive.emplace_back([&, i] {
        std::unique_lock<std::mutex> lock(mutex);
        moved.wait(lock, [&] { return turn == i; });
        g_shared = place_of_shared_memory();
        races::release(g_shared);  // the sanitizer counts a thread's start as its writing of its thread_locals
        ended = ended && run_block(launch, blocks[i], threads);
        ++turn;
        moved.notify_all();
        moved.wait(lock, [&] { return turn == last; });  // keeps its thread_locals from the next one
      });
    for (std::thread& thread : alive) thread.join();
  }
  return ended;
}
#else
bool run_blocks(const Launch& launch, const std::vector<unsigned>& blocks, const std::vector<int>& threads) {
  for (const unsigned block : blocks)
    if (!run_block(launch, block, threads)) return false;
  return true;
}
#endif

}  // namespace

Block* current_block() { return g_block; }
const Launch* current_launch() { return g_launch; }

void before_thread() {
  races::acquire(&g_begin);
  races::acquire(g_shared);
}

void after_thread() {
  races::release(&g_end);
  races::release(g_shared);
}

int run_grid(const Launch& launch) {
  ++g_launches;
  g_launch = &launch;
  gridDim = launch.grid;
  blockDim = launch.block;
  std::mt19937_64 random(g_seed);
  const auto blocks = in_order<unsigned>(static_cast<int64_t>(gridDim.x) * gridDim.y * gridDim.z, &random);
  const auto threads = in_order<int>(static_cast<int64_t>(blockDim.x) * blockDim.y * blockDim.z, &random);
  races::release(&g_begin);
  bool ended = false;
  take_from_others(launch.device);
  const bool survived = survives([&] { ended = run_blocks(launch, blocks, threads); });
  give_back_to_others(launch.device);
  races::acquire(&g_end);
  g_launch = nullptr;
  g_block = nullptr;
  return survived && ended ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emulator

void emulator_set_order(int kind, uint64_t seed) {
  emulator::g_direction = static_cast<emulator::Direction>(kind);
  emulator::g_seed = seed;
}
int64_t emulator_launches() { return emulator::g_launches; }
int64_t emulator_blocks() { return emulator::g_blocks_run; }
