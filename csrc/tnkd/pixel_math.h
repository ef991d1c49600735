// TNKD and cross-entropy of one pixel (or one vector of pixels), from its sums over the classes: shared by the CPU and
// the CUDA kernels.
//
// For each network, with z = logits / tau and m = max_{j != y} z_j (0 where every other class is -inf), the loops over
// the classes bring
//     target = z_y - m,   sum = sum_{j != y} e_j,   e_j = exp(z_j - m),
//     cross  = sum_{j != y} e^T_j ((z^T_j - m^T) - (z^S_j - m^S)),  terms with e^T_j = 0 left out,
// and use the coefficients that come back:  grad_j = coef_s e^S_j + coef_t e^T_j (+ coef_ce e^CE_j),  grad_y as it is.
// `sum` is 0 only where every other class is absent: the largest of them contributes 1.
//
// Math is a policy: V the value, S its scalar, M a condition; set1, abs, min, max, lt, eq, select, reciprocal,
// ratio (x / y, exactly 1 where they are equal), exp_nonpositive (exp(x) for x <= 0) and log_normal (log of a positive
// normal number; NaN stays NaN).
#pragma once

#if defined(__CUDACC__)
#define DSCT_HD __host__ __device__ __forceinline__
#else
#define DSCT_HD inline __attribute__((always_inline))
#endif

