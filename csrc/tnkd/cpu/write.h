// Step 4: the gradient of a class for a vector of pixels, from the exponentials and the coefficients.
#pragma once

#include "scratch.h"

namespace dsct {
namespace DSCT_ISA {
namespace {

// The gradient of class c for one vector of pixels.
template <class A, Ce mode>
struct Gradient {
  typename A::V label, coef_s, coef_t, coef_ce, target;
  const typename A::S *student, *teacher, *ce;
  DSCT_FORCE_INLINE void begin(const Scratch<A>& s, int v, int64_t classes) {
    const int lane = v * A::N;
    label = A::load(s.label + lane);
    coef_s = A::load(s.coef_s + lane);
    coef_t = A::load(s.coef_t + lane);
    coef_ce = A::load(s.coef_ce + lane);
    target = A::load(s.grad_target + lane);
    student = s.student + lane * classes;
    teacher = s.teacher + lane * classes;
    ce = s.ce + lane * classes;
  }
  DSCT_FORCE_INLINE typename A::V at(int64_t c, typename A::V k) const {
    typedef typename A::V V;
    const V e_s = A::load(student + c * A::N);
    if constexpr (mode == Ce::kAlone) return A::select(A::eq(label, k), target, e_s * coef_ce);
    const V e_t = A::load(teacher + c * A::N);
    V coef = coef_s;
    if constexpr (mode == Ce::kSquare) coef = A::fma(e_s, coef_ce, coef);
    V value = A::fma(e_s, coef, e_t * coef_t);
    if constexpr (mode == Ce::kOwn) value = A::fma(A::load(ce + c * A::N), coef_ce, value);
    return A::select(A::eq(label, k), target, value);
  }
};

// What makes Gradient 0 for n pixels.
template <class A, Ce mode>
DSCT_INLINE void clear_gradient(const TnkdArgs& args, Scratch<A>& s, int n) {
  const size_t lanes = size_t((n + A::N - 1) / A::N * A::N);
  const size_t bytes = size_t(args.classes) * lanes * sizeof(typename A::S);
  memset(s.student, 0, bytes);
  if (mode != Ce::kAlone) memset(s.teacher, 0, bytes);
  if (mode == Ce::kOwn) memset(s.ce, 0, bytes);
  memset(s.coef_s, 0, sizeof(s.coef_s));
  memset(s.coef_t, 0, sizeof(s.coef_t));
  memset(s.coef_ce, 0, sizeof(s.coef_ce));
  memset(s.grad_target, 0, sizeof(s.grad_target));
}

}  // namespace
}  // namespace DSCT_ISA
}  // namespace dsct
