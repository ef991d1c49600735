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

enum class Label : int { kTeacher, kUInt8, kInt8, kInt16, kInt32, kInt64 }; // kTeacher: no target, its argmax serves

constexpr int kMaxDims = 6;
constexpr int kIgnored = -1; // what a label becomes where it is ignore_index
constexpr int kBad = -2;     // and where it is no class at all

// Strides in elements. Dimension 0 of the logits is the batch, then space; classes apart. Neighbouring dimensions that
// every tensor steps through alike are merged by the caller.
struct Strides {
  int64_t pixel[kMaxDims];
  int64_t klass;
};

struct TnkdArgs {
  const void* student;
  const void* teacher;
  const void* target;       // or nullptr
  const void* class_weight; // (K,) accumulation dtype, or nullptr
  void* grad;               // or nullptr
  void* loss_map;           // (pixels,) accumulation dtype, or nullptr
  void* loss;               // () accumulation dtype; unused with a loss_map
  void* parts;              // (3,)
  void* grad_scale;         // ()
  void* workspace;          // tnkd_workspace_bytes()
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
template <typename A> struct Terms {
  A ce_weight, tckd_weight, nckd_weight, temperature;
  A scale;    // 1 / temperature
  A log2_scale; // log2(e) / temperature
  bool with_ce;
};

// Where the workspace keeps what.
struct Workspace {
  unsigned* ticket;
  long long* counts; // count_blocks
  double* weights;   // count_blocks
  double* partials; // 3 sums a block of the main kernel
  int count_blocks;
};

// What the last block needs to finish.
template <typename A> struct Result {
  A* loss;
  A* parts;
  A* grad_scale;
  bool mean, defer; // defer: gradients were left undivided, grad_scale does it
};

struct Labels {
  const void* pointer;
  Label type;
  bool has_ignore;
  int64_t ignore;
  int classes;
};

// ------------------------------------------------------------------------------------------------- per-pixel algebra
// Sums over the classes other than the target. Differences are taken from each network's own maximum over those.
template <typename A> struct PixelSums {
  A student_max, teacher_max;       // 0 where every other class is absent
  A student_sum, teacher_sum;       // sum exp((z - max) / temperature)
  A cross;                          // sum exp(teacher term) * (teacher difference - student difference)
  A student_sum_ce;                 // sum exp(z - max): temperature 1, for cross-entropy
  A student_target, teacher_target; // z_y
};

// d loss / d z_j = student * exp_s + teacher * exp_t + ce * exp_ce for j != y, and `target` for j = y.
template <typename A> struct PixelGrad {
  A student, teacher, ce, target;
};

template <typename A> struct PixelLoss {
  A ce, tckd, nckd; // ce with its class weight, tckd and nckd without temperature^2
};

// The policy that runs the shared per-pixel algebra on one number.
template <typename A> struct OneNumber {
  using V = A;
  using S = A;
  using M = bool;
  static DSCT_DEVICE A set1(A x) { return x; }
  static DSCT_DEVICE A abs(A x) { return ::fabs(x); }
  static DSCT_DEVICE A max(A x, A y) { return larger(x, y); }
  static DSCT_DEVICE bool lt(A x, A y) { return x < y; }
  static DSCT_DEVICE bool eq(A x, A y) { return x == y; }
  static DSCT_DEVICE A select(bool m, A x, A y) { return m ? x : y; }
  static DSCT_DEVICE A exp(A x) { return std::exp(x); }
  static DSCT_DEVICE A log(A x) { return std::log(x); }
  static DSCT_DEVICE A log1p_unit(A x) { return std::log1p(x); }
};

template <typename A>
DSCT_DEVICE void finish_pixel(const PixelSums<A>& z, const Terms<A>& terms, A class_weight, A kd_norm, A ce_norm,
                              PixelLoss<A>& loss, PixelGrad<A>& grad) {
  using Math = OneNumber<A>;
  const A target_s = z.student_target - z.student_max, target_t = z.teacher_target - z.teacher_max;
  const A factor = terms.temperature * kd_norm;
  const TnkdPixel<Math> kd = tnkd_pixel<Math>(target_s * terms.scale, z.student_sum, target_t * terms.scale,
                                              z.teacher_sum, z.cross * terms.scale, factor * terms.tckd_weight,
                                              factor * terms.nckd_weight);
  loss = {0, kd.tckd, kd.nckd};
  grad = {kd.coef_s, kd.coef_t, 0, kd.grad_target};
  if (terms.with_ce && class_weight != 0) {
    const CePixel<Math> ce = ce_pixel<Math>(target_s, z.student_sum_ce);
    const A weight = terms.ce_weight * class_weight * ce_norm;
    loss.ce = class_weight * ce.ce;
    grad.target -= weight * ce.miss;
    grad.ce = weight * ce.coef;
  }
}

// ------------------------------------------------------------------------------------------------------------ labels
DSCT_DEVICE int classify(int64_t label, const Labels& labels) {
  if (labels.has_ignore && label == labels.ignore) return kIgnored;
  return label >= 0 && label < labels.classes ? static_cast<int>(label) : kBad;
}

DSCT_DEVICE int64_t load_label(const Labels& labels, int64_t offset) {
  switch (labels.type) {
    case Label::kUInt8: return static_cast<const uint8_t*>(labels.pointer)[offset];
    case Label::kInt8: return static_cast<const int8_t*>(labels.pointer)[offset];
    case Label::kInt16: return static_cast<const int16_t*>(labels.pointer)[offset];
    case Label::kInt32: return static_cast<const int32_t*>(labels.pointer)[offset];
    default: return static_cast<const int64_t*>(labels.pointer)[offset];
  }
}

// The offset of pixel `index` (row-major over `size`) in a tensor with these strides.
struct Space {
  int dims;
  int64_t size[kMaxDims];
};

DSCT_DEVICE int64_t offset_of(int64_t index, const Space& space, const int64_t (&stride)[kMaxDims]) {
  int64_t offset = 0;
#pragma unroll
  for (int d = kMaxDims - 1; d > 0; --d) { // unrolled: a run-time index would put the arrays on the stack
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

// Partial counts of valid pixels and their class weights, and the ticket set to zero for the main kernel.
template <typename A>
__global__ void count_pixels(Labels labels, Space space, PixelStride stride, int64_t pixels, const A* class_weight,
                             bool count, Workspace work) {
  DSCT_SHARED(shared);
  double sums[2] = {0, 0};
  if (count) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    int valid = 0;
    for (int64_t p = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; p < pixels; p += step) {
      const int64_t offset = space.dims == 1 ? p * stride.at[0] : offset_of(p, space, stride.at);
      const int y = classify(load_label(labels, offset), labels);
      valid += y != kIgnored;
      if (class_weight != nullptr && y >= 0) sums[1] += class_weight[y];
    }
    sums[0] = valid;
  } else if (blockIdx.x == 0 && threadIdx.x == 0) {
    sums[0] = static_cast<double>(pixels); // every pixel is valid
  }
  block_sum(sums, reinterpret_cast<double*>(shared));
  if (threadIdx.x == 0) {
    work.counts[blockIdx.x] = static_cast<long long>(sums[0]);
    work.weights[blockIdx.x] = class_weight == nullptr ? sums[0] : sums[1];
    if (blockIdx.x == 0) *work.ticket = 0;
  }
}

// The totals of count_pixels, in every thread. Each block adds the few partials up again, in the same order: cheaper
// than one more launch. Needs 64 doubles of shared memory, and a barrier before they are used again.
struct Totals {
  double count, weight;
};
DSCT_DEVICE Totals add_counts(const Workspace& work, double* scratch) {
  double sums[2] = {0, 0};
  for (int i = threadIdx.x; i < work.count_blocks; i += blockDim.x) {
    sums[0] += static_cast<double>(work.counts[i]);
    sums[1] += work.weights[i];
  }
  block_sum(sums, scratch);
  return {sums[0], sums[1]};
}

// Adds this block's sums to the result; the last block to arrive reduces all of them in block order.
template <typename A>
DSCT_DEVICE void finish_block(A ce, A tckd, A nckd, const Terms<A>& terms, const Workspace& work,
                              const Result<A>& result, Totals totals, double* scratch) {
  double sums[3] = {static_cast<double>(ce), static_cast<double>(tckd), static_cast<double>(nckd)};
  __syncthreads(); // scratch may still be read
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
  for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) {
    const volatile double* partial = work.partials + 3 * static_cast<int64_t>(i);
    sums[0] += partial[0], sums[1] += partial[1], sums[2] += partial[2];
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
      if (weight[i] != 0) loss += weight[i] * part[i]; // weight 0 takes no part: 0 * inf would be NaN
    }
    if (result.loss != nullptr) *result.loss = static_cast<A>(loss);
    *result.grad_scale = static_cast<A>(result.defer ? kd : 1);
  }
}

