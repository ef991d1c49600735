// encode_labels: labels of any integer type become codes of 8 or 16 bits, and are counted.
#pragma once

#include <type_traits>

#include "args.cuh"

namespace dsct::cuda {

constexpr int kIgnored = -1;  // the code of a label that is ignore_index
constexpr int kBad = -2;      // and of one that is no class at all

// Where the workspace keeps what.
struct Workspace {
  unsigned* ticket;
  double* largest_weight;  // of a class, 1 without class weights
  double* counts;          // count_blocks
  double* weights;         // count_blocks
  double* partials;        // 3 sums a block of the main kernel
  void* codes;             // a pixel each, up to a multiple of 8
  int count_blocks;
};

constexpr int kCountThreads = 256, kCountPixels = 8;

// The codes of neighbouring pixels.
template <typename Code, int kCount>
struct alignas(sizeof(Code) * kCount) Codes {
  Code lane[kCount];
};
template <typename Code>
DSCT_DEVICE void store_codes(void* codes, int64_t pixel, const int (&y)[kCountPixels]) {
  Codes<Code, kCountPixels> run;
#pragma unroll
  for (int v = 0; v < kCountPixels; ++v) run.lane[v] = static_cast<Code>(y[v]);
  *reinterpret_cast<Codes<Code, kCountPixels>*>(static_cast<Code*>(codes) + pixel) = run;
}
// kIgnored where there are none.
template <bool kWide, int kPixels>
DSCT_DEVICE void load_codes(const void* codes, int64_t pixel, bool inside, int (&y)[kPixels]) {
  using Code = std::conditional_t<kWide, short, signed char>;
  const auto run = *reinterpret_cast<const Codes<Code, kPixels>*>(static_cast<const Code*>(codes) + pixel);
#pragma unroll
  for (int v = 0; v < kPixels; ++v) y[v] = inside ? run.lane[v] : kIgnored;
}

// A block's counts of valid pixels and of their class weights, and what the main kernel finds beside them.
DSCT_DEVICE void finish_count(double (&sums)[2], const float* class_weight, int classes, const Workspace& work,
                              unsigned char* shared) {
  block_sum(sums, reinterpret_cast<double*>(shared));
  if (threadIdx.x == 0) {
    work.counts[blockIdx.x] = sums[0];
    work.weights[blockIdx.x] = class_weight == nullptr ? sums[0] : sums[1];
    if (blockIdx.x == 0) *work.ticket = 0;
  }
  if (blockIdx.x == 0 && threadIdx.x < kWarp) {
    float largest = class_weight == nullptr ? 1 : 0;
    if (class_weight != nullptr) {
      for (int k = threadIdx.x; k < classes; k += kWarp) largest = larger(largest, class_weight[k]);
      largest = warp_max(largest);
    }
    if (threadIdx.x == 0) *work.largest_weight = largest;
  }
}

// Codes, partial counts of valid pixels and of their class weights, and the ticket set to zero for the main kernel.
__global__ void __launch_bounds__(kCountThreads, 1)
    encode_labels(const void* labels, LabelType type, bool aligned, bool has_ignore, int64_t ignore,
                  const int64_t* ignore_value, int classes, int64_t pixels, const float* class_weight, bool wide,
                  Workspace work) {
  release_next();
  DSCT_SHARED(shared);
  if (ignore_value != nullptr) ignore = *ignore_value;
  const auto code_of = [&](int64_t label) {
    if (has_ignore && label == ignore) return kIgnored;
    return static_cast<uint64_t>(label) < static_cast<uint64_t>(classes) ? static_cast<int>(label) : kBad;
  };
  int valid = 0;
  double sums[2] = {0, 0};
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * kCountPixels;
  const auto encode = [&](auto null) {
    using L = std::remove_pointer_t<decltype(null)>;
    struct alignas(kCountPixels * sizeof(L) < 16 ? kCountPixels * sizeof(L) : 16) Run {
      L lane[kCountPixels];
    };
    const L* from = static_cast<const L*>(labels);
    for (int64_t p = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) * kCountPixels; p < pixels;
         p += step) {
      Run run;
      const int count = pixels - p < kCountPixels ? static_cast<int>(pixels - p) : kCountPixels;
      if (aligned && count == kCountPixels) {
        run = *reinterpret_cast<const Run*>(from + p);
      } else {
#pragma unroll
        for (int v = 0; v < kCountPixels; ++v) run.lane[v] = from[p + (v < count ? v : 0)];
      }
      int y[kCountPixels];
#pragma unroll
      for (int v = 0; v < kCountPixels; ++v) {
        y[v] = code_of(run.lane[v]);
        if (v >= count) continue;
        valid += y[v] != kIgnored;
        if (class_weight != nullptr && y[v] >= 0) sums[1] += class_weight[y[v]];
      }
      wide ? store_codes<short>(work.codes, p, y) : store_codes<signed char>(work.codes, p, y);
    }
  };
  switch (type) {
    case LabelType::kU8:
      encode(static_cast<uint8_t*>(nullptr));
      break;
    case LabelType::kI8:
      encode(static_cast<int8_t*>(nullptr));
      break;
    case LabelType::kI16:
      encode(static_cast<int16_t*>(nullptr));
      break;
    case LabelType::kI32:
      encode(static_cast<int32_t*>(nullptr));
      break;
    default:
      encode(static_cast<int64_t*>(nullptr));
  }
  sums[0] = valid;
  finish_count(sums, class_weight, classes, work, shared);
}

}  // namespace dsct::cuda
