// channel_stats, channel_weights, attention_maps, compare_maps.
#pragma once

#include "network.cuh"

namespace dsct::cuda {

// ---------------------------------------------------------------------------------------------------------- statistics

// Running max, sum exp((x - max) scale) and sum |x|.
struct RowSums {
  float max = -infinity<float>(), sum = 0, magnitude = 0;
  // Beyond `count` nothing is there.
  DSCT_DEVICE void take(const float (&x)[kRun], int64_t count, float scale2) {
    float base = max;
#pragma unroll
    for (int v = 0; v < kRun; ++v) base = larger(base, v < count ? x[v] : base);
    sum *= max == base ? 1.0f : exp2_fast((max - base) * scale2);
    max = base;
#pragma unroll
    for (int v = 0; v < kRun; ++v) {
      if (v >= count) continue;
      sum += exp2_fast((x[v] - base) * scale2);
      magnitude += fabsf(x[v]);
    }
  }
  DSCT_DEVICE void add(const RowSums& other, float scale2) {
    const float both = larger(max, other.max);
    if (both == -infinity<float>()) {  // nothing yet, or -inf or NaN only: sums say which
      sum += other.sum;
    } else {
      sum = sum * exp2_fast((max - both) * scale2) + other.sum * exp2_fast((other.max - both) * scale2);
      max = both;
    }
    magnitude += other.magnitude;
  }
};

__global__ void __launch_bounds__(kCafdThreads, 4) channel_stats(const __grid_constant__ Networks nets) {
  release_next();
  DSCT_SHARED(shared);
  int64_t block = blockIdx.x;
  const Network& net = network_of(nets, nets.each[0].plan.blocks, block);
  const float scale2 = nets.temperatures.get().spatial2;
  const Features& f = net.f;
  const CafdPlace place = place_of(f, net.plan, block);
  RowSums mine;
  walk<2>(
      place.first, place.last, place.step,
      [&](int64_t i) {
        Numbers run;
        run.load(f, f.at(place.n, place.c, i), place.left(i));
        return run;
      },
      [&](const Numbers& run, int64_t i) {
        float x[kRun];
        run.values(f.type, x);
        mine.take(x, place.left(i), scale2);
      });
  RowSums* sums = reinterpret_cast<RowSums*>(shared);
  join_rows(sums, mine, place, net.plan.lanes, [&](auto& to, const auto& other) { to.add(other, scale2); });
  if (place.row > 0 || !place.inside) return;
  const RowSums& all = sums[threadIdx.x];
  float* to = net.chunk(place.n, place.chunk) + place.c;
  to[0] = all.max, to[f.channels] = all.sum, to[2 * f.channels] = all.magnitude;
}

// One block per sample: joins the chunks, then the weights.
__global__ void __launch_bounds__(kCafdThreads, 1) channel_weights(const __grid_constant__ Networks nets) {
  release_next();
  wait_for_previous();
  DSCT_SHARED(shared);
  nets.losses.open(nets.each[0].f.samples);
  int64_t n = blockIdx.x;
  const Network& net = network_of(nets, nets.each[0].f.samples, n);
  const Stats& stats = net.stats;
  const Scales scales = nets.temperatures.get();
  const int64_t channels = stats.channels;
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    RowSums sums;
    for (int k = 0; k < net.plan.chunks; ++k) {
      const float* in = net.chunk(n, k) + c;
      sums.add({in[0], in[channels], in[2 * channels]}, scales.spatial2);
    }
    stats.max(n)[c] = sums.max;
    stats.inverse(n)[c] = 1 / sums.sum;
    stats.relative(n)[c] = sums.magnitude / static_cast<float>(stats.positions);
  }
  const float mean =
      weigh(stats.relative(n), stats.weight(n), channels, scales.channel2, reinterpret_cast<float*>(shared));
  if (threadIdx.x == 0) stats.mean(n) = mean;
}

// ---------------------------------------------------------------------------------------------------------------- maps

