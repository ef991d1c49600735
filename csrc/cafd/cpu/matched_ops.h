// The ops of matched CAFD, for maps whose channels correspond. Schemas in csrc/ops.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace dsct {

using torch::stable::Tensor;

// Returns the loss and stats (N, 5, C), float64: what the backward needs of every row, see MatchedStat in
// ../stats.h. mask: (N, 1, H, W) bool, contiguous; where it is false both networks are taken to be -inf. uniform:
// every channel weighs 1 / C, and the channel temperature is not looked at.
std::tuple<Tensor, Tensor> matched_cafd_cpu(const Tensor& student, const Tensor& teacher,
                                            const std::optional<Tensor>& mask, const Tensor& temperatures, bool uniform,
                                            int64_t reduction);

// dloss/dstudent times grad_output, () or, for reduction none, (N,): the student's dtype, and strides as empty_like
// chooses them.
Tensor matched_cafd_backward_cpu(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                                 const Tensor& stats, const Tensor& temperatures, const Tensor& grad_output,
                                 int64_t reduction);

}  // namespace dsct
