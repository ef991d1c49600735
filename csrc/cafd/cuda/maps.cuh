// row_maps / column_maps, add_maps.
#pragma once

#include "network.cuh"

namespace dsct::cuda {

template <typename Row>
__global__ void __launch_bounds__(kCafdThreads, Row::kBlocks)
    row_maps(const __grid_constant__ Networks<typename Row::Acc> nets) {
  release_next();
  wait_for_previous();
  using A = typename Row::Acc;
  constexpr int kBatch = 4;
  int64_t block;
  const Network<A>& net = network_of(nets, nets.each[0].map_blocks, block);
  const Features& f = net.f;
  const RowMaps& grid = net.row_maps;
  const Stats<A>& stats = net.stats;
  const PartialMaps<A>& partial = net.maps;
  const A scale2 = nets.spatial2();
  const int64_t tile = block % grid.position_tiles, rest = block / grid.position_tiles;
  const int64_t share = rest % partial.shares, n = rest / partial.shares;
  const int64_t index = tile * blockDim.x + threadIdx.x;
  if (index >= f.positions() / Row::kSize) return;
  const int64_t first = share * grid.share_channels;
  const int64_t last = first + grid.share_channels < f.channels ? first + grid.share_channels : f.channels;
  A a[Row::kSize] = {}, b[Row::kSize] = {};
  for (int64_t c = first; c < last; c += kBatch) {
    typename Row::Held held[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (c + k < last) held[k] = Row::load(f, Row::row(f, n, c + k), index);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (c + k >= last) break;
      const A max = stats.max(n)[c + k], relative = stats.relative(n)[c + k];
      const A weight = stats.weight(n)[c + k] * stats.inverse(n)[c + k];
#pragma unroll
      for (int v = 0; v < Row::kSize; ++v) {
        const A p = weight * exp2_fast((Row::value(held[k], v) - max) * scale2);
        a[v] += p;
        b[v] += relative * p;
      }
    }
  }
  A* out = partial.at(n, share) + index * Row::kSize;
  store_run(out, a);
  store_run(out + partial.positions, b);
}

// A thread keeps its channels' constants and walks over positions; the lanes of a position add up through shuffles.
// Its channel tile is the share. lanes is at most a warp.
template <typename T>
__global__ void __launch_bounds__(kCafdThreads, 2) column_maps(const __grid_constant__ Networks<float> nets) {
  release_next();
  wait_for_previous();
  constexpr int kSize = Pack<T>::kSize, kBatch = 4;
  int64_t block;
  const Network<float>& net = network_of(nets, nets.each[0].map_blocks, block);
  const Features& f = net.f;
  const Columns& grid = net.columns;
  const Stats<float>& stats = net.stats;
  const PartialMaps<float>& partial = net.maps;
  const float scale2 = nets.spatial2();
  const ColumnPlace place = place_of<kSize>(f, grid, block);
  const int64_t tile = place.channel / kSize >> grid.lanes_log2;
  float max[kSize], weight[kSize], relative[kSize];
#pragma unroll
  for (int v = 0; v < kSize; ++v) {
    const int64_t c = place.channel + v;
    max[v] = place.inside ? stats.max(place.n)[c] : 0.0f;
    weight[v] = place.inside ? stats.weight(place.n)[c] * stats.inverse(place.n)[c] : 0.0f;
    relative[v] = place.inside ? stats.relative(place.n)[c] : 0.0f;
  }
  float* out = partial.at(place.n, tile);
  // All lanes of a warp make the same number of rounds: shuffles need them all.
  for (int64_t start = place.first; start < place.last; start += kBatch * place.rows) {
    Pack<T> pack[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int64_t i = start + place.row + k * place.rows;
      const bool here = place.inside && i < place.last;
      pack[k] = here ? load_pack_cached(column_at<T>(f, place, i)) : fill_pack<T>(0.0f);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int64_t i = start + place.row + k * place.rows;
      float a = 0, b = 0;
#pragma unroll
      for (int v = 0; v < kSize; ++v) {
        const float p = weight[v] * exp2_fast((number(pack[k], v) - max[v]) * scale2);
        a += p;
        b += relative[v] * p;
      }
      if (!place.inside) a = b = 0;
      for (int offset = 1; offset < 1 << grid.lanes_log2; offset *= 2) {
        a += __shfl_xor_sync(kFullMask, a, offset);
        b += __shfl_xor_sync(kFullMask, b, offset);
      }
      if (place.lane == 0 && i < place.last) out[i] = a, out[partial.positions + i] = b;
    }
  }
}

// A and B from their shares, into the statistics and, where asked, into a map of its own.
template <typename A>
DSCT_HOST_DEVICE int64_t add_blocks(const Network<A>& net) {
  return (net.f.samples * net.f.positions() + kCafdThreads - 1) / kCafdThreads;
}

template <typename A>
__global__ void __launch_bounds__(kCafdThreads, 1) add_maps(const __grid_constant__ Networks<A> nets) {
  release_next();
  wait_for_previous();
  int64_t block;
  const Network<A>& net = network_of(nets, add_blocks(nets.each[0]), block);
  const PartialMaps<A>& partial = net.maps;
  const Stats<A>& stats = net.stats;
  if (nets.ticket != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *nets.ticket = 0;
  const int64_t index = block * blockDim.x + threadIdx.x;
  const int64_t n = index / partial.positions, i = index - n * partial.positions;
  if (n >= net.f.samples) return;
  A a = 0, b = 0;
#pragma unroll 8
  for (int k = 0; k < partial.shares; ++k) {
    a += partial.at(n, k)[i];
    b += partial.at(n, k)[partial.positions + i];
  }
  stats.map(n)[i] = a;
  stats.relative_map(n)[i] = b;
  if (net.map != nullptr) net.map[index] = a;
}

}  // namespace dsct::cuda
