// What forward leaves for backward, on every device. CAFD: the length of a sample's row of stats; what stands in it say
// cpu/ops.h for the CPU and cuda/forward.cuh for CUDA. Matched CAFD: the rows themselves.
#pragma once

#include <stdint.h>

namespace dsct {

// Static: every instruction set's translation unit has its own (common/vec.h says why).
static constexpr int64_t stats_row(int64_t channels, int64_t positions) { return 4 * channels + 2 * positions + 1; }

// Rows of stats (N, 5, C), double: what the backward needs. The maximum of a row that is -inf throughout counts as 0
// and the inverse of its sum as 0; where the teacher's is, the student's inverse is 0 too, for there is nothing to
// learn.
enum MatchedStat {
  kStatStudentMax,
  kStatStudentInverse,
  kStatTeacherMax,
  kStatTeacherInverse,
  kStatWeight,
  kMatchedStats
};

}  // namespace dsct