namespace dsct {

// Where cross-entropy, which is at temperature 1, gets its exponentials. A device's kernel is compiled for each that it
// tells apart.
enum class Ce {
  kNone,    // known to be none
  kShared,  // the student's serve, at temperature 1; or there is none: the kernel is told when it runs
  kSquare,  // their squares serve, at temperature 2: exp(x) = exp(x / 2)^2
  kPowers,  // one of these two, or none: the kernel is told when it runs
  kOwn,     // it makes its own
  kAlone,   // it makes its own, and TNKD none: nobody asks for it. Of a teacher only a NaN is looked for.
};

template <class Math>
struct TnkdPixel {
  typename Math::V tckd, nckd;                   // without tau^2 and the weights
  typename Math::V grad_target, coef_s, coef_t;  // with the factors given
};

template <class Math>
struct CePixel {
  typename Math::V ce;
  typename Math::V miss;  // 1 - p_y: grad_target is -miss
  typename Math::V coef;  // p_j = coef e_j
};

// The target against the others: with u = target - log sum, odds = exp(-|u|), and b = sigmoid(u), 1 - b from it.
// Nothing overflows, nothing cancels, and the exponential waits for no log.
template <class Math>
struct Odds {
  typename Math::V x;             // target, +inf where there is no other class, NaN where it was +inf itself
  typename Math::V odds, larger;  // the larger of b and 1 - b is 1 / (1 + odds)
  typename Math::V hit, miss;     // b, 1 - b
  typename Math::V inverse_sum;   // 0 where there is no other class
  typename Math::M none;          // no other class
};
template <class Math>
DSCT_HD Odds<Math> odds_of(typename Math::V target, typename Math::V sum) {
  using V = typename Math::V;
  using S = typename Math::S;
  const V zero = Math::set1(S(0)), one = Math::set1(S(1));
  Odds<Math> o;
  o.none = Math::eq(sum, zero);
  // +inf is no number to learn from, and would pass for an absence of others, which in turn would hide a NaN.
  const V infinity = Math::set1(S(__builtin_inf()));
  o.x = Math::select(Math::lt(target, infinity), Math::select(o.none, infinity, target),
                     Math::set1(S(__builtin_nan(""))));
  // e^target : sum, both times min(1, e^-target)
  const V e = Math::exp_nonpositive(-Math::abs(o.x));
  const typename Math::M positive = Math::lt(zero, o.x);
  const V at = Math::select(positive, one, e), others = Math::select(positive, sum * e, sum);
  const typename Math::M unlikely = Math::lt(at, others);  // selects by it, not min and max: they may drop a NaN
  o.odds = Math::select(unlikely, at, others) * Math::reciprocal(Math::select(unlikely, others, at));
  o.larger = Math::reciprocal(one + o.odds);
  const V smaller = o.odds * o.larger;
  o.hit = Math::select(unlikely, smaller, o.larger);
  o.miss = Math::select(unlikely, o.larger, smaller);
  o.inverse_sum = Math::select(o.none, zero, Math::reciprocal(sum));
  return o;
}

// log(1 + x), x > -1: log(r) + (x - (r - 1)) / r, with r = 1 + x as it was rounded.
template <class Math>
DSCT_HD typename Math::V log1p(typename Math::V x) {
  const typename Math::V one = Math::set1(1), r = one + x;
  return Math::log_normal(r) + (x - (r - one)) * Math::reciprocal(r);
}

// factor_tckd = tau * tckd_weight * normaliser, factor_nckd likewise: they go into the gradient only. NaN or +inf in
// any logit shows in tckd, whatever the others are. coupled: NCKD counts (1 - b^T) times, in the loss and in the
// gradient; with equal factors the sum of the two is the KL of the whole softmax, and p_j = (1 - b) q_j.
template <class Math>
DSCT_HD TnkdPixel<Math> tnkd_pixel(typename Math::V target_s, typename Math::V sum_s, typename Math::V target_t,
                                   typename Math::V sum_t, typename Math::V cross, typename Math::V factor_tckd,
                                   typename Math::V factor_nckd, bool coupled) {
  using V = typename Math::V;
  using S = typename Math::S;
  const V zero = Math::set1(S(0)), one = Math::set1(S(1)), infinity = Math::set1(S(__builtin_inf()));
  const Odds<Math> s = odds_of<Math>(target_s, sum_s), t = odds_of<Math>(target_t, sum_t);
  // log sum_s - log sum_t as the log of a ratio: near 0 where the networks agree, and then their divergence is as
  // small, and would lose its digits between two logs of the size of log K.
  const V present_t = Math::select(t.none, one, sum_t), log_t = Math::log_normal(present_t);
  const V log_ratio = Math::select(s.none, -infinity, Math::log_normal(Math::ratio(sum_s, present_t)));
  const V u_s = s.x - (log_t + log_ratio), u_t = t.x - log_t;

  TnkdPixel<Math> p;
  // log b = -max(-u, 0) - log(1 + odds), log(1 - b) = -max(u, 0) - log(1 + odds). 0 * log 0 = 0. With both
  // networks on one side the difference of the maxima is that of u, which has digits that u has not.
  const V gap = (s.x - t.x) - log_ratio;
  const V up = Math::select(Math::lt(zero, Math::min(u_s, u_t)), gap, Math::max(u_s, zero) - Math::max(u_t, zero));
  const V down = Math::select(Math::lt(Math::max(u_s, u_t), zero), -gap, Math::max(-u_s, zero) - Math::max(-u_t, zero));
  const V hit = Math::select(Math::eq(t.hit, zero), zero, t.hit * down);
  const V miss = Math::select(Math::eq(t.miss, zero), zero, t.miss * up);
  p.tckd = (hit + miss) + log1p<Math>((s.odds - t.odds) * t.larger);
  // A student without any other class where the teacher has some: infinitely far. A teacher without: nothing to learn.
  const V divergence = cross * t.inverse_sum + log_ratio;
  p.nckd = Math::select(t.none, zero, Math::select(s.none, cross + infinity, divergence));
  // b^S - b^T from the two small sides where both networks are sure of the target: no digits lost next to 1.
  const V difference = Math::select(Math::lt(s.miss, s.hit), t.miss - s.miss, s.hit - t.hit);
  const V pull = factor_tckd * difference;
  p.grad_target = pull;
  if (coupled) {
    p.nckd = Math::select(Math::eq(t.miss, zero), zero, t.miss * p.nckd);
    p.coef_s = (factor_tckd * s.miss + (factor_nckd - factor_tckd) * t.miss) * s.inverse_sum;
    p.coef_t = -factor_nckd * t.miss * t.inverse_sum;
    return p;
  }
  p.coef_s = (Math::select(t.none, zero, factor_nckd) - pull) * s.inverse_sum;
  p.coef_t = -factor_nckd * t.inverse_sum;
  return p;
}

// Cross-entropy at temperature 1 has the same shape: -log sigmoid(u), with sums over the other classes.
template <class Math>
DSCT_HD CePixel<Math> ce_pixel(typename Math::V target, typename Math::V sum) {
  using V = typename Math::V;
  const Odds<Math> o = odds_of<Math>(target, sum);
  const V u = o.x - Math::log_normal(Math::select(o.none, Math::set1(1), sum));
  CePixel<Math> p;
  p.ce = Math::max(-u, Math::set1(0)) + log1p<Math>(o.odds);
  p.miss = o.miss;
  p.coef = o.miss * o.inverse_sum;
  return p;
}

}  // namespace dsct
