// Turns a GPU thread's touch of a guard page into a finding; the rest of its launch is left out, as on a GPU.
#pragma once

#include <functional>

namespace emulator {

// Runs body(); false, with a finding, when it touched memory that is not there. What body() holds then is left alone.
bool survives(const std::function<void()>& body);

}  // namespace emulator
