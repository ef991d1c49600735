// By positions: a position's channels side by side.
#pragma once

#include "channels.h"

namespace dsct {
namespace DSCT_ISA {
namespace {

// Positions whose |F| and e D are summed in floats before they are added to a double.
constexpr int64_t kStep = 64;

template <class A, class T>
struct Positions : Channels<A, T> {
  using Base = Channels<A, T>;
  using Base::aligned;
  using Base::between;
  using Base::gradient;
  using Base::inverse_sum;
  using Base::map;
  using Base::maximum;
  using Base::mixed_map;
  using Base::moments_bytes;
  using Base::N;
  using Base::pitch;
  using Base::relative;
  using Base::slopes;
  using Base::weight;
  using typename Base::Exponential;
  using typename Base::S;
  using typename Base::Slope;
  using typename Base::V;

  template <bool value>
  struct Flag {
    static constexpr bool whole = value;
  };
  // body(c, left, Flag): every vector of channels, the last one perhaps not whole.
  template <class Body>
  DSCT_INLINE void for_channels(int64_t C, const Body& body) {
    int64_t c = 0;
    for (; c + N <= C; c += N) body(c, static_cast<int>(N), Flag<true>{});
    if (c < C) body(c, static_cast<int>(C - c), Flag<false>{});
  }
  template <bool whole>
  DSCT_INLINE V load_channels(const T* p, int left) {
    return whole ? A::load(p) : load_n<A>(p, left);
  }
  // Where each of these positions begins: a division a position, not one a look.
  static T** locate(const Features& x, int64_t n, int64_t begin, int64_t end, void* to) {
    T** at = static_cast<T**>(to);
    T* sample = static_cast<T*>(x.data) + n * x.stride_n;
    for (int64_t i = begin; i < end; i++) at[i - begin] = sample + (i / x.W) * x.stride_h + (i % x.W) * x.stride_w;
    return at;
  }

  // The bytes of positions [begin, end), if they lie in one piece.
  static Ahead between(const T* const* at, int64_t begin, int64_t end, int64_t C) {
    if (begin >= end || at[end - 1] - at[begin] != (end - 1 - begin) * C) return {nullptr, nullptr};
    return between(at[begin], (end - begin) * C);
  }

