// Features in memory, and how a channel's row or a position's column of them is read.
#pragma once

#include "common/cuda_math.h"

namespace dsct::cuda {

constexpr int kCafdThreads = 256, kCafdWarps = kCafdThreads / kWarp;

struct Features {
  const void* data;
  FloatType type;
  int64_t samples, channels, height, width;
  int64_t stride[4];  // elements: n, c, h, w
  DSCT_HOST_DEVICE int64_t positions() const { return height * width; }
};

inline Features make_features(const void* data, FloatType type, const int64_t* size, const int64_t* stride) {
  Features f{data, type, size[0], size[1], size[2], size[3], {stride[0], stride[1], stride[2], stride[3]}};
  if (f.width == 1) f.stride[3] = f.stride[2];  // the step from one position to the next
  return f;
}

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
    return static_cast<const char*>(f.data) + (n * f.stride[0] + c * f.stride[1]) * size_of(f.type);
  }
  DSCT_DEVICE static int64_t offset(const Features& f, int64_t index) {
    const int64_t y = index / f.width;
    return y * f.stride[2] + (index - y * f.width) * f.stride[3];
  }
  DSCT_DEVICE static Held load(const Features& f, const void* row, int64_t index) {
    return {load_number<A>(row, f.type, offset(f, index))};
  }
  DSCT_DEVICE static A value(const Held& held, int) { return held.value; }
  DSCT_DEVICE static void store(const Features& f, const void* row, int64_t index, const A (&g)[1]) {
    store_number(const_cast<void*>(row), f.type, offset(f, index), g[0]);
  }
};

}  // namespace dsct::cuda
