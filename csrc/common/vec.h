// Vectors for the CPU kernels: one source, compiled once per instruction set.
//
// A translation unit says which set it is (-> DSCT_ISA, the name of its namespace) and includes this header FIRST:
//
//     #define DSCT_ISA_AVX512        // or DSCT_ISA_AVX2, or neither: the baseline
//     #include "common/vec.h"     // system headers, then `#pragma GCC target`, then the vectors
//     #include "kernel.h"            // namespace dsct { namespace DSCT_ISA { ... } }
//     #include "common/vec_end.h"
//
// From here to the end of that file every function is compiled for that set. So kernel code must not instantiate inline
// functions or templates of the standard library: the linker keeps one copy for all, and it may be this one.
//
// F32 and F64 are policies: V is the vector (a GNU vector type: + - * / work), M the mask, N the lanes, S the scalar.
// vec_math.h has exp and log over them.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <numbers>
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#else
#undef DSCT_ISA_AVX512
#undef DSCT_ISA_AVX2
#endif

#if defined(DSCT_ISA_AVX512)
#define DSCT_ISA avx512
#define DSCT_VEC_BYTES 64
#define DSCT_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2"
#elif defined(DSCT_ISA_AVX2)
#define DSCT_ISA avx2
#define DSCT_VEC_BYTES 32
#define DSCT_TARGET "avx2,fma,f16c,bmi,bmi2"
#else
#define DSCT_ISA baseline
#define DSCT_VEC_BYTES 16
#endif

#ifdef DSCT_TARGET
#ifdef __clang__
#pragma clang attribute push(__attribute__((target(DSCT_TARGET))), apply_to = function)
#else
#define DSCT_PRAGMA(text) _Pragma(#text)
#define DSCT_PRAGMA_TARGET(list) DSCT_PRAGMA(GCC target(list))
DSCT_PRAGMA_TARGET(DSCT_TARGET)
#endif
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC's own AVX-512 header sets it off, GCC bug 105593
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define DSCT_FORCE_INLINE inline __attribute__((always_inline))
#define DSCT_INLINE static DSCT_FORCE_INLINE

