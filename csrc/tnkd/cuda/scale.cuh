// scale_: backward's factor.
#pragma once

#include <algorithm>

#include "common/cuda_math.h"

namespace dsct::cuda {

constexpr int kScaleThreads = 256;

// 0 stays 0 whatever the factor is: an ignored pixel gets nothing of an upstream inf or NaN.
template <typename E>
DSCT_DEVICE void scale_numbers(E* grad, float by, int64_t count) {
  const auto times = [by](E z) { return static_cast<float>(z) == 0 ? z : static_cast<E>(static_cast<float>(z) * by); };
  const int64_t first = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  constexpr int kSize = Pack<E>::kSize;
  const int64_t packs = reinterpret_cast<uintptr_t>(grad) % 16 == 0 ? count / kSize : 0;
  for (int64_t i = first; i < packs; i += step) {
    Pack<E> pack = load_pack(grad + i * kSize);
#pragma unroll
    for (int v = 0; v < kSize; ++v) pack.lane[v] = times(pack.lane[v]);
    store_pack(grad + i * kSize, pack);
  }
  for (int64_t i = packs * kSize + first; i < count; i += step) grad[i] = times(grad[i]);
}

// grad *= factor in place; when the factor is exactly 1, as in most training loops, nothing is read or written.
__global__ void __launch_bounds__(kScaleThreads)
    scale_in_place(void* grad, FloatType type, const float* factor, int64_t count) {
  const float by = *factor;
  if (by == 1) return;
  if (type == FloatType::kF32) return scale_numbers(static_cast<float*>(grad), by, count);
  if (type == FloatType::kBF16) return scale_numbers(static_cast<BFloat16*>(grad), by, count);
  scale_numbers(static_cast<Half*>(grad), by, count);
}

inline void scale_run(void* grad, FloatType type, const float* factor, int64_t count, const Device& device,
                      cudaStream_t stream) {
  const int64_t blocks = std::min<int64_t>(ceil_div(count, kScaleThreads * 4), device.multiprocessors * 8);
  launch("scale_", scale_in_place, blocks, kScaleThreads, 0, stream, grad, type, factor, count);
}

}  // namespace dsct::cuda
