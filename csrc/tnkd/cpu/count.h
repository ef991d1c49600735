// Over the labels alone: how many are valid, their class weights, and whether any is no class.
#pragma once

#include "args.h"
#include "common/logit_blocks.h"

namespace dsct {
namespace DSCT_ISA {
namespace {

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