namespace dsct {
namespace DSCT_ISA {
namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class To, class From>
DSCT_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// --- scalars: tails, odd strides, and what the baseline has no instruction for ---

DSCT_INLINE float to_float(float x) { return x; }
DSCT_INLINE double to_float(double x) { return x; }
DSCT_INLINE float to_float(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
DSCT_INLINE float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t rest = x.bits & 0x7fff;
  // Exponent and mantissa land 112 exponents too low; one multiply repairs that for subnormals too.
  float magnitude = bit_cast<float>(rest << 13) * 0x1p112f;
  if (rest >= 0x7c00) magnitude = bit_cast<float>((rest << 13) | 0x7f800000u);  // inf, NaN
  return bit_cast<float>(bit_cast<uint32_t>(magnitude) | sign);
}

DSCT_INLINE void from_float(float x, float* to) { *to = x; }
DSCT_INLINE void from_float(double x, double* to) { *to = x; }
DSCT_INLINE void from_float(double x, float* to) { *to = static_cast<float>(x); }
DSCT_INLINE void from_float(float x, bf16* to) {
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // nearest, ties to even
  to->bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}
DSCT_INLINE void from_float(float x, f16* to) {
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t sign = (u >> 16) & 0x8000;
  const uint32_t magnitude = u & 0x7fffffff;
  uint32_t h;
  if (magnitude > 0x7f800000u) {
    h = 0x7e00;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    h = 0x7c00;  // 65520 and above round to inf
  } else if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 leaves the 10 bits that remain, correctly rounded, at the bottom of the mantissa.
    h = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    h = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  to->bits = static_cast<uint16_t>(h | sign);
}
template <class T>
DSCT_INLINE void from_float(double x, T* to) {
  from_float(static_cast<float>(x), to);
}

// --- vectors ---

template <class Scalar, class Int>
struct VecTypes {
  typedef Scalar S;
  typedef Scalar Raw __attribute__((vector_size(DSCT_VEC_BYTES), may_alias));
  typedef Scalar Unaligned __attribute__((vector_size(DSCT_VEC_BYTES), may_alias, aligned(sizeof(Scalar))));
  typedef Int I __attribute__((vector_size(DSCT_VEC_BYTES), may_alias));
  static constexpr int N = DSCT_VEC_BYTES / sizeof(Scalar);
};

#if defined(DSCT_ISA_AVX512)

struct F32 : VecTypes<float, int32_t> {
  typedef __m512 V;
  typedef __mmask16 M;
  DSCT_INLINE V set1(S x) { return _mm512_set1_ps(x); }
  DSCT_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  DSCT_INLINE V max(V a, V b) {  // b if either is NaN
    return _mm512_max_ps(a, b);
  }
  DSCT_INLINE V min(V a, V b) {  // b if either is NaN
    return _mm512_min_ps(a, b);
  }
  DSCT_INLINE V abs(V a) { return _mm512_abs_ps(a); }
  DSCT_INLINE V reciprocal(V a) {  // within 1 ulp, a normal number; half of what a division takes
    const V guess = _mm512_rcp14_ps(a);
    return _mm512_fmadd_ps(guess, _mm512_fnmadd_ps(a, guess, set1(1.0f)), guess);
  }
  DSCT_INLINE V sqrt(V a) { return _mm512_sqrt_ps(a); }
  DSCT_INLINE V round(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  DSCT_INLINE V scale(V a, V n) {  // a * 2^n, n whole
    return _mm512_scalef_ps(a, n);
  }
  DSCT_INLINE M eq(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  DSCT_INLINE M ne(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ); }
  DSCT_INLINE M lt(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  DSCT_INLINE M le(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
  DSCT_INLINE V select(M m, V a, V b) { return _mm512_mask_blend_ps(m, b, a); }
  DSCT_INLINE V keep(M m, V a) {  // a where m, else 0
    return _mm512_maskz_mov_ps(m, a);
  }
  DSCT_INLINE M ne_where(M m, V a, V b) {  // m and a != b
    return _mm512_mask_cmp_ps_mask(m, a, b, _CMP_NEQ_UQ);
  }
  DSCT_INLINE V max_masked(M m, V a, V b) {  // max(a, b), a where not m
    return _mm512_mask_max_ps(a, m, a, b);
  }
  DSCT_INLINE V fma_masked(M m, V a, V b, V c) {  // a * b + c, c where not m
    return _mm512_mask3_fmadd_ps(a, b, c, m);
  }
  DSCT_INLINE M both(M a, M b) { return a & b; }
  DSCT_INLINE M either(M a, M b) { return a | b; }
  DSCT_INLINE M invert(M a) { return static_cast<M>(~a); }
  DSCT_INLINE bool any(M a) { return a != 0; }
  DSCT_INLINE M first(int n) {  // the first n lanes
    return static_cast<M>((1u << n) - 1u);
  }
  // x = mantissa * 2^exponent, mantissa in [0.75, 1.5); exponent is -inf, inf, NaN for 0, inf, NaN.
  DSCT_INLINE void split(V x, V* mantissa, V* exponent) {
    *mantissa = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_nan);
    const V e = _mm512_getexp_ps(x);
    *exponent = _mm512_mask_add_ps(e, lt(*mantissa, set1(1.0f)), e, set1(1.0f));
  }
  DSCT_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
  DSCT_INLINE V widen(__m256i half, const bf16*) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  DSCT_INLINE V widen(__m256i half, const f16*) { return _mm512_cvtph_ps(half); }
  template <class Half>
  DSCT_INLINE V load(const Half* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), p);
  }
  DSCT_INLINE void store(float* p, V a) { _mm512_storeu_ps(p, a); }
  DSCT_INLINE __m256i narrow(V a, const bf16*) {
    const __m512i u = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i kept = _mm512_mask_mov_epi32(rounded, ne(a, a), _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
  }
  DSCT_INLINE __m256i narrow(V a, const f16*) {
    return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  template <class Half>
  DSCT_INLINE void store(Half* p, V a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a, p));
  }
  // Past the caches: no read for ownership. p aligned to the bytes written.
  DSCT_INLINE void stream(float* p, V a) { _mm512_stream_ps(p, a); }
  template <class Half>
  DSCT_INLINE void stream(Half* p, V a) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(a, p));
  }
};

