// What tnkd.cu hands to the launch: plain data.
#pragma once

#include "common/cuda_math.h"

namespace dsct::cuda {

struct Strides {
  int64_t image, klass, pixel;  // elements
};

struct TnkdArgs {
  const void* student;
  const void* teacher;
  const void* target;        // (N, *spatial), contiguous
  const void* class_weight;  // (K,) float32, or nullptr
  void* grad;                // or nullptr
  void* loss_map;            // (N, *spatial) float32, or nullptr
  void* loss;                // () float32; unused with a loss_map
  void* parts;               // (3,)
  void* grad_scale;          // ()
  void* workspace;           // tnkd_workspace_bytes()
  FloatType student_type, teacher_type;
  LabelType target_type;
  int64_t images, classes, pixels;  // pixels of an image
  Strides student_strides, teacher_strides, grad_strides;
  double ce_weight, tckd_weight, nckd_weight, temperature;
  bool has_ignore;
  int64_t ignore_index;
  // On the device, (4,) in the order above, or without cross-entropy (3,), and (); nullptr: the numbers above. Read by
  // the kernels, never by the host.
  const double* values;
  const int64_t* ignore_index_value;
  bool mean, with_ce;
  bool coupled;  // NCKD counts (1 - b^T) times: plain KD
};

// Images of pixels from the sizes and strides of the logits (N, K, *spatial): neighbouring dimensions that all tensors
// step through alike are one. False where more than two are left. grad may be nullptr: no such tensor.
inline bool set_space(TnkdArgs& args, int64_t dims, const int64_t* size, const int64_t* student, const int64_t* teacher,
                      const int64_t* grad) {
  const int64_t* from[3] = {student, teacher, grad == nullptr ? student : grad};
  Strides* const to[3] = {&args.student_strides, &args.teacher_strides, &args.grad_strides};
  args.images = args.pixels = 1, args.classes = size[1];
  for (int i = 0; i < 3; ++i) *to[i] = {0, from[i][1], 0};
  int left = 0;
  for (int64_t d = 0; d < dims; ++d) {
    if (d == 1 || size[d] == 1) continue;
    bool merge = left > 0;
    for (int i = 0; i < 3; ++i) merge = merge && to[i]->pixel == from[i][d] * size[d];
    if (!merge) {
      if (++left > 2) return false;
      args.images = args.pixels, args.pixels = 1;
      for (Strides* strides : to) strides->image = strides->pixel;
    }
    args.pixels *= size[d];
    for (int i = 0; i < 3; ++i) to[i]->pixel = from[i][d];
  }
  return true;
}

}  // namespace dsct::cuda
