// The length of a sample's row of stats, on every device. What stands in it: cpu/ops.h for the CPU, cuda/network.cuh
// for CUDA.
#pragma once

#include <stdint.h>

namespace dsct {

// Static: every instruction set's translation unit has its own (common/vec.h says why).
static constexpr int64_t stats_row(int64_t channels, int64_t positions) { return 4 * channels + 2 * positions + 1; }

}  // namespace dsct
