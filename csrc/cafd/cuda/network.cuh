// What the kernels know of a network: its features, the plan by which they are shared out, and where results go.
#pragma once

#include <algorithm>
#include <limits>
#include <numbers>

#include "cafd/stats.h"
#include "features.cuh"

namespace dsct::cuda {

// ------------------------------------------------------------------------------------------------------------ the plan

// Rows: a channel's positions lie side by side (NCHW), or anywhere at all, and a thread has one channel. Columns: a
// position's channels do (channels_last, and tokens (N, L, C) viewed as images), and a thread has eight of them.
// A block is `lanes` threads along the channels times `rows` along the positions.
struct CafdPlan {
  bool columns = false;
  int lanes = 1, rows = kCafdThreads;
  int channel_tiles = 1, chunks = 1;  // blocks of a sample: along its channels, and along its positions
  int64_t chunk_positions = 0;
  // Rows: the first positions are `runs` of eight, read 16 bytes at a time, of which a thread of the backward keeps
  // `held` in shared memory. Maps: a thread has a run, or a position that is left, and a share of the channels.
  int64_t runs = 0, position_tiles = 0;
  int held = 0, share_channels = 0, shares = 1;
  int64_t blocks = 0, map_blocks = 0;
  const char* name() const { return columns ? "columns" : runs > 0 ? "rows" : "any"; }
};

inline CafdPlan cafd_plan(const Features& f, const Features* out, const Device& device) {
  CafdPlan plan;
  const int64_t positions = f.positions(), wanted_blocks = device.multiprocessors * 8;
  // D and the shares of the maps are read and written 16 bytes at a time, too.
  if (positions % 4 == 0 && rows_fit(f) && (out == nullptr || rows_fit(*out))) {
    plan.runs = positions / kRun;
  } else {
    plan.columns = f.channels % (16 / size_of(f.type)) == 0 && columns_fit(f) && (out == nullptr || columns_fit(*out));
  }
  const int64_t per_lane = plan.columns ? kRun : 1, items = plan.runs + positions - plan.runs * kRun;
  plan.lanes = plan.columns ? kWarp : kCafdWarps;  // fewer where there are fewer channels, or long rows
  while (plan.lanes > 1 &&
         (plan.columns ? (plan.lanes / 2) * per_lane >= f.channels : items > kCafdThreads / plan.lanes * 4)) {
    plan.lanes /= 2;
  }
  plan.rows = kCafdThreads / plan.lanes;
  plan.channel_tiles = static_cast<int>(ceil_div(f.channels, plan.lanes * per_lane));
  const int64_t tiles = std::max<int64_t>(f.samples * plan.channel_tiles, 1);
  int64_t chunks = 1;  // enough to fill the chip, but every thread keeps a few positions
  if (plan.columns) chunks = std::min(ceil_div(wanted_blocks, tiles), ceil_div(positions, plan.rows * 4));
  plan.chunk_positions = ceil_div(positions, std::clamp<int64_t>(chunks, 1, 64));
  plan.chunks = static_cast<int>(ceil_div(positions, plan.chunk_positions));
  plan.blocks = plan.map_blocks = f.samples * plan.channel_tiles * plan.chunks;
  plan.shares = plan.channel_tiles;
  if (plan.columns) return plan;
  // Rows stay in shared memory as long as a multiprocessor has room for two blocks or more.
  const int64_t room = device.shared_bytes / 2 / (kCafdThreads * kRun * size_of(f.type));
  plan.held = static_cast<int>(std::min(ceil_div(plan.runs, plan.rows), room));
  plan.position_tiles = ceil_div(items, kCafdThreads);
  const int64_t shares = std::clamp<int64_t>(
      ceil_div(wanted_blocks / 2, std::max<int64_t>(f.samples * plan.position_tiles, 1)), 1, ceil_div(f.channels, 16));
  plan.share_channels = static_cast<int>(ceil_div(f.channels, shares));
  plan.shares = static_cast<int>(ceil_div(f.channels, plan.share_channels));
  plan.map_blocks = f.samples * plan.position_tiles * plan.shares;
  return plan;
}

// One block per sample: whole warps, no more threads than there are positions, or channels.
inline int sample_threads(int64_t count, int64_t most = 1024) {
  return static_cast<int>(std::min(ceil_div(count, kWarp) * kWarp, most));
}

// ------------------------------------------------------------------------------------------------------------- results

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

// The temperatures: on the host, or (2,) on the device, channel then spatial, where only kernels may read them.
struct Temperatures {
  double channel, spatial;
  const double* values = nullptr;
};

// What kernels multiply by in place of dividing by the temperatures: divided in double, rounded once.
struct Scales {
  float channel, spatial;    // 1 / temperature
  float channel2, spatial2;  // log2(e) / temperature
  double channel_temperature, temperature;
  const Scales* on_device;  // these instead, where they are there and not here
  DSCT_DEVICE Scales get() const { return on_device == nullptr ? *this : *on_device; }
};
DSCT_HOST_DEVICE Scales scales_of(double channel, double spatial) {
  constexpr double kLog2E = std::numbers::log2e;
  return {static_cast<float>(1 / channel),
          static_cast<float>(1 / spatial),
          static_cast<float>(kLog2E / channel),
          static_cast<float>(kLog2E / spatial),
          channel,
          spatial,
          nullptr};
}

// What the host refuses makes everything NaN here.
__global__ void read_temperatures(const double* values, Scales* scales) {
  auto usable = [](double x) { return x > 0 && x < infinity<double>() ? x : std::numeric_limits<double>::quiet_NaN(); };
  *scales = scales_of(usable(values[0]), usable(values[1]));
}

// What comes first in every workspace: numbers that kernels leave for one another.
struct Head {
  Scales scales;
  unsigned ticket;  // 0 at the start: an earlier kernel sees to it
};
constexpr int64_t kHead = 16;  // floats that it takes, a multiple of 16 bytes
static_assert(sizeof(Head) <= kHead * sizeof(float));

// The scales, if need be by a launch of one thread before all others.
inline Scales scales_for(const Temperatures& temperatures, Head* head, cudaStream_t stream) {
  Scales scales = scales_of(temperatures.channel, temperatures.spatial);
  if (temperatures.values == nullptr) return scales;
  launch("cafd", read_temperatures, 1, 1, 0, stream, temperatures.values, &head->scales);
  scales.on_device = &head->scales;
  return scales;
}

// One block a sample has put its loss into losses: the last of them to finish adds all of them up, in order.
template <typename A>
DSCT_DEVICE void add_up(const A* losses, int64_t samples, unsigned* ticket, A norm, float* loss) {
  __threadfence();
  if (atomicAdd(ticket, 1u) < gridDim.x - 1) return;
  __threadfence();
  A total = 0;
  for (int64_t n = 0; n < samples; ++n) total += static_cast<const volatile A*>(losses)[n];
  *loss = static_cast<float>(total * norm);
}

// ------------------------------------------------------------------------------------------------------------- network

// All that the forward kernels know of one network.
struct Network {
  Features f;
  CafdPlan plan;
  Stats stats;
  float *partial, *shares;  // [samples][chunks][3][channels]; [samples][shares][A, B][positions]
  float* map;               // or nullptr
  DSCT_DEVICE float* chunk(int64_t n, int64_t k) const { return partial + (n * plan.chunks + k) * 3 * f.channels; }
  DSCT_DEVICE float* share(int64_t n, int64_t k) const { return shares + (n * plan.shares + k) * 2 * f.positions(); }
};

// Elements that the forward of one network needs beside its statistics.
inline int64_t map_workspace(const Features& f, const CafdPlan& plan) {
  return kHead + f.samples * (3 * f.channels * plan.chunks + 2 * f.positions() * plan.shares);
}

inline Network network_of(const Features& f, const CafdPlan& plan, float* stats, float* map, float* workspace) {
  float* shares = workspace + kHead;  // first: its rows are written 16 bytes at a time
  return {f,      plan, {stats, f.channels, f.positions()}, shares + f.samples * 2 * f.positions() * plan.shares,
          shares, map};
}

// Student and teacher go through the same launches: the blocks of the first, then those of the second.
struct Networks {
  Network each[2];
  Scales scales;
  unsigned* ticket;  // of compare_maps, which add_maps sets to 0
};

// The network of this block, and which of its blocks it is.
DSCT_DEVICE const Network& network_of(const Networks& networks, int64_t first_blocks, int64_t& block) {
  const bool second = block >= first_blocks;
  block -= second ? first_blocks : 0;
  return networks.each[second];
}

// -------------------------------------------------------------------------------------------------------------- places

// Of a thread: its channel, or the first of eight, and its positions, every rows-th from the first on.
struct CafdPlace {
  int64_t n, channel, offset, first, last;  // offset: where its channel starts
  int tile, chunk, lane, row;
  bool inside, whole;  // whole: all its channels are there
};
DSCT_DEVICE CafdPlace place_of(const Features& f, const CafdPlan& plan, int64_t block) {
  CafdPlace place;
  const unsigned number = static_cast<unsigned>(block), rest = number / plan.channel_tiles;
  const int per_lane = plan.columns ? kRun : 1;
  place.tile = number % plan.channel_tiles;
  place.chunk = rest % plan.chunks;
  place.n = rest / plan.chunks;
  place.lane = threadIdx.x % plan.lanes;
  place.row = threadIdx.x / plan.lanes;
  place.channel = (static_cast<int64_t>(place.tile) * plan.lanes + place.lane) * per_lane;
  place.inside = place.channel < f.channels;
  place.whole = place.channel + per_lane <= f.channels;
  place.offset = f.row(place.n, place.channel);
  place.first = place.chunk * plan.chunk_positions + place.row;
  const int64_t end = (place.chunk + 1) * plan.chunk_positions, positions = f.positions();
  place.last = !place.inside ? 0 : end < positions ? end : positions;
  return place;
}

// What the rows of a block have found, joined in a fixed order: row 0 has it all. shared: a T for every thread.
template <typename T, typename Add>
DSCT_DEVICE void join_rows(T* shared, const T& mine, int row, int rows, int lanes, const Add& add) {
  T* here = shared + threadIdx.x;
  __syncthreads();  // shared may have been used before
  *here = mine;
  int half = 1;
  while (half * 2 < rows) half *= 2;
  for (; half > 0; half /= 2) {
    __syncthreads();
    if (row < half && row + half < rows) add(*here, here[half * lanes]);
  }
}

// A channel's number in a row of stats, for each of this thread's channels; 0 beyond the last.
DSCT_DEVICE void load_channels(const float* from, const Features& f, const CafdPlace& place, float (&to)[kRun]) {
#pragma unroll
  for (int v = 0; v < kRun; ++v) to[v] = place.channel + v < f.channels ? from[place.channel + v] : 0.0f;
}

}  // namespace dsct::cuda
