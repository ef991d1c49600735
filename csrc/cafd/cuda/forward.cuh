// Condensed CAFD on the GPU. Features are read twice forward (row statistics, then the map) and once backward, where
// each channel's gradient needs only its own row and two numbers per sample; or twice, where no block has a whole row.
//
//   channel_stats     per channel: max, sum of exponentials, sum of magnitudes
//   channel_weights   per sample: r_c and w_c
//   attention_maps    A and B
//   compare_maps      per sample: KL, and D = d loss / d A
//
// and in backward.cuh
//
//   map_products      per sample: sum A D, sum B D, sum w r
//   channel_rho       rho_c, if a channel's row is spread over the whole image (channels_last), or is long
//   channel_gradient  its gradient, and otherwise first rho_c, from a row that it holds in shared memory
//
// These sources also compile for the host.
#pragma once

#include "cafd/stats.h"
#include "sample.cuh"
#include "walk.cuh"

namespace dsct::cuda {

// Per sample, in this order: max_c, 1 / sum_c, r_c, w_c (channels each), A_i, B_i (positions each), mean_c g_c.
struct Stats {
  float* base;
  int64_t channels, positions;
  DSCT_DEVICE float* max(int64_t n) const { return base + n * stats_row(channels, positions); }
  DSCT_DEVICE float* inverse(int64_t n) const { return max(n) + channels; }
  DSCT_DEVICE float* relative(int64_t n) const { return max(n) + 2 * channels; }
  DSCT_DEVICE float* weight(int64_t n) const { return max(n) + 3 * channels; }
  DSCT_DEVICE float* map(int64_t n) const { return max(n) + 4 * channels; }
  DSCT_DEVICE float* relative_map(int64_t n) const { return map(n) + positions; }
  DSCT_DEVICE float& mean(int64_t n) const { return map(n)[2 * positions]; }
};

// Running max, sum exp((x - max) scale) and sum |x|.
struct RowSums {
  float max = -infinity<float>(), sum = 0, magnitude = 0;
  // To a max that is no smaller. It stays -inf as long as there is nothing, or -inf or NaN only: the sum says which.
  DSCT_DEVICE void move(float to, float scale2) { sum *= max == to ? 1.0f : exp2_fast((max - to) * scale2), max = to; }
  // Beyond `count` nothing is there.
  DSCT_DEVICE void take(const float (&x)[kRun], int64_t count, float scale2) {
    float to = max;
#pragma unroll
    for (int v = 0; v < kRun; ++v) to = larger(to, v < count ? x[v] : to);
    move(to, scale2);
#pragma unroll
    for (int v = 0; v < kRun; ++v) {
      if (v < count) sum += exp2_fast((x[v] - max) * scale2), magnitude += fabsf(x[v]);
    }
  }
  DSCT_DEVICE void add(const RowSums& theirs, float scale2) {
    RowSums other = theirs;
    const float to = larger(max, other.max);
    move(to, scale2), other.move(to, scale2);
    sum += other.sum, magnitude += other.magnitude;
  }
};

// All that the forward kernels know of one network.
struct Network {
  Features f;
  CafdPlan plan;
  Stats stats;
  RowSums* sums;
  float* map;  // (samples, positions) or nullptr
};
inline Network make_network(const Features& f, const CafdPlan& plan, float* stats, float* sums, float* map) {
  return {f, plan, {stats, f.channels, f.positions}, reinterpret_cast<RowSums*>(sums), map};
}

// Student and teacher go through the same launches: the blocks of the first, then those of the second, if there is one.
struct Networks {
  Network each[2];
  Temperatures temperatures;
  Losses losses;  // of compare_maps
};

// The network of this block, and which of its blocks it is.
DSCT_DEVICE const Network& network_of(const Networks& nets, int64_t first_blocks, int64_t& block) {
  const bool second = block >= first_blocks;
  block -= second ? first_blocks : 0;
  return nets.each[second];
}

// ---------------------------------------------------------------------------------------------------------- statistics

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
      [&](int64_t i) { return Numbers(f, f.at(place.n, place.c, i), place.left(i)); },
      [&](const Numbers& run, int64_t i) {
        float x[kRun];
        run.values(f.type, x);
        mine.take(x, place.left(i), scale2);
      });
  const auto add = [&](RowSums& to, const RowSums& other) { to.add(other, scale2); };
  put(net.sums, net.plan, place, join_rows(shared, mine, place, add));
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
    for (int k = 0; k < net.plan.chunks; ++k) sums.add(net.sums[net.plan.chunk_at(n, k, c)], scales.spatial2);
    stats.max(n)[c] = sums.max;
    stats.inverse(n)[c] = 1 / sums.sum;
    stats.relative(n)[c] = sums.magnitude / static_cast<float>(stats.positions);
  }
  const float mean =
      weigh(stats.relative(n), stats.weight(n), channels, scales.channel2, reinterpret_cast<float*>(shared));
  if (threadIdx.x == 0) stats.mean(n) = mean;
}

