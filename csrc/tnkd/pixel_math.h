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
// Math is a policy: V the value, S its scalar, M a condition; set1, abs, max, lt, eq, select, exp, log,
// log1p_unit (log(1 + t) for t in [0, 1]).
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

// u = z_y - logsumexp_{j != y} z_j: +inf where there is no other class.
template <class Math>
DSCT_HD typename Math::V log_odds(typename Math::V target, typename Math::V sum, typename Math::V log_sum) {
  using S = typename Math::S;
  return Math::select(Math::eq(sum, Math::set1(S(0))), Math::set1(S(__builtin_inf())), target - log_sum);
}

template <class Math>
DSCT_HD typename Math::V inverse_or_zero(typename Math::V sum) {
  using S = typename Math::S;
  return Math::select(Math::eq(sum, Math::set1(S(0))), Math::set1(S(0)), Math::set1(S(1)) / sum);
}

// sigmoid and log sigmoid of u and of -u, from one exp and one log; no cancellation anywhere.
template <class Math>
struct Sigmoids {
  typename Math::V hit, miss, log_hit, log_miss;
};
template <class Math>
DSCT_HD Sigmoids<Math> sigmoids(typename Math::V u) {
  using V = typename Math::V;
  const V zero = Math::set1(0), one = Math::set1(1);
  const V t = Math::exp(-Math::abs(u));
  const V larger = one / (one + t);
  const V smaller = t * larger;
  const V softplus = Math::log1p_unit(t);
  const typename Math::M negative = Math::lt(u, zero);
  Sigmoids<Math> s;
  s.hit = Math::select(negative, smaller, larger);
  s.miss = Math::select(negative, larger, smaller);
  s.log_hit = -Math::max(zero, -u) - softplus;
  s.log_miss = -Math::max(zero, u) - softplus;
  return s;
}

// factor_tckd = tau * tckd_weight * normaliser, factor_nckd likewise: they go into the gradient only.
template <class Math>
DSCT_HD TnkdPixel<Math> tnkd_pixel(typename Math::V target_s, typename Math::V sum_s, typename Math::V target_t,
                                   typename Math::V sum_t, typename Math::V cross, typename Math::V factor_tckd,
                                   typename Math::V factor_nckd) {
  using V = typename Math::V;
  using S = typename Math::S;
  const V zero = Math::set1(S(0)), one = Math::set1(S(1)), infinity = Math::set1(S(__builtin_inf()));
  // log sum_s - log sum_t as the log of a ratio: near 0 where the networks agree, and then their divergence is as
  // small, and would lose its digits between two logs of the size of log K.
  const typename Math::M none_t = Math::eq(sum_t, zero);
  const V present_t = Math::select(none_t, one, sum_t), over_t = one / present_t;
  const V log_t = Math::log(present_t), log_ratio = Math::log(sum_s / present_t), log_s = log_t + log_ratio;
  const Sigmoids<Math> s = sigmoids<Math>(log_odds<Math>(target_s, sum_s, log_s));
  const Sigmoids<Math> t = sigmoids<Math>(log_odds<Math>(target_t, sum_t, log_t));
  const V inverse_s = inverse_or_zero<Math>(sum_s), inverse_t = Math::select(none_t, zero, over_t);

  TnkdPixel<Math> p;
  // 0 * log 0 = 0. A NaN stays: it is not equal to 0.
  const V hit = Math::select(Math::eq(t.hit, zero), zero, t.hit * (s.log_hit - t.log_hit));
  const V miss = Math::select(Math::eq(t.miss, zero), zero, t.miss * (s.log_miss - t.log_miss));
  p.tckd = -(hit + miss);
  // A student without any other class where the teacher has some: infinitely far. A teacher without: nothing to learn.
  const V divergence = cross * inverse_t + log_ratio;
  p.nckd = Math::select(none_t, zero, Math::select(Math::eq(sum_s, zero), cross + infinity, divergence));
  // b^S - b^T from the two small sides where both networks are sure of the target: no digits lost next to 1.
  const V difference = Math::select(Math::lt(s.miss, s.hit), t.miss - s.miss, s.hit - t.hit);
  const V pull = factor_tckd * difference;
  p.grad_target = pull;
  p.coef_s = (factor_nckd - pull) * inverse_s;
  p.coef_t = -factor_nckd * inverse_t;
  return p;
}

// Cross-entropy at temperature 1 has the same shape: -log sigmoid(u), with sums over the other classes.
template <class Math>
DSCT_HD CePixel<Math> ce_pixel(typename Math::V target, typename Math::V sum) {
  using V = typename Math::V;
  const V u = log_odds<Math>(target, sum, Math::log(sum));
  const Sigmoids<Math> s = sigmoids<Math>(u);
  CePixel<Math> p;
  p.ce = -s.log_hit;
  p.miss = s.miss;
  p.coef = s.miss * inverse_or_zero<Math>(sum);
  return p;
}

}  // namespace dsct
