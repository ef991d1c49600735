// tnkd_kernel: loss and gradient in one pass over the logits, which stay in registers.
#pragma once

#include "planes.cuh"
#include "result.cuh"
#include "tnkd/plan.h"

// What a build that only counts instructions knows of a call, so that its code has one path (tools/inspect/nvcc.py).
#ifndef DSCT_KNOWN
#define DSCT_KNOWN(in, terms, y, warps, inside)
#endif

namespace dsct::cuda {

// Of pixel v, from a thread's classes: the largest logits, and exponentials from there, which the gradient needs again
// and take the logits' place, and their sums. Classes that are absent, and the target, are -inf.
template <int kClasses>
DSCT_DEVICE PixelSums sum_exponentials(float (&es)[kClasses], float (&et)[kClasses], const Terms& terms, float& max_s,
                                       float& max_t) {
  max_s = max_t = -infinity<float>();
#pragma unroll
  for (int i = 0; i < kClasses; ++i) max_s = larger(max_s, es[i]), max_t = larger(max_t, et[i]);
  PixelSums z = from_bases(max_s, max_t, terms);
  if (terms.own_exponentials()) {
#pragma unroll
    for (int i = 0; i < kClasses; ++i) z.ce_sum += exp2_fast(fmaf(es[i], kLog2E, -z.ce_base));
  }
#pragma unroll
  for (int i = 0; i < kClasses; ++i) {
    const float ds = fmaf(es[i], terms.log2_scale, -z.student_base);
    const float dt = fmaf(et[i], terms.log2_scale, -z.teacher_base);
    es[i] = exp2_fast(ds), et[i] = exp2_fast(dt);
    z.student_sum += es[i], z.teacher_sum += et[i];
    if (et[i] != 0) z.cross = fmaf(et[i], dt - ds, z.cross);  // 0 * log 0 = 0
  }
  if (terms.squares()) {  // exp(d) = exp(d / 2)^2
#pragma unroll
    for (int i = 0; i < kClasses; ++i) z.ce_sum = fmaf(es[i], es[i], z.ce_sum);
  } else if (!terms.own_exponentials()) {
    z.ce_sum = z.student_sum;
  }
  return z;
}

// kSplit: what a warp leaves of a pixel for the one that judges it, its sums from its own largest logits; and what that
// one answers: the largest logits of all, and the factors of the exponentials.
enum Part { kMaxS, kMaxT, kSumS, kSumT, kCross, kSumCe, kParts };
enum Verdict { kAllS, kAllT, kGradS, kGradT, kGradCe, kGradTarget, kVerdicts };

// The sums over all warps' classes. `part(i, w)` is what warp w left.
template <typename Left>
DSCT_DEVICE PixelSums join_warps(const Left& part, int warps, const Terms& terms, float& max_s, float& max_t) {
  max_s = max_t = -infinity<float>();
  for (int w = 0; w < warps; ++w) max_s = larger(max_s, part(kMaxS, w)), max_t = larger(max_t, part(kMaxT, w));
  PixelSums z = from_bases(max_s, max_t, terms);
  for (int w = 0; w < warps; ++w) {
    const PixelSums mine = from_bases(part(kMaxS, w), part(kMaxT, w), terms);
    const float up_s = mine.student_base - z.student_base, up_t = mine.teacher_base - z.teacher_base;
    const float sum_s = part(kSumS, w), sum_t = part(kSumT, w);
    if (sum_s != 0) {  // else none of its classes is there, and its base says nothing
      z.student_sum = fmaf(sum_s, exp2_fast(up_s), z.student_sum);
      if (terms.with_ce) z.ce_sum = fmaf(part(kSumCe, w), exp2_fast(mine.ce_base - z.ce_base), z.ce_sum);
    }
    if (sum_t != 0) {
      const float scale = exp2_fast(up_t);
      z.teacher_sum = fmaf(sum_t, scale, z.teacher_sum);
      if (scale != 0) z.cross = fmaf(fmaf(up_t - up_s, sum_t, part(kCross, w)), scale, z.cross);
    }
  }
  return z;
}

// What came of all the sums: the factors of the gradient, the bases of all, and what takes the exponentials from a
// warp's own bases there. Where none of its classes is there, there is nothing to scale.
template <typename Answer>
DSCT_DEVICE PixelGrad take_verdict(const Answer& answer, float max_s, float max_t, const Terms& terms, PixelSums& all,
                                   float& up_s, float& up_t) {
  all = from_bases(answer(kAllS), answer(kAllT), terms);
  const PixelSums mine = from_bases(max_s, max_t, terms);
  up_s = max_s == -infinity<float>() ? 0 : exp2_fast(mine.student_base - all.student_base);
  up_t = max_t == -infinity<float>() ? 0 : exp2_fast(mine.teacher_base - all.teacher_base);
  return {answer(kGradS), answer(kGradT), answer(kGradCe), answer(kGradTarget)};
}

constexpr int kWholeThreads = 128, kMostWarps = 16;  // a block's; of these each has classes of its own
constexpr int kMostClasses = most_held(kMostWarps);  // a thread's
constexpr int tile_pixels(bool split, int pixels) { return (split ? kWarp : kWholeThreads) * pixels; }
constexpr int exchange_bytes(int warps, int tile) { return warps == 1 ? 0 : (kParts * warps + kVerdicts) * tile * 4; }

// The gradient takes the exponentials' place. up_s, up_t: from the base that they are from to the one that is meant.
// logit(i): the student's once more, where cross-entropy needs exponentials of its own, from ce_base.
template <int kClasses, typename Logit>
DSCT_DEVICE void differentiate(float (&es)[kClasses], const float (&et)[kClasses], const Terms& terms,
                               const PixelGrad& grad, float up_s, float up_t, float ce_base, const Logit& logit) {
  const float by_t = grad.teacher * up_t;
  if (terms.squares()) {
    const float once = grad.student * up_s, twice = grad.ce * up_s * up_s;
#pragma unroll
    for (int i = 0; i < kClasses; ++i) es[i] = fmaf(fmaf(twice, es[i], once), es[i], by_t * et[i]);
  } else {  // at temperature 1 cross-entropy's exponentials are the student's
    const bool own = terms.own_exponentials();
    const float once = (own ? grad.student : grad.student + grad.ce) * up_s;
#pragma unroll
    for (int i = 0; i < kClasses; ++i) es[i] = fmaf(once, es[i], by_t * et[i]);
    if (!own) return;
#pragma unroll
    for (int i = 0; i < kClasses; ++i) es[i] = fmaf(grad.ce, exp2_fast(fmaf(logit(i), kLog2E, -ce_base)), es[i]);
  }
}

// What a pixel is judged by: threads that do not judge need no weights. Out of shared memory, they take no register all
// the way.
DSCT_DEVICE Terms judged_by(const Head& head, const Terms& terms) {
  Terms judged = head.terms;
  judged.with_ce = terms.with_ce, judged.two_classes = terms.two_classes, judged.coupled = terms.coupled;
  judged.temperature = terms.temperature;
  return judged;
}

// A thread holds the classes of neighbouring pixels, both networks': all of them, or (kSplit) what is its warp's; the
// warps of a block then meet twice, to hand in their sums and to read what came of them.
template <typename Source, int kClasses, bool kSplit>
__global__ void __launch_bounds__(kSplit ? kMostWarps * kWarp : kWholeThreads, kSplit ? 1 : 4) tnkd_kernel(Logits in) {
  constexpr int kPixels = Source::kPixels, kTile = tile_pixels(kSplit, kPixels);
  DSCT_SHARED(shared);
  wait_for_previous();
  const Head& head = set_up(shared, in);
  Terms terms = head.terms;
  int warps = kSplit ? blockDim.x / kWarp : 1;
  const int warp = kSplit ? threadIdx.x / kWarp : 0;
  const int lane = kSplit ? threadIdx.x % kWarp : threadIdx.x;
  // kSplit: [kParts][warps][kTile], then [kVerdicts][kTile], then the tiles.
  float *parts = reinterpret_cast<float*>(shared + kHeadBytes), *verdicts = parts + kParts * warps * kTile;
  auto part = [&](int v, int i, int w) -> float& { return parts[(i * warps + w) * kTile + v * kWarp + lane]; };
  auto verdict = [&](int v, int i) -> float& { return verdicts[i * kTile + v * kWarp + lane]; };
  unsigned char* tiles = kSplit ? reinterpret_cast<unsigned char*>(verdicts + kVerdicts * kTile) : shared + kHeadBytes;

  Source p(in, tiles, warp, warps);
  PixelLoss total{};
  for (unsigned t = blockIdx.x; t < in.tiles; t += gridDim.x) {
    p.enter(kTile, lane * kPixels);
    p.fetch();
    int y[kPixels];
    load_codes<kSplit>(in.work.codes, p.pixel(), p.inside, y);
    DSCT_KNOWN(in, terms, y, warps, p.inside)
    float es[kPixels][kClasses], et[kPixels][kClasses];
    p.load(es, et);

    auto judge = [&](int v, int label, PixelSums z, PixelGrad& grad) {
      if (label >= 0) {
        z.student_target = logit_at<Source::kS>(p, in.student, v, label);
        z.teacher_target = logit_at<Source::kT>(p, in.teacher, v, label);
      }
      const Terms judged = kSplit ? judged_by(head, terms) : terms;
      PixelLoss loss;
      judge_pixel(z, label, judged, in.class_weight, head.kd, head.ce, loss, grad);
      total.ce += loss.ce, total.tckd += loss.tckd, total.nckd += loss.nckd;
      if (in.loss_map != nullptr && p.inside) in.loss_map[p.pixel() + v] = pixel_loss(loss, judged);
    };
    auto logit_of = [&](int v) {  // of the thread's class i; 0 where there is none, or nobody asks
      return [&, v](int i) {
        const float z = i < p.classes ? logit_at<Source::kS>(p, in.student, v, p.first + i) : 0;
        return y[v] == kIgnored ? 0 : z;
      };
    };
    float target[kPixels];
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      if (y[v] == kIgnored) {  // whatever stands there
#pragma unroll
        for (int i = 0; i < kClasses; ++i) es[v][i] = et[v][i] = 0;
      }
#pragma unroll
      for (int i = 0; i < kClasses; ++i) {
        const bool target = i == y[v] - p.first;  // selects: a branch would become an index, and the arrays memory
        es[v][i] = target ? -infinity<float>() : es[v][i], et[v][i] = target ? -infinity<float>() : et[v][i];
      }
      float max_s, max_t;
      const PixelSums z = sum_exponentials(es[v], et[v], terms, max_s, max_t);
      if constexpr (kSplit) {
        const float mine[kParts] = {max_s, max_t, z.student_sum, z.teacher_sum, z.cross, z.ce_sum};
#pragma unroll
        for (int i = 0; i < kParts; ++i) part(v, i, warp) = mine[i];
      } else {
        PixelGrad grad;
        judge(v, y[v], z, grad);
        differentiate(es[v], et[v], terms, grad, 1, 1, z.ce_base, logit_of(v));
        target[v] = grad.target;
      }
    }
    if constexpr (kSplit) {
      __syncthreads();
#pragma unroll
      for (int v = 0; v < kPixels; ++v) {
        if (warp != v) continue;
        float all_s, all_t;
        const PixelSums z = join_warps([&](int i, int w) { return part(v, i, w); }, warps, terms, all_s, all_t);
        PixelGrad g;
        judge(v, y[v], z, g);
        const float answer[kVerdicts] = {all_s, all_t, g.student, g.teacher, g.ce, g.target};
#pragma unroll
        for (int i = 0; i < kVerdicts; ++i) verdict(v, i) = answer[i];
      }
      __syncthreads();
#pragma unroll
      for (int v = 0; v < kPixels; ++v) {  // largest logits from shared memory again: until now they take no register
        PixelSums all;
        float up_s, up_t;
        const PixelGrad grad = take_verdict([&](int i) { return verdict(v, i); }, part(v, kMaxS, warp),
                                            part(v, kMaxT, warp), terms, all, up_s, up_t);
        differentiate(es[v], et[v], terms, grad, up_s, up_t, all.ce_base, logit_of(v));
      }
    }
    if (in.grad.data != nullptr) {
      if (p.inside) {
        p.store(es);
#pragma unroll
        for (int v = 0; v < kPixels; ++v) {  // over what was stored: no register is chosen by y
          if (y[v] < p.first || y[v] >= p.first + p.classes) continue;
          store_at(p, v, y[v], kSplit ? verdict(v, kGradTarget) : target[v]);
        }
      }
      p.put_back();
    }
    p.next();
  }
  finish_block(total, head, in);
}

}  // namespace dsct::cuda
