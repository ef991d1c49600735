// TNKD and cross-entropy on the GPU: loss and gradient in one pass over the logits.
//
//   count_pixels   labels only: how many pixels are valid, and the sum of their class weights (block partials)
//   planes_whole   classes in planes (NCHW), few of them: a thread holds all classes of 16 bytes of pixels in registers
//   planes_split   more classes: groups of threads share them out and meet in shared memory
//   any_layout     one thread per pixel, any strides, any K, any dtype: what the fast kernels cannot take
//
// Every block writes its partial sums; the block that finishes last adds them up in block order, so the result does
// not depend on timing. This source also compiles for the host (see cuda_launch.h).
#pragma once

#include <algorithm>
#include <array>
#include <type_traits>

#include "../common/cuda_math.h"
#include "pixel_math.h"

namespace dsct::cuda {

enum class Label : int { kTeacher, kUInt8, kInt8, kInt16, kInt32, kInt64 };  // kTeacher: no target, its argmax serves

constexpr int kMaxDims = 6;
constexpr int kIgnored = -1;  // what a label becomes where it is ignore_index
constexpr int kBad = -2;      // and where it is no class at all

// Strides in elements. Dimension 0 of the logits is the batch, then space; classes apart. Neighbouring dimensions that
// every tensor steps through alike are merged by the caller.
struct Strides {
  int64_t pixel[kMaxDims];
  int64_t klass;
};

struct TnkdArgs {
  const void* student;
  const void* teacher;
  const void* target;        // or nullptr
  const void* class_weight;  // (K,) accumulation dtype, or nullptr
  void* grad;                // or nullptr
  void* loss_map;            // (pixels,) accumulation dtype, or nullptr
  void* loss;                // () accumulation dtype; unused with a loss_map
  void* parts;               // (3,)
  void* grad_scale;          // ()
  void* workspace;           // tnkd_workspace_bytes()
  Dtype student_dtype, teacher_dtype;
  Label label = Label::kTeacher;
  bool has_target;
  int64_t classes, pixels;
  int dims;
  int64_t size[kMaxDims];
  Strides student_strides, teacher_strides, grad_strides;
  int64_t target_strides[kMaxDims];
  double ce_weight, tckd_weight, nckd_weight, temperature;
  bool has_ignore_index;
  int64_t ignore_index;
  bool mean, with_ce;
};

// The numbers every pixel needs, in the accumulation dtype.
template <typename A>
struct Terms {
  A ce_weight, tckd_weight, nckd_weight, temperature;
  A log2_scale;  // log2(e) / temperature
  bool with_ce;
};

// Where the workspace keeps what.
struct Workspace {
  unsigned* ticket;
  double* counts;    // count_blocks
  double* weights;   // count_blocks
  double* partials;  // 3 sums a block of the main kernel
  int count_blocks;
};

// What the last block needs to finish.
template <typename A>
struct Result {
  A* loss;
  A* parts;
  A* grad_scale;
  bool mean, defer;  // defer: gradients were left undivided, grad_scale does it
};

struct Labels {
  const void* pointer;
  Label type;
  bool has_ignore, has_narrow_ignore;  // narrow: ignore_index as a label of 32 bits or fewer may hold it
  int64_t ignore;
  int narrow_ignore;
  int classes;
  bool packs;  // runs of 8 labels lie side by side on 16 bytes (or on their own size, if less)
};

// ------------------------------------------------------------------------------------------------- per-pixel algebra
// Sums over the classes other than the target, in powers of 2: with c = log2(e) / temperature and base = max * c,
// e_j = 2^(z_j c - base), one fused multiply-add and one exponential a class. Every difference is taken from the same
// rounded base, so the rounding cancels. base is 0 where every other class is absent.
template <typename A>
struct PixelSums {
  A student_base, teacher_base;
  A student_sum, teacher_sum;  // sum e_j
  A cross;                     // sum e^T_j ((z^T_j c - base^T) - (z^S_j c - base^S)), terms with e^T_j = 0 left out
  A ce_base, ce_sum;           // the same at temperature 1, for cross-entropy
  A student_target, teacher_target;  // z_y
};

// d loss / d z_j = student * e^S_j + teacher * e^T_j + ce * e^CE_j for j != y, and `target` for j = y.
template <typename A>
struct PixelGrad {
  A student, teacher, ce, target;
};

template <typename A>
struct PixelLoss {
  A ce, tckd, nckd;  // ce with its class weight, tckd and nckd without temperature^2
};

// The policy that runs the shared per-pixel algebra on one number.
template <typename A>
struct OneNumber {
  using V = A;
  using S = A;
  using M = bool;
  static DSCT_DEVICE A set1(A x) { return x; }
  static DSCT_DEVICE A abs(A x) { return ::fabs(x); }
  static DSCT_DEVICE A max(A x, A y) { return larger(x, y); }
  static DSCT_DEVICE bool lt(A x, A y) { return x < y; }
  static DSCT_DEVICE bool eq(A x, A y) { return x == y; }
  static DSCT_DEVICE A select(bool m, A x, A y) { return m ? x : y; }
  static DSCT_DEVICE A exp(A x) { return exp2_fast(x * A(1.4426950408889634074)); }
  static DSCT_DEVICE A log(A x) { return std::log(x); }
  static DSCT_DEVICE float log1p_unit(float t) {  // t P(t), within 2e-7 relative on [0, 1]: half of what log1pf costs
    float p = 0.005232629366219044f;
    p = fmaf(p, t, -0.029504986479878426f);
    p = fmaf(p, t, 0.07822556048631668f);
    p = fmaf(p, t, -0.13663214445114136f);
    p = fmaf(p, t, 0.1910599321126938f);
    p = fmaf(p, t, -0.2484297901391983f);
    p = fmaf(p, t, 0.3331909775733948f);
    p = fmaf(p, t, -0.4999949336051941f);
    p = fmaf(p, t, 0.9999999403953552f);
    return p * t;
  }
  static DSCT_DEVICE double log1p_unit(double t) { return ::log1p(t); }
};

// Loss and gradient factors of a pixel whatever its label turned out to be. ce_scale: log2(e) where cross-entropy has
// exponentials of its own, log2(e) / temperature where it uses the student's.
template <typename A>
DSCT_DEVICE void judge_pixel(const PixelSums<A>& z, int y, const Terms<A>& terms, const A* class_weight, A kd_norm,
                             A ce_norm, PixelLoss<A>& loss, PixelGrad<A>& grad) {
  using Math = OneNumber<A>;
  constexpr A kLn2 = A(0.69314718055994530942), kLog2E = A(1.4426950408889634074);
  loss = {0, 0, 0};
  grad = {0, 0, 0, 0};
  if (y >= 0) {
    const A factor = terms.temperature * kd_norm;
    const A target_s = std::fma(z.student_target, terms.log2_scale, -z.student_base) * kLn2;
    const A target_t = std::fma(z.teacher_target, terms.log2_scale, -z.teacher_base) * kLn2;
    const TnkdPixel<Math> kd = tnkd_pixel<Math>(target_s, z.student_sum, target_t, z.teacher_sum, z.cross * kLn2,
                                                factor * terms.tckd_weight, factor * terms.nckd_weight);
    loss.tckd = kd.tckd, loss.nckd = kd.nckd;
    grad = {kd.coef_s, kd.coef_t, 0, kd.grad_target};
    if (terms.with_ce) {
      const A class_factor = class_weight == nullptr ? A(1) : class_weight[y];
      if (class_factor != 0) {
        const CePixel<Math> ce = ce_pixel<Math>(std::fma(z.student_target, kLog2E, -z.ce_base) * kLn2, z.ce_sum);
        const A weight = terms.ce_weight * class_factor * ce_norm;
        loss.ce = class_factor * ce.ce;
        grad.target -= weight * ce.miss;
        grad.ce = weight * ce.coef;
      }
    }
  } else if (y == kBad) {
    const A nan = std::numeric_limits<A>::quiet_NaN();
    loss = {nan, nan, nan};
    grad = {nan, nan, nan, nan};
  }
}

// ------------------------------------------------------------------------------------------------------------ labels
// kIgnored, kBad or the class.
template <typename L>
DSCT_DEVICE int classify(L label, const Labels& labels) {
  if constexpr (sizeof(L) == 8) {
    if (labels.has_ignore && label == labels.ignore) return kIgnored;
    return static_cast<uint64_t>(label) < static_cast<uint64_t>(labels.classes) ? static_cast<int>(label) : kBad;
  } else {
    const int narrow = label;
    if (labels.has_narrow_ignore && narrow == labels.narrow_ignore) return kIgnored;
    return static_cast<unsigned>(narrow) < static_cast<unsigned>(labels.classes) ? narrow : kBad;
  }
}

// Calls body with a null pointer of the labels' type.
template <typename Body>
DSCT_DEVICE void with_label_type(Label type, const Body& body) {
  switch (type) {
    case Label::kUInt8:
      return body(static_cast<const uint8_t*>(nullptr));
    case Label::kInt8:
      return body(static_cast<const int8_t*>(nullptr));
    case Label::kInt16:
      return body(static_cast<const int16_t*>(nullptr));
    case Label::kInt32:
      return body(static_cast<const int32_t*>(nullptr));
    default:
      return body(static_cast<const int64_t*>(nullptr));
  }
}

DSCT_DEVICE int load_label(const Labels& labels, int64_t offset) {
  int y = 0;
  with_label_type(labels.type,
                  [&](auto null) { y = classify(static_cast<decltype(null)>(labels.pointer)[offset], labels); });
  return y;
}

template <typename L, int kBytes>
struct alignas(kBytes) LabelPack {
  L lane[kBytes / sizeof(L)];
};

// kCount labels side by side, in loads of up to 16 bytes where `labels.packs` says that they are aligned.
template <int kCount>
DSCT_DEVICE void load_labels(const Labels& labels, int64_t offset, int (&y)[kCount]) {
  with_label_type(labels.type, [&](auto null) {
    using L = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
    const L* from = static_cast<const L*>(labels.pointer) + offset;
    if (labels.packs) {
      constexpr int kBytes = kCount * sizeof(L) < 16 ? kCount * sizeof(L) : 16, kEach = kBytes / sizeof(L);
#pragma unroll
      for (int i = 0; i < kCount / kEach; ++i) {
        const LabelPack<L, kBytes> pack = *reinterpret_cast<const LabelPack<L, kBytes>*>(from + i * kEach);
#pragma unroll
        for (int v = 0; v < kEach; ++v) y[i * kEach + v] = classify(pack.lane[v], labels);
      }
    } else {
#pragma unroll
      for (int v = 0; v < kCount; ++v) y[v] = classify(from[v], labels);
    }
  });
}

// The offset of pixel `index` (row-major over `size`) in a tensor with these strides.
struct Space {
  int dims;
  int64_t size[kMaxDims];
};

DSCT_DEVICE int64_t offset_of(int64_t index, const Space& space, const int64_t (&stride)[kMaxDims]) {
  int64_t offset = 0;
#pragma unroll
  for (int d = kMaxDims - 1; d > 0; --d) {  // unrolled: a run-time index would put the arrays on the stack
    if (d >= space.dims) continue;
    const int64_t rest = index / space.size[d];
    offset += (index - rest * space.size[d]) * stride[d];
    index = rest;
  }
  return offset + index * stride[0];
}

struct PixelStride {
  int64_t at[kMaxDims];
};

constexpr int kCountThreads = 256, kCountPixels = 8;

// Partial counts of valid pixels and their class weights, and the ticket set to zero for the main kernel.
template <typename A>
__global__ void __launch_bounds__(kCountThreads, 1)
    count_pixels(Labels labels, Space space, PixelStride stride, int64_t pixels, const A* class_weight, bool count,
                 Workspace work) {
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
    if (labels.packs && space.dims == 1) {
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

// Adds this block's sums to the result; the last block to arrive reduces all of them in block order.
template <typename A>
DSCT_DEVICE void finish_block(const PixelLoss<A>& total, const Terms<A>& terms, const Workspace& work,
                              const Result<A>& result, Totals totals, double* scratch) {
  double sums[3] = {static_cast<double>(total.ce), static_cast<double>(total.tckd), static_cast<double>(total.nckd)};
  __syncthreads();  // scratch may still be read
  block_sum(sums, scratch);
  __syncthreads();
  if (threadIdx.x == 0) {
    double* mine = work.partials + 3 * static_cast<int64_t>(blockIdx.x);
    mine[0] = sums[0], mine[1] = sums[1], mine[2] = sums[2];
    __threadfence();
    scratch[0] = atomicAdd(work.ticket, 1u) == gridDim.x - 1 ? 1.0 : 0.0;
  }
  __syncthreads();
  const bool last = scratch[0] != 0.0;
  if (!last) return;
  __syncthreads();
  __threadfence();
  sums[0] = sums[1] = sums[2] = 0;
#pragma unroll 4
  for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) {
    const double* partial = work.partials + 3 * static_cast<int64_t>(i);
    sums[0] += load_from_l2(partial), sums[1] += load_from_l2(partial + 1), sums[2] += load_from_l2(partial + 2);
  }
  block_sum(sums, scratch);
  if (threadIdx.x == 0) {
    const double kd = result.mean && totals.count > 0 ? 1 / totals.count : 1;
    const double ce_norm = result.mean && totals.weight != 0 ? 1 / totals.weight : 1;
    const double squared = static_cast<double>(terms.temperature) * terms.temperature;
    const double part[3] = {sums[0] * ce_norm, sums[1] * kd * squared, sums[2] * kd * squared};
    const double weight[3] = {terms.ce_weight, terms.tckd_weight, terms.nckd_weight};
    double loss = 0;
    for (int i = 0; i < 3; ++i) {
      result.parts[i] = static_cast<A>(part[i]);
      if (weight[i] != 0) loss += weight[i] * part[i];  // weight 0 takes no part: 0 * inf would be NaN
    }
    if (result.loss != nullptr) *result.loss = static_cast<A>(loss);
    *result.grad_scale = static_cast<A>(result.defer ? kd : 1);
  }
}

template <typename A>
DSCT_DEVICE A pixel_loss(const PixelLoss<A>& part, const Terms<A>& terms) {
  const A squared = terms.temperature * terms.temperature;
  A loss = 0;
  if (terms.ce_weight != 0) loss += terms.ce_weight * part.ce;
  if (terms.tckd_weight != 0) loss += terms.tckd_weight * squared * part.tckd;
  if (terms.nckd_weight != 0) loss += terms.nckd_weight * squared * part.nckd;
  return loss;
}

// Gradient factors of the two normalisers. With `defer` both are multiplied by the count of valid pixels.
template <typename A>
struct Norms {
  A kd = 1, ce = 1;
};
template <typename A>
DSCT_DEVICE Norms<A> norms_of(const Totals& totals, const Result<A>& result) {
  if (!result.mean) return {};
  const double count = totals.count > 0 ? totals.count : 1, weight = totals.weight != 0 ? totals.weight : 1;
  return {static_cast<A>(result.defer ? 1 : 1 / count), static_cast<A>(result.defer ? count / weight : 1 / weight)};
}

// ------------------------------------------------------------------------------------------------- classes in planes
// Each thread loads 16 bytes of pixels from each of its classes: 2 * kClasses loads in flight before the first use.
struct Planes {
  const void* student;
  const void* teacher;
  void* grad;
  void* loss_map;
  const float* class_weight;
  int64_t student_image, student_class, teacher_image, teacher_class, grad_image, grad_class, target_image;
  int64_t pixels_per_image;  // a multiple of the pixels in 16 bytes
  unsigned tiles_per_image, tiles;
  int classes;
  int lanes_log2;  // threads side by side along the pixels
  int groups;      // groups of threads that share out the classes: class j belongs to group j % groups
  int team_log2;   // threads that join one pixel's groups
};

constexpr int kScratch = 96;  // doubles at the front of shared memory, for block_sum

template <typename T>
DSCT_DEVICE const T* at(const void* base, int64_t offset) {
  return static_cast<const T*>(base) + offset;
}

// Both networks' logits of one thread: classes first, first + step, ... Absent ones become -inf, which counts as
// absent.
template <typename T, int kClasses>
DSCT_DEVICE void load_classes(const Planes& in, unsigned image, int64_t pixel, int first, int step, bool present,
                              Pack<T> (&s)[kClasses], Pack<T> (&t)[kClasses]) {
  const T* student = at<T>(in.student, image * in.student_image + pixel + first * in.student_class);
  const T* teacher = at<T>(in.teacher, image * in.teacher_image + pixel + first * in.teacher_class);
#pragma unroll
  for (int i = 0; i < kClasses; ++i) {
    const bool here = present && first + i * step < in.classes;
    s[i] = here ? load_pack(student + i * step * in.student_class) : fill_pack<T>(-infinity<float>());
    t[i] = here ? load_pack(teacher + i * step * in.teacher_class) : fill_pack<T>(-infinity<float>());
  }
}

// The sums of one pixel over this thread's classes, and their exponentials, which the gradient needs again. `slot` is
// the target among them, negative where it is not. kFreeCE: cross-entropy with a temperature other than 1 or 2, whose
// exponentials are no powers of the others.
template <int kLane, bool kFreeCE, typename T, int kClasses>
DSCT_DEVICE PixelSums<float> sum_classes(const Pack<T> (&s)[kClasses], const Pack<T> (&t)[kClasses], int slot,
                                         const Terms<float>& terms, float (&es)[kClasses], float (&et)[kClasses],
                                         float (&ec)[kFreeCE ? kClasses : 1]) {
  constexpr float kLog2E = 1.4426950408889634f;
  PixelSums<float> z;
  float max_s = -infinity<float>(), max_t = -infinity<float>();
#pragma unroll
  for (int i = 0; i < kClasses; ++i) {
    es[i] = i == slot ? -infinity<float>() : static_cast<float>(s[i].lane[kLane]);
    et[i] = i == slot ? -infinity<float>() : static_cast<float>(t[i].lane[kLane]);
    max_s = larger(max_s, es[i]);
    max_t = larger(max_t, et[i]);
  }
  if (max_s == -infinity<float>()) max_s = 0;
  if (max_t == -infinity<float>()) max_t = 0;
  z.student_base = max_s * terms.log2_scale, z.teacher_base = max_t * terms.log2_scale;
  // Exact powers of 2 times the student's where its exponentials serve.
  z.ce_base = kFreeCE ? max_s * kLog2E : z.student_base * terms.temperature;
  z.student_sum = z.teacher_sum = z.cross = z.ce_sum = 0;
#pragma unroll
  for (int i = 0; i < kClasses; ++i) {
    const float ds = fmaf(es[i], terms.log2_scale, -z.student_base),
                dt = fmaf(et[i], terms.log2_scale, -z.teacher_base);
    if constexpr (kFreeCE) {
      ec[i] = exp2_fast(fmaf(es[i], kLog2E, -z.ce_base));
      z.ce_sum += ec[i];
    }
    es[i] = exp2_fast(ds);
    et[i] = exp2_fast(dt);
    z.student_sum += es[i];
    z.teacher_sum += et[i];
    if (et[i] != 0) z.cross = fmaf(et[i], dt - ds, z.cross);  // 0 * log 0 = 0
  }
  if (!kFreeCE && terms.with_ce) {
    if (terms.temperature == 2) {  // exp(d) = exp(d / 2)^2
#pragma unroll
      for (int i = 0; i < kClasses; ++i) z.ce_sum = fmaf(es[i], es[i], z.ce_sum);
    } else {
      z.ce_sum = z.student_sum;
    }
  }
  return z;
}

// The gradient of one pixel over this thread's classes replaces the student's logits in the packs.
template <int kLane, bool kFreeCE, typename T, int kClasses>
DSCT_DEVICE void put_gradient(Pack<T> (&s)[kClasses], int slot, bool ignored, const Terms<float>& terms,
                              const PixelGrad<float>& grad, const float (&es)[kClasses], const float (&et)[kClasses],
                              const float (&ec)[kFreeCE ? kClasses : 1]) {
  // At temperature 1 cross-entropy's exponentials are the student's, at 2 their squares.
  const bool squares = terms.temperature == 2;
  const float once = squares || kFreeCE ? grad.student : grad.student + grad.ce, twice = squares ? grad.ce : 0.0f;
#pragma unroll
  for (int i = 0; i < kClasses; ++i) {
    float g = grad.teacher * et[i];
    if constexpr (kFreeCE) {
      g = fmaf(grad.ce, ec[i], fmaf(once, es[i], g));
    } else {
      g = fmaf(fmaf(twice, es[i], once), es[i], g);
    }
    s[i].lane[kLane] = static_cast<T>(i == slot ? grad.target : g);
  }
  if (ignored) {  // whatever stands in the logits
#pragma unroll
    for (int i = 0; i < kClasses; ++i) s[i].lane[kLane] = static_cast<T>(0.0f);
  }
}

template <typename T, int kClasses>
DSCT_DEVICE void store_classes(const Planes& in, unsigned image, int64_t pixel, int first, int step,
                               const Pack<T> (&g)[kClasses]) {
  T* grad = static_cast<T*>(in.grad) + image * in.grad_image + pixel + first * in.grad_class;
#pragma unroll
  for (int i = 0; i < kClasses; ++i) {
    if (first + i * step < in.classes) store_pack(grad + i * step * in.grad_class, g[i]);
  }
}

// Calls body(integral_constant<int, 0>) ... body(<kCount - 1>): a loop whose index is a compile-time constant.
template <int kCount, int kFirst = 0, typename Body>
DSCT_DEVICE void repeat(const Body& body) {
  if constexpr (kFirst < kCount) {
    body(std::integral_constant<int, kFirst>{});
    repeat<kCount, kFirst + 1>(body);
  }
}

// Few classes: one thread holds all of them for its pixels.
template <typename T, int kClasses, bool kFreeCE>
__global__ void __launch_bounds__(128, 1)
    planes_whole(Planes in, Labels labels, Terms<float> terms, Workspace work, Result<float> result) {
  constexpr int kPixels = Pack<T>::kSize;
  DSCT_SHARED(shared);
  double* scratch = reinterpret_cast<double*>(shared);
  Totals totals;
  Norms<float> norms;
  PixelLoss<float> total = {0, 0, 0};
  for (unsigned work_tile = blockIdx.x; work_tile < in.tiles; work_tile += gridDim.x) {
    const unsigned image = work_tile / in.tiles_per_image, tile = work_tile - image * in.tiles_per_image;
    const int64_t pixel = (static_cast<int64_t>(tile) * blockDim.x + threadIdx.x) * kPixels;
    const bool inside = pixel < in.pixels_per_image;
    Pack<T> s[kClasses], t[kClasses];
    load_classes(in, image, pixel, 0, 1, inside, s, t);
    int y[kPixels];
    if (labels.type == Label::kTeacher) {  // the teacher's argmax, smallest index on a tie
#pragma unroll
      for (int v = 0; v < kPixels; ++v) {
        float best = static_cast<float>(t[0].lane[v]);
        y[v] = inside ? 0 : kIgnored;
#pragma unroll
        for (int i = 1; i < kClasses; ++i) {
          const float z = static_cast<float>(t[i].lane[v]);
          if (z > best) best = z, y[v] = i;
        }
      }
    } else if (inside) {
      load_labels(labels, image * in.target_image + pixel, y);
    } else {
#pragma unroll
      for (int v = 0; v < kPixels; ++v) y[v] = kIgnored;
    }
    if (work_tile == blockIdx.x) {  // once, while the first logits are under way
      totals = add_counts(work, scratch);
      norms = norms_of(totals, result);
    }
    repeat<kPixels>([&](auto lane) {
      constexpr int v = decltype(lane)::value;
      float es[kClasses], et[kClasses], ec[kFreeCE ? kClasses : 1];
      PixelSums<float> z = sum_classes<v, kFreeCE>(s, t, y[v], terms, es, et, ec);
      z.student_target = z.teacher_target = 0;
#pragma unroll
      for (int i = 0; i < kClasses; ++i) {
        if (i == y[v]) {
          z.student_target = static_cast<float>(s[i].lane[v]);
          z.teacher_target = static_cast<float>(t[i].lane[v]);
        }
      }
      PixelLoss<float> loss;
      PixelGrad<float> grad;
      judge_pixel(z, y[v], terms, in.class_weight, norms.kd, norms.ce, loss, grad);
      total.ce += loss.ce, total.tckd += loss.tckd, total.nckd += loss.nckd;
      if (in.loss_map != nullptr && inside) {
        static_cast<float*>(in.loss_map)[image * in.pixels_per_image + pixel + v] = pixel_loss(loss, terms);
      }
      put_gradient<v, kFreeCE>(s, y[v], y[v] == kIgnored, terms, grad, es, et, ec);
    });
    if (in.grad != nullptr && inside) store_classes(in, image, pixel, 0, 1, s);
  }
  finish_block(total, terms, work, result, totals, scratch);
}

// What a pixel's groups tell each other through shared memory.
enum Sum { kStudentBase, kTeacherBase, kStudentSum, kTeacherSum, kCross, kCEBase, kCESum, kSums };
// And what they are told back: the common bases, and the gradient factors that belong to them.
enum Verdict { kBaseS, kBaseT, kBaseCE, kGradS, kGradT, kGradCE, kGradTarget, kVerdicts };

// Four more floats a row than pixels: groups fall into different banks, and rows stay on 16 bytes.
DSCT_HOST_DEVICE constexpr int split_shared_floats(int groups, int tile_pixels) {
  return (kSums * groups + kVerdicts + 1) * (tile_pixels + 4);
}

// A row of kCount numbers, 16 bytes at a time.
template <int kCount, typename V>
DSCT_DEVICE void read_row(const V* from, V (&to)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
    const Pack<V> pack = *reinterpret_cast<const Pack<V>*>(from + 4 * i);
#pragma unroll
    for (int v = 0; v < 4; ++v) to[4 * i + v] = pack.lane[v];
  }
}

// Many classes: each group of threads holds some of them. The groups meet twice: their sums are joined into one
// verdict per pixel, and every group turns its own exponentials into gradients by it.
template <typename T, int kClasses, bool kFreeCE>
__global__ void __launch_bounds__(256, 1)
    planes_split(Planes in, Labels labels, Terms<float> terms, Workspace work, Result<float> result) {
  constexpr int kPixels = Pack<T>::kSize;
  DSCT_SHARED(shared);
  double* scratch = reinterpret_cast<double*>(shared);
  const int lanes = 1 << in.lanes_log2, groups = in.groups, team = 1 << in.team_log2;
  const int lane = threadIdx.x & (lanes - 1), group = threadIdx.x >> in.lanes_log2;
  const int tile_pixels = lanes * kPixels, row = tile_pixels + 4, own = lane * kPixels;

  float* sums = reinterpret_cast<float*>(scratch + kScratch);  // [kSums][groups][row]
  float* verdict = sums + kSums * groups * row;                // [kVerdicts][row]
  int* places = reinterpret_cast<int*>(verdict + kVerdicts * row);
  // places[row]: the target's slot and group in one number, or its negative label.
  auto place_of = [&](int y) { return y < 0 ? y : (y / groups) << 8 | y % groups; };

  Totals totals;
  Norms<float> norms;
  PixelLoss<float> total = {0, 0, 0};
  for (unsigned work_tile = blockIdx.x; work_tile < in.tiles; work_tile += gridDim.x) {
    const unsigned image = work_tile / in.tiles_per_image, tile = work_tile - image * in.tiles_per_image;
    const int64_t tile_start = static_cast<int64_t>(tile) * tile_pixels, pixel = tile_start + own;
    const bool working = pixel < in.pixels_per_image && group < groups;  // the last warp may have threads to spare

    Pack<T> s[kClasses], t[kClasses];
    load_classes(in, image, pixel, group, groups, working, s, t);
    if (labels.type == Label::kTeacher) {  // the teacher's argmax, smallest index on a tie
      float* best_logit = sums;
      int* best_class = reinterpret_cast<int*>(sums + groups * row);
      if (working) {
#pragma unroll
        for (int v = 0; v < kPixels; ++v) {
          float best = static_cast<float>(t[0].lane[v]);
          int j = group;
#pragma unroll
          for (int i = 1; i < kClasses; ++i) {
            const float z = static_cast<float>(t[i].lane[v]);
            if (z > best) best = z, j = group + i * groups;
          }
          best_logit[group * row + own + v] = best;
          best_class[group * row + own + v] = j;
        }
      }
      __syncthreads();
      for (int p = threadIdx.x; p < tile_pixels; p += blockDim.x) {
        if (tile_start + p >= in.pixels_per_image) {
          places[p] = kIgnored;
          continue;
        }
        float best = best_logit[p];
        int y = best_class[p];
        for (int g = 1; g < groups; ++g) {
          const float z = best_logit[g * row + p];
          const int j = best_class[g * row + p];
          if (z > best || (z == best && j < y)) best = z, y = j;
        }
        places[p] = place_of(y);
      }
    } else {
      for (int p = threadIdx.x; p < tile_pixels; p += blockDim.x) {
        const bool inside = tile_start + p < in.pixels_per_image;
        places[p] = inside ? place_of(load_label(labels, image * in.target_image + tile_start + p)) : kIgnored;
      }
    }
    if (work_tile == blockIdx.x) {  // once, while the first logits are under way
      totals = add_counts(work, scratch);
      norms = norms_of(totals, result);
    }
    __syncthreads();

    float es[kPixels][kClasses], et[kPixels][kClasses], ec[kFreeCE ? kPixels : 1][kFreeCE ? kClasses : 1];
    int place[kPixels];
    read_row(places + own, place);
    auto slot_of = [&](int v) { return (place[v] & 255) == group ? place[v] >> 8 : -1; };
    Pack<float> mine[kSums];  // four pixels at a time, so that they go out 16 bytes wide
    repeat<kPixels>([&](auto index) {
      constexpr int v = decltype(index)::value;
      const PixelSums<float> z = sum_classes<v, kFreeCE>(s, t, slot_of(v), terms, es[v], et[v], ec[kFreeCE ? v : 0]);
      // An absent group must not raise the common base.
      mine[kStudentBase].lane[v % 4] = z.student_sum == 0 ? -infinity<float>() : z.student_base;
      mine[kTeacherBase].lane[v % 4] = z.teacher_sum == 0 ? -infinity<float>() : z.teacher_base;
      mine[kCEBase].lane[v % 4] = z.student_sum == 0 ? -infinity<float>() : z.ce_base;
      mine[kStudentSum].lane[v % 4] = z.student_sum;
      mine[kTeacherSum].lane[v % 4] = z.teacher_sum;
      mine[kCross].lane[v % 4] = z.cross;
      mine[kCESum].lane[v % 4] = z.ce_sum;
      if constexpr (v % 4 == 3) {
        if (working) {
#pragma unroll
          for (int q = 0; q < kSums; ++q) {
            *reinterpret_cast<Pack<float>*>(sums + (q * groups + group) * row + own + v - 3) = mine[q];
          }
        }
      }
    });
    __syncthreads();

    for (int item = threadIdx.x; item < tile_pixels * team; item += blockDim.x) {  // whole warps come and go together
      const int p = item >> in.team_log2, member = item & (team - 1);
      const bool inside = tile_start + p < in.pixels_per_image;
      const int place = places[p], y = place < 0 ? place : (place >> 8) * groups + (place & 255);
      const bool judge = inside && member == 0;
      PixelSums<float> z;
      z.student_target = z.teacher_target = 0;
      if (judge && y >= 0) {
        const int64_t offset = tile_start + p;
        z.student_target = *at<T>(in.student, image * in.student_image + y * in.student_class + offset);
        z.teacher_target = *at<T>(in.teacher, image * in.teacher_image + y * in.teacher_class + offset);
      }
      auto sum_at = [&](int q, int g) { return sums[(q * groups + g) * row + p]; };
      z.student_base = z.teacher_base = z.ce_base = -infinity<float>();
      for (int g = member; inside && g < groups; g += team) {
        z.student_base = larger(z.student_base, sum_at(kStudentBase, g));
        z.teacher_base = larger(z.teacher_base, sum_at(kTeacherBase, g));
        z.ce_base = larger(z.ce_base, sum_at(kCEBase, g));
      }
      for (int offset = 1; offset < team; offset *= 2) {
        z.student_base = larger(z.student_base, __shfl_xor_sync(kFullMask, z.student_base, offset));
        z.teacher_base = larger(z.teacher_base, __shfl_xor_sync(kFullMask, z.teacher_base, offset));
        z.ce_base = larger(z.ce_base, __shfl_xor_sync(kFullMask, z.ce_base, offset));
      }
      if (z.student_base == -infinity<float>()) z.student_base = z.ce_base = 0;
      if (z.teacher_base == -infinity<float>()) z.teacher_base = 0;
      z.student_sum = z.teacher_sum = z.cross = z.ce_sum = 0;
      for (int g = member; inside && g < groups; g += team) {
        // How much of a group's own scale is left on the common one; 0 where it has no class at all.
        const float shift_s = sum_at(kStudentBase, g) - z.student_base,
                    shift_t = sum_at(kTeacherBase, g) - z.teacher_base;
        const float factor_t = exp2_fast(shift_t), sum_t = sum_at(kTeacherSum, g);
        z.student_sum = fmaf(sum_at(kStudentSum, g), exp2_fast(shift_s), z.student_sum);
        z.ce_sum = fmaf(sum_at(kCESum, g), exp2_fast(sum_at(kCEBase, g) - z.ce_base), z.ce_sum);
        z.teacher_sum = fmaf(sum_t, factor_t, z.teacher_sum);
        if (factor_t != 0 && sum_t != 0) {
          z.cross = fmaf(factor_t, fmaf(sum_t, shift_t - shift_s, sum_at(kCross, g)), z.cross);
        }
      }
      for (int offset = 1; offset < team; offset *= 2) {
        z.student_sum += __shfl_xor_sync(kFullMask, z.student_sum, offset);
        z.ce_sum += __shfl_xor_sync(kFullMask, z.ce_sum, offset);
        z.teacher_sum += __shfl_xor_sync(kFullMask, z.teacher_sum, offset);
        z.cross += __shfl_xor_sync(kFullMask, z.cross, offset);
      }
      if (!judge) continue;
      PixelLoss<float> loss;
      PixelGrad<float> grad;
      judge_pixel(z, y, terms, in.class_weight, norms.kd, norms.ce, loss, grad);
      total.ce += loss.ce, total.tckd += loss.tckd, total.nckd += loss.nckd;
      if (in.loss_map != nullptr) {
        static_cast<float*>(in.loss_map)[image * in.pixels_per_image + tile_start + p] = pixel_loss(loss, terms);
      }
      const float told[kVerdicts] = {z.student_base, z.teacher_base, z.ce_base,  grad.student,
                                     grad.teacher,   grad.ce,        grad.target};
#pragma unroll
      for (int q = 0; q < kVerdicts; ++q) verdict[q * row + p] = told[q];
    }
    __syncthreads();

    if (in.grad != nullptr && working) {
      repeat<kPixels / 4>([&](auto quarter) {
        constexpr int first = 4 * decltype(quarter)::value;
        float told[kVerdicts][4], base_s[4], base_t[4], base_ce[4];
#pragma unroll
        for (int q = 0; q < kVerdicts; ++q) read_row(verdict + q * row + own + first, told[q]);
        read_row(sums + (kStudentBase * groups + group) * row + own + first, base_s);
        read_row(sums + (kTeacherBase * groups + group) * row + own + first, base_t);
        read_row(sums + (kCEBase * groups + group) * row + own + first, base_ce);
        repeat<4>([&](auto index) {
          constexpr int i = decltype(index)::value, v = first + i;
          PixelGrad<float> grad;
          grad.student = told[kGradS][i] * exp2_fast(base_s[i] - told[kBaseS][i]);
          grad.teacher = told[kGradT][i] * exp2_fast(base_t[i] - told[kBaseT][i]);
          grad.ce = told[kGradCE][i] * exp2_fast(base_ce[i] - told[kBaseCE][i]);
          grad.target = told[kGradTarget][i];
          put_gradient<v, kFreeCE>(s, slot_of(v), place[v] == kIgnored, terms, grad, es[v], et[v], ec[kFreeCE ? v : 0]);
        });
      });
      store_classes(in, image, pixel, group, groups, s);
    }
    __syncthreads();  // the next tile writes where this one read
  }
  finish_block(total, terms, work, result, totals, scratch);
}

// ------------------------------------------------------------------------------------------------------- any layout
template <typename A>
struct AnyLayout {
  const void* student;
  const void* teacher;
  void* grad;
  void* loss_map;
  const A* class_weight;
  Dtype student_dtype, teacher_dtype;
  int64_t student_class, teacher_class, grad_class, pixels;
  int classes;
  Space space;
  PixelStride student_stride, teacher_stride, grad_stride, target_stride;
};

template <typename A>
DSCT_DEVICE A load_any(const void* base, Dtype dtype, int64_t offset) {
  switch (dtype) {
    case Dtype::kFloat32:
      return static_cast<A>(static_cast<const float*>(base)[offset]);
    case Dtype::kFloat64:
      return static_cast<A>(static_cast<const double*>(base)[offset]);
    case Dtype::kFloat16:
      return static_cast<A>(static_cast<float>(static_cast<const Half*>(base)[offset]));
    default:
      return static_cast<A>(static_cast<float>(static_cast<const BFloat16*>(base)[offset]));
  }
}

template <typename A>
DSCT_DEVICE void store_any(void* base, Dtype dtype, int64_t offset, A value) {
  switch (dtype) {
    case Dtype::kFloat32:
      static_cast<float*>(base)[offset] = static_cast<float>(value);
      break;
    case Dtype::kFloat64:
      static_cast<double*>(base)[offset] = static_cast<double>(value);
      break;
    case Dtype::kFloat16:
      static_cast<Half*>(base)[offset] = static_cast<Half>(static_cast<float>(value));
      break;
    default:
      static_cast<BFloat16*>(base)[offset] = static_cast<BFloat16>(static_cast<float>(value));
  }
}

// One thread per pixel; the classes are read three times, the second and third from cache where they fit.
template <typename A>
__global__ void __launch_bounds__(128, 1)
    any_layout(AnyLayout<A> in, Labels labels, Terms<A> terms, Workspace work, Result<A> result) {
  DSCT_SHARED(shared);
  double* scratch = reinterpret_cast<double*>(shared);
  const Totals totals = add_counts(work, scratch);
  const Norms<A> norms = norms_of(totals, result);
  constexpr A kLog2E = A(1.4426950408889634074);

  PixelLoss<A> total = {0, 0, 0};
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t pixel = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; pixel < in.pixels; pixel += step) {
    const int64_t at_s = offset_of(pixel, in.space, in.student_stride.at);
    const int64_t at_t = offset_of(pixel, in.space, in.teacher_stride.at);
    auto student = [&](int j) { return load_any<A>(in.student, in.student_dtype, at_s + j * in.student_class); };
    auto teacher = [&](int j) { return load_any<A>(in.teacher, in.teacher_dtype, at_t + j * in.teacher_class); };

    int y = 0;
    if (labels.type == Label::kTeacher) {
      A best = teacher(0);
      for (int j = 1; j < in.classes; ++j) {
        const A z = teacher(j);
        if (z > best) best = z, y = j;
      }
    } else {
      y = load_label(labels, offset_of(pixel, in.space, in.target_stride.at));
    }
    PixelSums<A> z;
    z.student_target = z.teacher_target = 0;
    A max_s = -infinity<A>(), max_t = -infinity<A>();
    for (int j = 0; j < in.classes; ++j) {
      const A zs = student(j), zt = teacher(j);
      if (j == y) {
        z.student_target = zs, z.teacher_target = zt;
      } else {
        max_s = larger(max_s, zs);
        max_t = larger(max_t, zt);
      }
    }
    if (max_s == -infinity<A>()) max_s = 0;
    if (max_t == -infinity<A>()) max_t = 0;
    z.student_base = max_s * terms.log2_scale, z.teacher_base = max_t * terms.log2_scale, z.ce_base = max_s * kLog2E;
    auto power_s = [&](A x) { return std::fma(x, terms.log2_scale, -z.student_base); };
    auto power_t = [&](A x) { return std::fma(x, terms.log2_scale, -z.teacher_base); };
    auto exp_ce = [&](A x) { return exp2_fast(std::fma(x, kLog2E, -z.ce_base)); };
    z.student_sum = z.teacher_sum = z.cross = z.ce_sum = 0;
    for (int j = 0; j < in.classes; ++j) {
      if (j == y) continue;
      const A zs = student(j), ds = power_s(zs), dt = power_t(teacher(j)), exp_t = exp2_fast(dt);
      z.student_sum += exp2_fast(ds);
      z.teacher_sum += exp_t;
      if (exp_t != 0) z.cross += exp_t * (dt - ds);
      if (terms.with_ce) z.ce_sum += exp_ce(zs);
    }
    PixelLoss<A> loss;
    PixelGrad<A> grad;
    judge_pixel(z, y, terms, in.class_weight, norms.kd, norms.ce, loss, grad);
    total.ce += loss.ce, total.tckd += loss.tckd, total.nckd += loss.nckd;
    if (in.loss_map != nullptr) static_cast<A*>(in.loss_map)[pixel] = pixel_loss(loss, terms);
    if (in.grad == nullptr) continue;
    const int64_t at_g = offset_of(pixel, in.space, in.grad_stride.at);
    for (int j = 0; j < in.classes; ++j) {
      A g = 0;
      if (y != kIgnored) {
        const A zs = student(j);
        g = grad.student * exp2_fast(power_s(zs)) + grad.teacher * exp2_fast(power_t(teacher(j)));
        if (terms.with_ce) g += grad.ce * exp_ce(zs);
        if (j == y) g = grad.target;
      }
      store_any(in.grad, in.student_dtype, at_g + j * in.grad_class, g);
    }
  }
  finish_block(total, terms, work, result, totals, scratch);
}

