// What the kernels know of a network: its features, how they are shared out, and where results go.
#pragma once

#include <limits>

#include "cafd/stats.h"
#include "features.cuh"

namespace dsct::cuda {

// Per sample, in this order: max_c, 1 / sum_c, r_c, w_c (channels each), A_i, B_i (positions each), mean_c g_c.
template <typename A>
struct Stats {
  A* base;
  int64_t channels, positions;
  DSCT_HOST_DEVICE int64_t size() const { return stats_row(channels, positions); }
  DSCT_DEVICE A* max(int64_t n) const { return base + n * size(); }
  DSCT_DEVICE A* inverse(int64_t n) const { return max(n) + channels; }
  DSCT_DEVICE A* relative(int64_t n) const { return max(n) + 2 * channels; }
  DSCT_DEVICE A* weight(int64_t n) const { return max(n) + 3 * channels; }
  DSCT_DEVICE A* map(int64_t n) const { return max(n) + 4 * channels; }
  DSCT_DEVICE A* relative_map(int64_t n) const { return map(n) + positions; }
  DSCT_DEVICE A& mean(int64_t n) const { return map(n)[2 * positions]; }
};

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
  A channel, spatial;    // 1 / temperature
  A channel2, spatial2;  // log2(e) / temperature
};
template <typename A>
DSCT_HOST_DEVICE Scales<A> scales_of(double channel, double spatial) {
  constexpr double kLog2E = 1.4426950408889634074;
  return {static_cast<A>(1 / channel), static_cast<A>(1 / spatial), static_cast<A>(kLog2E / channel),
          static_cast<A>(kLog2E / spatial)};
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
  A channel_scale2, scale2;    // log2(e) / temperature
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

}  // namespace dsct::cuda
