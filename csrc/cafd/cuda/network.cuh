// What the kernels of condensed CAFD know of a network: its features, how they are shared out, where results go.
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

// All that the forward kernels know of one network.
struct Network {
  Features f;
  CafdPlan plan;
  Stats stats;
  float* partial;  // [samples][chunks][3][channels]
  float* map;      // (samples, positions) or nullptr
  // attention_maps: a block has `runs` runs of positions, and `groups` threads share the channels of each.
  int groups, runs, map_tiles;
  int64_t map_blocks() const { return f.samples * map_tiles; }
  DSCT_DEVICE float* chunk(int64_t n, int64_t k) const { return partial + (n * plan.chunks + k) * 3 * f.channels; }
};

// Without `partial`, which takes partial_size(plan, f) numbers.
inline Network make_network(const Features& f, float* stats, float* map, const Device& device) {
  Network net{f, cafd_plan(f, device), {stats, f.channels, f.positions}, nullptr, map};
  net.groups = f.columns() ? kWarp : kWarp / 2;
  auto share = [&](int groups) {
    net.groups = groups, net.runs = kCafdThreads / groups;
    net.map_tiles = static_cast<int>(ceil_div(f.positions, net.runs * kRun));
  };
  share(net.groups);
  while (net.groups > f.channels) share(net.groups / 2);
  // Fewer runs a block where there are too few blocks.
  while (net.groups < 2 * kWarp && net.groups * 2 <= f.channels && net.map_blocks() < device.multiprocessors * 4) {
    share(net.groups * 2);
  }
  return net;
}
inline int64_t partial_size(const Network& net) { return net.f.samples * net.plan.chunks * 3 * net.f.channels; }

// Student and teacher go through the same launches: the blocks of the first, then those of the second.
struct Networks {
  Network each[2];
  Temperatures temperatures;
  Losses losses;  // of compare_maps
};

// The network of this block, and which of its blocks it is.
DSCT_DEVICE const Network& network_of(const Networks& networks, int64_t first_blocks, int64_t& block) {
  const bool second = block >= first_blocks;
  block -= second ? first_blocks : 0;
  return networks.each[second];
}

}  // namespace dsct::cuda
