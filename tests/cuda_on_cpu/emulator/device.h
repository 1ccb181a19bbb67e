// What the stand-in headers in include/ are made of: the part of the emulator that a kernel and its launch touch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};

namespace emulator {

enum class Collective {
  kSyncBlock,
  kSyncWarp,
  kBallot,
  kShuffle,
  kShuffleXor,
  kShuffleDown,
  kShuffleUp,
  kLoad,
  kLoadTransposed,
  kMatrixProduct
};

// What a lane hands in for a product of matrices, and gets back: words of a and b, numbers of c.
struct MatrixProduct {
  uint32_t a[4], b[2];
  float c[4];
};

// Copies of one GPU thread that have begun and have not been waited for. They land in wait_for_copies().
struct AsyncCopy {
  void* to;
  const void* from;
  int bytes;
  int64_t group;
};
struct AsyncCopies {
  static constexpr int kMost = 64;
  AsyncCopy all[kMost];
  int count;
  int64_t group;  // of the next one
};
AsyncCopies& async_copies();  // of the running thread

// Where a kernel's source calls a collective.
struct Site {
  const char* file;
  int line;
};

constexpr int kDevices = 2;
constexpr int kWarp = 32;
constexpr int kMostThreads = 1024;  // of a block
constexpr int kMostBytes = 96;      // that a lane hands to a collective

// The calling GPU thread takes part: it waits for the others of its block or of `mask`. `in` and `out` hold `bytes`.
void collective(Collective kind, unsigned mask, int argument, const void* in, void* out, int bytes, Site site);

// Notes something that a GPU would not forgive, or would not show. Tests ask for it: control.h.
void finding(const char* format, ...) __attribute__((format(printf, 1, 2)));

// "kernel+OFFSET" into this library, whose symbols tests look up: a kernel is local to its file, so dladdr() knows no
// name.
std::string name_of_kernel(const void* kernel);

// Of the device that runs a kernel, else of the current one, major * 10 + minor; kernels are taken for compiled for it
// where it is no older than a test has said.
int capability();

// Whether the driver is new enough and there is code for the device; a cudaError_t.
int find_code();

void check_aligned(const void* pointer, size_t bytes, const char* what);

struct Launch {
  const void* kernel;  // the function; name_of_kernel() makes words of it
  dim3 grid, block;
  size_t dynamic_shared;
  void* stream;                  // null: the current device's default one
  std::function<void()> thread;  // one thread's body; owns a copy of the parameters
  int device = 0;                // set by submit()
};

// Runs it, or keeps it for later: stream.cpp. Returns a cudaError_t.
int submit(Launch launch);

}  // namespace emulator

// Written by the emulator before it lets a GPU thread run.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