template <typename A> DSCT_DEVICE A pixel_loss(const PixelLoss<A>& part, const Terms<A>& terms) {
  const A squared = terms.temperature * terms.temperature;
  A loss = 0;
  if (terms.ce_weight != 0) loss += terms.ce_weight * part.ce;
  if (terms.tckd_weight != 0) loss += terms.tckd_weight * squared * part.tckd;
  if (terms.nckd_weight != 0) loss += terms.nckd_weight * squared * part.nckd;
  return loss;
}

// Gradient factors of the two normalisers. With `defer` both are multiplied by the count of valid pixels.
template <typename A> DSCT_DEVICE void norms_of(const Totals& totals, bool mean, bool defer, A& kd, A& ce) {
  kd = ce = 1;
  if (!mean) return;
  const double count = totals.count > 0 ? totals.count : 1, weight = totals.weight != 0 ? totals.weight : 1;
  kd = static_cast<A>(defer ? 1 : 1 / count);
  ce = static_cast<A>(defer ? count / weight : 1 / weight);
}

// ------------------------------------------------------------------------------------------------- classes in planes
// Each thread loads 16 bytes of pixels from each of its classes: 2 * kClasses loads in flight before the first use.
struct Planes {
  const void* student;
  const void* teacher;
  void* grad;
  void* loss_map;
  const void* class_weight;
  int64_t student_image, student_class, teacher_image, teacher_class, grad_image, grad_class, target_image;
  int64_t pixels_per_image; // a multiple of the pixels in 16 bytes
  unsigned tiles_per_image;
  int classes;
  int lanes_log2; // threads side by side along the pixels
  int groups;     // groups of threads that share out the classes: class j belongs to group j % groups
  int team_log2;  // threads that join one pixel's groups
};

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kScratch = 96; // doubles at the front of shared memory, for block_sum

