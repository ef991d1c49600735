// TNKD and cross-entropy on the GPU: loss and gradient in one pass over the logits.
//
//   count_pixels   labels only: how many pixels are valid, and the sum of their class weights (block partials)
//   planes_whole   classes in planes (NCHW), few of them: a thread holds all classes of 16 bytes of pixels in registers
//   staged         more classes, channels_last, mixed layouts, odd sizes: tiles pass through shared memory, and
//                  neighbouring threads share a pixel's classes
//   any_layout     one thread per pixel, any strides, any K, any dtype: what the fast kernels cannot take
//
// Every block writes its partial sums; the block that finishes last adds them up in block order, so the result does
// not depend on timing. This source also compiles for the host (see cuda_launch.h).
#pragma once

#include <algorithm>
#include <array>
#include <type_traits>

#include "common/cuda_math.h"
#include "tnkd/pixel_math.h"

namespace dsct::cuda {

enum class Label : int { kTeacher, kUInt8, kInt8, kInt16, kInt32, kInt64 };  // kTeacher: no target, its argmax serves

constexpr int kMaxDims = 6;
constexpr int kIgnored = -1;    // what a label becomes where it is ignore_index
constexpr int kBad = -2;        // and where it is no class at all
constexpr int kElsewhere = -3;  // a class, but not one of this thread's

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
  // On the device, (4,) in the order above and (); nullptr: the numbers above. Read by the kernels, never by the host.
  const double* values = nullptr;
  const int64_t* ignore_index_value = nullptr;
  bool mean, with_ce;
};

// The numbers every pixel needs, in the accumulation dtype.
template <typename A>
struct Terms {
  A ce_weight, tckd_weight, nckd_weight, temperature;
  A log2_scale;  // log2(e) / temperature
  bool with_ce;
  bool two_classes;
  const double* values;  // on the device: what the numbers are to be read from, or nullptr
};

// Divided in double, rounded once.
template <typename A>
DSCT_HOST_DEVICE void set_numbers(Terms<A>& terms, double ce_weight, double tckd_weight, double nckd_weight,
                                  double temperature) {
  terms.ce_weight = static_cast<A>(ce_weight);
  terms.tckd_weight = static_cast<A>(tckd_weight);
  terms.nckd_weight = static_cast<A>(nckd_weight);
  terms.temperature = static_cast<A>(temperature);
  terms.log2_scale = static_cast<A>(1.4426950408889634074 / temperature);
}

// Numbers on the device were seen by nobody yet: what the host refuses makes every loss NaN here.
template <typename A>
DSCT_DEVICE void read_numbers(Terms<A>& terms) {
  if (terms.values == nullptr) return;
  const double* v = terms.values;
  auto usable = [](double x) { return x >= 0 && x < std::numeric_limits<double>::infinity(); };
  const bool good = usable(v[0]) && usable(v[1]) && usable(v[2]) && usable(v[3]) && v[3] > 0;
  set_numbers(terms, v[0], v[1], v[2], good ? v[3] : std::numeric_limits<double>::quiet_NaN());
}

// Where the workspace keeps what.
struct Workspace {
  unsigned* ticket;
  double* largest_weight;  // of a class, 1 without class weights
  double* counts;          // count_blocks
  double* weights;         // count_blocks
  double* partials;        // 3 sums a block of the main kernel
  int count_blocks;
};

// What the last block needs to finish.
template <typename A>
struct Result {
  A* loss;
  A* parts;
  A* grad_scale;
  bool mean, float16;  // float16: of the gradient
};

struct Labels {
  const void* pointer;
  Label type;
  bool has_ignore, has_narrow_ignore;  // narrow: ignore_index as a label of 32 bits or fewer may hold it
  int64_t ignore;
  int narrow_ignore;
  int classes;
  bool packs;                   // runs of 8 labels lie side by side on 16 bytes (or on their own size, if less)
  const int64_t* ignore_value;  // on the device: what `ignore` is to be read from, or nullptr
};

DSCT_HOST_DEVICE void set_ignore(Labels& labels, int64_t ignore) {
  labels.has_ignore = true;
  labels.ignore = ignore;
  labels.narrow_ignore = static_cast<int>(ignore);
  labels.has_narrow_ignore = labels.narrow_ignore == ignore;
}

DSCT_DEVICE void read_ignore(Labels& labels) {
  if (labels.ignore_value != nullptr) set_ignore(labels, *labels.ignore_value);
}

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
  static DSCT_DEVICE A min(A x, A y) { return -larger(-x, -y); }
  static DSCT_DEVICE A max(A x, A y) { return larger(x, y); }
  static DSCT_DEVICE bool lt(A x, A y) { return x < y; }
  static DSCT_DEVICE bool eq(A x, A y) { return x == y; }
  static DSCT_DEVICE A select(bool m, A x, A y) { return m ? x : y; }
  static DSCT_DEVICE A reciprocal(A x) { return reciprocal_fast(x); }
  // With what the first product rounds away: equal numbers have the ratio 1, and its log is 0.
  static DSCT_DEVICE A ratio(A x, A y) {
    const A over = reciprocal_fast(y), quotient = x * over;
    return std::fma(std::fma(-quotient, y, x), over, quotient);
  }
  // With what x log2(e) rounds away: at x = -40 that is 2e-6 of the result.
  static DSCT_DEVICE A exp_nonpositive(A x) {
    constexpr A kLog2E = A(1.4426950408889634074), kRest = A(1.4426950408889634074 - double(kLog2E));
    const A t = x * kLog2E, e = exp2_fast(t);
    const A lost = ::fabs(x) < infinity<A>() ? std::fma(x, kLog2E, -t) + x * kRest : A(0);
    return std::fma(e * lost, A(0.69314718055994530942), e);
  }
  static DSCT_DEVICE A log_normal(A x) { return cuda::log_normal(x); }
};