struct F64 : VecTypes<double, int64_t> {
  typedef __m512d V;
  typedef __mmask8 M;
  DSCT_INLINE V set1(S x) { return _mm512_set1_pd(x); }
  DSCT_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
  DSCT_INLINE V max(V a, V b) { return _mm512_max_pd(a, b); }
  DSCT_INLINE V min(V a, V b) { return _mm512_min_pd(a, b); }
  DSCT_INLINE V abs(V a) { return _mm512_abs_pd(a); }
  DSCT_INLINE V reciprocal(V a) { return set1(1.0) / a; }
  DSCT_INLINE V sqrt(V a) { return _mm512_sqrt_pd(a); }
  DSCT_INLINE V round(V a) { return _mm512_roundscale_pd(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  DSCT_INLINE V scale(V a, V n) { return _mm512_scalef_pd(a, n); }
  DSCT_INLINE M eq(V a, V b) { return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ); }
  DSCT_INLINE M ne(V a, V b) { return _mm512_cmp_pd_mask(a, b, _CMP_NEQ_UQ); }
  DSCT_INLINE M lt(V a, V b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
  DSCT_INLINE M le(V a, V b) { return _mm512_cmp_pd_mask(a, b, _CMP_LE_OQ); }
  DSCT_INLINE V select(M m, V a, V b) { return _mm512_mask_blend_pd(m, b, a); }
  DSCT_INLINE V keep(M m, V a) { return _mm512_maskz_mov_pd(m, a); }
  DSCT_INLINE M ne_where(M m, V a, V b) { return _mm512_mask_cmp_pd_mask(m, a, b, _CMP_NEQ_UQ); }
  DSCT_INLINE V max_masked(M m, V a, V b) { return _mm512_mask_max_pd(a, m, a, b); }
  DSCT_INLINE V fma_masked(M m, V a, V b, V c) { return _mm512_mask3_fmadd_pd(a, b, c, m); }
  DSCT_INLINE M both(M a, M b) { return a & b; }
  DSCT_INLINE M either(M a, M b) { return a | b; }
  DSCT_INLINE M invert(M a) { return static_cast<M>(~a); }
  DSCT_INLINE bool any(M a) { return a != 0; }
  DSCT_INLINE M first(int n) { return static_cast<M>((1u << n) - 1u); }
  DSCT_INLINE void split(V x, V* mantissa, V* exponent) {
    *mantissa = _mm512_getmant_pd(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_nan);
    const V e = _mm512_getexp_pd(x);
    *exponent = _mm512_mask_add_pd(e, lt(*mantissa, set1(1.0)), e, set1(1.0));
  }
  DSCT_INLINE V load(const double* p) { return _mm512_loadu_pd(p); }
  DSCT_INLINE V load(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
  template <class T>
  DSCT_INLINE V load(const T* p) {
    double lanes[N];
    for (int i = 0; i < N; i++) lanes[i] = to_float(p[i]);
    return load(lanes);
  }
  template <class T>
  DSCT_INLINE void store(T* p, V a) {
    double lanes[N];
    store(lanes, a);
    for (int i = 0; i < N; i++) from_float(lanes[i], p + i);
  }
  template <class T>
  DSCT_INLINE void stream(T* p, V a) {
    store(p, a);
  }
  DSCT_INLINE void store(double* p, V a) { _mm512_storeu_pd(p, a); }
  DSCT_INLINE void store(float* p, V a) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(a)); }
  DSCT_INLINE void stream(double* p, V a) { _mm512_stream_pd(p, a); }
};

#else  // AVX2 and the baseline: masks are integer vectors, all ones or all zeros in a lane

// What both widths and both types share, written with GNU vector operators.
template <class Scalar, class Int, int kMantissaBits, int kBias>
struct VecCommon : VecTypes<Scalar, Int> {
  typedef VecTypes<Scalar, Int> Base;
  typedef Scalar S;
  typedef typename Base::Raw V;
  typedef typename Base::I M;
  typedef typename Base::I I;
  using Base::N;
  static constexpr int bias = kBias;

