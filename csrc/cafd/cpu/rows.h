// By rows: a channel's positions side by side.
#pragma once

#include "channels.h"

namespace dsct {
namespace DSCT_ISA {
namespace {

// A lane sum of floats runs over this many elements before it is added to a double.
constexpr int64_t kChunk = 4096;

template <class A, class T>
struct Rows : Channels<A, T> {
  using Base = Channels<A, T>;
  using Base::aligned;
  using Base::between;
  using Base::dense_rows;
  using Base::gather;
  using Base::gradient;
  using Base::inverse_sum;
  using Base::map;
  using Base::maximum;
  using Base::mixed_map;
  using Base::N;
  using Base::pitch;
  using Base::relative;
  using Base::row;
  using Base::scatter;
  using Base::slopes;
  using Base::weight;
  using typename Base::Exponential;
  using typename Base::S;
  using typename Base::Slope;
  using typename Base::V;

  static void moments_rows(const Side& side, int64_t n, int64_t begin, int64_t end, void* scratch) {
    const int64_t count = side.x.H * side.x.W;
    const V lowest = A::set1(S(-__builtin_inf()));
    for (int64_t c = begin; c < end; c++) {
      const T* p = gather(side.x, n, c, static_cast<T*>(scratch));
      V max[4] = {lowest, lowest, lowest, lowest};
      double strength = 0;
      for (int64_t start = 0; start < count; start += kChunk) {
        const int64_t stop = start + kChunk < count ? start + kChunk : count;
        V size[4] = {};
        int64_t i = start;
        for (; i + 4 * N <= stop; i += 4 * N)
          for (int k = 0; k < 4; k++) {
            const V v = A::load(p + i + k * N);
            max[k] = A::max(max[k], v);
            size[k] = size[k] + A::abs(v);
          }
        for (; i + N <= stop; i += N) {
          const V v = A::load(p + i);
          max[0] = A::max(max[0], v);
          size[0] = size[0] + A::abs(v);
        }
        if (i < stop) {
          const int left = static_cast<int>(stop - i);
          const V v = load_n<A>(p + i, left);
          max[1] = A::max(max[1], A::select(A::first(left), v, lowest));
          size[1] = size[1] + A::abs(v);
        }
        strength += static_cast<double>(sum<A>((size[0] + size[1]) + (size[2] + size[3])));
      }
      maximum(side, n)[c] = largest<A>(A::max(A::max(max[0], max[1]), A::max(max[2], max[3])));
      side.strength[n * side.x.C + c] = strength;
    }
  }

  // exp of a row into e, padded with 0. Returns their sum and, given D, the sum of e D.
  struct Sums {
    double e, ed;
  };
  template <bool with_d>
  DSCT_INLINE Sums exp_row(const T* p, int64_t count, S row_max, const Exponential& exponential, Ahead& ahead, S* e,
                           const S* d) {
    const V max = A::set1(row_max);
    Sums sums = {0, 0};
    for (int64_t start = 0; start < count; start += kChunk) {
      const int64_t stop = start + kChunk < count ? start + kChunk : count;
      V se[4] = {}, sed[4] = {};
      const auto add = [&](int64_t i, V y, int k) __attribute__((always_inline)) {
        A::store(e + i, y);
        se[k] = se[k] + y;
        if (with_d) sed[k] = A::fma(y, A::load(d + i), sed[k]);
      };
      int64_t i = start;
      for (; i + 4 * N <= stop; i += 4 * N) {
        fetch(ahead, 4 * N * static_cast<int64_t>(sizeof(T)));
        for (int k = 0; k < 4; k++) add(i + k * N, exponential(A::load(p + i + k * N), max), k);
      }
      for (; i + N <= stop; i += N) add(i, exponential(A::load(p + i), max), 0);
      if (i < stop) {
        const int left = static_cast<int>(stop - i);
        add(i, A::keep(A::first(left), exponential(load_n<A>(p + i, left), max)), 1);
      }
      sums.e += static_cast<double>(sum<A>((se[0] + se[1]) + (se[2] + se[3])));
      if (with_d) sums.ed += static_cast<double>(sum<A>((sed[0] + sed[1]) + (sed[2] + sed[3])));
    }
    return sums;
  }

  template <int rows, bool mixed>
  DSCT_INLINE void add_rows(const S* e, int64_t padded, const S* ka, const S* kb, S* a, S* b) {
    for (int64_t i = 0; i < padded; i += N) {
      V sa = A::load(a + i), sb = {};
      if (mixed) sb = A::load(b + i);
      for (int k = 0; k < rows; k++) {
        const V y = A::load(e + k * padded + i);
        sa = A::fma(y, A::set1(ka[k]), sa);
        if (mixed) sb = A::fma(y, A::set1(kb[k]), sb);
      }
      A::store(a + i, sa);
      if (mixed) A::store(b + i, sb);
    }
  }
  template <int rows>
  static void add_rows(const S* e, int64_t padded, const S* ka, const S* kb, bool mixed, S* a, S* b) {
    if (mixed)
      add_rows<rows, true>(e, padded, ka, kb, a, b);
    else
      add_rows<rows, false>(e, padded, ka, kb, a, b);
  }

