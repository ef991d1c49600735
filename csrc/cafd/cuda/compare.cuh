// compare_maps: the loss of two maps of one size.
#pragma once

#include "network.cuh"

namespace dsct::cuda {

constexpr float kMapEps = 1e-6f;

// t log(t / s) + s - t, with gap = s - t. Both maps sum to 1, so what is added changes nothing in the sum over a map.
// But every term is now >= 0 and of second order where the maps are close, and so is what a rounding of s does to it.
// The plain sum takes terms of first order away from each other: near the teacher their rounding is all that is left.
DSCT_DEVICE float divergence(float s, float t, float gap) {
  const float x = gap / t;
  if (fabsf(x) < 0.5f) {  // x - log(1 + x), from log(1 + x) = 2 atanh(f)
    const float f = x / (2 + x), f2 = f * f;
    float tail = f2 * (1.0f / 13) + 1.0f / 11;
    tail = tail * f2 + 1.0f / 9;
    tail = tail * f2 + 1.0f / 7;
    tail = tail * f2 + 1.0f / 5;
    tail = tail * f2 + 1.0f / 3;
    return t * f * (x - 2 * f2 * tail);
  }
  return t * std::log(t / s) + gap;  // NaN comes here
}

struct Comparison {
  float* losses;  // (samples)
  float norm;     // 1 / samples for the mean, else 1
  int64_t samples;
  float *loss, *grad_map;  // () or nullptr for no reduction; (samples, positions) or nullptr
  unsigned* ticket;
};

// One block per sample.
__global__ void __launch_bounds__(1024, 1) compare_maps(Comparison in, Stats student, Stats teacher) {
  wait_for_previous();
  DSCT_SHARED(shared);
  const int64_t n = blockIdx.x, positions = student.positions;
  const float *map_s = student.map(n), *map_t = teacher.map(n);
  const float floor = kMapEps / static_cast<float>(positions), keep = 1 - kMapEps;
  float kl[1] = {0};
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < positions; i += blockDim.x) {
    const float s = keep * map_s[i] + floor, t = keep * map_t[i] + floor;
    kl[0] += divergence(s, t, keep * (map_s[i] - map_t[i]));
    if (in.grad_map != nullptr) in.grad_map[n * positions + i] = -keep * t / s * in.norm;
  }
  block_sum(kl, reinterpret_cast<float*>(shared));
  if (threadIdx.x > 0) return;
  in.losses[n] = kl[0];
  if (in.loss != nullptr) add_up(in.losses, in.samples, in.ticket, in.norm, in.loss);
}

}  // namespace dsct::cuda
