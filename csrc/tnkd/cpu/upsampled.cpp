// The tnkd_upsampled op on CPU: where the labels look in both networks' smaller logits, strips of label rows, and the
// rows of the gradient that several strips have a part in.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "host.h"

namespace dsct {
namespace {

constexpr int64_t kStripLogits = 1 << 17;  // work of one task, fixed: sums must not depend on the threads
// But never fewer rows than four of the student's, within these bounds: each strip fetches a row of small logits anew,
// and leaves one of the gradient to be added up. 16 rows for logits of an eighth: twice the student's memory, not 1.5.
constexpr int64_t kLeastRows = 16, kEnoughRows = 32;

const UpsampledKernels& upsampled_kernels(bool is_double) {
#ifdef DSCT_X86_ISAS
  if (cpu_isa() == CpuIsa::kAvx512) return is_double ? avx512::upsampled_kernels_f64 : avx512::upsampled_kernels_f32;
  if (cpu_isa() == CpuIsa::kAvx2) return is_double ? avx2::upsampled_kernels_f64 : avx2::upsampled_kernels_f32;
#endif
  return is_double ? baseline::upsampled_kernels_f64 : baseline::upsampled_kernels_f32;
}

// Columns walked together. Two rows of both networks, the gradient's two, and a block's columns, nine or ten such
// arrays, should stay in L1 or in a part of L2; but for a few columns a row of small logits is not worth fetching.
// Flat: of 32, 64 and 128 none is ever 10% behind, 16 is 30% behind.
int64_t tile_of(int64_t classes) { return classes <= 24 ? 128 : classes <= 1024 ? 64 : 32; }

// The taps of one dimension: as dsct_kernels/tnkd/upsample.py has them, in float64.
class Dimension {
 public:
  Dimension(int64_t inputs, int64_t outputs, bool align_corners, bool is_double) : is_double_(is_double) {
    const double step = outputs > 1 ? double(inputs - 1) / double(outputs - 1) : 0;
    const double ratio = double(inputs) / double(outputs);
    std::vector<double> gathered(size_t(inputs) + 1);
    for (int64_t i = 0; i < outputs; i++) {
      const double at = align_corners ? double(i) * step : std::max((double(i) + 0.5) * ratio - 0.5, 0.0);
      const int64_t low = std::min(int64_t(at), inputs - 1);
      const double far = low + 1 < inputs ? std::clamp(at - double(low), 0.0, 1.0) : 0;
      add(low, far);
      gathered[size_t(low)] += 1 - far;
      gathered[size_t(low) + 1] += far;
    }
    most_ = *std::max_element(gathered.begin(), gathered.end());
    for (int i = 0; i < kTapPadding; i++) add(low_.back(), 0);
  }
  Taps taps() const {
    if (is_double_) return {low_.data(), near_.data(), far_.data()};
    return {low_.data(), near_f_.data(), far_f_.data()};
  }
  // The most that the weights of an input add up to.
  double most() const { return most_; }
  int64_t low(int64_t i) const { return low_[size_t(i)]; }
  // The last input that output i looks at.
  int64_t last(int64_t i) const { return low_[size_t(i)] + (far_[size_t(i)] != 0 ? 1 : 0); }

