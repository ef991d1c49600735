// map_products, row_backward, column_rho, column_backward.
#pragma once

#include "network.cuh"

namespace dsct::cuda {

// Per sample: sum_i A_i D_i = sum_c w_c rho_c, sum_i B_i D_i = sum_c w_c r_c rho_c, sum_c w_c r_c.
template <typename A>
__global__ void __launch_bounds__(1024, 1) map_products(Stats<A> stats, const A* grad_map, A* products) {
  release_next();
  DSCT_SHARED(shared);
  const int64_t n = blockIdx.x;
  A sums[3] = {0, 0, 0};
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < stats.positions; i += blockDim.x) {
    const A d = grad_map[n * stats.positions + i];
    sums[0] += stats.map(n)[i] * d;
    sums[1] += stats.relative_map(n)[i] * d;
  }
  for (int64_t c = threadIdx.x; c < stats.channels; c += blockDim.x)
    sums[2] += stats.weight(n)[c] * stats.relative(n)[c];
  block_sum(sums, reinterpret_cast<A*>(shared));
  if (threadIdx.x < 3)
    products[n * 3 + threadIdx.x] = threadIdx.x == 0 ? sums[0] : threadIdx.x == 1 ? sums[1] : sums[2];
}

// dF = spread P (D - rho) + lift sign(F)
template <typename A>
struct ChannelGrad {
  A max, spread, rho, lift;
};

template <typename A>
DSCT_DEVICE ChannelGrad<A> channel_grad(const Stats<A>& stats, const A* products, int64_t n, int64_t c, A rho,
                                        A channel_scale, A scale) {
  const A weight = stats.weight(n)[c], mean = stats.mean(n), *sums = products + n * 3;
  const A channels = static_cast<A>(stats.channels);
  ChannelGrad<A> grad;
  grad.max = stats.max(n)[c];
  grad.spread = weight * scale * stats.inverse(n)[c];
  grad.rho = rho;
  // s_c = weight channel_scale (rho - sums[0]), and the mean over channels of s_k r_k.
  const A s = weight * channel_scale * (rho - sums[0]);
  const A mean_sr = channel_scale * (sums[1] - sums[0] * sums[2]) / channels;
  grad.lift = mean == 0 ? A(0) : (s - mean_sr) / (mean * static_cast<A>(stats.positions));
  return grad;
}

template <typename A>
DSCT_DEVICE A feature_grad(const ChannelGrad<A>& c, A x, A d, A scale2) {
  const A sign = x > 0 ? c.lift : x < 0 ? -c.lift : x == 0 ? A(0) : x;
  return c.spread * exp2_fast((x - c.max) * scale2) * (d - c.rho) + sign;
}

// kHeld packs a thread hold the row between the two passes; 0: any length, read again from cache.
// Blocks that a multiprocessor should hold at once; the packs in registers set the limit.
constexpr int row_blocks(int held) { return held > 8 ? 1 : held > 4 ? 2 : 3; }

template <typename Row, int kHeld>
__global__ void __launch_bounds__(kCafdThreads, row_blocks(kHeld))
    row_backward(Features f, Features out, int row_warps, typename Row::Acc channel_scale, typename Row::Acc scale,
                 const Scales<typename Row::Acc>* on_device, Stats<typename Row::Acc> stats,
                 const typename Row::Acc* grad_map, const typename Row::Acc* products) {
  using A = typename Row::Acc;
  if (on_device != nullptr) scale = on_device->spatial, channel_scale = on_device->channel;
  DSCT_SHARED(shared);
  A* warps = reinterpret_cast<A*>(shared);
  const int warp = threadIdx.x / kWarp, rows = kCafdWarps / row_warps, row_threads = row_warps * kWarp;
  const int64_t row_index = static_cast<int64_t>(blockIdx.x) * rows + warp / row_warps;
  const bool inside = row_index < f.samples * f.channels;
  const int64_t n = row_index / f.channels, c = row_index - n * f.channels;
  const int64_t count = inside ? f.positions() / Row::kSize : 0, start = threadIdx.x % row_threads;
  const A scale2 = scale * A(1.4426950408889634074);
  const void* row = Row::row(f, n, c);
  const A* d = grad_map + n * f.positions();
  const A max = inside ? stats.max(n)[c] : A(0);
  typename Row::Held held[kHeld > 0 ? kHeld : 1];
  A rho = 0;
  auto add = [&](const typename Row::Held& pack, int64_t i) {
    A di[Row::kSize];
    load_run(d + i * Row::kSize, di);
#pragma unroll
    for (int v = 0; v < Row::kSize; ++v) rho += exp2_fast((Row::value(pack, v) - max) * scale2) * di[v];
  };
  if constexpr (kHeld > 0) {
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (start + k * row_threads < count) held[k] = Row::load(f, row, start + k * row_threads);
    }
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (start + k * row_threads < count) add(held[k], start + k * row_threads);
    }
  } else {
    for (int64_t i = start; i < count; i += row_threads) add(Row::load(f, row, i), i);
  }
  wait_for_previous();  // only the products come from the launch before
  rho = warp_sum(rho);
  if (threadIdx.x % kWarp == 0) warps[warp] = rho;
  __syncthreads();
  if (!inside) return;
  rho = 0;
  for (int w = 0; w < row_warps; ++w) rho += warps[warp / row_warps * row_warps + w];
  const ChannelGrad<A> grad = channel_grad(stats, products, n, c, rho * stats.inverse(n)[c], channel_scale, scale);
  const void* out_row = Row::row(out, n, c);
  auto put = [&](const typename Row::Held& pack, int64_t i) {
    A g[Row::kSize];
    load_run(d + i * Row::kSize, g);
#pragma unroll
    for (int v = 0; v < Row::kSize; ++v) g[v] = feature_grad(grad, Row::value(pack, v), g[v], scale2);
    Row::store(out, out_row, i, g);
  };
  if constexpr (kHeld > 0) {
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (start + k * row_threads < count) put(held[k], start + k * row_threads);
    }
  } else {
    for (int64_t i = start; i < count; i += row_threads) put(Row::load(f, row, i), i);
  }
}

