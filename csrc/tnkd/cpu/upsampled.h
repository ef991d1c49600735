// TNKD of logits that are smaller than the labels: upsampled on the way, and nothing of the labels' size is kept.
//
// A task is a strip of label rows, walked in tiles of some columns, from top to bottom. Of each network a tile holds
// the two rows of logits that its label row lies between, already interpolated along the row, as columns
// [vector][class][lane]: a row of small logits is fetched once per tile and strip, and what is left to do for a row of
// labels is one multiply-add of two such rows. Steps 2 and 3 of kernel.h follow as they are. The gradient goes
// the same way back: into two rows of columns, by multiply-adds, and when a row of the student's has seen all its label
// rows, along the row into the small gradient.
//
// Every sum has a fixed order: columns of a tile from top to bottom, tiles from left to right, then strips from top to
// bottom, whatever the threads.
#pragma once

#include "labels.h"
#include "pixel.h"
#include "sums.h"
#include "write.h"

namespace dsct {
namespace DSCT_ISA {
namespace {

// --- N neighbours of a row, each output its own: order_of once per vector, pick once per class ---

template <class A>
struct Order {
  int32_t lane[A::N];
};
template <class A>
DSCT_INLINE Order<A> order_of(A, const int32_t* low, int32_t base) {
  Order<A> order;
  for (int i = 0; i < A::N; i++) order.lane[i] = low[i] - base;
  return order;
}
template <class A>
DSCT_INLINE typename A::V pick(A, const typename A::S* p, const Order<A>& order) {
  typename A::S lanes[A::N];
  for (int i = 0; i < A::N; i++) lanes[i] = p[order.lane[i]];
  return A::load(lanes);
}
#if defined(DSCT_ISA_AVX512)
DSCT_INLINE __m512i order_of(F32, const int32_t* low, int32_t base) {
  return _mm512_sub_epi32(_mm512_loadu_si512(low), _mm512_set1_epi32(base));
}
DSCT_INLINE __m512 pick(F32, const float* p, __m512i order) { return _mm512_permutexvar_ps(order, _mm512_loadu_ps(p)); }
DSCT_INLINE __m512i order_of(F64, const int32_t* low, int32_t base) {
  const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low));
  return _mm512_cvtepi32_epi64(_mm256_sub_epi32(at, _mm256_set1_epi32(base)));
}
DSCT_INLINE __m512d pick(F64, const double* p, __m512i order) {
  return _mm512_permutexvar_pd(order, _mm512_loadu_pd(p));
}
#elif defined(DSCT_ISA_AVX2)
DSCT_INLINE __m256i order_of(F32, const int32_t* low, int32_t base) {
  const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low));
  return _mm256_sub_epi32(at, _mm256_set1_epi32(base));
}
DSCT_INLINE F32::V pick(F32, const float* p, __m256i order) {
  return (F32::V)_mm256_permutevar8x32_ps(_mm256_loadu_ps(p), order);
}
#endif

// --- working memory ---

// Two neighbouring rows of a tile, in columns.
template <class A>
struct TileRows {
  typename A::S* at[2];
  int64_t row[2];  // which they are; -1: none
};

template <class A>
struct UpsampledScratch {
  typedef typename A::S S;
  Scratch<A> block;
  TileRows<A> student, teacher;
  S* grad[2];     // of the row that the label row looks at, and of the next
  int64_t row;    // the former; -1: none yet
  bool touched;   // whether anything was added
  S* segment;     // a row's logits of a tile, [class][column]
  int64_t pitch;  // from one class to the next
  S* rows;        // the gradient of the strip's rows, [row][column][class]
};

// A tile's array. 448 bytes past a page: arrays a multiple of 4 KiB apart would share the sets of L1.
template <class A>
DSCT_INLINE size_t tile_bytes(const UpsampledArgs& args) {
  return round_up(size_t(args.classes) * size_t(args.tile) * sizeof(typename A::S), 4096) + 448;
}
// The most columns that a tile looks at, and what a vector may read past them.
template <class A>
DSCT_INLINE int64_t segment_pitch(const UpsampledArgs& args, const Resized& of) {
  const int64_t tile = args.tile;
  int64_t most = 0;
  for (int64_t x = 0; x < args.width && !of.full; x += tile) {
    const int64_t end = x + tile < args.width ? x + tile : args.width;
    const int64_t columns = of.x.low[end - 1] - of.x.low[x] + 2;
    if (columns > most) most = columns;
  }
  return most + A::N;
}
template <class A>
DSCT_INLINE int64_t row_numbers(const UpsampledArgs& args) {
  return args.of_student.width * args.classes;
}