 private:
  void add(int64_t low, double far) {
    low_.push_back(int32_t(low));
    near_.push_back(1 - far);
    far_.push_back(far);
    if (is_double_) return;
    near_f_.push_back(float(1 - far));
    far_f_.push_back(float(far));
  }
  bool is_double_;
  std::vector<int32_t> low_;
  std::vector<double> near_, far_;
  std::vector<float> near_f_, far_f_;
  double most_ = 0;
};

void check_both(const Tensor& student, const Tensor& teacher) {
  const auto s = student.sizes(), t = teacher.sizes();
  if (s.size() != 4 || s[1] < 2) fail("student_logits: expected shape (N, K, H, W) with K >= 2, got " + shape(s));
  if (s[1] > (int64_t(1) << 24)) fail("student_logits: more than 2^24 classes: " + shape(s));
  if (t.size() != 4 || t[0] != s[0] || t[1] != s[1])
    fail("teacher_logits: expected the batch and the classes of student_logits, " + shape(s) + ", got " + shape(t));
  if (!teacher.is_cpu()) fail("teacher_logits: expected the device of student_logits, cpu");
}

void check_size(const char* name, const Tensor& logits, int64_t height, int64_t width) {
  const int64_t h = logits.size(2), w = logits.size(3);
  if (h > height || w > width || (h == 0) != (height == 0) || (w == 0) != (width == 0))
    fail(std::string(name) + ": " + shape(logits.sizes()) + " cannot be upsampled to " +
         shape(std::vector<int64_t>{height, width}));
}

void set_strides(LogitView& x, const Tensor& tensor) {
  x.pixel_strides[0] = tensor.stride(0);
  x.pixel_strides[1] = tensor.stride(2);
  x.pixel_strides[2] = tensor.stride(3);
}

// Label rows [0, height) in strips of about `rows`, cut where the student's next row begins if one does nearby: then
// two strips have one row in common, not two. `shared`: rows of partial gradients of a sample.
std::vector<Strip> strips_of(const Dimension& y, int64_t height, int64_t rows, int64_t* shared) {
  const auto begins = [&](int64_t i) { return y.low(i) != y.low(i - 1); };
  std::vector<Strip> strips;
  for (int64_t begin = 0; begin < height;) {
    int64_t end = std::min(height, begin + rows);
    for (int64_t d = 0; end < height && d <= rows / 2; d++) {
      if (begin + rows + d < height && begins(begin + rows + d)) {
        end = begin + rows + d;
        break;
      }
      if (d < rows && begins(begin + rows - d)) {
        end = begin + rows - d;
        break;
      }
    }
    if (height - end < rows / 2) end = height;
    strips.push_back({begin, end, y.low(begin), y.last(end - 1) + 1, 0, 0, 0});
    begin = end;
  }
  *shared = 0;
  for (size_t i = 0; i < strips.size(); i++) {
    Strip& s = strips[i];
    s.own_first = i > 0 ? std::max(s.first, strips[i - 1].last) : s.first;
    s.own_last = std::max(s.own_first, i + 1 < strips.size() ? std::min(s.last, strips[i + 1].first) : s.last);
    s.partial = *shared;
    *shared += (s.own_first - s.first) + (s.last - s.own_last);
  }
  return strips;
}

// Row `row` of a strip among the sample's partial rows.
int64_t partial_row(const Strip& s, int64_t row) {
  return s.partial + (row < s.own_first ? row - s.first : (s.own_first - s.first) + (row - s.own_last));
}

// upstream: what comes in for each pixel; then the gradient is that of their sum, times it.
std::tuple<Tensor, Tensor, Tensor, Tensor> run(const Tensor& student_logits, const Tensor& teacher_logits,
                                               const std::optional<Tensor>& target,
                                               const std::optional<Tensor>& class_weight, const Tensor& values,
                                               const std::optional<Tensor>& ignore_index, bool coupled,
                                               int64_t reduction, bool align_corners, bool needs_grad,
                                               const Tensor* upstream) {
  const FloatType student_type = float_type("student_logits", student_logits);
  const FloatType teacher_type = float_type("teacher_logits", teacher_logits);
  const bool is_double = student_type == FloatType::kF64 || teacher_type == FloatType::kF64;
  const ScalarType acc = is_double ? ScalarType::Double : ScalarType::Float;
  const size_t acc_bytes = is_double ? sizeof(double) : sizeof(float);
  check_both(student_logits, teacher_logits);
  const int64_t samples = student_logits.size(0), classes = student_logits.size(1);
  if (target.has_value() && target->dim() != 3) fail("target: expected shape (N, H, W), got " + shape(target->sizes()));
  const int64_t height =
      target.has_value() ? target->size(1) : std::max(student_logits.size(2), teacher_logits.size(2));
  const int64_t width = target.has_value() ? target->size(2) : std::max(student_logits.size(3), teacher_logits.size(3));
  const std::vector<int64_t> map_sizes = {samples, height, width};
  check(student_logits, map_sizes, target, class_weight, acc, reduction);
  check_size("student_logits", student_logits, height, width);
  check_size("teacher_logits", teacher_logits, height, width);
  if (std::max(height, width) > std::numeric_limits<int32_t>::max() - kTapPadding)
    fail("target: too large: " + shape(map_sizes));
  if (upstream != nullptr) {
    const auto sizes = upstream->sizes();
    if (!std::equal(map_sizes.begin(), map_sizes.end(), sizes.begin(), sizes.end()) || upstream->scalar_type() != acc ||
        !upstream->is_cpu())
      fail("grad_output: expected shape " + shape(map_sizes) + " in the accumulation dtype on cpu, got shape " +
           shape(sizes));
  }

  UpsampledArgs args = {};
  set_numbers(args, values, coupled);
  args.student = view(student_logits, student_type);
  args.teacher = view(teacher_logits, teacher_type);
  const std::vector<int64_t> scalar;
  const Tensor loss = fresh(reduction == kNone ? map_sizes : scalar, acc);
  const Tensor parts = fresh({3}, acc);
  const Tensor grad_scale = fresh(scalar, acc);
  const Tensor grad = needs_grad ? fresh_like(student_logits) : fresh({0}, student_logits.scalar_type());
  if (needs_grad) {
    ask_for_gradient(args, grad, student_type);
    set_strides(args.grad, grad);
  }
  if (reduction == kNone) args.loss_map = loss.mutable_data_ptr();
  if (upstream != nullptr) {
    args.upstream = upstream->const_data_ptr();
    for (int d = 0; d < 3; d++) args.upstream_strides[d] = upstream->stride(d);
  }

  set_strides(args.student, student_logits);
  set_strides(args.teacher, teacher_logits);
  args.dims = 3;
  args.pixels = samples * height * width;
  args.classes = classes;
  args.height = height;
  args.width = width;
  for (int d = 0; d < 3; d++) {
    args.sizes[d] = map_sizes[size_t(d)];
    args.target_strides[d] = target.has_value() ? target->stride(d) : 0;
  }
  set_labels(args, target, class_weight, ignore_index);
  if (args.pixels == 0) {
    store_losses(args, {0, 0, 0}, {1, 1}, reduction, loss, parts);
    store(grad_scale, 0, 1);
    return {loss, parts, grad, grad_scale};
  }

  const auto sizes_s = student_logits.sizes(), sizes_t = teacher_logits.sizes();
  const auto dimension = [&](int64_t inputs, int64_t outputs) {
    return Dimension(inputs, outputs, align_corners, is_double);
  };
  const Dimension y_s = dimension(sizes_s[2], height), x_s = dimension(sizes_s[3], width);
  const Dimension y_t = dimension(sizes_t[2], height), x_t = dimension(sizes_t[3], width);
  const auto resized = [&](const auto& sizes, const Dimension& y, const Dimension& x) {
    return Resized{sizes[2] == height && sizes[3] == width, sizes[2], sizes[3], y.taps(), x.taps()};
  };
  args.of_student = resized(sizes_s, y_s, x_s);
  args.of_teacher = resized(sizes_t, y_t, x_t);
  args.same = same_tensor(student_logits, teacher_logits);

  args.tile = tile_of(classes);
  const int64_t four = 4 * height / sizes_s[2];
  const int64_t rows = std::max(std::clamp(four, kLeastRows, kEnoughRows), kStripLogits / (width * classes));
  int64_t shared = 0;
  const std::vector<Strip> strips = strips_of(args.of_student.full ? y_t : y_s, height, rows, &shared);
  if (!args.of_student.full)
    for (const Strip& s : strips) args.strip_rows = std::max(args.strip_rows, s.last - s.first);
  const bool shares_rows = needs_grad && !args.of_student.full;
  const size_t row_bytes = size_t(classes * sizes_s[3]) * acc_bytes;
  const Tensor partials = fresh({shares_rows ? samples * shared * classes * sizes_s[3] : 0}, acc);
  char* partial_rows = static_cast<char*>(partials.mutable_data_ptr());
  const auto partials_of = [&](int64_t sample) { return partial_rows + size_t(sample * shared) * row_bytes; };

  const UpsampledKernels& kernel = upsampled_kernels(is_double);
  const bool serial = args.pixels * classes < kSerialLogits;
  const size_t scratch_bytes = kernel.scratch_bytes(args);
  const int64_t per_sample = int64_t(strips.size());
  const auto for_strips = [&](const auto& f) {
    for_chunks(samples * per_sample, 1, serial, [&](int64_t i, int64_t, int64_t) {
      f(i, i / per_sample, strips[size_t(i % per_sample)], scratch(scratch_bytes));
    });
  };

  std::vector<int32_t> teacher_labels;
  if (args.target == nullptr && args.class_weight != nullptr) {  // the mean needs their sum before the first gradient
    teacher_labels.resize(size_t(args.pixels));
    for_strips([&](int64_t, int64_t sample, const Strip& strip, void* memory) {
      kernel.teacher_labels(args, sample, strip, memory, teacher_labels.data());
    });
    args.target = teacher_labels.data();
    args.target_type = LabelType::kI32;
    args.target_strides[0] = height * width;
    args.target_strides[1] = width;
    args.target_strides[2] = 1;
  }
  const Shares share = shares(args, target, reduction, is_double, serial);
  const double gathered = args.of_student.full ? 1 : y_s.most() * x_s.most();
  const bool scales = student_type == FloatType::kF16 && upstream == nullptr;  // else it waits for nothing
  const double outside = scales ? float16_scale(args, is_double, share.by_count, share.by_weight, gathered) : 1;
  args.tnkd_scale = share.by_count / outside;
  args.ce_scale = share.by_weight / outside;

  std::vector<LossSums> strip_sums(size_t(samples * per_sample));
  for_strips([&](int64_t i, int64_t sample, const Strip& strip, void* memory) {
    strip_sums[size_t(i)] = kernel.run(args, sample, strip, shares_rows ? partials_of(sample) : nullptr, memory);
  });
  LossSums sums = {0, 0, 0};
  for (const LossSums& s : strip_sums) {
    sums.ce += s.ce;
    sums.tckd += s.tckd;
    sums.nckd += s.nckd;
  }

  if (shares_rows) {
    struct Part {
      int64_t row, partial;
    };
    std::vector<Part> parts_of_rows;
    for (const Strip& s : strips)
      for (int64_t row = s.first; row < s.last; row++)
        if (row < s.own_first || row >= s.own_last) parts_of_rows.push_back({row, partial_row(s, row)});
    // By row, the strips of each in their order.
    std::stable_sort(parts_of_rows.begin(), parts_of_rows.end(),
                     [](const Part& a, const Part& b) { return a.row < b.row; });
    std::vector<size_t> begins;
    for (size_t i = 0; i < parts_of_rows.size(); i++)
      if (i == 0 || parts_of_rows[i].row != parts_of_rows[i - 1].row) begins.push_back(i);
    const int64_t count = int64_t(begins.size());
    begins.push_back(parts_of_rows.size());
    for_chunks(samples * count, 1, serial, [&](int64_t i, int64_t, int64_t) {
      const int64_t sample = i / count;
      const size_t begin = begins[size_t(i % count)], end = begins[size_t(i % count) + 1];
      std::vector<const void*> rows_of;
      for (size_t p = begin; p < end; p++)
        rows_of.push_back(partials_of(sample) + size_t(parts_of_rows[p].partial) * row_bytes);
      kernel.add_partials(args, sample, parts_of_rows[begin].row, rows_of.data(), int(rows_of.size()),
                          scratch(scratch_bytes));
    });
  }

  store_losses(args, sums, share, reduction, loss, parts);
  store(grad_scale, 0, outside);
  return {loss, parts, grad, grad_scale};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> tnkd_upsampled_cpu(
    const Tensor& student_logits, const Tensor& teacher_logits, const std::optional<Tensor>& target,
    const std::optional<Tensor>& class_weight, const Tensor& values, const std::optional<Tensor>& ignore_index,
    bool coupled, int64_t reduction, bool align_corners, bool needs_grad) {
  return run(student_logits, teacher_logits, target, class_weight, values, ignore_index, coupled, reduction,
             align_corners, needs_grad && reduction != kNone, nullptr);
}

Tensor tnkd_upsampled_backward_cpu(const Tensor& student_logits, const Tensor& teacher_logits,
                                   const std::optional<Tensor>& target, const std::optional<Tensor>& class_weight,
                                   const Tensor& values, const std::optional<Tensor>& ignore_index, bool coupled,
                                   bool align_corners, const Tensor& grad_output) {
  constexpr int64_t kSum = 2;
  return std::get<2>(run(student_logits, teacher_logits, target, class_weight, values, ignore_index, coupled, kSum,
                         align_corners, true, &grad_output));
}

}  // namespace dsct