template <typename T> DSCT_DEVICE const T* at(const void* base, int64_t offset) {
  return static_cast<const T*>(base) + offset;
}

// Both networks' logits of one thread: classes first, first + step, ... Absent ones become -inf, which counts as absent.
template <typename T, int kClasses>
DSCT_DEVICE void load_classes(const Planes& in, unsigned image, int64_t pixel, int first, int step, bool present,
                              Pack<T> (&s)[kClasses], Pack<T> (&t)[kClasses]) {
  const T* student = at<T>(in.student, image * in.student_image + pixel);
  const T* teacher = at<T>(in.teacher, image * in.teacher_image + pixel);
#pragma unroll
  for (int i = 0; i < kClasses; ++i) {
    const int j = first + i * step;
    const bool here = present && j < in.classes;
    s[i] = here ? load_pack(student + j * in.student_class) : fill_pack<T>(-infinity<float>());
    t[i] = here ? load_pack(teacher + j * in.teacher_class) : fill_pack<T>(-infinity<float>());
  }
}

// The sums of one pixel over this thread's classes, and their exponentials, which the gradient needs again.
// kFreeCE: cross-entropy with a temperature other than 1 or 2, whose exponentials are no powers of the others.
template <int kLane, bool kFreeCE, typename T, int kClasses>
DSCT_DEVICE PixelSums<float> sum_classes(const Pack<T> (&s)[kClasses], const Pack<T> (&t)[kClasses], int first,
                                         int step, int y, const Terms<float>& terms, float (&es)[kClasses],
                                         float (&et)[kClasses], float (&ec)[kFreeCE ? kClasses : 1]) {
  PixelSums<float> z;
  z.student_max = z.teacher_max = z.student_target = z.teacher_target = -infinity<float>();
#pragma unroll
  for (int i = 0; i < kClasses; ++i) {
    float zs = static_cast<float>(s[i].lane[kLane]), zt = static_cast<float>(t[i].lane[kLane]);
    if (first + i * step == y) {
      z.student_target = zs, z.teacher_target = zt;
      zs = zt = -infinity<float>();
    }
    z.student_max = larger(z.student_max, zs);
    z.teacher_max = larger(z.teacher_max, zt);
    es[i] = zs, et[i] = zt;
  }
  if (z.student_max == -infinity<float>()) z.student_max = 0;
  if (z.teacher_max == -infinity<float>()) z.teacher_max = 0;
  z.student_sum = z.teacher_sum = z.cross = z.student_sum_ce = 0;
#pragma unroll
  for (int i = 0; i < kClasses; ++i) {
    const float ds = es[i] - z.student_max, dt = et[i] - z.teacher_max;
    es[i] = exp2_fast(ds * terms.log2_scale);
    et[i] = exp2_fast(dt * terms.log2_scale);
    z.student_sum += es[i];
    z.teacher_sum += et[i];
    if (et[i] != 0) z.cross += et[i] * (dt - ds); // 0 * log 0 = 0
    if constexpr (kFreeCE) {
      ec[i] = exp2_fast(ds * kLog2E);
      z.student_sum_ce += ec[i];
    } else if (terms.with_ce) { // exp(d) = exp(d / 2)^2 at temperature 2
      z.student_sum_ce += terms.temperature == 2 ? es[i] * es[i] : es[i];
    }
  }
  return z;
}

// The gradient of one pixel over this thread's classes replaces the student's logits in the packs.
template <int kLane, bool kFreeCE, typename T, int kClasses>
DSCT_DEVICE void put_gradient(Pack<T> (&s)[kClasses], int first, int step, int y, const Terms<float>& terms,
                              const PixelGrad<float>& grad, const float (&es)[kClasses], const float (&et)[kClasses],
                              const float (&ec)[kFreeCE ? kClasses : 1]) {
#pragma unroll
  for (int i = 0; i < kClasses; ++i) {
    float g = grad.student * es[i] + grad.teacher * et[i];
    if constexpr (kFreeCE) {
      g += grad.ce * ec[i];
    } else if (terms.with_ce) {
      g += grad.ce * (terms.temperature == 2 ? es[i] * es[i] : es[i]);
    }
    s[i].lane[kLane] = static_cast<T>(first + i * step == y ? grad.target : g);
  }
  if (y == kIgnored) { // whatever stands in the logits
#pragma unroll
    for (int i = 0; i < kClasses; ++i) s[i].lane[kLane] = static_cast<T>(0.0f);
  }
}