constexpr int kSums = kCafdThreads + 4;  // from one of a thread's sums to its next: other banks

// A and B. A thread has a run of positions and every groups-th channel; neighbouring threads have neighbouring channels
// where those lie side by side, else neighbouring runs.
// From the last block to the first: what the statistics have read last still lies in L2. The backward turns again.
__global__ void __launch_bounds__(kCafdThreads, 3) attention_maps(const __grid_constant__ Networks nets) {
  release_next();
  wait_for_previous();
  DSCT_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);
  int64_t block = gridDim.x - 1 - blockIdx.x;
  const Network& net = network_of(nets, nets.each[0].f.samples * nets.each[0].map_tiles, block);
  const float scale2 = nets.temperatures.get().spatial2;
  const Features& f = net.f;
  const Stats& stats = net.stats;
  const int64_t n = block / net.map_tiles, first = block % net.map_tiles * net.runs * kRun;
  const int by_group = f.columns() ? 1 : net.runs, by_run = f.columns() ? net.groups : 1;  // steps in threads
  const int64_t mine = first + threadIdx.x / by_run % net.runs * kRun;
  float a[kRun] = {}, b[kRun] = {};
  walk<2>(
      threadIdx.x / by_group % net.groups, mine < f.positions ? f.channels : 0, net.groups,
      [&](int64_t c) {
        Numbers run;
        run.load(f, f.at(n, c, mine), f.positions - mine);
        return run;
      },
      [&](const Numbers& run, int64_t c) {
        float x[kRun];
        run.values(f.type, x);
        const float max = stats.max(n)[c], relative = stats.relative(n)[c];
        const float weight = stats.weight(n)[c] * stats.inverse(n)[c];
#pragma unroll
        for (int v = 0; v < kRun; ++v) {
          const float p = weight * exp2_fast((x[v] - max) * scale2);
          a[v] += p;
          b[v] += relative * p;
        }
      });
#pragma unroll
  for (int v = 0; v < kRun; ++v) sums[v * kSums + threadIdx.x] = a[v], sums[(kRun + v) * kSums + threadIdx.x] = b[v];
  __syncthreads();
  const int numbers = net.runs * kRun;  // of A, then as many of B
  for (int k = threadIdx.x; k < 2 * numbers; k += kCafdThreads) {
    const int i = k % numbers;
    if (first + i >= f.positions) continue;
    const float* each = sums + (k / numbers * kRun + k % kRun) * kSums + i / kRun * by_run;
    float total = 0;
    for (int group = 0; group < net.groups; ++group) total += each[group * by_group];
    (k < numbers ? stats.map(n) : stats.relative_map(n))[first + i] = total;
    if (k < numbers && net.map != nullptr) net.map[n * f.positions + first + i] = total;
  }
}

// ---------------------------------------------------------------------------------------------------------------- loss

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

// One block per sample. grad_map: (samples, positions) or nullptr.
__global__ void __launch_bounds__(1024, 1) compare_maps(Losses losses, Stats student, Stats teacher, float* grad_map) {
  wait_for_previous();
  DSCT_SHARED(shared);
  const int64_t n = blockIdx.x, positions = student.positions;
  const float *map_s = student.map(n), *map_t = teacher.map(n);
  const float floor = kMapEps / static_cast<float>(positions), keep = 1 - kMapEps;
  const float norm = static_cast<float>(losses.norm);
  float kl[1] = {0};
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < positions; i += blockDim.x) {
    const float s = keep * map_s[i] + floor, t = keep * map_t[i] + floor;
    kl[0] += divergence(s, t, keep * (map_s[i] - map_t[i]));
    if (grad_map != nullptr) grad_map[n * positions + i] = -keep * t / s * norm;
  }
  block_sum(kl, reinterpret_cast<float*>(shared));
  if (threadIdx.x == 0) losses.put(n, gridDim.x, kl[0]);
}

}  // namespace dsct::cuda
