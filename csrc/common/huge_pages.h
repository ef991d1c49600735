// Fresh outputs of many MiB: asks for huge pages before the first touch. Where the system's rule is "madvise" (most
// distributions), the 4 KiB page faults of a new 160 MiB gradient took 44 ms, three times the kernel that fills it;
// with huge pages 11 ms.
#pragma once

#include <cstddef>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dsct {

inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHuge - 1);
  if (end > begin) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only a wish
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace dsct
