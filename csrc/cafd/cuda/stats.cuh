// row_stats / column_stats, channel_weights.
#pragma once

#include "network.cuh"

namespace dsct::cuda {

// Running max, sum exp((x - max) scale) and sum |x|.
template <typename A>
struct RowSums {
  A max = -infinity<A>(), sum = 0, magnitude = 0;
  DSCT_DEVICE void add(const RowSums& other, A scale2) {
    const A both = larger(max, other.max);
    if (both == -infinity<A>()) {  // nothing yet, or -inf or NaN only: sums say which
      sum += other.sum;
    } else {
      sum = sum * exp2_fast((max - both) * scale2) + other.sum * exp2_fast((other.max - both) * scale2);
      max = both;
    }
    magnitude += other.magnitude;
  }
};

template <typename A>
DSCT_DEVICE RowSums<A> warp_row_sums(RowSums<A> mine, A scale2) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    RowSums<A> other;
    other.max = __shfl_xor_sync(kFullMask, mine.max, offset);
    other.sum = __shfl_xor_sync(kFullMask, mine.sum, offset);
    other.magnitude = __shfl_xor_sync(kFullMask, mine.magnitude, offset);
    // Both sides must do the same sum in the same order, or they would differ in the last bit.
    if (threadIdx.x & offset) {
      other.add(mine, scale2);
      mine = other;
    } else {
      mine.add(other, scale2);
    }
  }
  return mine;
}

template <typename Row>
__global__ void __launch_bounds__(kCafdThreads, Row::kBlocks)
    row_stats(const __grid_constant__ Networks<typename Row::Acc> nets) {
  release_next();
  using A = typename Row::Acc;
  constexpr int kBatch = 4;  // loads in flight a thread
  DSCT_SHARED(shared);
  RowSums<A>* warps = reinterpret_cast<RowSums<A>*>(shared);
  int64_t block;
  const Network<A>& net = network_of(nets, nets.each[0].stats_blocks, block);
  const Features& f = net.f;
  const PartialStats<A>& partial = net.partial;
  const A scale2 = nets.spatial2();
  const int row_warps = net.row_warps, warp = threadIdx.x / kWarp;
  const int rows = kCafdWarps / row_warps, row_threads = row_warps * kWarp;
  const int64_t row_index = block * rows + warp / row_warps;
  const bool inside = row_index < f.samples * f.channels;
  const int64_t n = row_index / f.channels, c = row_index - n * f.channels;
  RowSums<A> sums;
  if (inside) {
    const void* row = Row::row(f, n, c);
    const int64_t count = f.positions() / Row::kSize;
    for (int64_t first = threadIdx.x % row_threads; first < count; first += kBatch * row_threads) {
      typename Row::Held held[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (first + b * row_threads < count) held[b] = Row::load(f, row, first + b * row_threads);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (first + b * row_threads >= count) break;
        RowSums<A> pack;
#pragma unroll
        for (int v = 0; v < Row::kSize; ++v) pack.max = larger(pack.max, Row::value(held[b], v));
        const A base = larger(pack.max, sums.max);
        sums.sum *= sums.max == base ? A(1) : exp2_fast((sums.max - base) * scale2);
        sums.max = base;
#pragma unroll
        for (int v = 0; v < Row::kSize; ++v) {
          const A x = Row::value(held[b], v);
          sums.sum += exp2_fast((x - base) * scale2);
          sums.magnitude += x < 0 ? -x : x;
        }
      }
    }
  }
  sums = warp_row_sums(sums, scale2);
  if (threadIdx.x % kWarp == 0) warps[warp] = sums;
  __syncthreads();
  if (inside && threadIdx.x % row_threads == 0) {
    for (int w = 1; w < row_warps; ++w) sums.add(warps[warp + w], scale2);
    A* out = partial.at(n, 0);
    out[c] = sums.max, out[partial.channels + c] = sums.sum, out[2 * partial.channels + c] = sums.magnitude;
  }
}

