// The ops of CAFD: the loss, the attention map alone, and the one backward that serves both. Schemas in csrc/ops.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

namespace dsct {

using torch::stable::Tensor;

// Returns the loss, grad_map = dloss/dA^S at upstream gradient 1, and the student's stats. stats, (N, 4 C + 2 H W + 1),
// is what the backward needs to read the features only once more (twice where channels are innermost). A sample's row:
//   C     max_i F_{c,i}
//   C     1 / sum_i exp((F_{c,i} - max) / spatial_temperature)
//   C     w_c
//   C     r_c
//   H W   A_i = sum_c w_c P_{c,i}
//   H W   B_i = sum_c w_c r_c P_{c,i}      sum_k w_k rho_k = sum_i A_i D_i, sum_k w_k r_k rho_k = sum_i B_i D_i
//   1     mean_c g_c
// CUDA has an order of its own: Stats in ../cuda/forward.cuh.
// B is 0 when needs_grad is false.
std::tuple<Tensor, Tensor, Tensor> cafd_cpu(const Tensor& student_features, const Tensor& teacher_features,
                                            const Tensor& temperatures, int64_t reduction, bool needs_grad);

// Returns A, (N, H, W), and stats.
std::tuple<Tensor, Tensor> attention_map_cpu(const Tensor& features, const Tensor& temperatures);

// dloss/dF for any grad_map = dloss/dA: features' dtype, and strides as empty_like chooses them.
Tensor attention_map_backward_cpu(const Tensor& features, const Tensor& grad_map, const Tensor& stats,
                                  const Tensor& temperatures);

}  // namespace dsct
