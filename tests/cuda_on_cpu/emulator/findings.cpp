#include <dlfcn.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <string>
#include <vector>

#include "emulator/control.h"
#include "emulator/device.h"

namespace emulator {
namespace {

std::vector<std::string>& findings() {
  static auto* const all = new std::vector<std::string>;  // never destroyed: memory may be freed at the very end
  return *all;
}

}  // namespace

void finding(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  // A faulty kernel says the same for every thread of every block.
  if (std::find(findings().begin(), findings().end(), text) == findings().end()) findings().emplace_back(text);
}

std::string name_of_kernel(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info)) return "a kernel";
  char text[32];
  std::snprintf(text, sizeof text, "kernel+%tx", static_cast<const char*>(kernel) - static_cast<char*>(info.dli_fbase));
  return text;
}

void check_aligned(const void* pointer, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes)
    finding("%s of an address that is not a multiple of its %zu bytes", what, bytes);
}

}  // namespace emulator

int64_t emulator_findings() { return static_cast<int64_t>(emulator::findings().size()); }
const char* emulator_finding(int64_t index) { return emulator::findings()[static_cast<size_t>(index)].c_str(); }
void emulator_clear_findings() { emulator::findings().clear(); }