template <typename T, int kClasses>
DSCT_DEVICE void store_classes(const Planes& in, unsigned image, int64_t pixel, int first, int step,
                               const Pack<T> (&g)[kClasses]) {
  T* grad = static_cast<T*>(in.grad) + image * in.grad_image + pixel;
#pragma unroll
  for (int i = 0; i < kClasses; ++i) {
    const int j = first + i * step;
    if (j < in.classes) store_pack(grad + j * in.grad_class, g[i]);
  }
}

// Loss and gradient factors of a pixel whatever its label turned out to be.
template <typename A>
DSCT_DEVICE void judge_pixel(const PixelSums<A>& z, int y, const Terms<A>& terms, const void* class_weight, A kd_norm,
                             A ce_norm, PixelLoss<A>& loss, PixelGrad<A>& grad) {
  loss = {0, 0, 0};
  grad = {0, 0, 0, 0};
  if (y >= 0) {
    const A weight = class_weight == nullptr ? A(1) : static_cast<const A*>(class_weight)[y];
    finish_pixel(z, terms, weight, kd_norm, ce_norm, loss, grad);
  } else if (y == kBad) {
    const A nan = std::numeric_limits<A>::quiet_NaN();
    loss = {nan, nan, nan};
    grad = {nan, nan, nan, nan};
  }
}

// Calls body(integral_constant<int, 0>) ... body(<kCount - 1>): a loop whose index is a compile-time constant.
template <int kCount, int kFirst = 0, typename Body> DSCT_DEVICE void repeat(const Body& body) {
  if constexpr (kFirst < kCount) {
    body(std::integral_constant<int, kFirst>{});
    repeat<kCount, kFirst + 1>(body);
  }
}

// Few classes: one thread holds all of them for its pixels.
template <typename T, int kClasses, bool kFreeCE>
__global__ void __launch_bounds__(128, 1) planes_whole(Planes in, Labels labels, Terms<float> terms, Workspace work,
                                                    Result<float> result) {
  constexpr int kPixels = Pack<T>::kSize;
  DSCT_SHARED(shared);
  double* scratch = reinterpret_cast<double*>(shared);
  const unsigned image = blockIdx.x / in.tiles_per_image, tile = blockIdx.x - image * in.tiles_per_image;
  const int64_t pixel = (static_cast<int64_t>(tile) * blockDim.x + threadIdx.x) * kPixels;
  const bool inside = pixel < in.pixels_per_image;

  Pack<T> s[kClasses], t[kClasses];
  load_classes(in, image, pixel, 0, 1, inside, s, t);
  int y[kPixels];
  if (labels.type == Label::kTeacher) { // the teacher's argmax, smallest index on a tie
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
  } else {
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      y[v] = inside ? classify(load_label(labels, image * in.target_image + pixel + v), labels) : kIgnored;
    }
  }
  const Totals totals = add_counts(work, scratch);
  float kd_norm, ce_norm;
  norms_of(totals, result.mean, result.defer, kd_norm, ce_norm);

  PixelLoss<float> total = {0, 0, 0};
  repeat<kPixels>([&](auto lane) {
    constexpr int v = decltype(lane)::value;
    float es[kClasses], et[kClasses], ec[kFreeCE ? kClasses : 1];
    const PixelSums<float> z = sum_classes<v, kFreeCE>(s, t, 0, 1, y[v], terms, es, et, ec);
    PixelLoss<float> loss;
    PixelGrad<float> grad;
    judge_pixel(z, y[v], terms, in.class_weight, kd_norm, ce_norm, loss, grad);
    total.ce += loss.ce, total.tckd += loss.tckd, total.nckd += loss.nckd;
    if (in.loss_map != nullptr && inside) {
      static_cast<float*>(in.loss_map)[image * in.pixels_per_image + pixel + v] = pixel_loss(loss, terms);
    }
    put_gradient<v, kFreeCE>(s, 0, 1, y[v], terms, grad, es, et, ec);
  });
  if (in.grad != nullptr && inside) store_classes(in, image, pixel, 0, 1, s);
  finish_block(total.ce, total.tckd, total.nckd, terms, work, result, totals, scratch);
}

// What a pixel's groups tell each other through shared memory.
enum Sum { kStudentMax, kTeacherMax, kStudentSum, kTeacherSum, kCross, kStudentSumCE, kSums };
// And what they are told back: the common maxima, and the gradient factors that belong to them.
enum Verdict { kMaxS, kMaxT, kGradS, kGradT, kGradCE, kGradTarget, kVerdicts };

DSCT_HOST_DEVICE constexpr int split_shared_floats(int groups, int tile_pixels) {
  return (kSums * groups + kVerdicts + 3) * (tile_pixels + 4);
}

// exp2 of a difference of maxima, 0 where there was no class at all.
DSCT_DEVICE float rescale(float local_max, float max, float scale) { return exp2_fast((local_max - max) * scale); }

