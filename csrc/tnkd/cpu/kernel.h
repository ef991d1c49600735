// The TNKD kernels of one instruction set. A block of pixels goes through four steps, a lane per pixel throughout:
//   1. read     both networks' logits, once, in any layout, into columns [vector][class][lane] that live in L1/L2;
//               on the way: the target's logit and the largest other one (an own maximum for the others, so that a
//               dominating target does not underflow their sum)
//   2. sums     exp once per logit, kept in place of the logit; the target's lane contributes nothing
//   3. pixel    pixel_math.h: losses, and the coefficients of the gradient
//   4. write    grad_j = coef_s e^S_j + coef_t e^T_j (+ cross-entropy), once, past the caches where it will not fit
// Many classes in channels_last go another way, a lane per class: rows.h. Logits smaller than the labels take
// their steps 1 and 4 from upsampled.h.
#pragma once

#include "args.h"
#include "common/logit_blocks.h"
#include "common/vec_math.h"
#include "tnkd/pixel_math.h"

namespace dsct {
namespace DSCT_ISA {
namespace {

// Classes of a partial sum: a longer float sum loses digits, which shows where two networks nearly agree. As fast.
constexpr int kPartial = 16;

template <class A>
struct Math : A {
  typedef typename A::V V;
  DSCT_INLINE V ratio(V x, V y) { return x / y; }
  DSCT_INLINE V exp_nonpositive(V x) { return DSCT_ISA::exp_nonpositive<A>(x); }
  DSCT_INLINE V log_normal(V x) { return DSCT_ISA::log_normal<A>(x); }
};

// How cross-entropy, at temperature 1, gets its exponentials.
enum class Ce {
  kNone,    // not asked for, or tau = 1: the sums and the coefficients are TNKD's
  kSquare,  // tau = 2: exp(x) = exp(x / 2)^2
  kOwn,     // an exp of its own, kept in a third set of columns
};

template <class A>
struct Scratch {
  typedef typename A::S S;
  static constexpr int kGroup = group_vectors<A>();
  static constexpr int kLanes = 2 * A::N;  // of a Pair
  S *student, *teacher, *ce;               // columns: logits, then exponentials
  char* rows;                              // channels-last gradient of a group
  S label[kMaxBlock];                      // -1: ignored, or past the end
  S ce_factor[kMaxBlock];
  S max_s[kMaxBlock], target_s[kMaxBlock], max_t[kMaxBlock], target_t[kMaxBlock];
  S sum_s[kMaxBlock], sum_t[kMaxBlock], sum_ce[kMaxBlock], cross[kMaxBlock];
  S coef_s[kMaxBlock], coef_t[kMaxBlock], coef_ce[kMaxBlock], grad_target[kMaxBlock];
  double lanes_ce[kLanes], lanes_tckd[kLanes], lanes_nckd[kLanes];  // the losses so far
  Offsets at_student, at_teacher, at_grad, at_target;
};

template <class A>
size_t scratch_bytes(const TnkdArgs& args) {
  return round_up(sizeof(Scratch<A>), 64) + 3 * column_bytes<A>(args) + row_bytes<A>(args);
}

// No target: the label is the teacher's argmax, the smallest index on a tie. The columns hold the teacher already.
template <class A>
void label_by_teacher(int n, int64_t classes, const typename A::S* columns, typename A::S* label, typename A::S* max,
                      typename A::S* target) {
  typedef typename A::V V;
  for (int v = 0; v * A::N < n; v++) {
    const typename A::S* column = columns + v * classes * A::N;
    V best = A::load(column), arg = A::set1(0), k = A::set1(1);
    for (int64_t c = 1; c < classes; c++, k = k + A::set1(1)) {
      const V z = A::load(column + c * A::N);
      const typename A::M larger = A::lt(best, z);
      best = A::select(larger, z, best);
      arg = A::select(larger, k, arg);
    }
    const int left = n - v * A::N;
    if (left < A::N) arg = A::select(A::first(left), arg, A::set1(-1));
    A::store(label + v * A::N, arg);
    Top<A> top;
    Top<A>::begin(top, label + v * A::N);
    k = A::set1(0);
    for (int64_t c = 0; c < classes; c++, k = k + A::set1(1)) Top<A>::take(top, A::load(column + c * A::N), k);
    A::store(max + v * A::N, top.max);
    A::store(target + v * A::N, top.target);
  }
}

// --- 2. and 3. sums and pixel, for one vector ---

template <class A>
struct Sums {
  typename A::V s, t, ce, cross;
  DSCT_INLINE Sums none() { return {A::set1(0), A::set1(0), A::set1(0), A::set1(0)}; }
  DSCT_INLINE void add(Sums& to, const Sums& more) {
    to.s = to.s + more.s;
    to.t = to.t + more.t;
    to.ce = to.ce + more.ce;
    to.cross = to.cross + more.cross;
  }
};

// Logits into exponentials, to the columns from `at` on, and their sums. Only `others` count.
template <class A, Ce mode>
struct Exponentials {
  typename A::V to_exp2, max_s, max_t;
  typename A::S *student, *teacher, *ce;

