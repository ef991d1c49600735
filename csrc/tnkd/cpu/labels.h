// Labels as numbers of the accumulation type, given or the teacher's argmax, and their class weights.
#pragma once

#include "scratch.h"

namespace dsct {
namespace DSCT_ISA {
namespace {

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
    top.begin(label + v * A::N);
    k = A::set1(0);
    for (int64_t c = 0; c < classes; c++, k = k + A::set1(1)) top.take(A::load(column + c * A::N), k);
    A::store(max + v * A::N, top.max);
    A::store(target + v * A::N, top.target);
  }
}

}  // namespace
}  // namespace DSCT_ISA
}  // namespace dsct
