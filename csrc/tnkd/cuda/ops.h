// The tnkd ops and the in-place factor of its backward, on CUDA. Schemas in csrc/ops.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace dsct {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor> tnkd_cuda(const Tensor& student_logits, const Tensor& teacher_logits,
                                                     const std::optional<Tensor>& target,
                                                     const std::optional<Tensor>& class_weight, const Tensor& values,
                                                     const std::optional<Tensor>& ignore_index, bool coupled,
                                                     int64_t reduction, bool needs_grad);

// Without a map: reduction is not 0.
std::tuple<Tensor, Tensor, Tensor, Tensor> tnkd_upsampled_cuda(
    const Tensor& student_logits, const Tensor& teacher_logits, const std::optional<Tensor>& target,
    const std::optional<Tensor>& class_weight, const Tensor& values, const std::optional<Tensor>& ignore_index,
    bool coupled, int64_t reduction, bool align_corners, bool needs_grad);

// grad *= factor; grad is any dense tensor of 16 or 32 bits, factor () in float32 on the same device.
void scale_cuda_(Tensor& grad, const Tensor& factor);

}  // namespace dsct
