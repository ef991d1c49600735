// The loops of matched CAFD, compiled once per instruction set (common/vec.h). Per sample and channel, x = z / T:
//
//     KL(P^T || P^S) = sum_i P^T_i (x^T_i - x^S_i) - log(Z^T / Z^S)
//     gradient       = T w (P^S - P^T)
//
// Floor: the forward reads s and t once from memory and takes two exps an element; so does the backward, which writes
// g. Positions are cut into blocks that stay in a near cache for their second walk: the first takes the maxima, the
// second the sums against these, and `join` brings the sums of all blocks, in double, to the maxima of the row. That
// way one read of memory does in both layouts, whatever the size of the map.
//
// Differences are taken against maxima, so that magnitudes cost no digits. k = log2(e) / T is rounded to the loops'
// type once and used everywhere, `join` included: what comes out is the exact formula at a temperature 1e-8 beside T,
// while a k of its own for any part would not cancel where the networks agree.
//
// -inf pads whatever is no whole vector: it has no mass in either network. Nor has what a mask leaves out: it becomes
// -inf as it is loaded, for a mask of scattered cells that is applied to a copy takes several times what the exps do.
#pragma once

#include "common/vec_math.h"
#include "matched_args.h"

namespace dsct {
namespace DSCT_ISA {
namespace {

constexpr double kInfinity = __builtin_inf();

template <class A>
struct Matched {
  using V = typename A::V;
  using S = typename A::S;
  using D = F64;
  using W = F64::V;
  static constexpr int64_t N = A::N;
  static constexpr int64_t kChunk = 2048;   // positions of a row in one block: both networks' fit into L1
  static constexpr int64_t kTile = 128;     // channels that are walked together where they lie side by side
  static constexpr int64_t kRows = 128;     // positions of such a block: what a lane sums before it meets a double
  static constexpr int64_t kPeriod = 4096;  // most lanes that the backward walks before channel 0 is in lane 0 again
  static constexpr int64_t kAhead = 1024 / sizeof(S);  // how far the backward asks memory ahead

  static int64_t round_up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }
  static int64_t pitch(int64_t count) { return round_up(count, N); }
  static int64_t pitch_c(int64_t C) { return round_up(C, 16); }
  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

  static S k_of(const MatchedMaps& m) { return static_cast<S>(std::numbers::log2e / m.temperature); }

  // 2^(k x) for x <= 0. The product less a whole number: the fma makes that exact.
  struct Exponential {
    V k, lowest;
#if defined(DSCT_ISA_AVX512)
    static constexpr S kLowest = Coefficients<A>::exp2_low;
#else
    static constexpr S kLowest = -A::bias;  // comes out as 0, as in exp2_nonpositive
#endif
    DSCT_INLINE Exponential of(const MatchedMaps& m) {
      const S k = k_of(m);
      return {A::set1(k), A::set1(kLowest / k)};
    }
    __attribute__((always_inline)) V operator()(V x) const {
      x = A::max(lowest, x);  // hands a NaN in x on
      const V n = A::round(x * k);
      const V y = horner<A>(A::fma(x, k, -n), Coefficients<A>::exp2);
#if defined(DSCT_ISA_AVX512)
      return A::scale(y, n);
#else
      return y * A::power(A::to_int(n));
#endif
    }
  };

  // --- numbers of any type, as S ---

  template <class T>
  static void widen(const T* p, int64_t count, S* to) {
    int64_t i = 0;
    for (; i + N <= count; i += N) A::store(to + i, A::load(p + i));
    if (i < count) {
      const int left = static_cast<int>(count - i);
      A::store(to + i, A::select(A::first(left), load_n<A>(p + i, left), A::set1(S(-kInfinity))));
    }
  }
  // The same where another vector's worth of numbers comes after them: a tail that need not be copied.
  template <class T>
  static void widen_within(const T* p, int64_t count, S* to) {
    int64_t i = 0;
    for (; i + N <= count; i += N) A::store(to + i, A::load(p + i));
    if (i < count)
      A::store(to + i, A::select(A::first(static_cast<int>(count - i)), A::load(p + i), A::set1(S(-kInfinity))));
  }
  template <class T>
  static void narrow(const S* from, int64_t count, T* p) {
    int64_t i = 0;
    for (; i + N <= count; i += N) A::store(p + i, A::load(from + i));
    if (i < count) store_n<A>(p + i, A::load(from + i), static_cast<int>(count - i));
  }

