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
// exp_nonpositive (exp(x) for x <= 0) and log_normal (log of a positive normal number; NaN stays NaN).
#pragma once

#if defined(__CUDACC__)
#define DSCT_HD __host__ __device__ __forceinline__
#else
#define DSCT_HD inline __attribute__((always_inline))
#endif

namespace dsct {

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

// The target against the others: b = sigmoid(u) and 1 - b, with u = target - log sum, as shares of a total in which the
// larger of the two exponents is 0. So nothing overflows, nothing cancels, and the exponential waits for no sum.
template <class Math>
struct Odds {
  typename Math::V x;               // target, +inf where there is no other class
  typename Math::V at, others;      // e^target : sum, both times min(1, e^-target)
  typename Math::V total, inverse;  // at + others >= 1
  typename Math::V hit, miss;       // b, 1 - b
  typename Math::V inverse_sum;     // 0 where there is no other class
  typename Math::M none;            // no other class
};
template <class Math>
DSCT_HD Odds<Math> odds(typename Math::V target, typename Math::V sum) {
  using V = typename Math::V;
  using S = typename Math::S;
  const V zero = Math::set1(S(0)), one = Math::set1(S(1));
  Odds<Math> o;
  o.none = Math::eq(sum, zero);
  o.x = Math::select(o.none, Math::set1(S(__builtin_inf())), target);
  const V e = Math::exp_nonpositive(-Math::abs(o.x));
  const typename Math::M likely = Math::lt(zero, o.x);
  o.at = Math::select(likely, one, e);
  o.others = Math::select(likely, sum * e, sum);
  o.total = o.at + o.others;
  o.inverse = Math::reciprocal(o.total);
  o.hit = o.at * o.inverse;
  o.miss = o.others * o.inverse;
  o.inverse_sum = Math::select(o.none, zero, Math::reciprocal(sum));
  return o;
}

// factor_tckd = tau * tckd_weight * normaliser, factor_nckd likewise: they go into the gradient only.
template <class Math>
DSCT_HD TnkdPixel<Math> tnkd_pixel(typename Math::V target_s, typename Math::V sum_s, typename Math::V target_t,
                                   typename Math::V sum_t, typename Math::V cross, typename Math::V factor_tckd,
                                   typename Math::V factor_nckd) {
  using V = typename Math::V;
  using S = typename Math::S;
  const V zero = Math::set1(S(0)), one = Math::set1(S(1)), infinity = Math::set1(S(__builtin_inf()));
  const Odds<Math> s = odds<Math>(target_s, sum_s), t = odds<Math>(target_t, sum_t);
  // Differences of logs as logs of ratios: near 0 where the networks agree, and then their divergence is as small, and
  // would lose its digits between two logs of the size of log K. Not used where the teacher has no other class.
  const V log_sums = Math::select(s.none, -infinity, Math::log_normal(sum_s / sum_t));
  // log(total_s / total_t): where a network is sure, what tells its total from 1 is lost in it. The difference of the
  // totals, part by part, has it, and log(1 + d) = log(r) + (1 + d - r) / r for any r near 1 + d.
  const V ratio = s.total * t.inverse;
  const V lost = ((s.at - t.at) + (s.others - t.others)) * t.inverse - (ratio - one);
  const V found = Math::select(Math::lt(ratio, Math::set1(S(0.5))), zero, lost * (t.total * s.inverse));
  const V log_totals = Math::log_normal(ratio) + found;

  TnkdPixel<Math> p;
  // log b = min(x, 0) - log total, log(1 - b) = log sum - max(x, 0) - log total. 0 * log 0 = 0. A NaN stays: it is not
  // equal to 0.
  const V hit = Math::select(Math::eq(t.hit, zero), zero, t.hit * (Math::min(t.x, zero) - Math::min(s.x, zero)));
  const V further = (Math::max(s.x, zero) - Math::max(t.x, zero)) - log_sums;
  const V miss = Math::select(Math::eq(t.miss, zero), zero, t.miss * further);
  p.tckd = (hit + miss) + log_totals;
  // A student without any other class where the teacher has some: infinitely far. A teacher without: nothing to learn.
  const V divergence = cross * t.inverse_sum + log_sums;
  p.nckd = Math::select(t.none, zero, Math::select(s.none, cross + infinity, divergence));
  // b^S - b^T from the two small sides where both networks are sure of the target: no digits lost next to 1.
  const V difference = Math::select(Math::lt(s.miss, s.hit), t.miss - s.miss, s.hit - t.hit);
  const V pull = factor_tckd * difference;
  p.grad_target = pull;
  p.coef_s = (factor_nckd - pull) * s.inverse_sum;
  p.coef_t = -factor_nckd * t.inverse_sum;
  return p;
}

// Cross-entropy at temperature 1 has the same shape: -log sigmoid(u), with sums over the other classes.
template <class Math>
DSCT_HD CePixel<Math> ce_pixel(typename Math::V target, typename Math::V sum) {
  using V = typename Math::V;
  const Odds<Math> o = odds<Math>(target, sum);
  // log total, with what was lost when the smaller part was added to the larger.
  const V lost = Math::min(o.at, o.others) - (o.total - Math::max(o.at, o.others));
  CePixel<Math> p;
  p.ce = (Math::log_normal(o.total) + lost * o.inverse) - Math::min(o.x, Math::set1(0));
  p.miss = o.miss;
  p.coef = o.miss * o.inverse_sum;
  return p;
}

}  // namespace dsct