  static void moments_positions(const Side& side, int64_t n, int64_t begin, int64_t end, void* part, void* scratch) {
    const int64_t C = side.x.C, padded = pitch(C);
    S *max = static_cast<S*>(part), *total = max + padded;
    double* size = reinterpret_cast<double*>(total + padded);
    S *block_max = static_cast<S*>(scratch), *block_size = block_max + padded;
    const T* const* at = locate(side.x, n, begin, end, block_size + padded);
    const Exponential exponential = Exponential::of(side);
    const V lowest = A::set1(S(-__builtin_inf()));
    for (int64_t c = 0; c < padded; c += N) {
      A::store(max + c, lowest);
      A::store(total + c, V{});
    }
    for (int64_t c = 0; c < padded; c++) size[c] = 0;
    // Blocks small enough that the second look at one, for the exp, finds it in L2, and short enough for float sums.
    int64_t step = int64_t(128 * 1024) / (C * static_cast<int64_t>(sizeof(T))) / 4 * 4;
    step = step < 4 ? 4 : step > kStep ? kStep : step;
    for (int64_t start = 0; start < end - begin; start += step) {
      const int64_t stop = start + step < end - begin ? start + step : end - begin;
      for (int64_t c = 0; c < padded; c += N) {
        A::store(block_max + c, lowest);
        A::store(block_size + c, V{});
      }
      int64_t i = start;
      for (; i + 4 <= stop; i += 4) {
        const T *p0 = at[i], *p1 = at[i + 1], *p2 = at[i + 2], *p3 = at[i + 3];
        for_channels(C, [&](int64_t c, int left, auto flag) __attribute__((always_inline)) {
          constexpr bool whole = decltype(flag)::whole;
          const V v0 = load_channels<whole>(p0 + c, left), v1 = load_channels<whole>(p1 + c, left),
                  v2 = load_channels<whole>(p2 + c, left), v3 = load_channels<whole>(p3 + c, left);
          A::store(block_max + c, A::max(A::load(block_max + c), A::max(A::max(v0, v1), A::max(v2, v3))));
          A::store(block_size + c, A::load(block_size + c) + ((A::abs(v0) + A::abs(v1)) + (A::abs(v2) + A::abs(v3))));
        });
      }
      for (; i < stop; i++) {
        const T* p = at[i];
        for_channels(C, [&](int64_t c, int left, auto flag) __attribute__((always_inline)) {
          const V v = load_channels<decltype(flag)::whole>(p + c, left);
          A::store(block_max + c, A::max(A::load(block_max + c), v));
          A::store(block_size + c, A::load(block_size + c) + A::abs(v));
        });
      }
      // Memory brings the next block while this one computes.
      Ahead ahead = between(at, stop, stop + step < end - begin ? stop + step : end - begin, C);
      for_channels(C, [&](int64_t c, int left, auto flag) __attribute__((always_inline)) {
        constexpr bool whole = decltype(flag)::whole;
        const V before = A::load(max + c), now = A::max(before, A::load(block_max + c));
        V acc[4] = {};  // short chains of additions: the sum of exp needs its digits
        int64_t j = start;
        for (; j + 4 <= stop; j += 4) {
          fetch(ahead, 4 * N * static_cast<int64_t>(sizeof(T)));
          for (int k = 0; k < 4; k++) acc[k] = acc[k] + exponential(load_channels<whole>(at[j + k] + c, left), now);
        }
        for (; j < stop; j++) acc[0] = acc[0] + exponential(load_channels<whole>(at[j] + c, left), now);
        A::store(total + c,
                 A::fma(A::load(total + c), exponential(before, now), (acc[0] + acc[1]) + (acc[2] + acc[3])));
        A::store(max + c, now);
      });
      for (int64_t c = 0; c < padded; c++) size[c] += block_size[c];
    }
  }

  static void join_moments(const Side& side, int64_t n, const void* parts, int64_t blocks) {
    const int64_t C = side.x.C, padded = pitch(C);
    const S* part = static_cast<const S*>(parts);
    const int64_t stride = moments_bytes(side.x) / static_cast<int64_t>(sizeof(S));
    const Exponential exponential = Exponential::of(side);
    for (int64_t c = 0; c < padded; c += N) {
      V max = A::load(part + c);
      for (int64_t k = 1; k < blocks; k++) max = A::max(max, A::load(part + k * stride + c));
      V total = {};
      double size[N] = {};
      for (int64_t k = 0; k < blocks; k++) {
        const S* p = part + k * stride;
        total = A::fma(A::load(p + padded + c), exponential(A::load(p + c), max), total);
        const double* block_size = reinterpret_cast<const double*>(p + 2 * padded) + c;
        for (int64_t lane = 0; lane < N; lane++) size[lane] += block_size[lane];
      }
      const int left = static_cast<int>(C - c < N ? C - c : N);
      store_n<A>(maximum(side, n) + c, max, left);
      store_n<A>(inverse_sum(side, n) + c, A::set1(S(1)) / total, left);
      for (int lane = 0; lane < left; lane++) side.strength[n * C + c + lane] = size[lane];
    }
  }

  // A row of stats, padded with 0 to whole vectors.
  static void pad(const S* from, int64_t count, S* to) {
    memcpy(to, from, static_cast<size_t>(count) * sizeof(S));
    for (int64_t c = count; c < pitch(count); c++) to[c] = 0;
  }

