// Features in memory, and how a thread reads them: eight neighbouring positions of a channel at a time, wherever they
// lie. The dtype is a value and not a type: loads do not depend on it, and what they brought is taken apart by one
// branch that a whole warp takes alike.
#pragma once

#include "common/cuda_math.h"

namespace dsct::cuda {

constexpr int kRun = 8;  // positions

// One step leads from any position to the next, row after row. In elements; `channel` is 0 for what all channels share.
struct Features {
  const void* data;
  FloatType type;
  int64_t samples, channels, positions;
  int64_t sample, channel, position;  // the steps
  bool packs;                         // runs lie side by side, on 16 bytes
  DSCT_DEVICE int64_t at(int64_t n, int64_t c, int64_t i) const { return n * sample + c * channel + i * position; }
  // A position's channels lie side by side (channels_last, and tokens (N, L, C) viewed as images), a channel's
  // positions do not.
  DSCT_HOST_DEVICE bool columns() const { return channel == 1 && (position != 1 || positions == 1); }
  const char* name() const { return columns() ? "columns" : packs ? "rows" : "any"; }
};

// Strides (n, c, h, w) that one step from position to position is enough for; others are copied first.
inline bool even_steps(const int64_t* size, const int64_t* stride) {
  return size[2] == 1 || size[3] == 1 || stride[2] == size[3] * stride[3];
}

inline Features make_features(const void* data, FloatType type, const int64_t* size, const int64_t* stride) {
  const int64_t position = stride[size[3] == 1 ? 2 : 3], vector = 16 / size_of(type);
  const bool packs = position == 1 && on_16_bytes(data) && stride[0] % vector == 0 && stride[1] % vector == 0;
  return {data, type, size[0], size[1], size[2] * size[3], stride[0], stride[1], position, packs};
}

// One number a position, of every channel the same: (samples, positions).
inline Features make_map(const float* data, const Features& like) {
  const int64_t size[4] = {like.samples, like.channels, 1, like.positions}, stride[4] = {like.positions, 0, 0, 1};
  return make_features(data, FloatType::kF32, size, stride);
}

// body(E()) for the type that a value names.
template <typename Body>
DSCT_DEVICE void with_type(FloatType type, const Body& body) {
  if (type == FloatType::kF32) return body(float());
  if (type == FloatType::kF16) return body(Half());
  body(BFloat16());
}

// A run as it lies in memory, of 16 bits two numbers to a word; 0 beyond the first `count`.
struct Numbers {
  uint32_t words[kRun] = {};
  DSCT_DEVICE Numbers() = default;
  DSCT_DEVICE Numbers(const Features& f, int64_t offset, int64_t count) {
    const char* from = static_cast<const char*>(f.data) + offset * size_of(f.type);
    if (f.packs && count >= kRun) {
#pragma unroll
      for (int first = 0; first < kRun; first += 4) {
        if (first > 0 && f.type != FloatType::kF32) break;
        const Pack<uint32_t> pack = load_pack_cached(reinterpret_cast<const uint32_t*>(from) + first);
#pragma unroll
        for (int v = 0; v < 4; ++v) words[first + v] = pack.lane[v];
      }
      return;
    }
    auto each = [&](auto bits) {
      using Bits = decltype(bits);
#pragma unroll
      for (int v = 0; v < kRun; ++v) {
        const uint32_t word = v < count ? reinterpret_cast<const Bits*>(from)[v * f.position] : 0;
        words[v * sizeof(Bits) / 4] |= word << v * sizeof(Bits) % 4 * 8;
      }
    };
    f.type == FloatType::kF32 ? each(uint32_t()) : each(uint16_t());
  }
  DSCT_DEVICE void values(FloatType type, float (&x)[kRun]) const {
    with_type(type, [&](auto number) {
      using Bits = std::conditional_t<sizeof(number) == 4, uint32_t, uint16_t>;
#pragma unroll
      for (int v = 0; v < kRun; ++v) {
        const uint32_t word = words[v * sizeof(Bits) / 4] >> v * sizeof(Bits) % 4 * 8;
        x[v] = std::bit_cast<decltype(number)>(static_cast<Bits>(word));
      }
    });
  }
};

DSCT_DEVICE void store(const Features& f, int64_t offset, const float (&x)[kRun], int64_t count) {
  with_type(f.type, [&](auto number) {
    using E = decltype(number);
    E *to = static_cast<E*>(const_cast<void*>(f.data)) + offset, run[kRun];
#pragma unroll
    for (int v = 0; v < kRun; ++v) run[v] = static_cast<E>(x[v]);
    if (f.packs && count >= kRun) return store_run(to, run);
#pragma unroll
    for (int v = 0; v < kRun; ++v) {
      if (v < count) to[v * f.position] = run[v];
    }
  });
}

}  // namespace dsct::cuda
