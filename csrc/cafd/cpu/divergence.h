// KL of two maps.
#pragma once

#include "common/vec_math.h"

namespace dsct {
namespace DSCT_ISA {
namespace {

// a~ log(a~ / b~) - a~ + b~: the last two sum to 0, and with them no term is negative and a rounding of b near a costs
// nothing. In double: there are only H W of these, beside C H W features.
template <class TS, class TT, class TG>
double divergence_of(const TS* student, const TT* teacher, int64_t count, int64_t positions, double scale, TG* grad) {
  constexpr double kEps = 1e-6;
  using V = F64::V;
  const V keep = F64::set1(1 - kEps), floor = F64::set1(kEps / static_cast<double>(positions));
  const V slope = F64::set1(-(1 - kEps) * scale);
  double total = 0;
  for (int64_t i = 0; i < count; i += F64::N) {
    const int left = static_cast<int>(count - i < F64::N ? count - i : F64::N);
    const bool whole = left == F64::N;
    const V a = F64::fma(whole ? F64::load(teacher + i) : load_n<F64>(teacher + i, left), keep, floor);
    const V b = F64::fma(whole ? F64::load(student + i) : load_n<F64>(student + i, left), keep, floor);
    const V ratio = a / b;
    const V term = F64::fma(a, log<F64>(ratio), b - a);
    total += sum<F64>(whole ? term : F64::keep(F64::first(left), term));
    if (grad == nullptr) continue;
    if (whole)
      F64::store(grad + i, ratio * slope);
    else
      store_n<F64>(grad + i, ratio * slope, left);
  }
  return total;
}

inline double divergence(const void* student, bool student_double, const void* teacher, bool teacher_double,
                         int64_t count, int64_t positions, double scale, void* grad, bool grad_double) {
  const float *tf = static_cast<const float*>(teacher), *sf = static_cast<const float*>(student);
  const double *td = static_cast<const double*>(teacher), *sd = static_cast<const double*>(student);
  if (grad_double) {
    double* g = static_cast<double*>(grad);
    if (teacher_double && student_double) return divergence_of(sd, td, count, positions, scale, g);
    if (teacher_double) return divergence_of(sf, td, count, positions, scale, g);
    if (student_double) return divergence_of(sd, tf, count, positions, scale, g);
    return divergence_of(sf, tf, count, positions, scale, g);
  }
  float* g = static_cast<float*>(grad);
  if (teacher_double && student_double) return divergence_of(sd, td, count, positions, scale, g);
  if (teacher_double) return divergence_of(sf, td, count, positions, scale, g);
  if (student_double) return divergence_of(sd, tf, count, positions, scale, g);
  return divergence_of(sf, tf, count, positions, scale, g);
}

}  // namespace
}  // namespace DSCT_ISA
}  // namespace dsct