  DSCT_INLINE V set1(S x) {
    return x - V{};  // not V{} + x: that makes -0 a +0
  }
  DSCT_INLINE M eq(V a, V b) { return a == b; }
  DSCT_INLINE M ne(V a, V b) { return a != b; }
  DSCT_INLINE M lt(V a, V b) { return a < b; }
  DSCT_INLINE M le(V a, V b) { return a <= b; }
  DSCT_INLINE M both(M a, M b) { return a & b; }
  DSCT_INLINE M either(M a, M b) { return a | b; }
  DSCT_INLINE M invert(M a) { return ~a; }
  DSCT_INLINE M ne_where(M m, V a, V b) {  // m and a != b
    return m & (a != b);
  }
  DSCT_INLINE V keep(M m, V a) { return (V)((I)a & m); }
  DSCT_INLINE V select(M m, V a, V b) { return (V)(((I)a & m) | ((I)b & ~m)); }
  DSCT_INLINE V max(V a, V b) {  // b if either is NaN
    return select(a > b, a, b);
  }
  DSCT_INLINE V min(V a, V b) { return select(a < b, a, b); }
  DSCT_INLINE V abs(V a) { return (V)((I)a & ~(I)set1(S(-0.0))); }
  DSCT_INLINE V reciprocal(V a) { return set1(1) / a; }
  DSCT_INLINE V fma(V a, V b, V c) {
    return a * b + c;  // contracted where the target has it
  }
  DSCT_INLINE V round(V a) {  // |a| < 2^(mantissa bits - 1)
    const V magic = set1(S(1.5) * S(int64_t(1) << kMantissaBits));
    return (a + magic) - magic;
  }
  DSCT_INLINE I to_int(V whole) {
    const V magic = set1(S(1.5) * S(int64_t(1) << kMantissaBits));
    return (I)(whole + magic) - (I)magic;
  }
  DSCT_INLINE V power(I n) {  // 2^n, n a normal exponent
    return (V)((n + Int(kBias)) << kMantissaBits);
  }
  DSCT_INLINE V scale(V a, V n) {  // in two steps, so that subnormals and the last binade come out right
    const I whole = to_int(n);
    const I half = whole >> 1;
    return a * power(half) * power(whole - half);
  }
  DSCT_INLINE bool any(M a) {
    Int all = 0;
    for (int i = 0; i < N; i++) all |= a[i];
    return all != 0;
  }
  DSCT_INLINE M first(int n) {
    I lane = {};
    for (int i = 0; i < N; i++) lane[i] = i < n ? Int(-1) : Int(0);
    return lane;
  }
  DSCT_INLINE void split(V x, V* mantissa, V* exponent) {
    const S tiny = sizeof(S) == 4 ? S(0x1p-126) : S(0x1p-1022);
    const S infinity = S(__builtin_inf());
    const M subnormal = x < tiny;
    const V y = select(subnormal, x * S(int64_t(1) << kMantissaBits), x);
    const I bits = (I)y;
    const Int three_quarters = (Int(kBias - 1) << kMantissaBits) + (Int(1) << (kMantissaBits - 1));
    const I n = (bits - three_quarters) >> kMantissaBits;  // floor(log2(y / 0.75))
    *mantissa = select(x < S(0), set1(S(__builtin_nan(""))), (V)(bits - (n << kMantissaBits)));
    V e = {};
    for (int i = 0; i < N; i++) e[i] = S(n[i]);
    e = e - keep(subnormal, set1(S(kMantissaBits)));
    e = select(x == S(0), set1(-infinity), e);
    *exponent = select(x < infinity, e, x);
  }
  DSCT_INLINE V load(const S* p) {
    V a;
    memcpy(&a, p, sizeof(V));
    return a;
  }
  template <class T>
  DSCT_INLINE V load(const T* p) {
    V a = {};
    for (int i = 0; i < N; i++) a[i] = to_float(p[i]);
    return a;
  }
  DSCT_INLINE void store(S* p, V a) { memcpy(p, &a, sizeof(V)); }
  template <class T>
  DSCT_INLINE void store(T* p, V a) {
    for (int i = 0; i < N; i++) from_float(S(a[i]), p + i);
  }
  template <class T>
  DSCT_INLINE void stream(T* p, V a) {
    store(p, a);
  }
};

struct F32 : VecCommon<float, int32_t, 23, 127> {
  typedef VecCommon<float, int32_t, 23, 127> Base;
  using Base::load;
  using Base::store;
  using Base::stream;
#ifdef DSCT_ISA_AVX2
  DSCT_INLINE V fma(V a, V b, V c) { return (V)_mm256_fmadd_ps(a, b, c); }
  DSCT_INLINE V max(V a, V b) { return (V)_mm256_max_ps(a, b); }
  DSCT_INLINE V min(V a, V b) { return (V)_mm256_min_ps(a, b); }
  DSCT_INLINE V sqrt(V a) { return (V)_mm256_sqrt_ps(a); }
  DSCT_INLINE V round(V a) { return (V)_mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  DSCT_INLINE V select(M m, V a, V b) { return (V)_mm256_blendv_ps(b, a, (__m256)m); }
  DSCT_INLINE bool any(M m) { return _mm256_movemask_ps((__m256)m) != 0; }
  DSCT_INLINE V widen(__m128i half, const bf16*) { return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16); }
  DSCT_INLINE V widen(__m128i half, const f16*) { return (V)_mm256_cvtph_ps(half); }
  DSCT_INLINE V load(const bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), p); }
  DSCT_INLINE V load(const f16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), p); }
  DSCT_INLINE __m128i to_bf16(V a) {
    const I u = (I)a;
    const I rounded = (u + 0x7fff + ((u >> 16) & 1));
    const __m256i kept = _mm256_srli_epi32((__m256i)select(a != a, (V)(I{} + 0x7fc00000), (V)rounded), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
  }
  DSCT_INLINE __m128i to_f16(V a) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  DSCT_INLINE void store(bf16* p, V a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(a)); }
  DSCT_INLINE void store(f16* p, V a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_f16(a)); }
  DSCT_INLINE void stream(float* p, V a) { _mm256_stream_ps(p, a); }
  DSCT_INLINE void stream(bf16* p, V a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_bf16(a)); }
  DSCT_INLINE void stream(f16* p, V a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_f16(a)); }
