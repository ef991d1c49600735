// What either form of CAFD does once a sample: temperatures, the weights of its channels, its loss.
#pragma once

#include <limits>
#include <numbers>

#include "common/cuda_math.h"

namespace dsct::cuda {

// What kernels multiply by in place of dividing by the temperatures: divided in double, rounded once.
struct Scales {
  float channel2, spatial2;  // log2(e) / temperature
  double channel_temperature, temperature;
};
DSCT_HOST_DEVICE Scales scales_of(double channel, double spatial) {
  constexpr double kLog2E = std::numbers::log2e;
  return {static_cast<float>(kLog2E / channel), static_cast<float>(kLog2E / spatial), channel, spatial};
}

// The temperatures: on the host, or (2,) on the device, channel then spatial, which every kernel reads for itself. What
// the host would refuse makes everything NaN there.
struct Temperatures {
  Scales scales;
  const double* values;  // these instead, or nullptr
  DSCT_DEVICE Scales get() const {
    if (values == nullptr) return scales;
    auto usable = [](double x) {
      return x > 0 && x < infinity<double>() ? x : std::numeric_limits<double>::quiet_NaN();
    };
    return scales_of(usable(values[0]), usable(values[1]));
  }
};

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

// Where the losses go, of which one block a sample has one each.
struct Losses {
  float* loss;   // (), or (samples) where they are not reduced
  double* each;  // (samples + 1), of which the last is a ticket; nullptr: not reduced
  double norm;   // 1 / samples for the mean, else 1
  DSCT_DEVICE unsigned* ticket(int64_t samples) const { return reinterpret_cast<unsigned*>(each + samples); }
  // By an earlier kernel.
  DSCT_DEVICE void open(int64_t samples) const {
    if (each != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *ticket(samples) = 0;
  }
  // By one thread of each of `samples` blocks: the last of them to finish adds all losses up, in order.
  DSCT_DEVICE void put(int64_t n, int64_t samples, double mine) const {
    if (each == nullptr) {
      loss[n] = static_cast<float>(mine);
      return;
    }
    each[n] = mine;
    __threadfence();
    if (atomicAdd(ticket(samples), 1u) < samples - 1) return;
    __threadfence();
    double total = 0;
    for (int64_t k = 0; k < samples; ++k) total += static_cast<const volatile double*>(each)[k];
    *loss = static_cast<float>(total * norm);
  }
};

}  // namespace dsct::cuda
