// What the CUDA ops ask of torch, through its stable ABI only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda_math.h"
#include "tensor_types.h"

namespace dsct {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace cuda {

inline cudaStream_t stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace cuda

// The numbers of a tensor of T, of shape (count,) or (), that lies on the CPU, where the host may read them, or on the
// device of `like`, where only kernels may.
template <typename T>
const T* numbers_of(const char* name, const Tensor& tensor, std::optional<int64_t> count, const Tensor& like) {
  static_assert(std::is_same_v<T, double> || std::is_same_v<T, int64_t>);
  constexpr ScalarType kType = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Long;
  const std::string what = (count ? "a contiguous (" + std::to_string(*count) + ",)" : std::string("a ()")) +
                           (kType == ScalarType::Double ? " tensor of float64" : " tensor of int64");
  STD_TORCH_CHECK(tensor.scalar_type() == kType && tensor.dim() == (count ? 1 : 0) &&
                      tensor.numel() == count.value_or(1) && tensor.is_contiguous(),
                  name, ": expected ", what);
  STD_TORCH_CHECK(tensor.is_cpu() || (tensor.is_cuda() && tensor.get_device_index() == like.get_device_index()), name,
                  ": expected a tensor on the CPU or on cuda:", like.get_device_index());
  return static_cast<const T*>(tensor.const_data_ptr());
}

// Uninitialised, on `like`'s device, contiguous; dtype of `like` unless given.
inline Tensor make_empty(const Tensor& like, const std::vector<int64_t>& shape,
                         std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, shape, dtype);
}

}  // namespace dsct