template <class A>
size_t upsampled_scratch_bytes(const UpsampledArgs& args) {
  typedef typename A::S S;
  const int64_t pitch_s = segment_pitch<A>(args, args.of_student), pitch_t = segment_pitch<A>(args, args.of_teacher);
  const size_t segment = size_t((pitch_s > pitch_t ? pitch_s : pitch_t) * args.classes + A::N) * sizeof(S);
  const size_t rows = size_t((args.strip_rows + 1) * row_numbers<A>(args) + A::N) * sizeof(S);
  return round_up(sizeof(UpsampledScratch<A>), 64) + 9 * tile_bytes<A>(args) + row_bytes<A>(args) +
         round_up(segment, 64) + rows;
}

template <class A>
UpsampledScratch<A>& lay_out_upsampled(const UpsampledArgs& args, void* memory) {
  typedef typename A::S S;
  UpsampledScratch<A>& s = *static_cast<UpsampledScratch<A>*>(memory);
  char* p = static_cast<char*>(memory) + round_up(sizeof(UpsampledScratch<A>), 64);
  S** tiles[] = {&s.block.student, &s.block.teacher, &s.student.at[0], &s.student.at[1], &s.teacher.at[0],
                 &s.teacher.at[1], &s.grad[0],       &s.grad[1],       &s.block.ce};
  for (S** tile : tiles) {
    *tile = reinterpret_cast<S*>(p);
    p += tile_bytes<A>(args);
  }
  s.block.rows = p;
  p += row_bytes<A>(args);
  const int64_t pitch_s = segment_pitch<A>(args, args.of_student), pitch_t = segment_pitch<A>(args, args.of_teacher);
  s.pitch = pitch_s > pitch_t ? pitch_s : pitch_t;
  s.segment = reinterpret_cast<S*>(p);
  p += round_up(size_t(s.pitch * args.classes + A::N) * sizeof(S), 64);
  s.rows = reinterpret_cast<S*>(p);
  // Nothing to ask for ahead: what a block needs next is near already.
  s.block.at_student.uniform = s.block.at_teacher.uniform = false;
  return s;
}

// --- 1. read ---

// C classes of N columns, transposed; `classes` of them are there.
template <class A, int C, class T>
DSCT_INLINE void stage_tile(const T* p, int64_t stride, int classes, typename A::S* to, int64_t pitch) {
  typename A::V tile[C];
  load_transposed<A, C>(p, stride, tile);
  for (int i = 0; i < C && i < classes; i++) A::store(to + i * pitch, tile[i]);
}