#else
  DSCT_INLINE V sqrt(V a) {
    V r = {};
    for (int i = 0; i < N; i++) r[i] = __builtin_sqrtf(a[i]);
    return r;
  }
#if defined(__x86_64__)
  DSCT_INLINE V max(V a, V b) { return (V)_mm_max_ps(a, b); }
  DSCT_INLINE V min(V a, V b) { return (V)_mm_min_ps(a, b); }
  DSCT_INLINE void stream(float* p, V a) { _mm_stream_ps(p, a); }
#endif
#endif
};

struct F64 : VecCommon<double, int64_t, 52, 1023> {
  typedef VecCommon<double, int64_t, 52, 1023> Base;
#ifdef DSCT_ISA_AVX2
  DSCT_INLINE V fma(V a, V b, V c) { return (V)_mm256_fmadd_pd(a, b, c); }
  DSCT_INLINE V max(V a, V b) { return (V)_mm256_max_pd(a, b); }
  DSCT_INLINE V min(V a, V b) { return (V)_mm256_min_pd(a, b); }
#endif
  DSCT_INLINE V sqrt(V a) {
    V r = {};
    for (int i = 0; i < N; i++) r[i] = __builtin_sqrt(a[i]);
    return r;
  }
};

#endif

// a * b + c, c where not m; max(a, b), a where m. One instruction with AVX-512's masks.
template <class A>
DSCT_INLINE typename A::V fma_where(typename A::M m, typename A::V a, typename A::V b, typename A::V c) {
#if defined(DSCT_ISA_AVX512)
  return A::fma_masked(m, a, b, c);
#else
  return A::select(m, A::fma(a, b, c), c);
#endif
}
template <class A>
DSCT_INLINE typename A::V max_unless(typename A::M m, typename A::V a, typename A::V b) {
#if defined(DSCT_ISA_AVX512)
  return A::max_masked(A::invert(m), a, b);
#else
  return A::select(m, a, A::max(a, b));
#endif
}

// Two neighbouring vectors; halves go out as one line.
template <class A, class T>
DSCT_INLINE void stream2(T* p, typename A::V a, typename A::V b) {
#if defined(DSCT_ISA_AVX512)
  if constexpr (sizeof(T) == 2 && A::N == 16) {
    const __m512i low = _mm512_castsi256_si512(A::narrow(a, p));
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), _mm512_inserti64x4(low, A::narrow(b, p), 1));
    return;
  }
#endif
  A::stream(p, a);
  A::stream(p + A::N, b);
}

DSCT_INLINE void prefetch_l1(const void* p) { __builtin_prefetch(p, 0, 3); }
DSCT_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

