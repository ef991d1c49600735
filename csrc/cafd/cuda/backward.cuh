// map_products, channel_rho, channel_gradient.
#pragma once

#include "forward.cuh"

namespace dsct::cuda {

// All that the backward kernels know.
struct Backward {
  Features f, out, grad_map;  // grad_map: D
  CafdPlan plan;
  Temperatures temperatures;
  Stats stats;
  float* products;  // (samples, 3)
  float* rho;       // of each chunk, sum_i exp_ci D_i
  int64_t held;     // bytes: one read of the features, a block has a channel, which waits in shared memory; else 0
};
constexpr int64_t kRhoBytes = kCafdThreads * sizeof(float);

// Without products and rho, which take 3 numbers a sample and plan.sums.
inline Backward make_backward(const Features& f, const Features& out, float* stats, const float* grad_map,
                              const Temperatures& temperatures, const Device& device) {
  CafdPlan plan = cafd_plan(f, device, false);
  const int64_t step = plan.threads * kRun, bytes = ceil_div(f.positions, step) * step * sizeof(float);
  // As long as a multiprocessor has room for two blocks or more.
  const int64_t held = f.columns() || kRhoBytes + bytes > device.shared_bytes / 2 ? 0 : bytes;
  if (held == 0) plan = cafd_plan(f, device);
  const Stats results{stats, f.channels, f.positions};
  return {f, out, make_map(grad_map, f), plan, temperatures, results, nullptr, nullptr, held};
}

// Per sample: sum_i A_i D_i = sum_c w_c rho_c, sum_i B_i D_i = sum_c w_c r_c rho_c, sum_c w_c r_c.
__global__ void __launch_bounds__(1024, 1) map_products(const __grid_constant__ Backward in) {
  release_next();
  DSCT_SHARED(shared);
  const Stats& stats = in.stats;
  const int64_t n = blockIdx.x;
  const float* grad_map = static_cast<const float*>(in.grad_map.data) + n * stats.positions;
  float sums[3] = {0, 0, 0};
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < stats.positions; i += blockDim.x) {
    sums[0] += stats.map(n)[i] * grad_map[i];
    sums[1] += stats.relative_map(n)[i] * grad_map[i];
  }
  for (int64_t c = threadIdx.x; c < stats.channels; c += blockDim.x) {
    sums[2] += stats.weight(n)[c] * stats.relative(n)[c];
  }
  block_sum(sums, reinterpret_cast<float*>(shared));
  if (threadIdx.x < 3) in.products[n * 3 + threadIdx.x] = sums[threadIdx.x];
}

// Only the products come from the launch before.
__global__ void __launch_bounds__(kCafdThreads, 4) channel_rho(const __grid_constant__ Backward in) {
  release_next();
  DSCT_SHARED(shared);
  const float scale2 = in.temperatures.get().spatial2;
  const CafdPlace place = place_of(in.f, in.plan, blockIdx.x);
  const float max = place.inside ? in.stats.max(place.n)[place.c] : 0.0f;
  float rho = 0;
  walk_pairs(in.f, in.grad_map, place, nullptr, 0, [&](const auto& x, const auto& d, int64_t) {
#pragma unroll
    for (int v = 0; v < kRun; ++v) rho += exp2_fast((x[v] - max) * scale2) * d[v];
  });
  wait_for_previous();
  put(in.rho, in.plan, place, join_rows(shared, rho, place, [](float& to, float other) { to += other; }));
}

