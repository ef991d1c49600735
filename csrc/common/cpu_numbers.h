// Numbers that come to an op on the CPU as a tensor.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace dsct {

// A contiguous (count,) tensor of T on the CPU, or a () where count is 0.
template <typename T>
const T* numbers_of(const char* name, const torch::stable::Tensor& tensor, int64_t count) {
  static_assert(std::is_same_v<T, double> || std::is_same_v<T, int64_t>);
  using torch::headeronly::ScalarType;
  constexpr ScalarType kType = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Long;
  const bool shape = count == 0 ? tensor.dim() == 0 : tensor.dim() == 1 && tensor.size(0) == count;
  if (!tensor.is_cpu() || tensor.scalar_type() != kType || !shape || !tensor.is_contiguous())
    throw std::invalid_argument(std::string(name) + ": expected a contiguous (" +
                                (count == 0 ? "" : std::to_string(count) + ",") + ") tensor of " +
                                (kType == ScalarType::Double ? "float64" : "int64") + " on cpu");
  return static_cast<const T*>(tensor.const_data_ptr());
}

}  // namespace dsct
