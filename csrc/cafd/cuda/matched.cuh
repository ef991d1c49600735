// Matched CAFD on the GPU: per sample and channel, x = z / T,
//
//     KL(P^T || P^S) = sum_i P^T_i (x^T_i - x^S_i) - log(Z^T / Z^S)
//     gradient       = T w (P^S - P^T)
//
//   matched_sums      both maxima, both sums of exponentials, the cross term and sum |z^T|: each map is read once
//   matched_weights   per sample: joins the chunks of its rows, then weights and loss
//   matched_gradient  reads both maps again, from the last block to the first, and writes the gradient
//
// The layout of the student decides how threads share out the maps; whatever the teacher's is, it is read in place.
// -inf in both networks is what is not there: beyond the last position, and where the mask says so. Differences are
// taken against maxima, and k = log2(e) / T is rounded once: networks that are equal are at exactly 0.
#pragma once

#include "cafd/stats.h"
#include "sample.cuh"
#include "walk.cuh"

namespace dsct::cuda {

// What is taken from numbers of which this is the largest: 0 if all of them are -inf.
template <typename A>
DSCT_DEVICE A base_of(A max) {
  return max == -infinity<A>() ? A(0) : max;
}

template <typename A>
struct MatchedSums {
  A max_t = -infinity<A>(), max_s = -infinity<A>(), sum_t = 0, sum_s = 0, cross = 0, strength = 0;

  // To maxima that are no smaller. What has no mass, or so little that it has none, does not ask what the student has.
  DSCT_DEVICE void move(A to_t, A to_s, A k) {
    const A base_t = base_of(to_t), base_s = base_of(to_s);
    const A scale_t = exp2_fast((max_t - base_t) * k), scale_s = exp2_fast((max_s - base_s) * k);
    const A shift = (base_of(max_t) - base_t) - (base_of(max_s) - base_s);
    cross = scale_t == 0 ? A(0) : scale_t * (cross + sum_t * shift);
    sum_t *= scale_t, sum_s *= scale_s;
    max_t = to_t, max_s = to_s;
  }
  DSCT_DEVICE void take(const A (&s)[kRun], const A (&t)[kRun], A k) {
    A to_t = max_t, to_s = max_s;
#pragma unroll
    for (int v = 0; v < kRun; ++v) to_t = larger(to_t, t[v]), to_s = larger(to_s, s[v]);
    move(to_t, to_s, k);
    const A base_t = base_of(to_t), base_s = base_of(to_s);
#pragma unroll
    for (int v = 0; v < kRun; ++v) {
      const A x_t = t[v] - base_t, x_s = s[v] - base_s;
      const A e_t = exp2_fast(x_t * k);
      sum_t += e_t;
      sum_s += exp2_fast(x_s * k);
      if (e_t != 0) cross += e_t * (x_t - x_s);  // 0 log 0 = 0; a NaN is no 0
      if (t[v] != -infinity<A>()) strength += ::fabs(t[v]);
    }
  }
  DSCT_DEVICE void add(const MatchedSums& theirs, A k) {
    MatchedSums other = theirs;
    const A to_t = larger(max_t, other.max_t), to_s = larger(max_s, other.max_s);
    move(to_t, to_s, k);
    other.move(to_t, to_s, k);
    sum_t += other.sum_t, sum_s += other.sum_s, cross += other.cross, strength += other.strength;
  }
};

struct Matched {
  Features student, teacher, out;  // out: backward
  const bool* mask;                // (samples, positions) or nullptr
  Temperatures temperatures;
  bool uniform;
  Losses losses;
  CafdPlan plan;
  double* stats;          // (samples, kMatchedStats, channels)
  double *strength, *kl;  // (samples, channels)
  MatchedSums<float>* sums;
  const float* upstream;  // backward: every upstream_stride-th is a sample's
  int64_t upstream_stride;
  DSCT_DEVICE const bool* mask_of(int64_t n) const { return mask == nullptr ? mask : mask + n * student.positions; }
};

// ------------------------------------------------------------------------------------------------------------- forward

__global__ void __launch_bounds__(kCafdThreads, 3) matched_sums(const __grid_constant__ Matched in) {
  release_next();
  DSCT_SHARED(shared);
  in.losses.open(in.student.samples);
  const CafdPlace place = place_of(in.student, in.plan, blockIdx.x);
  const float k = in.temperatures.get().spatial2;
  MatchedSums<float> mine;
  walk_pairs(in.student, in.teacher, place, in.mask_of(place.n), -infinity<float>(),
             [&](const auto& s, const auto& t, int64_t) { mine.take(s, t, k); });
  const auto add = [&](MatchedSums<float>& to, const MatchedSums<float>& other) { to.add(other, k); };
  put(in.sums, in.plan, place, join_rows(shared, mine, place, add));
}

// One block per sample; a thread has the same channels throughout.
__global__ void __launch_bounds__(kCafdThreads, 1) matched_weights(const __grid_constant__ Matched in) {
  wait_for_previous();
  DSCT_SHARED(shared);
  double* scratch = reinterpret_cast<double*>(shared);
  const Scales scales = in.temperatures.get();
  const int64_t n = blockIdx.x, channels = in.student.channels;
  double *stats = in.stats + n * kMatchedStats * channels, *kl = in.kl + n * channels;
  double *strength = in.strength + n * channels, *weight = stats + kStatWeight * channels;
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    MatchedSums<double> sums;
    for (int k = 0; k < in.plan.chunks; ++k) {
      const MatchedSums<float>& part = in.sums[in.plan.chunk_at(n, k, c)];
      sums.add({part.max_t, part.max_s, part.sum_t, part.sum_s, part.cross, part.strength}, scales.spatial2);
    }
    const double z_t = sums.sum_t, z_s = sums.sum_s, nothing = z_s - z_s;  // 0, or the NaN that the student has
    // The log of the ratio, not a difference of two logs: it keeps its digits where the networks agree.
    kl[c] = sums.cross / z_t * (scales.spatial2 * std::numbers::ln2) + ::log(z_s / z_t);
    if (z_s == 0 && z_t == z_t) kl[c] = infinity<double>();
    if (z_t == 0) kl[c] = nothing;
    stats[kStatStudentMax * channels + c] = base_of(sums.max_s);
    stats[kStatStudentInverse * channels + c] = z_t == 0 ? nothing : z_s == 0 ? 0 : 1 / z_s;
    stats[kStatTeacherMax * channels + c] = base_of(sums.max_t);
    stats[kStatTeacherInverse * channels + c] = z_t == 0 ? 0 : 1 / z_t;
    strength[c] = sums.strength;
    weight[c] = 1 / static_cast<double>(channels);
  }
  if (!in.uniform) weigh(strength, weight, channels, std::numbers::log2e / scales.channel_temperature, scratch);
  double loss[1] = {0};
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {  // a weight that is only rounded to 0 hides nothing
    loss[0] += weight[c] == 0 && kl[c] == infinity<double>() ? kl[c] : weight[c] * kl[c];
  }
  __syncthreads();  // scratch is used again
  block_sum(loss, scratch);
  const double squared = scales.temperature * scales.temperature;
  if (threadIdx.x == 0) in.losses.put(n, gridDim.x, loss[0] * squared);
}

