// Step 3: the losses of a vector of pixels from its sums, and the coefficients of the gradient.
#pragma once

#include "common/vec_math.h"
#include "scratch.h"
#include "tnkd/pixel_math.h"

namespace dsct {
namespace DSCT_ISA {
namespace {

template <class A>
struct Math : A {
  typedef typename A::V V;
  DSCT_INLINE V ratio(V x, V y) { return x / y; }
  DSCT_INLINE V exp_nonpositive(V x) { return DSCT_ISA::exp_nonpositive<A>(x); }
  DSCT_INLINE V log_normal(V x) { return DSCT_ISA::log_normal<A>(x); }
};

template <class A>
struct Wide {
#ifdef DSCT_ISA_AVX512
  typedef Pair<A> P;  // it has the registers for two
#else
  typedef A P;
#endif
};

template <class A>
struct PixelLoss {
  typename A::V ce, tckd, nckd;
};
template <class S>
DSCT_INLINE void add_lanes(const S* from, int n, double* to) {
  for (int i = 0; i < n; i++) to[i] += double(from[i]);
}
// A block's losses, to doubles, still lane by lane: a sum across lanes for each block took 3% of the time at K = 6.
template <class P, class A>
DSCT_INLINE void add_losses(const TnkdArgs& args, const PixelLoss<P>& losses, Scratch<A>& s) {
  typename P::S lanes[P::N];
  P::store(lanes, losses.tckd);
  add_lanes(lanes, P::N, s.lanes_tckd);
  P::store(lanes, losses.nckd);
  add_lanes(lanes, P::N, s.lanes_nckd);
  if (!args.with_ce) return;
  P::store(lanes, losses.ce);
  add_lanes(lanes, P::N, s.lanes_ce);
}

template <class P>
DSCT_INLINE void put_loss(const TnkdArgs& args, int n, int64_t first_pixel, int lane, typename P::V ce,
                          typename P::V tckd, typename P::V nckd) {
  typedef typename P::S S;
  typedef typename P::V V;
  if (args.loss_map == nullptr) return;
  // A part with weight 0 takes no part: 0 * inf would be NaN. But a NaN, which tckd always shows, is never hidden.
  const double square = args.temperature * args.temperature;
  V loss = P::set1(0);
  if (args.tckd_weight != 0)
    loss = P::fma(P::set1(S(args.tckd_weight * square)), tckd, loss);
  else
    loss = P::select(P::eq(tckd, tckd), loss, tckd);
  if (args.nckd_weight != 0) loss = P::fma(P::set1(S(args.nckd_weight * square)), nckd, loss);
  if (args.ce_weight != 0) loss = P::fma(P::set1(S(args.ce_weight)), ce, loss);
  S* out = static_cast<S*>(args.loss_map) + first_pixel + lane;
  if (n - lane >= P::N)
    P::store(out, loss);
  else
    store_n<P>(out, loss, n - lane);
}

template <class P, Ce mode, bool coupled, class A>
DSCT_INLINE void pixels_as(const TnkdArgs& args, Scratch<A>& s, int lane, int n, int64_t first_pixel,
                           PixelLoss<P>& losses) {
  typedef typename P::S S;
  typedef typename P::V V;
  const V zero = P::set1(0);
  const typename P::M valid = P::le(zero, P::load(s.label + lane));
  const V x_s = P::load(s.target_s + lane) - P::load(s.max_s + lane);
  // What comes in, too: 0 stays 0, whatever that is.
  const auto store_coef = [&](S* to, V coef) {
    if (args.upstream != nullptr) coef = P::select(P::eq(coef, zero), coef, coef * P::load(s.upstream + lane));
    P::store(to + lane, P::keep(valid, coef));
  };
  if constexpr (mode == Ce::kAlone) {
    V unsound = zero;  // NaN where the teacher has one
    if (!args.same) {
      const V infinity = P::set1(S(__builtin_inf())), nan = P::set1(S(__builtin_nan("")));
      unsound = P::select(P::lt(P::load(s.target_t + lane), infinity), P::load(s.cross + lane), nan);
    }
    const CePixel<Math<P>> q = ce_pixel<Math<P>>(x_s + unsound, P::load(s.sum_ce + lane));
    const V weight = P::load(s.ce_factor + lane), ce = weight * q.ce;
    const V sound = P::select(P::eq(q.ce, q.ce), zero, q.ce);  // a NaN shows whatever the class weighs
    const V weighted = P::keep(P::both(valid, P::ne(weight, zero)), ce), nan_alone = P::keep(valid, sound);
    losses.ce = losses.ce + weighted;
    losses.tckd = losses.tckd + nan_alone;
    const V factor_ce = weight * P::set1(S(args.ce_weight * args.ce_scale));
    store_coef(s.coef_ce, factor_ce * q.coef);
    store_coef(s.grad_target, -factor_ce * q.miss);
    put_loss<P>(args, n, first_pixel, lane, weighted, nan_alone, zero);
    return;
  }
  const V by_temperature = P::set1(S(1 / args.temperature));
  const double factor = args.temperature * args.tnkd_scale;
  // One class beside the target: nothing to compare, not even where it is absent (which KD's sum does tell).
  const bool two_classes = args.classes == 2 && !coupled;
  const V x_t = P::load(s.target_t + lane) - P::load(s.max_t + lane);
  const TnkdPixel<Math<P>> p =
      tnkd_pixel<Math<P>>(x_s * by_temperature, P::load(s.sum_s + lane), x_t * by_temperature, P::load(s.sum_t + lane),
                          P::load(s.cross + lane), P::set1(S(args.tckd_weight * factor)),
                          P::set1(two_classes ? S(0) : S(args.nckd_weight * factor)), coupled);
  const V tckd = P::keep(valid, p.tckd), nckd = two_classes ? zero : P::keep(valid, p.nckd);
  losses.tckd = losses.tckd + tckd;
  losses.nckd = losses.nckd + nckd;
  V ce = zero, coef_s = p.coef_s, coef_ce = zero, grad_target = p.grad_target;
  if (args.with_ce) {
    const V weight = P::load(s.ce_factor + lane);
    const CePixel<Math<P>> q = ce_pixel<Math<P>>(x_s, P::load(s.sum_ce + lane));
    ce = P::keep(P::both(valid, P::ne(weight, zero)), weight * q.ce);
    losses.ce = losses.ce + ce;
    const V factor_ce = weight * P::set1(S(args.ce_weight * args.ce_scale));
    coef_ce = factor_ce * q.coef;
    grad_target = P::fma(-factor_ce, q.miss, grad_target);
    if constexpr (mode == Ce::kShared) coef_s = coef_s + coef_ce;
  }
  store_coef(s.coef_s, coef_s);
  store_coef(s.coef_t, p.coef_t);
  store_coef(s.coef_ce, coef_ce);
  store_coef(s.grad_target, grad_target);
  put_loss<P>(args, n, first_pixel, lane, ce, tckd, nckd);
}

// Plain KD, out of line and by value: whatever it needs, TNKD's loop keeps its registers.
template <class P, Ce mode, class A>
__attribute__((noinline)) PixelLoss<P> coupled_pixels(const TnkdArgs& args, Scratch<A>& s, int lane, int n,
                                                      int64_t first_pixel) {
  PixelLoss<P> losses = {P::set1(0), P::set1(0), P::set1(0)};
  pixels_as<P, mode, true>(args, s, lane, n, first_pixel, losses);
  return losses;
}

// P: A, or a Pair of it.
template <class P, Ce mode, class A>
DSCT_INLINE void pixels(const TnkdArgs& args, Scratch<A>& s, int lane, int n, int64_t first_pixel,
                        PixelLoss<P>& losses) {
  if (mode == Ce::kAlone || !args.coupled) return pixels_as<P, mode, false>(args, s, lane, n, first_pixel, losses);
  const PixelLoss<P> more = coupled_pixels<P, mode>(args, s, lane, n, first_pixel);
  losses.ce = losses.ce + more.ce;
  losses.tckd = losses.tckd + more.tckd;
  losses.nckd = losses.nckd + more.nckd;
}

template <class A>
DSCT_INLINE void clear_losses(Scratch<A>& s) {
  memset(s.lanes_ce, 0, sizeof(s.lanes_ce));
  memset(s.lanes_tckd, 0, sizeof(s.lanes_tckd));
  memset(s.lanes_nckd, 0, sizeof(s.lanes_nckd));
}
template <class A>
DSCT_INLINE LossSums losses_of(const Scratch<A>& s) {
  LossSums sums = {0, 0, 0};
  for (int i = 0; i < Scratch<A>::kLanes; i++) {
    sums.ce += s.lanes_ce[i];
    sums.tckd += s.lanes_tckd[i];
    sums.nckd += s.lanes_nckd[i];
  }
  return sums;
}

}  // namespace
}  // namespace DSCT_ISA
}  // namespace dsct