  // Calls f with a typed pointer to element `at`.
  template <class F>
  DSCT_INLINE void typed(void* data, FloatType type, int64_t at, const F& f) {
    switch (type) {
      case FloatType::kF16:
        return f(static_cast<f16*>(data) + at);
      case FloatType::kBF16:
        return f(static_cast<bf16*>(data) + at);
      case FloatType::kF32:
        return f(static_cast<float*>(data) + at);
      default:
        if constexpr (sizeof(S) == sizeof(double)) return f(static_cast<double*>(data) + at);
    }
  }
  static bool as_is(FloatType type) {
    return type == (sizeof(S) == sizeof(double) ? FloatType::kF64 : FloatType::kF32);
  }

  // `count` numbers that lie side by side: in place where they are whole vectors of S, else in copy, padded.
  static const S* run(const Features& x, FloatType type, int64_t at, int64_t count, S* copy) {
    if (as_is(type) && count % N == 0) return static_cast<const S*>(x.data) + at;
    typed(x.data, type, at, [&](const auto* p) { widen(p, count, copy); });
    return copy;
  }
  static void put_run(const Features& x, FloatType type, int64_t at, int64_t count, const S* from) {
    if (as_is(type) && static_cast<const S*>(x.data) + at == from) return;
    typed(x.data, type, at, [&](auto* p) { narrow(from, count, p); });
  }

  static bool dense_rows(const Features& x) { return (x.W == 1 || x.stride_w == 1) && (x.H == 1 || x.stride_h == x.W); }

  // The same of a channel's positions from `first` on, wherever they lie.
  static const S* row(const Features& x, FloatType type, int64_t n, int64_t c, int64_t first, int64_t count, S* copy) {
    const int64_t at = n * x.stride_n + c * x.stride_c;
    if (dense_rows(x)) return run(x, type, at + first, count, copy);
    typed(x.data, type, at, [&](const auto* p) {
      each_position(x, first, count, [&](int64_t i, int64_t offset) { copy[i] = static_cast<S>(to_float(p[offset])); });
    });
    for (int64_t i = count; i < pitch(count); i++) copy[i] = S(-kInfinity);
    return copy;
  }
  static void put_row(const Features& x, FloatType type, int64_t n, int64_t c, int64_t first, int64_t count,
                      const S* from) {
    const int64_t at = n * x.stride_n + c * x.stride_c;
    if (dense_rows(x)) return put_run(x, type, at + first, count, from);
    typed(x.data, type, at, [&](auto* p) {
      each_position(x, first, count, [&](int64_t i, int64_t offset) { from_float(from[i], p + offset); });
    });
  }
  template <class F>
  DSCT_INLINE void each_position(const Features& x, int64_t first, int64_t count, const F& f) {
    int64_t h = first / x.W, w = first % x.W;
    for (int64_t i = 0; i < count; i++) {
      f(i, h * x.stride_h + w * x.stride_w);
      if (++w == x.W) w = 0, h++;
    }
  }

  // --- what counts ---

  // The mask of `count` positions, or nullptr where all of them count. Most maps have few that do not, and those in one
  // place.
  static const bool* mask_of(const MatchedMaps& m, int64_t n, int64_t first, int64_t count) {
    if (m.mask == nullptr) return nullptr;
    const bool* mask = m.mask + n * m.student.H * m.student.W + first;
    constexpr uint64_t kAll = 0x0101010101010101;
    int64_t i = 0;
    for (uint64_t eight; i + 8 <= count; i += 8) {
      memcpy(&eight, mask + i, sizeof(eight));
      if (eight != kAll) return mask;
    }
    while (i < count && mask[i]) i++;
    return i < count ? mask : nullptr;
  }
  // The same, of which whole vectors can be read.
  static const bool* padded_mask(const MatchedMaps& m, int64_t n, int64_t first, int64_t count, bool* copy) {
    const bool* mask = mask_of(m, n, first, count);
    if (mask == nullptr || count % N == 0) return mask;
    memcpy(copy, mask, static_cast<size_t>(count));
    for (int64_t i = count; i < pitch(count); i++) copy[i] = true;
    return copy;
  }
  // Each position `times` over, up to `to` numbers: what counts where a position's channels lie side by side. Writes up
  // to kSpreadBeyond bytes more.
  static constexpr int64_t kSpreadBeyond = 8;
  static const bool* spread(const bool* mask, int64_t count, int64_t times, int64_t to, bool* copy) {
    if (mask == nullptr) return nullptr;
    for (int64_t p = 0; p < count; p++) {
      const uint64_t eight = mask[p] ? 0x0101010101010101 : 0;
      for (int64_t i = 0; i < times; i += 8) memcpy(copy + p * times + i, &eight, sizeof(eight));
    }
    for (int64_t i = count * times; i < to; i++) copy[i] = true;
    return copy;
  }