// ------------------------------------------------------------------------------------------------------------ backward

// scale T w (P^S - P^T) = e^S a^S - e^T a^T, written so that it is exactly 0 for equal networks, and exact near them:
// (e^S - e^T) a + e^S (a^S - a)+ - e^T (a^T - a)+, a the smaller of the two.
__global__ void __launch_bounds__(kCafdThreads, 3) matched_gradient(const __grid_constant__ Matched in) {
  const CafdPlace place = place_of(in.student, in.plan, gridDim.x - 1 - blockIdx.x);
  if (!place.inside) return;
  const Scales scales = in.temperatures.get();
  const int64_t channels = in.student.channels;
  const double* stats = in.stats + place.n * kMatchedStats * channels + place.c;
  const double scale = in.upstream[place.n * in.upstream_stride] * in.losses.norm * scales.temperature;
  const double by_s = scale * stats[kStatWeight * channels] * stats[kStatStudentInverse * channels];
  const double by_t = scale * stats[kStatWeight * channels] * stats[kStatTeacherInverse * channels];
  const float both = static_cast<float>(by_s < by_t ? by_s : by_t), k = scales.spatial2;
  const float more_s = static_cast<float>(by_s < by_t ? 0 : by_s - by_t);
  const float more_t = static_cast<float>(by_s < by_t ? by_s - by_t : 0);
  const float base_s = static_cast<float>(stats[kStatStudentMax * channels]);
  const float base_t = static_cast<float>(stats[kStatTeacherMax * channels]);
  walk_pairs(in.student, in.teacher, place, in.mask_of(place.n), -infinity<float>(),
             [&](const auto& s, const auto& t, int64_t i) {
               float g[kRun];
#pragma unroll
               for (int v = 0; v < kRun; ++v) {
                 const float e_s = exp2_fast((s[v] - base_s) * k), e_t = exp2_fast((t[v] - base_t) * k);
                 const bool nobody = s[v] == -infinity<float>() && t[v] == -infinity<float>();
                 g[v] =
                     nobody ? 0 : (e_s - e_t) * both + (e_s * more_s + e_t * more_t);  // whatever comes from upstream
               }
               store(in.out, in.out.at(place.n, place.c, i), g, place.left(i));
             });
}

// -------------------------------------------------------------------------------------------------------------- launch

// Doubles that a forward needs beside its results.
inline int64_t matched_workspace(const Matched& in) {
  return in.student.samples * in.student.channels * 2 + in.plan.sums * 3;
}

inline void matched_run(Matched in, double* workspace, const Device& device, cudaStream_t stream) {
  const int64_t rows = in.student.samples * in.student.channels;
  in.strength = workspace, in.kl = workspace + rows;
  in.sums = reinterpret_cast<MatchedSums<float>*>(workspace + 2 * rows);
  launch("matched_cafd", matched_sums, in.plan.blocks, in.plan.threads, in.plan.threads * sizeof(MatchedSums<float>),
         stream, in);
  launch_early("matched_cafd", device, matched_weights, in.student.samples,
               sample_threads(in.student.channels, kCafdThreads), kWarp * sizeof(double), stream, in);
}

inline void matched_backward_run(const Matched& in, cudaStream_t stream) {
  launch("matched_cafd backward", matched_gradient, in.plan.blocks, in.plan.threads, 0, stream, in);
}

}  // namespace dsct::cuda
