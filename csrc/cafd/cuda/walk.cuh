// How the threads of a launch share out features, and how they put together what each of them found.
#pragma once

#include <algorithm>

#include "features.cuh"

namespace dsct::cuda {

constexpr int kCafdThreads = 256;

// A thread has one channel and every rows-th run of positions of a chunk. Neighbouring threads (lanes) have
// neighbouring channels where those lie side by side, and neighbouring runs of one channel where positions do.
struct CafdPlan {
  int lanes = 1, threads = kCafdThreads;
  int tiles = 1, chunks = 1;  // blocks of a sample: along its channels, and along its positions
  int64_t channels = 0, chunk_positions = 0, blocks = 0, sums = 0;  // sums: one of each chunk of a channel
  // Among all sums.
  DSCT_DEVICE int64_t chunk_at(int64_t n, int64_t chunk, int64_t c) const {
    return (n * chunks + chunk) * channels + c;
  }
};

// f: whose layout decides. chunked: else a block has all positions of its channels.
inline CafdPlan cafd_plan(const Features& f, const Device& device, bool chunked = true) {
  CafdPlan plan;
  if (f.columns()) plan.lanes = static_cast<int>(ceil_div(f.channels, ceil_div(f.channels, 64)));
  // A thread is worth having, and so is a block, where it finds 32 positions.
  const int64_t wanted = ceil_div(f.positions * plan.lanes, 32 * kWarp) * kWarp;
  plan.threads = static_cast<int>(std::clamp<int64_t>(wanted, ceil_div(plan.lanes, kWarp) * kWarp, kCafdThreads));
  plan.tiles = static_cast<int>(ceil_div(f.channels, plan.lanes));
  const int64_t blocks = std::max<int64_t>(f.samples * plan.tiles, 1);
  const int64_t most = std::min<int64_t>(ceil_div(f.positions, plan.threads / plan.lanes * 32), 64);
  const int64_t chunks = chunked ? std::clamp<int64_t>(ceil_div(device.multiprocessors * 8, blocks), 1, most) : 1;
  plan.chunk_positions = ceil_div(ceil_div(f.positions, chunks), kRun) * kRun;
  plan.chunks = static_cast<int>(ceil_div(f.positions, plan.chunk_positions));
  plan.channels = f.channels;
  plan.blocks = f.samples * plan.tiles * plan.chunks, plan.sums = f.samples * f.channels * plan.chunks;
  return plan;
}

// One block a sample: whole warps, no more threads than there are positions, or channels.
inline int sample_threads(int64_t count, int64_t most = 1024) {
  return static_cast<int>(std::min(ceil_div(count, kWarp) * kWarp, most));
}

// Of a thread: its channel, and its runs: at first, and every step-th position from there on.
struct CafdPlace {
  int64_t n, c, chunk, first, last, step, positions;
  int row, rows, lanes;
  bool inside;
  DSCT_DEVICE int64_t left(int64_t i) const { return positions - i < kRun ? positions - i : kRun; }
};
DSCT_DEVICE CafdPlace place_of(const Features& f, const CafdPlan& plan, int64_t block) {
  CafdPlace place;
  const unsigned number = static_cast<unsigned>(block), rest = number / plan.tiles;
  place.chunk = rest % plan.chunks;
  place.n = rest / plan.chunks;
  place.lanes = plan.lanes;
  place.row = threadIdx.x / plan.lanes;
  place.rows = blockDim.x / plan.lanes;
  place.c = static_cast<int64_t>(number % plan.tiles) * plan.lanes + threadIdx.x % plan.lanes;
  place.inside = place.row < place.rows && place.c < f.channels;
  place.step = place.rows * kRun;
  place.positions = f.positions;
  place.first = place.chunk * plan.chunk_positions + place.row * kRun;
  const int64_t end = (place.chunk + 1) * plan.chunk_positions;
  place.last = !place.inside ? 0 : end < f.positions ? end : f.positions;
  return place;
}

// load(i), for i = first, first + step, ... below last, kBatch of them under way at once, then take(what it brought,
// i).
template <int kBatch, typename Load, typename Take>
DSCT_DEVICE void walk(int64_t first, int64_t last, int64_t step, const Load& load, const Take& take) {
  for (int64_t i = first; i < last; i += kBatch * step) {
    decltype(load(i)) loaded[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (i + b * step < last) loaded[b] = load(i + b * step);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (i + b * step < last) take(loaded[b], i + b * step);
    }
  }
}

// The runs of two maps: take(a, b, i). What is not there, beyond the last position or where the mask (a sample's, or
// nullptr) says so, is -inf in a and `nothing` in b.
template <typename Take>
DSCT_DEVICE void walk_pairs(const Features& map_a, const Features& map_b, const CafdPlace& place, const bool* mask,
                            float nothing, const Take& take) {
  struct Pair {
    Numbers a, b;
    uint64_t there;  // a byte of each position
  };
  walk<1>(
      place.first, place.last, place.step,
      [&](int64_t i) {
        const int64_t left = place.left(i);
        Pair pair{{map_a, map_a.at(place.n, place.c, i), left}, {map_b, map_b.at(place.n, place.c, i), left}, ~0ull};
        if (mask != nullptr && left == kRun && reinterpret_cast<uintptr_t>(mask + i) % kRun == 0) {
          pair.there = *reinterpret_cast<const uint64_t*>(mask + i);
        } else if (mask != nullptr || left < kRun) {
          pair.there = 0;
          for (int v = 0; v < left; ++v) pair.there |= uint64_t(mask == nullptr || mask[i + v]) << v * 8;
        }
        return pair;
      },
      [&](const Pair& pair, int64_t i) {
        float a[kRun], b[kRun];
        pair.a.values(map_a.type, a);
        pair.b.values(map_b.type, b);
#pragma unroll
        for (int v = 0; v < kRun; ++v) {
          if ((pair.there >> v * 8 & 0xff) == 0) a[v] = -infinity<float>(), b[v] = nothing;
        }
        take(a, b, i);
      });
}

// What the rows of a block have found, joined in a fixed order by add(to, other): row 0 has it all. shared: a T for
// every thread.
template <typename T, typename Add>
DSCT_DEVICE const T& join_rows(unsigned char* shared, const T& mine, const CafdPlace& place, const Add& add) {
  T* here = reinterpret_cast<T*>(shared) + threadIdx.x;
  *here = mine;
  int half = 1;
  while (half * 2 < place.rows) half *= 2;
  for (; half > 0; half /= 2) {
    __syncthreads();
    if (place.row < half && place.row + half < place.rows) add(*here, here[half * place.lanes]);
  }
  return *here;
}

// A block's sums of its chunk of a channel, among those of all blocks.
template <typename Sums>
DSCT_DEVICE void put(Sums* all, const CafdPlan& plan, const CafdPlace& place, const Sums& sums) {
  if (place.row == 0 && place.inside) all[plan.chunk_at(place.n, place.chunk, place.c)] = sums;
}

}  // namespace dsct::cuda
