// The tnkd ops: TNKD and cross-entropy of two logit maps, loss and gradient in one pass. Schema in csrc/ops.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace dsct {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor> tnkd_cpu(const Tensor& student_logits, const Tensor& teacher_logits,
                                                    const std::optional<Tensor>& target,
                                                    const std::optional<Tensor>& class_weight, const Tensor& values,
                                                    const std::optional<Tensor>& ignore_index, bool coupled,
                                                    int64_t reduction, bool needs_grad);

// Of (N, K, H, W) logits that are smaller than the labels.
std::tuple<Tensor, Tensor, Tensor, Tensor> tnkd_upsampled_cpu(
    const Tensor& student_logits, const Tensor& teacher_logits, const std::optional<Tensor>& target,
    const std::optional<Tensor>& class_weight, const Tensor& values, const std::optional<Tensor>& ignore_index,
    bool coupled, int64_t reduction, bool align_corners, bool needs_grad);

// The gradient of its map. grad_output: what comes in for each pixel.
Tensor tnkd_upsampled_backward_cpu(const Tensor& student_logits, const Tensor& teacher_logits,
                                   const std::optional<Tensor>& target, const std::optional<Tensor>& class_weight,
                                   const Tensor& values, const std::optional<Tensor>& ignore_index, bool coupled,
                                   bool align_corners, const Tensor& grad_output);

}  // namespace dsct
