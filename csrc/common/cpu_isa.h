// Which instruction set the CPU kernels run with: chosen once, at run time, from what was built in.
#pragma once

#include <cstdlib>
#include <string>

namespace dsct {

enum class CpuIsa { kDefault = 0, kAvx2 = 1, kAvx512 = 2 };

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define DSCT_X86_ISAS 1
#endif

inline const char* cpu_isa_name(CpuIsa isa) {
  return isa == CpuIsa::kAvx512 ? "avx512" : isa == CpuIsa::kAvx2 ? "avx2" : "default";
}

inline CpuIsa best_cpu_isa() {
#ifdef DSCT_X86_ISAS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return CpuIsa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuIsa::kAvx2;
#endif
  return CpuIsa::kDefault;
}

// The instruction set in use. DSCT_KERNELS_CPU=default|avx2|avx512 caps it (for tests and for bug reports); it never
// raises it above what the machine has.
inline CpuIsa cpu_isa() {
  static const CpuIsa chosen = [] {
    const CpuIsa best = best_cpu_isa();
    const char* cap = std::getenv("DSCT_KERNELS_CPU");
    if (cap == nullptr) return best;
    for (CpuIsa isa : {CpuIsa::kDefault, CpuIsa::kAvx2, CpuIsa::kAvx512})
      if (cpu_isa_name(isa) == std::string(cap)) return isa < best ? isa : best;
    return best;
  }();
  return chosen;
}

}  // namespace dsct