// ---------------------------------------------------------------------------------------------------------------- maps

// A block has eight runs of positions, and 32 threads share the channels of each. Sums of a thread stand so far apart
// that they are in other banks.
constexpr int kGroups = kWarp, kRuns = kCafdThreads / kGroups, kSums = kCafdThreads + 4;
DSCT_HOST_DEVICE int64_t map_tiles(const Features& f) { return ceil_div(f.positions, kRuns * kRun); }

// A and B. Neighbouring threads have neighbouring channels where those lie side by side, else neighbouring runs. From
// the last block to the first: what the statistics have read last still lies in L2. The backward turns again.
__global__ void __launch_bounds__(kCafdThreads, 2) attention_maps(const __grid_constant__ Networks nets) {
  release_next();
  wait_for_previous();
  DSCT_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);
  const int64_t tiles = map_tiles(nets.each[0].f);
  int64_t block = gridDim.x - 1 - blockIdx.x;
  const Network& net = network_of(nets, nets.each[0].f.samples * tiles, block);
  const float scale2 = nets.temperatures.get().spatial2;
  const Features& f = net.f;
  const Stats& stats = net.stats;
  const int64_t n = block / tiles, first = block % tiles * kRuns * kRun;
  const int by_group = f.columns() ? 1 : kRuns, by_run = f.columns() ? kGroups : 1;  // steps in threads
  const int64_t mine = first + threadIdx.x / by_run % kRuns * kRun;
  float a[kRun] = {}, b[kRun] = {};
  walk<4>(
      threadIdx.x / by_group % kGroups, mine < f.positions ? f.channels : 0, kGroups,
      [&](int64_t c) { return Numbers(f, f.at(n, c, mine), f.positions - mine); },
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
  const int64_t i = first + threadIdx.x % (kRuns * kRun);
  const int of = threadIdx.x / (kRuns * kRun);  // A or B
  if (of > 1 || i >= f.positions) return;
  const float* each = sums + (of * kRun + threadIdx.x % kRun) * kSums + threadIdx.x / kRun % kRuns * by_run;
  float total = 0;
#pragma unroll 8
  for (int group = 0; group < kGroups; ++group) total += each[group * by_group];
  stats.map(n)[of * f.positions + i] = total;
  if (of == 0 && net.map != nullptr) net.map[n * f.positions + i] = total;
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

// One block per sample.
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

// -------------------------------------------------------------------------------------------------------------- launch

// Statistics and maps, of one size.
inline void maps_run(const Networks& nets, const Device& device, cudaStream_t stream) {
  const Network &a = nets.each[0], &b = nets.each[1];
  const int64_t samples = a.f.samples + b.f.samples;
  const int threads = std::max(a.plan.threads, b.plan.threads);
  launch("cafd", channel_stats, a.plan.blocks + b.plan.blocks, threads, threads * sizeof(RowSums), stream, nets);
  launch_early("cafd", device, channel_weights, samples,
               sample_threads(std::max(a.f.channels, b.f.channels), kCafdThreads), kWarp * sizeof(float), stream, nets);
  launch_early("cafd", device, attention_maps, samples * map_tiles(a.f), kCafdThreads, 2 * kRun * kSums * sizeof(float),
               stream, nets);
}

// The whole forward of two networks, N > 0. grad_map: (samples, positions) or nullptr.
inline void cafd_run(const Networks& nets, float* grad_map, const Device& device, cudaStream_t stream) {
  maps_run(nets, device, stream);
  const Features& f = nets.each[0].f;
  launch_early("cafd", device, compare_maps, f.samples, sample_threads(f.positions), kWarp * sizeof(float), stream,
               nets.losses, nets.each[0].stats, nets.each[1].stats, grad_map);
}

}  // namespace dsct::cuda
