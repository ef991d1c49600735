// What tnkd.cpp and upsampled.cpp hand to the kernels: plain data, the same in every instruction set's translation
// unit.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "common/logit_view.h"

namespace dsct {

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
  bool coupled;                 // NCKD counts (1 - b^T) times: plain KD
  bool same;                    // the teacher is the student: without TNKD it is not looked at
  double tnkd_scale, ce_scale;  // what the gradient of a pixel is multiplied by: 1 / count, ...
  const void* upstream;         // and what comes in for it, acc type; or nullptr
  int64_t upstream_strides[kMaxPixelDims];
};

// Where the outputs of one dimension look: output i at input low[i] with weight near[i] and, unless far[i] is 0, at the
// next one with weight far[i]. Weights in the acc type; the last output is repeated kTapPadding times.
constexpr int kTapPadding = 128;
struct Taps {
  const int32_t* low;
  const void *near, *far;
};

// One network's logits, and how they come to the labels' size.
struct Resized {
  bool full;  // they have it already
  int64_t height, width;
  Taps y, x;
};

// The pixels are those of the labels, (N, height, width). The pixel_strides of student, teacher and grad are those of
// N, H and W at their own size.
struct UpsampledArgs : TnkdArgs {
  int64_t height, width;
  Resized of_student, of_teacher;
  int64_t tile;        // columns of labels that are walked together: 16 to kMaxBlock
  int64_t strip_rows;  // most rows of the student's that a strip reaches
};

// Rows of labels [begin, end) of one sample, the work of one task, and the student's rows that they reach, [first,
// last). Those of [own_first, own_last) nobody else reaches; of the others it leaves its part in `partial` and the
// following rows.
struct Strip {
  int64_t begin, end;
  int64_t first, last, own_first, own_last;
  int64_t partial;
};

struct LabelCount {
  int64_t valid;
  double weight;  // sum of class_weight over the valid pixels
  bool bad;
};

// Over pixels.
struct LossSums {
  double ce, tckd, nckd;
};

// One instruction set's kernels. All work on the pixels [begin, end), counted in the order (N, *spatial).
struct TnkdKernels {
  LabelCount (*count_labels)(const TnkdArgs&, int64_t begin, int64_t end);
  void (*teacher_labels)(const TnkdArgs&, int64_t begin, int64_t end, void* scratch, int32_t* labels);
  LossSums (*run)(const TnkdArgs&, int64_t begin, int64_t end, void* scratch);
  size_t (*scratch_bytes)(const TnkdArgs&);
};

// The same where logits are smaller than the labels. A row of the gradient is (width, K) in the acc type while it is
// added up; partials: those of one sample.
struct UpsampledKernels {
  void (*teacher_labels)(const UpsampledArgs&, int64_t sample, const Strip&, void* scratch, int32_t* labels);
  LossSums (*run)(const UpsampledArgs&, int64_t sample, const Strip&, void* partials, void* scratch);
  void (*add_partials)(const UpsampledArgs&, int64_t sample, int64_t row, const void* const* partials, int count,
                       void* scratch);
  size_t (*scratch_bytes)(const UpsampledArgs&);
};

namespace baseline {
extern const TnkdKernels tnkd_kernels_f32, tnkd_kernels_f64;
extern const UpsampledKernels upsampled_kernels_f32, upsampled_kernels_f64;
}  // namespace baseline
namespace avx2 {
extern const TnkdKernels tnkd_kernels_f32, tnkd_kernels_f64;
extern const UpsampledKernels upsampled_kernels_f32, upsampled_kernels_f64;
}  // namespace avx2
namespace avx512 {
extern const TnkdKernels tnkd_kernels_f32, tnkd_kernels_f64;
extern const UpsampledKernels upsampled_kernels_f32, upsampled_kernels_f64;
}  // namespace avx512

}  // namespace dsct
