// The dtypes that the kernels know, on every device: plain data.
#pragma once

#include <stdint.h>

namespace dsct {

enum class FloatType : int { kF16, kBF16, kF32, kF64 };
enum class LabelType : int { kU8, kI8, kI16, kI32, kI64 };

// In bytes. Static: every instruction set's translation unit has its own (common/vec.h says why).
static constexpr int size_of(FloatType type) { return type == FloatType::kF64 ? 8 : type == FloatType::kF32 ? 4 : 2; }

}  // namespace dsct