// sum_i exp_ci D_i over a chunk of positions: partial[n][chunk][channels].
template <typename T>
__global__ void __launch_bounds__(kCafdThreads, 1)
    column_rho(Features f, Columns grid, float scale, const Scales<float>* on_device, Stats<float> stats,
               const float* grad_map, float* partial) {
  release_next();
  wait_for_previous();
  if (on_device != nullptr) scale = on_device->spatial;
  const float scale2 = scale * 1.4426950408889634f;
  constexpr int kSize = Pack<T>::kSize, kBatch = 4;
  DSCT_SHARED(shared);
  float* rows = reinterpret_cast<float*>(shared);
  const ColumnPlace place = place_of<kSize>(f, grid, blockIdx.x);
  const float* d = grad_map + place.n * f.positions();
  float max[kSize], rho[kSize] = {};
#pragma unroll
  for (int v = 0; v < kSize; ++v) max[v] = place.inside ? stats.max(place.n)[place.channel + v] : 0.0f;
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
        const int64_t i = first + b * place.rows;
        if (i >= place.last) break;
        const float di = d[i];
#pragma unroll
        for (int v = 0; v < kSize; ++v) {
          rho[v] += exp2_fast((number(pack[b], v) - max[v]) * scale2) * di;
        }
      }
    }
  }
#pragma unroll
  for (int v = 0; v < kSize; ++v) {
    __syncthreads();
    rows[threadIdx.x] = rho[v];
    __syncthreads();
    if (place.row == 0 && place.inside) {
      for (int r = 1; r < place.rows; ++r) rho[v] += rows[(r << grid.lanes_log2) + place.lane];
      partial[(place.n * grid.chunks + place.chunk) * f.channels + place.channel + v] = rho[v];
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kCafdThreads, 1)
    column_backward(Features f, Features out, Columns grid, float channel_scale, float scale,
                    const Scales<float>* on_device, Stats<float> stats, const float* grad_map, const float* products,
                    const float* partial) {
  wait_for_previous();
  if (on_device != nullptr) scale = on_device->spatial, channel_scale = on_device->channel;
  constexpr int kSize = Pack<T>::kSize, kBatch = 4;
  const ColumnPlace place = place_of<kSize>(f, grid, blockIdx.x);
  if (!place.inside) return;
  const float scale2 = scale * 1.4426950408889634f;
  const float* d = grad_map + place.n * f.positions();
  ChannelGrad<float> grad[kSize];
#pragma unroll
  for (int v = 0; v < kSize; ++v) {
    const int64_t c = place.channel + v;
    float rho = 0;
    for (int k = 0; k < grid.chunks; ++k) rho += partial[(place.n * grid.chunks + k) * f.channels + c];
    grad[v] = channel_grad(stats, products, place.n, c, rho * stats.inverse(place.n)[c], channel_scale, scale);
  }
  for (int64_t first = place.first + place.row; first < place.last; first += kBatch * place.rows) {
    Pack<T> pack[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int64_t i = first + b * place.rows;
      if (i < place.last) pack[b] = load_pack_cached(column_at<T>(f, place, i));
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int64_t i = first + b * place.rows;
      if (i >= place.last) break;
      const float di = d[i];
#pragma unroll
      for (int v = 0; v < kSize; ++v) {
        pack[b].lane[v] = static_cast<T>(feature_grad(grad[v], number(pack[b], v), di, scale2));
      }
      store_pack(const_cast<T*>(column_at<T>(out, place, i)), pack[b]);
    }
  }
}

}  // namespace dsct::cuda
