// CAFD's CPU loops for the baseline instruction set.
#include "common/vec.h"
#include "loops.h"

namespace dsct {
const CafdKernels& cafd_kernels_default() { return DSCT_ISA::kernels; }
}  // namespace dsct
