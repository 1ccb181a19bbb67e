// A block of GPU threads: who waits where, and what each collective gives them.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "emulator/device.h"
#include "emulator/fiber.h"

namespace emulator {

enum class State { kReady, kAtBlockBarrier, kInWarp, kDone };

// What a thread hands in and gets back.
struct Part {
  Collective kind;
  unsigned mask;
  int argument, bytes;
  Site site;
  unsigned char in[kMostBytes], out[kMostBytes];
};

struct GpuThread {
  Fiber fiber;
  State state = State::kDone;
  uint3 index{};
  Part part{};
  AsyncCopies copies{};
};

// What a barrier orders. Two in turn: a thread that resumes late must not learn of what another one did after this
// barrier and released at the next one. Else the sanitizer takes real races for ordered.
class Order {
 public:
  char* place() { return &places_[turn_]; }
  void next() { turn_ ^= 1; }

 private:
  int turn_ = 0;
  char places_[2] = {};
};

class Block {
 public:
  // Runs all threads to their ends. False, with a finding, when they wait for each other for ever.
  bool run(const Launch& launch, unsigned number, const std::vector<int>& order);

  // The calling thread's part in a collective.
  void take_part(Collective kind, unsigned mask, int argument, const void* in, void* out, int bytes, Site site);

  int running() const { return current_; }  // thread, or -1
  AsyncCopies& copies() { return threads_[current_].copies; }

 private:
  static void enter();
  void start();
  bool advance(const std::vector<int>& order);
  bool pass_block_barrier();
  void say_deadlock(const Launch& launch) const;
  void wait(State state);
  Order& order_of(int warp, unsigned mask);
  bool complete(int thread);
  bool all_arrived(int thread);
  void exchange(int first, unsigned mask);

  static constexpr int kMasks = 16;  // different ones that a warp may use
  struct MaskedOrder {
    unsigned mask;
    Order order;
  };

  GpuThread threads_[kMostThreads];
  int count_ = 0, live_ = 0, current_ = -1;
  Order barrier_;
  MaskedOrder warps_[kMostThreads / kWarp][kMasks] = {};
};

const char* name_of(Collective kind);
const char* base_name(const char* file);

}  // namespace emulator
