// One dtype of features in one instruction set: where features and statistics lie, and the exponential.
#pragma once

#include "args.h"
#include "cafd/stats.h"
#include "common/vec_math.h"

namespace dsct {
namespace DSCT_ISA {
namespace {

// Rows whose exp wait in L2 for their sum, to be added to A and B together: A and B are loaded and stored once for all.
constexpr int kRows = 4;

// Asks for the next `bytes` of ahead, to L2.
DSCT_INLINE void fetch(Ahead& ahead, int64_t bytes) {
  if (ahead.next >= ahead.end) return;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(ahead.next + i, 0, 2);
  ahead.next += bytes;
}

template <class A, class T>
struct Walk {
  using V = typename A::V;
  using S = typename A::S;
  static constexpr int64_t N = A::N;

  static int64_t pitch(int64_t count) { return (count + N - 1) / N * N; }

  static int64_t moments_bytes(const Features& x) {
    return pitch(x.C) * static_cast<int64_t>(2 * sizeof(S) + sizeof(double));
  }

  static size_t scratch(const Features& x) {
    const int64_t positions = x.H * x.W;
    const int64_t rows = kRows * pitch(positions) * sizeof(S) + 2 * pitch(positions) * sizeof(T);
    const int64_t channels = 4 * pitch(x.C) * sizeof(S) + 2 * positions * sizeof(T*);
    return static_cast<size_t>(rows > channels ? rows : channels);
  }

  static S* stats(const Side& side, int64_t n) {
    return static_cast<S*>(side.stats) + n * stats_row(side.x.C, side.x.H * side.x.W);
  }
  // Rows of stats: see ops.h.
  static S* maximum(const Side& side, int64_t n) { return stats(side, n); }
  static S* inverse_sum(const Side& side, int64_t n) { return stats(side, n) + side.x.C; }
  static S* weight(const Side& side, int64_t n) { return stats(side, n) + 2 * side.x.C; }
  static S* relative(const Side& side, int64_t n) { return stats(side, n) + 3 * side.x.C; }
  static S* map(const Side& side, int64_t n) { return stats(side, n) + 4 * side.x.C; }
  static S* mixed_map(const Side& side, int64_t n) { return map(side, n) + side.x.H * side.x.W; }
  static S* mean_strength(const Side& side, int64_t n) { return mixed_map(side, n) + side.x.H * side.x.W; }

  static bool dense_rows(const Features& x) { return (x.W == 1 || x.stride_w == 1) && (x.H == 1 || x.stride_h == x.W); }
  static T* row(const Features& x, int64_t n, int64_t c) {
    return static_cast<T*>(x.data) + n * x.stride_n + c * x.stride_c;
  }
  // A channel's positions side by side: in place where they are, else gathered.
  static const T* gather(const Features& x, int64_t n, int64_t c, T* copy) {
    const T* p = row(x, n, c);
    if (dense_rows(x)) return p;
    for (int64_t h = 0; h < x.H; h++)
      for (int64_t w = 0; w < x.W; w++) copy[h * x.W + w] = p[h * x.stride_h + w * x.stride_w];
    return copy;
  }
  static void scatter(const Features& x, int64_t n, int64_t c, const T* copy) {
    T* p = row(x, n, c);
    for (int64_t h = 0; h < x.H; h++)
      for (int64_t w = 0; w < x.W; w++) p[h * x.stride_h + w * x.stride_w] = copy[h * x.W + w];
  }

  // e^((v - max) / T), v <= max. The difference first: it is exact near the maximum whatever the magnitude. A product
  // in full, less a whole number: the fma makes that exact too, and one constant does for 1 / T and for log2(e).
  struct Exponential {
    V k, lowest;
    DSCT_INLINE Exponential of(const Side& side) {
      const double k = std::numbers::log2e / side.spatial_temperature;
      return {A::set1(static_cast<S>(k)), A::set1(static_cast<S>(Coefficients<A>::exp2_low / k))};
    }
    __attribute__((always_inline)) V operator()(V v, V max) const {
      const V x = A::max(lowest, v - max);
      const V n = A::round(x * k);
      return A::scale(horner<A>(A::fma(x, k, -n), Coefficients<A>::exp2), n);
    }
  };

  static bool aligned(const T* p) { return reinterpret_cast<uintptr_t>(p) % (N * sizeof(T)) == 0; }
  static Ahead between(const T* p, int64_t count) {
    return {reinterpret_cast<const char*>(p), reinterpret_cast<const char*>(p + count)};
  }
};

}  // namespace
}  // namespace DSCT_ISA
}  // namespace dsct
