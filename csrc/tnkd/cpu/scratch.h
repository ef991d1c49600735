// What a block of pixels keeps from step to step.
#pragma once

#include "args.h"
#include "common/logit_blocks.h"
#include "tnkd/pixel_math.h"

namespace dsct {
namespace DSCT_ISA {
namespace {

// Classes of a partial sum: a longer float sum loses digits, which shows where two networks nearly agree. As fast.
constexpr int kPartial = 16;

template <class A>
struct Scratch {
  typedef typename A::S S;
  static constexpr int kGroup = group_vectors<A>();
  static constexpr int kLanes = 2 * A::N;  // of a Pair
  S *student, *teacher, *ce;               // columns: logits, then exponentials
  char* rows;                              // channels-last gradient of a group
  S label[kMaxBlock];                      // -1: ignored, or past the end
  S ce_factor[kMaxBlock];
  S upstream[kMaxBlock];
  S max_s[kMaxBlock], target_s[kMaxBlock], max_t[kMaxBlock], target_t[kMaxBlock];
  S sum_s[kMaxBlock], sum_t[kMaxBlock], sum_ce[kMaxBlock], cross[kMaxBlock];
  S coef_s[kMaxBlock], coef_t[kMaxBlock], coef_ce[kMaxBlock], grad_target[kMaxBlock];
  double lanes_ce[kLanes], lanes_tckd[kLanes], lanes_nckd[kLanes];  // the losses so far
  Offsets at_student, at_teacher, at_grad, at_target;
};

template <class A>
size_t scratch_bytes(const TnkdArgs& args) {
  return round_up(sizeof(Scratch<A>), 64) + 3 * column_bytes<A>(args) + row_bytes<A>(args);
}

template <class A>
Scratch<A>& lay_out(const TnkdArgs& args, void* memory) {
  Scratch<A>& s = *static_cast<Scratch<A>*>(memory);
  typedef typename A::S S;
  char* p = static_cast<char*>(memory) + round_up(sizeof(Scratch<A>), 64);
  const size_t bytes = column_bytes<A>(args);
  s.student = reinterpret_cast<S*>(p);
  s.teacher = reinterpret_cast<S*>(p + bytes);
  s.ce = reinterpret_cast<S*>(p + 2 * bytes);
  s.rows = p + 3 * bytes;
  return s;
}

}  // namespace
}  // namespace DSCT_ISA
}  // namespace dsct