  DSCT_INLINE V no_mass() { return A::set1(S(-kInfinity)); }

  // One vector of a block, number i of it: as it is, or -inf where it does not count.
  struct All {
    const bool* counts = nullptr;
    __attribute__((always_inline)) V operator()(const S* p, int64_t) const { return A::load(p); }
  };
  struct Some {
    const bool* counts;
    __attribute__((always_inline)) V operator()(const S* p, int64_t i) const {
      return A::select(lanes(counts + i), A::load(p), no_mass());
    }
    DSCT_INLINE typename A::M lanes(const bool* p) {
#if defined(DSCT_ISA_AVX512)
      const __m128i bytes = N == 16 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))
                                    : _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
      return static_cast<typename A::M>(_mm_test_epi8_mask(bytes, bytes));
#else
      typedef int8_t Bytes __attribute__((vector_size(N)));
      Bytes bytes;
      memcpy(&bytes, p, sizeof(bytes));
      return __builtin_convertvector(bytes, typename A::I) != 0;
#endif
    }
  };

  // --- what is read next ---

  // The second walk of a block computes and the first walk of the next one waits for memory: the one fetches for the
  // other. Hardware would do it, but stops at the end of every page of 4 KiB.
  struct Next {
    const char* p;
    int64_t size;  // of an element; 0: nothing comes next
    DSCT_INLINE Next of(const Features& x, FloatType type, int64_t at) {
      const int64_t size = size_of(type);
      return {static_cast<const char*>(x.data) + at * size, size};
    }
    DSCT_INLINE Next none() { return {nullptr, 0}; }
    __attribute__((always_inline)) void fetch(int64_t elements) {
      for (int64_t i = 0; i < elements * size; i += 64) prefetch_l2(p + i);
      p += elements * size;
    }
  };

  // --- one vector of both networks ---

  // What to take from the numbers of a block whose maximum this is: 0 if all of them are -inf.
  DSCT_INLINE V base(V max) { return A::select(A::eq(max, no_mass()), V{}, max); }

  struct Sums {
    V teacher, student, cross, strength;
    DSCT_INLINE Sums zero() { return {V{}, V{}, V{}, V{}}; }
    __attribute__((always_inline)) void add(V t, V s, V base_t, V base_s, const Exponential& exponential) {
      const V xt = t - base_t, xs = s - base_s;
      const V et = exponential(xt);
      teacher = teacher + et;
      student = student + exponential(xs);
      cross = fma_where<A>(A::ne(et, V{}), et, xt - xs, cross);  // 0 log 0 = 0; a NaN is no 0
      strength = strength + A::keep(A::ne(t, no_mass()), A::abs(t));
    }
    __attribute__((always_inline)) void add(const Sums& o) {
      teacher = teacher + o.teacher, student = student + o.student;
      cross = cross + o.cross, strength = strength + o.strength;
    }
  };

  // --- forward, a channel's positions side by side ---

  static Next next_row(const Features& x, FloatType type, int64_t n, int64_t c, int64_t end, int64_t first) {
    if (c >= end || !dense_rows(x)) return Next::none();
    return Next::of(x, type, n * x.stride_n + c * x.stride_c + first);
  }