// `count` columns of one row, from p on: [class][column] in the acc type. Behind them stands what stands there in the
// tensor, or nothing known.
template <class A, class T>
DSCT_INLINE void stage_as(const LogitView& x, int64_t at, int64_t stride, int64_t count, int64_t classes,
                          typename A::S* to, int64_t pitch) {
  typedef typename A::S S;
  const T* p = static_cast<const T*>(x.data) + at;
  if (stride == 1) {
    const int64_t whole = count / A::N * A::N;
    for (int64_t c = 0; c < classes; c++, p += x.class_stride, at += x.class_stride, to += pitch) {
      for (int64_t j = 0; j < whole; j += A::N) A::store(to + j, A::load(p + j));
      if (whole == count) continue;
      const bool inside = at + whole + A::N <= x.extent;
      A::store(to + whole, inside ? A::load(p + whole) : load_n<A>(p + whole, int(count - whole)));
    }
    return;
  }
  for (int64_t j = 0; j < count; j += A::N, p += A::N * stride, at += A::N * stride, to += A::N) {
    int64_t c = 0;
    while (x.class_stride == 1 && c < classes) {
      const int chunk = chunk_for<A>(classes - c);
      const int there = classes - c < chunk ? int(classes - c) : chunk;
      if (at + (A::N - 1) * stride + c + chunk > x.extent) break;
      if (chunk == A::N) {
        stage_tile<A, A::N>(p + c, stride, there, to + c * pitch, pitch);
      } else if constexpr (sizeof(S) == 4 && A::N == 16) {
        if (chunk == 8)
          stage_tile<A, 8>(p + c, stride, there, to + c * pitch, pitch);
        else
          stage_tile<A, 4>(p + c, stride, there, to + c * pitch, pitch);
      } else if constexpr (sizeof(S) == 4 && A::N == 8) {
        stage_tile<A, 4>(p + c, stride, there, to + c * pitch, pitch);
      }
      c += there;
    }
    for (; c < classes; c++)
      for (int i = 0; i < A::N && j + i < count; i++)
        to[c * pitch + i] = S(to_float(p[i * stride + c * x.class_stride]));
  }
}
template <class A>
DSCT_INLINE void stage(const LogitView& x, int64_t at, int64_t stride, int64_t count, int64_t classes,
                       typename A::S* to, int64_t pitch) {
  switch (x.type) {
    case FloatType::kF32:
      return stage_as<A, float>(x, at, stride, count, classes, to, pitch);
    case FloatType::kBF16:
      return stage_as<A, bf16>(x, at, stride, count, classes, to, pitch);
    case FloatType::kF16:
      return stage_as<A, f16>(x, at, stride, count, classes, to, pitch);
    case FloatType::kF64:
      if constexpr (sizeof(typename A::S) == 8) return stage_as<A, double>(x, at, stride, count, classes, to, pitch);
  }
}

// Row `row` of x, interpolated to the n label columns from x0 on. Both neighbours of N outputs lie in N successive
// inputs, each in its own: no output is narrower than an input.
template <class A>
void widen_row(const UpsampledArgs& args, const LogitView& x, const Resized& of, UpsampledScratch<A>& s, int64_t sample,
               int64_t row, int64_t x0, int n, typename A::S* columns) {
  typedef typename A::S S;
  typedef typename A::V V;
  const int32_t first = of.x.low[x0], last = of.x.low[x0 + n - 1];
  const int64_t count = (last + 2 < of.width ? last + 2 : of.width) - first;
  const int64_t* strides = x.pixel_strides;
  stage<A>(x, sample * strides[0] + row * strides[1] + first * strides[2], strides[2], count, args.classes, s.segment,
           s.pitch);
  const S* near = static_cast<const S*>(of.x.near) + x0;
  const S* far = static_cast<const S*>(of.x.far) + x0;
  for (int v = 0; v * A::N < n; v++) {
    const int32_t* low = of.x.low + x0 + v * A::N;
    const auto order = order_of(A(), low, low[0]);
    const V near_v = A::load(near + v * A::N), far_v = A::load(far + v * A::N);
    const typename A::M some = A::ne(far_v, A::set1(0));
    const S* p = s.segment + (low[0] - first);
    S* column = columns + v * args.classes * A::N;
    for (int64_t c = 0; c < args.classes; c++, p += s.pitch, column += A::N)
      A::store(column, fma_where<A>(some, pick(A(), p + 1, order), far_v, pick(A(), p, order) * near_v));
  }
}

// The rows that label row y lies between; the second only where it has a weight.
template <class A>
DSCT_INLINE void fetch_rows(const UpsampledArgs& args, const LogitView& x, const Resized& of, TileRows<A>& rows,
                            UpsampledScratch<A>& s, int64_t sample, int64_t y, int64_t x0, int n) {
  const int64_t low = of.y.low[y];
  if (rows.row[0] != low) {
    typename A::S* const at = rows.at[0];
    const int64_t row = rows.row[0];
    rows.at[0] = rows.at[1];
    rows.row[0] = rows.row[1];
    rows.at[1] = at;
    rows.row[1] = row;
    if (rows.row[0] != low) widen_row<A>(args, x, of, s, sample, low, x0, n, rows.at[0]);
    rows.row[0] = low;
  }
  if (static_cast<const typename A::S*>(of.y.far)[y] != 0 && rows.row[1] != low + 1) {
    widen_row<A>(args, x, of, s, sample, low + 1, x0, n, rows.at[1]);
    rows.row[1] = low + 1;
  }
}

