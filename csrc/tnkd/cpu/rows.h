// TNKD where the classes of a pixel are contiguous (channels_last) and many: a lane is a class. Against the columns of
// kernel.h it saves the transposes both ways: at K = 150, in cache, 15% of the time. The price is the last
// vector of each pixel, partly empty, and the sums across lanes, so few classes are better off there.
#pragma once

#include "labels.h"
#include "pixel.h"
#include "sums.h"

namespace dsct {
namespace DSCT_ISA {
namespace {

template <class A>
DSCT_INLINE int64_t row_pitch(int64_t classes) {
  return (classes + A::N - 1) / A::N * A::N;
}

// From 48 classes on, where at most an eighth of the lanes is empty. In cache, columns against rows, ns per 16 pixels
// and class: AVX-512, K = 40: 15.5 : 16.8, 48: 14.8 : 13.6, 49: 15.9 : 17.0, 64: 14.4 : 12.4; AVX2, 33: 23.7 : 25.1,
// 48: 22.0 : 18.5.
template <class A>
bool rows_are_faster(const TnkdArgs& args) {
  return args.classes >= 48 && 8 * args.classes >= 7 * row_pitch<A>(args.classes) && args.target != nullptr &&
         args.student.type == args.teacher.type && args.student.class_stride == 1 && args.teacher.class_stride == 1 &&
         (args.grad.data == nullptr || args.grad.class_stride == 1);
}

// Values of A::N pixels, a vector each: what they come to per pixel, a lane each.
template <class A>
struct Across {
  typename A::V of[A::N];
};
template <class A, class Combine>
DSCT_INLINE typename A::V across(Across<A>& x, Combine) {
  transpose_chunks<A, A::N>(x.of);
  for (int half = A::N / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) x.of[i] = Combine::of(x.of[i], x.of[i + half]);
  return x.of[0];
}
template <class A>
struct Add {
  DSCT_INLINE typename A::V of(typename A::V x, typename A::V y) { return x + y; }
};
template <class A>
struct Larger {
  DSCT_INLINE typename A::V of(typename A::V x, typename A::V y) { return A::max(x, y); }
};

// Both networks' logits of one pixel. A last vector that reads past its end reads the next pixel's, never past the
// tensor's.
template <class A, class T>
struct Row {
  const T *student, *teacher;
  typename A::V label;
  bool last_s, last_t;  // no pixel behind this one
};
template <class A, class T>
DSCT_INLINE Row<A, T> row_at(const TnkdArgs& args, const Scratch<A>& s, int pixel) {
  const int64_t at_s = s.at_student.base + pixel * s.at_student.stride;
  const int64_t at_t = s.at_teacher.base + pixel * s.at_teacher.stride;
  const int64_t pitch = row_pitch<A>(args.classes);
  return {static_cast<const T*>(args.student.data) + at_s, static_cast<const T*>(args.teacher.data) + at_t,
          A::set1(s.label[pixel]), at_s + pitch > args.student.extent, at_t + pitch > args.teacher.extent};
}
template <class A>
DSCT_INLINE typename A::V lane_numbers() {
  typename A::S lanes[A::N];
  for (int i = 0; i < A::N; i++) lanes[i] = typename A::S(i);
  return A::load(lanes);
}

// The largest logit of each of the n pixels from `lane` on, the target's left out, and the target's.
template <class A, class T>
DSCT_INLINE void max_rows(const TnkdArgs& args, Scratch<A>& s, int lane, int n) {
  typedef typename A::S S;
  typedef typename A::V V;
  const int64_t classes = args.classes, whole = classes / A::N * A::N;
  const int left = int(classes - whole);
  const V absent = A::set1(S(-__builtin_inf()));
  Across<A> max_s, max_t;
  for (int i = 0; i < A::N; i++) {
    V m_s = absent, m_t = absent;
    if (i < n && s.label[lane + i] >= 0) {
      const Row<A, T> row = row_at<A, T>(args, s, lane + i);
      V k = lane_numbers<A>();
      for (int64_t c = 0; c < whole; c += A::N, k = k + A::set1(S(A::N))) {
        const typename A::M is_target = A::eq(row.label, k);
        m_s = max_unless<A>(is_target, m_s, A::load(row.student + c));
        m_t = max_unless<A>(is_target, m_t, A::load(row.teacher + c));
      }
      if (left > 0) {
        const typename A::M out = A::invert(A::ne_where(A::first(left), row.label, k));
        m_s = max_unless<A>(out, m_s, row.last_s ? load_n<A>(row.student + whole, left) : A::load(row.student + whole));
        m_t = max_unless<A>(out, m_t, row.last_t ? load_n<A>(row.teacher + whole, left) : A::load(row.teacher + whole));
      }
      const int64_t label = int64_t(s.label[lane + i]);
      s.target_s[lane + i] = S(to_float(row.student[label]));
      s.target_t[lane + i] = S(to_float(row.teacher[label]));
    }
    max_s.of[i] = m_s;
    max_t.of[i] = m_t;
  }
  const V m_s = across(max_s, Larger<A>()), m_t = across(max_t, Larger<A>());
  A::store(s.max_s + lane, A::select(A::eq(m_s, absent), A::set1(0), m_s));  // every other class absent
  A::store(s.max_t + lane, A::select(A::eq(m_t, absent), A::set1(0), m_t));
}

// As sum_classes, for the n pixels from `lane` on.
template <class A, Ce mode, class T>
DSCT_INLINE void sum_rows(const TnkdArgs& args, Scratch<A>& s, int lane, int n) {
  typedef typename A::S S;
  typedef typename A::V V;
  const int64_t classes = args.classes, whole = classes / A::N * A::N, pitch = row_pitch<A>(classes);
  const int left = int(classes - whole);
  const V to_exp2 = A::set1(S(std::numbers::log2e / (mode == Ce::kAlone ? 1 : args.temperature)));
  Across<A> sum_s, sum_t, sum_ce, cross;
  for (int i = 0; i < A::N; i++) {
    PixelSums<A> total = PixelSums<A>::none();
    if (i < n && s.label[lane + i] >= 0) {
      const Row<A, T> row = row_at<A, T>(args, s, lane + i);
      const T* next_s = row.student + A::N * s.at_student.stride;  // asked for while these are computed on
      const T* next_t = row.teacher + A::N * s.at_teacher.stride;
      const Exponentials<A, mode> to = {to_exp2,
                                        A::set1(s.max_s[lane + i]),
                                        A::set1(s.max_t[lane + i]),
                                        s.student + i * pitch,
                                        s.teacher + i * pitch,
                                        s.ce + i * pitch,
                                        !args.same};
      V k = lane_numbers<A>();
      for (int64_t begin = 0; begin < whole; begin += kPartial * A::N) {
        const int64_t end = begin + kPartial * A::N < whole ? begin + kPartial * A::N : whole;
        PixelSums<A> part = PixelSums<A>::none();
        for (int64_t c = begin; c < end; c += A::N, k = k + A::set1(S(A::N))) {
          prefetch_l2(next_s + c);
          prefetch_l2(next_t + c);
          to.take(c, A::load(row.student + c), A::load(row.teacher + c), A::ne(row.label, k), part);
        }
        total.add(part);
      }
      if (left > 0) {
        prefetch_l2(next_s + whole);
        prefetch_l2(next_t + whole);
        const V z_s = row.last_s ? load_n<A>(row.student + whole, left) : A::load(row.student + whole);
        const V z_t = row.last_t ? load_n<A>(row.teacher + whole, left) : A::load(row.teacher + whole);
        to.take(whole, z_s, z_t, A::ne_where(A::first(left), row.label, k), total);
      }
    }
    sum_s.of[i] = total.s;
    sum_t.of[i] = total.t;
    sum_ce.of[i] = total.ce;
    cross.of[i] = total.cross;
  }
  const V all_s = across(sum_s, Add<A>());
  A::store(s.sum_s + lane, all_s);
  A::store(s.sum_t + lane, across(sum_t, Add<A>()));
  A::store(s.sum_ce + lane, mode == Ce::kShared || mode == Ce::kAlone ? all_s : across(sum_ce, Add<A>()));
  A::store(s.cross + lane, across(cross, Add<A>()) * A::set1(S(std::numbers::ln2)));
}

// The gradient of the n pixels from `lane` on, as rows of K in `out`. What the last vector of a row writes past its end
// is overwritten by the next.
template <class A, Ce mode, class T>
DSCT_INLINE void gradient_rows(const TnkdArgs& args, const Scratch<A>& s, int lane, int n, T* out) {
  typedef typename A::S S;
  typedef typename A::V V;
  const int64_t classes = args.classes, pitch = row_pitch<A>(classes);
  for (int i = 0; i < n; i++, out += classes) {
    if (s.label[lane + i] < 0) {
      memset(static_cast<void*>(out), 0, size_t(classes) * sizeof(T));
      continue;
    }
    const S* student = s.student + i * pitch;
    const S* teacher = s.teacher + i * pitch;
    const S* ce = s.ce + i * pitch;
    const V coef_s = A::set1(s.coef_s[lane + i]), coef_t = A::set1(s.coef_t[lane + i]);
    const V coef_ce = A::set1(s.coef_ce[lane + i]);
    for (int64_t c = 0; c < pitch; c += A::N) {
      const V e_s = A::load(student + c);
      if constexpr (mode == Ce::kAlone) {
        A::store(out + c, e_s * coef_ce);
        continue;
      }
      V coef = coef_s;
      if constexpr (mode == Ce::kSquare) coef = A::fma(e_s, coef_ce, coef);
      V value = A::fma(e_s, coef, A::load(teacher + c) * coef_t);
      if constexpr (mode == Ce::kOwn) value = A::fma(A::load(ce + c), coef_ce, value);
      A::store(out + c, value);
    }
    from_float(s.grad_target[lane + i], out + int64_t(s.label[lane + i]));
  }
}

template <class A, Ce mode, class T>
void run_row_block_as(const TnkdArgs& args, Scratch<A>& s, int n, int64_t pixel) {
  constexpr int kGroup = Scratch<A>::kGroup * A::N;
  load_labels<A>(args, s.at_target, n, s.label);
  set_ce_factors<A>(args, s, n);
  PixelLoss<A> losses = {A::set1(0), A::set1(0), A::set1(0)};
  for (int lane = 0; lane < n; lane += A::N) {
    const int count = n - lane < A::N ? n - lane : A::N;
    max_rows<A, T>(args, s, lane, count);
    sum_rows<A, mode, T>(args, s, lane, count);
    pixels<A, mode>(args, s, lane, n, pixel, losses);
    if (args.grad.data == nullptr) continue;
    const int in_group = lane % kGroup;
    gradient_rows<A, mode, T>(args, s, lane, count, reinterpret_cast<T*>(s.rows) + in_group * args.classes);
    if (in_group + count == kGroup || lane + count == n) put_rows<A, T>(args, s, lane - in_group, in_group + count);
  }
  add_losses(args, losses, s);
}

template <class A, Ce mode>
void run_row_block(const TnkdArgs& args, Scratch<A>& s, int n, int64_t pixel) {
  switch (args.student.type) {
    case FloatType::kF32:
      return run_row_block_as<A, mode, float>(args, s, n, pixel);
    case FloatType::kBF16:
      return run_row_block_as<A, mode, bf16>(args, s, n, pixel);
    case FloatType::kF16:
      return run_row_block_as<A, mode, f16>(args, s, n, pixel);
    case FloatType::kF64:
      if constexpr (sizeof(typename A::S) == 8) return run_row_block_as<A, mode, double>(args, s, n, pixel);
  }
}

}  // namespace
}  // namespace DSCT_ISA
}  // namespace dsct
