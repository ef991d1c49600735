// How the kernels walk the features, and how large their launches are.
#pragma once

#include <algorithm>

#include "network.cuh"

namespace dsct::cuda {

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

inline CafdPlan cafd_plan(const Features& f, const Features* out, const Device& device) {
  CafdPlan plan;
  const int vector = 16 / size_of(f.type);
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
  const bool narrow = f.type != FloatType::kF64;
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

inline int64_t backward_workspace(const Features& f, const CafdPlan& plan) {
  return 4 + 3 * f.samples + (plan.layout == Layout::kColumns ? f.samples * plan.chunks * f.channels : 0);
}

}  // namespace dsct::cuda