// Columns of a label row from those two, with what `read` finds on the way: the vectors from v on, up to pixel n.
template <class A, bool two>
DSCT_INLINE void mix_rows(const TileRows<A>& rows, typename A::S near, typename A::S far, int v, int n, int64_t classes,
                          const typename A::S* label, typename A::S* columns, typename A::S* max,
                          typename A::S* target) {
  typedef typename A::S S;
  typedef typename A::V V;
  const V near_v = A::set1(near), far_v = A::set1(far);
  const auto at = [&](int64_t i) {
    const V z = A::load(rows.at[0] + i);
    return two ? A::fma(A::load(rows.at[1] + i), far_v, z * near_v) : z;
  };
  constexpr int kRun = 2;  // two chains of maxima
  for (; (v + kRun) * A::N <= n; v += kRun) {
    Top<A> top[kRun];
    for (int r = 0; r < kRun; r++) top[r].begin(label + (v + r) * A::N);
    int64_t i = v * classes * A::N;
    V k = A::set1(0);
    for (int64_t c = 0; c < classes; c++, i += A::N, k = k + A::set1(1))
      for (int r = 0; r < kRun; r++) {
        const V z = at(i + r * classes * A::N);
        A::store(columns + i + r * classes * A::N, z);
        top[r].take(z, k);
      }
    for (int r = 0; r < kRun; r++) {
      A::store(max + (v + r) * A::N, top[r].max);
      A::store(target + (v + r) * A::N, top[r].target);
    }
  }
  for (; v * A::N < n; v++) {
    Top<A> top;
    top.begin(label + v * A::N);
    int64_t i = v * classes * A::N;
    for (int64_t c = 0; c < classes; c++, i += A::N) {
      const V z = at(i);
      A::store(columns + i, z);
      top.take(z, A::set1(S(c)));
    }
    A::store(max + v * A::N, top.max);
    A::store(target + v * A::N, top.target);
  }
}

template <class A>
DSCT_INLINE void mix(const UpsampledArgs& args, const Resized& of, const TileRows<A>& rows, int64_t y, int v, int n,
                     const typename A::S* label, typename A::S* columns, typename A::S* max, typename A::S* target) {
  typedef typename A::S S;
  const S near = static_cast<const S*>(of.y.near)[y], far = static_cast<const S*>(of.y.far)[y];
  if (far != 0)
    mix_rows<A, true>(rows, near, far, v, n, args.classes, label, columns, max, target);
  else
    mix_rows<A, false>(rows, near, far, v, n, args.classes, label, columns, max, target);
}

DSCT_INLINE void locate_full(const int64_t* strides, int64_t sample, int64_t y, int64_t x0, Offsets* at) {
  at->uniform = true;
  at->base = sample * strides[0] + y * strides[1] + x0 * strides[2];
  at->stride = strides[2];
}

template <class A>
DSCT_INLINE void read_upsampled(const UpsampledArgs& args, const LogitView& x, const Resized& of, TileRows<A>& rows,
                                UpsampledScratch<A>& s, Offsets* at, int64_t sample, int64_t y, int64_t x0, int n,
                                typename A::S* columns, typename A::S* max, typename A::S* target) {
  if (of.full) {
    locate_full(x.pixel_strides, sample, y, x0, at);
    return read<A>(x, *at, n, args.classes, s.block.label, columns, max, target);
  }
  fetch_rows<A>(args, x, of, rows, s, sample, y, x0, n);
  mix<A>(args, of, rows, y, 0, n, s.block.label, columns, max, target);
}

// --- 4. the gradient back ---

