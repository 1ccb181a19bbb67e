#include "emulator/fiber.h"

#include <sys/mman.h>

#include <cstdlib>

#include "emulator/races.h"

#if !defined(__x86_64__)
#error "the emulator switches stacks in x86-64 assembly: add switch_stacks() for this processor to fiber.cpp"
#endif

// By hand, because swapcontext() makes a system call, and a block's threads switch some thousand times.
extern "C" void emulator_switch_stacks(void** left, void* resumed);
asm(R"(
.text
.globl emulator_switch_stacks
.type emulator_switch_stacks,@function
emulator_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch_stacks,.-emulator_switch_stacks
)");
constexpr int kSavedRegisters = 6;

#if defined(__SANITIZE_ADDRESS__)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake, const void** bottom, size_t* size);
}
#endif

namespace emulator {
namespace {

constexpr size_t kStack = 256 << 10;
constexpr size_t kPage = 4096;

struct Scheduler {  // where resume() was called
  void* top;
  void* fake;
  void* race;
  const void* bottom;
  size_t size;
};
Scheduler g_scheduler;

}  // namespace

void Fiber::prepare(void (*entry)()) {
  if (!stack_) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) std::abort();
    stack_ = static_cast<char*>(memory);
    race_ = races::create();
  }
  auto** top = reinterpret_cast<void**>(stack_ + kStack - 64);
  *--top = nullptr;  // entry's return address: the stack is aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  top_ = top;
}

void Fiber::resume() {
  g_scheduler.race = races::current();
  races::switch_to(race_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&g_scheduler.fake, stack_, kStack);
#endif
  emulator_switch_stacks(&g_scheduler.top, top_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(g_scheduler.fake, nullptr, nullptr);
#endif
}

void Fiber::arrive() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &g_scheduler.bottom, &g_scheduler.size);
#endif
}

void Fiber::leave(bool done) {
  races::switch_to(g_scheduler.race);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(done ? nullptr : &fake_, g_scheduler.bottom, g_scheduler.size);
#else
  static_cast<void>(done);
#endif
  emulator_switch_stacks(&top_, g_scheduler.top);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_, &g_scheduler.bottom, &g_scheduler.size);
#endif
}

}  // namespace emulator
