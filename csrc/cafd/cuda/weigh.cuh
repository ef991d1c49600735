// What a channel counts, in either form of CAFD.
#pragma once

#include "common/cuda_math.h"

namespace dsct::cuda {

// For one block, whose threads have written the same channels' g: g_c becomes r_c = g_c / mean g (1 where all of them
// are 0), weight softmax_c(r_c / temperature). Returns mean g. scratch: 32 numbers.
template <typename A>
DSCT_DEVICE A weigh(A* g, A* weight, int64_t channels, A scale2, A* scratch) {
  A total[1] = {0}, largest = -infinity<A>();
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) total[0] += g[c];
  block_sum(total, scratch);
  const A mean = total[0] / static_cast<A>(channels);
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    g[c] = mean == 0 ? A(1) : g[c] / mean;
    largest = larger(largest, g[c]);
  }
  __syncthreads();  // scratch is used again
  largest = warp_max(largest);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = largest;
  __syncthreads();
  for (int w = 0; w < blockDim.x / kWarp; ++w) largest = larger(largest, scratch[w]);
  __syncthreads();
  total[0] = 0;
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    weight[c] = exp2_fast((g[c] - largest) * scale2);
    total[0] += weight[c];
  }
  block_sum(total, scratch);
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) weight[c] /= total[0];
  return mean;
}

}  // namespace dsct::cuda