// Adds the gradient of one vector of pixels to the two rows that its label row looks at.
template <class A, Ce mode, bool two>
DSCT_INLINE void split_gradient(const UpsampledArgs& args, UpsampledScratch<A>& s, int v, typename A::S near,
                                typename A::S far) {
  typedef typename A::V V;
  Gradient<A, mode> g;
  g.begin(s.block, v, args.classes);
  const V near_v = A::set1(near), far_v = A::set1(far);
  typename A::S* to = s.grad[0] + v * args.classes * A::N;
  typename A::S* next = s.grad[1] + v * args.classes * A::N;
  V k = A::set1(0);
  for (int64_t c = 0; c < args.classes; c++, to += A::N, next += A::N, k = k + A::set1(1)) {
    const V value = g.at(c, k);
    A::store(to, A::fma(value, near_v, A::load(to)));
    if constexpr (two) A::store(next, A::fma(value, far_v, A::load(next)));
  }
}

template <class A>
DSCT_INLINE void add_to(typename A::S* p, typename A::V x) {
  A::store(p, A::load(p) + x);
}

// A row's gradient of a tile, in columns, added along the row to (width, K) numbers. Transposed, so that N classes go
// together and a pixel's weights are the same for all; the lanes past the last class add 0 to what comes behind.
template <class A>
void narrow_row(const UpsampledArgs& args, const typename A::S* columns, int64_t x0, int n, typename A::S* row) {
  typedef typename A::S S;
  typedef typename A::V V;
  const int64_t classes = args.classes;
  const int32_t* low = args.of_student.x.low + x0;
  const S* near = static_cast<const S*>(args.of_student.x.near) + x0;
  const S* far = static_cast<const S*>(args.of_student.x.far) + x0;
  const V zero = A::set1(0);
  for (int64_t c = 0; c < classes; c += A::N) {
    const int count = classes - c < A::N ? int(classes - c) : A::N;
    V here = zero, next = zero;
    int64_t at = low[0];
    for (int v = 0; v * A::N < n; v++) {
      const S* column = columns + (v * classes + c) * A::N;
      V pixels[A::N];
      for (int i = 0; i < A::N; i++) pixels[i] = i < count ? A::load(column + i * A::N) : zero;
      transpose_chunks<A, A::N>(pixels);
      const int end = n - v * A::N < A::N ? n : (v + 1) * A::N;
      for (int i = v * A::N; i < end; i++) {
        if (low[i] != at) {
          add_to<A>(row + at * classes + c, here);
          here = next;
          next = zero;
          if (low[i] != ++at) {  // not between neighbours, but for a rounding of their places
            add_to<A>(row + at * classes + c, here);
            here = zero;
            at = low[i];
          }
        }
        here = A::fma(pixels[i % A::N], A::set1(near[i]), here);
        if (far[i] != 0) next = A::fma(pixels[i % A::N], A::set1(far[i]), next);
      }
    }
    add_to<A>(row + at * classes + c, here);
    if (at + 1 < args.of_student.width) add_to<A>(row + (at + 1) * classes + c, next);
  }
}

// The tile's label rows go on to look at the student's row `row`: what they are through with leaves for s.rows.
template <class A>
DSCT_INLINE void move_on(const UpsampledArgs& args, UpsampledScratch<A>& s, const Strip& strip, int64_t row, int64_t x0,
                         int n) {
  typedef typename A::S S;
  const int64_t numbers = row_numbers<A>(args);
  const size_t bytes = size_t(args.classes) * size_t((n + A::N - 1) / A::N * A::N) * sizeof(S);
  if (s.row >= 0 && s.touched) {
    narrow_row<A>(args, s.grad[0], x0, n, s.rows + (s.row - strip.first) * numbers);
    if (row != s.row + 1 && s.row + 1 < strip.last)
      narrow_row<A>(args, s.grad[1], x0, n, s.rows + (s.row + 1 - strip.first) * numbers);
  }
  if (s.row >= 0 && row == s.row + 1) {
    S* const done = s.grad[0];
    s.grad[0] = s.grad[1];
    s.grad[1] = done;
    memset(done, 0, bytes);
  } else {
    memset(s.grad[0], 0, bytes);
    memset(s.grad[1], 0, bytes);
    s.touched = false;
  }
  s.row = row;
}

