// map_products, row_backward, column_rho, column_backward.
#pragma once

#include "network.cuh"

namespace dsct::cuda {

// All that the backward kernels know.
struct Backward {
  Features f, out;
  CafdPlan plan;
  Scales scales;
  Stats stats;
  const float* grad_map;      // D, (samples, positions)
  float *products, *partial;  // (samples, 3); [samples][chunks][channels]
};

inline int64_t backward_workspace(const Features& f, const CafdPlan& plan) {
  return kHead + f.samples * (3 + plan.chunks * f.channels);
}

// Per sample: sum_i A_i D_i = sum_c w_c rho_c, sum_i B_i D_i = sum_c w_c r_c rho_c, sum_c w_c r_c.
__global__ void __launch_bounds__(1024, 1) map_products(const __grid_constant__ Backward in) {
  release_next();
  DSCT_SHARED(shared);
  const Stats& stats = in.stats;
  const int64_t n = blockIdx.x;
  float sums[3] = {0, 0, 0};
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < stats.positions; i += blockDim.x) {
    const float d = in.grad_map[n * stats.positions + i];
    sums[0] += stats.map(n)[i] * d;
    sums[1] += stats.relative_map(n)[i] * d;
  }
  for (int64_t c = threadIdx.x; c < stats.channels; c += blockDim.x)
    sums[2] += stats.weight(n)[c] * stats.relative(n)[c];
  block_sum(sums, reinterpret_cast<float*>(shared));
  if (threadIdx.x == 0) {
    for (int k = 0; k < 3; ++k) in.products[n * 3 + k] = sums[k];
  }
}

// dF = spread P (D - rho) + lift sign(F)
struct ChannelGrad {
  float max, spread, rho, lift;
  // sum: of exp D over the channel's positions.
  DSCT_DEVICE ChannelGrad(const Backward& in, const Scales& scales, int64_t n, int64_t c, float sum) {
    const Stats& stats = in.stats;
    const float weight = stats.weight(n)[c], mean = stats.mean(n), *sums = in.products + n * 3;
    max = stats.max(n)[c];
    spread = weight * scales.spatial * stats.inverse(n)[c];
    rho = sum * stats.inverse(n)[c];
    // s_c = weight channel_scale (rho - sums[0]), and the mean over channels of s_k r_k.
    const float s = weight * scales.channel * (rho - sums[0]);
    const float mean_sr = scales.channel * (sums[1] - sums[0] * sums[2]) / static_cast<float>(stats.channels);
    lift = mean == 0 ? 0.0f : (s - mean_sr) / (mean * static_cast<float>(stats.positions));
  }
  DSCT_DEVICE float operator()(float x, float d, float scale2) const {
    const float sign = x > 0 ? lift : x < 0 ? -lift : x == 0 ? 0.0f : x;
    return spread * exp2_fast((x - max) * scale2) * (d - rho) + sign;
  }
};

// One read of the features, one write: rows wait in shared memory between the two passes, as far as there is room, and
// what is left comes again, from a cache.
__global__ void __launch_bounds__(kCafdThreads, 3) row_backward(const __grid_constant__ Backward in) {
  DSCT_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);
  Pack<uint32_t>* held = reinterpret_cast<Pack<uint32_t>*>(sums + kCafdThreads) + threadIdx.x;
  const Features& f = in.f;
  const Scales scales = in.scales.get();
  const CafdPlace place = place_of(f, in.plan, blockIdx.x);
  const int64_t n = place.n, c = place.channel, runs = place.inside ? in.plan.runs : 0;
  const float* d = in.grad_map + n * f.positions();
  const int words = f.type == FloatType::kF32 ? 2 : 1;
  const auto* memory =
      reinterpret_cast<const uint32_t*>(static_cast<const char*>(f.data) + place.offset * size_of(f.type));
  for (int64_t k = 0, i = place.first; k < in.plan.held && i < runs; ++k, i += in.plan.rows) {
    for (int w = 0; w < words; ++w) {
      copy_pack_async(held[(k * words + w) * kCafdThreads].lane, memory + (i * words + w) * 4);
    }
  }
  wait_for_copies();  // each thread for its own
  auto each = [&](const auto& take) {
    for (int64_t k = 0, i = place.first; i < runs; ++k, i += in.plan.rows) {
      Numbers<kRun> numbers;
      if (k < in.plan.held) {
        numbers.low = held[k * words * kCafdThreads];
        numbers.high = held[(k * words + words - 1) * kCafdThreads];
      } else {
        numbers.load(f.data, f.type, place.offset + i * kRun);
      }
      float x[kRun], di[kRun];
      numbers.values(f.type, x);
      load_run(d + i * kRun, di);
      take(x, di, i * kRun);
    }
    walk<1, 4>(
        f, in.plan.runs * kRun + place.first, in.plan.rows, place.last, true,
        [&](int64_t i) { return place.offset + f.offset(i); },
        [&](const float (&x)[1], int64_t i) {
          const float di[1] = {d[i]};
          take(x, di, i);
        });
  };
  float rho = 0;
  const float max = place.inside ? in.stats.max(n)[c] : 0.0f;
  each([&]<int kCount>(const float (&x)[kCount], const float (&di)[kCount], int64_t) {
#pragma unroll
    for (int v = 0; v < kCount; ++v) rho += exp2_fast((x[v] - max) * scales.spatial2) * di[v];
  });
  wait_for_previous();  // only the products come from the launch before
  join_rows(sums, rho, place.row, in.plan.rows, in.plan.lanes, [](float& to, float other) { to += other; });
  __syncthreads();
  if (!place.inside) return;
  const ChannelGrad grad(in, scales, n, c, sums[place.lane]);
  const int64_t out_row = in.out.row(n, c);
  each([&]<int kCount>(const float (&x)[kCount], const float (&di)[kCount], int64_t i) {
    float g[kCount];
#pragma unroll
    for (int v = 0; v < kCount; ++v) g[v] = grad(x[v], di[v], scales.spatial2);
    store_numbers(in.out, out_row + (kCount == 1 ? in.out.offset(i) : i), g);
  });
}