// Orders streaming stores before whatever follows; once, at the end of a chunk of work.
DSCT_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Two vectors as one, for long chains of dependent arithmetic: the two chains run interleaved, in half the time.
template <class A>
struct Pair {
  typedef typename A::S S;
  static constexpr int N = 2 * A::N;
  struct V {
    typename A::V a, b;
    friend DSCT_FORCE_INLINE V operator+(V x, V y) { return {x.a + y.a, x.b + y.b}; }
    friend DSCT_FORCE_INLINE V operator-(V x, V y) { return {x.a - y.a, x.b - y.b}; }
    friend DSCT_FORCE_INLINE V operator*(V x, V y) { return {x.a * y.a, x.b * y.b}; }
    friend DSCT_FORCE_INLINE V operator/(V x, V y) { return {x.a / y.a, x.b / y.b}; }
    friend DSCT_FORCE_INLINE V operator-(V x) { return {-x.a, -x.b}; }
  };
  struct M {
    typename A::M a, b;
  };
  DSCT_INLINE V set1(S x) { return {A::set1(x), A::set1(x)}; }
  DSCT_INLINE V load(const S* p) { return {A::load(p), A::load(p + A::N)}; }
  DSCT_INLINE void store(S* p, V x) {
    A::store(p, x.a);
    A::store(p + A::N, x.b);
  }
  DSCT_INLINE V fma(V x, V y, V z) { return {A::fma(x.a, y.a, z.a), A::fma(x.b, y.b, z.b)}; }
  DSCT_INLINE V max(V x, V y) { return {A::max(x.a, y.a), A::max(x.b, y.b)}; }
  DSCT_INLINE V min(V x, V y) { return {A::min(x.a, y.a), A::min(x.b, y.b)}; }
  DSCT_INLINE V abs(V x) { return {A::abs(x.a), A::abs(x.b)}; }
  DSCT_INLINE V reciprocal(V x) { return {A::reciprocal(x.a), A::reciprocal(x.b)}; }
  DSCT_INLINE V round(V x) { return {A::round(x.a), A::round(x.b)}; }
  DSCT_INLINE V scale(V x, V n) { return {A::scale(x.a, n.a), A::scale(x.b, n.b)}; }
  DSCT_INLINE void split(V x, V* mantissa, V* exponent) {
    A::split(x.a, &mantissa->a, &exponent->a);
    A::split(x.b, &mantissa->b, &exponent->b);
  }
  DSCT_INLINE M eq(V x, V y) { return {A::eq(x.a, y.a), A::eq(x.b, y.b)}; }
  DSCT_INLINE M ne(V x, V y) { return {A::ne(x.a, y.a), A::ne(x.b, y.b)}; }
  DSCT_INLINE M lt(V x, V y) { return {A::lt(x.a, y.a), A::lt(x.b, y.b)}; }
  DSCT_INLINE M le(V x, V y) { return {A::le(x.a, y.a), A::le(x.b, y.b)}; }
  DSCT_INLINE M both(M x, M y) { return {A::both(x.a, y.a), A::both(x.b, y.b)}; }
  DSCT_INLINE V select(M m, V x, V y) { return {A::select(m.a, x.a, y.a), A::select(m.b, x.b, y.b)}; }
  DSCT_INLINE V keep(M m, V x) { return {A::keep(m.a, x.a), A::keep(m.b, x.b)}; }
};

template <class A, class T>
DSCT_INLINE typename A::V load_n(const T* p, int n) {  // the first n lanes, 0 in the rest
  T full[A::N] = {};
  memcpy(full, p, static_cast<size_t>(n) * sizeof(T));
  return A::load(full);
}
template <class A, class T>
DSCT_INLINE void store_n(T* p, typename A::V a, int n) {
  T full[A::N];
  A::store(full, a);
  memcpy(p, full, static_cast<size_t>(n) * sizeof(T));
}

template <class A>
DSCT_INLINE typename A::S sum(typename A::V a) {  // pairwise, the same order in every build of a set
  typename A::S lanes[A::N];
  A::store(lanes, a);
  for (int half = A::N / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}
template <class A>
DSCT_INLINE typename A::S largest(typename A::V a) {
  typename A::S lanes[A::N];
  A::store(lanes, a);
  for (int half = A::N / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}

}  // namespace
}  // namespace DSCT_ISA
}  // namespace dsct