// A row of the gradient, (width, K) numbers, to where it belongs.
template <class A, class T>
DSCT_INLINE void put_row_as(const UpsampledArgs& args, int64_t sample, int64_t row, const typename A::S* from) {
  const int64_t classes = args.classes, width = args.of_student.width;
  const int64_t* strides = args.grad.pixel_strides;
  T* to = static_cast<T*>(const_cast<void*>(args.grad.data)) + sample * strides[0] + row * strides[1];
  if (args.grad.class_stride == 1 && strides[2] == classes) {
    const int64_t numbers = classes * width, whole = numbers / A::N * A::N;
    for (int64_t i = 0; i < whole; i += A::N) A::store(to + i, A::load(from + i));
    for (int64_t i = whole; i < numbers; i++) from_float(from[i], to + i);
    return;
  }
  const int64_t whole = strides[2] == 1 ? width / A::N * A::N : 0;
  for (int64_t x = 0; x < whole; x += A::N)
    for (int64_t c = 0; c < classes; c += A::N) {
      typename A::V tile[A::N];
      load_transposed<A, A::N>(from + x * classes + c, classes, tile);
      for (int i = 0; i < A::N && c + i < classes; i++) A::store(to + (c + i) * args.grad.class_stride + x, tile[i]);
    }
  for (int64_t c = 0; c < classes; c++)
    for (int64_t x = whole; x < width; x++)
      from_float(from[x * classes + c], to + c * args.grad.class_stride + x * strides[2]);
}
template <class A>
void put_row(const UpsampledArgs& args, int64_t sample, int64_t row, const typename A::S* from) {
  switch (args.grad.type) {
    case FloatType::kF32:
      return put_row_as<A, float>(args, sample, row, from);
    case FloatType::kBF16:
      return put_row_as<A, bf16>(args, sample, row, from);
    case FloatType::kF16:
      return put_row_as<A, f16>(args, sample, row, from);
    case FloatType::kF64:
      if constexpr (sizeof(typename A::S) == 8) return put_row_as<A, double>(args, sample, row, from);
  }
}

// --- strips ---

// What comes in for the n pixels.
template <class A>
DSCT_INLINE void load_upstream(const UpsampledArgs& args, Scratch<A>& s, int64_t sample, int64_t y, int64_t x0, int n) {
  const int64_t* strides = args.upstream_strides;
  const typename A::S* p = static_cast<const typename A::S*>(args.upstream) + sample * strides[0] + y * strides[1];
  for (int i = 0; i < n; i++) s.upstream[i] = p[(x0 + i) * strides[2]];
}

// Pixels that go through all steps together. Their columns, remade in the same place for every group, stay in L1, and
// several vectors let the long chains of `pixels` overlap: against whole blocks 5% to 8% of the time at K = 6 and 19,
// 4% at 150, against 32 pixels at a time 4% at K = 6; twice the bytes are no better. Never fewer than are written
// together.
constexpr int64_t kGroupBytes = 12 << 10;
template <class A>
DSCT_INLINE int group_pixels(int64_t classes) {
  const int64_t fit = kGroupBytes / (2 * classes * int64_t(sizeof(typename A::S))) / 32 * 32;
  return fit < 32 ? 32 : fit > kMaxBlock ? kMaxBlock : int(fit);
}