// Many classes: each group of threads holds some of them. The groups meet twice: their sums are joined into one
// verdict per pixel, and every group turns its own exponentials into gradients by it.
template <typename T, int kClasses, bool kFreeCE>
__global__ void __launch_bounds__(256, 1) planes_split(Planes in, Labels labels, Terms<float> terms, Workspace work,
                                                    Result<float> result) {
  constexpr int kPixels = Pack<T>::kSize;
  DSCT_SHARED(shared);
  double* scratch = reinterpret_cast<double*>(shared);
  const int lanes = 1 << in.lanes_log2, groups = in.groups;
  const int lane = threadIdx.x & (lanes - 1), group = threadIdx.x >> in.lanes_log2;
  const unsigned image = blockIdx.x / in.tiles_per_image, tile = blockIdx.x - image * in.tiles_per_image;
  const int tile_pixels = lanes * kPixels, row = tile_pixels + 4; // 4 more: groups fall into different banks
  const int64_t tile_start = static_cast<int64_t>(tile) * tile_pixels;
  const int64_t pixel = tile_start + lane * kPixels;
  const bool working = pixel < in.pixels_per_image && group < groups; // the last warp may have threads to spare

  float* sums = reinterpret_cast<float*>(scratch + kScratch); // [kSums][groups][row]
  float* verdict = sums + kSums * groups * row;               // [kVerdicts][row]
  float* targets = verdict + kVerdicts * row;                 // [2][row]: z_y of student and teacher
  int* y_tile = reinterpret_cast<int*>(targets + 2 * row);    // [row]: labels

  Pack<T> s[kClasses], t[kClasses];
  load_classes(in, image, pixel, group, groups, working, s, t);
  if (labels.type == Label::kTeacher) { // the teacher's argmax, smallest index on a tie
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
        best_logit[group * row + lane * kPixels + v] = best;
        best_class[group * row + lane * kPixels + v] = j;
      }
    }
    __syncthreads();
    for (int p = threadIdx.x; p < tile_pixels; p += blockDim.x) {
      if (tile_start + p >= in.pixels_per_image) {
        y_tile[p] = kIgnored;
        continue;
      }
      float best = best_logit[p];
      int y = best_class[p];
      for (int g = 1; g < groups; ++g) {
        const float z = best_logit[g * row + p];
        const int j = best_class[g * row + p];
        if (z > best || (z == best && j < y)) best = z, y = j;
      }
      y_tile[p] = y;
    }
  } else {
    for (int p = threadIdx.x; p < tile_pixels; p += blockDim.x) {
      const bool inside = tile_start + p < in.pixels_per_image;
      y_tile[p] = inside ? classify(load_label(labels, image * in.target_image + tile_start + p), labels) : kIgnored;
    }
  }
  const Totals totals = add_counts(work, scratch); // its barrier also shows y_tile to everyone
  float kd_norm, ce_norm;
  norms_of(totals, result.mean, result.defer, kd_norm, ce_norm);

  float es[kPixels][kClasses], et[kPixels][kClasses], ec[kFreeCE ? kPixels : 1][kFreeCE ? kClasses : 1];
  Pack<float> mine[kSums]; // four pixels at a time, so that they go out 16 bytes wide
  repeat<kPixels>([&](auto index) {
    constexpr int v = decltype(index)::value;
    const int p = lane * kPixels + v, y = y_tile[p];
    const PixelSums<float> z =
        sum_classes<v, kFreeCE>(s, t, group, groups, y, terms, es[v], et[v], ec[kFreeCE ? v : 0]);
    // An absent group must not raise the common maximum.
    mine[kStudentMax].lane[v % 4] = z.student_sum == 0 ? -infinity<float>() : z.student_max;
    mine[kTeacherMax].lane[v % 4] = z.teacher_sum == 0 ? -infinity<float>() : z.teacher_max;
    mine[kStudentSum].lane[v % 4] = z.student_sum;
    mine[kTeacherSum].lane[v % 4] = z.teacher_sum;
    mine[kCross].lane[v % 4] = z.cross;
    mine[kStudentSumCE].lane[v % 4] = z.student_sum_ce;
    if (working) {
      if (y >= 0 && y % groups == group) targets[p] = z.student_target, targets[row + p] = z.teacher_target;
      if constexpr (v % 4 == 3) {
#pragma unroll
        for (int q = 0; q < kSums; ++q) {
          *reinterpret_cast<Pack<float>*>(sums + (q * groups + group) * row + p - 3) = mine[q];
        }
      }
    }
  });
  __syncthreads();

  PixelLoss<float> total = {0, 0, 0};
  const int team = 1 << in.team_log2;
  for (int item = threadIdx.x; item < tile_pixels * team; item += blockDim.x) { // whole warps come and go together
    const int p = item >> in.team_log2, member = item & (team - 1);
    const bool inside = tile_start + p < in.pixels_per_image;
    auto sum_at = [&](int q, int g) { return sums[(q * groups + g) * row + p]; };
    PixelSums<float> z;
    z.student_max = z.teacher_max = -infinity<float>();
    for (int g = member; inside && g < groups; g += team) {
      z.student_max = larger(z.student_max, sum_at(kStudentMax, g));
      z.teacher_max = larger(z.teacher_max, sum_at(kTeacherMax, g));
    }
    for (int offset = 1; offset < team; offset *= 2) {
      z.student_max = larger(z.student_max, __shfl_xor_sync(kFullMask, z.student_max, offset));
      z.teacher_max = larger(z.teacher_max, __shfl_xor_sync(kFullMask, z.teacher_max, offset));
    }
    if (z.student_max == -infinity<float>()) z.student_max = 0;
    if (z.teacher_max == -infinity<float>()) z.teacher_max = 0;
    z.student_sum = z.teacher_sum = z.cross = z.student_sum_ce = 0;
    for (int g = member; inside && g < groups; g += team) {
      const float max_s = sum_at(kStudentMax, g), max_t = sum_at(kTeacherMax, g), sum_t = sum_at(kTeacherSum, g);
      const float factor_t = rescale(max_t, z.teacher_max, terms.log2_scale);
      z.student_sum += sum_at(kStudentSum, g) * rescale(max_s, z.student_max, terms.log2_scale);
      z.student_sum_ce += sum_at(kStudentSumCE, g) * rescale(max_s, z.student_max, kLog2E);
      z.teacher_sum += sum_t * factor_t;
      if (factor_t != 0 && sum_t != 0) {
        z.cross += factor_t * (sum_at(kCross, g) + sum_t * ((max_t - z.teacher_max) - (max_s - z.student_max)));
      }
    }
    for (int offset = 1; offset < team; offset *= 2) {
      z.student_sum += __shfl_xor_sync(kFullMask, z.student_sum, offset);
      z.student_sum_ce += __shfl_xor_sync(kFullMask, z.student_sum_ce, offset);
      z.teacher_sum += __shfl_xor_sync(kFullMask, z.teacher_sum, offset);
      z.cross += __shfl_xor_sync(kFullMask, z.cross, offset);
    }
    if (member != 0 || !inside) continue;
    const int y = y_tile[p];
    if (y >= 0) z.student_target = targets[p], z.teacher_target = targets[row + p];
    PixelLoss<float> loss;
    PixelGrad<float> grad;
    judge_pixel(z, y, terms, in.class_weight, kd_norm, ce_norm, loss, grad);
    total.ce += loss.ce, total.tckd += loss.tckd, total.nckd += loss.nckd;
    if (in.loss_map != nullptr) {
      static_cast<float*>(in.loss_map)[image * in.pixels_per_image + tile_start + p] = pixel_loss(loss, terms);
    }
    verdict[kMaxS * row + p] = z.student_max;
    verdict[kMaxT * row + p] = z.teacher_max;
    verdict[kGradS * row + p] = grad.student;
    verdict[kGradT * row + p] = grad.teacher;
    verdict[kGradCE * row + p] = grad.ce;
    verdict[kGradTarget * row + p] = grad.target;
  }
  __syncthreads();

  if (in.grad != nullptr && working) {
    repeat<kPixels>([&](auto index) {
      constexpr int v = decltype(index)::value;
      const int p = lane * kPixels + v;
      const float max_s = sums[(kStudentMax * groups + group) * row + p] - verdict[kMaxS * row + p];
      const float max_t = sums[(kTeacherMax * groups + group) * row + p] - verdict[kMaxT * row + p];
      PixelGrad<float> grad;
      grad.student = verdict[kGradS * row + p] * exp2_fast(max_s * terms.log2_scale);
      grad.teacher = verdict[kGradT * row + p] * exp2_fast(max_t * terms.log2_scale);
      grad.ce = verdict[kGradCE * row + p] * exp2_fast(max_s * kLog2E);
      grad.target = verdict[kGradTarget * row + p];
      put_gradient<v, kFreeCE>(s, group, groups, y_tile[p], terms, grad, es[v], et[v], ec[kFreeCE ? v : 0]);
    });
    store_classes(in, image, pixel, group, groups, s);
  }
  finish_block(total.ce, total.tckd, total.nckd, terms, work, result, totals, scratch);
}

