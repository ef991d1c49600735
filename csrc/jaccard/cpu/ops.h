// The ops of the soft Jaccard loss: the loss of two logit maps, and its backward. Schemas in csrc/ops.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace dsct {

using torch::stable::Tensor;

// Returns the loss and the coefficients (2, K) float64 of its gradient, a and b: dloss/dp_c = v (a_c + b_c sign(p -
// q)).
std::tuple<Tensor, Tensor> jaccard_cpu(const Tensor& student_logits, const Tensor& teacher_logits,
                                       const std::optional<Tensor>& share, const Tensor& temperature);

// dloss/dstudent_logits for any coefficients: the student's dtype, and strides as empty_like chooses them.
Tensor jaccard_backward_cpu(const Tensor& student_logits, const Tensor& teacher_logits,
                            const std::optional<Tensor>& share, const Tensor& temperature, const Tensor& coefficients);

}  // namespace dsct
