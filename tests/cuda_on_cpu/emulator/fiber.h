// A GPU thread: a stack of its own, left and resumed where it stopped. One runs at a time.
#pragma once

#include <cstddef>

namespace emulator {

class Fiber {
 public:
  // Lets it begin with entry() at the next resume(), whatever it did before; entry() ends with leave(true).
  void prepare(void (*entry)());

  // Runs it until it leaves. Called by the scheduler.
  void resume();

  // Back to the scheduler. Called by the fiber itself; `done` when it is not to be resumed.
  void leave(bool done);

  // What entry() does first.
  void arrive();

 private:
  char* stack_ = nullptr;
  void* top_ = nullptr;   // its stack pointer while it is left
  void* fake_ = nullptr;  // the address sanitizer's
  void* race_ = nullptr;  // the thread sanitizer's
};

}  // namespace emulator