template <typename T>
__global__ void __launch_bounds__(kCafdThreads, 2) column_stats(const __grid_constant__ Networks<float> nets) {
  release_next();
  constexpr int kSize = Pack<T>::kSize, kBatch = 4;
  DSCT_SHARED(shared);
  RowSums<float>* rows = reinterpret_cast<RowSums<float>*>(shared);  // [rows][lanes]
  int64_t block;
  const Network<float>& net = network_of(nets, nets.each[0].stats_blocks, block);
  const Features& f = net.f;
  const Columns& grid = net.columns;
  const PartialStats<float>& partial = net.partial;
  const float scale2 = nets.spatial2();
  const ColumnPlace place = place_of<kSize>(f, grid, block);
  RowSums<float> sums[kSize];
  if (place.inside) {
    for (int64_t first = place.first + place.row; first < place.last; first += kBatch * place.rows) {
      Pack<T> pack[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int64_t i = first + b * place.rows;
        if (i < place.last) pack[b] = load_pack_cached(column_at<T>(f, place, i));
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (first + b * place.rows >= place.last) break;
#pragma unroll
        for (int v = 0; v < kSize; ++v) {
          const float x = number(pack[b], v), base = larger(sums[v].max, x);
          sums[v].sum = sums[v].sum * (sums[v].max == base ? 1.0f : exp2_fast((sums[v].max - base) * scale2)) +
                        exp2_fast((x - base) * scale2);
          sums[v].max = base;
          sums[v].magnitude += fabsf(x);
        }
      }
    }
  }
  // One channel of the pack at a time goes through shared memory: 3 KB, whatever the dtype.
#pragma unroll
  for (int v = 0; v < kSize; ++v) {
    __syncthreads();
    rows[threadIdx.x] = sums[v];
    __syncthreads();
    if (place.row == 0 && place.inside) {
      for (int r = 1; r < place.rows; ++r) sums[v].add(rows[(r << grid.lanes_log2) + place.lane], scale2);
      float* out = partial.at(place.n, place.chunk) + place.channel + v;
      out[0] = sums[v].max, out[partial.channels] = sums[v].sum, out[2 * partial.channels] = sums[v].magnitude;
    }
  }
}

// One block per sample: joins the chunks, then r_c = g_c / mean g and w_c = softmax_c(r_c / channel_temperature).
template <typename A>
__global__ void __launch_bounds__(kCafdThreads, 1) channel_weights(const __grid_constant__ Networks<A> nets) {
  release_next();
  wait_for_previous();
  DSCT_SHARED(shared);
  A* scratch = reinterpret_cast<A*>(shared);
  int64_t n;
  const Network<A>& net = network_of(nets, nets.each[0].f.samples, n);
  const Stats<A>& stats = net.stats;
  const PartialStats<A>& partial = net.partial;
  const A scale2 = nets.spatial2(), channel_scale2 = nets.channel2();
  const int64_t channels = stats.channels;
  A total[1] = {0};
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    RowSums<A> sums;
    for (int k = 0; k < partial.chunks; ++k) {
      const A* in = partial.at(n, k) + c;
      RowSums<A> chunk;
      chunk.max = in[0], chunk.sum = in[channels], chunk.magnitude = in[2 * channels];
      sums.add(chunk, scale2);
    }
    const A mean = sums.magnitude / static_cast<A>(stats.positions);
    stats.max(n)[c] = sums.max;
    stats.inverse(n)[c] = 1 / sums.sum;
    stats.relative(n)[c] = mean;
    total[0] += mean;
  }
  block_sum(total, scratch);
  const A mean = total[0] / static_cast<A>(channels);
  A largest = -infinity<A>();
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    const A r = mean == 0 ? A(1) : stats.relative(n)[c] / mean;
    stats.relative(n)[c] = r;
    largest = larger(largest, r);
  }
  __syncthreads();  // scratch is used again
  largest = warp_max(largest);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = largest;
  __syncthreads();
  for (int w = 0; w < kCafdWarps; ++w) largest = larger(largest, scratch[w]);
  __syncthreads();
  total[0] = 0;
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    const A w = exp2_fast((stats.relative(n)[c] - largest) * channel_scale2);
    stats.weight(n)[c] = w;
    total[0] += w;
  }
  block_sum(total, scratch);
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) stats.weight(n)[c] /= total[0];
  if (threadIdx.x == 0) stats.mean(n) = mean;
}

}  // namespace dsct::cuda