// dF = spread P (D - rho) + lift sign(F)
struct ChannelGrad {
  float max, scale2, spread, rho, lift;
  // sum: of exp D over the channel's positions.
  DSCT_DEVICE ChannelGrad(const Backward& in, const Scales& scales, int64_t n, int64_t c, float sum) {
    const Stats& stats = in.stats;
    const float weight = stats.weight(n)[c], mean = stats.mean(n), *sums = in.products + n * 3;
    max = stats.max(n)[c], scale2 = scales.spatial2;
    spread = weight * stats.inverse(n)[c] / static_cast<float>(scales.temperature);
    rho = sum * stats.inverse(n)[c];
    // s_c = weight (rho - sums[0]) / temperature, and the mean over channels of s_k r_k.
    const float s = weight * (rho - sums[0]),
                mean_sr = (sums[1] - sums[0] * sums[2]) / static_cast<float>(stats.channels);
    const float over = mean * static_cast<float>(stats.positions) * static_cast<float>(scales.channel_temperature);
    lift = mean == 0 ? 0.0f : (s - mean_sr) / over;
  }
  DSCT_DEVICE float operator()(float x, float d) const {
    const float sign = x > 0 ? lift : x < 0 ? -lift : x == 0 ? 0.0f : x;
    return spread * exp2_fast((x - max) * scale2) * (d - rho) + sign;
  }
};

// One read of the features, or a second one, from the last block to the first: channel_rho has read that last.
__global__ void __launch_bounds__(kCafdThreads, 4) channel_gradient(const __grid_constant__ Backward in) {
  DSCT_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);
  Pack<float>* held = reinterpret_cast<Pack<float>*>(sums + kCafdThreads) + threadIdx.x;
  const Features& f = in.f;
  const Scales scales = in.temperatures.get();
  const CafdPlace place = place_of(f, in.plan, in.held > 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
  const int64_t n = place.n, c = place.inside ? place.c : 0;
  float sum = 0;
  if (in.held > 0) {
    const float max = in.stats.max(n)[c];
    Pack<float>* here = held;
    walk_pairs(f, in.grad_map, place, nullptr, 0, [&](const auto& x, const auto& d, int64_t) {
#pragma unroll
      for (int v = 0; v < kRun; ++v) {
        sum += exp2_fast((x[v] - max) * scales.spatial2) * d[v];
        here[v / 4 * blockDim.x].lane[v % 4] = x[v];
      }
      here += 2 * blockDim.x;
    });
    join_rows(shared, sum, place, [](float& to, float other) { to += other; });
    __syncthreads();
    sum = sums[0];
  }
  wait_for_previous();  // before what it wrote is read: the products, or the partial sums
  if (!place.inside) return;
  for (int k = 0; in.held == 0 && k < in.plan.chunks; ++k) sum += in.rho[in.plan.chunk_at(n, k, c)];
  const ChannelGrad grad(in, scales, n, c, sum);
  auto write = [&](const auto& x, const auto& d, int64_t i) {
    float g[kRun];
#pragma unroll
    for (int v = 0; v < kRun; ++v) g[v] = grad(x[v], d[v]);
    store(in.out, in.out.at(n, c, i), g, place.left(i));
  };
  if (in.held == 0) return walk_pairs(f, in.grad_map, place, nullptr, 0, write);
  const Pack<float>* here = held;
  for (int64_t i = place.first; i < place.last; i += place.step, here += 2 * blockDim.x) {
    float x[kRun], d[kRun];
    Numbers(in.grad_map, in.grad_map.at(n, c, i), place.left(i)).values(FloatType::kF32, d);
#pragma unroll
    for (int v = 0; v < kRun; ++v) x[v] = here[v / 4 * blockDim.x].lane[v % 4];
    write(x, d, i);
  }
}

inline void backward_run(Backward in, float* workspace, const Device& device, cudaStream_t stream) {
  in.products = workspace, in.rho = workspace + 3 * in.f.samples;
  launch("cafd backward", map_products, in.f.samples, sample_threads(in.f.positions), 3 * kWarp * sizeof(float), stream,
         in);
  auto go = [&](auto kernel, size_t shared) {
    launch_early("cafd backward", device, kernel, in.plan.blocks, in.plan.threads, shared, stream, in);
  };
  if (in.held == 0) go(channel_rho, kRhoBytes);
  go(channel_gradient, kRhoBytes + in.held);
}

}  // namespace dsct::cuda
