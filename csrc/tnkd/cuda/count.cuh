// count_pixels: the labels alone.
#pragma once

#include "labels.cuh"

namespace dsct::cuda {

// Where the workspace keeps what.
struct Workspace {
  unsigned* ticket;
  double* largest_weight;  // of a class, 1 without class weights
  double* counts;          // count_blocks
  double* weights;         // count_blocks
  double* partials;        // 3 sums a block of the main kernel
  int count_blocks;
};

constexpr int kCountThreads = 256, kCountPixels = 8;

// Partial counts of valid pixels and their class weights, and the ticket set to zero for the main kernel.
// kOnDevice, here and below: numbers may have to be read from device memory. A variant of its own, because numbers
// among a kernel's arguments cost no register.
template <typename A, bool kOnDevice>
__global__ void __launch_bounds__(kCountThreads, 1)
    count_pixels(Labels labels, Space space, PixelStride stride, int64_t pixels, const A* class_weight, bool count,
                 Workspace work) {
  release_next();
  if constexpr (kOnDevice) read_ignore(labels);
  DSCT_SHARED(shared);
  double sums[2] = {0, 0};
  if (count) {
    const int64_t first = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    int valid = 0;
    auto add = [&](int y) {
      valid += y != kIgnored;
      if (class_weight != nullptr && y >= 0) sums[1] += class_weight[y];
    };
    int64_t done = 0;
    if (labels.packs) {
      done = pixels / kCountPixels * kCountPixels;
      for (int64_t p = first * kCountPixels; p < done; p += step * kCountPixels) {
        int y[kCountPixels];
        load_labels(labels, p, y);
#pragma unroll
        for (int v = 0; v < kCountPixels; ++v) add(y[v]);
      }
    }
    for (int64_t p = done + first; p < pixels; p += step) add(load_label(labels, offset_of(p, space, stride.at)));
    sums[0] = valid;
  } else if (blockIdx.x == 0 && threadIdx.x == 0) {
    sums[0] = static_cast<double>(pixels);  // every pixel is valid
  }
  block_sum(sums, reinterpret_cast<double*>(shared));
  if (threadIdx.x == 0) {
    work.counts[blockIdx.x] = sums[0];
    work.weights[blockIdx.x] = class_weight == nullptr ? sums[0] : sums[1];
    if (blockIdx.x == 0) *work.ticket = 0;
  }
  if (blockIdx.x == 0 && threadIdx.x < kWarp) {
    A largest = class_weight == nullptr ? 1 : 0;
    if (class_weight != nullptr) {
      for (int k = threadIdx.x; k < labels.classes; k += kWarp) largest = larger(largest, class_weight[k]);
      largest = warp_max(largest);
    }
    if (threadIdx.x == 0) *work.largest_weight = largest;
  }
}

// The totals of count_pixels, in every thread. Each block adds the few partials up again, in the same order: cheaper
// than one more launch. Needs 64 doubles of shared memory, and a barrier before they are used again.
struct Totals {
  double count = 0, weight = 0;
};
DSCT_DEVICE Totals add_counts(const Workspace& work, double* scratch) {
  double sums[2] = {0, 0};
  for (int i = threadIdx.x; i < work.count_blocks; i += blockDim.x) {
    sums[0] += work.counts[i];
    sums[1] += work.weights[i];
  }
  block_sum(sums, scratch);
  return {sums[0], sums[1]};
}

}  // namespace dsct::cuda
