// Two logit maps and a gradient as the CPU kernels see them: plain data, the same in every instruction set's
// translation unit.
#pragma once

#include <stdint.h>

#include "types.h"

namespace dsct {

// The pixel dimensions (N, *spatial), after neighbours that every tensor allows to be walked as one were merged.
constexpr int kMaxPixelDims = 16;

struct LogitView {
  const void* data;
  FloatType type;
  int64_t class_stride;  // strides count elements
  int64_t pixel_strides[kMaxPixelDims];
  int64_t extent;  // elements from the first to one past the last in memory
};

// What is walked: the pixels (N, *spatial), a class at a time.
struct LogitArgs {
  int dims;  // >= 1
  int64_t sizes[kMaxPixelDims];
  int64_t pixels;
  int64_t classes;
  LogitView student, teacher, grad;  // grad.data == nullptr: not asked for
  bool stream;                       // the gradient will not fit in the caches: write past them
};

}  // namespace dsct
