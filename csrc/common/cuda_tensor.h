// What the CUDA ops ask of torch, through its stable ABI only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_math.h"

namespace dsct {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace cuda {

inline cudaStream_t stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      throw std::invalid_argument(std::string(name) + ": expected float16, bfloat16, float32 or float64");
  }
}

}  // namespace cuda

// Uninitialised, on `like`'s device, contiguous; dtype of `like` unless given.
inline Tensor make_empty(const Tensor& like, const std::vector<int64_t>& shape,
                         std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, shape, dtype);
}

}  // namespace dsct
