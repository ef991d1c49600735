// CAFD's loops over the features, compiled once per instruction set (common/vec.h). Spec:
//
//     P_{c,i} = softmax_i(F_{c,i} / T)
//     w = softmax_c(r / channel_temperature),  r_c = g_c / mean(g),  g_c = mean_i |F|
//     A_i = sum_c w_c P_{c,i},  B_i = sum_c w_c r_c P_{c,i}
//
// The forward reads a sample twice, the second time from cache. By rows the first read only takes max and |F|, for then
// the weights are known and the second read needs each exp once. By positions a channel's sum of exp is known only
// after a whole read, so both reads take the exp.
#pragma once

#include "args.h"
#include "common/vec_math.h"

namespace dsct {
namespace DSCT_ISA {
namespace {

// A lane sum of floats runs over this many elements before it is added to a double.
constexpr int64_t kChunk = 4096;
// Rows whose exp wait in L2 for their sum, to be added to A and B together: A and B are loaded and stored once for all.
constexpr int kRows = 4;
// Positions whose |F| and e D are summed in floats before they are added to a double.
constexpr int64_t kStep = 64;

// Asks for the next `bytes` of ahead, to L2.
DSCT_INLINE void fetch(Ahead& ahead, int64_t bytes) {
  if (ahead.next >= ahead.end) return;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(ahead.next + i, 0, 2);
  ahead.next += bytes;
}

template <class A, class T>
struct Loops {
  using V = typename A::V;
  using S = typename A::S;
  static constexpr int64_t N = A::N;

  // --- shapes ---

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
    return static_cast<S*>(side.stats) + n * (4 * side.x.C + 2 * side.x.H * side.x.W + 1);
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
      const double k = 1.4426950408889634 / side.spatial_temperature;
      return {A::set1(static_cast<S>(k)), A::set1(static_cast<S>(Coefficients<A>::exp2_low / k))};
    }
    __attribute__((always_inline)) V operator()(V v, V max) const {
      const V x = A::max(lowest, v - max);
      const V n = A::round(x * k);
      return A::scale(horner<A>(A::fma(x, k, -n), Coefficients<A>::exp2), n);
    }
  };

  // --- by rows ---

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

  static bool aligned(const T* p) { return reinterpret_cast<uintptr_t>(p) % (N * sizeof(T)) == 0; }
  static Ahead between(const T* p, int64_t count) {
    return {reinterpret_cast<const char*>(p), reinterpret_cast<const char*>(p + count)};
  }

