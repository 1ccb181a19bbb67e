#include "emulator/block.h"

#include <cstring>
#include <set>
#include <string>

#include "emulator/grid.h"
#include "emulator/races.h"

uint3 threadIdx{}, blockIdx{};
dim3 blockDim, gridDim;

namespace emulator {

const char* name_of(Collective kind) {
  static const char* const kNames[] = {
      "__syncthreads",    "__syncwarp",     "__ballot_sync", "__shfl_sync",    "__shfl_xor_sync",
      "__shfl_down_sync", "__shfl_up_sync", "ldmatrix",      "ldmatrix.trans", "mma"};
  return kNames[static_cast<int>(kind)];
}

const char* base_name(const char* file) {
  const char* slash = std::strrchr(file, '/');
  return slash ? slash + 1 : file;
}

// The first thing that runs on a fiber's stack.
void Block::enter() {
  Block& block = *current_block();
  block.threads_[block.current_].fiber.arrive();
  before_thread();
  current_launch()->thread();
  after_thread();
  GpuThread& thread = block.threads_[block.current_];
  if (thread.copies.count) finding("cp.async: a thread leaves its kernel with copies that it has not waited for");
  thread.state = State::kDone;
  --block.live_;
  thread.fiber.leave(true);
}

void Block::start() {
  count_ = live_ = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  for (int t = 0; t < count_; ++t) {
    const auto i = static_cast<unsigned>(t);
    threads_[t].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    threads_[t].state = State::kReady;
    threads_[t].copies.count = 0;
    threads_[t].copies.group = 0;
    threads_[t].fiber.prepare(&enter);
  }
}

// Lets every thread that can run go on until it waits.
bool Block::advance(const std::vector<int>& order) {
  bool moved = false;
  for (const int t : order) {
    if (threads_[t].state != State::kReady) continue;
    current_ = t;
    threadIdx = threads_[t].index;
    threads_[t].fiber.resume();
    current_ = -1;
    moved = true;
  }
  return moved;
}

// A barrier is for all threads that have not left the kernel.
bool Block::pass_block_barrier() {
  const GpuThread* one = nullptr;
  for (int t = 0; t < count_; ++t) {
    if (threads_[t].state == State::kDone) continue;
    if (threads_[t].state != State::kAtBlockBarrier) return false;
    const Site here = threads_[t].part.site;
    if (one && one->part.site.line != here.line)
      finding("__syncthreads: threads of a block meet at different places, %s:%d and %s:%d",
              base_name(one->part.site.file), one->part.site.line, base_name(here.file), here.line);
    one = &threads_[t];
  }
  for (int t = 0; t < count_; ++t)
    if (threads_[t].state == State::kAtBlockBarrier) threads_[t].state = State::kReady;
  barrier_.next();
  return one != nullptr;
}

void Block::say_deadlock(const Launch& launch) const {
  std::set<std::string> places;
  for (int t = 0; t < count_; ++t) {
    const Part& part = threads_[t].part;
    if (threads_[t].state != State::kDone)
      places.insert(std::string(" ") + name_of(part.kind) + " at " + base_name(part.site.file) + ":" +
                    std::to_string(part.site.line));
  }
  std::string all;
  for (const std::string& place : places) all += place;
  finding("deadlock: threads of a block of %s wait in%s", name_of_kernel(launch.kernel).c_str(), all.c_str());
}

bool Block::run(const Launch& launch, unsigned number, const std::vector<int>& order) {
  blockIdx = {number % gridDim.x, number / gridDim.x % gridDim.y, number / gridDim.x / gridDim.y};
  start();
  while (live_)
    if (!advance(order) && !pass_block_barrier()) {
      say_deadlock(launch);
      return false;
    }
  return true;
}

void Block::wait(State state) {
  GpuThread& thread = threads_[current_];
  thread.state = state;
  thread.fiber.leave(false);
}

void Block::take_part(Collective kind, unsigned mask, int argument, const void* in, void* out, int bytes, Site site) {
  const int t = current_;
  Part& part = threads_[t].part;
  part.kind = kind;
  part.mask = mask;
  part.argument = argument;
  part.bytes = bytes;
  part.site = site;
  // Byte by byte: the sanitizers watch memcpy, and would take this for the kernel's own.
  for (int i = 0; i < bytes; ++i) part.in[i] = static_cast<const volatile unsigned char*>(in)[i];
  if (kind == Collective::kSyncBlock) {
    char* place = barrier_.place();
    races::release(place);
    wait(State::kAtBlockBarrier);
    races::acquire(place);
    return;
  }
  if (!(mask >> t % kWarp & 1u))
    finding("%s at %s:%d: lane %d is not in its own mask %08x", name_of(kind), base_name(site.file), site.line,
            t % kWarp, mask);
  // Of the collectives of a warp only __syncwarp orders memory.
  Order& order = order_of(t / kWarp, mask);
  char* place = order.place();
  if (kind == Collective::kSyncWarp) races::release(place);
  if (complete(t))
    order.next();
  else
    wait(State::kInWarp);
  if (kind == Collective::kSyncWarp) races::acquire(place);
  for (int i = 0; i < bytes; ++i) static_cast<volatile unsigned char*>(out)[i] = part.out[i];
}

AsyncCopies& async_copies() {
  static AsyncCopies nobodys;
  Block* block = current_block();
  return block && block->running() >= 0 ? block->copies() : nobodys;
}

void collective(Collective kind, unsigned mask, int argument, const void* in, void* out, int bytes, Site site) {
  Block* block = current_block();
  if (!block || block->running() < 0) return finding("%s outside a kernel", name_of(kind));
  block->take_part(kind, mask, argument, in, out, bytes, site);
}

}  // namespace emulator
