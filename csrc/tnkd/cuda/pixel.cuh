// Per-pixel algebra: what the sums over the classes come to.
#pragma once

#include <limits>
#include <numbers>

#include "labels.cuh"
#include "tnkd/pixel_math.h"

namespace dsct::cuda {

constexpr float kLog2E = std::numbers::log2e_v<float>, kLn2 = std::numbers::ln2_v<float>;

// The numbers every pixel needs.
struct Terms {
  float ce_weight, tckd_weight, nckd_weight, temperature;
  float log2_scale;  // log2(e) / temperature
  bool with_ce, two_classes, coupled;

  // Cross-entropy is at temperature 1, where the student's exponentials serve it; at 2 their squares do.
  DSCT_DEVICE bool squares() const { return with_ce && temperature == 2; }
  DSCT_DEVICE bool own_exponentials() const { return with_ce && temperature != 1 && temperature != 2; }
};

// Divided in double, rounded once. Numbers on the device were seen by nobody yet: what the host refuses makes every
// loss NaN here.
DSCT_DEVICE Terms terms_of(const Call& in) {
  double w[4] = {in.ce_weight, in.tckd_weight, in.nckd_weight, in.temperature};
  if (in.values != nullptr) {
    const double* v = in.values;
    w[0] = in.with_ce ? *v++ : 0;  // without cross-entropy not among them
    w[1] = v[0], w[2] = v[1], w[3] = v[2];
  }
  bool good = w[3] > 0;
  for (double x : w) good = good && x >= 0 && x < infinity<double>();
  const double temperature = good ? w[3] : std::numeric_limits<double>::quiet_NaN();
  return {float(w[0]), float(w[1]),     float(w[2]), float(temperature), float(std::numbers::log2e / temperature),
          in.with_ce,  in.classes == 2, in.coupled};
}

// Sums over the classes other than the target, in powers of 2: with c = log2(e) / temperature and base = max * c,
// e_j = 2^(z_j c - base), one fused multiply-add and one exponential a class. Every difference is taken from the same
// rounded base, so the rounding cancels. base is 0 where every other class is absent.
struct PixelSums {
  float student_base, teacher_base;
  float student_sum, teacher_sum;  // sum e_j
  float cross;                     // sum e^T_j ((z^T_j c - base^T) - (z^S_j c - base^S)), terms with e^T_j = 0 left out
  float ce_base, ce_sum;           // the same at temperature 1, for cross-entropy
  float student_target, teacher_target;  // z_y
};

// No sums yet, from the largest logits; -inf where there is none.
DSCT_DEVICE PixelSums from_bases(float max_s, float max_t, const Terms& terms) {
  PixelSums z{};
  if (max_s == -infinity<float>()) max_s = 0;
  if (max_t == -infinity<float>()) max_t = 0;
  z.student_base = max_s * terms.log2_scale, z.teacher_base = max_t * terms.log2_scale;
  // An exact power of 2 times the student's where its exponentials serve.
  z.ce_base = terms.own_exponentials() ? max_s * kLog2E : z.student_base * terms.temperature;
  return z;
}

// d loss / d z_j = student * e^S_j + teacher * e^T_j + ce * e^CE_j for j != y, and `target` for j = y.
struct PixelGrad {
  float student, teacher, ce, target;
};

struct PixelLoss {
  float ce, tckd, nckd;  // ce with its class weight, tckd and nckd without temperature^2
};

// The policy that runs the shared per-pixel algebra on one number.
struct OneNumber {
  using V = float;
  using S = float;
  using M = bool;
  static DSCT_DEVICE float set1(float x) { return x; }
  static DSCT_DEVICE float abs(float x) { return ::fabsf(x); }
  static DSCT_DEVICE float min(float x, float y) { return -larger(-x, -y); }
  static DSCT_DEVICE float max(float x, float y) { return larger(x, y); }
  static DSCT_DEVICE bool lt(float x, float y) { return x < y; }
  static DSCT_DEVICE bool eq(float x, float y) { return x == y; }
  static DSCT_DEVICE float select(bool m, float x, float y) { return m ? x : y; }
  static DSCT_DEVICE float reciprocal(float x) { return reciprocal_fast(x); }
  // With what the first product rounds away: equal numbers have the ratio 1, and its log is 0.
  static DSCT_DEVICE float ratio(float x, float y) {
    const float over = reciprocal_fast(y), quotient = x * over;
    return fmaf(fmaf(-quotient, y, x), over, quotient);
  }
  // With what x log2(e) rounds away: at x = -40 that is 2e-6 of the result.
  static DSCT_DEVICE float exp_nonpositive(float x) {
    constexpr float kRest = static_cast<float>(std::numbers::log2e - double(kLog2E));
    const float t = x * kLog2E, e = exp2_fast(t);
    const float lost = ::fabsf(x) < infinity<float>() ? fmaf(x, kLog2E, -t) + x * kRest : 0;
    return fmaf(e * lost, kLn2, e);
  }
  static DSCT_DEVICE float log_normal(float x) { return cuda::log_normal(x); }
};

// Loss and gradient factors of a pixel whatever its label turned out to be. The branch keeps the pixels of a thread
// apart: where selections did its work, the compiler wove eight pixels into one another, in twice the registers.
DSCT_DEVICE void judge_pixel(const PixelSums& z, int y, const Terms& terms, const float* class_weight, float kd_norm,
                             float ce_norm, PixelLoss& loss, PixelGrad& grad) {
  loss = {0, 0, 0};
  grad = {0, 0, 0, 0};
  if (y >= 0) {
    const float factor = terms.temperature * kd_norm;
    const float target_s = fmaf(z.student_target, terms.log2_scale, -z.student_base) * kLn2;
    const float target_t = fmaf(z.teacher_target, terms.log2_scale, -z.teacher_base) * kLn2;
    const auto kd = tnkd_pixel<OneNumber>(
        target_s, z.student_sum, target_t, z.teacher_sum, z.cross * kLn2, factor * terms.tckd_weight,
        terms.two_classes && !terms.coupled ? 0 : factor * terms.nckd_weight, terms.coupled);
    // One class beside the target leaves nothing to compare, but e is 2^(rounding of its base), not 1. That a student
    // lacks it, KD's sum does tell.
    const bool lacks = terms.coupled && kd.nckd == infinity<float>();
    loss = {0, kd.tckd, terms.two_classes && !lacks ? 0 : kd.nckd};
    grad = {kd.coef_s, kd.coef_t, 0, kd.grad_target};
    if (terms.with_ce) {
      const float class_factor = class_weight == nullptr ? 1 : class_weight[y];
      const auto ce = ce_pixel<OneNumber>(fmaf(z.student_target, kLog2E, -z.ce_base) * kLn2, z.ce_sum);
      const float weight = terms.ce_weight * class_factor * ce_norm;
      const bool used = class_factor != 0;
      loss.ce = used ? class_factor * ce.ce : 0;
      grad.target -= used ? weight * ce.miss : 0;
      grad.ce = used ? weight * ce.coef : 0;
    }
  } else if (y == kBad) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    loss = {nan, nan, nan};
    grad = {nan, nan, nan, nan};
  }
}

DSCT_DEVICE float pixel_loss(const PixelLoss& part, const Terms& terms) {
  const float squared = terms.temperature * terms.temperature;
  float loss = 0;
  if (terms.ce_weight != 0) loss += terms.ce_weight * part.ce;
  if (terms.tckd_weight != 0 || part.tckd != part.tckd) loss += terms.tckd_weight * squared * part.tckd;
  if (terms.nckd_weight != 0) loss += terms.nckd_weight * squared * part.nckd;
  return loss;
}

}  // namespace dsct::cuda