  static void part_rows(const MatchedMaps& m, int64_t n, int64_t begin, int64_t end, int64_t first, int64_t count,
                        double* part, void* scratch) {
    const bool* mask = padded_mask(m, n, first, count, reinterpret_cast<bool*>(static_cast<S*>(scratch) + 3 * kChunk));
    if (mask == nullptr)
      part_rows_of(m, n, begin, end, first, count, All{}, part, static_cast<S*>(scratch));
    else
      part_rows_of(m, n, begin, end, first, count, Some{mask}, part, static_cast<S*>(scratch));
  }
  template <class X>
  static void part_rows_of(const MatchedMaps& m, int64_t n, int64_t begin, int64_t end, int64_t first, int64_t count,
                           const X x, double* part, S* copy) {
    const Exponential exponential = Exponential::of(m);
    const int64_t padded = pitch(count), field = pitch_c(m.student.C);
    for (int64_t c = begin; c < end; c++) {
      const S* t = row(m.teacher, m.teacher_type, n, c, first, count, copy);
      const S* s = row(m.student, m.student_type, n, c, first, count, copy + padded);
      V mt[2] = {no_mass(), no_mass()}, ms[2] = {no_mass(), no_mass()};
      int64_t i = 0;
      for (; i + 2 * N <= padded; i += 2 * N)
        for (int k = 0; k < 2; k++) {
          mt[k] = A::max(mt[k], x(t + i + k * N, i + k * N));
          ms[k] = A::max(ms[k], x(s + i + k * N, i + k * N));
        }
      if (i < padded) mt[0] = A::max(mt[0], x(t + i, i)), ms[0] = A::max(ms[0], x(s + i, i));
      const S max_t = largest<A>(A::max(mt[0], mt[1])), max_s = largest<A>(A::max(ms[0], ms[1]));
      const V bt = base(A::set1(max_t)), bs = base(A::set1(max_s));
      Sums a = Sums::zero(), b = Sums::zero();
      Next next_t = next_row(m.teacher, m.teacher_type, n, c + 1, end, first);
      Next next_s = next_row(m.student, m.student_type, n, c + 1, end, first);
      for (i = 0; i + 2 * N <= padded; i += 2 * N) {
        next_t.fetch(2 * N);
        next_s.fetch(2 * N);
        a.add(x(t + i, i), x(s + i, i), bt, bs, exponential);
        b.add(x(t + i + N, i + N), x(s + i + N, i + N), bt, bs, exponential);
      }
      if (i < padded) a.add(x(t + i, i), x(s + i, i), bt, bs, exponential);
      a.add(b);
      part[kTeacherMax * field + c] = static_cast<double>(max_t);
      part[kStudentMax * field + c] = static_cast<double>(max_s);
      part[kTeacherSum * field + c] = static_cast<double>(sum<A>(a.teacher));
      part[kStudentSum * field + c] = static_cast<double>(sum<A>(a.student));
      part[kCross * field + c] = static_cast<double>(sum<A>(a.cross));
      part[kStrength * field + c] = static_cast<double>(sum<A>(a.strength));
    }
  }

  // --- forward, a position's channels side by side: a lane is a channel ---

  static int64_t lcm_with_vector(int64_t C) {
    int64_t g = N;
    while (C % g != 0) g /= 2;  // N is a power of 2
    return C / g * N;
  }
  // With few channels, lanes go through several positions, until channel 0 comes to lane 0 again: no lane is idle.
  static bool few(int64_t C) { return C < 4 * N; }
  static int64_t tile(int64_t C) {
    if (few(C)) return lcm_with_vector(C);
    const int64_t tiles = (C + kTile - 1) / kTile;
    return pitch((C + tiles - 1) / tiles);
  }
  static int64_t block(const MatchedMaps& m, bool by_positions) {
    if (!by_positions) return kChunk;
    const int64_t C = m.student.C;
    return few(C) ? tile(C) / C * kRows : kRows;
  }

  // `rows` runs of `lanes` numbers, of `last` in the last one, each `stride` after the one before: in place, or in
  // copy.
  static const S* runs(const Features& x, FloatType type, int64_t at, int64_t rows, int64_t lanes, int64_t last,
                       int64_t stride, S* copy, int64_t* row_stride) {
    *row_stride = stride;
    if (as_is(type) && lanes % N == 0 && last == lanes) return static_cast<const S*>(x.data) + at;
    *row_stride = pitch(lanes);
    typed(x.data, type, at, [&](const auto* p) {
      for (int64_t r = 0; r + 1 < rows; r++) widen_within(p + r * stride, lanes, copy + r * pitch(lanes));
      widen(p + (rows - 1) * stride, last, copy + (rows - 1) * pitch(lanes));
    });
    for (int64_t i = pitch(last); i < pitch(lanes); i++) copy[(rows - 1) * pitch(lanes) + i] = S(-kInfinity);
    return copy;
  }

