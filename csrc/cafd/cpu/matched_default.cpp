// Matched CAFD's CPU loops for the baseline instruction set.
#include "common/vec.h"
#include "matched_loops.h"

namespace dsct {
const MatchedKernels& matched_kernels_default() { return DSCT_ISA::matched_kernels; }
}  // namespace dsct