  // A and B of some positions: channels along the lanes, so one sum across them each at the end.
  template <int positions, bool mixed>
  DSCT_INLINE void attend(const T* const* at, int64_t C, const Exponential& exponential, const S* max, const S* ka,
                          const S* kb, Ahead& ahead, S* to_a, S* to_b) {
    const T* p[positions];
    for (int k = 0; k < positions; k++) p[k] = at[k];
    V a[positions] = {}, b[positions] = {};
    for_channels(C, [&](int64_t c, int left, auto flag) __attribute__((always_inline)) {
      const V m = A::load(max + c), wa = A::load(ka + c), wb = mixed ? A::load(kb + c) : V{};
      fetch(ahead, positions * N * static_cast<int64_t>(sizeof(T)));
      for (int k = 0; k < positions; k++) {
        const V y = exponential(load_channels<decltype(flag)::whole>(p[k] + c, left), m);
        a[k] = A::fma(y, wa, a[k]);
        if (mixed) b[k] = A::fma(y, wb, b[k]);
      }
    });
    for (int k = 0; k < positions; k++) {
      to_a[k] = sum<A>(a[k]);
      if (mixed) to_b[k] = sum<A>(b[k]);
    }
  }
  template <bool mixed>
  static void attend_positions(const Side& side, int64_t n, int64_t begin, int64_t end, Ahead ahead, void* scratch) {
    const int64_t C = side.x.C, padded = pitch(C);
    S *max = static_cast<S*>(scratch), *ka = max + padded, *kb = ka + padded;
    const T* const* at = locate(side.x, n, begin, end, kb + padded);
    const Exponential exponential = Exponential::of(side);
    pad(maximum(side, n), C, max);
    pad(weight(side, n), C, ka);
    pad(relative(side, n), C, kb);
    for (int64_t c = 0; c < C; c++) {
      ka[c] *= inverse_sum(side, n)[c];
      kb[c] *= ka[c];
    }
    S *a = map(side, n), *b = mixed_map(side, n);
    int64_t i = begin;
    for (; i + 4 <= end; i += 4) attend<4, mixed>(at + (i - begin), C, exponential, max, ka, kb, ahead, a + i, b + i);
    for (; i < end; i++) attend<1, mixed>(at + (i - begin), C, exponential, max, ka, kb, ahead, a + i, b + i);
  }
  static void attend_positions(const Side& side, int64_t n, int64_t begin, int64_t end, bool mixed, Ahead ahead,
                               void* scratch) {
    if (mixed)
      attend_positions<true>(side, n, begin, end, ahead, scratch);
    else
      attend_positions<false>(side, n, begin, end, ahead, scratch);
  }

  template <int positions>
  DSCT_INLINE void add_rho(const T* const* at, int64_t C, const Exponential& exponential, const S* d, const S* max,
                           S* sum_e, S* sum_ed, Ahead& ahead) {
    const T* p[positions];
    V along[positions];
    for (int k = 0; k < positions; k++) {
      p[k] = at[k];
      along[k] = A::set1(d[k]);
    }
    for_channels(C, [&](int64_t c, int left, auto flag) __attribute__((always_inline)) {
      const V m = A::load(max + c);
      fetch(ahead, positions * N * static_cast<int64_t>(sizeof(T)));
      V e[positions], ed[positions];
      for (int k = 0; k < positions; k++) {
        e[k] = exponential(load_channels<decltype(flag)::whole>(p[k] + c, left), m);
        ed[k] = e[k] * along[k];
      }
      for (int half = positions / 2; half > 0; half /= 2)  // pairwise: rho needs its digits
        for (int k = 0; k < half; k++) {
          e[k] = e[k] + e[k + half];
          ed[k] = ed[k] + ed[k + half];
        }
      A::store(sum_e + c, A::load(sum_e + c) + e[0]);
      A::store(sum_ed + c, A::load(sum_ed + c) + ed[0]);
    });
  }

  static void rho_positions(const Side& side, int64_t n, int64_t begin, int64_t end, const void* centred, void* part,
                            void* scratch) {
    const int64_t C = side.x.C, padded = pitch(C);
    S *max = static_cast<S*>(scratch), *sum_e = max + padded, *sum_ed = sum_e + padded;
    double *total_e = static_cast<double*>(part), *total_ed = total_e + C;
    const T* const* at = locate(side.x, n, begin, end, sum_ed + padded);
    const Exponential exponential = Exponential::of(side);
    const S* d = static_cast<const S*>(centred);
    pad(maximum(side, n), C, max);
    for (int64_t c = 0; c < 2 * C; c++) total_e[c] = 0;
    for (int64_t start = begin; start < end; start += kStep) {
      const int64_t stop = start + kStep < end ? start + kStep : end;
      Ahead ahead = between(at, stop - begin, (stop + kStep < end ? stop + kStep : end) - begin, C);
      memset(sum_e, 0, static_cast<size_t>(2 * padded) * sizeof(S));
      int64_t i = start;
      for (; i + 4 <= stop; i += 4) add_rho<4>(at + (i - begin), C, exponential, d + i, max, sum_e, sum_ed, ahead);
      for (; i < stop; i++) add_rho<1>(at + (i - begin), C, exponential, d + i, max, sum_e, sum_ed, ahead);
      for (int64_t c = 0; c < C; c++) {
        total_e[c] += sum_e[c];
        total_ed[c] += sum_ed[c];
      }
    }
  }

