// What jaccard.cpp hands to the kernels: plain data, the same in every instruction set's translation unit.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "common/logit_view.h"

namespace dsct {

struct JaccardArgs : LogitArgs {
  const void* share;  // how much of each pixel counts: contiguous (pixels,), acc type; nullptr: all of it
  double temperature;
  const double* coefficients;  // backward: a and b, (2, K)
};

// One instruction set's kernels. All work on the pixels [begin, end), counted in the order (N, *spatial).
struct JaccardKernels {
  // sums, (3, K): of v p, of v q and of v |p - q|
  void (*sums)(const JaccardArgs&, int64_t begin, int64_t end, void* scratch, double* sums);
  void (*backward)(const JaccardArgs&, int64_t begin, int64_t end, void* scratch);
  size_t (*scratch_bytes)(const JaccardArgs&);
};

namespace baseline {
extern const JaccardKernels jaccard_kernels_f32, jaccard_kernels_f64;
}
namespace avx2 {
extern const JaccardKernels jaccard_kernels_f32, jaccard_kernels_f64;
}
namespace avx512 {
extern const JaccardKernels jaccard_kernels_f32, jaccard_kernels_f64;
}

}  // namespace dsct
