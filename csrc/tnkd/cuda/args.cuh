// What tnkd.cu hands to the launch: plain data.
#pragma once

#include <stdexcept>
#include <string>

#include "common/cuda_math.h"

namespace dsct::cuda {

constexpr int kMaxDims = 6;

// Strides in elements. Dimension 0 of the logits is the batch, then space; classes apart. Neighbouring dimensions that
// every tensor steps through alike are merged by the caller.
struct Strides {
  int64_t pixel[kMaxDims];
  int64_t klass;
};

struct TnkdArgs {
  const void* student;
  const void* teacher;
  const void* target;        // or nullptr: the teacher's argmax
  const void* class_weight;  // (K,) accumulation dtype, or nullptr
  void* grad;                // or nullptr
  void* loss_map;            // (pixels,) accumulation dtype, or nullptr
  void* loss;                // () accumulation dtype; unused with a loss_map
  void* parts;               // (3,)
  void* grad_scale;          // ()
  void* workspace;           // tnkd_workspace_bytes()
  FloatType student_type, teacher_type;
  LabelType target_type = LabelType::kI64;
  int64_t classes, pixels;
  int dims;
  int64_t size[kMaxDims];
  Strides student_strides, teacher_strides, grad_strides;
  int64_t target_strides[kMaxDims];
  double ce_weight, tckd_weight, nckd_weight, temperature;
  bool has_ignore;
  int64_t ignore_index;
  // On the device, (4,) in the order above, or without cross-entropy (3,), and (); nullptr: the numbers above. Read by
  // the kernels, never by the host.
  const double* values = nullptr;
  const int64_t* ignore_index_value = nullptr;
  bool mean, with_ce;
  bool coupled = false;  // NCKD counts (1 - b^T) times: plain KD
};

// Sizes and strides over (N, *spatial) from those of the logits (N, K, *spatial) and of the target, with dimensions
// merged that every tensor steps through alike. A stride array may be nullptr: no such tensor.
inline void set_space(TnkdArgs& args, int64_t logit_dims, const int64_t* size, const int64_t* student,
                      const int64_t* teacher, const int64_t* target, const int64_t* grad) {
  int64_t* const to[4] = {args.student_strides.pixel, args.teacher_strides.pixel, args.grad_strides.pixel,
                          args.target_strides};
  args.classes = size[1];
  args.student_strides.klass = student[1];
  args.teacher_strides.klass = teacher[1];
  args.grad_strides.klass = grad == nullptr ? 0 : grad[1];
  args.pixels = 1;
  args.dims = 0;
  for (int64_t d = 0; d < logit_dims; ++d) {
    if (d == 1) continue;
    args.pixels *= size[d];
    if (size[d] == 1 && !(args.dims == 0 && d == logit_dims - 1)) continue;
    const int64_t step[4] = {student[d], teacher[d], grad == nullptr ? 0 : grad[d],
                             target == nullptr ? 0 : target[d == 0 ? 0 : d - 1]};
    bool merge = args.dims > 0;
    for (int i = 0; merge && i < 4; ++i) merge = to[i][args.dims - 1] == step[i] * size[d];
    if (!merge) {
      if (args.dims == kMaxDims) {
        throw std::invalid_argument("tnkd: more than " + std::to_string(kMaxDims) +
                                    " dimensions whose strides cannot be merged");
      }
      args.size[args.dims++] = 1;
    }
    args.size[args.dims - 1] *= size[d];
    for (int i = 0; i < 4; ++i) to[i][args.dims - 1] = step[i];
  }
  if (args.dims == 0) args.dims = 1, args.size[0] = 1;  // one pixel
}

}  // namespace dsct::cuda