// ------------------------------------------------------------------------------------------------------- any layout
struct AnyLayout {
  const void* student;
  const void* teacher;
  void* grad;
  void* loss_map;
  const void* class_weight;
  Dtype student_dtype, teacher_dtype;
  int64_t student_class, teacher_class, grad_class, pixels;
  int classes;
  Space space;
  PixelStride student_stride, teacher_stride, grad_stride, target_stride;
};

template <typename A> DSCT_DEVICE A load_any(const void* base, Dtype dtype, int64_t offset) {
  switch (dtype) {
    case Dtype::kFloat32: return static_cast<A>(static_cast<const float*>(base)[offset]);
    case Dtype::kFloat64: return static_cast<A>(static_cast<const double*>(base)[offset]);
    case Dtype::kFloat16: return static_cast<A>(static_cast<float>(static_cast<const Half*>(base)[offset]));
    default: return static_cast<A>(static_cast<float>(static_cast<const BFloat16*>(base)[offset]));
  }
}

template <typename A> DSCT_DEVICE void store_any(void* base, Dtype dtype, int64_t offset, A value) {
  switch (dtype) {
    case Dtype::kFloat32: static_cast<float*>(base)[offset] = static_cast<float>(value); break;
    case Dtype::kFloat64: static_cast<double*>(base)[offset] = static_cast<double>(value); break;
    case Dtype::kFloat16: static_cast<Half*>(base)[offset] = static_cast<Half>(static_cast<float>(value)); break;
    default: static_cast<BFloat16*>(base)[offset] = static_cast<BFloat16>(static_cast<float>(value));
  }
}

