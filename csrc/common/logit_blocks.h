// What the CPU kernels of two logit maps share: a block of pixels of any layout is read into columns
// [vector][class][lane], a lane per pixel, and a gradient is written back from such columns.
#pragma once

#include "logit_view.h"
#include "vec_transpose.h"

namespace dsct {
namespace DSCT_ISA {
namespace {

constexpr int kMaxBlock = 128;  // pixels of a block
constexpr int kRound = 64;      // what is kept per pixel is filled up to a multiple of this many

DSCT_INLINE size_t round_up(size_t x, size_t to) { return (x + to - 1) / to * to; }

// Where a class is a plane, longer runs of it are read and written at a time while the columns stay near L1: 5% to 20%.
// Many classes: smaller blocks, so that the columns stay in L2.
DSCT_INLINE int block_pixels(const LogitArgs& args) {
  if (args.classes > 1024) return 32;
  return args.classes <= 64 && args.student.class_stride != 1 ? 128 : 64;
}
template <class A>
DSCT_INLINE size_t column_bytes(const LogitArgs& args) {
  return size_t(args.classes) * size_t(block_pixels(args)) * sizeof(typename A::S);
}

// Where the pixels of a block are in one tensor, in elements.
struct Offsets {
  bool uniform;  // pixel i at base + i * stride, else at each[i]
  int64_t base, stride;
  int64_t each[kMaxBlock];
  DSCT_FORCE_INLINE int64_t at(int i) const { return uniform ? base + i * stride : each[i]; }
};

// Vectors that are written together: 32 pixels.
template <class A>
constexpr int group_vectors() {
  return A::N == 16 ? 2 : A::N == 8 ? 4 : 8;
}
template <class A>
DSCT_INLINE size_t row_bytes(const LogitArgs& args) {
  return round_up((size_t(args.classes) * 32 + 64) * sizeof(typename A::S), 64);
}

// --- read ---

// The running maximum over the classes other than the target, and the target's logit.
template <class A>
struct Top {
  typename A::V label, max, target;
  DSCT_FORCE_INLINE void begin(const typename A::S* labels) {
    label = A::load(labels);
    max = A::set1(typename A::S(-__builtin_inf()));
    target = A::set1(0);
  }
  DSCT_FORCE_INLINE void take(typename A::V z, typename A::V k) {
    const typename A::M is_target = A::eq(label, k);
    max = max_unless<A>(is_target, max, z);
    target = A::select(is_target, z, target);
  }
};

template <class A, class T>
DSCT_INLINE void read_rows(const LogitView& x, const Offsets& at, int n, int64_t classes, const typename A::S* label,
                           typename A::S* columns, typename A::S* max, typename A::S* target) {
  typedef typename A::S S;
  typedef typename A::V V;
  constexpr int kRun = A::N == 16 ? 4 : 2;  // vectors whose maxima stay in registers
  const T* data = static_cast<const T*>(x.data) + at.base;
  for (int v = 0; v * A::N < n; v += kRun) {
    const T* p = data + v * A::N;
    S* column = columns + v * classes * A::N;
    Top<A> top[kRun];
    for (int r = 0; r < kRun; r++) top[r].begin(label + (v + r) * A::N);
    V k = A::set1(0);
    if ((v + kRun) * A::N <= n) {
      for (int64_t c = 0; c < classes; c++, p += x.class_stride, column += A::N, k = k + A::set1(1))
        for (int r = 0; r < kRun; r++) {
          const V z = A::load(p + r * A::N);
          A::store(column + r * classes * A::N, z);
          top[r].take(z, k);
        }
    } else {
      for (int64_t c = 0; c < classes; c++, p += x.class_stride, column += A::N, k = k + A::set1(1))
        for (int r = 0; r < kRun && (v + r) * A::N < n; r++) {
          const int left = n - (v + r) * A::N;
          const V z = left >= A::N ? A::load(p + r * A::N) : load_n<A>(p + r * A::N, left);
          A::store(column + r * classes * A::N, z);
          top[r].take(z, k);
        }
    }
    for (int r = 0; r < kRun; r++) {
      A::store(max + (v + r) * A::N, top[r].max);
      A::store(target + (v + r) * A::N, top[r].target);
    }
  }
}

// One vector of pixels, any strides: scalar loads.
template <class A, class T>
DSCT_INLINE void read_any_vector(const LogitView& x, const Offsets& at, int first, int n, int64_t class_begin,
                                 int64_t class_end, Top<A>& top, typename A::S* column) {
  typedef typename A::S S;
  const T* p[A::N];
  for (int i = 0; i < A::N; i++)
    p[i] = static_cast<const T*>(x.data) + at.at(first + (first + i < n ? i : 0)) + class_begin * x.class_stride;
  for (int64_t c = class_begin; c < class_end; c++) {
    S lanes[A::N];
    for (int i = 0; i < A::N; i++, p[i - 1] += x.class_stride) lanes[i] = S(to_float(*p[i]));
    const typename A::V z = A::load(lanes);
    A::store(column + c * A::N, z);
    top.take(z, A::set1(S(c)));
  }
}

template <class A, class T>
DSCT_INLINE void read_any(const LogitView& x, const Offsets& at, int n, int64_t classes, const typename A::S* label,
                          typename A::S* columns, typename A::S* max, typename A::S* target) {
  for (int v = 0; v * A::N < n; v++) {
    Top<A> top;
    top.begin(label + v * A::N);
    read_any_vector<A, T>(x, at, v * A::N, n, 0, classes, top, columns + v * classes * A::N);
    A::store(max + v * A::N, top.max);
    A::store(target + v * A::N, top.target);
  }
}

template <class A, int C, class T>
DSCT_INLINE void read_tile(const T* p, int64_t pitch, int64_t class_begin, int count, Top<A>& top,
                           typename A::S* column) {
  typename A::V tile[C];
  load_transposed<A, C>(p + class_begin, pitch, tile);
  typename A::V k = A::set1(typename A::S(class_begin));
  column += class_begin * A::N;
  if (count == C) {
    for (int c = 0; c < C; c++, k = k + A::set1(1)) {
      A::store(column + c * A::N, tile[c]);
      top.take(tile[c], k);
    }
  } else {
    for (int c = 0; c < count; c++, k = k + A::set1(1)) {
      A::store(column + c * A::N, tile[c]);
      top.take(tile[c], k);
    }
  }
}

// Classes contiguous (channels_last): tiles are transposed in registers. A tile may read past the last class of a
// pixel, into the next pixel's, but never past the tensor.
template <class A, class T>
DSCT_INLINE void read_columns(const LogitView& x, const Offsets& at, int n, int64_t classes, const typename A::S* label,
                              typename A::S* columns, typename A::S* max, typename A::S* target) {
  const T* data = static_cast<const T*>(x.data);
  for (int v = 0; v * A::N < n; v++) {
    typename A::S* column = columns + v * classes * A::N;
    Top<A> top;
    top.begin(label + v * A::N);
    const int64_t start = at.base + v * A::N * at.stride;
    for (int64_t c = 0; c < classes;) {
      const int chunk = chunk_for<A>(classes - c);
      const int count = classes - c < chunk ? int(classes - c) : chunk;
      const bool inside = start + (A::N - 1) * at.stride + c + chunk <= x.extent && (v + 1) * A::N <= n;
      if (!inside) {
        read_any_vector<A, T>(x, at, v * A::N, n, c, c + count, top, column);
      } else if (chunk == A::N) {
        read_tile<A, A::N>(data + start, at.stride, c, count, top, column);
      } else if constexpr (sizeof(typename A::S) == 4 && A::N == 16) {
        if (chunk == 8)
          read_tile<A, 8>(data + start, at.stride, c, count, top, column);
        else
          read_tile<A, 4>(data + start, at.stride, c, count, top, column);
      } else if constexpr (sizeof(typename A::S) == 4 && A::N == 8) {
        read_tile<A, 4>(data + start, at.stride, c, count, top, column);
      }
      c += count;
    }
    A::store(max + v * A::N, top.max);
    A::store(target + v * A::N, top.target);
  }
}

template <class A, class T>
void read_as(const LogitView& x, const Offsets& at, int n, int64_t classes, const typename A::S* label,
             typename A::S* columns, typename A::S* max, typename A::S* target) {
  if (at.uniform && x.class_stride == 1)
    read_columns<A, T>(x, at, n, classes, label, columns, max, target);
  else if (at.uniform && at.stride == 1)
    read_rows<A, T>(x, at, n, classes, label, columns, max, target);
  else
    read_any<A, T>(x, at, n, classes, label, columns, max, target);
}

template <class A>
void read(const LogitView& x, const Offsets& at, int n, int64_t classes, const typename A::S* label,
          typename A::S* columns, typename A::S* max, typename A::S* target) {
  switch (x.type) {
    case FloatType::kF32:
      return read_as<A, float>(x, at, n, classes, label, columns, max, target);
    case FloatType::kBF16:
      return read_as<A, bf16>(x, at, n, classes, label, columns, max, target);
    case FloatType::kF16:
      return read_as<A, f16>(x, at, n, classes, label, columns, max, target);
    case FloatType::kF64:
      if constexpr (sizeof(typename A::S) == 8)
        return read_as<A, double>(x, at, n, classes, label, columns, max, target);
  }
}

// The logits of the next block, asked for while this one is computed on, a class at a time: each of its vectors asks
// for its share of the classes. Without, the reads wait for memory: strides of 1 MiB between the classes leave the
// hardware's prefetchers behind. A class at a time, because each is on a page of its own, and misses the TLB.
struct Ahead {
  const char* p;
  int64_t step;
  int lines;
  bool near;  // into L1: few classes, and contiguous (rows 1 MiB apart would all want the same sets)
  DSCT_FORCE_INLINE void ask() {
    if (near)
      for (int i = 0; i < lines; i++) prefetch_l1(p + 64 * i);
    else
      for (int i = 0; i < lines; i++) prefetch_l2(p + 64 * i);
    p += step;
  }
};
template <class A>
DSCT_INLINE Ahead ahead(const LogitView& x, const Offsets& at, int block, int64_t classes, int64_t first_class) {
  const int64_t size = size_of(x.type);
  const char* data = static_cast<const char*>(x.data);
  if (!at.uniform || (at.stride != 1 && x.class_stride != 1)) return {data, 0, 0, true};
  const int64_t step = (x.class_stride == 1 ? block : x.class_stride) * size;
  return {data + (at.base + block * at.stride) * size + first_class * step, step, int(block * size / 64),
          x.class_stride == 1 && classes <= 32};
}

// A vector's share: the classes, from `first` on, every so many as there are vectors in a block, for which it asks.
struct Share {
  int vectors;
  int left;  // classes until its next
  int64_t first;
  DSCT_FORCE_INLINE static Share of(int v, int vectors, int64_t classes) {
    return {vectors, int((vectors - v * classes % vectors) % vectors), (v * classes + vectors - 1) / vectors};
  }
  DSCT_FORCE_INLINE bool due() {
    if (left-- != 0) return false;
    left = vectors - 1;
    return true;
  }
};

// --- write ---

// G, the gradient of one vector of pixels: begin(scratch, vector, classes), at(class, class as a vector).
// S, a kernel's working memory, has kGroup, at_grad, and rows for the channels-last gradient of a group.

template <class A, class G, class T, class S>
DSCT_INLINE void write_rows(const LogitArgs& args, const S& s, int v0, int n) {
  typedef typename A::V V;
  constexpr int kRun = 2;
  const int64_t stride = args.grad.class_stride;
  for (int v = v0; v < v0 + S::kGroup && v * A::N < n; v += kRun) {
    T* p = static_cast<T*>(const_cast<void*>(args.grad.data)) + s.at_grad.base + v * A::N;
    G g[kRun];
    for (int r = 0; r < kRun; r++) g[r].begin(s, v + r, args.classes);
    V k = A::set1(0);
    const uintptr_t bytes = reinterpret_cast<uintptr_t>(p) | uintptr_t(stride * int64_t(sizeof(T)));
    const bool aligned = bytes % 64 == 0;  // what torch's allocator gives
    if ((v + kRun) * A::N <= n && args.stream && aligned) {
      for (int64_t c = 0; c < args.classes; c++, p += stride, k = k + A::set1(1))
        stream2<A>(p, g[0].at(c, k), g[1].at(c, k));
    } else if ((v + kRun) * A::N <= n) {
      for (int64_t c = 0; c < args.classes; c++, p += stride, k = k + A::set1(1))
        for (int r = 0; r < kRun; r++) A::store(p + r * A::N, g[r].at(c, k));
    } else {
      for (int64_t c = 0; c < args.classes; c++, p += stride, k = k + A::set1(1))
        for (int r = 0; r < kRun && (v + r) * A::N < n; r++) {
          const int left = n - (v + r) * A::N;
          store_n<A>(p + r * A::N, g[r].at(c, k), left < A::N ? left : A::N);
        }
    }
  }
}

template <class A, class G, class T, class S>
DSCT_INLINE void write_any(const LogitArgs& args, const S& s, int v0, int n) {
  T* data = static_cast<T*>(const_cast<void*>(args.grad.data));
  for (int v = v0; v < v0 + S::kGroup && v * A::N < n; v++) {
    const int count = n - v * A::N < A::N ? n - v * A::N : A::N;
    G g;
    g.begin(s, v, args.classes);
    T* p[A::N];
    for (int i = 0; i < count; i++) p[i] = data + s.at_grad.at(v * A::N + i);
    for (int64_t c = 0; c < args.classes; c++) {
      typename A::S lanes[A::N];
      A::store(lanes, g.at(c, A::set1(typename A::S(c))));
      for (int i = 0; i < count; i++, p[i - 1] += args.grad.class_stride) from_float(lanes[i], p[i]);
    }
  }
}

template <class A, class G, int C, class T>
DSCT_INLINE void write_tile(const G& g, int64_t class_begin, int count, T* rows, int64_t pitch) {
  typename A::V tile[C];
  typename A::V k = A::set1(typename A::S(class_begin));
  for (int c = 0; c < C; c++, k = k + A::set1(1)) tile[c] = c < count ? g.at(class_begin + c, k) : A::set1(0);
  store_transposed<A, C>(rows + class_begin, pitch, tile);
}

// Copies `bytes` past the caches; both 64-byte aligned.
DSCT_INLINE void stream_copy(void* to, const void* from, size_t bytes) {
  for (size_t i = 0; i < bytes / sizeof(float); i += F32::N)
    F32::stream(static_cast<float*>(to) + i, F32::load(static_cast<const float*>(from) + i));
}

// The gradient of `count` pixels, rows of K in s.rows, to where it belongs.
template <class A, class T, class S>
DSCT_INLINE void put_rows(const LogitArgs& args, const S& s, int first, int count) {
  const int64_t classes = args.classes;
  const T* rows = reinterpret_cast<const T*>(s.rows);
  T* to = static_cast<T*>(const_cast<void*>(args.grad.data)) + s.at_grad.base + first * s.at_grad.stride;
  const size_t bytes = size_t(count) * size_t(classes) * sizeof(T);
  if (s.at_grad.stride != classes) {
    for (int i = 0; i < count; i++) memcpy(to + i * s.at_grad.stride, rows + i * classes, size_t(classes) * sizeof(T));
  } else if (args.stream && (reinterpret_cast<uintptr_t>(to) | bytes) % 64 == 0) {
    stream_copy(to, rows, bytes);
  } else {
    memcpy(to, rows, bytes);
  }
}

// Classes contiguous: transposed back into rows of K in L1. Tiles go from the last to the first: what a partial one
// writes past the end of a pixel is overwritten by the next pixel's first tile.
template <class A, class G, class T, class S>
DSCT_INLINE void write_columns(const LogitArgs& args, const S& s, int v0, int n) {
  const int64_t classes = args.classes;
  T* rows = reinterpret_cast<T*>(s.rows);
  const int first = v0 * A::N;
  const int count = n - first < S::kGroup * A::N ? n - first : S::kGroup * A::N;
  for (int v = v0; v * A::N < first + count; v++) {
    T* out = rows + int64_t(v - v0) * A::N * classes;
    G g;
    g.begin(s, v, classes);
    const int64_t whole = classes / A::N * A::N;
    const int left = int(classes - whole);
    if (left > 0) {
      const int chunk = chunk_for<A>(left);
      if (chunk == A::N) {
        write_tile<A, G, A::N>(g, whole, left, out, classes);
      } else if constexpr (sizeof(typename A::S) == 4 && A::N == 16) {
        if (chunk == 8)
          write_tile<A, G, 8>(g, whole, left, out, classes);
        else
          write_tile<A, G, 4>(g, whole, left, out, classes);
      } else if constexpr (sizeof(typename A::S) == 4 && A::N == 8) {
        write_tile<A, G, 4>(g, whole, left, out, classes);
      }
    }
    for (int64_t c = whole - A::N; c >= 0; c -= A::N) write_tile<A, G, A::N>(g, c, A::N, out, classes);
  }
  put_rows<A, T>(args, s, first, count);
}

template <class A, class G, class T, class S>
void write_as(const LogitArgs& args, const S& s, int v0, int n) {
  if (s.at_grad.uniform && args.grad.class_stride == 1)
    write_columns<A, G, T>(args, s, v0, n);
  else if (s.at_grad.uniform && s.at_grad.stride == 1)
    write_rows<A, G, T>(args, s, v0, n);
  else
    write_any<A, G, T>(args, s, v0, n);
}

template <class A, class G, class S>
DSCT_INLINE void write(const LogitArgs& args, const S& s, int v0, int n) {
  switch (args.grad.type) {
    case FloatType::kF32:
      return write_as<A, G, float>(args, s, v0, n);
    case FloatType::kBF16:
      return write_as<A, G, bf16>(args, s, v0, n);
    case FloatType::kF16:
      return write_as<A, G, f16>(args, s, v0, n);
    case FloatType::kF64:
      if constexpr (sizeof(typename A::S) == 8) return write_as<A, G, double>(args, s, v0, n);
  }
}

// --- blocks ---

struct Position {
  int64_t index[kMaxPixelDims];
};

DSCT_INLINE Position position(const LogitArgs& args, int64_t pixel) {
  Position p;
  for (int d = args.dims - 1; d > 0; d--) {
    p.index[d] = pixel % args.sizes[d];
    pixel /= args.sizes[d];
  }
  p.index[0] = pixel;
  return p;
}

// The pixels of the block that starts at `pixel`: within one row of the innermost dimension where those are long enough
// for a vector, else whatever comes next.
DSCT_INLINE int block_length(const LogitArgs& args, const Position& p, int64_t pixel, int64_t end, int block, int lanes,
                             bool* uniform) {
  const int64_t inner = args.sizes[args.dims - 1];
  const int64_t row = inner - p.index[args.dims - 1];
  int64_t n = end - pixel < block ? end - pixel : block;
  *uniform = inner >= lanes || row >= n;
  if (*uniform && row < n) n = row;
  return int(n);
}

DSCT_INLINE void locate(const LogitArgs& args, const Position& p, const int64_t* strides, int n, bool uniform,
                        Offsets* at) {
  int64_t base = 0;
  for (int d = 0; d < args.dims; d++) base += p.index[d] * strides[d];
  at->uniform = uniform;
  at->base = base;
  at->stride = strides[args.dims - 1];
  if (uniform) return;
  Position q = p;
  for (int i = 0; i < n; i++) {
    at->each[i] = base;
    for (int d = args.dims - 1; d >= 0; d--) {
      base += strides[d];
      if (++q.index[d] < args.sizes[d] || d == 0) break;
      base -= strides[d] * args.sizes[d];
      q.index[d] = 0;
    }
  }
}

}  // namespace
}  // namespace DSCT_ISA
}  // namespace dsct