  static void attend_rows(const Side& side, int64_t n, int64_t begin, int64_t end, bool mixed, Ahead ahead, void* part,
                          void* scratch) {
    const int64_t count = side.x.H * side.x.W, padded = pitch(count);
    S* e = static_cast<S*>(scratch);
    T* copy = reinterpret_cast<T*>(e + kRows * padded);
    S *a = static_cast<S*>(part), *b = a + padded;
    memset(a, 0, static_cast<size_t>(padded) * sizeof(S) * (mixed ? 2 : 1));
    const Exponential exponential = Exponential::of(side);
    for (int64_t c = begin; c < end; c += kRows) {
      const int rows = static_cast<int>(end - c < kRows ? end - c : kRows);
      S ka[kRows], kb[kRows];
      for (int k = 0; k < rows; k++) {
        const T* p = gather(side.x, n, c + k, copy);
        const double total =
            exp_row<false>(p, count, maximum(side, n)[c + k], exponential, ahead, e + k * padded, nullptr).e;
        inverse_sum(side, n)[c + k] = static_cast<S>(1 / total);
        ka[k] = static_cast<S>(weight(side, n)[c + k] / total);
        kb[k] = ka[k] * relative(side, n)[c + k];
      }
      switch (rows) {
        case 1:
          add_rows<1>(e, padded, ka, kb, mixed, a, b);
          break;
        case 2:
          add_rows<2>(e, padded, ka, kb, mixed, a, b);
          break;
        case 3:
          add_rows<3>(e, padded, ka, kb, mixed, a, b);
          break;
        default:
          add_rows<kRows>(e, padded, ka, kb, mixed, a, b);
      }
    }
  }

  static void join_maps(const Side& side, int64_t n, int64_t begin, int64_t end, bool mixed, const void* parts,
                        int64_t blocks) {
    const int64_t padded = pitch(side.x.H * side.x.W);
    for (int which = 0; which < (mixed ? 2 : 1); which++) {
      const S* from = static_cast<const S*>(parts) + which * padded;
      S* to = which ? mixed_map(side, n) : map(side, n);
      for (int64_t i = begin; i < end; i += N) {
        V total = A::load(from + i);  // parts are padded: a whole vector is there
        for (int64_t k = 1; k < blocks; k++) total = total + A::load(from + k * 2 * padded + i);
        if (i + N <= end)
          A::store(to + i, total);
        else
          store_n<A>(to + i, total, static_cast<int>(end - i));
      }
    }
  }

  static void backward_rows(const Side& side, int64_t n, int64_t begin, int64_t end, const void* centred,
                            const Shared& shared, const Features& out, bool stream, void* scratch) {
    const int64_t count = side.x.H * side.x.W, padded = pitch(count);
    const S* d = static_cast<const S*>(centred);
    S* e = static_cast<S*>(scratch);
    T* copy = reinterpret_cast<T*>(e + padded);
    T* out_copy = copy + padded;
    const Exponential exponential = Exponential::of(side);
    for (int64_t c = begin; c < end; c++) {
      const T* p = gather(side.x, n, c, copy);
      Ahead ahead = c + 1 < end && dense_rows(side.x) ? between(row(side.x, n, c + 1), count) : Ahead{nullptr, nullptr};
      // Both sums over the very same e: their rounding cancels where D is alike everywhere.
      const Sums sums = exp_row<true>(p, count, maximum(side, n)[c], exponential, ahead, e, d);
      const double rho_c = sums.ed / sums.e;
      const Slope slope = slopes(side, n, c, rho_c, shared);
      const V k = A::set1(slope.k), rho = A::set1(static_cast<S>(rho_c)), dg = A::set1(slope.dg);
      const bool direct = dense_rows(out);
      T* to = direct ? row(out, n, c) : out_copy;
      int64_t i = 0;
      if (stream && direct && aligned(to)) {
        for (; i + N <= count; i += N)
          A::stream(to + i, gradient(A::load(p + i), A::load(e + i), A::load(d + i), k, rho, dg));
      } else {
        for (; i + N <= count; i += N)
          A::store(to + i, gradient(A::load(p + i), A::load(e + i), A::load(d + i), k, rho, dg));
      }
      if (i < count) {
        const int left = static_cast<int>(count - i);
        store_n<A>(to + i, gradient(load_n<A>(p + i, left), A::load(e + i), A::load(d + i), k, rho, dg), left);
      }
      if (!direct) scatter(out, n, c, to);
    }
    if (stream) stream_fence();
  }
};

}  // namespace
}  // namespace DSCT_ISA
}  // namespace dsct
