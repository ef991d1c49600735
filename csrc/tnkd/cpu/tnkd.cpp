// The tnkd op on CPU: outputs, and the kernels over chunks of pixels.
#include <algorithm>
#include <vector>

#include "host.h"

namespace dsct {

std::tuple<Tensor, Tensor, Tensor, Tensor> tnkd_cpu(const Tensor& student_logits, const Tensor& teacher_logits,
                                                    const std::optional<Tensor>& target,
                                                    const std::optional<Tensor>& class_weight, const Tensor& values,
                                                    const std::optional<Tensor>& ignore_index, bool coupled,
                                                    int64_t reduction, bool needs_grad) {
  const FloatType student_type = float_type("student_logits", student_logits);
  const FloatType teacher_type = float_type("teacher_logits", teacher_logits);
  const bool is_double = student_type == FloatType::kF64 || teacher_type == FloatType::kF64;
  const ScalarType acc = is_double ? ScalarType::Double : ScalarType::Float;
  check_logits(student_logits, teacher_logits);
  check(student_logits, pixel_sizes(student_logits), target, class_weight, acc, reduction);

  TnkdArgs args = {};
  set_numbers(args, values, coupled);
  args.student = view(student_logits, student_type);
  args.teacher = view(teacher_logits, teacher_type);
  args.same = same_tensor(student_logits, teacher_logits);
  const std::vector<int64_t> map_sizes = pixel_sizes(student_logits);
  const std::vector<int64_t> scalar;
  const Tensor loss = fresh(reduction == kNone ? map_sizes : scalar, acc);
  const Tensor parts = fresh({3}, acc);
  const Tensor grad_scale = fresh(scalar, acc);
  const Tensor grad = needs_grad ? fresh_like(student_logits) : fresh({0}, student_logits.scalar_type());
  if (needs_grad) ask_for_gradient(args, grad, student_type);
  if (reduction == kNone) args.loss_map = loss.mutable_data_ptr();

  const std::vector<PixelDim> dims = pixel_dims(student_logits, teacher_logits, target, needs_grad ? &grad : nullptr);
  set_walk(args, student_logits, dims);
  for (size_t d = 0; d < dims.size(); d++) args.target_strides[d] = dims[d].target;
  set_labels(args, target, class_weight, ignore_index);

  const TnkdKernels& kernel = tnkd_kernels(is_double);
  const bool serial = args.pixels * args.classes < kSerialLogits;
  const int64_t chunk = chunk_pixels(args.classes);
  const size_t scratch_bytes = kernel.scratch_bytes(args);
  std::vector<int32_t> teacher_labels;
  if (args.target == nullptr && args.class_weight != nullptr) {  // the mean needs their sum before the first gradient
    teacher_labels.resize(size_t(args.pixels));
    for_chunks(args.pixels, chunk, serial, [&](int64_t, int64_t begin, int64_t end) {
      kernel.teacher_labels(args, begin, end, scratch(scratch_bytes), teacher_labels.data());
    });
    args.target = teacher_labels.data();
    args.target_type = LabelType::kI32;
    for (int64_t d = args.dims - 1, stride = 1; d >= 0; stride *= args.sizes[d--]) args.target_strides[d] = stride;
  }
  LossSums sums = {0, 0, 0};
  const Shares share = shares(args, target, reduction, is_double, serial);
  const double outside =
      student_type == FloatType::kF16 ? float16_scale(args, is_double, share.by_count, share.by_weight) : 1;
  args.tnkd_scale = share.by_count / outside;
  args.ce_scale = share.by_weight / outside;

  if (args.pixels > 0) {
    std::vector<LossSums> chunk_sums(size_t((args.pixels + chunk - 1) / chunk));
    for_chunks(args.pixels, chunk, serial, [&](int64_t i, int64_t begin, int64_t end) {
      chunk_sums[size_t(i)] = kernel.run(args, begin, end, scratch(scratch_bytes));
    });
    for (const LossSums& s : chunk_sums) {
      sums.ce += s.ce;
      sums.tckd += s.tckd;
      sums.nckd += s.nckd;
    }
  }

  store_losses(args, sums, share, reduction, loss, parts);
  store(grad_scale, 0, outside);
  return {loss, parts, grad, grad_scale};
}

}  // namespace dsct