  static void join_rho(const Side& side, const void* parts, int64_t blocks, double* rho) {
    const int64_t C = side.x.C;
    const double* part = static_cast<const double*>(parts);
    for (int64_t c = 0; c < C; c++) {
      double e = 0, ed = 0;
      for (int64_t k = 0; k < blocks; k++) {
        e += part[k * 2 * C + c];
        ed += part[k * 2 * C + C + c];
      }
      rho[c] = ed / e;
    }
  }

  template <int positions, bool stream>
  DSCT_INLINE void differentiate(const T* const* at, T* const* to, int64_t C, const Exponential& exponential,
                                 const S* d, const S* max, const S* k, const S* rho, const S* dg) {
    const T* p[positions];
    T* q[positions];
    V vd[positions];
    for (int j = 0; j < positions; j++) {
      p[j] = at[j];
      q[j] = to[j];
      vd[j] = A::set1(d[j]);
    }
    for_channels(C, [&](int64_t c, int left, auto flag) __attribute__((always_inline)) {
      constexpr bool whole = decltype(flag)::whole;
      const V vm = A::load(max + c), vk = A::load(k + c), vrho = A::load(rho + c), vdg = A::load(dg + c);
      for (int j = 0; j < positions; j++) {
        const V v = load_channels<whole>(p[j] + c, left);
        const V y = gradient(v, exponential(v, vm), vd[j], vk, vrho, vdg);
        if (whole && stream)
          A::stream(q[j] + c, y);
        else if (whole)
          A::store(q[j] + c, y);
        else
          store_n<A>(q[j] + c, y, left);
      }
    });
  }

  static void backward_positions(const Side& side, int64_t n, int64_t begin, int64_t end, const void* centred,
                                 const double* rho_in, const Shared& shared, const Features& out, bool stream,
                                 void* scratch) {
    const int64_t C = side.x.C, padded = pitch(C);
    S *max = static_cast<S*>(scratch), *rho = max + padded, *k = rho + padded, *dg = k + padded;
    const T* const* at = locate(side.x, n, begin, end, dg + padded);
    T* const* to = locate(out, n, begin, end, dg + padded + (end - begin) * sizeof(T*) / sizeof(S));
    const Exponential exponential = Exponential::of(side);
    pad(maximum(side, n), C, max);
    for (int64_t c = 0; c < padded; c++) {
      const Slope slope = c < C ? slopes(side, n, c, rho_in[c], shared) : Slope{0, 0};
      k[c] = slope.k;
      dg[c] = slope.dg;
      rho[c] = c < C ? static_cast<S>(rho_in[c]) : S(0);
    }
    const S* d = static_cast<const S*>(centred);
    int64_t i = begin;
    for (; i + 4 <= end; i += 4) {
      const int64_t j = i - begin;
      if (stream && aligned(to[j]) && aligned(to[j + 1]) && aligned(to[j + 2]) && aligned(to[j + 3]))
        differentiate<4, true>(at + j, to + j, C, exponential, d + i, max, k, rho, dg);
      else
        differentiate<4, false>(at + j, to + j, C, exponential, d + i, max, k, rho, dg);
    }
    for (; i < end; i++)
      differentiate<1, false>(at + (i - begin), to + (i - begin), C, exponential, d + i, max, k, rho, dg);
    if (stream) stream_fence();
  }
};

}  // namespace
}  // namespace DSCT_ISA
}  // namespace dsct
