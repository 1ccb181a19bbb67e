// First include of every per-ISA source. Only headers without inline functions of external linkage may come after it:
// the linker keeps one copy of such a function, and it could be the AVX-512 one.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif
