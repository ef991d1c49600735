// The TNKD kernels of one instruction set. A block of pixels goes through four steps, a lane per pixel throughout:
//   1. read     both networks' logits, once, in any layout, into columns [vector][class][lane] that live in L1/L2
//               (common/logit_blocks.h); on the way: the target's logit and the largest other one (an own maximum for
//               the others, so that a dominating target does not underflow their sum)
//   2. sums     exp once per logit, kept in place of the logit; the target's lane contributes nothing (sums.h)
//   3. pixel    losses, and the coefficients of the gradient (pixel.h, pixel_math.h)
//   4. write    grad_j = coef_s e^S_j + coef_t e^T_j (+ cross-entropy), once, past the caches where it will not fit
//               (write.h, common/logit_blocks.h)
// Many classes in channels_last go another way, a lane per class: rows.h. Logits smaller than the labels take their
// steps 1 and 4 from upsampled.h.
#pragma once

#include "count.h"
#include "labels.h"
#include "pixel.h"
#include "rows.h"
#include "sums.h"
#include "upsampled.h"
#include "write.h"

namespace dsct {
namespace DSCT_ISA {
namespace {

template <class A, class P, Ce mode>
DSCT_INLINE void run_block(const TnkdArgs& args, Scratch<A>& s, int n, int block, int64_t pixel) {
  typedef typename A::S S;
  PixelLoss<P> losses = {P::set1(0), P::set1(0), P::set1(0)};
  constexpr int kGroup = Scratch<A>::kGroup;
  const bool has_teacher = mode != Ce::kAlone || args.target == nullptr || !args.same;
  bool any = true;
  if (args.target != nullptr) {
    any = load_labels<A>(args, s.at_target, n, s.label);
    if (any && has_teacher)
      read<A>(args.teacher, s.at_teacher, n, args.classes, s.label, s.teacher, s.max_t, s.target_t);
  } else {
    for (int i = 0; i < kMaxBlock; i++) s.label[i] = S(-1);
    read<A>(args.teacher, s.at_teacher, n, args.classes, s.label, s.teacher, s.max_t, s.target_t);
    label_by_teacher<A>(n, args.classes, s.teacher, s.label, s.max_t, s.target_t);
  }
  if (any) {
    read<A>(args.student, s.at_student, n, args.classes, s.label, s.student, s.max_s, s.target_s);
    set_ce_factors<A>(args, s, n);
  } else {  // nothing but ignored pixels: nothing is read
    if (args.loss_map != nullptr) memset(static_cast<S*>(args.loss_map) + pixel, 0, size_t(n) * sizeof(S));
    if (args.grad.data == nullptr) return;
    clear_gradient<A, mode>(args, s, n);
  }
  for (int v0 = 0; v0 * A::N < n; v0 += kGroup) {
    if (any) {
      for (int v = v0; v < v0 + kGroup && v * A::N < n; v++) sum_classes<A, mode>(args, s, v, block);
      for (int lane = v0 * A::N; lane < (v0 + kGroup) * A::N && lane < n; lane += P::N)
        pixels<P, mode>(args, s, lane, n, pixel, losses);
    }
    if (args.grad.data != nullptr) write<A, Gradient<A, mode>>(args, s, v0, n);
  }
  add_losses(args, losses, s);
}

template <class A, Ce mode>
LossSums run_mode(const TnkdArgs& args, int64_t begin, int64_t end, Scratch<A>& s) {
  typedef typename Wide<A>::P P;
  clear_losses(s);
  const int block = block_pixels(args);
  const bool rows = rows_are_faster<A>(args);
  for (int64_t pixel = begin; pixel < end;) {
    const Position p = position(args, pixel);
    bool uniform;
    const int n = block_length(args, p, pixel, end, block, A::N, &uniform);
    locate(args, p, args.student.pixel_strides, n, uniform, &s.at_student);
    locate(args, p, args.teacher.pixel_strides, n, uniform, &s.at_teacher);
    if (args.grad.data != nullptr) locate(args, p, args.grad.pixel_strides, n, uniform, &s.at_grad);
    if (args.target != nullptr) locate(args, p, args.target_strides, n, uniform, &s.at_target);
    if (rows && uniform)
      run_row_block<A, mode>(args, s, n, pixel);
    else
      run_block<A, P, mode>(args, s, n, block, pixel);
    pixel += n;
  }
  if (args.stream) stream_fence();
  return losses_of(s);
}

template <class A>
LossSums run(const TnkdArgs& args, int64_t begin, int64_t end, void* memory) {
  Scratch<A>& s = lay_out<A>(args, memory);
  switch (ce_of(args)) {
    case Ce::kShared:
      return run_mode<A, Ce::kShared>(args, begin, end, s);
    case Ce::kSquare:
      return run_mode<A, Ce::kSquare>(args, begin, end, s);
    case Ce::kOwn:
      return run_mode<A, Ce::kOwn>(args, begin, end, s);
    case Ce::kAlone:
      return run_mode<A, Ce::kAlone>(args, begin, end, s);
  }
  return {0, 0, 0};
}

// The teacher's argmax as labels: for the one case that has to know them all beforehand, the sum of the class weights.
template <class A>
void teacher_labels(const TnkdArgs& args, int64_t begin, int64_t end, void* memory, int32_t* labels) {
  Scratch<A>& s = lay_out<A>(args, memory);
  for (int i = 0; i < kMaxBlock; i++) s.label[i] = -1;
  for (int64_t pixel = begin; pixel < end;) {
    const Position p = position(args, pixel);
    bool uniform;
    const int n = block_length(args, p, pixel, end, block_pixels(args), A::N, &uniform);
    locate(args, p, args.teacher.pixel_strides, n, uniform, &s.at_teacher);
    read<A>(args.teacher, s.at_teacher, n, args.classes, s.label, s.teacher, s.max_t, s.target_t);
    label_by_teacher<A>(n, args.classes, s.teacher, s.label, s.max_t, s.target_t);
    for (int i = 0; i < n; i++) labels[pixel + i] = int32_t(s.label[i]);
    pixel += n;
  }
}

}  // namespace

const TnkdKernels tnkd_kernels_f32 = {count_labels<float>, teacher_labels<F32>, run<F32>, scratch_bytes<F32>};
const TnkdKernels tnkd_kernels_f64 = {count_labels<double>, teacher_labels<F64>, run<F64>, scratch_bytes<F64>};
const UpsampledKernels upsampled_kernels_f32 = {upsampled_teacher_labels<F32>, run_strip<F32>, add_partials<F32>,
                                                upsampled_scratch_bytes<F32>};
const UpsampledKernels upsampled_kernels_f64 = {upsampled_teacher_labels<F64>, run_strip<F64>, add_partials<F64>,
                                                upsampled_scratch_bytes<F64>};

}  // namespace DSCT_ISA
}  // namespace dsct
