// exp and log over the vectors of vec.h. exp: within 1.4 ulp, 0 at -inf, subnormal results kept. log: within
// 1 ulp, log(0) = -inf, log(x < 0) = NaN. NaN propagates through both.
#pragma once

#include "vec.h"

namespace dsct {
namespace DSCT_ISA {
namespace {

// Coefficients from the highest power down (Chebyshev fits in 40 digits); a polynomial is evaluated by Horner's rule.
template <class A>
struct Coefficients;
template <>
struct Coefficients<F32> {
  // 2^f on [-0.5, 0.5]: 2e-9
  static constexpr float exp2[] = {0.000154614446986f,
                                   0.00134004281776f,
                                   0.00961805667852f,
                                   0.0555032722667f,
                                   0.240226509223f,
                                   0.693147206703f,
                                   1.0f};
  // e^r on [-ln2/2, ln2/2]
  static constexpr float exp[] = {
      0.00139411188958f, 0.00837513477462f, 0.0416663527711f, 0.16666415414f, 0.500000004715f, 1.00000003774f, 1.0f};
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float exp_low = -104.0f, exp2_low = -151.0f, exp2_high = 129.0f;
};
template <>
struct Coefficients<F64> {
  static constexpr double exp2[] = {2.573356830875689123527e-11,
                                    4.456675341049205878238e-10,
                                    7.054894386348348044488e-9,
                                    1.017805119296064896002e-7,
                                    0.000001321548681599997697477,
                                    0.00001525273385629346641646,
                                    0.0001540353039336275529143,
                                    0.001333355814639035277484,
                                    0.009618129107628483054324,
                                    0.0555041086648216989925,
                                    0.2402265069591007122809,
                                    0.6931471805599453083544,
                                    1.0};
  static constexpr double exp[] = {2.092158893897149237652e-9,
                                   2.511488209588034022541e-8,
                                   2.755725187722508280494e-7,
                                   0.000002755722492213065856199,
                                   0.00002480158735013993137394,
                                   0.0001984126990925790292418,
                                   0.001388888888887187460941,
                                   0.008333333333309508019183,
                                   0.04166666666666669221842,
                                   0.1666666666666670244735,
                                   0.4999999999999999998904,
                                   0.9999999999999999984648,
                                   1.0};
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr double exp_low = -746.0, exp2_low = -1077.0, exp2_high = 1025.0;
};

template <class A>
struct Coefficients<Pair<A>> : Coefficients<A> {};

template <class A, size_t n>
DSCT_INLINE typename A::V horner(typename A::V x, const typename A::S (&c)[n]) {
  typename A::V sum = A::set1(c[0]);
  for (size_t i = 1; i < n; i++) sum = A::fma(sum, x, A::set1(c[i]));
  return sum;
}

// 2^x, any x.
template <class A>
DSCT_INLINE typename A::V exp2(typename A::V x) {
  using K = Coefficients<A>;
  x = A::min(A::set1(K::exp2_high), A::max(A::set1(K::exp2_low), x));  // min and max hand a NaN in x on
  const typename A::V n = A::round(x);
  return A::scale(horner<A>(x - n, K::exp2), n);
}

// 2^x for x <= 0 in a hot loop: what is below the normal numbers may come out as 0.
#if defined(DSCT_ISA_AVX512)
template <class A>
DSCT_INLINE typename A::V exp2_nonpositive(typename A::V x) {
  x = A::max(A::set1(Coefficients<A>::exp2_low), x);
  const typename A::V n = A::round(x);
  return A::scale(horner<A>(x - n, Coefficients<A>::exp2), n);
}
#else
template <class A>
DSCT_INLINE typename A::V exp2_nonpositive(typename A::V x) {
  x = A::max(A::set1(typename A::S(-A::bias)), x);  // 2^-bias comes out as 0: no mask, no second step
  const typename A::V n = A::round(x);
  return horner<A>(x - n, Coefficients<A>::exp2) * A::power(A::to_int(n));
}
#endif

// e^x, x <= 0. Cody-Waite: x - n ln2 in two pieces, so that a large |x| costs no digits.
template <class A>
DSCT_INLINE typename A::V exp_nonpositive(typename A::V x) {
  using K = Coefficients<A>;
  using S = typename A::S;
  x = A::max(A::set1(K::exp_low), x);
  const typename A::V n = A::round(x * A::set1(S(std::numbers::log2e)));
  typename A::V r = A::fma(n, A::set1(-K::ln2_high), x);
  r = A::fma(n, A::set1(-K::ln2_low), r);
  return A::scale(horner<A>(r, K::exp), n);
}

// log of a mantissa in [0.75, 1.5) plus exponent * ln2
template <class A>
DSCT_INLINE typename A::V log_split(typename A::V m, typename A::V e, float) {
  static constexpr float c[] = {0.042877249018f, -0.095625062068f, 0.11681360864f,  -0.12639361161f, 0.14268255241f,
                                -0.16660809636f, 0.20000141783f,   -0.25000056835f, 0.33333333145f};
  const typename A::V f = m - A::set1(1.0f);
  const typename A::V square = f * f;
  typename A::V y = horner<A>(f, c) * f * square;
  y = A::fma(e, A::set1(Coefficients<A>::ln2_low), y);
  y = A::fma(square, A::set1(-0.5f), y);
  return A::fma(e, A::set1(Coefficients<A>::ln2_high), f + y);
}
template <class A>
DSCT_INLINE typename A::V log_split(typename A::V m, typename A::V e, double) {  // fdlibm's form
  static constexpr double c[] = {0.1360401570712407745758, 0.1321036048513261982694, 0.1538883467780191506921,
                                 0.181817384547230255793,  0.2222222303780724187993, 0.2857142856733918926309,
                                 0.4000000000000780055143, 0.666666666666666642283};
  const typename A::V f = m - A::set1(1.0);
  const typename A::V s = f / (A::set1(2.0) + f);
  const typename A::V z = s * s;
  const typename A::V tail = horner<A>(z, c) * z;
  const typename A::V half_square = f * f * A::set1(0.5);
  const typename A::V low = A::fma(e, A::set1(Coefficients<A>::ln2_low), s * (half_square + tail));
  return A::fma(e, A::set1(Coefficients<A>::ln2_high), f - (half_square - low));
}

// Positive normal numbers only; NaN stays NaN.
template <class A>
DSCT_INLINE typename A::V log_normal(typename A::V x) {
  typename A::V mantissa, exponent;
  A::split(x, &mantissa, &exponent);
  return log_split<A>(mantissa, exponent, typename A::S());
}

template <class A>
DSCT_INLINE typename A::V log(typename A::V x) {
  typename A::V mantissa, exponent;
  A::split(x, &mantissa, &exponent);
  const typename A::V y = log_split<A>(mantissa, exponent, typename A::S());
  const typename A::V infinity = A::set1(typename A::S(__builtin_inf()));
  const typename A::M special = A::both(A::eq(A::abs(exponent), infinity), A::eq(mantissa, mantissa));  // 0 and inf
  return A::select(special, exponent, y);
}

}  // namespace
}  // namespace DSCT_ISA
}  // namespace dsct
