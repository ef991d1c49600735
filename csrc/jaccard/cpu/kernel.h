// The soft Jaccard kernels of one instruction set. A block of pixels goes through three steps, a lane per pixel:
//   1. read    both networks' logits, once, in any layout, into columns [vector][class][lane] that live in L1/L2, with
//              the largest of each pixel
//   2. exp     once per logit, in place, and their sums: p = e^S / sum^S, q = e^T / sum^T
//   3. either  the sums over pixels of v p, v q and v |p - q| per class, lane by lane
//      or      the gradient, p (h - sum_k p_k h_k) v / tau with h = a + b sign(p - q), written once
// Floor: the loss reads both maps once, its backward reads both again and writes one; two exps a logit in each.
// Backward makes p and q anew because the sums over the whole batch come first, and keeping them would cost two more
// maps.
#pragma once

#include "args.h"
#include "common/logit_blocks.h"
#include "common/vec_math.h"

namespace dsct {
namespace DSCT_ISA {
namespace {

constexpr int kPartial = 16;  // classes of a partial sum: a longer float sum loses digits
constexpr int kSums = 3;      // p, q, |p - q|

template <class A>
struct Scratch {
  typedef typename A::S S;
  static constexpr int kGroup = group_vectors<A>();
  S *student, *teacher;                         // columns: logits, then exponentials
  char* rows;                                   // channels-last gradient of a group
  S* sums;                                      // [class][kSums][lane], of the chunk so far
  S* levels;                                    // [3][class]: h where p is below, equal to and above q
  S no_label[kMaxBlock], no_target[kMaxBlock];  // of the shared readers, which can leave a class out
  S share[kMaxBlock];                           // v; 0 past the end
  S max_s[kMaxBlock], max_t[kMaxBlock];
  S inverse_s[kMaxBlock], inverse_t[kMaxBlock];  // what an exponential is multiplied by: 1 / sum, times v in the loss
  S factor[kMaxBlock], mean[kMaxBlock];          // of the gradient
  Offsets at_student, at_teacher, at_grad;
};

template <class A>
DSCT_INLINE size_t sums_bytes(const LogitArgs& args) {
  return size_t(args.classes) * kSums * A::N * sizeof(typename A::S);
}
template <class A>
DSCT_INLINE size_t levels_bytes(const LogitArgs& args) {
  return round_up(size_t(args.classes) * 3 * sizeof(typename A::S), 64);
}
template <class A>
size_t scratch_bytes(const JaccardArgs& args) {
  return round_up(sizeof(Scratch<A>), 64) + 2 * column_bytes<A>(args) + sums_bytes<A>(args) + levels_bytes<A>(args) +
         row_bytes<A>(args);
}

template <class A>
Scratch<A>& lay_out(const JaccardArgs& args, void* memory) {
  Scratch<A>& s = *static_cast<Scratch<A>*>(memory);
  typedef typename A::S S;
  char* p = static_cast<char*>(memory) + round_up(sizeof(Scratch<A>), 64);
  s.student = reinterpret_cast<S*>(p);
  s.teacher = reinterpret_cast<S*>(p += column_bytes<A>(args));
  s.sums = reinterpret_cast<S*>(p += column_bytes<A>(args));
  s.levels = reinterpret_cast<S*>(p += sums_bytes<A>(args));
  s.rows = p + levels_bytes<A>(args);
  for (int i = 0; i < kMaxBlock; i++) s.no_label[i] = S(-1);
  return s;
}

// Returns whether any of the n pixels from `pixel` on counts.
template <class A>
DSCT_INLINE bool load_share(const JaccardArgs& args, int64_t pixel, int n, typename A::S* share) {
  typedef typename A::S S;
  const S* from = static_cast<const S*>(args.share);
  const int end = int(round_up(size_t(n), kRound));
  for (int i = 0; i < n; i++) share[i] = from == nullptr ? S(1) : from[pixel + i];
  for (int i = n; i < end; i++) share[i] = S(0);
  bool any = false;
  for (int i = 0; i < end; i += A::N) any |= A::any(A::ne(A::load(share + i), A::set1(0)));
  return any;
}

// Logits into exponentials for vector v, and what makes probabilities of them. A pixel that does not count gets 0 for
// all, by selection: whatever stands there.
template <class A, bool weighted>
DSCT_INLINE void exponentials(const JaccardArgs& args, Scratch<A>& s, int v, int block) {
  typedef typename A::S S;
  typedef typename A::V V;
  const int lane = v * A::N;
  const int64_t classes = args.classes;
  S* student = s.student + lane * classes;
  S* teacher = s.teacher + lane * classes;
  Share share = Share::of(v, block / A::N, classes);
  Ahead ahead_s = ahead<A>(args.student, s.at_student, block, classes, share.first);
  Ahead ahead_t = ahead<A>(args.teacher, s.at_teacher, block, classes, share.first);
  const V zero = A::set1(0), weight = A::load(s.share + lane);
  const typename A::M counts = A::ne(weight, zero);
  // Nothing but -inf: -inf less -inf is NaN, as it has to be.
  const V max_s = A::load(s.max_s + lane), max_t = A::load(s.max_t + lane);
  const V to_exp2 = A::set1(S(std::numbers::log2e / args.temperature));
  V sum_s = zero, sum_t = zero;
  for (int64_t begin = 0; begin < classes; begin += kPartial) {
    const int64_t end = begin + kPartial < classes ? begin + kPartial : classes;
    V part_s = zero, part_t = zero;
    for (int64_t c = begin; c < end; c++) {
      if (share.due()) {
        ahead_s.ask();
        ahead_t.ask();
      }
      const V e_s = A::keep(counts, exp2_nonpositive<A>((A::load(student + c * A::N) - max_s) * to_exp2));
      const V e_t = A::keep(counts, exp2_nonpositive<A>((A::load(teacher + c * A::N) - max_t) * to_exp2));
      part_s = part_s + e_s;
      part_t = part_t + e_t;
      A::store(student + c * A::N, e_s);
      A::store(teacher + c * A::N, e_t);
    }
    sum_s = sum_s + part_s;
    sum_t = sum_t + part_t;
  }
  const V numerator = weighted ? weight : A::set1(1);
  A::store(s.inverse_s + lane, A::keep(counts, numerator / sum_s));
  A::store(s.inverse_t + lane, A::keep(counts, numerator / sum_t));
}

template <class A>
DSCT_INLINE void read_block(const JaccardArgs& args, Scratch<A>& s, int n) {
  read<A>(args.student, s.at_student, n, args.classes, s.no_label, s.student, s.max_s, s.no_target);
  read<A>(args.teacher, s.at_teacher, n, args.classes, s.no_label, s.teacher, s.max_t, s.no_target);
}

// --- the loss ---

// The sums of one block, class by class: they stay in registers over its pixels.
template <class A>
DSCT_INLINE void add_sums(const JaccardArgs& args, Scratch<A>& s, int n) {
  typedef typename A::S S;
  typedef typename A::V V;
  const int64_t classes = args.classes;
  const int vectors = (n + A::N - 1) / A::N;
  for (int64_t c = 0; c < classes; c++) {
    V sum_p = A::set1(0), sum_q = A::set1(0), sum_apart = A::set1(0);
    for (int v = 0; v < vectors; v++) {
      const int64_t at = (v * classes + c) * A::N;
      const V p = A::load(s.student + at) * A::load(s.inverse_s + v * A::N);
      const V q = A::load(s.teacher + at) * A::load(s.inverse_t + v * A::N);
      sum_p = sum_p + p;
      sum_q = sum_q + q;
      // Not |p - q|: a compiler may fuse the product into the difference, and equal networks would differ. A NaN that
      // max and min drop is in the other two sums.
      sum_apart = sum_apart + (A::max(p, q) - A::min(p, q));
    }
    S* sums = s.sums + c * kSums * A::N;
    A::store(sums, A::load(sums) + sum_p);
    A::store(sums + A::N, A::load(sums + A::N) + sum_q);
    A::store(sums + 2 * A::N, A::load(sums + 2 * A::N) + sum_apart);
  }
}

template <class A>
void sums(const JaccardArgs& args, int64_t begin, int64_t end, void* memory, double* sums) {
  Scratch<A>& s = lay_out<A>(args, memory);
  const int block = block_pixels(args);
  memset(s.sums, 0, sums_bytes<A>(args));
  for (int64_t pixel = begin; pixel < end;) {
    const Position p = position(args, pixel);
    bool uniform;
    const int n = block_length(args, p, pixel, end, block, A::N, &uniform);
    if (load_share<A>(args, pixel, n, s.share)) {
      locate(args, p, args.student.pixel_strides, n, uniform, &s.at_student);
      locate(args, p, args.teacher.pixel_strides, n, uniform, &s.at_teacher);
      read_block<A>(args, s, n);
      for (int v = 0; v * A::N < n; v++) exponentials<A, true>(args, s, v, block);
      add_sums<A>(args, s, n);
    }
    pixel += n;
  }
  for (int64_t c = 0; c < args.classes; c++)
    for (int k = 0; k < kSums; k++)
      sums[k * args.classes + c] = double(sum<A>(A::load(s.sums + (c * kSums + k) * A::N)));
}

// --- backward ---

// sum_k p_k h_k of vector v, and each h in place of the teacher's exponential.
template <class A>
DSCT_INLINE void prepare_gradient(const JaccardArgs& args, Scratch<A>& s, int v) {
  typedef typename A::S S;
  typedef typename A::V V;
  const int lane = v * A::N;
  const int64_t classes = args.classes;
  const S* student = s.student + lane * classes;
  S* teacher = s.teacher + lane * classes;
  const S *below = s.levels, *equal = s.levels + classes, *above = s.levels + 2 * classes;
  const V inverse_s = A::load(s.inverse_s + lane), inverse_t = A::load(s.inverse_t + lane);
  const V share = A::load(s.share + lane);
  const typename A::M counts = A::ne(share, A::set1(0));
  V total = A::set1(0);
  for (int64_t begin = 0; begin < classes; begin += kPartial) {
    const int64_t end = begin + kPartial < classes ? begin + kPartial : classes;
    V part = A::set1(0);
    for (int64_t c = begin; c < end; c++) {
      const V e_s = A::load(student + c * A::N);
      const V p = e_s * inverse_s, q = A::load(teacher + c * A::N) * inverse_t;
      V h = A::select(A::lt(p, q), A::set1(below[c]), A::set1(equal[c]));
      h = A::keep(counts, A::select(A::lt(q, p), A::set1(above[c]), h));
      part = A::fma(e_s, h, part);
      A::store(teacher + c * A::N, h);
    }
    total = total + part;
  }
  A::store(s.mean + lane, total * inverse_s);
  A::store(s.factor + lane, inverse_s * share * A::set1(S(1 / args.temperature)));
}

template <class A>
struct Gradient {
  typename A::V factor, mean;
  const typename A::S *student, *teacher;
  DSCT_FORCE_INLINE void begin(const Scratch<A>& s, int v, int64_t classes) {
    const int lane = v * A::N;
    factor = A::load(s.factor + lane);
    mean = A::load(s.mean + lane);
    student = s.student + lane * classes;
    teacher = s.teacher + lane * classes;
  }
  DSCT_FORCE_INLINE typename A::V at(int64_t c, typename A::V) const {
    return A::load(student + c * A::N) * factor * (A::load(teacher + c * A::N) - mean);
  }
};

template <class A>
void backward(const JaccardArgs& args, int64_t begin, int64_t end, void* memory) {
  typedef typename A::S S;
  Scratch<A>& s = lay_out<A>(args, memory);
  for (int64_t c = 0; c < args.classes; c++) {
    const double a = args.coefficients[c], b = args.coefficients[args.classes + c];
    s.levels[c] = S(a - b);
    s.levels[args.classes + c] = S(a);
    s.levels[2 * args.classes + c] = S(a + b);
  }
  const int block = block_pixels(args);
  for (int64_t pixel = begin; pixel < end;) {
    const Position p = position(args, pixel);
    bool uniform;
    const int n = block_length(args, p, pixel, end, block, A::N, &uniform);
    locate(args, p, args.student.pixel_strides, n, uniform, &s.at_student);
    locate(args, p, args.teacher.pixel_strides, n, uniform, &s.at_teacher);
    locate(args, p, args.grad.pixel_strides, n, uniform, &s.at_grad);
    const bool any = load_share<A>(args, pixel, n, s.share);
    if (any) {
      read_block<A>(args, s, n);
    } else {  // nothing is read
      const size_t bytes = size_t(args.classes) * size_t((n + A::N - 1) / A::N * A::N) * sizeof(S);
      memset(s.student, 0, bytes);
      memset(s.teacher, 0, bytes);
      memset(s.factor, 0, sizeof(s.factor));
      memset(s.mean, 0, sizeof(s.mean));
    }
    for (int v0 = 0; v0 * A::N < n; v0 += Scratch<A>::kGroup) {
      for (int v = v0; any && v < v0 + Scratch<A>::kGroup && v * A::N < n; v++) {
        exponentials<A, false>(args, s, v, block);
        prepare_gradient<A>(args, s, v);
      }
      write<A, Gradient<A>>(args, s, v0, n);
    }
    pixel += n;
  }
  if (args.stream) stream_fence();
}

}  // namespace

const JaccardKernels jaccard_kernels_f32 = {sums<F32>, backward<F32>, scratch_bytes<F32>};
const JaccardKernels jaccard_kernels_f64 = {sums<F64>, backward<F64>, scratch_bytes<F64>};

}  // namespace DSCT_ISA
}  // namespace dsct
