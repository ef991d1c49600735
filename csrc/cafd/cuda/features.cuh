// Features in memory, and how a thread reads them: eight neighbouring numbers at a time, or one that may lie anywhere.
// The dtype is a value and not a type: loads do not depend on it, and what they brought is taken apart by one branch
// that a whole warp takes alike.
#pragma once

#include "common/cuda_math.h"

namespace dsct::cuda {

constexpr int kCafdThreads = 256, kCafdWarps = kCafdThreads / kWarp;
constexpr int kRun = 8;  // numbers side by side: 16 bytes, in float32 twice as many

struct Features {
  const void* data;
  FloatType type;
  int64_t samples, channels, height, width;
  int64_t stride[4];  // elements: n, c, h, w
  bool flat;          // one step from any position to the next
  DSCT_HOST_DEVICE int64_t positions() const { return height * width; }
  DSCT_DEVICE int64_t row(int64_t n, int64_t c) const { return n * stride[0] + c * stride[1]; }
  DSCT_DEVICE int64_t offset(int64_t position) const {
    if (flat) return position * stride[3];
    const int64_t y = position / width;
    return y * stride[2] + (position - y * width) * stride[3];
  }
};

inline Features make_features(const void* data, FloatType type, const int64_t* size, const int64_t* stride) {
  Features f{data, type, size[0], size[1], size[2], size[3], {stride[0], stride[1], stride[2], stride[3]}, false};
  if (f.width == 1) f.stride[3] = f.stride[2];  // the step from one position to the next
  f.flat = f.height == 1 || f.width == 1 || f.stride[2] == f.width * f.stride[3];
  return f;
}

// Positions side by side, which can be read in runs; channels side by side.
inline bool aligned(const Features& x, int64_t step) {
  const int vector = 16 / size_of(x.type);
  return on_16_bytes(x.data) && x.flat && x.stride[0] % vector == 0 && step % vector == 0;
}
inline bool rows_fit(const Features& x) { return x.stride[3] == 1 && aligned(x, x.stride[1]); }
inline bool columns_fit(const Features& x) { return x.stride[1] == 1 && aligned(x, x.stride[3]); }

// Numbers as they lie in memory.
template <int kCount>
struct Numbers;

template <>
struct Numbers<kRun> {
  Pack<uint32_t> low, high;  // high: of float32
  // whole: all eight, else the first four, of float32, and zeros.
  DSCT_DEVICE void load(const void* data, FloatType type, int64_t offset, bool whole = true) {
    const uint32_t* from = reinterpret_cast<const uint32_t*>(static_cast<const char*>(data) + offset * size_of(type));
    low = load_pack_cached(from);
    high = {};
    if (type == FloatType::kF32 && whole) high = load_pack_cached(from + 4);
  }
  DSCT_DEVICE void values(FloatType type, float (&x)[kRun]) const {
    if (type == FloatType::kF32) {
#pragma unroll
      for (int v = 0; v < kRun; ++v) x[v] = std::bit_cast<float>(v < 4 ? low.lane[v] : high.lane[v - 4]);
    } else if (type == FloatType::kBF16) {
#pragma unroll
      for (int v = 0; v < kRun; ++v) {
        const uint32_t word = low.lane[v / 2];
        x[v] = std::bit_cast<float>(v % 2 == 0 ? word << 16 : word & 0xffff0000u);
      }
    } else {
#pragma unroll
      for (int v = 0; v < kRun; ++v) {
        x[v] = Half(static_cast<unsigned short>(low.lane[v / 2] >> v % 2 * 16), Half::from_bits());
      }
    }
  }
};

template <>
struct Numbers<1> {
  uint32_t bits;
  DSCT_DEVICE void load(const void* data, FloatType type, int64_t offset, bool = true) {
    bits = type == FloatType::kF32 ? static_cast<const uint32_t*>(data)[offset]
                                   : static_cast<const uint16_t*>(data)[offset];
  }
  DSCT_DEVICE void values(FloatType type, float (&x)[1]) const {
    if (type == FloatType::kF16) {
      x[0] = Half(static_cast<unsigned short>(bits), Half::from_bits());
    } else {
      x[0] = std::bit_cast<float>(type == FloatType::kBF16 ? bits << 16 : bits);
    }
  }
};

// The numbers at(i), for i = first, first + step, ... below last, kBatch of them at a time, all of which are under way
// at once: take(values, i, how many there are).
template <int kCount, int kBatch, typename At, typename Take>
DSCT_DEVICE void walk_batches(const Features& f, int64_t first, int64_t step, int64_t last, bool whole, const At& at,
                              const Take& take) {
  for (int64_t i = first; i < last; i += kBatch * step) {
    Numbers<kCount> numbers[kBatch] = {};
    int count = 0;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (i + b * step < last) numbers[b].load(f.data, f.type, at(i + b * step), whole), ++count;
    }
    float x[kBatch][kCount];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) numbers[b].values(f.type, x[b]);
    take(x, i, count);
  }
}

// The same, one after the other: take(values, i).
template <int kCount, int kBatch, typename At, typename Take>
DSCT_DEVICE void walk(const Features& f, int64_t first, int64_t step, int64_t last, bool whole, const At& at,
                      const Take& take) {
  walk_batches<kCount, kBatch>(f, first, step, last, whole, at,
                               [&](const float (&x)[kBatch][kCount], int64_t i, int count) {
#pragma unroll
                                 for (int b = 0; b < kBatch; ++b) {
                                   if (b < count) take(x[b], i + b * step);
                                 }
                               });
}

DSCT_DEVICE void store_numbers(const Features& f, int64_t offset, const float (&x)[1], bool = true) {
  store_number(const_cast<void*>(f.data), f.type, offset, x[0]);
}
template <typename T>
DSCT_DEVICE void store_run_of(void* data, int64_t offset, const float (&x)[kRun], bool whole) {
#pragma unroll
  for (int first = 0; first < kRun; first += Pack<T>::kSize) {
    if (first > 0 && !whole) break;
    Pack<T> pack;
#pragma unroll
    for (int v = 0; v < Pack<T>::kSize; ++v) pack.lane[v] = static_cast<T>(x[first + v]);
    store_pack(static_cast<T*>(data) + offset + first, pack);
  }
}
DSCT_DEVICE void store_numbers(const Features& f, int64_t offset, const float (&x)[kRun], bool whole = true) {
  void* data = const_cast<void*>(f.data);
  if (f.type == FloatType::kF32) return store_run_of<float>(data, offset, x, whole);
  if (f.type == FloatType::kF16) return store_run_of<Half>(data, offset, x, whole);
  store_run_of<BFloat16>(data, offset, x, whole);
}

}  // namespace dsct::cuda
