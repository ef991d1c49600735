// What a mean divides by, and the sums of all blocks, which the last one to arrive adds up.
#pragma once

#include <algorithm>

#include "count.cuh"
#include "pixel.cuh"

namespace dsct::cuda {

// What the last block needs to finish.
template <typename A>
struct Result {
  A* loss;
  A* parts;
  A* grad_scale;
  bool mean, float16;  // float16: of the gradient
};

constexpr int kScratch = 96;  // doubles at the front of shared memory, for block_sum

// 1 / count and 1 / sum of weights of a mean, and the power of two, 2^outside, that a gradient is stored divided by.
struct Norms {
  double kd = 1, ce = 1;
  int outside = 0;
};

// Mean: CE over the sum of the weights (F.cross_entropy's rule), TNKD over the valid pixels; over nothing it is 0.
//
// A float16 gradient has to wait for the upstream gradient, often a GradScaler's 65536, with its digits: what is
// smaller than 6e-5, as a mean over many pixels is, would lose them. So a power of two (which rounds once) is left to
// grad_scale, such that no entry can reach 2^15; float16 ends at 65504. What bounds the entries lies on the device:
// every block comes to the same power by itself, and the host is not asked.
template <typename A>
DSCT_DEVICE Norms norms_of(const Totals& totals, const Terms<A>& terms, const Workspace& work,
                           const Result<A>& result) {
  Norms norms;
  if (result.mean && totals.count > 0) norms.kd = 1 / totals.count;
  if (result.mean && totals.weight != 0) norms.ce = 1 / totals.weight;
  if (result.float16) {
    double bound = static_cast<double>(terms.temperature) * (terms.tckd_weight + terms.nckd_weight) * norms.kd;
    if (terms.with_ce) bound += terms.ce_weight * *work.largest_weight * norms.ce;
    if (bound > 0 && bound < infinity<double>()) norms.outside = std::clamp(ilogb(bound) - 14, -126, 126);
  }
  return norms;
}

// Adds this block's sums to the result; the last block to arrive reduces all of them in block order.
template <typename A>
DSCT_DEVICE void finish_block(const PixelLoss<A>& total, const Terms<A>& terms, const Workspace& work,
                              const Result<A>& result, double* scratch) {
  double sums[3] = {static_cast<double>(total.ce), static_cast<double>(total.tckd), static_cast<double>(total.nckd)};
  __syncthreads();  // scratch may still be read
  block_sum(sums, scratch);
  __syncthreads();
  if (threadIdx.x == 0) {
    double* mine = work.partials + 3 * static_cast<int64_t>(blockIdx.x);
    mine[0] = sums[0], mine[1] = sums[1], mine[2] = sums[2];
    __threadfence();
    scratch[0] = atomicAdd(work.ticket, 1u) == gridDim.x - 1 ? 1.0 : 0.0;
    __threadfence();  // the other blocks' partials are read after this
  }
  __syncthreads();
  const bool last = scratch[0] != 0.0;
  if (!last) return;
  __syncthreads();
  sums[0] = sums[1] = sums[2] = 0;
#pragma unroll 4
  for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) {
    const double* partial = work.partials + 3 * static_cast<int64_t>(i);
    sums[0] += load_from_l2(partial), sums[1] += load_from_l2(partial + 1), sums[2] += load_from_l2(partial + 2);
  }
  block_sum(sums, scratch);
  __syncthreads();
  const Totals totals = add_counts(work, scratch);
  if (threadIdx.x == 0) {
    const Norms norms = norms_of(totals, terms, work, result);
    const double squared = static_cast<double>(terms.temperature) * terms.temperature;
    const double part[3] = {sums[0] * norms.ce, sums[1] * norms.kd * squared, sums[2] * norms.kd * squared};
    const double weight[3] = {terms.ce_weight, terms.tckd_weight, terms.nckd_weight};
    double loss = 0;
    for (int i = 0; i < 3; ++i) {
      result.parts[i] = static_cast<A>(i == 0 && weight[0] == 0 ? 0 : part[i]);  // CE that takes no part is reported 0
      // Weight 0 takes no part, 0 * inf would be NaN; but a NaN is never hidden.
      if (weight[i] != 0 || part[i] != part[i]) loss += weight[i] * part[i];
    }
    if (result.loss != nullptr) *result.loss = static_cast<A>(loss);
    *result.grad_scale = static_cast<A>(scalbn(1.0, norms.outside));
  }
}

// What a gradient is multiplied by before it is stored.
template <typename A>
struct Factors {
  A kd, ce;
};
template <typename A>
DSCT_DEVICE Factors<A> factors_of(const Norms& norms) {
  return {static_cast<A>(scalbn(norms.kd, -norms.outside)), static_cast<A>(scalbn(norms.ce, -norms.outside))};
}

}  // namespace dsct::cuda