  DSCT_INLINE void take(const Exponentials& to, int64_t at, typename A::V z_s, typename A::V z_t, typename A::M others,
                        Sums<A>& sums) {
    typedef typename A::V V;
    const V x_s = z_s - to.max_s, x_t = z_t - to.max_t;
    const V t_s = x_s * to.to_exp2, t_t = x_t * to.to_exp2;
    const V e_s = A::keep(others, exp2_nonpositive<A>(t_s));
    const V e_t = A::keep(others, exp2_nonpositive<A>(t_t));
    sums.s = sums.s + e_s;
    sums.t = sums.t + e_t;
    sums.cross = fma_where<A>(A::lt(A::set1(0), e_t), e_t, t_t - t_s, sums.cross);
    A::store(to.student + at, e_s);
    A::store(to.teacher + at, e_t);
    if constexpr (mode == Ce::kSquare) sums.ce = A::fma(e_s, e_s, sums.ce);
    if constexpr (mode == Ce::kOwn) {
      const V e_ce = A::keep(others, exp2_nonpositive<A>(x_s * A::set1(typename A::S(1.4426950408889634074))));
      sums.ce = sums.ce + e_ce;
      A::store(to.ce + at, e_ce);
    }
  }
};

template <class A, Ce mode>
DSCT_INLINE void sum_classes(const TnkdArgs& args, Scratch<A>& scratch, int v, int block) {
  typedef typename A::S S;
  typedef typename A::V V;
  const double log2e = 1.4426950408889634074;
  const int lane = v * A::N;
  const int64_t classes = args.classes;
  S* student = scratch.student + lane * classes;
  S* teacher = scratch.teacher + lane * classes;
  const int shares = block / A::N;
  int share = int((shares - v * classes % shares) % shares);  // classes until the next one to ask for
  const int64_t first_asked = (v * classes + shares - 1) / shares;
  Ahead ahead_s = ahead<A>(args.student, scratch.at_student, block, classes, first_asked);
  Ahead ahead_t = ahead<A>(args.teacher, scratch.at_teacher, block, classes, first_asked);
  const V zero = A::set1(0), one = A::set1(1), infinity = A::set1(S(__builtin_inf()));
  const V label = A::load(scratch.label + lane);
  const typename A::M valid = A::le(zero, label);
  V max_s = A::load(scratch.max_s + lane), max_t = A::load(scratch.max_t + lane);
  max_s = A::select(A::eq(max_s, -infinity), zero, max_s);  // every other class absent
  max_t = A::select(A::eq(max_t, -infinity), zero, max_t);
  const Exponentials<A, mode> to = {A::set1(S(log2e / args.temperature)), max_s, max_t, student, teacher,
                                    scratch.ce + lane * classes};
  Sums<A> total = Sums<A>::none();
  V k = zero;
  for (int64_t begin = 0; begin < classes; begin += kPartial) {
    const int64_t end = begin + kPartial < classes ? begin + kPartial : classes;
    Sums<A> part = Sums<A>::none();
    for (int64_t c = begin; c < end; c++, k = k + one) {
      if (share-- == 0) {
        share = shares - 1;
        Ahead::ask(ahead_s);
        Ahead::ask(ahead_t);
      }
      Exponentials<A, mode>::take(to, c * A::N, A::load(student + c * A::N), A::load(teacher + c * A::N),
                                  A::ne_where(valid, label, k), part);
    }
    Sums<A>::add(total, part);
  }
  A::store(scratch.max_s + lane, max_s);
  A::store(scratch.max_t + lane, max_t);
  A::store(scratch.sum_s + lane, total.s);
  A::store(scratch.sum_t + lane, total.t);
  A::store(scratch.sum_ce + lane, mode == Ce::kNone ? total.s : total.ce);
  A::store(scratch.cross + lane, total.cross * A::set1(S(1 / log2e)));
}

template <class A>
struct LossSums {
  typename A::V ce, tckd, nckd;
};
template <class S>
DSCT_INLINE void add_lanes(const S* from, int n, double* to) {
  for (int i = 0; i < n; i++) to[i] += double(from[i]);
}
// A block's losses, to doubles, still lane by lane: a sum across lanes for each block took 3% of the time at K = 6.
template <class P, class A>
DSCT_INLINE void add_losses(const TnkdArgs& args, const LossSums<P>& losses, Scratch<A>& s) {
  typename P::S lanes[P::N];
  P::store(lanes, losses.tckd);
  add_lanes(lanes, P::N, s.lanes_tckd);
  P::store(lanes, losses.nckd);
  add_lanes(lanes, P::N, s.lanes_nckd);
  if (!args.with_ce) return;
  P::store(lanes, losses.ce);
  add_lanes(lanes, P::N, s.lanes_ce);
}

// P: A, or a Pair of it.
template <class P, Ce mode, class A>
DSCT_INLINE void pixels(const TnkdArgs& args, Scratch<A>& s, int lane, int n, int64_t first_pixel,
                        LossSums<P>& losses) {
  typedef typename P::S S;
  typedef typename P::V V;
  const V zero = P::set1(0);
  const V by_temperature = P::set1(S(1 / args.temperature));
  const double factor = args.temperature * args.tnkd_scale;
  const bool two_classes = args.classes == 2;  // one beside the target: nothing to compare, not even where it is absent
  const V x_s = P::load(s.target_s + lane) - P::load(s.max_s + lane);
  const V x_t = P::load(s.target_t + lane) - P::load(s.max_t + lane);
  const TnkdPixel<Math<P>> p =
      tnkd_pixel<Math<P>>(x_s * by_temperature, P::load(s.sum_s + lane), x_t * by_temperature, P::load(s.sum_t + lane),
                          P::load(s.cross + lane), P::set1(S(args.tckd_weight * factor)),
                          P::set1(two_classes ? S(0) : S(args.nckd_weight * factor)));
  const typename P::M valid = P::le(zero, P::load(s.label + lane));
  const V tckd = P::keep(valid, p.tckd), nckd = two_classes ? zero : P::keep(valid, p.nckd);
  losses.tckd = losses.tckd + tckd;
  losses.nckd = losses.nckd + nckd;
  V ce = zero, coef_s = p.coef_s, coef_ce = zero, grad_target = p.grad_target;
  if (args.with_ce) {
    const V weight = P::load(s.ce_factor + lane);
    const CePixel<Math<P>> q = ce_pixel<Math<P>>(x_s, P::load(s.sum_ce + lane));
    ce = P::keep(P::both(valid, P::ne(weight, zero)), weight * q.ce);
    losses.ce = losses.ce + ce;
    const V factor_ce = weight * P::set1(S(args.ce_weight * args.ce_scale));
    coef_ce = factor_ce * q.coef;
    grad_target = P::fma(-factor_ce, q.miss, grad_target);
    if constexpr (mode == Ce::kNone) coef_s = coef_s + coef_ce;
  }
  P::store(s.coef_s + lane, P::keep(valid, coef_s));
  P::store(s.coef_t + lane, P::keep(valid, p.coef_t));
  P::store(s.coef_ce + lane, P::keep(valid, coef_ce));
  P::store(s.grad_target + lane, P::keep(valid, grad_target));
  if (args.loss_map != nullptr) {
    // A part with weight 0 takes no part: 0 * inf would be NaN. But a NaN, which tckd always shows, is never hidden.
    const double square = args.temperature * args.temperature;
    V loss = zero;
    if (args.tckd_weight != 0)
      loss = P::fma(P::set1(S(args.tckd_weight * square)), tckd, loss);
    else
      loss = P::select(P::eq(tckd, tckd), zero, tckd);
    if (args.nckd_weight != 0) loss = P::fma(P::set1(S(args.nckd_weight * square)), nckd, loss);
    if (args.ce_weight != 0) loss = P::fma(P::set1(S(args.ce_weight)), ce, loss);
    S* out = static_cast<S*>(args.loss_map) + first_pixel + lane;
    if (n - lane >= P::N)
      P::store(out, loss);
    else
      store_n<P>(out, loss, n - lane);
  }
}

// --- 4. write ---

// The gradient of class c for one vector of pixels.
template <class A, Ce mode>
struct Gradient {
  typename A::V label, coef_s, coef_t, coef_ce, target;
  const typename A::S *student, *teacher, *ce;
  DSCT_INLINE void begin(Gradient& g, const Scratch<A>& s, int v, int64_t classes) {
    const int lane = v * A::N;
    g.label = A::load(s.label + lane);
    g.coef_s = A::load(s.coef_s + lane);
    g.coef_t = A::load(s.coef_t + lane);
    g.coef_ce = A::load(s.coef_ce + lane);
    g.target = A::load(s.grad_target + lane);
    g.student = s.student + lane * classes;
    g.teacher = s.teacher + lane * classes;
    g.ce = s.ce + lane * classes;
  }
  DSCT_INLINE typename A::V at(const Gradient& g, int64_t c, typename A::V k) {
    typedef typename A::V V;
    const V e_s = A::load(g.student + c * A::N), e_t = A::load(g.teacher + c * A::N);
    V coef = g.coef_s;
    if constexpr (mode == Ce::kSquare) coef = A::fma(e_s, g.coef_ce, coef);
    V value = A::fma(e_s, coef, e_t * g.coef_t);
    if constexpr (mode == Ce::kOwn) value = A::fma(A::load(g.ce + c * A::N), g.coef_ce, value);
    return A::select(A::eq(g.label, k), g.target, value);
  }
};

// --- labels ---

template <class A, class T>
DSCT_INLINE void load_labels_as(const TnkdArgs& args, const Offsets& at, int n, typename A::S* label) {
  typedef typename A::S S;
  const T* p = static_cast<const T*>(args.target);
  if (!at.uniform) {
    for (int i = 0; i < n; i++) label[i] = S(p[at.each[i]]);
  } else if (at.stride != 1) {
    for (int i = 0; i < n; i++) label[i] = S(p[at.base + i * at.stride]);
  } else {
    for (int i = 0; i < n; i++) label[i] = S(p[at.base + i]);
    // The next block's: among the streams of 2 K planes the hardware loses this one. At K = 6, contiguous, 15%.
    for (int i = 0; i < n; i += int(64 / sizeof(T))) prefetch_l1(p + at.base + n + i);
  }
}

// Labels as numbers of the accumulation type, -1 where ignored and past the end; returns whether any pixel is valid.
// Every label is in [0, 2^24) or the ignore_index, by the count beforehand, so that no rounding makes two of them
// equal.
template <class A>
bool load_labels(const TnkdArgs& args, const Offsets& at, int n, typename A::S* label) {
  typedef typename A::S S;
  typedef typename A::V V;
  switch (args.target_type) {
    case LabelType::kU8:
      load_labels_as<A, uint8_t>(args, at, n, label);
      break;
    case LabelType::kI8:
      load_labels_as<A, int8_t>(args, at, n, label);
      break;
    case LabelType::kI16:
      load_labels_as<A, int16_t>(args, at, n, label);
      break;
    case LabelType::kI32:
      load_labels_as<A, int32_t>(args, at, n, label);
      break;
    case LabelType::kI64:
      load_labels_as<A, int64_t>(args, at, n, label);
      break;
  }
  const int end = int(round_up(size_t(n), kRound));
  for (int i = n; i < end; i++) label[i] = S(-1);
  bool any = false;
  for (int i = 0; i < end; i += A::N) {
    V y = A::load(label + i);
    if (args.has_ignore) y = A::select(A::eq(y, A::set1(S(args.ignore_index))), A::set1(-1), y);
    A::store(label + i, y);
    any |= A::any(A::le(A::set1(0), y));
  }
  return any;
}

template <class A>
DSCT_INLINE void set_ce_factors(const TnkdArgs& args, Scratch<A>& s, int n) {
  typedef typename A::S S;
  if (!args.with_ce) return;
  const S* weight = static_cast<const S*>(args.class_weight);
  for (int i = 0; i < int(round_up(size_t(n), kRound)); i++)
    s.ce_factor[i] = s.label[i] < 0 ? S(0) : weight == nullptr ? S(1) : weight[int64_t(s.label[i])];
}

// --- blocks ---

// What makes Gradient 0 for n pixels.
template <class A, Ce mode>
DSCT_INLINE void clear_gradient(const TnkdArgs& args, Scratch<A>& s, int n) {
  const size_t lanes = size_t((n + A::N - 1) / A::N * A::N);
  const size_t bytes = size_t(args.classes) * lanes * sizeof(typename A::S);
  memset(s.student, 0, bytes);
  memset(s.teacher, 0, bytes);
  if (mode == Ce::kOwn) memset(s.ce, 0, bytes);
  memset(s.coef_s, 0, sizeof(s.coef_s));
  memset(s.coef_t, 0, sizeof(s.coef_t));
  memset(s.coef_ce, 0, sizeof(s.coef_ce));
  memset(s.grad_target, 0, sizeof(s.grad_target));
}

template <class A, class P, Ce mode>
DSCT_INLINE void run_block(const TnkdArgs& args, Scratch<A>& s, int n, int block, int64_t pixel) {
  typedef typename A::S S;
  LossSums<P> losses = {P::set1(0), P::set1(0), P::set1(0)};
  constexpr int kGroup = Scratch<A>::kGroup;
  bool any = true;
  if (args.target != nullptr) {
    any = load_labels<A>(args, s.at_target, n, s.label);
    if (any) read<A>(args.teacher, s.at_teacher, n, args.classes, s.label, s.teacher, s.max_t, s.target_t);
  } else {
    for (int i = 0; i < kMaxBlock; i++) s.label[i] = S(-1);
    read<A>(args.teacher, s.at_teacher, n, args.classes, s.label, s.teacher, s.max_t, s.target_t);
    label_by_teacher<A>(n, args.classes, s.teacher, s.label, s.max_t, s.target_t);
  }
  if (any) {
    read<A>(args.student, s.at_student, n, args.classes, s.label, s.student, s.max_s, s.target_s);
    set_ce_factors<A>(args, s, n);
  } else {  // nothing but ignored pixels: nothing is read
    if (args.loss_map != nullptr) memset(static_cast<S*>(args.loss_map) + pixel, 0, size_t(n) * sizeof(S));
    if (args.grad.data == nullptr) return;
    clear_gradient<A, mode>(args, s, n);
  }
  for (int v0 = 0; v0 * A::N < n; v0 += kGroup) {
    if (any) {
      for (int v = v0; v < v0 + kGroup && v * A::N < n; v++) sum_classes<A, mode>(args, s, v, block);
      for (int lane = v0 * A::N; lane < (v0 + kGroup) * A::N && lane < n; lane += P::N)
        pixels<P, mode>(args, s, lane, n, pixel, losses);
    }
    if (args.grad.data != nullptr) write<A, Gradient<A, mode>>(args, s, v0, n);
  }
  add_losses(args, losses, s);
}

}  // namespace
}  // namespace DSCT_ISA
}  // namespace dsct
#include "rows.h"
namespace dsct {
namespace DSCT_ISA {
namespace {

template <class A>
struct Wide {
#ifdef DSCT_ISA_AVX512
  typedef Pair<A> P;  // it has the registers for two
#else
  typedef A P;
#endif
};

template <class A>
DSCT_INLINE void clear_losses(Scratch<A>& s) {
  memset(s.lanes_ce, 0, sizeof(s.lanes_ce));
  memset(s.lanes_tckd, 0, sizeof(s.lanes_tckd));
  memset(s.lanes_nckd, 0, sizeof(s.lanes_nckd));
}
template <class A>
DSCT_INLINE PixelSums losses_of(const Scratch<A>& s) {
  PixelSums sums = {0, 0, 0};
  for (int i = 0; i < Scratch<A>::kLanes; i++) {
    sums.ce += s.lanes_ce[i];
    sums.tckd += s.lanes_tckd[i];
    sums.nckd += s.lanes_nckd[i];
  }
  return sums;
}

template <class A, Ce mode>
PixelSums run_mode(const TnkdArgs& args, int64_t begin, int64_t end, Scratch<A>& s) {
  typedef typename Wide<A>::P P;
  clear_losses(s);
  const int block = block_pixels(args);
  const bool rows = rows_are_faster<A>(args);
  for (int64_t pixel = begin; pixel < end;) {
    const Position p = position(args, pixel);
    bool uniform;
    const int n = block_length(args, p, pixel, end, block, A::N, &uniform);
    locate(args, p, args.student.pixel_strides, n, uniform, &s.at_student);
    locate(args, p, args.teacher.pixel_strides, n, uniform, &s.at_teacher);
    if (args.grad.data != nullptr) locate(args, p, args.grad.pixel_strides, n, uniform, &s.at_grad);
    if (args.target != nullptr) locate(args, p, args.target_strides, n, uniform, &s.at_target);
    if (rows && uniform)
      run_row_block<A, mode>(args, s, n, pixel);
    else
      run_block<A, P, mode>(args, s, n, block, pixel);
    pixel += n;
  }
  if (args.stream) stream_fence();
  return losses_of(s);
}

template <class A>
Scratch<A>& lay_out(const TnkdArgs& args, void* memory) {
  Scratch<A>& s = *static_cast<Scratch<A>*>(memory);
  typedef typename A::S S;
  char* p = static_cast<char*>(memory) + round_up(sizeof(Scratch<A>), 64);
  const size_t bytes = column_bytes<A>(args);
  s.student = reinterpret_cast<S*>(p);
  s.teacher = reinterpret_cast<S*>(p + bytes);
  s.ce = reinterpret_cast<S*>(p + 2 * bytes);
  s.rows = p + 3 * bytes;
  return s;
}

template <class A>
PixelSums run(const TnkdArgs& args, int64_t begin, int64_t end, void* memory) {
  Scratch<A>& s = lay_out<A>(args, memory);
  if (!args.with_ce || args.temperature == 1) return run_mode<A, Ce::kNone>(args, begin, end, s);
  if (args.temperature == 2) return run_mode<A, Ce::kSquare>(args, begin, end, s);
  return run_mode<A, Ce::kOwn>(args, begin, end, s);
}

// The teacher's argmax as labels: for the one case that has to know them all beforehand, the sum of the class weights.
template <class A>
void teacher_labels(const TnkdArgs& args, int64_t begin, int64_t end, void* memory, int32_t* labels) {
  Scratch<A>& s = lay_out<A>(args, memory);
  for (int i = 0; i < kMaxBlock; i++) s.label[i] = -1;
  for (int64_t pixel = begin; pixel < end;) {
    const Position p = position(args, pixel);
    bool uniform;
    const int n = block_length(args, p, pixel, end, block_pixels(args), A::N, &uniform);
    locate(args, p, args.teacher.pixel_strides, n, uniform, &s.at_teacher);
    read<A>(args.teacher, s.at_teacher, n, args.classes, s.label, s.teacher, s.max_t, s.target_t);
    label_by_teacher<A>(n, args.classes, s.teacher, s.label, s.max_t, s.target_t);
    for (int i = 0; i < n; i++) labels[pixel + i] = int32_t(s.label[i]);
    pixel += n;
  }
}

// --- counting, over the labels alone ---

template <class T>
DSCT_INLINE void count_row(const TnkdArgs& args, const T* p, int64_t stride, int64_t n, LabelCount* count) {
  const bool has_ignore = args.has_ignore && int64_t(T(args.ignore_index)) == args.ignore_index;
  const T ignore = has_ignore ? T(args.ignore_index) : T(0);
  const T last = T(args.classes - 1) >= 0 && int64_t(T(args.classes - 1)) == args.classes - 1
                     ? T(args.classes - 1)
                     : T((uint64_t(1) << (8 * sizeof(T) - (T(-1) < T(0)))) - 1);  // T holds no label that large
  for (int64_t begin = 0; begin < n; begin += 4096) {
    const int64_t end = begin + 4096 < n ? begin + 4096 : n;
    int32_t ignored = 0;
    int32_t bad = 0;
    const auto look = [&](T y) {
      const int32_t skip = has_ignore & (y == ignore);
      ignored += skip;
      bad |= ((y < T(0)) | (y > last)) & (skip ^ 1);
    };
    if (stride == 1)
      for (int64_t i = begin; i < end; i++) look(p[i]);
    else
      for (int64_t i = begin; i < end; i++) look(p[i * stride]);
    count->valid += (end - begin) - ignored;
    count->bad |= bad != 0;
  }
}

template <class S, class T>
DSCT_INLINE void weigh_row(const TnkdArgs& args, const T* p, int64_t stride, int64_t n, LabelCount* count) {
  const S* weight = static_cast<const S*>(args.class_weight);
  for (int64_t i = 0; i < n; i++) {
    const T y = p[i * stride];
    if (!(args.has_ignore && int64_t(y) == args.ignore_index)) count->weight += double(weight[int64_t(y)]);
  }
}

template <class S, class T>
LabelCount count_labels_as(const TnkdArgs& args, int64_t begin, int64_t end) {
  LabelCount count = {0, 0, false};
  for (int64_t pixel = begin; pixel < end;) {
    const Position p = position(args, pixel);
    const int d = args.dims - 1;
    int64_t n = args.sizes[d] - p.index[d];
    if (n > end - pixel) n = end - pixel;
    const T* row = static_cast<const T*>(args.target);
    for (int i = 0; i <= d; i++) row += p.index[i] * args.target_strides[i];
    count_row(args, row, args.target_strides[d], n, &count);
    if (args.class_weight != nullptr && !count.bad) weigh_row<S>(args, row, args.target_strides[d], n, &count);
    pixel += n;
  }
  return count;
}

template <class S>
LabelCount count_labels(const TnkdArgs& args, int64_t begin, int64_t end) {
  switch (args.target_type) {
    case LabelType::kU8:
      return count_labels_as<S, uint8_t>(args, begin, end);
    case LabelType::kI8:
      return count_labels_as<S, int8_t>(args, begin, end);
    case LabelType::kI16:
      return count_labels_as<S, int16_t>(args, begin, end);
    case LabelType::kI32:
      return count_labels_as<S, int32_t>(args, begin, end);
    case LabelType::kI64:
      return count_labels_as<S, int64_t>(args, begin, end);
  }
  return {0, 0, false};
}

}  // namespace
}  // namespace DSCT_ISA
}  // namespace dsct
#include "upsampled.h"
namespace dsct {
namespace DSCT_ISA {

const TnkdKernels tnkd_kernels_f32 = {count_labels<float>, teacher_labels<F32>, run<F32>, scratch_bytes<F32>};
const TnkdKernels tnkd_kernels_f64 = {count_labels<double>, teacher_labels<F64>, run<F64>, scratch_bytes<F64>};
const UpsampledKernels upsampled_kernels_f32 = {upsampled_teacher_labels<F32>, run_strip<F32>, add_partials<F32>,
                                                upsampled_scratch_bytes<F32>};
const UpsampledKernels upsampled_kernels_f64 = {upsampled_teacher_labels<F64>, run_strip<F64>, add_partials<F64>,
                                                upsampled_scratch_bytes<F64>};

}  // namespace DSCT_ISA
}  // namespace dsct