template <class A, class P, Ce mode>
DSCT_INLINE void run_upsampled_block(const UpsampledArgs& args, UpsampledScratch<A>& u, const Strip& strip,
                                     int64_t sample, int64_t y, int64_t x0, int n) {
  typedef typename A::S S;
  Scratch<A>& s = u.block;
  constexpr int kGroup = Scratch<A>::kGroup;
  const int64_t pixel = (sample * args.height + y) * args.width + x0;
  const int block = int(args.tile);
  const bool write_here = args.grad.data != nullptr && args.of_student.full;
  if (write_here) locate_full(args.grad.pixel_strides, sample, y, x0, &s.at_grad);
  bool any = true;
  if (args.target != nullptr) {
    locate_full(args.target_strides, sample, y, x0, &s.at_target);
    any = load_labels<A>(args, s.at_target, n, s.label);
  } else {
    for (int i = 0; i < kMaxBlock; i++) s.label[i] = S(-1);
  }
  if (!any) {  // nothing but ignored pixels: nothing is read
    if (args.loss_map != nullptr) memset(static_cast<S*>(args.loss_map) + pixel, 0, size_t(n) * sizeof(S));
    if (!write_here) return;
    clear_gradient<A, mode>(args, s, n);
    for (int v0 = 0; v0 * A::N < n; v0 += kGroup) write<A, Gradient<A, mode>>(args, s, v0, n);
    return;
  }
  // A network's columns are made a group at a time, right before they are used, where nothing needs them all at once.
  const bool has_teacher = mode != Ce::kAlone || !args.same || args.target == nullptr;
  const bool teacher_first = args.target == nullptr || args.of_teacher.full;
  if (has_teacher && teacher_first)
    read_upsampled<A>(args, args.teacher, args.of_teacher, u.teacher, u, &s.at_teacher, sample, y, x0, n, s.teacher,
                      s.max_t, s.target_t);
  else if (has_teacher)
    fetch_rows<A>(args, args.teacher, args.of_teacher, u.teacher, u, sample, y, x0, n);
  if (args.target == nullptr) label_by_teacher<A>(n, args.classes, s.teacher, s.label, s.max_t, s.target_t);
  if (args.of_student.full)
    read_upsampled<A>(args, args.student, args.of_student, u.student, u, &s.at_student, sample, y, x0, n, s.student,
                      s.max_s, s.target_s);
  else
    fetch_rows<A>(args, args.student, args.of_student, u.student, u, sample, y, x0, n);
  set_ce_factors<A>(args, s, n);
  if (args.upstream != nullptr) load_upstream<A>(args, s, sample, y, x0, n);
  const bool keep = args.grad.data != nullptr && !args.of_student.full;
  S near = 1, far = 0;
  if (keep) {
    const int64_t row = args.of_student.y.low[y];
    if (row != u.row) move_on<A>(args, u, strip, row, x0, n);
    u.touched = true;
    near = static_cast<const S*>(args.of_student.y.near)[y];
    far = static_cast<const S*>(args.of_student.y.far)[y];
  }
  PixelLoss<P> losses = {P::set1(0), P::set1(0), P::set1(0)};
  const int group = group_pixels<A>(args.classes) / A::N;
  S *const columns_s = s.student, *const columns_t = s.teacher;
  for (int v0 = 0; v0 * A::N < n; v0 += group) {
    const int end = n < (v0 + group) * A::N ? n : (v0 + group) * A::N;
    // Every group's in the same place, which stays in L1.
    if (!args.of_student.full) s.student = columns_s - v0 * A::N * args.classes;
    if (!teacher_first) s.teacher = columns_t - v0 * A::N * args.classes;
    if (has_teacher && !teacher_first)
      mix<A>(args, args.of_teacher, u.teacher, y, v0, end, s.label, s.teacher, s.max_t, s.target_t);
    if (!args.of_student.full)
      mix<A>(args, args.of_student, u.student, y, v0, end, s.label, s.student, s.max_s, s.target_s);
    for (int v = v0; v * A::N < end; v++) sum_classes<A, mode>(args, s, v, block);
    for (int lane = v0 * A::N; lane < end; lane += P::N) pixels<P, mode>(args, s, lane, n, pixel, losses);
    for (int v = v0; write_here && v * A::N < end; v += kGroup) write<A, Gradient<A, mode>>(args, s, v, n);
    for (int v = v0; keep && v * A::N < end; v++) {
      if (far != 0)
        split_gradient<A, mode, true>(args, u, v, near, far);
      else
        split_gradient<A, mode, false>(args, u, v, near, far);
    }
  }
  s.student = columns_s;
  s.teacher = columns_t;
  add_losses(args, losses, s);
}

