// Matched CAFD on the GPU: per sample and channel, x = z / T,
//
//     KL(P^T || P^S) = sum_i P^T_i (x^T_i - x^S_i) - log(Z^T / Z^S)
//     gradient       = T w (P^S - P^T)
//
//   matched_sums      both maxima, both sums of exponentials, the cross term and sum |z^T|: each map is read once
//   matched_weights   per sample: joins the chunks of its rows, then weights and loss
//   matched_gradient  reads both maps again, from the last block to the first, and writes the gradient
//
// A thread has one channel and takes eight positions at a time: a run, where positions lie side by side in all of the
// tensors, or eight alone, wherever they lie; then neighbouring threads have neighbouring channels where those do.
// -inf in both networks is what is not there: beyond the last position, and where the mask says so. Differences are
// taken against maxima, and k = log2(e) / T is rounded once: networks that are equal are at exactly 0.
#pragma once

#include "network.cuh"
#include "weigh.cuh"

namespace dsct::cuda {

struct Matched {
  Features student, teacher, out;  // out: backward
  const bool* mask;                // (samples, positions) or nullptr
  Scales scales;
  bool uniform;
  double norm;  // 1 / samples for the mean, else 1
  // The plan.
  bool runs;
  int lanes, channel_tiles, chunks, threads;  // lanes: neighbouring threads with neighbouring channels
  int64_t chunk_positions;
  // Results.
  double* stats;          // (samples, kMatchedStats, channels)
  double *strength, *kl;  // (samples, channels)
  double* losses;         // (samples)
  float *partial, *loss;  // [samples][chunks][6][channels]; () or, with none, (samples)
  bool none;              // no reduction
  unsigned* ticket;       // of matched_weights, which matched_sums sets to 0
  const float* upstream;  // backward: every upstream_stride-th is a sample's
  int64_t upstream_stride;
  int64_t blocks() const { return student.samples * channel_tiles * chunks; }
  const char* name() const { return runs ? "rows" : lanes > 1 ? "columns" : "any"; }
};

inline void plan_matched(Matched& in, const Device& device, bool backward) {
  const Features& f = in.student;
  const int64_t positions = f.positions();
  in.runs = positions % kRun == 0 && rows_fit(f) && rows_fit(in.teacher) && (!backward || rows_fit(in.out)) &&
            reinterpret_cast<uintptr_t>(in.mask) % kRun == 0;
  in.lanes = 1;
  if (!in.runs && f.stride[1] == 1) in.lanes = static_cast<int>(ceil_div(f.channels, ceil_div(f.channels, 64)));
  // A thread is worth having, and so is a block, where it finds 32 positions.
  const int64_t wanted = ceil_div(positions * in.lanes, 32 * kWarp) * kWarp;
  in.threads = static_cast<int>(std::clamp<int64_t>(wanted, ceil_div(in.lanes, kWarp) * kWarp, kCafdThreads));
  in.channel_tiles = static_cast<int>(ceil_div(f.channels, in.lanes));
  const int64_t tiles = std::max<int64_t>(f.samples * in.channel_tiles, 1);
  const int64_t most = ceil_div(positions, in.threads / in.lanes * 32);
  const int64_t chunks =
      std::clamp<int64_t>(ceil_div(device.multiprocessors * 8, tiles), 1, std::min<int64_t>(most, 64));
  in.chunk_positions = ceil_div(ceil_div(positions, chunks), kRun) * kRun;
  in.chunks = static_cast<int>(ceil_div(positions, in.chunk_positions));
}

// Doubles that a call needs beside its results, and where they are.
inline int64_t matched_workspace(const Matched& in) {
  const int64_t rows = in.student.samples * in.student.channels;
  return kHead / 2 + in.student.samples + 2 * rows + 3 * rows * in.chunks;
}
inline void set_workspace(Matched& in, double* workspace) {
  const int64_t rows = in.student.samples * in.student.channels;
  in.ticket = &reinterpret_cast<Head*>(workspace)->ticket;
  in.losses = workspace + kHead / 2;
  in.strength = in.losses + in.student.samples;
  in.kl = in.strength + rows;
  in.partial = reinterpret_cast<float*>(in.kl + rows);
}

struct MatchedPlace {
  int64_t n, c, s_row, t_row, first, last;  // rows: where this channel starts; positions of this thread
  int chunk, lane, row, rows;
  bool inside;
};
DSCT_DEVICE MatchedPlace matched_place(const Matched& in, int64_t block) {
  MatchedPlace place;
  const unsigned number = static_cast<unsigned>(block), rest = number / in.channel_tiles;
  place.chunk = rest % in.chunks;
  place.n = rest / in.chunks;
  place.lane = threadIdx.x % in.lanes;
  place.row = threadIdx.x / in.lanes;
  place.rows = blockDim.x / in.lanes;
  place.c = static_cast<int64_t>(number % in.channel_tiles) * in.lanes + place.lane;
  place.inside = place.row < place.rows && place.c < in.student.channels;
  place.s_row = in.student.row(place.n, place.c), place.t_row = in.teacher.row(place.n, place.c);
  place.first = place.chunk * in.chunk_positions + place.row * (in.runs ? kRun : 1);
  const int64_t end = (place.chunk + 1) * in.chunk_positions, positions = in.student.positions();
  place.last = !place.inside ? 0 : end < positions ? end : positions;
  return place;
}

// Eight positions at a time, in parts of kCount: take(s, t, p), where part k is at p + k * hop.
template <int kCount, typename Take>
DSCT_DEVICE void walk_pairs(const Matched& in, const MatchedPlace& place, int64_t hop, const Take& take) {
  constexpr int kParts = kRun / kCount;
  const bool* mask = in.mask == nullptr ? nullptr : in.mask + place.n * in.student.positions();
  for (int64_t p = place.first; p < place.last; p += kParts * hop) {
    Numbers<kCount> raw_s[kParts], raw_t[kParts];
#pragma unroll
    for (int k = 0; k < kParts; ++k) {
      const int64_t i = p + k * hop;
      if (i >= place.last) break;
      raw_s[k].load(in.student.data, in.student.type, place.s_row + in.student.offset(i));
      raw_t[k].load(in.teacher.data, in.teacher.type, place.t_row + in.teacher.offset(i));
    }
    float s[kParts][kCount], t[kParts][kCount];
#pragma unroll
    for (int k = 0; k < kParts; ++k) {
      const int64_t i = p + k * hop;
      raw_s[k].values(in.student.type, s[k]);
      raw_t[k].values(in.teacher.type, t[k]);
      uint64_t counts = i < place.last ? ~uint64_t(0) : 0;  // a byte of each
      if (mask != nullptr && i < place.last) {
        counts = kCount == 1 ? mask[i] : *reinterpret_cast<const uint64_t*>(mask + i);
      }
#pragma unroll
      for (int v = 0; v < kCount; ++v) {
        if ((counts >> v * 8 & 0xff) == 0) s[k][v] = t[k][v] = -infinity<float>();
      }
    }
    take(s, t, p);
  }
}

template <typename Take>
DSCT_DEVICE void walk_pairs(const Matched& in, const MatchedPlace& place, const Take& take) {
  if (in.runs) return walk_pairs<kRun>(in, place, place.rows * kRun, take);
  walk_pairs<1>(in, place, place.rows, take);
}

// ------------------------------------------------------------------------------------------------------------- forward

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
  template <int kParts, int kCount>
  DSCT_DEVICE void take(const A (&s)[kParts][kCount], const A (&t)[kParts][kCount], A k) {
    A to_t = max_t, to_s = max_s;
#pragma unroll
    for (int i = 0; i < kParts * kCount; ++i) {
      to_t = larger(to_t, t[i / kCount][i % kCount]), to_s = larger(to_s, s[i / kCount][i % kCount]);
    }
    move(to_t, to_s, k);
    const A base_t = base_of(to_t), base_s = base_of(to_s);
#pragma unroll
    for (int i = 0; i < kParts * kCount; ++i) {
      const A z = t[i / kCount][i % kCount], x_t = z - base_t, x_s = s[i / kCount][i % kCount] - base_s;
      const A e_t = exp2_fast(x_t * k);
      sum_t += e_t;
      sum_s += exp2_fast(x_s * k);
      if (e_t != 0) cross += e_t * (x_t - x_s);  // 0 log 0 = 0; a NaN is no 0
      if (z != -infinity<A>()) strength += ::fabs(z);
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

__global__ void __launch_bounds__(kCafdThreads, 3) matched_sums(const __grid_constant__ Matched in) {
  release_next();
  DSCT_SHARED(shared);
  if (blockIdx.x == 0 && threadIdx.x == 0) *in.ticket = 0;
  const MatchedPlace place = matched_place(in, blockIdx.x);
  const float k = in.scales.get().spatial2;
  MatchedSums<float> mine;
  walk_pairs(in, place, [&](const auto& s, const auto& t, int64_t) { mine.take(s, t, k); });
  MatchedSums<float>* sums = reinterpret_cast<MatchedSums<float>*>(shared);
  join_rows(sums, mine, place.row, place.rows, in.lanes, [&](auto& to, const auto& other) { to.add(other, k); });
  sums += threadIdx.x;
  if (place.row > 0 || !place.inside) return;
  const int64_t channels = in.student.channels;
  float* to = in.partial + (place.n * in.chunks + place.chunk) * 6 * channels + place.c;
  to[0] = sums->max_t, to[channels] = sums->max_s, to[2 * channels] = sums->sum_t, to[3 * channels] = sums->sum_s;
  to[4 * channels] = sums->cross, to[5 * channels] = sums->strength;
}

// One block per sample; a thread has the same channels throughout.
__global__ void __launch_bounds__(kCafdThreads, 1) matched_weights(const __grid_constant__ Matched in) {
  wait_for_previous();
  DSCT_SHARED(shared);
  double* scratch = reinterpret_cast<double*>(shared);
  const Scales scales = in.scales.get();
  const int64_t n = blockIdx.x, channels = in.student.channels;
  double *stats = in.stats + n * kMatchedStats * channels, *kl = in.kl + n * channels;
  double *strength = in.strength + n * channels, *weight = stats + kStatWeight * channels;
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    MatchedSums<double> sums;
    for (int chunk = 0; chunk < in.chunks; ++chunk) {
      const float* from = in.partial + (n * in.chunks + chunk) * 6 * channels + c;
      sums.add(
          {from[0], from[channels], from[2 * channels], from[3 * channels], from[4 * channels], from[5 * channels]},
          scales.spatial2);
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
  if (threadIdx.x > 0) return;
  in.losses[n] = loss[0] * scales.temperature * scales.temperature;
  if (in.none) {
    in.loss[n] = static_cast<float>(in.losses[n]);
  } else {
    add_up(in.losses, in.student.samples, in.ticket, in.norm, in.loss);
  }
}

// ------------------------------------------------------------------------------------------------------------ backward

// scale T w (P^S - P^T) = e^S a^S - e^T a^T, written so that it is exactly 0 for equal networks, and exact near them:
// (e^S - e^T) a + e^S (a^S - a)+ - e^T (a^T - a)+, a the smaller of the two.
__global__ void __launch_bounds__(kCafdThreads, 3) matched_gradient(const __grid_constant__ Matched in) {
  const MatchedPlace place = matched_place(in, gridDim.x - 1 - blockIdx.x);
  if (!place.inside) return;
  const Scales scales = in.scales.get();
  const int64_t channels = in.student.channels, out_row = in.out.row(place.n, place.c);
  const double* stats = in.stats + place.n * kMatchedStats * channels + place.c;
  const double scale = in.upstream[place.n * in.upstream_stride] * in.norm * scales.temperature;
  const double by_s = scale * stats[kStatWeight * channels] * stats[kStatStudentInverse * channels];
  const double by_t = scale * stats[kStatWeight * channels] * stats[kStatTeacherInverse * channels];
  const float both = static_cast<float>(by_s < by_t ? by_s : by_t), k = scales.spatial2;
  const float more_s = static_cast<float>(by_s < by_t ? 0 : by_s - by_t);
  const float more_t = static_cast<float>(by_s < by_t ? by_s - by_t : 0);
  const float base_s = static_cast<float>(stats[kStatStudentMax * channels]);
  const float base_t = static_cast<float>(stats[kStatTeacherMax * channels]);
  walk_pairs(
      in, place,
      [&]<int kParts, int kCount>(const float (&s)[kParts][kCount], const float (&t)[kParts][kCount], int64_t p) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const int64_t i = p + part * (place.rows * kCount);
          if (i >= place.last) break;
          float g[kCount];
#pragma unroll
          for (int v = 0; v < kCount; ++v) {
            const float e_s = exp2_fast((s[part][v] - base_s) * k), e_t = exp2_fast((t[part][v] - base_t) * k);
            const bool nobody = s[part][v] == -infinity<float>() && t[part][v] == -infinity<float>();
            g[v] = nobody ? 0 : (e_s - e_t) * both + (e_s * more_s + e_t * more_t);  // whatever comes from upstream
          }
          store_numbers(in.out, out_row + in.out.offset(i), g);
        }
      });
}

// -------------------------------------------------------------------------------------------------------------- launch

inline void matched_run(Matched& in, const Temperatures& temperatures, double* workspace, const Device& device,
                        cudaStream_t stream) {
  set_workspace(in, workspace);
  in.scales = scales_for(temperatures, reinterpret_cast<Head*>(workspace), stream);
  launch("matched_cafd", matched_sums, in.blocks(), in.threads, in.threads * sizeof(MatchedSums<float>), stream, in);
  launch_early("matched_cafd", device, matched_weights, in.student.samples,
               sample_threads(in.student.channels, kCafdThreads), kWarp * sizeof(double), stream, in);
}

inline void matched_backward_run(Matched& in, const Temperatures& temperatures, double* head, cudaStream_t stream) {
  in.scales = scales_for(temperatures, reinterpret_cast<Head*>(head), stream);
  launch("matched_cafd backward", matched_gradient, in.blocks(), in.threads, 0, stream, in);
}

}  // namespace dsct::cuda
