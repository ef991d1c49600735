// What the host's sides of the tnkd ops share: the checks of labels, weights and numbers, the count of valid labels,
// and what the sums of the kernels come to.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "args.h"
#include "common/cpu_isa.h"
#include "common/cpu_logits.h"
#include "common/cpu_numbers.h"
#include "ops.h"

namespace dsct {

constexpr int64_t kMean = 1, kNone = 0;
constexpr int64_t kChunkLabels = 1 << 16;

// Checks all but the logits; pixels: the shape of the labels, (N, *spatial).
inline void check(const Tensor& student, const std::vector<int64_t>& pixels, const std::optional<Tensor>& target,
                  const std::optional<Tensor>& class_weight, ScalarType acc, int64_t reduction) {
  const auto sizes = student.sizes();
  if (target.has_value()) {
    const auto labels = target->sizes();
    if (!std::equal(pixels.begin(), pixels.end(), labels.begin(), labels.end()))
      fail("target: expected shape " + shape(pixels) + ", got " + shape(labels));
    if (!target->is_cpu()) fail("target: expected the device of student_logits, cpu");
  }
  if (class_weight.has_value()) {
    if (class_weight->dim() != 1 || class_weight->size(0) != sizes[1] || class_weight->scalar_type() != acc ||
        !class_weight->is_contiguous() || !class_weight->is_cpu())
      fail("class_weight: expected a contiguous (" + std::to_string(sizes[1]) +
           ",) tensor on cpu in the accumulation dtype, got shape " + shape(class_weight->sizes()));
    for (int64_t k = 0; k < sizes[1]; k++) {
      const double weight = acc == ScalarType::Double ? static_cast<const double*>(class_weight->const_data_ptr())[k]
                                                      : static_cast<const float*>(class_weight->const_data_ptr())[k];
      if (weight < 0)
        fail("class_weight: expected numbers >= 0, got " + std::to_string(weight) + " for class " + std::to_string(k));
    }
  }
  if (reduction < 0 || reduction > 2) fail("reduction: expected 0, 1 or 2, got " + std::to_string(reduction));
}

inline const TnkdKernels& tnkd_kernels(bool is_double) {
#ifdef DSCT_X86_ISAS
  if (cpu_isa() == CpuIsa::kAvx512) return is_double ? avx512::tnkd_kernels_f64 : avx512::tnkd_kernels_f32;
  if (cpu_isa() == CpuIsa::kAvx2) return is_double ? avx2::tnkd_kernels_f64 : avx2::tnkd_kernels_f32;
#endif
  return is_double ? baseline::tnkd_kernels_f64 : baseline::tnkd_kernels_f32;
}

inline int64_t label_at(const void* data, LabelType type, int64_t i) {
  switch (type) {
    case LabelType::kU8:
      return static_cast<const uint8_t*>(data)[i];
    case LabelType::kI8:
      return static_cast<const int8_t*>(data)[i];
    case LabelType::kI16:
      return static_cast<const int16_t*>(data)[i];
    case LabelType::kI32:
      return static_cast<const int32_t*>(data)[i];
    case LabelType::kI64:
      return static_cast<const int64_t*>(data)[i];
  }
  return 0;
}

[[noreturn]] inline void fail_at_first_bad_label(const Tensor& target, const TnkdArgs& args) {
  const auto sizes = target.sizes();
  std::vector<int64_t> index(sizes.size(), 0);
  for (int64_t pixel = 0; pixel < args.pixels; pixel++) {
    int64_t offset = 0;
    for (size_t d = 0; d < sizes.size(); d++) offset += index[d] * target.stride(int64_t(d));
    const int64_t label = label_at(args.target, args.target_type, offset);
    const bool ignored = args.has_ignore && label == args.ignore_index;
    if (!ignored && (label < 0 || label >= args.classes))
      fail("target: label " + std::to_string(label) + " at position " + shape(index) + " is outside [0, " +
           std::to_string(args.classes) +
           ") and is not ignore_index=" + (args.has_ignore ? std::to_string(args.ignore_index) : "None"));
    for (size_t d = sizes.size(); d-- > 0;) {
      if (++index[d] < sizes[d]) break;
      index[d] = 0;
    }
  }
  fail("target: a label is out of range");  // changed by another thread meanwhile
}

inline LabelCount count_labels(const TnkdArgs& args, const TnkdKernels& kernel, bool serial) {
  LabelCount total = {0, 0, false};
  if (args.target == nullptr) {
    total.valid = args.pixels;
    return total;
  }
  std::vector<LabelCount> counts(size_t((args.pixels + kChunkLabels - 1) / kChunkLabels));
  for_chunks(args.pixels, kChunkLabels, serial,
             [&](int64_t i, int64_t begin, int64_t end) { counts[size_t(i)] = kernel.count_labels(args, begin, end); });
  for (const LabelCount& c : counts) {
    total.valid += c.valid;
    total.weight += c.weight;
    total.bad |= c.bad;
  }
  return total;
}

// A float16 gradient has to wait for the upstream gradient, often a GradScaler's 65536, with its digits: what is
// smaller than 6e-5, as a mean over many pixels is, would lose them. So it is stored divided by this power of two
// (which rounds once), such that no entry can reach 2^15; float16 ends at 65504.
// gathered: the most that the weights of a number's pixels add up to, 1 where it has one pixel.
inline double float16_scale(const TnkdArgs& args, bool is_double, double by_count, double by_weight,
                            double gathered = 1) {
  double bound = args.temperature * (args.tckd_weight + args.nckd_weight) * by_count;
  if (args.ce_weight != 0) {
    double largest = 1;
    if (args.class_weight != nullptr) {
      largest = 0;
      for (int64_t k = 0; k < args.classes; k++)
        largest = std::max(largest, is_double ? static_cast<const double*>(args.class_weight)[k]
                                              : double(static_cast<const float*>(args.class_weight)[k]));
    }
    bound += args.ce_weight * largest * by_weight;
  }
  bound *= gathered;
  if (!(bound > 0 && std::isfinite(bound))) return 1;
  return std::exp2(std::clamp(std::ilogb(bound) - 14, -126, 126));
}

inline void set_numbers(TnkdArgs& args, const Tensor& values, bool coupled) {
  args.coupled = coupled;
  // Without a weight for it there is no cross-entropy; with a weight of 0 neither.
  const bool has_ce = values.dim() != 1 || values.size(0) != 3;
  const double* numbers = numbers_of<double>("values", values, has_ce ? 4 : 3);
  args.ce_weight = has_ce ? *numbers++ : 0;
  args.tckd_weight = numbers[0];
  args.nckd_weight = numbers[1];
  args.temperature = numbers[2];
  args.with_ce = args.ce_weight != 0;
  if (!(args.temperature > 0 && std::isfinite(args.temperature)))
    fail("temperature: expected a finite number > 0, got " + std::to_string(args.temperature));
  const double weights[] = {args.ce_weight, args.tckd_weight, args.nckd_weight};
  const char* names[] = {"ce_weight", "alpha", "beta"};  // the latter two times dsct_loss's tnkd_weight
  for (int i = 0; i < 3; i++)
    if (!(weights[i] >= 0 && std::isfinite(weights[i])))
      fail(std::string(names[i]) + ": expected a finite number >= 0, got " + std::to_string(weights[i]));
}

// All of the labels but where they are.
inline void set_labels(TnkdArgs& args, const std::optional<Tensor>& target, const std::optional<Tensor>& class_weight,
                       const std::optional<Tensor>& ignore_index) {
  if (target.has_value()) {
    args.target = target->const_data_ptr();
    args.target_type = label_type("target", *target);
    args.has_ignore = ignore_index.has_value();
    args.ignore_index = ignore_index.has_value() ? *numbers_of<int64_t>("ignore_index", *ignore_index, 0) : 0;
  }
  if (class_weight.has_value() && args.with_ce) args.class_weight = class_weight->const_data_ptr();
}

inline bool same_tensor(const Tensor& a, const Tensor& b) {
  bool same = a.const_data_ptr() == b.const_data_ptr() && a.scalar_type() == b.scalar_type();
  for (int64_t d = 0; d < a.dim(); d++) same &= a.size(d) == b.size(d) && a.stride(d) == b.stride(d);
  return same;
}

// What a pixel's losses are multiplied by.
struct Shares {
  double by_count, by_weight;
};
// Mean: CE over the sum of the weights (F.cross_entropy's rule), TNKD over the valid pixels; over nothing it is 0.
inline Shares shares(const TnkdArgs& args, const std::optional<Tensor>& target, int64_t reduction, bool is_double,
                     bool serial) {
  double count = 0, weight = 0;
  if (args.pixels > 0) {
    const LabelCount labels = count_labels(args, tnkd_kernels(is_double), serial);
    if (labels.bad) fail_at_first_bad_label(*target, args);
    count = double(labels.valid);
    weight = args.class_weight != nullptr ? labels.weight : count;
  }
  return {reduction == kMean && count > 0 ? 1 / count : 1, reduction == kMean && weight > 0 ? 1 / weight : 1};
}

inline void store_losses(const TnkdArgs& args, const LossSums& sums, const Shares& share, int64_t reduction,
                         const Tensor& loss, const Tensor& parts) {
  const double square = args.temperature * args.temperature;
  const double ce = sums.ce * share.by_weight, tckd = sums.tckd * square * share.by_count;
  const double nckd = sums.nckd * square * share.by_count;
  store(parts, 0, ce);
  store(parts, 1, tckd);
  store(parts, 2, nckd);
  if (reduction == kNone) return;
  // A part with weight 0 takes no part: 0 * inf would be NaN. But a NaN, which tckd always shows, is never hidden.
  double total = 0;
  if (args.ce_weight != 0) total += args.ce_weight * ce;
  if (args.tckd_weight != 0 || std::isnan(tckd)) total += args.tckd_weight * tckd;
  if (args.nckd_weight != 0) total += args.nckd_weight * nckd;
  store(loss, 0, total);
}

}  // namespace dsct
