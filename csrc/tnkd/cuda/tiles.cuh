// Everything else: channels_last, odd sizes, other pairs of dtypes. A tile of pixels passes through shared memory,
// where the classes of a pixel lie side by side; the gradient takes the student's place there. A thread beyond the last
// pixel has a row of its own all the same: another's is being written.
#pragma once

#include "planes.cuh"

namespace dsct::cuda {

DSCT_DEVICE void copy_number(unsigned char* to, const unsigned char* from, int bytes) {
  if (bytes == 4) *reinterpret_cast<unsigned*>(to) = *reinterpret_cast<const unsigned*>(from);
  if (bytes == 2) *reinterpret_cast<unsigned short*>(to) = *reinterpret_cast<const unsigned short*>(from);
}

template <bool kSplit>
struct Tiles : Place {
  static constexpr int kS = 0, kT = 0, kPixels = 1, kLog2 = kSplit ? 5 : 7;  // of a tile's pixels
  using Place::Place;

  // From device memory to shared (kIn) or back: of rows of classes 16 bytes at a time, of planes one number,
  // neighbouring lanes taking neighbouring pixels.
  template <bool kIn>
  DSCT_DEVICE void copy(const LogitMap& net) const {
    const int size = size_of(net.type), row = in.classes * size, bytes = pixels * row, pad = net.pitch - row;
    unsigned char *base = net.data + start * row, *tile = shared + net.tile;
    const float rows_per_run = 16.0f / row;
    for (int i = threadIdx.x * 16; in.last && i + 16 <= bytes; i += blockDim.x * 16) {
      // Half a run more: never near a whole number of rows, so the product need not be exact.
      const int skip = pad == 0 ? 0 : static_cast<int>((i / 16 + 0.5f) * rows_per_run) * pad;
      auto *there = reinterpret_cast<unsigned*>(base + i), *here = reinterpret_cast<unsigned*>(tile + i + skip);
      if constexpr (kIn) copy_pack_async(here, there);
      if constexpr (!kIn) store_pack(there, *reinterpret_cast<const Pack<unsigned>*>(here));
    }
    for (int i = bytes / 16 * 16 + threadIdx.x * 2; in.last && i < bytes; i += blockDim.x * 2) {
      copy_number((kIn ? tile : base) + i, (kIn ? base : tile) + i, 2);  // where rows are whole runs nothing is left
    }
    for (int i = threadIdx.x; !in.last && i < in.classes << kLog2; i += blockDim.x) {
      const int j = i >> kLog2, v = i & ((1 << kLog2) - 1);
      if (v >= pixels) continue;
      unsigned char* here = tile + v * net.pitch + j * size;
      unsigned char* there = net.data + ((image * int64_t{in.classes} + j) * in.pixels + start + v) * size;
      kIn ? copy_number(here, there, size) : copy_number(there, here, size);
    }
  }
  DSCT_DEVICE void fetch() const {
    __syncthreads();  // the tile before may still be read
    copy<true>(in.student);
    copy<true>(in.teacher);
    wait_for_copies();
    __syncthreads();
  }
  DSCT_DEVICE void put_back() const {
    __syncthreads();
    copy<false>(in.grad);
  }

  template <int kSize = 0>
  DSCT_DEVICE unsigned char* number(const LogitMap& net, int, int j) const {
    return shared + net.tile + mine * net.pitch + j * size_of(net.type);
  }

  // Runs of kRun classes, of those that are there.
  template <int kRun, typename E, int kClasses>
  DSCT_DEVICE void load_runs(const E* row, float (&z)[kClasses]) const {
#pragma unroll
    for (int i = 0; i + kRun <= kClasses; i += kRun) {
      if (i >= sure_classes(kClasses) && i >= classes) continue;
      const auto run = *reinterpret_cast<const Pack<E, kRun>*>(row + i);
#pragma unroll
      for (int v = 0; v < kRun; ++v) z[i + v] = static_cast<float>(run.lane[v]);
    }
  }
  template <int kRun, typename E, int kClasses>
  DSCT_DEVICE void store_runs(E* row, const float (&g)[kClasses]) const {
#pragma unroll
    for (int i = 0; i + kRun <= kClasses; i += kRun) {
      Pack<E, kRun> run;
#pragma unroll
      for (int v = 0; v < kRun; ++v) run.lane[v] = static_cast<E>(g[i + v]);
      if (i < sure_classes(kClasses) || i < classes) *reinterpret_cast<Pack<E, kRun>*>(row + i) = run;
    }
  }
  template <int kClasses>
  DSCT_DEVICE void load_one(const LogitMap& net, float (&z)[kClasses]) const {
#pragma unroll
    for (int i = 0; i < kClasses; ++i) z[i] = -infinity<float>();
    by_type<0>(net.type, [&]<typename E>(E*) {
      const E* row = reinterpret_cast<const E*>(number(net, 0, first));
      net.runs ? load_runs<16 / sizeof(E)>(row, z) : load_runs<1>(row, z);
    });
  }
  template <int kClasses>
  DSCT_DEVICE void load(float (&s)[1][kClasses], float (&t)[1][kClasses]) const {
    load_one(in.student, s[0]);
    load_one(in.teacher, t[0]);
  }
  template <int kClasses>
  DSCT_DEVICE void store(const float (&g)[1][kClasses]) const {
    by_type<0>(in.grad.type, [&]<typename E>(E*) {
      E* row = reinterpret_cast<E*>(number(in.grad, 0, first));
      in.grad.runs ? store_runs<16 / sizeof(E)>(row, g[0]) : store_runs<1>(row, g[0]);
    });
  }
};

}  // namespace dsct::cuda