// One thread per pixel; the classes are read three times, the second and third from cache where they fit.
template <typename A>
__global__ void __launch_bounds__(128, 1) any_layout(AnyLayout in, Labels labels, Terms<A> terms, Workspace work,
                                                  Result<A> result) {
  DSCT_SHARED(shared);
  double* scratch = reinterpret_cast<double*>(shared);
  const Totals totals = add_counts(work, scratch);
  A kd_norm, ce_norm;
  norms_of(totals, result.mean, result.defer, kd_norm, ce_norm);
  constexpr A kLog2 = A(1.4426950408889634074);

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
      y = classify(load_label(labels, offset_of(pixel, in.space, in.target_stride.at)), labels);
    }
    PixelSums<A> z;
    z.student_max = z.teacher_max = z.student_target = z.teacher_target = -infinity<A>();
    for (int j = 0; j < in.classes; ++j) {
      const A zs = student(j), zt = teacher(j);
      if (j == y) {
        z.student_target = zs, z.teacher_target = zt;
      } else {
        z.student_max = larger(z.student_max, zs);
        z.teacher_max = larger(z.teacher_max, zt);
      }
    }
    if (z.student_max == -infinity<A>()) z.student_max = 0;
    if (z.teacher_max == -infinity<A>()) z.teacher_max = 0;
    z.student_sum = z.teacher_sum = z.cross = z.student_sum_ce = 0;
    for (int j = 0; j < in.classes; ++j) {
      if (j == y) continue;
      const A ds = student(j) - z.student_max, dt = teacher(j) - z.teacher_max;
      const A exp_t = exp2_fast(dt * terms.log2_scale);
      z.student_sum += exp2_fast(ds * terms.log2_scale);
      z.teacher_sum += exp_t;
      if (exp_t != 0) z.cross += exp_t * (dt - ds);
      if (terms.with_ce) z.student_sum_ce += exp2_fast(ds * kLog2);
    }
    PixelLoss<A> loss;
    PixelGrad<A> grad;
    judge_pixel(z, y, terms, in.class_weight, kd_norm, ce_norm, loss, grad);
    total.ce += loss.ce, total.tckd += loss.tckd, total.nckd += loss.nckd;
    if (in.loss_map != nullptr) static_cast<A*>(in.loss_map)[pixel] = pixel_loss(loss, terms);
    if (in.grad == nullptr) continue;
    const int64_t at_g = offset_of(pixel, in.space, in.grad_stride.at);
    for (int j = 0; j < in.classes; ++j) {
      A g = 0;
      if (y != kIgnored) {
        const A ds = student(j) - z.student_max, dt = teacher(j) - z.teacher_max;
        g = grad.student * exp2_fast(ds * terms.log2_scale) + grad.teacher * exp2_fast(dt * terms.log2_scale);
        if (terms.with_ce) g += grad.ce * exp2_fast(ds * kLog2);
        if (j == y) g = grad.target;
      }
      store_any(in.grad, in.student_dtype, at_g + j * in.grad_class, g);
    }
  }
  finish_block(total.ce, total.tckd, total.nckd, terms, work, result, totals, scratch);
}

// ------------------------------------------------------------------------------------------------------------- plans
constexpr int kCountThreads = 256, kMaxCountBlocks = 256, kAnyThreads = 128, kWholeThreads = 128, kSplitThreads = 256;
constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();

// How many classes a thread may hold: the variants that are compiled, within what its registers take without a spill.
template <int... kCounts> struct ClassCounts {
  static constexpr int kLargest = std::max({kCounts...});
};
using WholeClasses = ClassCounts<2, 4, 6, 8>;
template <typename T>
using SplitClasses = std::conditional_t<sizeof(T) == 4, ClassCounts<6, 8, 10>, ClassCounts<4, 5, 6>>;

// Calls body(integral_constant<int, m>) for the m among kCounts that equals `count`.
template <int... kCounts, typename Body> void one_of(ClassCounts<kCounts...>, int count, const Body& body) {
  ((count == kCounts ? body(std::integral_constant<int, kCounts>{}) : void()), ...);
}

// The count that pads K classes least over groups of threads, then the one with the fewest groups.
constexpr int kMaxGroups = 64;
template <int... kCounts> int best_count(ClassCounts<kCounts...>, int classes) {
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
  const char* name = "any_layout"; // the kernel
  bool fast = false, split = false;
  int classes_per_thread = 0, groups = 1, lanes_log2 = 0, team_log2 = 0, threads = kAnyThreads;
  int64_t tiles_per_image = 0, blocks = 1;
  int count_blocks = 1;
  size_t shared = kScratch * sizeof(double);
};

