// What a mean divides by, and the sums of all blocks, which the last one to arrive adds up.
#pragma once

#include <algorithm>

#include "pixel.cuh"

namespace dsct::cuda {

// 1 / count and 1 / sum of weights of a mean, and the power of two, 2^outside, that a gradient is stored divided by.
struct Norms {
  double kd = 1, ce = 1;
  int outside = 0;
};

// What all pixels of a block need: made by one of its warps, at the front of shared memory.
struct Head {
  Terms terms;
  float kd, ce;  // factors of a gradient that is stored
  Norms norms;
};
constexpr int kScratch = 3 * kWarp;  // doubles behind it, for block_sum
constexpr int kHeadBytes = (sizeof(Head) + 15) / 16 * 16 + kScratch * sizeof(double);

// Mean: CE over the sum of the weights (F.cross_entropy's rule), TNKD over the valid pixels; over nothing it is 0.
//
// A float16 gradient has to wait for the upstream gradient, often a GradScaler's 65536, with its digits: what is
// smaller than 6e-5, as a mean over many pixels is, would lose them. So a power of two (which rounds once) is left to
// grad_scale, such that no entry can reach 2^15; float16 ends at 65504. What bounds the entries lies on the device:
// every block comes to the same power by itself, and the host is not asked.
DSCT_DEVICE const Head& set_up(unsigned char* shared, const Call& in) {
  Head& head = *reinterpret_cast<Head*>(shared);
  if (threadIdx.x < kWarp) {
    double count = 0, weight = 0;
    for (int i = threadIdx.x; i < in.work.count_blocks; i += kWarp) {
      count += in.work.counts[i], weight += in.work.weights[i];
    }
    count = warp_sum(count), weight = warp_sum(weight);
    if (threadIdx.x == 0) {
      const Terms terms = head.terms = terms_of(in);
      Norms norms;
      if (in.mean && count > 0) norms.kd = 1 / count;
      if (in.mean && weight != 0) norms.ce = 1 / weight;
      if (in.float16) {
        double bound = static_cast<double>(terms.temperature) * (terms.tckd_weight + terms.nckd_weight) * norms.kd;
        if (terms.with_ce) bound += terms.ce_weight * *in.work.largest_weight * norms.ce;
        bound *= in.gathered;
        if (bound > 0 && bound < infinity<double>()) norms.outside = std::clamp(ilogb(bound) - 14, -126, 126);
      }
      head.norms = norms;
      head.kd = static_cast<float>(scalbn(norms.kd, -norms.outside));
      head.ce = static_cast<float>(scalbn(norms.ce, -norms.outside));
    }
  }
  __syncthreads();
  return head;
}

// Adds this block's sums to the result; the last block to arrive reduces all of them in block order.
DSCT_DEVICE void finish_block(const PixelLoss& total, const Head& head, const Call& in) {
  double* scratch = reinterpret_cast<double*>(reinterpret_cast<uintptr_t>(&head) + kHeadBytes) - kScratch;
  double sums[3] = {static_cast<double>(total.ce), static_cast<double>(total.tckd), static_cast<double>(total.nckd)};
  block_sum(sums, scratch);
  __syncthreads();
  if (threadIdx.x == 0) {
    double* mine = in.work.partials + 3 * static_cast<int64_t>(blockIdx.x);
    mine[0] = sums[0], mine[1] = sums[1], mine[2] = sums[2];
    __threadfence();
    scratch[0] = atomicAdd(in.work.ticket, 1u) == gridDim.x - 1 ? 1.0 : 0.0;
    __threadfence();  // the other blocks' partials are read after this
  }
  __syncthreads();
  const bool last = scratch[0] != 0.0;
  if (!last) return;
  __syncthreads();
  sums[0] = sums[1] = sums[2] = 0;
#pragma unroll 4
  for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) {
    const double* partial = in.work.partials + 3 * static_cast<int64_t>(i);
    sums[0] += load_from_l2(partial), sums[1] += load_from_l2(partial + 1), sums[2] += load_from_l2(partial + 2);
  }
  block_sum(sums, scratch);
  if (threadIdx.x == 0) {
    const Terms& terms = head.terms;
    const Norms& norms = head.norms;
    const double squared = static_cast<double>(terms.temperature) * terms.temperature;
    const double part[3] = {sums[0] * norms.ce, sums[1] * norms.kd * squared, sums[2] * norms.kd * squared};
    const double weight[3] = {terms.ce_weight, terms.tckd_weight, terms.nckd_weight};
    double loss = 0;
    for (int i = 0; i < 3; ++i) {
      in.parts[i] = static_cast<float>(i == 0 && weight[0] == 0 ? 0 : part[i]);  // CE that takes no part is reported 0
      // Weight 0 takes no part, 0 * inf would be NaN; but a NaN is never hidden.
      if (weight[i] != 0 || part[i] != part[i]) loss += weight[i] * part[i];
    }
    if (in.loss != nullptr) *in.loss = static_cast<float>(loss);
    *in.grad_scale = static_cast<float>(scalbn(1.0, norms.outside));
  }
}

}  // namespace dsct::cuda