// sum_i exp_ci D_i over a chunk of positions: partial[n][chunk][channels].
__global__ void __launch_bounds__(kCafdThreads, 3) column_rho(const __grid_constant__ Backward in) {
  release_next();
  wait_for_previous();
  DSCT_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);
  const Features& f = in.f;
  const float scale2 = in.scales.get().spatial2;
  const CafdPlace place = place_of(f, in.plan, blockIdx.x);
  const float* d = in.grad_map + place.n * f.positions();
  float max[kRun], rho[kRun] = {};
  load_channels(in.stats.max(place.n), f, place, max);
  walk<kRun, 2>(
      f, place.first, in.plan.rows, place.last, place.whole, [&](int64_t i) { return place.offset + i * f.stride[3]; },
      [&](const float (&x)[kRun], int64_t i) {
        const float di = d[i];
#pragma unroll
        for (int v = 0; v < kRun; ++v) rho[v] += exp2_fast((x[v] - max[v]) * scale2) * di;
      });
#pragma unroll
  for (int v = 0; v < kRun; ++v) {
    join_rows(sums, rho[v], place.row, in.plan.rows, in.plan.lanes, [](float& to, float other) { to += other; });
    if (place.row == 0 && place.channel + v < f.channels) {
      in.partial[(place.n * in.plan.chunks + place.chunk) * f.channels + place.channel + v] = sums[threadIdx.x];
    }
  }
}

// From the last block to the first: column_rho has read that last.
__global__ void __launch_bounds__(kCafdThreads, 2) column_backward(const __grid_constant__ Backward in) {
  wait_for_previous();
  const Features& f = in.f;
  const Scales scales = in.scales.get();
  const CafdPlace place = place_of(f, in.plan, gridDim.x - 1 - blockIdx.x);
  if (!place.inside) return;
  const float* d = in.grad_map + place.n * f.positions();
  auto channel = [&](int v) {
    const int64_t c = place.channel + v < f.channels ? place.channel + v : place.channel;
    float sum = 0;
    for (int k = 0; k < in.plan.chunks; ++k) sum += in.partial[(place.n * in.plan.chunks + k) * f.channels + c];
    return ChannelGrad(in, scales, place.n, c, sum);
  };
  const ChannelGrad grad[kRun] = {channel(0), channel(1), channel(2), channel(3),
                                  channel(4), channel(5), channel(6), channel(7)};
  const int64_t out_column = in.out.row(place.n, place.channel);
  walk<kRun, 2>(
      f, place.first, in.plan.rows, place.last, place.whole, [&](int64_t i) { return place.offset + i * f.stride[3]; },
      [&](const float (&x)[kRun], int64_t i) {
        const float di = d[i];
        float g[kRun];
#pragma unroll
        for (int v = 0; v < kRun; ++v) g[v] = grad[v](x[v], di, scales.spatial2);
        store_numbers(in.out, out_column + i * in.out.stride[3], g, place.whole);
      });
}

}  // namespace dsct::cuda
