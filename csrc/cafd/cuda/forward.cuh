// channel_stats, channel_weights, attention_maps, add_maps.
#pragma once

#include "network.cuh"
#include "weigh.cuh"

namespace dsct::cuda {

// ---------------------------------------------------------------------------------------------------------- statistics

// Running max, sum exp((x - max) scale) and sum |x|.
struct RowSums {
  float max = -infinity<float>(), sum = 0, magnitude = 0;
  template <int kCount>
  DSCT_DEVICE void take(const float (&x)[kCount], float scale2) {
    float base = max;
#pragma unroll
    for (int v = 0; v < kCount; ++v) base = larger(base, x[v]);
    sum *= max == base ? 1.0f : exp2_fast((max - base) * scale2);
    max = base;
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
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
  DSCT_DEVICE void store(float* to, int64_t channels) const {
    to[0] = max, to[channels] = sum, to[2 * channels] = magnitude;
  }
};

__global__ void __launch_bounds__(kCafdThreads, 2) channel_stats(const __grid_constant__ Networks nets) {
  release_next();
  DSCT_SHARED(shared);
  int64_t block = blockIdx.x;
  const Network& net = network_of(nets, nets.each[0].plan.blocks, block);
  const float scale2 = nets.scales.get().spatial2;
  const Features& f = net.f;
  const CafdPlan& plan = net.plan;
  const CafdPlace place = place_of(f, plan, block);
  RowSums sums[kRun];  // rows: of one channel, to be added up
  auto take = [&]<int kBatch, int kCount>(const float (&x)[kBatch][kCount], int64_t, int count) {
    static_assert(kBatch == 4);
    if (count == kBatch) {  // one change of a maximum for all of them
#pragma unroll
      for (int v = 0; v < kCount; ++v) sums[v].take({x[0][v], x[1][v], x[2][v], x[3][v]}, scale2);
    } else {
      for (int b = 0; b < kBatch - 1; ++b) {
#pragma unroll
        for (int v = 0; v < kCount; ++v) {
          if (b < count) sums[v].take({b == 0 ? x[0][v] : b == 1 ? x[1][v] : x[2][v]}, scale2);
        }
      }
    }
  };
  const int64_t step = plan.columns ? f.stride[3] : kRun, runs = place.inside ? plan.runs : 0;
  walk_batches<kRun, 4>(
      f, place.first, plan.rows, plan.columns ? place.last : runs, place.whole,
      [&](int64_t i) { return place.offset + i * step; }, take);
  if (!plan.columns) {
    walk_batches<1, 4>(
        f, plan.runs * kRun + place.first, plan.rows, place.last, true,
        [&](int64_t i) { return place.offset + f.offset(i); }, take);
#pragma unroll
    for (int v = 1; v < kRun; ++v) sums[0].add(sums[v], scale2);
  }
  RowSums* scratch = reinterpret_cast<RowSums*>(shared);  // one of the eight at a time: 3 KB
#pragma unroll
  for (int v = 0; v < kRun; ++v) {
    if (v > 0 && !plan.columns) break;
    join_rows(scratch, sums[v], place.row, plan.rows, plan.lanes,
              [&](RowSums& to, const RowSums& other) { to.add(other, scale2); });
    if (place.row == 0 && place.channel + v < f.channels) {
      scratch[threadIdx.x].store(net.chunk(place.n, place.chunk) + place.channel + v, f.channels);
    }
  }
}

// One block per sample: joins the chunks, then the weights.
__global__ void __launch_bounds__(kCafdThreads, 1) channel_weights(const __grid_constant__ Networks nets) {
  release_next();
  wait_for_previous();
  DSCT_SHARED(shared);
  int64_t n = blockIdx.x;
  const Network& net = network_of(nets, nets.each[0].f.samples, n);
  const Stats& stats = net.stats;
  const Scales scales = nets.scales.get();
  const int64_t channels = stats.channels;
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    RowSums sums;
    for (int k = 0; k < net.plan.chunks; ++k) {
      const float* in = net.chunk(n, k) + c;
      RowSums chunk;
      chunk.max = in[0], chunk.sum = in[channels], chunk.magnitude = in[2 * channels];
      sums.add(chunk, scales.spatial2);
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

// A and B at kCount positions, over a share of the channels.
template <int kCount>
DSCT_DEVICE void row_map(const Network& net, int64_t n, int64_t share, int64_t position, int64_t offset, float scale2) {
  const Features& f = net.f;
  const Stats& stats = net.stats;
  const int64_t first = share * net.plan.share_channels, end = first + net.plan.share_channels;
  float a[kCount] = {}, b[kCount] = {};
  walk<kCount, 2>(
      f, first, 1, end < f.channels ? end : f.channels, true, [&](int64_t c) { return f.row(n, c) + offset; },
      [&](const float (&x)[kCount], int64_t c) {
        const float max = stats.max(n)[c], relative = stats.relative(n)[c];
        const float weight = stats.weight(n)[c] * stats.inverse(n)[c];
#pragma unroll
        for (int v = 0; v < kCount; ++v) {
          const float p = weight * exp2_fast((x[v] - max) * scale2);
          a[v] += p;
          b[v] += relative * p;
        }
      });
  float* out = net.share(n, share) + position;
  store_run(out, a);
  store_run(out + f.positions(), b);
}

DSCT_DEVICE void row_maps(const Network& net, int64_t block, float scale2) {
  const CafdPlan& plan = net.plan;
  const int64_t tile = block % plan.position_tiles, rest = block / plan.position_tiles;
  const int64_t share = rest % plan.shares, n = rest / plan.shares;
  const int64_t item = tile * kCafdThreads + threadIdx.x, position = item - plan.runs + plan.runs * kRun;
  if (item < plan.runs) {
    row_map<kRun>(net, n, share, item * kRun, item * kRun, scale2);
  } else if (position < net.f.positions()) {
    row_map<1>(net, n, share, position, net.f.offset(position), scale2);
  }
}

// A thread keeps its channels' constants and walks over positions; the lanes of a position add up through shuffles.
// Its channel tile is the share. lanes is at most a warp.
DSCT_DEVICE void column_maps(const Network& net, int64_t block, float scale2) {
  constexpr int kBatch = 2;
  const Features& f = net.f;
  const Stats& stats = net.stats;
  const CafdPlace place = place_of(f, net.plan, block);
  const int64_t n = place.n, end = (place.chunk + 1) * net.plan.chunk_positions;
  const int64_t last = end < f.positions() ? end : f.positions();
  float max[kRun], weight[kRun], relative[kRun], inverse[kRun];
  load_channels(stats.max(n), f, place, max);
  load_channels(stats.weight(n), f, place, weight);
  load_channels(stats.inverse(n), f, place, inverse);
  load_channels(stats.relative(n), f, place, relative);
#pragma unroll
  for (int v = 0; v < kRun; ++v) weight[v] *= inverse[v];
  float* out = net.share(n, place.tile);
  // All lanes of a warp make the same number of rounds: shuffles need them all.
  for (int64_t start = place.first - place.row; start < last; start += kBatch * net.plan.rows) {
    Numbers<kRun> numbers[kBatch] = {};
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int64_t i = start + place.row + k * net.plan.rows;
      if (i < place.last) numbers[k].load(f.data, f.type, place.offset + i * f.stride[3], place.whole);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int64_t i = start + place.row + k * net.plan.rows;
      float x[kRun], a = 0, b = 0;
      numbers[k].values(f.type, x);
#pragma unroll
      for (int v = 0; v < kRun; ++v) {
        const float p = weight[v] * exp2_fast((x[v] - max[v]) * scale2);
        a += p;
        b += relative[v] * p;
      }
      for (int offset = 1; offset < net.plan.lanes; offset *= 2) {
        a += __shfl_xor_sync(kFullMask, a, offset);
        b += __shfl_xor_sync(kFullMask, b, offset);
      }
      if (place.lane == 0 && i < last) out[i] = a, out[f.positions() + i] = b;
    }
  }
}

// From the last block to the first: what the statistics have read last still lies in L2. The backward turns again.
__global__ void __launch_bounds__(kCafdThreads, 3) attention_maps(const __grid_constant__ Networks nets) {
  release_next();
  wait_for_previous();
  int64_t block = gridDim.x - 1 - blockIdx.x;
  const Network& net = network_of(nets, nets.each[0].plan.map_blocks, block);
  const float scale2 = nets.scales.get().spatial2;
  if (net.plan.columns) {
    column_maps(net, block, scale2);
  } else {
    row_maps(net, block, scale2);
  }
}

// A and B from their shares, into the statistics and, where asked, into a map of its own.
DSCT_HOST_DEVICE int64_t add_blocks(const Network& net) {
  return (net.f.samples * net.f.positions() + kCafdThreads - 1) / kCafdThreads;
}

__global__ void __launch_bounds__(kCafdThreads, 1) add_maps(const __grid_constant__ Networks nets) {
  release_next();
  wait_for_previous();
  int64_t block = blockIdx.x;
  const Network& net = network_of(nets, add_blocks(nets.each[0]), block);
  if (blockIdx.x == 0 && threadIdx.x == 0) *nets.ticket = 0;
  const int64_t positions = net.f.positions(), index = block * blockDim.x + threadIdx.x;
  const int64_t n = index / positions, i = index - n * positions;
  if (n >= net.f.samples) return;
  float a = 0, b = 0;
#pragma unroll 8
  for (int k = 0; k < net.plan.shares; ++k) {
    a += net.share(n, k)[i];
    b += net.share(n, k)[positions + i];
  }
  net.stats.map(n)[i] = a;
  net.stats.relative_map(n)[i] = b;
  if (net.map != nullptr) net.map[index] = a;
}

}  // namespace dsct::cuda