// Loss and gradient factors of a pixel whatever its label turned out to be. The branch keeps the pixels of a thread
// apart: where selections did its work, the compiler wove eight pixels into one another, in twice the registers.
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
    const TnkdPixel<Math> kd =
        tnkd_pixel<Math>(target_s, z.student_sum, target_t, z.teacher_sum, z.cross * kLn2, factor * terms.tckd_weight,
                         terms.two_classes ? A(0) : factor * terms.nckd_weight);
    // One class beside the target leaves nothing to compare, but e is 2^(rounding of its base), not 1.
    loss = {0, kd.tckd, terms.two_classes ? A(0) : kd.nckd};
    grad = {kd.coef_s, kd.coef_t, 0, kd.grad_target};
    if (terms.with_ce) {
      const A class_factor = class_weight == nullptr ? A(1) : class_weight[y];
      const CePixel<Math> ce = ce_pixel<Math>(std::fma(z.student_target, kLog2E, -z.ce_base) * kLn2, z.ce_sum);
      const A weight = terms.ce_weight * class_factor * ce_norm;
      const bool used = class_factor != 0;
      loss.ce = used ? class_factor * ce.ce : A(0);
      grad.target -= used ? weight * ce.miss : A(0);
      grad.ce = used ? weight * ce.coef : A(0);
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
      result.parts[i] = static_cast<A>(part[i]);
      // Weight 0 takes no part, 0 * inf would be NaN; but a NaN is never hidden.
      if (weight[i] != 0 || part[i] != part[i]) loss += weight[i] * part[i];
    }
    if (result.loss != nullptr) *result.loss = static_cast<A>(loss);
    *result.grad_scale = static_cast<A>(scalbn(1.0, norms.outside));
  }
}

