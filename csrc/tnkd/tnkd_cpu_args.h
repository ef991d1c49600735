// What tnkd_cpu.cpp hands to the kernels: plain data, the same in every instruction set's translation unit.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../common/logit_view.h"

namespace dsct {

enum class LabelType : int { kU8, kI8, kI16, kI32, kI64 };

struct TnkdArgs : LogitArgs {
  const void* target;  // nullptr: the teacher's argmax
  LabelType target_type;
  int64_t target_strides[kMaxPixelDims];
  bool has_ignore;
  int64_t ignore_index;
  const void* class_weight;  // contiguous, acc type; or nullptr
  void* loss_map;            // contiguous, acc type; or nullptr
  double ce_weight, tckd_weight, nckd_weight, temperature;
  bool with_ce;
  double tnkd_scale, ce_scale;  // what the gradient of a pixel is multiplied by: 1 / count, ...
};

struct LabelCount {
  int64_t valid;
  double weight;  // sum of class_weight over the valid pixels
  bool bad;
};

struct PixelSums {
  double ce, tckd, nckd;
};

// One instruction set's kernels. All work on the pixels [begin, end), counted in the order (N, *spatial).
struct TnkdKernels {
  LabelCount (*count_labels)(const TnkdArgs&, int64_t begin, int64_t end);
  void (*teacher_labels)(const TnkdArgs&, int64_t begin, int64_t end, void* scratch, int32_t* labels);
  PixelSums (*run)(const TnkdArgs&, int64_t begin, int64_t end, void* scratch);
  size_t (*scratch_bytes)(const TnkdArgs&);
};

namespace baseline {
extern const TnkdKernels tnkd_kernels_f32, tnkd_kernels_f64;
}
namespace avx2 {
extern const TnkdKernels tnkd_kernels_f32, tnkd_kernels_f64;
}
namespace avx512 {
extern const TnkdKernels tnkd_kernels_f32, tnkd_kernels_f64;
}

}  // namespace dsct
