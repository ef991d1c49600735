// The tnkd op on CUDA: what the kernels (launch.cuh) need to know of torch's tensors.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "common/cuda_tensor.h"
#include "launch.cuh"
#include "ops.h"
#include "scale.cuh"

namespace dsct {

std::tuple<Tensor, Tensor, Tensor, Tensor> tnkd_cuda(const Tensor& student_logits, const Tensor& teacher_logits,
                                                     const std::optional<Tensor>& target,
                                                     const std::optional<Tensor>& class_weight, const Tensor& values,
                                                     const std::optional<Tensor>& ignore_index, bool coupled,
                                                     int64_t reduction, bool needs_grad) {
  const torch::stable::accelerator::DeviceGuard guard(student_logits.get_device_index());
  const cuda::Device device = cuda::device_of(student_logits.get_device_index());
  cudaStream_t stream = cuda::stream_of(student_logits);

  cuda::TnkdArgs args{};
  args.student_type = float_type("student_logits", student_logits);
  args.teacher_type = float_type("teacher_logits", teacher_logits);
  const bool wide = args.student_type == FloatType::kF64 || args.teacher_type == FloatType::kF64;
  const ScalarType acc = wide ? ScalarType::Double : ScalarType::Float;
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
  if (class_weight) {
    STD_TORCH_CHECK(class_weight->is_cuda() && class_weight->dim() == 1 && class_weight->is_contiguous() &&
                        class_weight->size(0) == student_logits.size(1) && class_weight->scalar_type() == acc,
                    "class_weight: expected a contiguous (K,) tensor on the logits' device in the accumulation dtype");
    // The mean needs the weights' sum before the first gradient, and the kernels find the argmax only on the way.
    STD_TORCH_CHECK(target || !args.with_ce || reduction != 1,
                    "target: expected labels (the teacher's argmax) where class weights are averaged over, got None");
  }
  STD_TORCH_CHECK(teacher_logits.is_cuda() && (!target || target->is_cuda()),
                  "teacher_logits, target: expected the device of student_logits");

  std::vector<int64_t> pixels_shape;
  for (int64_t d = 0; d < student_logits.dim(); ++d) {
    if (d != 1) pixels_shape.push_back(student_logits.size(d));
  }
  const bool none = reduction == 0;
  Tensor loss = none ? make_empty(student_logits, pixels_shape, acc) : make_empty(student_logits, {}, acc);
  Tensor parts = make_empty(student_logits, {3}, acc);
  Tensor grad_scale = make_empty(student_logits, {}, acc);
  Tensor grad = needs_grad ? empty_like(student_logits) : make_empty(student_logits, {0});

  args.student = student_logits.const_data_ptr();
  args.teacher = teacher_logits.const_data_ptr();
  args.target = target ? target->const_data_ptr() : nullptr;
  args.class_weight = class_weight ? class_weight->const_data_ptr() : nullptr;
  args.grad = needs_grad ? grad.mutable_data_ptr() : nullptr;
  args.loss_map = none ? loss.mutable_data_ptr() : nullptr;
  args.loss = none ? nullptr : loss.mutable_data_ptr();
  args.parts = parts.mutable_data_ptr();
  args.grad_scale = grad_scale.mutable_data_ptr();
  if (target) args.target_type = label_type("target", *target);
  cuda::set_space(args, student_logits.dim(), student_logits.sizes().data(), student_logits.strides().data(),
                  teacher_logits.strides().data(), target ? target->strides().data() : nullptr,
                  needs_grad ? grad.strides().data() : nullptr);
  STD_TORCH_CHECK(args.classes <= std::numeric_limits<int32_t>::max(), "tnkd: too many classes");
  args.has_ignore = ignore_index.has_value();
  if (ignore_index) {
    const int64_t* number = numbers_of<int64_t>("ignore_index", *ignore_index, std::nullopt, student_logits);
    if (ignore_index->is_cpu()) {
      args.ignore_index = *number;
    } else {
      args.ignore_index_value = number;
    }
  }
  args.mean = reduction == 1;
  args.coupled = coupled;

  const cuda::TnkdPlan plan = cuda::tnkd_plan(args, device);
  const Tensor workspace = make_empty(student_logits, {cuda::tnkd_workspace_bytes(plan)}, ScalarType::Byte);
  args.workspace = workspace.mutable_data_ptr();
  cuda::tnkd_run(args, plan, device, stream);
  return {loss, parts, grad, grad_scale};
}

void scale_cuda_(Tensor& grad, const Tensor& factor) {
  if (grad.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  cuda::scale_run(grad.mutable_data_ptr(), float_type("grad", grad), factor.const_data_ptr(),
                  factor.scalar_type() == ScalarType::Double, grad.numel(), cuda::device_of(grad.get_device_index()),
                  cuda::stream_of(grad));
}

}  // namespace dsct