template <typename A>
DSCT_DEVICE A pixel_loss(const PixelLoss<A>& part, const Terms<A>& terms) {
  const A squared = terms.temperature * terms.temperature;
  A loss = 0;
  if (terms.ce_weight != 0) loss += terms.ce_weight * part.ce;
  if (terms.tckd_weight != 0 || part.tckd != part.tckd) loss += terms.tckd_weight * squared * part.tckd;
  if (terms.nckd_weight != 0) loss += terms.nckd_weight * squared * part.nckd;
  return loss;
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

// ------------------------------------------------------------------------------------------------- classes in planes
// Each thread loads 16 bytes of pixels from each of its classes: 2 * kClasses loads in flight before the first use.
struct Planes {
  const void* student;
  const void* teacher;
  void* grad;
  float* loss_map;
  const float* class_weight;
  int64_t student_image, student_class, teacher_image, teacher_class, grad_image, grad_class, target_image;
  int64_t pixels_per_image;  // a multiple of the pixels in 16 bytes
  unsigned tiles_per_image, tiles;
  int classes;
};

constexpr int kScratch = 96;  // doubles at the front of shared memory, for block_sum

template <typename T>
DSCT_DEVICE const T* at(const void* base, int64_t offset) {
  return static_cast<const T*>(base) + offset;
}

// Both networks' logits of one thread. Absent ones become -inf, which counts as absent.
template <typename T, int kClasses>
DSCT_DEVICE void load_classes(const Planes& in, unsigned image, int64_t pixel, bool present, Pack<T> (&s)[kClasses],
                              Pack<T> (&t)[kClasses]) {
  const T* student = at<T>(in.student, image * in.student_image + pixel);
  const T* teacher = at<T>(in.teacher, image * in.teacher_image + pixel);
#pragma unroll
  for (int i = 0; i < kClasses; ++i) {
    const bool here = present && i < in.classes;
    s[i] = here ? load_pack(student + i * in.student_class) : fill_pack<T>(-infinity<float>());
    t[i] = here ? load_pack(teacher + i * in.teacher_class) : fill_pack<T>(-infinity<float>());
  }
}

// Cross-entropy: none (known when the kernel is compiled: every instruction counts), none or one whose exponentials are
// powers of the student's (temperature 1 or 2), or one with its own.
enum class CE { kNone, kPowers, kOwn };

// The sums of one pixel. es and et hold this thread's logits, -inf for the target and for what is absent, and leave as
// exponentials, which the gradient needs again. `join(value, combine)` joins the threads that share a pixel.
template <CE kCE, int kClasses, typename Join>
DSCT_DEVICE PixelSums<float> sum_exponentials(float (&es)[kClasses], float (&et)[kClasses],
                                              float (&ec)[kCE == CE::kOwn ? kClasses : 1], const Terms<float>& terms,
                                              const Join& join) {
  constexpr float kLog2E = 1.4426950408889634f;
  auto larger_of = [](float a, float b) { return larger(a, b); };
  auto sum_of = [](float a, float b) { return a + b; };
  PixelSums<float> z;
  float max_s = -infinity<float>(), max_t = -infinity<float>();
#pragma unroll
  for (int i = 0; i < kClasses; ++i) {
    max_s = larger(max_s, es[i]);
    max_t = larger(max_t, et[i]);
  }
  max_s = join(max_s, larger_of);
  max_t = join(max_t, larger_of);
  if (max_s == -infinity<float>()) max_s = 0;
  if (max_t == -infinity<float>()) max_t = 0;
  z.student_base = max_s * terms.log2_scale, z.teacher_base = max_t * terms.log2_scale;
  // An exact power of 2 times the student's where its exponentials serve.
  z.ce_base = kCE == CE::kOwn ? max_s * kLog2E : z.student_base * terms.temperature;
  z.student_sum = z.teacher_sum = z.cross = z.ce_sum = z.student_target = z.teacher_target = 0;
#pragma unroll
  for (int i = 0; i < kClasses; ++i) {
    const float ds = fmaf(es[i], terms.log2_scale, -z.student_base);
    const float dt = fmaf(et[i], terms.log2_scale, -z.teacher_base);
    if constexpr (kCE == CE::kOwn) {
      ec[i] = exp2_fast(fmaf(es[i], kLog2E, -z.ce_base));
      z.ce_sum += ec[i];
    }
    es[i] = exp2_fast(ds);
    et[i] = exp2_fast(dt);
    z.student_sum += es[i];
    z.teacher_sum += et[i];
    if (et[i] != 0) z.cross = fmaf(et[i], dt - ds, z.cross);  // 0 * log 0 = 0
  }
  if (kCE == CE::kPowers && terms.with_ce) {
    if (terms.temperature == 2) {  // exp(d) = exp(d / 2)^2
#pragma unroll
      for (int i = 0; i < kClasses; ++i) z.ce_sum = fmaf(es[i], es[i], z.ce_sum);
    } else {
      z.ce_sum = z.student_sum;
    }
  }
  z.student_sum = join(z.student_sum, sum_of);
  z.teacher_sum = join(z.teacher_sum, sum_of);
  z.cross = join(z.cross, sum_of);
  if (terms.with_ce) z.ce_sum = join(z.ce_sum, sum_of);
  return z;
}

// The gradient from the exponentials of a class other than the target.
template <CE kCE>
struct GradientOf {
  PixelGrad<float> factors;
  float once, twice;  // of the student's exponential and of its square
  DSCT_DEVICE GradientOf(const Terms<float>& terms, const PixelGrad<float>& grad) : factors(grad) {
    // At temperature 1 cross-entropy's exponentials are the student's, at 2 their squares.
    const bool squares = terms.temperature == 2;
    once = squares || kCE != CE::kPowers ? grad.student : grad.student + grad.ce;
    twice = squares ? grad.ce : 0.0f;
  }
  DSCT_DEVICE float operator()(float exp_s, float exp_t, float exp_ce) const {
    if constexpr (kCE == CE::kNone) return fmaf(once, exp_s, factors.teacher * exp_t);
    if constexpr (kCE == CE::kOwn) return fmaf(factors.ce, exp_ce, fmaf(once, exp_s, factors.teacher * exp_t));
    return fmaf(fmaf(twice, exp_s, once), exp_s, factors.teacher * exp_t);
  }
};

template <typename T, int kClasses>
DSCT_DEVICE void store_classes(const Planes& in, unsigned image, int64_t pixel, const Pack<T> (&g)[kClasses]) {
  T* grad = static_cast<T*>(in.grad) + image * in.grad_image + pixel;
#pragma unroll
  for (int i = 0; i < kClasses; ++i) {
    if (i < in.classes) store_pack(grad + i * in.grad_class, g[i]);
  }
}

// Calls body(integral_constant<int, 0>) ... body(<kCount - 1>): a loop whose index is a compile-time constant, so that
// register arrays stay in registers however large the body.
template <int kCount, int kFirst = 0, typename Body>
DSCT_DEVICE void repeat(const Body& body) {
  if constexpr (kFirst < kCount) {
    body(std::integral_constant<int, kFirst>{});
    repeat<kCount, kFirst + 1>(body);
  }
}

// Few classes: one thread holds all of them for its pixels.
template <typename T, int kClasses, CE kCE, bool kOnDevice>
__global__ void __launch_bounds__(128, 1)
    planes_whole(Planes in, Labels labels, Terms<float> terms, Workspace work, Result<float> result) {
  constexpr int kPixels = Pack<T>::kSize;
  DSCT_SHARED(shared);
  double* scratch = reinterpret_cast<double*>(shared);
  terms.with_ce = kCE != CE::kNone;
  if constexpr (kOnDevice) read_numbers(terms), read_ignore(labels);
  Factors<float> factors;
  PixelLoss<float> total = {0, 0, 0};
  for (unsigned work_tile = blockIdx.x; work_tile < in.tiles; work_tile += gridDim.x) {
    const unsigned image = work_tile / in.tiles_per_image, tile = work_tile - image * in.tiles_per_image;
    const int64_t pixel = (static_cast<int64_t>(tile) * blockDim.x + threadIdx.x) * kPixels;
    const bool inside = pixel < in.pixels_per_image;
    Pack<T> s[kClasses], t[kClasses];
    load_classes(in, image, pixel, inside, s, t);
    int y[kPixels];
    if (labels.type == Label::kTeacher) {  // the teacher's argmax, smallest index on a tie
#pragma unroll
      for (int v = 0; v < kPixels; ++v) {
        float best = number(t[0], v);
        y[v] = inside ? 0 : kIgnored;
#pragma unroll
        for (int i = 1; i < kClasses; ++i) {
          const float z = number(t[i], v);
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
      wait_for_previous();
      factors = factors_of<float>(norms_of(add_counts(work, scratch), terms, work, result));
    }
    repeat<kPixels>([&](auto index) {
      constexpr int v = decltype(index)::value;
      float es[kClasses], et[kClasses], ec[kCE == CE::kOwn ? kClasses : 1], student_target = 0, teacher_target = 0;
#pragma unroll
      for (int i = 0; i < kClasses; ++i) {
        const bool is_target = i == y[v];
        const float zs = number(s[i], v), zt = number(t[i], v);
        student_target = is_target ? zs : student_target;
        teacher_target = is_target ? zt : teacher_target;
        es[i] = is_target ? -infinity<float>() : zs;
        et[i] = is_target ? -infinity<float>() : zt;
      }
      PixelSums<float> z = sum_exponentials<kCE>(es, et, ec, terms, [](float value, auto) { return value; });
      z.student_target = student_target, z.teacher_target = teacher_target;
      PixelLoss<float> loss;
      PixelGrad<float> grad;
      judge_pixel(z, y[v], terms, in.class_weight, factors.kd, factors.ce, loss, grad);
      total.ce += loss.ce, total.tckd += loss.tckd, total.nckd += loss.nckd;
      if (in.loss_map != nullptr && inside) {
        in.loss_map[image * in.pixels_per_image + pixel + v] = pixel_loss(loss, terms);
      }
      // The student's packs are not needed any more: the gradient takes their place.
      const GradientOf<kCE> gradient(terms, grad);
#pragma unroll
      for (int i = 0; i < kClasses; ++i) {
        const float g = gradient(es[i], et[i], ec[kCE == CE::kOwn ? i : 0]);
        s[i].lane[v] = static_cast<T>(i == y[v] ? grad.target : g);
      }
    });
    if (in.grad != nullptr && inside) {
      bool keep[kPixels];
#pragma unroll
      for (int v = 0; v < kPixels; ++v) keep[v] = y[v] != kIgnored;
      keep_lanes(s, keep);
      store_classes(in, image, pixel, s);
    }
  }
  finish_block(total, terms, work, result, scratch);
}

// ------------------------------------------------------------------------------------------------------------- tiles
// One network's logits, or their gradient: classes side by side at every pixel (channels_last), or pixels side by side
// in every class.
struct TileTensor {
  const void* data;
  int64_t image, klass;  // strides; pixels are `classes` apart (rows) or 1
  bool rows, packs;      // packs: every run starts on 16 bytes
};

struct Tiles {
  TileTensor student, teacher, grad;
  float* loss_map;
  const float* class_weight;
  int64_t target_image, pixels_per_image;
  unsigned tiles_per_image, tiles;
  int classes;
  int groups_log2;  // neighbouring threads that share a pixel: class j belongs to thread j % groups of them
  int pixels_log2;  // of a tile
  int tile_bytes;   // of one network's tile in shared memory
};

constexpr int staged_threads(int classes) { return classes > 16 ? 256 : 512; }
// Blocks that a multiprocessor should hold at once: registers are given out accordingly.
constexpr int staged_blocks(int classes, CE ce) { return classes > 10 || ce == CE::kOwn ? 1 : 2; }

// Between two classes of a tile in planes: 16 bytes more than its pixels, so that classes fall into different banks.
template <typename T>
DSCT_HOST_DEVICE constexpr int tile_row(int pixels) {
  return pixels + Pack<T>::kSize;
}

// Starts copying a tile into shared memory; wait_for_copies() and a barrier later it is there.
template <typename T>
DSCT_DEVICE void fetch_tile(const TileTensor& from, T* tile, unsigned image, int64_t start, int pixels,
                            const Tiles& in) {
  constexpr int kSize = Pack<T>::kSize;
  const T* base = at<T>(from.data, image * from.image + start * (from.rows ? in.classes : 1));
  if (from.rows) {
    const int count = pixels * in.classes, packs = from.packs ? count / kSize : 0;
    for (int i = threadIdx.x; i < packs; i += blockDim.x) copy_pack_async(tile + i * kSize, base + i * kSize);
    for (int i = packs * kSize + threadIdx.x; i < count; i += blockDim.x) tile[i] = base[i];
  } else {
    const int size = from.packs ? kSize : 1, width_log2 = in.pixels_log2 - (from.packs ? pack_log2<T>() : 0);
    for (int i = threadIdx.x; i < in.classes << width_log2; i += blockDim.x) {
      const int j = i >> width_log2, p = (i & ((1 << width_log2) - 1)) * size;
      if (p >= pixels) continue;
      T* to = tile + j * tile_row<T>(1 << in.pixels_log2) + p;
      if (from.packs) {
        copy_pack_async(to, base + j * from.klass + p);
      } else {
        *to = base[j * from.klass + p];
      }
    }
  }
}

template <typename T>
DSCT_DEVICE void store_tile(const TileTensor& to, const T* tile, unsigned image, int64_t start, int pixels,
                            const Tiles& in) {
  constexpr int kSize = Pack<T>::kSize;
  T* base = const_cast<T*>(at<T>(to.data, image * to.image + start * (to.rows ? in.classes : 1)));
  if (to.rows) {
    const int count = pixels * in.classes, packs = to.packs ? count / kSize : 0;
    for (int i = threadIdx.x; i < packs; i += blockDim.x) {
      store_pack(base + i * kSize, *reinterpret_cast<const Pack<T>*>(tile + i * kSize));
    }
    for (int i = packs * kSize + threadIdx.x; i < count; i += blockDim.x) base[i] = tile[i];
  } else {
    const int size = to.packs ? kSize : 1, width_log2 = in.pixels_log2 - (to.packs ? pack_log2<T>() : 0);
    for (int i = threadIdx.x; i < in.classes << width_log2; i += blockDim.x) {
      const int j = i >> width_log2, p = (i & ((1 << width_log2) - 1)) * size;
      if (p >= pixels) continue;
      const T* from = tile + j * tile_row<T>(1 << in.pixels_log2) + p;
      if (to.packs) {
        store_pack(base + j * to.klass + p, *reinterpret_cast<const Pack<T>*>(from));
      } else {
        base[j * to.klass + p] = *from;
      }
    }
  }
}

// What a pixel's threads leave for the one that judges it, and what that one answers.
enum Sum { kStudentBase, kTeacherBase, kCEBase, kStudentSum, kTeacherSum, kCross, kCESum, kSums };
enum Verdict { kGradS, kGradT, kGradCE, kGradTarget, kVerdicts };

constexpr size_t tile_shared_bytes(int pixels, int tile_bytes) {
  return kScratch * sizeof(double) + sizeof(float) * (kSums + 1) * pixels + 4 * static_cast<size_t>(tile_bytes);
}

// More classes than one thread holds, either memory layout, any alignment. Tiles of pixels pass through shared memory,
// where the next one arrives while this one is worked on; the gradient takes the student's place there and leaves in
// 16-byte stores.
template <typename T, int kClasses, CE kCE, bool kOnDevice>
__global__ void __launch_bounds__(staged_threads(kClasses), staged_blocks(kClasses, kCE))
    staged(Tiles in, Labels labels, Terms<float> terms, Workspace work, Result<float> result) {
  if constexpr (kOnDevice) read_numbers(terms), read_ignore(labels);
  DSCT_SHARED(shared);
  double* scratch = reinterpret_cast<double*>(shared);
  const int groups = 1 << in.groups_log2, group = threadIdx.x & (groups - 1), tile_pixels = 1 << in.pixels_log2;
  float* sums = reinterpret_cast<float*>(scratch + kScratch);  // [kSums][tile_pixels], then [kVerdicts][tile_pixels]
  int* y_tile = reinterpret_cast<int*>(sums + kSums * tile_pixels);
  unsigned char* buffers = reinterpret_cast<unsigned char*>(y_tile + tile_pixels);  // [2][student, teacher]
  auto buffer = [&](int which, int network) {
    return reinterpret_cast<T*>(buffers + (2 * which + network) * in.tile_bytes);
  };
  // Where class j of pixel p is: p * pixel_step + j * class_step.
  const int row = tile_row<T>(tile_pixels);
  const int pixel_s = in.student.rows ? in.classes : 1, class_s = in.student.rows ? 1 : row;
  const int pixel_t = in.teacher.rows ? in.classes : 1, class_t = in.teacher.rows ? 1 : row;

  auto fetch = [&](unsigned work_tile, int which) {
    const unsigned image = work_tile / in.tiles_per_image;
    const int64_t start = static_cast<int64_t>(work_tile - image * in.tiles_per_image) << in.pixels_log2;
    const int64_t left = in.pixels_per_image - start;
    const int pixels = left < tile_pixels ? static_cast<int>(left) : tile_pixels;
    fetch_tile(in.student, buffer(which, 0), image, start, pixels, in);
    fetch_tile(in.teacher, buffer(which, 1), image, start, pixels, in);
  };

  Factors<float> factors;
  PixelLoss<float> total = {0, 0, 0};
  if (blockIdx.x < in.tiles) fetch(blockIdx.x, 0);
  int which = 0;
  for (unsigned work_tile = blockIdx.x; work_tile < in.tiles; work_tile += gridDim.x, which ^= 1) {
    const unsigned image = work_tile / in.tiles_per_image;
    const int64_t start = static_cast<int64_t>(work_tile - image * in.tiles_per_image) << in.pixels_log2;
    const int64_t left = in.pixels_per_image - start;
    const int pixels = left < tile_pixels ? static_cast<int>(left) : tile_pixels;
    T* student = buffer(which, 0);
    const T* teacher = buffer(which, 1);
    if (labels.type != Label::kTeacher) {
      for (int p = threadIdx.x; p < tile_pixels; p += blockDim.x) {
        y_tile[p] = p < pixels ? load_label(labels, image * in.target_image + start + p) : kIgnored;
      }
    }
    if (work_tile == blockIdx.x) {
      wait_for_previous();
      factors = factors_of<float>(norms_of(add_counts(work, scratch), terms, work, result));
    }
    wait_for_copies();
    __syncthreads();
    if (work_tile + gridDim.x < in.tiles) fetch(work_tile + gridDim.x, which ^ 1);

    float es[kClasses], et[kClasses], ec[kCE == CE::kOwn ? kClasses : 1];
    const int p = threadIdx.x >> in.groups_log2;
    const bool inside = p < pixels;
#pragma unroll
    for (int i = 0; i < kClasses; ++i) {
      const int j = group + (i << in.groups_log2);
      const bool here = inside && j < in.classes;
      es[i] = here ? static_cast<float>(student[p * pixel_s + j * class_s]) : -infinity<float>();
      et[i] = here ? static_cast<float>(teacher[p * pixel_t + j * class_t]) : -infinity<float>();
    }
    int y;
    if (labels.type == Label::kTeacher) {
      // The teacher's argmax, smallest index on a tie. A NaN must lose in every thread alike.
      float best = et[0] == et[0] ? et[0] : -infinity<float>();
      y = group;
#pragma unroll
      for (int i = 1; i < kClasses; ++i) {
        if (et[i] > best) best = et[i], y = group + (i << in.groups_log2);
      }
      for (int offset = 1; offset < groups; offset *= 2) {
        const float z = __shfl_xor_sync(kFullMask, best, offset);
        const int j = __shfl_xor_sync(kFullMask, y, offset);
        if (z > best || (z == best && j < y)) best = z, y = j;
      }
      if (!inside) y = kIgnored;
      if (group == 0) y_tile[p] = y;
    } else {
      y = y_tile[p];
    }
    const int slot = y >= 0 && (y & (groups - 1)) == group ? y >> in.groups_log2 : y < 0 ? y : kElsewhere;
#pragma unroll
    for (int i = 0; i < kClasses; ++i) {
      if (i == slot) es[i] = et[i] = -infinity<float>();
    }
    auto join = [&](float value, auto combine) {
      for (int offset = 1; offset < groups; offset *= 2) {
        value = combine(value, __shfl_xor_sync(kFullMask, value, offset));
      }
      return value;
    };
    const PixelSums<float> z = sum_exponentials<kCE>(es, et, ec, terms, join);
    if (group == 0 && inside) {
      const float mine[kSums] = {z.student_base, z.teacher_base, z.ce_base, z.student_sum,
                                 z.teacher_sum,  z.cross,        z.ce_sum};
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[(i << in.pixels_log2) + p] = mine[i];
    }
    __syncthreads();

    for (int p = threadIdx.x; p < pixels; p += blockDim.x) {
      const int y = y_tile[p];
      auto sum = [&](int i) { return sums[(i << in.pixels_log2) + p]; };
      PixelSums<float> z = {sum(kStudentBase),
                            sum(kTeacherBase),
                            sum(kStudentSum),
                            sum(kTeacherSum),
                            sum(kCross),
                            sum(kCEBase),
                            sum(kCESum),
                            0,
                            0};
      if (y >= 0) {
        z.student_target = static_cast<float>(student[p * pixel_s + y * class_s]);
        z.teacher_target = static_cast<float>(teacher[p * pixel_t + y * class_t]);
      }
      PixelLoss<float> loss;
      PixelGrad<float> grad;
      judge_pixel(z, y, terms, in.class_weight, factors.kd, factors.ce, loss, grad);
      total.ce += loss.ce, total.tckd += loss.tckd, total.nckd += loss.nckd;
      if (in.loss_map != nullptr) in.loss_map[image * in.pixels_per_image + start + p] = pixel_loss(loss, terms);
      const float answer[kVerdicts] = {grad.student, grad.teacher, grad.ce, grad.target};
#pragma unroll
      for (int i = 0; i < kVerdicts; ++i) sums[(i << in.pixels_log2) + p] = answer[i];
    }
    __syncthreads();

    if (in.grad.data != nullptr) {
      if (inside) {
        auto answer = [&](int i) { return sums[(i << in.pixels_log2) + p]; };
        const GradientOf<kCE> gradient(terms, {answer(kGradS), answer(kGradT), answer(kGradCE), answer(kGradTarget)});
#pragma unroll
        for (int i = 0; i < kClasses; ++i) {
          const int j = group + (i << in.groups_log2);
          float g = gradient(es[i], et[i], ec[kCE == CE::kOwn ? i : 0]);
          if (i == slot) g = gradient.factors.target;
          if (slot == kIgnored) g = 0;  // whatever stands in the logits
          if (j < in.classes) student[p * pixel_s + j * class_s] = static_cast<T>(g);
        }
      }
      __syncthreads();
      store_tile(in.grad, student, image, start, pixels, in);
    }
    __syncthreads();  // this tile's memory is about to be filled again
  }
  finish_block(total, terms, work, result, scratch);
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

// One thread per pixel; the classes are read three times, the second and third from cache where they fit.
template <typename A, bool kOnDevice>
__global__ void __launch_bounds__(128, 1)
    any_layout(AnyLayout<A> in, Labels labels, Terms<A> terms, Workspace work, Result<A> result) {
  if constexpr (kOnDevice) read_numbers(terms), read_ignore(labels);
  DSCT_SHARED(shared);
  double* scratch = reinterpret_cast<double*>(shared);
  wait_for_previous();
  const Factors<A> factors = factors_of<A>(norms_of(add_counts(work, scratch), terms, work, result));
  constexpr A kLog2E = A(1.4426950408889634074);

  PixelLoss<A> total = {0, 0, 0};
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t pixel = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; pixel < in.pixels; pixel += step) {
    const int64_t at_s = offset_of(pixel, in.space, in.student_stride.at);
    const int64_t at_t = offset_of(pixel, in.space, in.teacher_stride.at);
    auto student = [&](int j) { return load_number<A>(in.student, in.student_dtype, at_s + j * in.student_class); };
    auto teacher = [&](int j) { return load_number<A>(in.teacher, in.teacher_dtype, at_t + j * in.teacher_class); };

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
    judge_pixel(z, y, terms, in.class_weight, factors.kd, factors.ce, loss, grad);
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
      store_number(in.grad, in.student_dtype, at_g + j * in.grad_class, g);
    }
  }
  finish_block(total, terms, work, result, scratch);
}

// ------------------------------------------------------------------------------------------------------------- plans
constexpr int kMaxCountBlocks = 256, kAnyThreads = 128, kWholeThreads = 128;
constexpr int64_t kMaxTiles = std::numeric_limits<int32_t>::max();

// How many classes a thread may hold: the variants that are compiled.
template <int... kCounts>
struct ClassCounts {
  static constexpr int kLargest = std::max({kCounts...});
};
using WholeClasses = ClassCounts<2, 4, 6, 8>;
using StagedClasses = ClassCounts<2, 4, 6, 8, 10, 16, 32>;

// Calls body(integral_constant<int, m>) for the m among kCounts that equals `count`.
template <int... kCounts, typename Body>
void one_of(ClassCounts<kCounts...>, int count, const Body& body) {
  ((count == kCounts ? body(std::integral_constant<int, kCounts>{}) : void()), ...);
}

// The smallest count of classes a thread that holds K over `groups` threads; 0 where none does.
template <int... kCounts>
int smallest_count(ClassCounts<kCounts...>, int64_t classes, int groups) {
  int best = 0;
  for (int m : {kCounts...}) {
    if (static_cast<int64_t>(m) * groups >= classes && (best == 0 || m < best)) best = m;
  }
  return best;
}

enum class Kernel { kAny, kWhole, kStaged };

// The launch chosen for a call. Workspace and kernel sizes follow from it alone.
struct TnkdPlan {
  Kernel kernel = Kernel::kAny;
  int classes_per_thread = 0, groups_log2 = 0, pixels_log2 = 0, tile_bytes = 0, threads = kAnyThreads;
  int64_t tiles_per_image = 0, tiles = 0, blocks = 1;
  int count_blocks = 1;
  size_t shared = kScratch * sizeof(double);
};

inline const char* kernel_name(Kernel kernel) {
  return kernel == Kernel::kAny ? "any_layout" : kernel == Kernel::kWhole ? "planes_whole" : "staged";
}

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

// How the fast kernels see a tensor: pixels side by side in every class, classes side by side at every pixel, or
// neither.
enum class Shape { kPlanes, kRows, kNeither };

inline Shape shape_of(const TnkdArgs& args, const Strides& strides) {
  if (args.dims > 2) return Shape::kNeither;
  const int64_t pixel = strides.pixel[args.dims - 1], per_image = args.size[args.dims - 1];
  if (strides.klass == 1 && (pixel == args.classes || per_image == 1)) return Shape::kRows;
  return pixel == 1 || per_image == 1 ? Shape::kPlanes : Shape::kNeither;
}

// Every run of pixels (or of classes) that a kernel reads at once starts on 16 bytes.
inline bool on_packs(const TnkdArgs& args, const void* data, const Strides& strides, int vector) {
  const bool images = args.dims == 1 || strides.pixel[0] % vector == 0;
  if (shape_of(args, strides) == Shape::kRows) return aligned(data) && images;
  return aligned(data) && images && strides.klass % vector == 0 && args.size[args.dims - 1] % vector == 0;
}

inline TnkdPlan tnkd_plan(const TnkdArgs& args, const Device& device) {
  const bool count = args.mean && args.has_target && (args.has_ignore_index || args.class_weight != nullptr);
  TnkdPlan plan;
  plan.count_blocks = count ? static_cast<int>(std::clamp<int64_t>(
                                  ceil_div(args.pixels, kCountThreads * kCountPixels * 2), 1, kMaxCountBlocks))
                            : 1;
  TnkdPlan any = plan;
  any.blocks = std::clamp<int64_t>(ceil_div(args.pixels, kAnyThreads), 1, 1 << 20);

  const Shape student = shape_of(args, args.student_strides), teacher = shape_of(args, args.teacher_strides);
  const Shape grad = args.grad == nullptr ? student : shape_of(args, args.grad_strides);
  if (args.pixels == 0 || args.student_dtype != args.teacher_dtype || args.student_dtype == Dtype::kFloat64 ||
      student == Shape::kNeither || teacher == Shape::kNeither || grad != student ||
      (args.has_target && args.target_strides[args.dims - 1] != 1 && args.size[args.dims - 1] != 1)) {
    return any;
  }
  const int bytes = bytes_of(args.student_dtype), vector = 16 / bytes, k = static_cast<int>(args.classes);
  const int64_t images = args.dims == 2 ? args.size[0] : 1, per_image = args.size[args.dims - 1];
  if (student == Shape::kPlanes && teacher == Shape::kPlanes && k <= WholeClasses::kLargest &&
      on_packs(args, args.student, args.student_strides, vector) &&
      on_packs(args, args.teacher, args.teacher_strides, vector) &&
      on_packs(args, args.grad, args.grad_strides, vector)) {
    plan.kernel = Kernel::kWhole;
    plan.classes_per_thread = smallest_count(WholeClasses(), k, 1);
    plan.threads = kWholeThreads;
    plan.tiles_per_image = ceil_div(per_image, kWholeThreads * vector);
  } else {
    plan.kernel = Kernel::kStaged;
    // Up to 10 classes a thread, more only where a warp cannot share them out further.
    while (plan.groups_log2 < 5 && (10 << plan.groups_log2) < k) ++plan.groups_log2;
    plan.classes_per_thread = smallest_count(StagedClasses(), k, 1 << plan.groups_log2);
    if (plan.classes_per_thread == 0) return any;
    // One pixel for each group of threads; fewer where memory would not hold two tiles of each network, but 16 bytes.
    plan.threads = plan.groups_log2 >= 3 ? staged_threads(plan.classes_per_thread) : 256;
    for (;; plan.threads /= 2) {
      if (plan.threads >> plan.groups_log2 < vector) return any;
      plan.pixels_log2 = 0;
      while ((2 << plan.pixels_log2) <= plan.threads >> plan.groups_log2) ++plan.pixels_log2;
      plan.tile_bytes = static_cast<int>(ceil_div(k * ((1 << plan.pixels_log2) + vector) * bytes, 16)) * 16;
      plan.shared = tile_shared_bytes(1 << plan.pixels_log2, plan.tile_bytes);
      if (plan.shared <= static_cast<size_t>(device.shared_bytes)) break;
    }
    const int pixels = 1 << plan.pixels_log2;
    plan.tiles_per_image = ceil_div(per_image, pixels);
  }
  plan.tiles = plan.tiles_per_image * images;
  // Enough blocks to fill the chip and to even out the end, few enough to make their fixed cost small.
  plan.blocks = std::min<int64_t>(plan.tiles, device.multiprocessors * 8);
  return plan.tiles <= kMaxTiles ? plan : any;
}

// 8 bytes for the ticket, 8 for the largest weight, then counts, weights and partials.
inline int64_t tnkd_workspace_bytes(const TnkdPlan& plan) {
  return 16 + 16 * static_cast<int64_t>(plan.count_blocks) + 24 * plan.blocks;
}

template <typename A>
Terms<A> terms_of(const TnkdArgs& args) {
  Terms<A> terms{};
  set_numbers(terms, args.ce_weight, args.tckd_weight, args.nckd_weight, args.temperature);
  terms.with_ce = args.with_ce;
  terms.two_classes = args.classes == 2;
  terms.values = args.values;
  return terms;
}

template <typename A>
Result<A> result_of(const TnkdArgs& args) {
  return {static_cast<A*>(args.loss), static_cast<A*>(args.parts), static_cast<A*>(args.grad_scale), args.mean,
          args.student_dtype == Dtype::kFloat16};
}

inline Workspace workspace_of(const TnkdArgs& args, const TnkdPlan& plan) {
  char* base = static_cast<char*>(args.workspace) + 16;
  Workspace work;
  work.ticket = static_cast<unsigned*>(args.workspace);
  work.largest_weight = static_cast<double*>(args.workspace) + 1;
  work.counts = reinterpret_cast<double*>(base);
  work.weights = reinterpret_cast<double*>(base + 8 * plan.count_blocks);
  work.partials = reinterpret_cast<double*>(base + 16 * plan.count_blocks);
  work.count_blocks = plan.count_blocks;
  return work;
}

inline int64_t image_stride(const TnkdArgs& args, const Strides& strides) {
  return args.dims == 1 ? 0 : strides.pixel[0];
}

inline bool on_device(const TnkdArgs& args) { return args.values != nullptr || args.ignore_index_value != nullptr; }

// A temperature that the host does not know may be any.
inline CE cross_entropy(const TnkdArgs& args) {
  if (!args.with_ce) return CE::kNone;
  return !on_device(args) && (args.temperature == 1 || args.temperature == 2) ? CE::kPowers : CE::kOwn;
}

template <typename T>
void launch_whole(const TnkdPlan& plan, const TnkdArgs& args, const Labels& labels, const Workspace& work,
                  const Device& device, cudaStream_t stream) {
  Planes in;
  in.student = args.student, in.teacher = args.teacher, in.grad = args.grad;
  in.loss_map = static_cast<float*>(args.loss_map), in.class_weight = static_cast<const float*>(args.class_weight);
  in.student_image = image_stride(args, args.student_strides), in.student_class = args.student_strides.klass;
  in.teacher_image = image_stride(args, args.teacher_strides), in.teacher_class = args.teacher_strides.klass;
  in.grad_image = image_stride(args, args.grad_strides), in.grad_class = args.grad_strides.klass;
  in.target_image = args.dims == 1 ? 0 : args.target_strides[0];
  in.pixels_per_image = args.size[args.dims - 1];
  in.tiles_per_image = static_cast<unsigned>(plan.tiles_per_image), in.tiles = static_cast<unsigned>(plan.tiles);
  in.classes = static_cast<int>(args.classes);
  const CE ce = cross_entropy(args);
  one_of(WholeClasses(), plan.classes_per_thread, [&](auto classes) {
    constexpr int kClasses = decltype(classes)::value;
    const auto kernel = on_device(args)     ? ce == CE::kNone ? planes_whole<T, kClasses, CE::kNone, true>
                                                              : planes_whole<T, kClasses, CE::kOwn, true>
                        : ce == CE::kNone   ? planes_whole<T, kClasses, CE::kNone, false>
                        : ce == CE::kPowers ? planes_whole<T, kClasses, CE::kPowers, false>
                                            : planes_whole<T, kClasses, CE::kOwn, false>;
    launch_early("tnkd", device, kernel, plan.blocks, plan.threads, plan.shared, stream, in, labels,
                 terms_of<float>(args), work, result_of<float>(args));
  });
}

template <typename T>
void launch_staged(const TnkdPlan& plan, const TnkdArgs& args, const Labels& labels, const Workspace& work,
                   const Device& device, cudaStream_t stream) {
  auto tensor = [&](const void* data, const Strides& strides) {
    return TileTensor{data, image_stride(args, strides), strides.klass, shape_of(args, strides) == Shape::kRows,
                      on_packs(args, data, strides, Pack<T>::kSize)};
  };
  Tiles in;
  in.student = tensor(args.student, args.student_strides), in.teacher = tensor(args.teacher, args.teacher_strides);
  in.grad = tensor(args.grad, args.grad_strides);
  in.loss_map = static_cast<float*>(args.loss_map), in.class_weight = static_cast<const float*>(args.class_weight);
  in.target_image = args.dims == 1 ? 0 : args.target_strides[0];
  in.pixels_per_image = args.size[args.dims - 1];
  in.tiles_per_image = static_cast<unsigned>(plan.tiles_per_image), in.tiles = static_cast<unsigned>(plan.tiles);
  in.classes = static_cast<int>(args.classes);
  in.groups_log2 = plan.groups_log2, in.pixels_log2 = plan.pixels_log2, in.tile_bytes = plan.tile_bytes;
  one_of(StagedClasses(), plan.classes_per_thread, [&](auto classes) {
    constexpr int kClasses = decltype(classes)::value;
    const bool own = cross_entropy(args) == CE::kOwn;
    const auto kernel = on_device(args)
                            ? own ? staged<T, kClasses, CE::kOwn, true> : staged<T, kClasses, CE::kPowers, true>
                        : own ? staged<T, kClasses, CE::kOwn, false>
                              : staged<T, kClasses, CE::kPowers, false>;
    launch_early("tnkd", device, kernel, plan.blocks, plan.threads, plan.shared, stream, in, labels,
                 terms_of<float>(args), work, result_of<float>(args));
  });
}

template <typename A>
void launch_any(const TnkdPlan& plan, const TnkdArgs& args, const Labels& labels, const Workspace& work,
                const Device& device, cudaStream_t stream) {
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
  const auto kernel = on_device(args) ? any_layout<A, true> : any_layout<A, false>;
  launch_early("tnkd", device, kernel, plan.blocks, plan.threads, plan.shared, stream, in, labels, terms_of<A>(args),
               work, result_of<A>(args));
}

inline Labels labels_of(const TnkdArgs& args) {
  Labels labels{};
  labels.pointer = args.target;
  labels.type = args.has_target ? args.label : Label::kTeacher;
  if (args.has_ignore_index) set_ignore(labels, args.ignore_index);
  labels.ignore_value = args.ignore_index_value;
  labels.classes = static_cast<int>(args.classes);
  labels.packs = aligned(args.target) && args.target_strides[args.dims - 1] == 1 &&
                 (args.dims == 1 || (args.dims == 2 && args.target_strides[0] % 8 == 0));
  return labels;
}

// The whole op: two launches on `stream`, nothing else.
inline void tnkd_run(const TnkdArgs& args, const TnkdPlan& plan, const Device& device, cudaStream_t stream) {
  const bool wide = args.student_dtype == Dtype::kFloat64 || args.teacher_dtype == Dtype::kFloat64;
  const Workspace work = workspace_of(args, plan);
  const Labels labels = labels_of(args);
  // The labels by themselves: dimensions that the logits keep apart are one here, and then they are counted in packs.
  Space space{};
  PixelStride target_stride{};
  for (int d = 0; d < args.dims; ++d) {
    const int last = space.dims - 1;
    if (last >= 0 && target_stride.at[last] == args.target_strides[d] * args.size[d]) {
      space.size[last] *= args.size[d];
    } else {
      space.size[space.dims++] = args.size[d];
    }
    target_stride.at[space.dims - 1] = args.target_strides[d];
  }
  Labels counted = labels;
  counted.packs = aligned(args.target) && space.dims == 1 && target_stride.at[0] == 1;
  const bool count = args.mean && args.has_target && (args.has_ignore_index || args.class_weight != nullptr);
  const size_t shared = 2 * kWarp * sizeof(double);
  const auto count_labels = [&](auto kernel, auto* class_weight) {
    launch("tnkd", kernel, plan.count_blocks, kCountThreads, shared, stream, counted, space, target_stride, args.pixels,
           class_weight, count, work);
  };
  if (wide) {
    count_labels(on_device(args) ? count_pixels<double, true> : count_pixels<double, false>,
                 static_cast<const double*>(args.class_weight));
    return launch_any<double>(plan, args, labels, work, device, stream);
  }
  count_labels(on_device(args) ? count_pixels<float, true> : count_pixels<float, false>,
               static_cast<const float*>(args.class_weight));
  auto by_dtype = [&](auto type) {
    using T = decltype(type);
    if (plan.kernel == Kernel::kWhole) return launch_whole<T>(plan, args, labels, work, device, stream);
    return launch_staged<T>(plan, args, labels, work, device, stream);
  };
  if (plan.kernel == Kernel::kAny) return launch_any<float>(plan, args, labels, work, device, stream);
  switch (args.student_dtype) {
    case Dtype::kFloat32:
      return by_dtype(float());
    case Dtype::kFloat16:
      return by_dtype(Half());
    default:
      return by_dtype(BFloat16());
  }
}

// --------------------------------------------------------------------------------------------------- backward's factor
// grad *= factor in place; when the factor is exactly 1, as in most training loops, nothing is read or written. 0 stays
// 0 whatever the factor is: an ignored pixel gets nothing of an upstream inf or NaN.
template <typename A, typename T>
DSCT_DEVICE T times(T value, A by) {
  const A wide = static_cast<A>(value);
  return wide == 0 ? value : static_cast<T>(wide * by);
}

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
      for (int v = 0; v < Pack<T>::kSize; ++v) pack.lane[v] = times(pack.lane[v], by);
      store_pack(grad + i * Pack<T>::kSize, pack);
    }
  }
  const int64_t done = packs ? count / Pack<T>::kSize * Pack<T>::kSize : 0;
  for (int64_t i = done + first; i < count; i += step) grad[i] = times(grad[i], by);
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
