// scale_: backward's factor.
#pragma once

#include <algorithm>

#include "common/cuda_math.h"

namespace dsct::cuda {

// grad *= factor in place; when the factor is exactly 1, as in most training loops, nothing is read or written. 0 stays
// 0 whatever the factor is: an ignored pixel gets nothing of an upstream inf or NaN.
template <typename A, typename T>
DSCT_DEVICE T times(T value, A by) {
  const A wide = static_cast<A>(value);
  return wide == 0 ? value : static_cast<T>(wide * by);
}

template <typename T, typename A>
__global__ void scale_in_place(T* grad, const A* factor, int64_t count, bool packs) {
  const A by = *factor;
  if (by == 1) return;
  const int64_t first = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  if (packs) {
    for (int64_t i = first; i < count / Pack<T>::kSize; i += step) {
      Pack<T> pack = load_pack(grad + i * Pack<T>::kSize);
#pragma unroll
      for (int v = 0; v < Pack<T>::kSize; ++v) pack.lane[v] = times(pack.lane[v], by);
      store_pack(grad + i * Pack<T>::kSize, pack);
    }
  }
  const int64_t done = packs ? count / Pack<T>::kSize * Pack<T>::kSize : 0;
  for (int64_t i = done + first; i < count; i += step) grad[i] = times(grad[i], by);
}

template <typename T, typename A>
void launch_scale(void* grad, const void* factor, int64_t count, const Device& device, cudaStream_t stream) {
  const int64_t blocks = std::min<int64_t>(ceil_div(count, 256 * Pack<T>::kSize), device.multiprocessors * 8);
  launch("scale_", scale_in_place<T, A>, blocks, 256, 0, stream, static_cast<T*>(grad), static_cast<const A*>(factor),
         count, on_16_bytes(grad));
}

// `factor` is () in float32, or in float64 (`wide`).
inline void scale_run(void* grad, FloatType type, const void* factor, bool wide, int64_t count, const Device& device,
                      cudaStream_t stream) {
  switch (type) {
    case FloatType::kF64:
      return launch_scale<double, double>(grad, factor, count, device, stream);
    case FloatType::kF32:
      return wide ? launch_scale<float, double>(grad, factor, count, device, stream)
                  : launch_scale<float, float>(grad, factor, count, device, stream);
    case FloatType::kF16:
      return wide ? launch_scale<Half, double>(grad, factor, count, device, stream)
                  : launch_scale<Half, float>(grad, factor, count, device, stream);
    default:
      return wide ? launch_scale<BFloat16, double>(grad, factor, count, device, stream)
                  : launch_scale<BFloat16, float>(grad, factor, count, device, stream);
  }
}

}  // namespace dsct::cuda
