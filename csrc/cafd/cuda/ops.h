// The CAFD ops on CUDA. Schemas in csrc/ops.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace dsct {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> cafd_cuda(const Tensor& student_features, const Tensor& teacher_features,
                                             const Tensor& temperatures, int64_t reduction, bool needs_grad);

std::tuple<Tensor, Tensor> attention_map_cuda(const Tensor& features, const Tensor& temperatures);

Tensor attention_map_backward_cuda(const Tensor& features, const Tensor& grad_map, const Tensor& stats,
                                   const Tensor& temperatures);

std::tuple<Tensor, Tensor> matched_cafd_cuda(const Tensor& student, const Tensor& teacher,
                                             const std::optional<Tensor>& mask, const Tensor& temperatures,
                                             bool uniform, int64_t reduction);

Tensor matched_cafd_backward_cuda(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                                  const Tensor& stats, const Tensor& temperatures, const Tensor& grad_output,
                                  int64_t reduction);

}  // namespace dsct
