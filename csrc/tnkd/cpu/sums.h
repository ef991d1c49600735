// Step 2: exp once per logit, kept in place of the logit, and the sums over the classes other than the target.
#pragma once

#include "common/vec_math.h"
#include "scratch.h"

namespace dsct {
namespace DSCT_ISA {
namespace {

DSCT_INLINE Ce ce_of(const TnkdArgs& args) {
  if (args.with_ce && args.tckd_weight == 0 && args.nckd_weight == 0) return Ce::kAlone;
  if (!args.with_ce || args.temperature == 1) return Ce::kShared;
  return args.temperature == 2 ? Ce::kSquare : Ce::kOwn;
}

template <class A>
struct PixelSums {
  typename A::V s, t, ce, cross;
  DSCT_INLINE PixelSums none() { return {A::set1(0), A::set1(0), A::set1(0), A::set1(0)}; }
  DSCT_FORCE_INLINE void add(const PixelSums& more) {
    s = s + more.s;
    t = t + more.t;
    ce = ce + more.ce;
    cross = cross + more.cross;
  }
};

// Logits into exponentials, to the columns from `at` on, and their sums. Only `others` count.
template <class A, Ce mode>
struct Exponentials {
  typename A::V to_exp2, max_s, max_t;
  typename A::S *student, *teacher, *ce;
  bool has_teacher;  // kAlone only

  DSCT_FORCE_INLINE void take(int64_t at, typename A::V z_s, typename A::V z_t, typename A::M others,
                              PixelSums<A>& sums) const {
    typedef typename A::V V;
    const V x_s = z_s - max_s, x_t = z_t - max_t;
    if constexpr (mode == Ce::kAlone) {
      const V e = A::keep(others, exp2_nonpositive<A>(x_s * to_exp2));
      sums.s = sums.s + e;
      A::store(student + at, e);
      if (!has_teacher) return;
      const typename A::M sound = A::either(A::lt(z_t, A::set1(typename A::S(__builtin_inf()))), A::invert(others));
      sums.cross = A::select(sound, sums.cross, A::set1(typename A::S(__builtin_nan(""))));
      return;
    }
    const V t_s = x_s * to_exp2, t_t = x_t * to_exp2;
    const V e_s = A::keep(others, exp2_nonpositive<A>(t_s));
    const V e_t = A::keep(others, exp2_nonpositive<A>(t_t));
    sums.s = sums.s + e_s;
    sums.t = sums.t + e_t;
    sums.cross = fma_where<A>(A::lt(A::set1(0), e_t), e_t, t_t - t_s, sums.cross);
    A::store(student + at, e_s);
    A::store(teacher + at, e_t);
    if constexpr (mode == Ce::kSquare) sums.ce = A::fma(e_s, e_s, sums.ce);
    if constexpr (mode == Ce::kOwn) {
      const V e_ce = A::keep(others, exp2_nonpositive<A>(x_s * A::set1(typename A::S(std::numbers::log2e))));
      sums.ce = sums.ce + e_ce;
      A::store(ce + at, e_ce);
    }
  }
};

template <class A, Ce mode>
DSCT_INLINE void sum_classes(const TnkdArgs& args, Scratch<A>& scratch, int v, int block) {
  typedef typename A::S S;
  typedef typename A::V V;
  const int lane = v * A::N;
  const int64_t classes = args.classes;
  S* student = scratch.student + lane * classes;
  S* teacher = scratch.teacher + lane * classes;
  Share share = Share::of(v, block / A::N, classes);
  Ahead ahead_s = ahead<A>(args.student, scratch.at_student, block, classes, share.first);
  Ahead ahead_t = ahead<A>(args.teacher, scratch.at_teacher, block, classes, share.first);
  const bool has_teacher = mode != Ce::kAlone || !args.same;
  const V zero = A::set1(0), one = A::set1(1), infinity = A::set1(S(__builtin_inf()));
  const V label = A::load(scratch.label + lane);
  const typename A::M valid = A::le(zero, label);
  V max_s = A::load(scratch.max_s + lane), max_t = A::load(scratch.max_t + lane);
  max_s = A::select(A::eq(max_s, -infinity), zero, max_s);  // every other class absent
  max_t = A::select(A::eq(max_t, -infinity), zero, max_t);
  const double temperature = mode == Ce::kAlone ? 1 : args.temperature;
  const V to_exp2 = A::set1(S(std::numbers::log2e / temperature));
  const Exponentials<A, mode> to = {to_exp2, max_s, max_t, student, teacher, scratch.ce + lane * classes, has_teacher};
  PixelSums<A> total = PixelSums<A>::none();
  V k = zero;
  for (int64_t begin = 0; begin < classes; begin += kPartial) {
    const int64_t end = begin + kPartial < classes ? begin + kPartial : classes;
    PixelSums<A> part = PixelSums<A>::none();
    for (int64_t c = begin; c < end; c++, k = k + one) {
      if (share.due()) {
        ahead_s.ask();
        if (has_teacher) ahead_t.ask();
      }
      to.take(c * A::N, A::load(student + c * A::N), has_teacher ? A::load(teacher + c * A::N) : zero,
              A::ne_where(valid, label, k), part);
    }
    total.add(part);
  }
  A::store(scratch.max_s + lane, max_s);
  A::store(scratch.max_t + lane, max_t);
  A::store(scratch.sum_s + lane, total.s);
  A::store(scratch.sum_t + lane, total.t);
  A::store(scratch.sum_ce + lane, mode == Ce::kShared || mode == Ce::kAlone ? total.s : total.ce);
  A::store(scratch.cross + lane, total.cross * A::set1(S(std::numbers::ln2)));
}

}  // namespace
}  // namespace DSCT_ISA
}  // namespace dsct
