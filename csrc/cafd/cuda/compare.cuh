// compare_maps: the loss.
#pragma once

#include "network.cuh"

namespace dsct::cuda {

constexpr double kMapEps = 1e-6;

struct Grid {
  int height, width;
};

// adaptive_avg_pool2d's bins: [start, end) of the input under output k.
DSCT_DEVICE int bin_start(int k, int in, int out) { return static_cast<int>(static_cast<int64_t>(k) * in / out); }
DSCT_DEVICE int bin_end(int k, int in, int out) {
  return static_cast<int>((static_cast<int64_t>(k + 1) * in + out - 1) / out);
}

template <typename A, typename M>
DSCT_DEVICE A pooled(const M* map, Grid from, Grid to, int y, int x) {
  const int y0 = bin_start(y, from.height, to.height), y1 = bin_end(y, from.height, to.height);
  const int x0 = bin_start(x, from.width, to.width), x1 = bin_end(x, from.width, to.width);
  A sum = 0;
  for (int i = y0; i < y1; ++i) {
    for (int j = x0; j < x1; ++j) sum += static_cast<A>(map[static_cast<int64_t>(i) * from.width + j]);
  }
  return sum / static_cast<A>((y1 - y0) * (x1 - x0));
}

// t log(t / s) + s - t, with gap = s - t. Both maps sum to 1, so what is added changes nothing in the sum over a map.
// But every term is now >= 0 and of second order where the maps are close, and so is what a rounding of s does to it.
// The plain sum takes terms of first order away from each other: near the teacher their rounding is all that is left.
template <typename A>
DSCT_DEVICE A divergence(A s, A t, A gap) {
  const A x = gap / t;
  if (::fabs(x) < A(0.5)) {  // x - log(1 + x), from log(1 + x) = 2 atanh(f)
    const A f = x / (2 + x), f2 = f * f;
    A tail = f2 * A(1.0 / 13) + A(1.0 / 11);
    tail = tail * f2 + A(1.0 / 9);
    tail = tail * f2 + A(1.0 / 7);
    tail = tail * f2 + A(1.0 / 5);
    tail = tail * f2 + A(1.0 / 3);
    return t * f * (x - 2 * f2 * tail);
  }
  return t * std::log(t / s) + gap;  // NaN comes here
}

template <typename A>
struct Comparison {
  Grid student, teacher, common;
  A* pooled;  // [samples][3][common positions]: the two maps, then d loss / d student map; unused on equal grids
  A* losses;  // (samples)
  A norm;     // 1 / samples for the mean, else 1
  int64_t samples;
  A* loss;           // () or nullptr for no reduction
  unsigned* ticket;  // 0 at the start: add_maps sees to it
};

// One block per sample. SA, TA: accumulation dtypes of the two networks' maps; A: the wider.
template <typename A, typename SA, typename TA>
__global__ void __launch_bounds__(1024, 1)
    compare_maps(Comparison<A> in, Stats<SA> student, Stats<TA> teacher, SA* grad_map) {
  wait_for_previous();
  DSCT_SHARED(shared);
  A* scratch = reinterpret_cast<A*>(shared);
  const int64_t n = blockIdx.x;
  const int positions = in.common.height * in.common.width;
  const bool same_s = in.student.height == in.common.height && in.student.width == in.common.width;
  const bool same_t = in.teacher.height == in.common.height && in.teacher.width == in.common.width;
  const SA* map_s = student.map(n);
  const TA* map_t = teacher.map(n);
  A* pool_s = in.pooled + n * 3 * positions;
  A* pool_t = pool_s + positions;
  A* pool_g = pool_t + positions;
  A sums[2] = {0, 0};
  if (!same_s || !same_t) {
    for (int k = threadIdx.x; k < positions; k += blockDim.x) {
      const int y = k / in.common.width, x = k - y * in.common.width;
      if (!same_s) sums[0] += pool_s[k] = pooled<A>(map_s, in.student, in.common, y, x);
      if (!same_t) sums[1] += pool_t[k] = pooled<A>(map_t, in.teacher, in.common, y, x);
    }
    block_sum(sums, scratch);
    __syncthreads();
  }
  const A scale_s = same_s ? A(1) : 1 / sums[0], scale_t = same_t ? A(1) : 1 / sums[1];
  const A floor = static_cast<A>(kMapEps / positions), keep = static_cast<A>(1 - kMapEps);
  sums[0] = sums[1] = 0;  // KL, and sum of gradient times map for the rescaling
#pragma unroll 4
  for (int k = threadIdx.x; k < positions; k += blockDim.x) {
    const A raw = (same_s ? static_cast<A>(map_s[k]) : pool_s[k]) * scale_s;
    const A raw_t = (same_t ? static_cast<A>(map_t[k]) : pool_t[k]) * scale_t;
    const A s = keep * raw + floor, t = keep * raw_t + floor, gap = keep * (raw - raw_t);
    sums[0] += divergence(s, t, gap);
    const A g = -keep * t / s * in.norm;
    sums[1] += g * raw;
    if (grad_map != nullptr) {
      if (same_s) {
        grad_map[n * positions + k] = static_cast<SA>(g);
      } else {
        pool_g[k] = g;
      }
    }
  }
  block_sum(sums, scratch);
  __syncthreads();
  if (grad_map != nullptr && !same_s) {
    // Every position gathers from the bins that contain it.
    const int64_t own = static_cast<int64_t>(in.student.height) * in.student.width;
    for (int64_t i = threadIdx.x; i < own; i += blockDim.x) {
      const int y = static_cast<int>(i / in.student.width),
                x = static_cast<int>(i - static_cast<int64_t>(y) * in.student.width);
      A g = 0;
      for (int ky = bin_start(y, in.common.height, in.student.height); ky < in.common.height; ++ky) {
        const int y0 = bin_start(ky, in.student.height, in.common.height);
        const int y1 = bin_end(ky, in.student.height, in.common.height);
        if (y0 > y) break;
        for (int kx = bin_start(x, in.common.width, in.student.width); kx < in.common.width; ++kx) {
          const int x0 = bin_start(kx, in.student.width, in.common.width);
          const int x1 = bin_end(kx, in.student.width, in.common.width);
          if (x0 > x) break;
          g += (pool_g[ky * in.common.width + kx] - sums[1]) * scale_s / static_cast<A>((y1 - y0) * (x1 - x0));
        }
      }
      grad_map[n * own + i] = static_cast<SA>(g);
    }
  }
  // The last sample to finish adds all of them up in order.
  if (threadIdx.x == 0) {
    in.losses[n] = sums[0];
    if (in.loss != nullptr) {
      __threadfence();
      if (atomicAdd(in.ticket, 1u) == gridDim.x - 1) {
        __threadfence();
        A total = 0;
        for (int64_t i = 0; i < in.samples; ++i) total += static_cast<const volatile A*>(in.losses)[i];
        *in.loss = total * in.norm;
      }
    }
  }
}

}  // namespace dsct::cuda
