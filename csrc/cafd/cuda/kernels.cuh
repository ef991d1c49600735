// CAFD on the GPU. Features are read twice forward (row statistics, then the map) and once backward, where each
// channel's gradient needs only its own row and two numbers per sample.
//
//   row_stats / column_stats    per channel: max, sum of exponentials, sum of magnitudes
//   channel_weights             per sample: r_c and w_c
//   row_maps / column_maps      A and B over a share of the channels;  add_maps  joins the shares in order
//   compare_maps                per sample: KL, and D = d loss / d A
//   map_products                per sample: sum A D, sum B D, sum w r
//   row_backward                rho_c from a row held in registers, then its gradient: one read, one write
//   column_rho, column_backward the same for channels_last, where a channel's row is spread over the whole image
//
// row_*: a channel's positions lie side by side (NCHW), or anywhere at all (Anywhere). column_*: a position's channels
// lie side by side (channels_last, and tokens (N, L, C) viewed as images). This source also compiles for the host.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/cuda_math.h"

namespace dsct::cuda {

constexpr double kMapEps = 1e-6;
constexpr int kCafdThreads = 256, kCafdWarps = kCafdThreads / kWarp;

struct Features {
  const void* data;
  Dtype dtype;
  int64_t samples, channels, height, width;
  int64_t stride[4];  // elements: n, c, h, w
  DSCT_HOST_DEVICE int64_t positions() const { return height * width; }
};

// Per sample, in this order: max_c, 1 / sum_c, r_c, w_c (channels each), A_i, B_i (positions each), mean_c g_c.
template <typename A>
struct Stats {
  A* base;
  int64_t channels, positions;
  DSCT_HOST_DEVICE int64_t size() const { return 4 * channels + 2 * positions + 1; }
  DSCT_DEVICE A* max(int64_t n) const { return base + n * size(); }
  DSCT_DEVICE A* inverse(int64_t n) const { return max(n) + channels; }
  DSCT_DEVICE A* relative(int64_t n) const { return max(n) + 2 * channels; }
  DSCT_DEVICE A* weight(int64_t n) const { return max(n) + 3 * channels; }
  DSCT_DEVICE A* map(int64_t n) const { return max(n) + 4 * channels; }
  DSCT_DEVICE A* relative_map(int64_t n) const { return map(n) + positions; }
  DSCT_DEVICE A& mean(int64_t n) const { return map(n)[2 * positions]; }
};

inline Features make_features(const void* data, Dtype dtype, const int64_t* size, const int64_t* stride) {
  Features f{data, dtype, size[0], size[1], size[2], size[3], {stride[0], stride[1], stride[2], stride[3]}};
  if (f.width == 1) f.stride[3] = f.stride[2];  // the step from one position to the next
  return f;
}

// ---------------------------------------------------------------------------------------------------- reading a row
// 16 bytes of neighbouring positions at a time.
template <typename T>
struct SideBySide {
  using Acc = float;
  using Held = Pack<T>;
  static constexpr int kSize = Pack<T>::kSize, kBlocks = 4;  // kBlocks: a multiprocessor should hold at least
  DSCT_DEVICE static const void* row(const Features& f, int64_t n, int64_t c) {
    return static_cast<const T*>(f.data) + n * f.stride[0] + c * f.stride[1];
  }
  DSCT_DEVICE static Held load(const Features&, const void* row, int64_t index) {
    return load_pack_cached(static_cast<const T*>(row) + index * kSize);
  }
  DSCT_DEVICE static float value(const Held& held, int v) { return number(held, v); }
  DSCT_DEVICE static void store(const Features&, const void* row, int64_t index, const float (&g)[kSize]) {
    Held held;
#pragma unroll
    for (int v = 0; v < kSize; ++v) held.lane[v] = static_cast<T>(g[v]);
    store_pack(static_cast<T*>(const_cast<void*>(row)) + index * kSize, held);
  }
};

// One number at a time, any strides and any dtype.
template <typename A>
struct Anywhere {
  using Acc = A;
  struct Held {
    A value;
  };
  static constexpr int kSize = 1, kBlocks = 2;
  DSCT_DEVICE static const void* row(const Features& f, int64_t n, int64_t c) {
    return static_cast<const char*>(f.data) + (n * f.stride[0] + c * f.stride[1]) * size_of(f.dtype);
  }
  DSCT_DEVICE static int64_t offset(const Features& f, int64_t index) {
    const int64_t y = index / f.width;
    return y * f.stride[2] + (index - y * f.width) * f.stride[3];
  }
  DSCT_DEVICE static Held load(const Features& f, const void* row, int64_t index) {
    return {load_number<A>(row, f.dtype, offset(f, index))};
  }
  DSCT_DEVICE static A value(const Held& held, int) { return held.value; }
  DSCT_DEVICE static void store(const Features& f, const void* row, int64_t index, const A (&g)[1]) {
    store_number(const_cast<void*>(row), f.dtype, offset(f, index), g[0]);
  }
};

// --------------------------------------------------------------------------------------------- statistics of channels
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

// Partial statistics of one channel: [chunk][3][channels] a sample.
template <typename A>
struct PartialStats {
  A* base;
  int chunks;
  int64_t channels;
  DSCT_HOST_DEVICE A* at(int64_t n, int64_t chunk) const { return base + (n * chunks + chunk) * 3 * channels; }
};

// Shares of the maps: [share][2][positions] a sample, A then B.
template <typename A>
struct PartialMaps {
  A* base;
  int shares;
  int64_t positions;
  DSCT_DEVICE A* at(int64_t n, int64_t share) const { return base + (n * shares + share) * 2 * positions; }
};

struct RowMaps {
  int64_t position_tiles;
  int share_channels;
};

// Columns: a block is `lanes` threads along the channels (16 bytes each) times kCafdThreads / lanes positions.
struct Columns {
  int lanes_log2;
  int channel_tiles, chunks;  // blocks: samples x channel_tiles x chunks of positions
  int64_t chunk_positions;
};

// The temperatures: on the host, or (2,) on the device, channel then spatial, where only kernels may read them.
struct Temperatures {
  double channel, spatial;
  const double* values = nullptr;
};

// What kernels multiply by in place of dividing by the temperatures: divided in double, rounded once.
template <typename A>
struct Scales {
  A spatial, channel;    // 1 / temperature
  A spatial2, channel2;  // log2(e) / temperature
};
template <typename A>
DSCT_HOST_DEVICE Scales<A> scales_of(double channel, double spatial) {
  constexpr double kLog2E = 1.4426950408889634074;
  return {static_cast<A>(1 / spatial), static_cast<A>(1 / channel), static_cast<A>(kLog2E / spatial),
          static_cast<A>(kLog2E / channel)};
}

// A launch of one thread before all others. What the host refuses makes everything NaN here.
template <typename A>
__global__ void read_temperatures(const double* values, Scales<A>* scales) {
  auto usable = [](double x) { return x > 0 && x < infinity<double>() ? x : std::numeric_limits<double>::quiet_NaN(); };
  *scales = scales_of<A>(usable(values[0]), usable(values[1]));
}

// All that the forward kernels know of one network.
template <typename A>
struct Network {
  Features f;
  int row_warps;  // a row of a channel belongs to so many warps of a block
  RowMaps row_maps;
  Columns columns;
  PartialStats<A> partial;
  Stats<A> stats;
  PartialMaps<A> maps;
  A* map;  // or nullptr
  Scales<A>* scales;
  int64_t stats_blocks, map_blocks;
};

// Student and teacher go through the same launches where dtype and layout allow: blocks of the first, then the second.
template <typename A>
struct Networks {
  Network<A> each[2];
  A scale2, channel_scale2;    // log2(e) / temperature
  const Scales<A>* on_device;  // or here, if not nullptr
  unsigned* ticket;            // of compare_maps, which add_maps sets to 0; or nullptr
  DSCT_DEVICE A spatial2() const { return on_device == nullptr ? scale2 : on_device->spatial2; }
  DSCT_DEVICE A channel2() const { return on_device == nullptr ? channel_scale2 : on_device->channel2; }
};

template <typename A>
DSCT_DEVICE const Network<A>& network_of(const Networks<A>& networks, int64_t first_blocks, int64_t& block) {
  const bool second = blockIdx.x >= first_blocks;
  block = second ? blockIdx.x - first_blocks : blockIdx.x;
  return networks.each[second];
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

struct ColumnPlace {
  int64_t n, channel, first, last;  // this thread's first channel; the block's range of positions
  int chunk, lane, row, rows;
  bool inside;
};
template <int kSize>
DSCT_DEVICE ColumnPlace place_of(const Features& f, const Columns& grid, int64_t block) {
  ColumnPlace place;
  const unsigned number = static_cast<unsigned>(block);
  const unsigned tile = number % grid.channel_tiles, rest = number / grid.channel_tiles;
  place.chunk = rest % grid.chunks;
  place.n = rest / grid.chunks;
  place.lane = threadIdx.x & ((1 << grid.lanes_log2) - 1);
  place.row = threadIdx.x >> grid.lanes_log2;
  place.rows = kCafdThreads >> grid.lanes_log2;
  place.channel = ((static_cast<int64_t>(tile) << grid.lanes_log2) + place.lane) * kSize;
  place.first = place.chunk * grid.chunk_positions;
  const int64_t end = place.first + grid.chunk_positions;
  place.last = end < f.positions() ? end : f.positions();
  place.inside = place.channel < f.channels;
  return place;
}

template <typename T>
DSCT_DEVICE const T* column_at(const Features& f, const ColumnPlace& place, int64_t position) {
  return static_cast<const T*>(f.data) + place.n * f.stride[0] + position * f.stride[3] + place.channel;
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

// --------------------------------------------------------------------------------------------------------------- maps
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

// --------------------------------------------------------------------------------------------------------- the loss
struct Grid {
  int height, width;
};

// adaptive_avg_pool2d's bins: [start, end) of the input under output k.
DSCT_DEVICE int bin_start(int k, int in, int out) { return static_cast<int>(static_cast<int64_t>(k) * in / out); }
DSCT_DEVICE int bin_end(int k, int in, int out) {
  return static_cast<int>((static_cast<int64_t>(k + 1) * in + out - 1) / out);
}

template <typename A, typename M>
DSCT_DEVICE A pooled(const M* map, Grid from, Grid to, int y, int x) {
  const int y0 = bin_start(y, from.height, to.height), y1 = bin_end(y, from.height, to.height);
  const int x0 = bin_start(x, from.width, to.width), x1 = bin_end(x, from.width, to.width);
  A sum = 0;
  for (int i = y0; i < y1; ++i) {
    for (int j = x0; j < x1; ++j) sum += static_cast<A>(map[static_cast<int64_t>(i) * from.width + j]);
  }
  return sum / static_cast<A>((y1 - y0) * (x1 - x0));
}

// t log(t / s) + s - t, with gap = s - t. Both maps sum to 1, so what is added changes nothing in the sum over a map.
// But every term is now >= 0 and of second order where the maps are close, and so is what a rounding of s does to it.
// The plain sum takes terms of first order away from each other: near the teacher their rounding is all that is left.
template <typename A>
DSCT_DEVICE A divergence(A t, A s, A gap) {
  const A x = gap / t;
  if (::fabs(x) < A(0.5)) {  // x - log(1 + x), from log(1 + x) = 2 atanh(f)
    const A f = x / (2 + x), f2 = f * f;
    A tail = f2 * A(1.0 / 13) + A(1.0 / 11);
    tail = tail * f2 + A(1.0 / 9);
    tail = tail * f2 + A(1.0 / 7);
    tail = tail * f2 + A(1.0 / 5);
    tail = tail * f2 + A(1.0 / 3);
    return t * f * (x - 2 * f2 * tail);
  }
  return t * std::log(t / s) + gap;  // NaN comes here
}

template <typename A>
struct Comparison {
  Grid student, teacher, common;
  A* pooled;  // [samples][3][common positions]: the two maps, then d loss / d student map; unused on equal grids
  A* losses;  // (samples)
  A norm;     // 1 / samples for the mean, else 1
  int64_t samples;
  A* loss;           // () or nullptr for no reduction
  unsigned* ticket;  // 0 at the start: add_maps sees to it
};

// One block per sample. SA, TA: accumulation dtypes of the two networks' maps; A: the wider.
template <typename A, typename SA, typename TA>
__global__ void __launch_bounds__(1024, 1)
    compare_maps(Comparison<A> in, Stats<SA> student, Stats<TA> teacher, SA* grad_map) {
  wait_for_previous();
  DSCT_SHARED(shared);
  A* scratch = reinterpret_cast<A*>(shared);
  const int64_t n = blockIdx.x;
  const int positions = in.common.height * in.common.width;
  const bool same_s = in.student.height == in.common.height && in.student.width == in.common.width;
  const bool same_t = in.teacher.height == in.common.height && in.teacher.width == in.common.width;
  const SA* map_s = student.map(n);
  const TA* map_t = teacher.map(n);
  A* pool_s = in.pooled + n * 3 * positions;
  A* pool_t = pool_s + positions;
  A* pool_g = pool_t + positions;
  A sums[2] = {0, 0};
  if (!same_s || !same_t) {
    for (int k = threadIdx.x; k < positions; k += blockDim.x) {
      const int y = k / in.common.width, x = k - y * in.common.width;
      if (!same_s) sums[0] += pool_s[k] = pooled<A>(map_s, in.student, in.common, y, x);
      if (!same_t) sums[1] += pool_t[k] = pooled<A>(map_t, in.teacher, in.common, y, x);
    }
    block_sum(sums, scratch);
    __syncthreads();
  }
  const A scale_s = same_s ? A(1) : 1 / sums[0], scale_t = same_t ? A(1) : 1 / sums[1];
  const A floor = static_cast<A>(kMapEps / positions), keep = static_cast<A>(1 - kMapEps);
  sums[0] = sums[1] = 0;  // KL, and sum of gradient times map for the rescaling
#pragma unroll 4
  for (int k = threadIdx.x; k < positions; k += blockDim.x) {
    const A raw = (same_s ? static_cast<A>(map_s[k]) : pool_s[k]) * scale_s;
    const A raw_t = (same_t ? static_cast<A>(map_t[k]) : pool_t[k]) * scale_t;
    const A s = keep * raw + floor, t = keep * raw_t + floor, gap = keep * (raw - raw_t);
    sums[0] += divergence(t, s, gap);
    const A g = -keep * t / s * in.norm;
    sums[1] += g * raw;
    if (grad_map != nullptr) {
      if (same_s) {
        grad_map[n * positions + k] = static_cast<SA>(g);
      } else {
        pool_g[k] = g;
      }
    }
  }
  block_sum(sums, scratch);
  __syncthreads();
  if (grad_map != nullptr && !same_s) {
    // Every position gathers from the bins that contain it.
    const int64_t own = static_cast<int64_t>(in.student.height) * in.student.width;
    for (int64_t i = threadIdx.x; i < own; i += blockDim.x) {
      const int y = static_cast<int>(i / in.student.width),
                x = static_cast<int>(i - static_cast<int64_t>(y) * in.student.width);
      A g = 0;
      for (int ky = bin_start(y, in.common.height, in.student.height); ky < in.common.height; ++ky) {
        const int y0 = bin_start(ky, in.student.height, in.common.height);
        const int y1 = bin_end(ky, in.student.height, in.common.height);
        if (y0 > y) break;
        for (int kx = bin_start(x, in.common.width, in.student.width); kx < in.common.width; ++kx) {
          const int x0 = bin_start(kx, in.student.width, in.common.width);
          const int x1 = bin_end(kx, in.student.width, in.common.width);
          if (x0 > x) break;
          g += (pool_g[ky * in.common.width + kx] - sums[1]) * scale_s / static_cast<A>((y1 - y0) * (x1 - x0));
        }
      }
      grad_map[n * own + i] = static_cast<SA>(g);
    }
  }
  // The last sample to finish adds all of them up in order.
  if (threadIdx.x == 0) {
    in.losses[n] = sums[0];
    if (in.loss != nullptr) {
      __threadfence();
      if (atomicAdd(in.ticket, 1u) == gridDim.x - 1) {
        __threadfence();
        A total = 0;
        for (int64_t i = 0; i < in.samples; ++i) total += static_cast<const volatile A*>(in.losses)[i];
        *in.loss = total * in.norm;
      }
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- backward
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
    row_backward(Features f, Features out, int row_warps, typename Row::Acc scale, typename Row::Acc channel_scale,
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
    column_backward(Features f, Features out, Columns grid, float scale, float channel_scale,
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

// ------------------------------------------------------------------------------------------------------------- plans
enum class Layout { kRows, kColumns, kAny };

inline const char* layout_name(Layout layout) {
  return layout == Layout::kRows ? "rows" : layout == Layout::kColumns ? "columns" : "any";
}

struct CafdPlan {
  Layout layout;
  int row_warps = 1;  // statistics and backward of rows
  int held = 0;       // packs a thread holds in row_backward
  int64_t row_blocks = 0;
  RowMaps maps{};
  Columns columns{};
  int shares = 1, chunks = 1;
  int64_t column_blocks = 0, map_blocks = 0;
};

inline bool on_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

inline CafdPlan cafd_plan(const Features& f, const Features* out, const Device& device) {
  CafdPlan plan;
  const int vector = 16 / size_of(f.dtype);
  const int64_t positions = f.positions();
  auto rows_fit = [&](const Features& x) {
    return on_16_bytes(x.data) && (x.width == 1 || x.stride[3] == 1) && (x.height == 1 || x.stride[2] == x.width) &&
           x.stride[0] % vector == 0 && x.stride[1] % vector == 0;
  };
  auto columns_fit = [&](const Features& x) {
    const int64_t step = x.width == 1 ? x.stride[2] : x.stride[3];
    return on_16_bytes(x.data) && x.stride[1] == 1 &&
           (x.width == 1 || x.height == 1 || x.stride[2] == x.width * step) && x.stride[0] % vector == 0 &&
           step % vector == 0;
  };
  const bool narrow = f.dtype != Dtype::kFloat64;
  if (narrow && positions % vector == 0 && rows_fit(f) && (out == nullptr || rows_fit(*out))) {
    plan.layout = Layout::kRows;
  } else if (narrow && f.channels % vector == 0 && columns_fit(f) && (out == nullptr || columns_fit(*out))) {
    plan.layout = Layout::kColumns;
  } else {
    plan.layout = Layout::kAny;
  }
  const int64_t wanted_blocks = device.multiprocessors * 8;
  if (plan.layout == Layout::kColumns) {
    const int64_t packs = f.channels / vector;
    while (plan.columns.lanes_log2 < 5 && (int64_t(1) << plan.columns.lanes_log2) < packs) ++plan.columns.lanes_log2;
    plan.columns.channel_tiles = static_cast<int>(ceil_div(packs, int64_t(1) << plan.columns.lanes_log2));
    const int64_t rows = kCafdThreads >> plan.columns.lanes_log2;
    const int64_t tiles = f.samples * plan.columns.channel_tiles;
    // Enough chunks to fill the chip, but every thread keeps a few positions.
    int64_t chunks = std::min(ceil_div(wanted_blocks, std::max<int64_t>(tiles, 1)), ceil_div(positions, rows * 4));
    chunks = std::clamp<int64_t>(chunks, 1, 64);
    plan.columns.chunk_positions = ceil_div(positions, chunks);
    plan.columns.chunks = static_cast<int>(ceil_div(positions, plan.columns.chunk_positions));
    plan.column_blocks = tiles * plan.columns.chunks;
    plan.shares = plan.columns.channel_tiles;
    plan.chunks = plan.columns.chunks;
    return plan;
  }
  const int size = plan.layout == Layout::kRows ? vector : 1;
  const int64_t packs = positions / size;
  while (plan.row_warps < kCafdWarps && packs > plan.row_warps * kWarp * 4) plan.row_warps *= 2;
  plan.row_blocks = ceil_div(f.samples * f.channels, kCafdWarps / plan.row_warps);
  const int64_t per_thread = ceil_div(packs, plan.row_warps * kWarp);
  plan.held = plan.layout == Layout::kAny || per_thread > 16 ? 0 : per_thread <= 4 ? 4 : per_thread <= 8 ? 8 : 16;
  plan.maps.position_tiles = ceil_div(packs, kCafdThreads);
  const int64_t tiles = std::max<int64_t>(f.samples * plan.maps.position_tiles, 1);
  const int64_t shares = std::clamp<int64_t>(ceil_div(wanted_blocks / 2, tiles), 1, ceil_div(f.channels, 16));
  plan.maps.share_channels = static_cast<int>(ceil_div(f.channels, shares));
  plan.shares = static_cast<int>(ceil_div(f.channels, plan.maps.share_channels));
  plan.map_blocks = tiles * plan.shares;
  return plan;
}

// One block per sample: whole warps, no more than there are positions.
inline int sample_threads(int64_t positions) {
  return static_cast<int>(std::min<int64_t>(ceil_div(positions, kWarp) * kWarp, 1024));
}

// Elements (of the accumulation dtype) that the forward of one network needs beside its statistics: shares of the maps,
// partial statistics, scales.
inline int64_t map_workspace(const Features& f, const CafdPlan& plan) {
  return f.samples * (3 * f.channels * plan.chunks + 2 * f.positions() * plan.shares) + 4;
}

template <typename A>
Network<A> network(const Features& f, const CafdPlan& plan, A* stats, A* map, A* workspace) {
  Network<A> net{};
  net.f = f;
  net.row_warps = plan.row_warps, net.row_maps = plan.maps, net.columns = plan.columns;
  net.stats = {stats, f.channels, f.positions()};
  net.maps = {workspace, plan.shares, f.positions()};  // first: its rows are written 16 bytes at a time
  net.partial = {workspace + f.samples * 2 * f.positions() * plan.shares, plan.chunks, f.channels};
  net.scales = reinterpret_cast<Scales<A>*>(net.partial.at(f.samples, 0));
  net.map = map;
  net.stats_blocks = plan.layout == Layout::kColumns ? plan.column_blocks : plan.row_blocks;
  net.map_blocks = plan.layout == Layout::kColumns ? plan.column_blocks : plan.map_blocks;
  return net;
}

// Statistics and maps of `count` networks, 1 or 2, that share dtype and layout: four launches, and one more where the
// temperatures are on the device.
template <typename A>
void maps_run(const Network<A>* each, int count, Layout layout, const Temperatures& temperatures, unsigned* ticket,
              const Device& device, cudaStream_t stream) {
  Networks<A> nets{};
  nets.ticket = ticket;
  const Scales<A> scales = scales_of<A>(temperatures.channel, temperatures.spatial);
  nets.scale2 = scales.spatial2, nets.channel_scale2 = scales.channel2;
  int64_t stats_blocks = 0, map_blocks = 0, samples = 0, add = 0;
  for (int i = 0; i < count; ++i) {
    nets.each[i] = each[i];
    stats_blocks += each[i].stats_blocks, map_blocks += each[i].map_blocks;
    samples += each[i].f.samples, add += add_blocks(each[i]);
  }
  if (samples == 0) return;
  if (temperatures.values != nullptr) {
    launch("cafd", read_temperatures<A>, 1, 1, 0, stream, temperatures.values, each[0].scales);
    nets.on_device = each[0].scales;
  }
  auto go = [&](auto stats_kernel, auto maps_kernel, size_t shared) {
    launch("cafd", stats_kernel, stats_blocks, kCafdThreads, shared, stream, nets);
    launch_early("cafd", device, channel_weights<A>, samples, kCafdThreads, kWarp * sizeof(A), stream, nets);
    launch_early("cafd", device, maps_kernel, map_blocks, kCafdThreads, 0, stream, nets);
    launch_early("cafd", device, add_maps<A>, add, kCafdThreads, 0, stream, nets);
  };
  const size_t row_shared = kCafdWarps * sizeof(RowSums<A>);
  if (layout == Layout::kAny) return go(row_stats<Anywhere<A>>, row_maps<Anywhere<A>>, row_shared);
  if constexpr (std::is_same_v<A, float>) {
    auto by_dtype = [&](auto type) {
      using T = decltype(type);
      if (layout == Layout::kRows) return go(row_stats<SideBySide<T>>, row_maps<SideBySide<T>>, row_shared);
      go(column_stats<T>, column_maps<T>, kCafdThreads * sizeof(RowSums<float>));
    };
    switch (each[0].f.dtype) {
      case Dtype::kFloat32:
        return by_dtype(float());
      case Dtype::kFloat16:
        return by_dtype(Half());
      default:
        return by_dtype(BFloat16());
    }
  }
}

template <typename A>
__global__ void no_samples(A* loss) {
  *loss = 0;
}

// The whole forward: both networks' maps, in the same launches where they share dtype and layout, then the loss.
template <typename A, typename SA, typename TA>
void cafd_run(const Comparison<A>& comparison, const Network<SA>& student, const CafdPlan& student_plan,
              const Network<TA>& teacher, const CafdPlan& teacher_plan, const Temperatures& temperatures, SA* grad_map,
              const Device& device, cudaStream_t stream) {
  if (comparison.samples == 0) {
    if (comparison.loss != nullptr) launch("cafd", no_samples<A>, 1, 1, 0, stream, comparison.loss);
    return;
  }
  bool together = student_plan.layout == teacher_plan.layout &&
                  (student_plan.layout == Layout::kAny || student.f.dtype == teacher.f.dtype);
  if constexpr (std::is_same_v<SA, TA>) {
    if (together) {
      const Network<SA> both[2] = {student, teacher};
      maps_run(both, 2, student_plan.layout, temperatures, comparison.ticket, device, stream);
    }
  } else {
    together = false;
  }
  if (!together) {
    maps_run(&student, 1, student_plan.layout, temperatures, comparison.ticket, device, stream);
    maps_run(&teacher, 1, teacher_plan.layout, temperatures, comparison.ticket, device, stream);
  }
  launch_early("cafd", device, compare_maps<A, SA, TA>, comparison.samples, sample_threads(student.f.positions()),
               2 * kWarp * sizeof(A), stream, comparison, student.stats, teacher.stats, grad_map);
}

inline int64_t backward_workspace(const Features& f, const CafdPlan& plan) {
  return 4 + 3 * f.samples + (plan.layout == Layout::kColumns ? f.samples * plan.chunks * f.channels : 0);
}

template <typename A>
void backward_run(const Features& f, const Features& out, const CafdPlan& plan, const Temperatures& temperatures,
                  A* stats_base, const A* grad_map, A* workspace, const Device& device, cudaStream_t stream) {
  if (f.samples == 0) return;
  const Scales<A> scales = scales_of<A>(temperatures.channel, temperatures.spatial);
  const A scale = scales.spatial, channel_scale = scales.channel;
  Scales<A>* on_device = nullptr;
  if (temperatures.values != nullptr) {
    on_device = reinterpret_cast<Scales<A>*>(workspace);
    launch("cafd backward", read_temperatures<A>, 1, 1, 0, stream, temperatures.values, on_device);
  }
  const Stats<A> stats = {stats_base, f.channels, f.positions()};
  A* products = workspace + 4;
  launch("cafd backward", map_products<A>, f.samples, sample_threads(f.positions()), 3 * kWarp * sizeof(A), stream,
         stats, grad_map, products);
  auto rows = [&](auto kernel) {
    launch_early("cafd backward", device, kernel, plan.row_blocks, kCafdThreads, kCafdWarps * sizeof(A), stream, f, out,
                 plan.row_warps, scale, channel_scale, on_device, stats, grad_map, products);
  };
  if (plan.layout == Layout::kAny) return rows(row_backward<Anywhere<A>, 0>);
  if constexpr (std::is_same_v<A, float>) {
    auto by_dtype = [&](auto type) {
      using T = decltype(type);
      if (plan.layout == Layout::kRows) {
        switch (plan.held) {
          case 4:
            return rows(row_backward<SideBySide<T>, 4>);
          case 8:
            return rows(row_backward<SideBySide<T>, 8>);
          case 16:
            return rows(row_backward<SideBySide<T>, 16>);
          default:
            return rows(row_backward<SideBySide<T>, 0>);
        }
      }
      float* partial = products + 3 * f.samples;
      launch_early("cafd backward", device, column_rho<T>, plan.column_blocks, kCafdThreads,
                   kCafdThreads * sizeof(float), stream, f, plan.columns, scale, on_device, stats, grad_map, partial);
      launch_early("cafd backward", device, column_backward<T>, plan.column_blocks, kCafdThreads, 0, stream, f, out,
                   plan.columns, scale, channel_scale, on_device, stats, grad_map, products, partial);
    };
    switch (f.dtype) {
      case Dtype::kFloat32:
        return by_dtype(float());
      case Dtype::kFloat16:
        return by_dtype(Half());
      default:
        return by_dtype(BFloat16());
    }
  }
}

}  // namespace dsct::cuda