  // Lanes of one channel take the largest of their maxima, so that their sums can be added up.
  static void share_maximum(S* max, int64_t C, int64_t width) {
    for (int64_t j = 0; j < C; j++) {
      S top = max[j];
      for (int64_t i = j + C; i < width; i += C) top = max[i] > top ? max[i] : top;
      for (int64_t i = j; i < width; i += C) max[i] = top;
    }
  }

  static void part_positions(const MatchedMaps& m, int64_t n, int64_t first, int64_t count, double* part,
                             void* scratch) {
    const bool* mask = mask_of(m, n, first, count);
    if (mask == nullptr)
      part_positions_of<All>(m, n, first, count, mask, part, static_cast<S*>(scratch));
    else
      part_positions_of<Some>(m, n, first, count, mask, part, static_cast<S*>(scratch));
  }
  template <class X>
  static void part_positions_of(const MatchedMaps& m, int64_t n, int64_t first, int64_t count, const bool* mask,
                                double* part, S* scratch) {
    const Exponential exponential = Exponential::of(m);
    const int64_t C = m.student.C, width = tile(C), field = pitch_c(C);
    S* max_t = scratch;
    S *max_s = max_t + width, *sums = max_s + width;  // sums: (4, width)
    S* copy = sums + 4 * width;
    const bool more = (first + 2 * count) <= m.student.H * m.student.W && C <= 2 * kTile;  // what a near cache holds
    const int64_t after = (first + count) * C;
    Next next_t = more ? Next::of(m.teacher, m.teacher_type, n * m.teacher.stride_n + after) : Next::none();
    Next next_s = more ? Next::of(m.student, m.student_type, n * m.student.stride_n + after) : Next::none();
    for (int64_t c = 0; c < C; c += width) {
      int64_t rows = count, lanes = smaller(width, C - c), last = lanes, stride = C;
      if (few(C)) {
        lanes = stride = width;
        rows = (count * C + width - 1) / width;
        last = count * C - (rows - 1) * width;
      }
      const int64_t padded = pitch(lanes);
      int64_t stride_t, stride_s;
      const S* t = runs(m.teacher, m.teacher_type, n * m.teacher.stride_n + first * C + c, rows, lanes, last, stride,
                        copy, &stride_t);
      const S* s = runs(m.student, m.student_type, n * m.student.stride_n + first * C + c, rows, lanes, last, stride,
                        copy + kRows * width, &stride_s);
      const X x{
          spread(mask, count, few(C) ? C : padded, rows * padded, reinterpret_cast<bool*>(copy + 2 * kRows * width))};
      for (int64_t i = 0; i < padded; i++) max_t[i] = max_s[i] = S(-kInfinity);
      for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < padded; i += N) {
          A::store(max_t + i, A::max(A::load(max_t + i), x(t + r * stride_t + i, r * padded + i)));
          A::store(max_s + i, A::max(A::load(max_s + i), x(s + r * stride_s + i, r * padded + i)));
        }
      if (few(C)) share_maximum(max_t, C, width), share_maximum(max_s, C, width);
      for (int64_t i = 0; i < padded; i += N) {
        const V bt = base(A::load(max_t + i)), bs = base(A::load(max_s + i));
        Sums a = Sums::zero(), b = Sums::zero();
        int64_t r = 0;
        const auto add = [&](Sums& to, int64_t row) __attribute__((always_inline)) {
          const int64_t at = row * padded + i;
          to.add(x(t + row * stride_t + i, at), x(s + row * stride_s + i, at), bt, bs, exponential);
        };
        for (; r + 2 <= rows; r += 2) {
          next_t.fetch(2 * N);
          next_s.fetch(2 * N);
          add(a, r);
          add(b, r + 1);
        }
        if (r < rows) add(a, r);
        a.add(b);
        A::store(sums + i, a.teacher);
        A::store(sums + width + i, a.student);
        A::store(sums + 2 * width + i, a.cross);
        A::store(sums + 3 * width + i, a.strength);
      }
      const int64_t channels = few(C) ? C : lanes;
      for (int64_t j = 0; j < channels; j++) {
        part[kTeacherMax * field + c + j] = static_cast<double>(max_t[j]);
        part[kStudentMax * field + c + j] = static_cast<double>(max_s[j]);
      }
      for (int64_t f = 0; f < 4; f++) {
        double* to = part + (kTeacherSum + f) * field + c;
        for (int64_t j = 0; j < channels; j++) to[j] = static_cast<double>(sums[f * width + j]);
        for (int64_t i = channels; i < lanes; i += channels)
          for (int64_t j = 0; j < channels; j++) to[j] += static_cast<double>(sums[f * width + i + j]);
      }
    }
  }

  // --- a channel's blocks together, in double ---

  static void join(const MatchedMaps& m, int64_t begin, int64_t end, const double* parts, int64_t blocks, double* stats,
                   double* kl, double* strength) {
    const int64_t C = m.student.C, field = pitch_c(C), stride = kMatchedFields * field;
    const W k = D::set1(static_cast<double>(k_of(m))), zero = {}, none = D::set1(-kInfinity);
    const auto at = [&](int64_t b, int which, int64_t c) { return D::load(parts + b * stride + which * field + c); };
    for (int64_t c = begin; c < end; c += D::N) {
      W mt = none, ms = none;
      for (int64_t b = 0; b < blocks; b++) {
        mt = D::max(mt, at(b, kTeacherMax, c));
        ms = D::max(ms, at(b, kStudentMax, c));
      }
      mt = D::select(D::eq(mt, none), zero, mt);
      ms = D::select(D::eq(ms, none), zero, ms);
      W zt = {}, zs = {}, cross = {}, size = {};
      for (int64_t b = 0; b < blocks; b++) {
        const W bt = at(b, kTeacherMax, c), bs = at(b, kStudentMax, c);
        const W sum_t = at(b, kTeacherSum, c), sum_s = at(b, kStudentSum, c);
        const W scale_t = exp2<D>((bt - mt) * k), scale_s = exp2<D>((bs - ms) * k);
        zt = zt + D::keep(D::ne(sum_t, zero), sum_t * scale_t);
        zs = zs + D::keep(D::ne(sum_s, zero), sum_s * scale_s);
        // From the block's maxima to the row's. A block in which the student has no mass stood against 0; cross is
        // +inf.
        const W shift_s = D::select(D::eq(bs, none), zero, bs - ms);
        const W moved = scale_t * D::fma(sum_t, (bt - mt) - shift_s, at(b, kCross, c));
        // No mass, or so little that even a double has none: 0 times whatever the student has there.
        cross = cross + D::keep(D::both(D::ne(sum_t, zero), D::ne(scale_t, zero)), moved);
        size = size + at(b, kStrength, c);
      }
      // The log of the ratio, not a difference of two logs: it keeps its digits where the networks agree.
      W divergence = D::fma(cross / zt, k * D::set1(std::numbers::ln2), log<D>(zs / zt));
      const typename D::M dead_t = D::eq(zt, zero), dead_s = D::eq(zs, zero);
      divergence = D::select(D::both(dead_s, D::eq(zt, zt)), D::set1(kInfinity), divergence);
      divergence = D::select(dead_t, zs - zs, divergence);  // 0, or the NaN that the student has
      const W inverse_t = D::select(dead_t, zero, D::set1(1.0) / zt);
      W inverse_s = D::select(dead_s, zero, D::set1(1.0) / zs);
      inverse_s = D::select(dead_t, zs - zs, inverse_s);
      const int left = static_cast<int>(smaller(end - c, D::N));
      store_n<D>(stats + kStatStudentMax * C + c, ms, left);
      store_n<D>(stats + kStatStudentInverse * C + c, inverse_s, left);
      store_n<D>(stats + kStatTeacherMax * C + c, mt, left);
      store_n<D>(stats + kStatTeacherInverse * C + c, inverse_t, left);
      store_n<D>(kl + c, divergence, left);
      store_n<D>(strength + c, size, left);
    }
  }

  static double finish(const MatchedMaps& m, double channel_temperature, const double* kl, double* strength,
                       double* stats) {
    const int64_t C = m.student.C;
    double* w = stats + kStatWeight * C;
    if (channel_temperature == 0) {
      for (int64_t c = 0; c < C; c++) w[c] = 1 / static_cast<double>(C);
    } else {
      double mean = 0, top = 0, total = 0;
      for (int64_t c = 0; c < C; c++) mean += strength[c] / static_cast<double>(C);
      for (int64_t c = 0; c < C; c++) {
        strength[c] = mean == 0 ? 1 : strength[c] / mean;  // the mean over positions cancels
        top = strength[c] > top ? strength[c] : top;
      }
      for (int64_t c = 0; c < C; c += D::N) {
        const int left = static_cast<int>(smaller(C - c, D::N));
        const W x = (load_n<D>(strength + c, left) - D::set1(top)) / D::set1(channel_temperature);
        store_n<D>(w + c, exp_nonpositive<D>(x), left);
      }
      for (int64_t c = 0; c < C; c++) total += w[c];
      for (int64_t c = 0; c < C; c++) w[c] /= total;
    }
    double loss = 0;
    for (int64_t c = 0; c < C; c++) loss += kl[c] == kInfinity && w[c] == 0 ? kInfinity : w[c] * kl[c];
    return loss * m.temperature * m.temperature;
  }

  // --- backward ---

  DSCT_INLINE void put(S* to, V x, bool past) {
    if (past)
      A::stream(to, x);
    else
      A::store(to, x);
  }
  static bool aligned(const S* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(V) == 0; }

  // scale T w (P^S - P^T) = e^S a^S - e^T a^T, written so that it is exactly 0 for equal networks, and exact near them:
  //     (e^S - e^T) a + e^S (a^S - a)+ - e^T (a^T - a)+,  a the smaller of the two, so that no term exceeds the
  //     result's
  struct Coefficient {
    double a, student, teacher;
    DSCT_INLINE Coefficient of(double as, double at) {
      return {as < at ? as : at, as < at ? 0 : as - at, as < at ? as - at : 0};
    }
  };
  DSCT_INLINE V gradient(V t, V s, V base_t, V base_s, V a, V student, V teacher, const Exponential& exponential) {
    const V et = exponential(t - base_t), es = exponential(s - base_s);
    return A::fma(es - et, a, A::fma(es, student, et * teacher));
  }
  DSCT_INLINE Coefficient coefficient(const MatchedMaps& m, const double* stats, int64_t c, double scale) {
    const int64_t C = m.student.C;
    const double k = scale * m.temperature * stats[kStatWeight * C + c];
    return Coefficient::of(k * stats[kStatStudentInverse * C + c], k * stats[kStatTeacherInverse * C + c]);
  }

  static void backward_rows(const MatchedMaps& m, int64_t n, int64_t begin, int64_t end, int64_t first, int64_t count,
                            const double* stats, double scale, const Features& out, bool stream, void* scratch) {
    const bool* mask = padded_mask(m, n, first, count, reinterpret_cast<bool*>(static_cast<S*>(scratch) + 3 * kChunk));
    if (mask == nullptr)
      backward_rows_of(m, n, begin, end, first, count, All{}, stats, scale, out, stream, static_cast<S*>(scratch));
    else
      backward_rows_of(m, n, begin, end, first, count, Some{mask}, stats, scale, out, stream, static_cast<S*>(scratch));
  }
  template <class X>
  static void backward_rows_of(const MatchedMaps& m, int64_t n, int64_t begin, int64_t end, int64_t first,
                               int64_t count, const X x, const double* stats, double scale, const Features& out,
                               bool stream, S* copy) {
    const Exponential exponential = Exponential::of(m);
    const int64_t padded = pitch(count), C = m.student.C;
    for (int64_t c = begin; c < end; c++) {
      const S* t = row(m.teacher, m.teacher_type, n, c, first, count, copy);
      const S* s = row(m.student, m.student_type, n, c, first, count, copy + padded);
      S* to = copy + 2 * padded;
      if (as_is(m.student_type) && count == padded && dense_rows(out))
        to = static_cast<S*>(out.data) + n * out.stride_n + c * out.stride_c + first;
      const Coefficient k = coefficient(m, stats, c, scale);
      const V a = A::set1(static_cast<S>(k.a)), student = A::set1(static_cast<S>(k.student)),
              teacher = A::set1(static_cast<S>(k.teacher));
      const V bt = A::set1(static_cast<S>(stats[kStatTeacherMax * C + c])),
              bs = A::set1(static_cast<S>(stats[kStatStudentMax * C + c]));
      const bool past = stream && to != copy + 2 * padded && aligned(to);
      for (int64_t i = 0; i < padded; i += N) {
        prefetch_l1(t + i + kAhead);
        prefetch_l1(s + i + kAhead);
        put(to + i, gradient(x(t + i, i), x(s + i, i), bt, bs, a, student, teacher, exponential), past);
      }
      put_row(out, m.student_type, n, c, first, count, to);
    }
    if (stream) stream_fence();
  }

  // Lanes until channel 0 comes to lane 0 again; where that takes too long, one position at a time.
  static int64_t period(int64_t C) { return lcm_with_vector(C) <= kPeriod ? lcm_with_vector(C) : C; }
  static int64_t backward_block(const MatchedMaps& m) { return period(m.student.C) / m.student.C; }

  static void backward_positions(const MatchedMaps& m, int64_t n, int64_t first, int64_t count, const double* stats,
                                 double scale, const Features& out, bool stream, void* scratch) {
    const Exponential exponential = Exponential::of(m);
    const int64_t C = m.student.C, lanes = period(C), padded = pitch(lanes);
    S* lane = static_cast<S*>(scratch);  // (5, padded): two maxima and three coefficients
    S* copy = lane + 5 * padded;
    for (int64_t c = 0; c < C; c++) {
      const Coefficient k = coefficient(m, stats, c, scale);
      const double numbers[5] = {stats[kStatTeacherMax * C + c], stats[kStatStudentMax * C + c], k.a, k.student,
                                 k.teacher};
      for (int f = 0; f < 5; f++)
        for (int64_t i = c; i < lanes; i += C) lane[f * padded + i] = static_cast<S>(numbers[f]);
    }
    for (int f = 0; f < 5; f++)
      for (int64_t i = lanes; i < padded; i++) lane[f * padded + i] = 0;
    bool* counts = reinterpret_cast<bool*>(copy + 3 * padded);
    const int64_t stop = first + count, step = lanes / C;
    for (int64_t p = first; p < stop; p += step) {
      const int64_t some = smaller(step, stop - p);
      const bool* mask = mask_of(m, n, p, some);
      if (mask == nullptr)
        backward_run(m, n, p * C, some * C, All{}, lane, exponential, out, stream);
      else
        backward_run(m, n, p * C, some * C, Some{spread(mask, some, C, padded, counts)}, lane, exponential, out,
                     stream);
    }
    if (stream) stream_fence();
  }
  // Elements [i, i + length) of a sample: whole positions, one period of `lane` or less.
  template <class X>
  static void backward_run(const MatchedMaps& m, int64_t n, int64_t i, int64_t length, const X x, S* lane,
                           const Exponential& exponential, const Features& out, bool stream) {
    const int64_t padded = pitch(period(m.student.C));
    S* copy = lane + 5 * padded;
    const S* t = run(m.teacher, m.teacher_type, n * m.teacher.stride_n + i, length, copy);
    const S* s = run(m.student, m.student_type, n * m.student.stride_n + i, length, copy + padded);
    S* to =
        as_is(m.student_type) && length % N == 0 ? static_cast<S*>(out.data) + n * out.stride_n + i : copy + 2 * padded;
    const bool past = stream && to != copy + 2 * padded && aligned(to);
    for (int64_t j = 0; j < length; j += N) {
      prefetch_l1(t + j + kAhead);
      prefetch_l1(s + j + kAhead);
      put(to + j,
          gradient(x(t + j, j), x(s + j, j), A::load(lane + j), A::load(lane + padded + j),
                   A::load(lane + 2 * padded + j), A::load(lane + 3 * padded + j), A::load(lane + 4 * padded + j),
                   exponential),
          past);
    }
    put_run(out, m.student_type, n * out.stride_n + i, length, to);
  }

  static size_t scratch(const MatchedMaps& m) {
    const int64_t C = m.student.C, width = tile(C);
    int64_t most = 4 * kChunk;  // rows; of each, the last part is for the mask's bytes
    if (most < (6 + 3 * kRows) * width) most = (6 + 3 * kRows) * width;  // part_positions
    if (most < 9 * pitch(period(C))) most = 9 * pitch(period(C));        // backward_positions
    return static_cast<size_t>(most) * sizeof(S) + kSpreadBeyond;
  }

  static constexpr MatchedLoops table() {
    return {scratch, pitch_c, block,         part_rows,          part_positions,
            join,    finish,  backward_rows, backward_positions, backward_block};
  }
};

constexpr MatchedKernels matched_kernels = {{Matched<F32>::table(), Matched<F64>::table()}};

}  // namespace
}  // namespace DSCT_ISA
}  // namespace dsct