// ------------------------------------------------------------------------------------------------------------- plans
constexpr int kMaxCountBlocks = 256, kAnyThreads = 128, kWholeThreads = 128, kSplitThreads = 256;
constexpr int64_t kMaxTiles = std::numeric_limits<int32_t>::max();

// How many classes a thread may hold: the variants that are compiled, within what its registers take without a spill.
template <int... kCounts>
struct ClassCounts {
  static constexpr int kLargest = std::max({kCounts...});
};
using WholeClasses = ClassCounts<2, 4, 6, 8>;
template <typename T>
using SplitClasses = std::conditional_t<sizeof(T) == 4, ClassCounts<6, 8, 10>, ClassCounts<4, 5, 6>>;

// Calls body(integral_constant<int, m>) for the m among kCounts that equals `count`.
template <int... kCounts, typename Body>
void one_of(ClassCounts<kCounts...>, int count, const Body& body) {
  ((count == kCounts ? body(std::integral_constant<int, kCounts>{}) : void()), ...);
}

// The count that pads K classes least over groups of threads, then the one with the fewest groups.
constexpr int kMaxGroups = 64;
template <int... kCounts>
int best_count(ClassCounts<kCounts...>, int classes) {
  int best = 0, padded = std::numeric_limits<int>::max();
  for (int m : {kCounts...}) {
    const int groups = static_cast<int>(ceil_div(classes, m)), needed = groups * m;
    if (groups > kMaxGroups) continue;
    if (needed < padded || (needed == padded && m > best)) best = m, padded = needed;
  }
  return best;
}

