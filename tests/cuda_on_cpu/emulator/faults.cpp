#include "emulator/faults.h"

#include <setjmp.h>
#include <signal.h>

#include "emulator/device.h"
#include "emulator/grid.h"
#include "emulator/memory.h"

namespace emulator {

#if defined(__SANITIZE_ADDRESS__) || defined(EMULATOR_FINDS_RACES)

bool survives(const std::function<void()>& body) {  // the sanitizers report what they see, and end the process
  body();
  return true;
}

#else
namespace {

sigjmp_buf g_way_out;
const void* volatile g_address = nullptr;

void on_fault(int, siginfo_t* info, void*) {
  g_address = info->si_addr;
  siglongjmp(g_way_out, 1);
}

}  // namespace

// The handlers are there during a launch only: any other fault belongs to whoever handled it before.
bool survives(const std::function<void()>& body) {
  struct sigaction ours{};
  struct sigaction before[2];
  ours.sa_sigaction = &on_fault;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &ours, &before[0]);
  sigaction(SIGBUS, &ours, &before[1]);
  const bool fault = sigsetjmp(g_way_out, 1) != 0;
  if (!fault) body();
  sigaction(SIGSEGV, &before[0], nullptr);
  sigaction(SIGBUS, &before[1], nullptr);
  if (fault)
    finding("%s touched an address %s", name_of_kernel(current_launch()->kernel).c_str(),
            describe_address(const_cast<const void*>(g_address)).c_str());
  return !fault;
}

#endif

}  // namespace emulator
