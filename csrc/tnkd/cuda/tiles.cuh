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

// From device memory to shared (kIn) or back: of rows of classes 16 bytes at a time, of planes one number, neighbouring
// lanes taking neighbouring pixels.
template <bool kIn>
DSCT_DEVICE void copy_tile(const Logits& in, const LogitMap& net, const Place& p, unsigned char* tiles, int log2) {
  const int size = size_of(net.type), row = in.classes * size, pad = net.pitch - row;
  unsigned char* tile = tiles + net.tile;
  if (in.last) {
    unsigned char* base = net.data + p.start * row;
    const int bytes = p.pixels * row;
    const float rows_per_run = 16.0f / row;
    for (int i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16) {
      // Half a run more: never near a whole number of rows, so the product need not be exact.
      const int skip = pad == 0 ? 0 : static_cast<int>((i / 16 + 0.5f) * rows_per_run) * pad;
      unsigned char *there = base + i, *here = tile + i + skip;
      if (i + 16 > bytes) {  // the last of all pixels; never where there is a pad
        for (int b = 0; i + b < bytes; b += 2) copy_number((kIn ? here : there) + b, (kIn ? there : here) + b, 2);
      } else if constexpr (kIn) {
        copy_pack_async(here, there);
      } else {
        store_pack(there, *reinterpret_cast<const Pack<unsigned char>*>(here));
      }
    }
  } else {
    for (int i = threadIdx.x; i < in.classes << log2; i += blockDim.x) {
      const int j = i >> log2, v = i & ((1 << log2) - 1);
      if (v >= p.pixels) continue;
      unsigned char* here = tile + v * net.pitch + j * size;
      unsigned char* there = net.data + ((p.image * int64_t{in.classes} + j) * in.pixels + p.start + v) * size;
      kIn ? copy_number(here, there, size) : copy_number(there, here, size);
    }
  }
}

template <bool kSplit>
struct Tiles {
  static constexpr int kS = 0, kT = 0, kPixels = 1, kLog2 = kSplit ? 5 : 7;  // of a tile's pixels

  static DSCT_DEVICE void fetch(const Logits& in, const Place& p, unsigned char* tiles) {
    __syncthreads();  // the tile before may still be read
    copy_tile<true>(in, in.student, p, tiles, kLog2);
    copy_tile<true>(in, in.teacher, p, tiles, kLog2);
    wait_for_copies();
    __syncthreads();
  }
  static DSCT_DEVICE void put_back(const Logits& in, const Place& p, unsigned char* tiles) {
    __syncthreads();
    copy_tile<false>(in, in.grad, p, tiles, kLog2);
  }

  template <int kSize = 0>
  static DSCT_DEVICE unsigned char* at(const Logits&, const LogitMap& net, const Place& p, unsigned char* tiles, int,
                                       int j) {
    return tiles + net.tile + p.mine * net.pitch + j * size_of(net.type);
  }

  // body(class, kRun of its and the next classes): of those that are there.
  template <int kRun, int kClasses, typename Body>
  static DSCT_DEVICE void by_runs(const Place& p, const Body& body) {
#pragma unroll
    for (int i = 0; i + kRun <= kClasses; i += kRun) {
      if (i < sure_classes(kClasses) || i < p.classes) body(i);
    }
  }
  template <int kRun, typename E, int kClasses>
  static DSCT_DEVICE void load_runs(const Place& p, const E* row, float (&z)[kClasses]) {
    by_runs<kRun, kClasses>(p, [&](int i) {
      const auto run = *reinterpret_cast<const Pack<E, kRun>*>(row + i);
#pragma unroll
      for (int v = 0; v < kRun; ++v) z[i + v] = static_cast<float>(run.lane[v]);
    });
  }
  template <int kRun, typename E, int kClasses>
  static DSCT_DEVICE void store_runs(const Place& p, E* row, const float (&g)[kClasses]) {
    by_runs<kRun, kClasses>(p, [&](int i) {
      Pack<E, kRun> run;
#pragma unroll
      for (int v = 0; v < kRun; ++v) run.lane[v] = static_cast<E>(g[i + v]);
      *reinterpret_cast<Pack<E, kRun>*>(row + i) = run;
    });
  }
  template <int kClasses>
  static DSCT_DEVICE void load_one(const Logits& in, const LogitMap& net, const Place& p, unsigned char* tiles,
                                   float (&z)[kClasses]) {
#pragma unroll
    for (int i = 0; i < kClasses; ++i) z[i] = -infinity<float>();
    by_type<0>(net.type, [&]<typename E>(E*) {
      const E* row = reinterpret_cast<const E*>(at(in, net, p, tiles, 0, p.first));
      net.runs ? load_runs<16 / sizeof(E)>(p, row, z) : load_runs<1>(p, row, z);
    });
  }
  template <int kClasses>
  static DSCT_DEVICE void load(const Logits& in, const Place& p, unsigned char* tiles, float (&s)[1][kClasses],
                               float (&t)[1][kClasses]) {
    load_one(in, in.student, p, tiles, s[0]);
    load_one(in, in.teacher, p, tiles, t[0]);
  }
  template <int kClasses>
  static DSCT_DEVICE void store(const Logits& in, const Place& p, unsigned char* tiles, const float (&g)[1][kClasses]) {
    by_type<0>(in.grad.type, [&]<typename E>(E*) {
      E* row = reinterpret_cast<E*>(at(in, in.grad, p, tiles, 0, p.first));
      in.grad.runs ? store_runs<16 / sizeof(E)>(p, row, g[0]) : store_runs<1>(p, row, g[0]);
    });
  }
};

}  // namespace dsct::cuda