// The launch chosen for a call. Workspace and kernel sizes follow from it alone.
struct TnkdPlan {
  const char* name = "any_layout";  // the kernel
  bool fast = false, split = false;
  int classes_per_thread = 0, groups = 1, lanes_log2 = 0, team_log2 = 0, threads = kAnyThreads;
  int64_t tiles_per_image = 0, tiles = 0, blocks = 1;
  int count_blocks = 1;
  size_t shared = kScratch * sizeof(double);
};

inline int bytes_of(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

// Sizes and strides over (N, *spatial) from those of the logits (N, K, *spatial) and of the target, with dimensions
// merged that every tensor steps through alike. A stride array may be nullptr: no such tensor.
inline void set_space(TnkdArgs& args, int64_t logit_dims, const int64_t* size, const int64_t* student,
                      const int64_t* teacher, const int64_t* target, const int64_t* grad) {
  int64_t* const to[4] = {args.student_strides.pixel, args.teacher_strides.pixel, args.grad_strides.pixel,
                          args.target_strides};
  args.classes = size[1];
  args.student_strides.klass = student[1];
  args.teacher_strides.klass = teacher[1];
  args.grad_strides.klass = grad == nullptr ? 0 : grad[1];
  args.pixels = 1;
  args.dims = 0;
  for (int64_t d = 0; d < logit_dims; ++d) {
    if (d == 1) continue;
    args.pixels *= size[d];
    if (size[d] == 1 && !(args.dims == 0 && d == logit_dims - 1)) continue;
    const int64_t step[4] = {student[d], teacher[d], grad == nullptr ? 0 : grad[d],
                             target == nullptr ? 0 : target[d == 0 ? 0 : d - 1]};
    bool merge = args.dims > 0;
    for (int i = 0; merge && i < 4; ++i) merge = to[i][args.dims - 1] == step[i] * size[d];
    if (!merge) {
      if (args.dims == kMaxDims) {
        throw std::invalid_argument("tnkd: more than " + std::to_string(kMaxDims) +
                                    " dimensions whose strides cannot be merged");
      }
      args.size[args.dims++] = 1;
    }
    args.size[args.dims - 1] *= size[d];
    for (int i = 0; i < 4; ++i) to[i][args.dims - 1] = step[i];
  }
  if (args.dims == 0) args.dims = 1, args.size[0] = 1;  // one pixel
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Planes: at most batch and one merged dimension of pixels, side by side, every row of every class on 16 bytes.
inline bool planes_fit(const TnkdArgs& args) {
  const int dims = args.dims;
  if (args.student_dtype != args.teacher_dtype || args.student_dtype == Dtype::kFloat64 || dims > 2) return false;
  const int vector = 16 / bytes_of(args.student_dtype);
  const int64_t per_image = args.size[dims - 1];
  auto good = [&](const void* pointer, const Strides& strides) {
    return pointer == nullptr || (aligned(pointer) && strides.pixel[dims - 1] == 1 && strides.klass % vector == 0 &&
                                  (dims == 1 || strides.pixel[0] % vector == 0));
  };
  return args.pixels > 0 && per_image % vector == 0 && good(args.student, args.student_strides) &&
         good(args.teacher, args.teacher_strides) && good(args.grad, args.grad_strides) &&
         (!args.has_target || args.target_strides[dims - 1] == 1) &&
         args.classes <= kMaxGroups * (vector == 4 ? SplitClasses<float>::kLargest : SplitClasses<Half>::kLargest);
}

inline TnkdPlan tnkd_plan(const TnkdArgs& args, const Device& device) {
  TnkdPlan plan;
  const bool count = args.mean && args.has_target && (args.has_ignore_index || args.class_weight != nullptr);
  plan.count_blocks = count ? static_cast<int>(std::clamp<int64_t>(
                                  ceil_div(args.pixels, kCountThreads * kCountPixels * 2), 1, kMaxCountBlocks))
                            : 1;
  if (planes_fit(args)) {
    const bool wide = args.student_dtype == Dtype::kFloat32;
    const int vector = wide ? 4 : 8, k = static_cast<int>(args.classes);
    const int64_t images = args.dims == 2 ? args.size[0] : 1, per_image = args.size[args.dims - 1];
    plan.fast = true;
    plan.name = "planes_whole";
    if (k <= WholeClasses::kLargest) {  // one group holds all
      plan.classes_per_thread = best_count(WholeClasses(), k);
      plan.threads = kWholeThreads;
      plan.tiles_per_image = ceil_div(per_image, kWholeThreads * vector);
    } else {
      plan.split = true;
      plan.name = "planes_split";
      plan.classes_per_thread = wide ? best_count(SplitClasses<float>(), k) : best_count(SplitClasses<Half>(), k);
      plan.groups = static_cast<int>(ceil_div(k, plan.classes_per_thread));
      while (plan.lanes_log2 < 6 && (2 << plan.lanes_log2) * plan.groups <= kSplitThreads) ++plan.lanes_log2;
      const int lanes = 1 << plan.lanes_log2, tile = lanes * vector;
      plan.threads = static_cast<int>(ceil_div(lanes * plan.groups, kWarp)) * kWarp;
      while (plan.team_log2 < 5 && (tile << plan.team_log2) < plan.threads) ++plan.team_log2;
      while ((tile << plan.team_log2) % kWarp != 0) ++plan.team_log2;
      plan.tiles_per_image = ceil_div(per_image, tile);
      plan.shared += sizeof(float) * split_shared_floats(plan.groups, tile);
    }
    plan.tiles = plan.tiles_per_image * images;
    // Enough blocks to fill the chip and to even out the end, few enough to make their fixed cost small.
    plan.blocks = std::min<int64_t>(plan.tiles, device.multiprocessors * 8);
    if (plan.tiles <= kMaxTiles && plan.shared <= static_cast<size_t>(device.shared_bytes)) return plan;
    const int count_blocks = plan.count_blocks;
    plan = TnkdPlan();
    plan.count_blocks = count_blocks;
  }
  plan.blocks = std::clamp<int64_t>(ceil_div(args.pixels, kAnyThreads), 1, 1 << 20);
  return plan;
}

// 16 bytes for the ticket, then counts, weights and partials.
inline int64_t tnkd_workspace_bytes(const TnkdPlan& plan) {
  return 16 + 16 * static_cast<int64_t>(plan.count_blocks) + 24 * plan.blocks;
}

template <typename A>
Terms<A> terms_of(const TnkdArgs& args) {
  return {static_cast<A>(args.ce_weight),
          static_cast<A>(args.tckd_weight),
          static_cast<A>(args.nckd_weight),
          static_cast<A>(args.temperature),
          static_cast<A>(1.4426950408889634074 / args.temperature),
          args.with_ce};
}

template <typename A>
Result<A> result_of(const TnkdArgs& args) {
  return {static_cast<A*>(args.loss), static_cast<A*>(args.parts), static_cast<A*>(args.grad_scale), args.mean,
          args.mean && args.student_dtype == Dtype::kFloat16};
}

inline Workspace workspace_of(const TnkdArgs& args, const TnkdPlan& plan) {
  char* base = static_cast<char*>(args.workspace) + 16;
  Workspace work;
  work.ticket = static_cast<unsigned*>(args.workspace);
  work.counts = reinterpret_cast<double*>(base);
  work.weights = reinterpret_cast<double*>(base + 8 * plan.count_blocks);
  work.partials = reinterpret_cast<double*>(base + 16 * plan.count_blocks);
  work.count_blocks = plan.count_blocks;
  return work;
}

template <typename T, int kClasses, bool kSplit>
void launch_planes(const TnkdPlan& plan, bool free_ce, const Planes& in, const Labels& labels, const TnkdArgs& args,
                   const Workspace& work, cudaStream_t stream) {
  auto go = [&](auto kernel) {
    launch("tnkd", kernel, plan.blocks, plan.threads, plan.shared, stream, in, labels, terms_of<float>(args), work,
           result_of<float>(args));
  };
  if constexpr (kSplit) {
    free_ce ? go(planes_split<T, kClasses, true>) : go(planes_split<T, kClasses, false>);
  } else {
    free_ce ? go(planes_whole<T, kClasses, true>) : go(planes_whole<T, kClasses, false>);
  }
}

template <typename T>
void launch_planes(const TnkdPlan& plan, const TnkdArgs& args, const Labels& labels, const Workspace& work,
                   cudaStream_t stream) {
  const int last = args.dims - 1;
  Planes in;
  in.student = args.student, in.teacher = args.teacher, in.grad = args.grad;
  in.loss_map = args.loss_map, in.class_weight = static_cast<const float*>(args.class_weight);
  auto image_stride = [&](const Strides& strides) { return last == 0 ? 0 : strides.pixel[0]; };
  in.student_image = image_stride(args.student_strides), in.student_class = args.student_strides.klass;
  in.teacher_image = image_stride(args.teacher_strides), in.teacher_class = args.teacher_strides.klass;
  in.grad_image = image_stride(args.grad_strides), in.grad_class = args.grad_strides.klass;
  in.target_image = last == 0 ? 0 : args.target_strides[0];
  in.pixels_per_image = args.size[last];
  in.tiles_per_image = static_cast<unsigned>(plan.tiles_per_image), in.tiles = static_cast<unsigned>(plan.tiles);
  in.classes = static_cast<int>(args.classes);
  in.lanes_log2 = plan.lanes_log2, in.groups = plan.groups, in.team_log2 = plan.team_log2;
  const bool free_ce = args.with_ce && args.temperature != 1 && args.temperature != 2;
  auto go = [&](auto classes, auto split) {
    launch_planes<T, decltype(classes)::value, decltype(split)::value>(plan, free_ce, in, labels, args, work, stream);
  };
  if (plan.split) {
    one_of(SplitClasses<T>(), plan.classes_per_thread, [&](auto m) { go(m, std::true_type()); });
  } else {
    one_of(WholeClasses(), plan.classes_per_thread, [&](auto m) { go(m, std::false_type()); });
  }
}

template <typename A>
void launch_any(const TnkdPlan& plan, const TnkdArgs& args, const Labels& labels, const Workspace& work,
                cudaStream_t stream) {
  AnyLayout<A> in;
  in.student = args.student, in.teacher = args.teacher, in.grad = args.grad;
  in.loss_map = args.loss_map, in.class_weight = static_cast<const A*>(args.class_weight);
  in.student_dtype = args.student_dtype, in.teacher_dtype = args.teacher_dtype;
  in.student_class = args.student_strides.klass, in.teacher_class = args.teacher_strides.klass;
  in.grad_class = args.grad_strides.klass, in.pixels = args.pixels, in.classes = static_cast<int>(args.classes);
  in.space.dims = args.dims;
  for (int d = 0; d < kMaxDims; ++d) {
    in.space.size[d] = args.size[d];
    in.student_stride.at[d] = args.student_strides.pixel[d];
    in.teacher_stride.at[d] = args.teacher_strides.pixel[d];
    in.grad_stride.at[d] = args.grad_strides.pixel[d];
    in.target_stride.at[d] = args.target_strides[d];
  }
  launch("tnkd", any_layout<A>, plan.blocks, plan.threads, plan.shared, stream, in, labels, terms_of<A>(args), work,
         result_of<A>(args));
}

inline Labels labels_of(const TnkdArgs& args) {
  Labels labels{};
  labels.pointer = args.target;
  labels.type = args.has_target ? args.label : Label::kTeacher;
  labels.has_ignore = args.has_ignore_index, labels.ignore = args.ignore_index;
  labels.narrow_ignore = static_cast<int>(args.ignore_index);
  labels.has_narrow_ignore = args.has_ignore_index && labels.narrow_ignore == args.ignore_index;
  labels.classes = static_cast<int>(args.classes);
  labels.packs = aligned(args.target) && args.target_strides[args.dims - 1] == 1 &&
                 (args.dims == 1 || (args.dims == 2 && args.target_strides[0] % 8 == 0));
  return labels;
}

// The whole op: two launches on `stream`, nothing else.
inline void tnkd_run(const TnkdArgs& args, const TnkdPlan& plan, cudaStream_t stream) {
  const bool wide = args.student_dtype == Dtype::kFloat64 || args.teacher_dtype == Dtype::kFloat64;
  const Workspace work = workspace_of(args, plan);
  const Labels labels = labels_of(args);
  Space space;
  PixelStride target_stride;
  space.dims = args.dims;
  for (int d = 0; d < kMaxDims; ++d) space.size[d] = args.size[d], target_stride.at[d] = args.target_strides[d];
  const bool count = args.mean && args.has_target && (args.has_ignore_index || args.class_weight != nullptr);
  const size_t shared = 2 * kWarp * sizeof(double);
  if (wide) {
    launch("tnkd", count_pixels<double>, plan.count_blocks, kCountThreads, shared, stream, labels, space, target_stride,
           args.pixels, static_cast<const double*>(args.class_weight), count, work);
    return launch_any<double>(plan, args, labels, work, stream);
  }
  launch("tnkd", count_pixels<float>, plan.count_blocks, kCountThreads, shared, stream, labels, space, target_stride,
         args.pixels, static_cast<const float*>(args.class_weight), count, work);
  if (!plan.fast) return launch_any<float>(plan, args, labels, work, stream);
  switch (args.student_dtype) {
    case Dtype::kFloat32:
      return launch_planes<float>(plan, args, labels, work, stream);
    case Dtype::kFloat16:
      return launch_planes<Half>(plan, args, labels, work, stream);
    default:
      return launch_planes<BFloat16>(plan, args, labels, work, stream);
  }
}

// --------------------------------------------------------------------------------------------------- backward's factor
// grad *= factor in place; when the factor is exactly 1, as in most training loops, nothing is read or written.
template <typename T, typename A>
__global__ void scale_in_place(T* grad, const A* factor, int64_t count, bool packs) {
  const A by = *factor;
  if (by == 1) return;
  const int64_t first = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  if (packs) {
    for (int64_t i = first; i < count / Pack<T>::kSize; i += step) {
      Pack<T> pack = load_pack(grad + i * Pack<T>::kSize);
#pragma unroll
      for (int v = 0; v < Pack<T>::kSize; ++v) pack.lane[v] = static_cast<T>(static_cast<A>(pack.lane[v]) * by);
      store_pack(grad + i * Pack<T>::kSize, pack);
    }
  }
  const int64_t done = packs ? count / Pack<T>::kSize * Pack<T>::kSize : 0;
  for (int64_t i = done + first; i < count; i += step) grad[i] = static_cast<T>(static_cast<A>(grad[i]) * by);
}

template <typename T, typename A>
void launch_scale(void* grad, const void* factor, int64_t count, const Device& device, cudaStream_t stream) {
  const int64_t blocks = std::min<int64_t>(ceil_div(count, 256 * Pack<T>::kSize), device.multiprocessors * 8);
  launch("scale_", scale_in_place<T, A>, blocks, 256, 0, stream, static_cast<T*>(grad), static_cast<const A*>(factor),
         count, aligned(grad));
}

// `factor` is () in float32, or in float64 (`wide`).
inline void scale_run(void* grad, Dtype dtype, const void* factor, bool wide, int64_t count, const Device& device,
                      cudaStream_t stream) {
  switch (dtype) {
    case Dtype::kFloat64:
      return launch_scale<double, double>(grad, factor, count, device, stream);
    case Dtype::kFloat32:
      return wide ? launch_scale<float, double>(grad, factor, count, device, stream)
                  : launch_scale<float, float>(grad, factor, count, device, stream);
    case Dtype::kFloat16:
      return wide ? launch_scale<Half, double>(grad, factor, count, device, stream)
                  : launch_scale<Half, float>(grad, factor, count, device, stream);
    default:
      return wide ? launch_scale<BFloat16, double>(grad, factor, count, device, stream)
                  : launch_scale<BFloat16, float>(grad, factor, count, device, stream);
  }
}

}  // namespace dsct::cuda
