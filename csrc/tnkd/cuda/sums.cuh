// The sums over a thread's classes, and the gradient from the exponentials that they leave.
#pragma once

#include "pixel.cuh"

namespace dsct::cuda {

// The sums of one pixel. es and et hold this thread's logits, -inf for the target and for what is absent, and leave as
// exponentials, which the gradient needs again. `join(value, combine)` joins the threads that share a pixel.
template <Ce kCe, int kClasses, typename Join>
DSCT_DEVICE PixelSums<float> sum_exponentials(float (&es)[kClasses], float (&et)[kClasses],
                                              float (&ec)[kCe == Ce::kOwn ? kClasses : 1], const Terms<float>& terms,
                                              const Join& join) {
  constexpr float kLog2E = 1.4426950408889634f;
  auto larger_of = [](float a, float b) { return larger(a, b); };
  auto sum_of = [](float a, float b) { return a + b; };
  PixelSums<float> z;
  float max_s = -infinity<float>(), max_t = -infinity<float>();
#pragma unroll
  for (int i = 0; i < kClasses; ++i) {
    max_s = larger(max_s, es[i]);
    max_t = larger(max_t, et[i]);
  }
  max_s = join(max_s, larger_of);
  max_t = join(max_t, larger_of);
  if (max_s == -infinity<float>()) max_s = 0;
  if (max_t == -infinity<float>()) max_t = 0;
  z.student_base = max_s * terms.log2_scale, z.teacher_base = max_t * terms.log2_scale;
  // An exact power of 2 times the student's where its exponentials serve.
  z.ce_base = kCe == Ce::kOwn ? max_s * kLog2E : z.student_base * terms.temperature;
  z.student_sum = z.teacher_sum = z.cross = z.ce_sum = z.student_target = z.teacher_target = 0;
#pragma unroll
  for (int i = 0; i < kClasses; ++i) {
    const float ds = fmaf(es[i], terms.log2_scale, -z.student_base);
    const float dt = fmaf(et[i], terms.log2_scale, -z.teacher_base);
    if constexpr (kCe == Ce::kOwn) {
      ec[i] = exp2_fast(fmaf(es[i], kLog2E, -z.ce_base));
      z.ce_sum += ec[i];
    }
    es[i] = exp2_fast(ds);
    et[i] = exp2_fast(dt);
    z.student_sum += es[i];
    z.teacher_sum += et[i];
    if (et[i] != 0) z.cross = fmaf(et[i], dt - ds, z.cross);  // 0 * log 0 = 0
  }
  if (kCe == Ce::kPowers && terms.with_ce) {
    if (terms.temperature == 2) {  // exp(d) = exp(d / 2)^2
#pragma unroll
      for (int i = 0; i < kClasses; ++i) z.ce_sum = fmaf(es[i], es[i], z.ce_sum);
    } else {
      z.ce_sum = z.student_sum;
    }
  }
  z.student_sum = join(z.student_sum, sum_of);
  z.teacher_sum = join(z.teacher_sum, sum_of);
  z.cross = join(z.cross, sum_of);
  if (terms.with_ce) z.ce_sum = join(z.ce_sum, sum_of);
  return z;
}

// The gradient from the exponentials of a class other than the target.
template <Ce kCe>
struct GradientOf {
  PixelGrad<float> factors;
  float once, twice;  // of the student's exponential and of its square
  DSCT_DEVICE GradientOf(const Terms<float>& terms, const PixelGrad<float>& grad) : factors(grad) {
    // At temperature 1 cross-entropy's exponentials are the student's, at 2 their squares.
    const bool squares = terms.temperature == 2;
    once = squares || kCe != Ce::kPowers ? grad.student : grad.student + grad.ce;
    twice = squares ? grad.ce : 0.0f;
  }
  DSCT_DEVICE float operator()(float exp_s, float exp_t, float exp_ce) const {
    if constexpr (kCe == Ce::kNone) return fmaf(once, exp_s, factors.teacher * exp_t);
    if constexpr (kCe == Ce::kOwn) return fmaf(factors.ce, exp_ce, fmaf(once, exp_s, factors.teacher * exp_t));
    return fmaf(fmaf(twice, exp_s, once), exp_s, factors.teacher * exp_t);
  }
};

}  // namespace dsct::cuda