  // dF of one channel: k e (D - rho) + sign(F) dg. e is exp_row's, p the features (both still in L1 or L2).
  DSCT_INLINE V gradient(V v, V e, V d, V k, V rho, V dg) {
    const V along_sign = A::select(A::lt(v, V{}), -dg, dg);
    return A::fma(k * e, d - rho, A::keep(A::ne(v, V{}), along_sign));
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

  // --- a sample's channels ---

  static void weights(const Side& side, int64_t n) {
    const int64_t C = side.x.C;
    double* g = side.strength + n * C;
    S *w = weight(side, n), *r = relative(side, n);
    double mean = 0;
    for (int64_t c = 0; c < C; c++) mean += g[c];
    mean /= static_cast<double>(C);
    double max = -__builtin_inf();
    for (int64_t c = 0; c < C; c++) {
      g[c] = mean == 0 ? 1 : g[c] / mean;
      r[c] = static_cast<S>(g[c]);
      if (g[c] > max) max = g[c];
    }
    // In double: a temperature of 0.01 multiplies the rounding of r by a hundred.
    const double inv = 1 / side.channel_temperature;
    double total = 0;
    for (int64_t c = 0; c < C; c += F64::N) {
      const int left = static_cast<int>(C - c < F64::N ? C - c : F64::N);
      const F64::V v = left == F64::N ? F64::load(g + c) : load_n<F64>(g + c, left);
      const F64::V y = F64::keep(F64::first(left), exp_nonpositive<F64>((v - F64::set1(max)) * F64::set1(inv)));
      store_n<F64>(g + c, y, left);
      total += sum<F64>(y);
    }
    for (int64_t c = 0; c < C; c++) w[c] = static_cast<S>(g[c] / total);
    *mean_strength(side, n) = static_cast<S>(mean / static_cast<double>(side.x.H * side.x.W));
  }

  static void centre(const Side& side, int64_t n, const void* grad_map, int64_t stride_h, int64_t stride_w,
                     void* centred, Shared* shared) {
    const int64_t H = side.x.H, W = side.x.W, C = side.x.C;
    const S* from = static_cast<const S*>(grad_map);
    const S *a = map(side, n), *b = mixed_map(side, n);
    S* d = static_cast<S*>(centred);
    double total = 0, along = 0, least = __builtin_inf(), most = -__builtin_inf();
    for (int64_t h = 0; h < H; h++)
      for (int64_t w = 0; w < W; w++) {
        const double a_i = a[h * W + w], d_i = from[h * stride_h + w * stride_w];
        total += a_i;
        along += a_i * d_i;
        least = d_i < least ? d_i : least;
        most = d_i > most ? d_i : most;
      }
    // D - rho_c does not change when D is shifted. Where D hardly varies (student and teacher nearly agree) it is
    // shifted to its mean and keeps the digits that matter: 0 where they do agree. Only where no D_i would lose any by
    // that.
    const double mean = along / total;
    const double centre = most - mean < __builtin_fabs(mean) / 2 && mean - least < __builtin_fabs(mean) / 2 ? mean : 0;
    double mean_rho = 0, mixed = 0;
    for (int64_t h = 0; h < H; h++)
      for (int64_t w = 0; w < W; w++) {
        const int64_t i = h * W + w;
        d[i] = static_cast<S>(static_cast<double>(from[h * stride_h + w * stride_w]) - centre);
        mean_rho += static_cast<double>(a[i]) * d[i];
        mixed += static_cast<double>(b[i]) * d[i];
      }
    for (int64_t i = H * W; i < pitch(H * W); i++) d[i] = 0;
    double wr = 0;
    for (int64_t c = 0; c < C; c++) wr += static_cast<double>(weight(side, n)[c]) * relative(side, n)[c];
    shared->mean_rho = mean_rho;
    shared->mean_sr = (mixed - mean_rho * wr) / (side.channel_temperature * static_cast<double>(C));
  }

  // What multiplies e (D - rho) and sign(F) in a channel.
  struct Slope {
    S k, dg;
  };
  DSCT_INLINE Slope slopes(const Side& side, int64_t n, int64_t c, double rho, const Shared& shared) {
    const double w = weight(side, n)[c];
    const double s = w / side.channel_temperature * (rho - shared.mean_rho);
    const double mean = *mean_strength(side, n);
    const double dg = mean == 0 ? 0 : (s - shared.mean_sr) / mean / static_cast<double>(side.x.H * side.x.W);
    return {static_cast<S>(w * inverse_sum(side, n)[c] / side.spatial_temperature), static_cast<S>(dg)};
  }

  // --- by positions ---

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

  static constexpr CafdLoops table() {
    return {sizeof(S),     pitch,         moments_bytes, scratch,           moments_rows, moments_positions,
            join_moments,  weights,       attend_rows,   attend_positions,  join_maps,    centre,
            backward_rows, rho_positions, join_rho,      backward_positions};
  }
};

// a~ log(a~ / b~) - a~ + b~: the last two sum to 0, and with them no term is negative and a rounding of b near a costs
// nothing. In double: there are only H W of these, beside C H W features.
template <class TA, class TB, class TG>
double divergence_of(const TA* teacher, const TB* student, int64_t count, int64_t positions, double scale, TG* grad) {
  constexpr double kEps = 1e-6;
  using V = F64::V;
  const V keep = F64::set1(1 - kEps), floor = F64::set1(kEps / static_cast<double>(positions));
  const V slope = F64::set1(-(1 - kEps) * scale);
  double total = 0;
  for (int64_t i = 0; i < count; i += F64::N) {
    const int left = static_cast<int>(count - i < F64::N ? count - i : F64::N);
    const bool whole = left == F64::N;
    const V a = F64::fma(whole ? F64::load(teacher + i) : load_n<F64>(teacher + i, left), keep, floor);
    const V b = F64::fma(whole ? F64::load(student + i) : load_n<F64>(student + i, left), keep, floor);
    const V ratio = a / b;
    const V term = F64::fma(a, log<F64>(ratio), b - a);
    total += sum<F64>(whole ? term : F64::keep(F64::first(left), term));
    if (grad == nullptr) continue;
    if (whole)
      F64::store(grad + i, ratio * slope);
    else
      store_n<F64>(grad + i, ratio * slope, left);
  }
  return total;
}

inline double divergence(const void* teacher, bool teacher_double, const void* student, bool student_double,
                         int64_t count, int64_t positions, double scale, void* grad, bool grad_double) {
  const float *tf = static_cast<const float*>(teacher), *sf = static_cast<const float*>(student);
  const double *td = static_cast<const double*>(teacher), *sd = static_cast<const double*>(student);
  if (grad_double) {
    double* g = static_cast<double*>(grad);
    if (teacher_double && student_double) return divergence_of(td, sd, count, positions, scale, g);
    if (teacher_double) return divergence_of(td, sf, count, positions, scale, g);
    if (student_double) return divergence_of(tf, sd, count, positions, scale, g);
    return divergence_of(tf, sf, count, positions, scale, g);
  }
  float* g = static_cast<float*>(grad);
  if (teacher_double && student_double) return divergence_of(td, sd, count, positions, scale, g);
  if (teacher_double) return divergence_of(td, sf, count, positions, scale, g);
  if (student_double) return divergence_of(tf, sd, count, positions, scale, g);
  return divergence_of(tf, sf, count, positions, scale, g);
}

constexpr CafdKernels kernels = {
    {Loops<F32, f16>::table(), Loops<F32, bf16>::table(), Loops<F32, float>::table(), Loops<F64, double>::table()},
    divergence};

}  // namespace
}  // namespace DSCT_ISA
}  // namespace dsct