inline int bytes_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

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
  if (args.dims == 0) args.dims = 1, args.size[0] = 1; // one pixel
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
  plan.count_blocks = count ? static_cast<int>(std::clamp<int64_t>(ceil_div(args.pixels, kCountThreads * 16), 1,
                                                                   kMaxCountBlocks))
                            : 1;
  if (planes_fit(args)) {
    const bool wide = args.student_dtype == Dtype::kFloat32;
    const int vector = wide ? 4 : 8, k = static_cast<int>(args.classes);
    const int64_t images = args.dims == 2 ? args.size[0] : 1, per_image = args.size[args.dims - 1];
    plan.fast = true;
    plan.name = "planes_whole";
    if (k <= WholeClasses::kLargest) { // one group holds all
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
    plan.blocks = plan.tiles_per_image * images;
    if (plan.blocks <= kMaxBlocks && plan.shared <= static_cast<size_t>(device.shared_bytes)) return plan;
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

template <typename A> Terms<A> terms_of(const TnkdArgs& args) {
  return {static_cast<A>(args.ce_weight),
          static_cast<A>(args.tckd_weight),
          static_cast<A>(args.nckd_weight),
          static_cast<A>(args.temperature),
          static_cast<A>(1 / args.temperature),
          static_cast<A>(1.4426950408889634074 / args.temperature),
          args.with_ce};
}

template <typename A> Result<A> result_of(const TnkdArgs& args) {
  return {static_cast<A*>(args.loss), static_cast<A*>(args.parts), static_cast<A*>(args.grad_scale), args.mean,
          args.mean && args.student_dtype == Dtype::kFloat16};
}

inline Workspace workspace_of(const TnkdArgs& args, const TnkdPlan& plan) {
  char* base = static_cast<char*>(args.workspace) + 16;
  Workspace work;
  work.ticket = static_cast<unsigned*>(args.workspace);
  work.counts = reinterpret_cast<long long*>(base);
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
  in.loss_map = args.loss_map, in.class_weight = args.class_weight;
  auto image_stride = [&](const Strides& strides) { return last == 0 ? 0 : strides.pixel[0]; };
  in.student_image = image_stride(args.student_strides), in.student_class = args.student_strides.klass;
  in.teacher_image = image_stride(args.teacher_strides), in.teacher_class = args.teacher_strides.klass;
  in.grad_image = image_stride(args.grad_strides), in.grad_class = args.grad_strides.klass;
  in.target_image = last == 0 ? 0 : args.target_strides[0];
  in.pixels_per_image = args.size[last];
  in.tiles_per_image = static_cast<unsigned>(plan.tiles_per_image);
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
  AnyLayout in;
  in.student = args.student, in.teacher = args.teacher, in.grad = args.grad;
  in.loss_map = args.loss_map, in.class_weight = args.class_weight;
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

// The whole op: two launches on `stream`, nothing else.
inline void tnkd_run(const TnkdArgs& args, const TnkdPlan& plan, cudaStream_t stream) {
  const bool wide = args.student_dtype == Dtype::kFloat64 || args.teacher_dtype == Dtype::kFloat64;
  const Workspace work = workspace_of(args, plan);
  const Labels labels = {args.target, !args.has_target ? Label::kTeacher : args.label, args.has_ignore_index,
                         args.ignore_index, static_cast<int>(args.classes)};
  Space space;
  PixelStride target_stride;
  space.dims = args.dims;
  for (int d = 0; d < kMaxDims; ++d) space.size[d] = args.size[d], target_stride.at[d] = args.target_strides[d];
  const bool count = args.mean && args.has_target && (args.has_ignore_index || args.class_weight != nullptr);
  const size_t shared = 2 * kWarp * sizeof(double);
  if (wide) {
    launch("tnkd", count_pixels<double>, plan.count_blocks, kCountThreads, shared, stream, labels, space,
           target_stride, args.pixels, static_cast<const double*>(args.class_weight), count, work);
    return launch_any<double>(plan, args, labels, work, stream);
  }
  launch("tnkd", count_pixels<float>, plan.count_blocks, kCountThreads, shared, stream, labels, space, target_stride,
         args.pixels, static_cast<const float*>(args.class_weight), count, work);
  if (!plan.fast) return launch_any<float>(plan, args, labels, work, stream);
  switch (args.student_dtype) {
    case Dtype::kFloat32: return launch_planes<float>(plan, args, labels, work, stream);
    case Dtype::kFloat16: return launch_planes<Half>(plan, args, labels, work, stream);
    default: return launch_planes<BFloat16>(plan, args, labels, work, stream);
  }
}

// --------------------------------------------------------------------------------------------------- backward's factor
// grad *= factor in place; when the factor is exactly 1, as in most training loops, nothing is read or written.
template <typename T, typename A> __global__ void scale_in_place(T* grad, const A* factor, int64_t count, bool packs) {
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
    case Dtype::kFloat64: return launch_scale<double, double>(grad, factor, count, device, stream);
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

} // namespace dsct::cuda
