#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#if defined(LIPCORE_X86_ISAS)
#include <cpuid.h>
#endif

namespace lipcore {

#define LIPCORE_DECLARE_TABLE(type, family) extern const type family;
#define LIPCORE_DECLARE_ISA(isa)         \
  namespace isa {                        \
  LIPCORE_KERNELS(LIPCORE_DECLARE_TABLE) \
  }

LIPCORE_DECLARE_ISA(base)
#if defined(LIPCORE_X86_ISAS)
LIPCORE_DECLARE_ISA(avx2)
LIPCORE_DECLARE_ISA(avx512)
#endif

namespace {

// Inside the namespace of an instruction set, which is where a family's name means its table.
#define LIPCORE_ADDRESS_OF_TABLE(type, family) &family,
#define LIPCORE_TABLE(isa)                                    \
  []() -> Kernels {                                           \
    using namespace isa;                                      \
    return {#isa, LIPCORE_KERNELS(LIPCORE_ADDRESS_OF_TABLE)}; \
  }()

const Kernels kBase = LIPCORE_TABLE(base);
const Kernels* g_kernels = &kBase;

#if defined(LIPCORE_X86_ISAS)
const Kernels kAvx2 = LIPCORE_TABLE(avx2);
const Kernels kAvx512 = LIPCORE_TABLE(avx512);

bool has_f16c() {  // not in every compiler's __builtin_cpu_supports
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
#endif

char g_message[256];

const char* complain(const char* name, const char* why) {
  std::snprintf(g_message, sizeof g_message,
                "LIPCORE_ISA: '%.40s' %s; choose one of base%s%s, or leave it unset for the fastest", name, why,
                has_avx2() ? ", avx2" : "", has_avx512() ? ", avx512" : "");
  return g_message;
}

}  // namespace

const Kernels& kernels() { return *g_kernels; }

const char* select_isa(const char* name) {
  if (!std::strcmp(name, "base")) {
    g_kernels = &kBase;
    return nullptr;
  }
  const bool avx2 = !std::strcmp(name, "avx2"), avx512 = !std::strcmp(name, "avx512");
  if (!avx2 && !avx512) return complain(name, "is not an instruction set lipcore knows");
  if ((avx2 && !has_avx2()) || (avx512 && !has_avx512()))
    return complain(name, "is not supported by this CPU or build");
#if defined(LIPCORE_X86_ISAS)
  g_kernels = avx512 ? &kAvx512 : &kAvx2;
#endif
  return nullptr;
}

const char* select_isa_from_environment() {
  const char* name = std::getenv("LIPCORE_ISA");
  if (name && *name) return select_isa(name);
  return select_isa(has_avx512() ? "avx512" : has_avx2() ? "avx2" : "base");
}

}  // namespace lipcore
