// Matched CAFD's CPU loops for AVX2.
#if defined(__x86_64__)
#define DSCT_ISA_AVX2
#include "common/vec.h"
#include "matched_loops.h"

namespace dsct {
const MatchedKernels& matched_kernels_avx2() { return DSCT_ISA::matched_kernels; }
}  // namespace dsct

#include "common/vec_end.h"
#endif
