// Between the CPU op of matched CAFD (matched.cpp) and its loops (matched_loops.h): plain data, and one table
// of functions per instruction set. No standard library and no external inline function in here (common/vec.h says
// why).
#pragma once

#include "args.h"
#include "cafd/stats.h"

namespace dsct {

// Both networks' maps of one call, of the same N, C, H and W.
struct MatchedMaps {
  Features student, teacher;
  FloatType student_type, teacher_type;
  double temperature;
  const bool* mask;  // (N, H W): where it is false, both networks are taken to be -inf; or nullptr
};

// What a block of positions knows of a channel, as doubles: fields of C numbers each, padded (pitch_c).
enum MatchedField { kTeacherMax, kStudentMax, kTeacherSum, kStudentSum, kCross, kStrength, kMatchedFields };

// The loops in one type of arithmetic, float or double.
struct MatchedLoops {
  size_t (*scratch)(const MatchedMaps&);                    // bytes that any function here may ask for
  int64_t (*pitch_c)(int64_t C);                            // C, rounded up to whole vectors of either type
  int64_t (*block)(const MatchedMaps&, bool by_positions);  // positions in one block: depends on the shape alone

  // Forward. Positions [first, first + count) are one block, its results go to part (kMatchedFields, pitch_c).
  // Rows: channels [begin, end). Positions: every channel.
  void (*part_rows)(const MatchedMaps&, int64_t n, int64_t begin, int64_t end, int64_t first, int64_t count,
                    double* part, void* scratch);
  void (*part_positions)(const MatchedMaps&, int64_t n, int64_t first, int64_t count, double* part, void* scratch);
  // Channels [begin, end), begin a multiple of 16: all blocks together, into a sample's stats (without the weight) and
  // kl (C) = KL(P^T || P^S) and strength (C) = sum_i |z^T|, both of pitch_c.
  void (*join)(const MatchedMaps&, int64_t begin, int64_t end, const double* parts, int64_t blocks, double* stats,
               double* kl, double* strength);
  // The weights, into stats, and the sample's loss. channel_temperature 0: every channel the same.
  double (*finish)(const MatchedMaps&, double channel_temperature, const double* kl, double* strength, double* stats);

  // Backward, scale: what tau w (P^S - P^T) is multiplied by. Like rows and positions above, for any range. stream:
  // write past the caches.
  void (*backward_rows)(const MatchedMaps&, int64_t n, int64_t begin, int64_t end, int64_t first, int64_t count,
                        const double* stats, double scale, const Features& out, bool stream, void* scratch);
  void (*backward_positions)(const MatchedMaps&, int64_t n, int64_t first, int64_t count, const double* stats,
                             double scale, const Features& out, bool stream, void* scratch);
  int64_t (*backward_block)(const MatchedMaps&);  // positions in a range of backward_positions: a multiple of this
};

struct MatchedKernels {
  MatchedLoops loops[2];  // float, double
};

const MatchedKernels& matched_kernels_default();
const MatchedKernels& matched_kernels_avx2();
const MatchedKernels& matched_kernels_avx512();

}  // namespace dsct
