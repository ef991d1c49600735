// The dtypes of torch's tensors as the kernels know them, for every device.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <stdexcept>
#include <string>

#include "types.h"

namespace dsct {

inline FloatType float_type(const char* name, const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Half:
      return FloatType::kF16;
    case ScalarType::BFloat16:
      return FloatType::kBF16;
    case ScalarType::Float:
      return FloatType::kF32;
    case ScalarType::Double:
      return FloatType::kF64;
    default:
      throw std::invalid_argument(std::string(name) + ": expected dtype float16, bfloat16, float32 or float64, got " +
                                  torch::headeronly::toString(x.scalar_type()));
  }
}

inline LabelType label_type(const char* name, const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Byte:
      return LabelType::kU8;
    case ScalarType::Char:
      return LabelType::kI8;
    case ScalarType::Short:
      return LabelType::kI16;
    case ScalarType::Int:
      return LabelType::kI32;
    case ScalarType::Long:
      return LabelType::kI64;
    default:
      throw std::invalid_argument(std::string(name) + ": expected dtype uint8, int8, int16, int32 or int64, got " +
                                  torch::headeronly::toString(x.scalar_type()));
  }
}

}  // namespace dsct
