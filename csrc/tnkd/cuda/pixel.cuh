// Per-pixel algebra: what the sums over the classes come to.
#pragma once

#include <limits>
#include <numbers>

#include "labels.cuh"
#include "tnkd/pixel_math.h"

namespace dsct::cuda {

constexpr float kLog2E = std::numbers::log2e_v<float>;

// The numbers every pixel needs, in the accumulation dtype.
template <typename A>
struct Terms {
  A ce_weight, tckd_weight, nckd_weight, temperature;
  A log2_scale;  // log2(e) / temperature
  bool with_ce;
  bool two_classes, coupled;
  const double* values;  // on the device: what the numbers are to be read from, or nullptr

  // Cross-entropy is at temperature 1, where the student's exponentials serve it; at 2 their squares do.
  DSCT_DEVICE bool squares() const { return with_ce && temperature == 2; }
  DSCT_DEVICE bool own_exponentials() const { return with_ce && temperature != 1 && temperature != 2; }
};

// Divided in double, rounded once.
template <typename A>
DSCT_HOST_DEVICE void set_numbers(Terms<A>& terms, double ce_weight, double tckd_weight, double nckd_weight,
                                  double temperature) {
  terms.ce_weight = static_cast<A>(ce_weight);
  terms.tckd_weight = static_cast<A>(tckd_weight);
  terms.nckd_weight = static_cast<A>(nckd_weight);
  terms.temperature = static_cast<A>(temperature);
  terms.log2_scale = static_cast<A>(std::numbers::log2e / temperature);
}

// Numbers on the device were seen by nobody yet: what the host refuses makes every loss NaN here.
template <typename A>
DSCT_DEVICE void read_numbers(Terms<A>& terms) {
  if (terms.values == nullptr) return;
  const double* v = terms.values;
  const double ce_weight = terms.with_ce ? *v++ : 0;  // without cross-entropy not among them
  auto usable = [](double x) { return x >= 0 && x < std::numeric_limits<double>::infinity(); };
  const bool good = usable(ce_weight) && usable(v[0]) && usable(v[1]) && usable(v[2]) && v[2] > 0;
  set_numbers(terms, ce_weight, v[0], v[1], good ? v[2] : std::numeric_limits<double>::quiet_NaN());
}

// Sums over the classes other than the target, in powers of 2: with c = log2(e) / temperature and base = max * c,
// e_j = 2^(z_j c - base), one fused multiply-add and one exponential a class. Every difference is taken from the same
// rounded base, so the rounding cancels. base is 0 where every other class is absent.
template <typename A>
struct PixelSums {
  A student_base, teacher_base;
  A student_sum, teacher_sum;  // sum e_j
  A cross;                     // sum e^T_j ((z^T_j c - base^T) - (z^S_j c - base^S)), terms with e^T_j = 0 left out
  A ce_base, ce_sum;           // the same at temperature 1, for cross-entropy
  A student_target, teacher_target;  // z_y
};

// No sums yet, from the largest logits; -inf where there is none.
DSCT_DEVICE PixelSums<float> from_bases(float max_s, float max_t, const Terms<float>& terms) {
  PixelSums<float> z{};
  if (max_s == -infinity<float>()) max_s = 0;
  if (max_t == -infinity<float>()) max_t = 0;
  z.student_base = max_s * terms.log2_scale, z.teacher_base = max_t * terms.log2_scale;
  // An exact power of 2 times the student's where its exponentials serve.
  z.ce_base = terms.own_exponentials() ? max_s * kLog2E : z.student_base * terms.temperature;
  return z;
}

// d loss / d z_j = student * e^S_j + teacher * e^T_j + ce * e^CE_j for j != y, and `target` for j = y.
template <typename A>
struct PixelGrad {
  A student, teacher, ce, target;
};

template <typename A>
struct PixelLoss {
  A ce, tckd, nckd;  // ce with its class weight, tckd and nckd without temperature^2
};

// The policy that runs the shared per-pixel algebra on one number.
template <typename A>
struct OneNumber {
  using V = A;
  using S = A;
  using M = bool;
  static DSCT_DEVICE A set1(A x) { return x; }
  static DSCT_DEVICE A abs(A x) { return ::fabs(x); }
  static DSCT_DEVICE A min(A x, A y) { return -larger(-x, -y); }
  static DSCT_DEVICE A max(A x, A y) { return larger(x, y); }
  static DSCT_DEVICE bool lt(A x, A y) { return x < y; }
  static DSCT_DEVICE bool eq(A x, A y) { return x == y; }
  static DSCT_DEVICE A select(bool m, A x, A y) { return m ? x : y; }
  static DSCT_DEVICE A reciprocal(A x) { return reciprocal_fast(x); }
  // With what the first product rounds away: equal numbers have the ratio 1, and its log is 0.
  static DSCT_DEVICE A ratio(A x, A y) {
    const A over = reciprocal_fast(y), quotient = x * over;
    return std::fma(std::fma(-quotient, y, x), over, quotient);
  }
  // With what x log2(e) rounds away: at x = -40 that is 2e-6 of the result.
  static DSCT_DEVICE A exp_nonpositive(A x) {
    constexpr A kLog2E = A(std::numbers::log2e), kRest = A(std::numbers::log2e - double(kLog2E));
    const A t = x * kLog2E, e = exp2_fast(t);
    const A lost = ::fabs(x) < infinity<A>() ? std::fma(x, kLog2E, -t) + x * kRest : A(0);
    return std::fma(e * lost, A(std::numbers::ln2), e);
  }
  static DSCT_DEVICE A log_normal(A x) { return cuda::log_normal(x); }
};

// Loss and gradient factors of a pixel whatever its label turned out to be. The branch keeps the pixels of a thread
// apart: where selections did its work, the compiler wove eight pixels into one another, in twice the registers.
template <typename A>
DSCT_DEVICE void judge_pixel(const PixelSums<A>& z, int y, const Terms<A>& terms, const A* class_weight, A kd_norm,
                             A ce_norm, PixelLoss<A>& loss, PixelGrad<A>& grad) {
  using Math = OneNumber<A>;
  constexpr A kLn2 = A(std::numbers::ln2), kLog2E = A(std::numbers::log2e);
  loss = {0, 0, 0};
  grad = {0, 0, 0, 0};
  if (y >= 0) {
    const A factor = terms.temperature * kd_norm;
    const A target_s = std::fma(z.student_target, terms.log2_scale, -z.student_base) * kLn2;
    const A target_t = std::fma(z.teacher_target, terms.log2_scale, -z.teacher_base) * kLn2;
    const TnkdPixel<Math> kd =
        tnkd_pixel<Math>(target_s, z.student_sum, target_t, z.teacher_sum, z.cross * kLn2, factor * terms.tckd_weight,
                         terms.two_classes && !terms.coupled ? A(0) : factor * terms.nckd_weight, terms.coupled);
    // One class beside the target leaves nothing to compare, but e is 2^(rounding of its base), not 1. That a student
    // lacks it, KD's sum does tell.
    const bool lacks = terms.coupled && kd.nckd == infinity<A>();
    loss = {0, kd.tckd, terms.two_classes && !lacks ? A(0) : kd.nckd};
    grad = {kd.coef_s, kd.coef_t, 0, kd.grad_target};
    if (terms.with_ce) {
      const A class_factor = class_weight == nullptr ? A(1) : class_weight[y];
      const CePixel<Math> ce = ce_pixel<Math>(std::fma(z.student_target, kLog2E, -z.ce_base) * kLn2, z.ce_sum);
      const A weight = terms.ce_weight * class_factor * ce_norm;
      const bool used = class_factor != 0;
      loss.ce = used ? class_factor * ce.ce : A(0);
      grad.target -= used ? weight * ce.miss : A(0);
      grad.ce = used ? weight * ce.coef : A(0);
    }
  } else if (y == kBad) {
    const A nan = std::numeric_limits<A>::quiet_NaN();
    loss = {nan, nan, nan};
    grad = {nan, nan, nan, nan};
  }
}

template <typename A>
DSCT_DEVICE A pixel_loss(const PixelLoss<A>& part, const Terms<A>& terms) {
  const A squared = terms.temperature * terms.temperature;
  A loss = 0;
  if (terms.ce_weight != 0) loss += terms.ce_weight * part.ce;
  if (terms.tckd_weight != 0 || part.tckd != part.tckd) loss += terms.tckd_weight * squared * part.tckd;
  if (terms.nckd_weight != 0) loss += terms.nckd_weight * squared * part.nckd;
  return loss;
}

}  // namespace dsct::cuda
