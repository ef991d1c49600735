// Everything else: channels_last, mixed layouts, odd sizes, any dtypes. A tile of pixels passes through shared memory,
// where the classes of a pixel lie side by side; the gradient takes the student's place there. A thread beyond the last
// pixel has a row of its own all the same: another's is being written.
#pragma once

#include "planes.cuh"

namespace dsct::cuda {

template <typename E>
struct alignas(16) Run {
  static constexpr int kSize = 16 / sizeof(E);
  E lane[kSize];
};

// From device memory to shared (kIn) or back. Where both have rows of classes, in runs of 16 bytes; else one number at
// a time, neighbouring lanes taking neighbouring pixels.
template <bool kIn, typename E>
DSCT_DEVICE void copy_tile(const LogitMap& net, int classes, const Place& p, unsigned char* tile, int log2) {
  unsigned char* base = net.data + p.image * net.image + p.start * net.pixel;
  if (net.rows) {
    const int row = classes * static_cast<int>(sizeof(E)), bytes = p.pixels * row, pad = net.pitch - row;
    const float rows_per_run = 16.0f / row;
    for (int i = threadIdx.x * 16; i + 16 <= bytes; i += blockDim.x * 16) {
      // Half a run more: never near a whole number of rows, so the product need not be exact.
      const int skip = pad == 0 ? 0 : static_cast<int>((i / 16 + 0.5f) * rows_per_run) * pad;
      auto* there = reinterpret_cast<unsigned*>(base + i);
      auto* here = reinterpret_cast<unsigned*>(tile + i + skip);
      if constexpr (kIn) copy_pack_async(here, const_cast<const unsigned*>(there));
      if constexpr (!kIn) store_pack(there, *reinterpret_cast<const Pack<unsigned>*>(here));
    }
    for (int i = bytes / 16 * 16 + threadIdx.x * sizeof(E); i < bytes; i += blockDim.x * sizeof(E)) {
      E *there = reinterpret_cast<E*>(base + i), *here = reinterpret_cast<E*>(tile + i);  // whole runs leave nothing
      kIn ? * here = *there : * there = *here;
    }
  } else {
    for (int i = threadIdx.x; i < classes << log2; i += blockDim.x) {
      const int j = i >> log2, pixel = i & ((1 << log2) - 1);
      if (pixel >= p.pixels) continue;
      E *there = reinterpret_cast<E*>(base + j * net.klass + pixel * net.pixel),
        *here = reinterpret_cast<E*>(tile + pixel * net.pitch) + j;
      kIn ? * here = *there : * there = *here;
    }
  }
}

template <bool kSplit>
struct Tiles {
  static constexpr int kPixels = 1, kLog2 = kSplit ? 5 : 7;  // of a tile's pixels

  // body(null pointer to what has the bits of the network's numbers)
  template <typename Body>
  static DSCT_DEVICE void by_size(const LogitMap& net, const Body& body) {
    net.type == FloatType::kF32 ? body(static_cast<unsigned*>(nullptr)) : body(static_cast<unsigned short*>(nullptr));
  }
  static DSCT_DEVICE unsigned char* teacher_tile(const Logits& in, unsigned char* tiles) {
    return tiles + (in.student.pitch << kLog2);
  }

  static DSCT_DEVICE void fetch(const Logits& in, const Place& p, unsigned char* tiles) {
    __syncthreads();  // the tile before may still be read
    by_size(in.student, [&](auto* null) {
      copy_tile<true, std::remove_pointer_t<decltype(null)>>(in.student, in.classes, p, tiles, kLog2);
    });
    by_size(in.teacher, [&](auto* null) {
      copy_tile<true, std::remove_pointer_t<decltype(null)>>(in.teacher, in.classes, p, teacher_tile(in, tiles), kLog2);
    });
    wait_for_copies();
    __syncthreads();
  }
  static DSCT_DEVICE void put_back(const Logits& in, const Place& p, unsigned char* tiles) {
    __syncthreads();
    by_size(in.grad, [&](auto* null) {
      copy_tile<false, std::remove_pointer_t<decltype(null)>>(in.grad, in.classes, p, tiles, kLog2);
    });
  }

  template <typename E, int kClasses>
  static DSCT_DEVICE void load_one(const LogitMap& net, const Place& p, const unsigned char* tile,
                                   float (&z)[kClasses]) {
    const E* row = reinterpret_cast<const E*>(tile + p.mine * net.pitch) + p.first;
#pragma unroll
    for (int i = 0; i < kClasses; ++i) z[i] = -infinity<float>();
    if (net.runs) {
      constexpr int kRun = Run<E>::kSize;
#pragma unroll
      for (int i = 0; i + kRun <= kClasses; i += kRun) {
        if (i >= p.classes) continue;
        const Run<E> run = *reinterpret_cast<const Run<E>*>(row + i);
#pragma unroll
        for (int v = 0; v < kRun; ++v) z[i + v] = static_cast<float>(run.lane[v]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kClasses; ++i) {
        if (i < sure_classes(kClasses) || i < p.classes) z[i] = static_cast<float>(row[i]);
      }
    }
  }
  template <int kClasses>
  static DSCT_DEVICE void load(const Logits& in, const Place& p, unsigned char* tiles, float (&s)[1][kClasses],
                               float (&t)[1][kClasses]) {
    by_type(in.student.type,
            [&](auto* null) { load_one<std::remove_pointer_t<decltype(null)>>(in.student, p, tiles, s[0]); });
    by_type(in.teacher.type, [&](auto* null) {
      load_one<std::remove_pointer_t<decltype(null)>>(in.teacher, p, teacher_tile(in, tiles), t[0]);
    });
  }

  template <int kClasses>
  static DSCT_DEVICE void store(const Logits& in, const Place& p, unsigned char* tiles, const float (&g)[1][kClasses]) {
    by_type(in.grad.type, [&](auto* null) {
      using E = std::remove_pointer_t<decltype(null)>;
      E* row = reinterpret_cast<E*>(tiles + p.mine * in.grad.pitch) + p.first;
      if (in.grad.runs) {
        constexpr int kRun = Run<E>::kSize;
#pragma unroll
        for (int i = 0; i + kRun <= kClasses; i += kRun) {
          Run<E> run;
#pragma unroll
          for (int v = 0; v < kRun; ++v) run.lane[v] = static_cast<E>(g[0][i + v]);
          if (i < p.classes) *reinterpret_cast<Run<E>*>(row + i) = run;
        }
      } else {
#pragma unroll
        for (int i = 0; i < kClasses; ++i) {
          if (i < sure_classes(kClasses) || i < p.classes) row[i] = static_cast<E>(g[0][i]);
        }
      }
    });
  }

  static DSCT_DEVICE float student(const Logits& in, const Place& p, unsigned char* tiles, int, int j) {
    return load_number(tiles + p.mine * in.student.pitch, in.student.type, j);
  }
  static DSCT_DEVICE float teacher(const Logits& in, const Place& p, unsigned char* tiles, int, int j) {
    return load_number(teacher_tile(in, tiles) + p.mine * in.teacher.pitch, in.teacher.type, j);
  }
  static DSCT_DEVICE void store_at(const Logits& in, const Place& p, unsigned char* tiles, int, int j, float g) {
    store_number(tiles + p.mine * in.grad.pitch, in.grad.type, j, g);
  }
};

}  // namespace dsct::cuda
