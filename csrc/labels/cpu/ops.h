// What labels say of the cells of a smaller map. Schema in csrc/ops.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace dsct {

using torch::stable::Tensor;

// (N, height, width) float32, or float64 if `wide`: the share of each cell's labels that are not `ignore_index`, as
// adaptive_avg_pool2d would average. target (N, H, W), any strides.
Tensor labelled_cpu(const Tensor& target, int64_t ignore_index, int64_t height, int64_t width, bool wide);

}  // namespace dsct
