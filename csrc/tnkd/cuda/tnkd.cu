// The tnkd ops on CUDA: what the kernels (launch.cuh, upsampled_launch.cuh) need to know of torch's tensors.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "common/cuda_tensor.h"
#include "ops.h"
#include "scale.cuh"
#include "upsampled_launch.cuh"

namespace dsct {

namespace {

// The teacher's argmax, (N, *spatial) in int64.
Tensor argmax(const Tensor& logits) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(logits),
                                    torch::stable::detail::from(std::optional<int64_t>(1)),
                                    torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::argmax", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// All of a call but its shapes, its strides and where tensors lie.
void set_call(cuda::TnkdArgs& args, const Tensor& student_logits, const Tensor& teacher_logits,
              const std::optional<Tensor>& target, const std::optional<Tensor>& class_weight, const Tensor& values,
              const std::optional<Tensor>& ignore_index, bool coupled, int64_t reduction) {
  STD_TORCH_CHECK(teacher_logits.is_cuda() && (!target || target->is_cuda()),
                  "teacher_logits, target: expected the device of student_logits");
  args.student_type = float_type("student_logits", student_logits);
  args.teacher_type = float_type("teacher_logits", teacher_logits);
  STD_TORCH_CHECK(args.student_type != FloatType::kF64 && args.teacher_type != FloatType::kF64,
                  "student_logits, teacher_logits: expected dtypes of 16 or 32 bits, got float64");

  // Without a weight for it there is no cross-entropy; a weight of 0 the host sees only on the CPU.
  const bool has_ce = values.dim() != 1 || values.size(0) != 3;
  const double* numbers = numbers_of<double>("values", values, has_ce ? 4 : 3, student_logits);
  if (values.is_cpu()) {
    args.ce_weight = has_ce ? *numbers++ : 0;
    args.tckd_weight = numbers[0], args.nckd_weight = numbers[1], args.temperature = numbers[2];
  } else {
    args.values = numbers;
  }
  args.with_ce = has_ce && (args.values != nullptr || args.ce_weight != 0);
  args.has_ignore = target && ignore_index;
  if (args.has_ignore) {
    const int64_t* number = numbers_of<int64_t>("ignore_index", *ignore_index, std::nullopt, student_logits);
    ignore_index->is_cpu() ? args.ignore_index = *number : (args.ignore_index_value = number, 0);
  }
  if (class_weight) {
    STD_TORCH_CHECK(class_weight->is_cuda() && class_weight->dim() == 1 && class_weight->is_contiguous() &&
                        class_weight->size(0) == student_logits.size(1) &&
                        class_weight->scalar_type() == ScalarType::Float,
                    "class_weight: expected a contiguous (K,) tensor of float32 on the logits' device");
    args.class_weight = class_weight->const_data_ptr();
  }
  args.mean = reduction == 1, args.coupled = coupled;
}

void check_plan(int classes, int64_t wanted) {
  constexpr int kMost = most_classes(cuda::kMostWarps);
  STD_TORCH_CHECK(wanted <= kMost, "student_logits: expected at most ", kMost, " classes, got ", wanted);
  STD_TORCH_CHECK(classes != 0, "student_logits, teacher_logits: sizes or strides beyond what the CUDA kernels' ",
                  "indices or this GPU's shared memory hold");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> tnkd_cuda(const Tensor& student_logits, const Tensor& teacher_logits,
                                                     const std::optional<Tensor>& target,
                                                     const std::optional<Tensor>& class_weight, const Tensor& values,
                                                     const std::optional<Tensor>& ignore_index, bool coupled,
                                                     int64_t reduction, bool needs_grad) {
  const torch::stable::accelerator::DeviceGuard guard(student_logits.get_device_index());
  const cuda::Device device = cuda::device_of(student_logits.get_device_index());
  cuda::TnkdArgs args{};
  set_call(args, student_logits, teacher_logits, target, class_weight, values, ignore_index, coupled, reduction);

  std::vector<int64_t> pixels_shape;
  for (int64_t d = 0; d < student_logits.dim(); ++d) {
    if (d != 1) pixels_shape.push_back(student_logits.size(d));
  }
  const bool none = reduction == 0;
  Tensor loss = none ? make_empty(student_logits, pixels_shape, ScalarType::Float)
                     : make_empty(student_logits, {}, ScalarType::Float);
  Tensor parts = make_empty(student_logits, {3}, ScalarType::Float);
  Tensor grad_scale = make_empty(student_logits, {}, ScalarType::Float);
  Tensor student = student_logits, teacher = teacher_logits;
  Tensor grad = needs_grad ? empty_like(student) : make_empty(student, {0});
  auto set_space = [&] {
    return cuda::set_space(args, student.dim(), student.sizes().data(), student.strides().data(),
                           teacher.strides().data(), needs_grad ? grad.strides().data() : nullptr);
  };
  const bool copied = !set_space();  // strides that no kernel steps through
  if (copied) {
    student = torch::stable::contiguous(student), teacher = torch::stable::contiguous(teacher);
    if (needs_grad) grad = empty_like(student);
    set_space();
  }
  const Tensor labels = target ? torch::stable::contiguous(*target) : argmax(teacher_logits);
  args.student = student.const_data_ptr(), args.teacher = teacher.const_data_ptr();
  args.target = labels.const_data_ptr(), args.target_type = label_type("target", labels);
  args.grad = needs_grad ? grad.mutable_data_ptr() : nullptr;
  args.loss_map = none ? loss.mutable_data_ptr() : nullptr;
  args.loss = none ? nullptr : loss.mutable_data_ptr();
  args.parts = parts.mutable_data_ptr(), args.grad_scale = grad_scale.mutable_data_ptr();

  const cuda::TnkdPlan plan = cuda::tnkd_plan(args, device);
  check_plan(plan.classes, args.classes);
  const Tensor workspace = make_empty(student, {cuda::tnkd_workspace_bytes(plan, args)}, ScalarType::Byte);
  args.workspace = workspace.mutable_data_ptr();
  cuda::tnkd_run(args, plan, device, cuda::stream_of(student_logits));
  if (copied && needs_grad) {
    Tensor dense = empty_like(student_logits);  // with the strides that are promised
    torch::stable::copy_(dense, grad);
    grad = dense;
  }
  return {loss, parts, grad, grad_scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> tnkd_upsampled_cuda(
    const Tensor& student_logits, const Tensor& teacher_logits, const std::optional<Tensor>& target,
    const std::optional<Tensor>& class_weight, const Tensor& values, const std::optional<Tensor>& ignore_index,
    bool coupled, int64_t reduction, bool align_corners, bool needs_grad) {
  const torch::stable::accelerator::DeviceGuard guard(student_logits.get_device_index());
  const cuda::Device device = cuda::device_of(student_logits.get_device_index());
  STD_TORCH_CHECK(reduction != 0, "reduction: expected 1 or 2 (mean, sum) of logits smaller than the labels, got 0");
  STD_TORCH_CHECK(student_logits.dim() == 4 && teacher_logits.dim() == 4 && (!target || target->dim() == 3),
                  "student_logits, teacher_logits, target: expected shapes (N, K, h, w), (N, K, h, w) and (N, H, W)");
  cuda::UpsampledArgs args{};
  set_call(args, student_logits, teacher_logits, target, class_weight, values, ignore_index, coupled, reduction);
  args.align_corners = align_corners;
  Tensor loss = make_empty(student_logits, {}, ScalarType::Float);
  Tensor parts = make_empty(student_logits, {3}, ScalarType::Float);
  Tensor grad_scale = make_empty(student_logits, {}, ScalarType::Float);
  Tensor grad = needs_grad ? empty_like(student_logits) : make_empty(student_logits, {0});
  const Tensor* tensors[3] = {&student_logits, &teacher_logits, needs_grad ? &grad : &student_logits};
  for (int i = 0; i < 3; ++i) {
    for (int d = 0; d < 4; ++d) args.strides[i][d] = tensors[i]->stride(d);
  }
  args.size[0] = student_logits.size(0), args.classes = args.size[1] = student_logits.size(1);
  for (int d = 0; d < 2; ++d) {
    args.student_size[d] = student_logits.size(d + 2), args.teacher_size[d] = teacher_logits.size(d + 2);
    const int64_t larger = std::max(args.student_size[d], args.teacher_size[d]);
    args.size[d + 2] = target ? target->size(d + 1) : larger;
    STD_TORCH_CHECK(larger <= args.size[d + 2] && (larger > 0 || args.size[d + 2] == 0),
                    "student_logits, teacher_logits: expected at least one row and column, and at most the labels'");
  }
  STD_TORCH_CHECK(teacher_logits.size(0) == args.size[0] && teacher_logits.size(1) == args.classes &&
                      (!target || target->size(0) == args.size[0]),
                  "teacher_logits, target: expected the batch, and teacher_logits the classes, of student_logits");
  Tensor labels = student_logits;
  if (target) {
    labels = torch::stable::contiguous(*target);
    args.target = labels.const_data_ptr(), args.target_type = label_type("target", labels);
  }
  args.student = student_logits.const_data_ptr(), args.teacher = teacher_logits.const_data_ptr();
  args.grad = needs_grad ? grad.mutable_data_ptr() : nullptr;
  args.loss = loss.mutable_data_ptr(), args.parts = parts.mutable_data_ptr();
  args.grad_scale = grad_scale.mutable_data_ptr();

  const cuda::UpsampledPlan plan = cuda::upsampled_plan(args, device);
  check_plan(plan.classes, args.classes);
  const int64_t bytes = cuda::upsampled_workspace_bytes(plan, args);
  const Tensor workspace = make_empty(student_logits, {bytes}, ScalarType::Byte);
  args.workspace = workspace.mutable_data_ptr();
  cuda::upsampled_run(args, plan, device, cuda::stream_of(student_logits));
  return {loss, parts, grad, grad_scale};
}

void scale_cuda_(Tensor& grad, const Tensor& factor) {
  if (grad.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const FloatType type = float_type("grad", grad);
  STD_TORCH_CHECK(type != FloatType::kF64, "grad: expected a dtype of 16 or 32 bits, got float64");
  STD_TORCH_CHECK(factor.scalar_type() == ScalarType::Float && factor.numel() == 1,
                  "factor: expected one number of float32");
  cuda::scale_run(grad.mutable_data_ptr(), type, static_cast<const float*>(factor.const_data_ptr()), grad.numel(),
                  cuda::device_of(grad.get_device_index()), cuda::stream_of(grad));
}

}  // namespace dsct