template <class A, Ce mode>
LossSums run_strip_mode(const UpsampledArgs& args, int64_t sample, const Strip& strip, typename A::S* partials,
                        UpsampledScratch<A>& u) {
  typedef typename A::S S;
  const bool keep = args.grad.data != nullptr && !args.of_student.full;
  const int64_t numbers = row_numbers<A>(args);
  clear_losses(u.block);
  if (keep) memset(u.rows, 0, size_t((strip.last - strip.first) * numbers + A::N) * sizeof(S));
  const int64_t tile = args.tile;
  for (int64_t x0 = 0; x0 < args.width; x0 += tile) {
    const int n = int(args.width - x0 < tile ? args.width - x0 : tile);
    u.student.row[0] = u.student.row[1] = u.teacher.row[0] = u.teacher.row[1] = u.row = -1;
    u.touched = false;
    for (int64_t y = strip.begin; y < strip.end; y++)
      run_upsampled_block<A, typename Wide<A>::P, mode>(args, u, strip, sample, y, x0, n);
    if (keep) move_on<A>(args, u, strip, -1, x0, n);
  }
  if (args.stream) stream_fence();
  S* partial = partials + strip.partial * numbers;
  for (int64_t row = strip.first; keep && row < strip.last; row++) {
    const S* from = u.rows + (row - strip.first) * numbers;
    if (row >= strip.own_first && row < strip.own_last) {
      put_row<A>(args, sample, row, from);
    } else {
      memcpy(partial, from, size_t(numbers) * sizeof(S));
      partial += numbers;
    }
  }
  return losses_of(u.block);
}

template <class A>
LossSums run_strip(const UpsampledArgs& args, int64_t sample, const Strip& strip, void* partials, void* memory) {
  UpsampledScratch<A>& u = lay_out_upsampled<A>(args, memory);
  typename A::S* p = static_cast<typename A::S*>(partials);
  switch (ce_of(args)) {
    case Ce::kShared:
      return run_strip_mode<A, Ce::kShared>(args, sample, strip, p, u);
    case Ce::kSquare:
      return run_strip_mode<A, Ce::kSquare>(args, sample, strip, p, u);
    case Ce::kOwn:
      return run_strip_mode<A, Ce::kOwn>(args, sample, strip, p, u);
    case Ce::kAlone:
      return run_strip_mode<A, Ce::kAlone>(args, sample, strip, p, u);
  }
  return {0, 0, 0};
}

// The student's row `row` from what several strips have of it, in their order.
template <class A>
void add_partials(const UpsampledArgs& args, int64_t sample, int64_t row, const void* const* partials, int count,
                  void* memory) {
  typedef typename A::S S;
  UpsampledScratch<A>& u = lay_out_upsampled<A>(args, memory);
  const int64_t numbers = row_numbers<A>(args);
  memset(u.rows, 0, size_t(numbers) * sizeof(S));
  for (int i = 0; i < count; i++) {
    const S* from = static_cast<const S*>(partials[i]);
    for (int64_t j = 0; j < numbers; j++) u.rows[j] += from[j];
  }
  put_row<A>(args, sample, row, u.rows);
}

// As teacher_labels, of the upsampled teacher.
template <class A>
void upsampled_teacher_labels(const UpsampledArgs& args, int64_t sample, const Strip& strip, void* memory,
                              int32_t* labels) {
  typedef typename A::S S;
  UpsampledScratch<A>& u = lay_out_upsampled<A>(args, memory);
  Scratch<A>& s = u.block;
  const int64_t tile = args.tile;
  for (int64_t x0 = 0; x0 < args.width; x0 += tile) {
    const int n = int(args.width - x0 < tile ? args.width - x0 : tile);
    u.teacher.row[0] = u.teacher.row[1] = -1;
    for (int64_t y = strip.begin; y < strip.end; y++) {
      for (int i = 0; i < kMaxBlock; i++) s.label[i] = S(-1);
      read_upsampled<A>(args, args.teacher, args.of_teacher, u.teacher, u, &s.at_teacher, sample, y, x0, n, s.teacher,
                        s.max_t, s.target_t);
      label_by_teacher<A>(n, args.classes, s.teacher, s.label, s.max_t, s.target_t);
      int32_t* to = labels + (sample * args.height + y) * args.width + x0;
      for (int i = 0; i < n; i++) to[i] = int32_t(s.label[i]);
    }
  }
}

}  // namespace
}  // namespace DSCT_ISA
}  // namespace dsct
