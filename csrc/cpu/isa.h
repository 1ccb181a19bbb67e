// First include of every per-ISA source. Only headers without inline functions of external linkage may come after it:
// the linker keeps one copy of such a function, and it could be the AVX-512 one.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// For what is better called than copied into every caller. A template that the compiler may inline would be.
#define LIPCORE_OUTLINE __attribute__((noinline)) static
