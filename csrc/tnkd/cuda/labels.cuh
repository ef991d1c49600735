// encode_labels: labels of any integer type become codes of 8 or 16 bits, and are counted.
#pragma once

#include <type_traits>

#include "call.cuh"

namespace dsct::cuda {

constexpr int kIgnored = -1;  // the code of a label that is ignore_index
constexpr int kBad = -2;      // and of one that is no class at all
constexpr int kCountThreads = 256, kCountPixels = 8;

// kIgnored where there are none.
template <bool kWide, int kPixels>
DSCT_DEVICE void load_codes(const void* codes, int64_t pixel, bool inside, int (&y)[kPixels]) {
  using Code = std::conditional_t<kWide, short, signed char>;
  const auto run = *reinterpret_cast<const Pack<Code, kPixels>*>(static_cast<const Code*>(codes) + pixel);
#pragma unroll
  for (int v = 0; v < kPixels; ++v) y[v] = inside ? run.lane[v] : kIgnored;
}

// A block's counts of valid pixels and of their class weights, and what the main kernel finds beside them.
DSCT_DEVICE void finish_count(double (&sums)[2], const Call& in, unsigned char* shared) {
  block_sum(sums, reinterpret_cast<double*>(shared));
  if (threadIdx.x == 0) {
    in.work.counts[blockIdx.x] = sums[0];
    in.work.weights[blockIdx.x] = in.class_weight == nullptr ? sums[0] : sums[1];
    if (blockIdx.x == 0) *in.work.ticket = 0;
  }
  if (blockIdx.x == 0 && threadIdx.x < kWarp) {
    float largest = in.class_weight == nullptr ? 1 : 0;
    if (in.class_weight != nullptr) {
      for (int k = threadIdx.x; k < in.classes; k += kWarp) largest = larger(largest, in.class_weight[k]);
      largest = warp_max(largest);
    }
    if (threadIdx.x == 0) *in.work.largest_weight = largest;
  }
}

// Calls body with a number of the labels' type.
template <typename Body>
DSCT_DEVICE void by_label_type(LabelType type, const Body& body) {
  if (type == LabelType::kU8) return body(uint8_t{});
  if (type == LabelType::kI8) return body(int8_t{});
  if (type == LabelType::kI16) return body(int16_t{});
  if (type == LabelType::kI32) return body(int32_t{});
  body(int64_t{});
}

// Codes, partial counts of valid pixels and of their class weights, and the ticket set to zero for the main kernel.
__global__ void __launch_bounds__(kCountThreads, 1) encode_labels(Call in, bool wide) {
  release_next();
  DSCT_SHARED(shared);
  const int64_t ignore = in.ignore_index_value == nullptr ? in.ignore_index : *in.ignore_index_value;
  const bool aligned = reinterpret_cast<uintptr_t>(in.target) % 16 == 0;
  int valid = 0;
  double sums[2] = {0, 0};
  by_label_type(in.target_type, [&](auto zero) {
    using L = decltype(zero);
    const L* from = static_cast<const L*>(in.target);
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * kCountPixels;
    for (int64_t p = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) * kCountPixels; p < in.labels;
         p += step) {
      Pack<L, kCountPixels> run;
      const int count = in.labels - p < kCountPixels ? static_cast<int>(in.labels - p) : kCountPixels;
      if (aligned && count == kCountPixels) {
        run = *reinterpret_cast<const Pack<L, kCountPixels>*>(from + p);
      } else {
#pragma unroll
        for (int v = 0; v < kCountPixels; ++v) run.lane[v] = from[p + (v < count ? v : 0)];
      }
      Pack<short, kCountPixels> codes;
      Pack<signed char, kCountPixels> narrow;
#pragma unroll
      for (int v = 0; v < kCountPixels; ++v) {
        const int64_t label = run.lane[v];
        const bool ignored = in.has_ignore && label == ignore;
        const bool known = static_cast<uint64_t>(label) < static_cast<uint64_t>(in.classes);
        const int y = ignored ? kIgnored : known ? static_cast<int>(label) : kBad;
        codes.lane[v] = static_cast<short>(y), narrow.lane[v] = static_cast<signed char>(y);
        if (v >= count) continue;
        valid += y != kIgnored;
        if (in.class_weight != nullptr && y >= 0) sums[1] += in.class_weight[y];
      }
      if (wide) *reinterpret_cast<Pack<short, kCountPixels>*>(static_cast<short*>(in.work.codes) + p) = codes;
      if (!wide) *reinterpret_cast<Pack<signed char, kCountPixels>*>(static_cast<char*>(in.work.codes) + p) = narrow;
    }
  });
  sums[0] = valid;
  finish_count(sums, in, shared);
}

}  // namespace dsct::cuda
