// The tnkd ops on CUDA: what the kernels (launch.cuh, upsampled_launch.cuh) need to know of torch's tensors.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>

#include "common/cuda_tensor.h"
#include "ops.h"
#include "scale.cuh"
#include "upsampled_launch.cuh"

namespace dsct {

namespace {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// One of torch's ops that its stable ABI has no function for.
template <typename... Args>
Tensor aten(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

bool channels_last(const Tensor& logits) { return logits.size(1) > 1 && logits.stride(1) == 1; }

bool is_dense(const Tensor& x, bool last) {
  return cuda::is_dense(x.const_data_ptr(), x.dim(), x.sizes().data(), x.strides().data(), last);
}
// As `like`, but laid out as kernels take it.
Tensor empty_dense(const Tensor& like, bool last) {
  std::vector<int64_t> shape(like.sizes().begin(), like.sizes().end());
  if (last) std::rotate(shape.begin() + 1, shape.begin() + 2, shape.end());
  const Tensor made = make_empty(like, shape);
  return last ? aten("aten::movedim", "int", made, int64_t{-1}, int64_t{1}) : made;
}
Tensor dense(const Tensor& x, bool last) {
  if (is_dense(x, last)) return x;
  Tensor copy = empty_dense(x, last);
  return torch::stable::copy_(copy, x);
}

template <typename Map>
void set_map(Map& map, const char* name, const Tensor& x) {
  map.data = static_cast<unsigned char*>(const_cast<void*>(x.const_data_ptr())), map.type = float_type(name, x);
  STD_TORCH_CHECK(map.type != FloatType::kF64, name, ": expected a dtype of 16 or 32 bits, got float64");
}

// What both ops make of their arguments, in `call`, which points into what lives as long as this.
template <typename C>
struct Prepared {
  C call{};
  Tensor student, teacher, labels, loss, parts, grad_scale;
  std::optional<Tensor> grad, written;  // written: by the kernels, which is `grad` if that is laid out for them

  Prepared(const Tensor& student_logits, bool student_last, const Tensor& teacher_logits, bool teacher_last,
           const std::optional<Tensor>& target, const std::optional<Tensor>& class_weight, const Tensor& values,
           const std::optional<Tensor>& ignore_index, bool coupled, int64_t reduction, bool needs_grad)
      : student(dense(student_logits, student_last)), teacher(dense(teacher_logits, teacher_last)) {
    STD_TORCH_CHECK(teacher_logits.is_cuda() && (!target || target->is_cuda()),
                    "teacher_logits, target: expected the device of student_logits");
    constexpr int kMost = most_classes(cuda::kMostWarps);
    STD_TORCH_CHECK(student.size(1) <= kMost, "student_logits: expected at most ", kMost, " classes, got ",
                    student.size(1));
    set_map(call.student, "student_logits", student), set_map(call.teacher, "teacher_logits", teacher);
    call.classes = static_cast<int>(student.size(1));
    if (target) {
      labels = torch::stable::contiguous(*target);
      call.target = labels.const_data_ptr(), call.target_type = label_type("target", labels);
      call.labels = labels.numel();
    }
    set_numbers(values, ignore_index);
    if (class_weight) {
      STD_TORCH_CHECK(class_weight->is_cuda() && class_weight->dim() == 1 && class_weight->is_contiguous() &&
                          class_weight->size(0) == call.classes && class_weight->scalar_type() == ScalarType::Float,
                      "class_weight: expected a contiguous (K,) tensor of float32 on the logits' device");
      call.class_weight = static_cast<const float*>(class_weight->const_data_ptr());
    }
    call.mean = reduction == 1, call.coupled = coupled;
    call.float16 = call.student.type == FloatType::kF16;

    std::vector<int64_t> shape;
    if (reduction == 0) shape.assign(labels.sizes().begin(), labels.sizes().end());
    loss = make_empty(student, shape, ScalarType::Float);
    parts = make_empty(student, {3}, ScalarType::Float), grad_scale = make_empty(student, {}, ScalarType::Float);
    (reduction == 0 ? call.loss_map : call.loss) = static_cast<float*>(loss.mutable_data_ptr());
    call.parts = static_cast<float*>(parts.mutable_data_ptr());
    call.grad_scale = static_cast<float*>(grad_scale.mutable_data_ptr());
    call.grad.type = call.student.type;
    if (needs_grad) {
      grad = empty_like(student_logits);  // with the strides that are promised
      written = is_dense(*grad, student_last) ? *grad : empty_dense(*grad, student_last);
      set_map(call.grad, "grad", *written);
    }
  }

  void set_numbers(const Tensor& values, const std::optional<Tensor>& ignore_index) {
    // Without a weight for it there is no cross-entropy; a weight of 0 the host sees only on the CPU.
    const bool has_ce = values.dim() != 1 || values.size(0) != 3;
    const double* numbers = numbers_of<double>("values", values, has_ce ? 4 : 3, student);
    if (values.is_cpu()) {
      call.ce_weight = has_ce ? *numbers++ : 0;
      call.tckd_weight = numbers[0], call.nckd_weight = numbers[1], call.temperature = numbers[2];
    } else {
      call.values = numbers;
    }
    call.with_ce = has_ce && (call.values != nullptr || call.ce_weight != 0);
    call.has_ignore = ignore_index.has_value();
    if (!ignore_index) return;
    const int64_t* number = numbers_of<int64_t>("ignore_index", *ignore_index, std::nullopt, student);
    ignore_index->is_cpu() ? call.ignore_index = *number : (call.ignore_index_value = number, 0);
  }

  template <typename Plan, typename Run>
  Results run(Plan plan, const cuda::Device& device, const Run& launch) {
    STD_TORCH_CHECK(plan.classes != 0, "student_logits, teacher_logits: sizes beyond what the CUDA kernels' indices ",
                    "or this GPU's shared memory hold");
    const Tensor workspace = make_empty(student, {plan.place_workspace(nullptr)}, ScalarType::Byte);
    plan.place_workspace(workspace.mutable_data_ptr());
    launch(plan, device, cuda::stream_of(student));
    if (!grad) return {loss, parts, make_empty(student, {0}), grad_scale};
    if (written->const_data_ptr() != grad->const_data_ptr()) torch::stable::copy_(*grad, *written);
    return {loss, parts, *grad, grad_scale};
  }
};

}  // namespace

Results tnkd_cuda(const Tensor& student_logits, const Tensor& teacher_logits, const std::optional<Tensor>& target,
                  const std::optional<Tensor>& class_weight, const Tensor& values,
                  const std::optional<Tensor>& ignore_index, bool coupled, int64_t reduction, bool needs_grad) {
  const torch::stable::accelerator::DeviceGuard guard(student_logits.get_device_index());
  const cuda::Device device = cuda::device_of(student_logits.get_device_index());
  const bool last = channels_last(student_logits);  // a teacher of the other layout is copied
  const Tensor labels = target ? *target : aten("aten::argmax", "", teacher_logits, std::optional<int64_t>(1), false);
  Prepared<cuda::Logits> prepared(student_logits, last, teacher_logits, last, labels, class_weight, values,
                                  target ? ignore_index : std::nullopt, coupled, reduction, needs_grad);
  cuda::Logits& call = prepared.call;
  call.last = last, call.pixels = last || call.labels == 0 ? call.labels : call.labels / student_logits.size(0);
  return prepared.run(cuda::tnkd_plan(call, device), device, cuda::tnkd_run);
}

Results tnkd_upsampled_cuda(const Tensor& student_logits, const Tensor& teacher_logits,
                            const std::optional<Tensor>& target, const std::optional<Tensor>& class_weight,
                            const Tensor& values, const std::optional<Tensor>& ignore_index, bool coupled,
                            int64_t reduction, bool align_corners, bool needs_grad) {
  const torch::stable::accelerator::DeviceGuard guard(student_logits.get_device_index());
  const cuda::Device device = cuda::device_of(student_logits.get_device_index());
  STD_TORCH_CHECK(reduction != 0, "reduction: expected 1 or 2 (mean, sum) of logits smaller than the labels, got 0");
  STD_TORCH_CHECK(student_logits.dim() == 4 && teacher_logits.dim() == 4 && (!target || target->dim() == 3),
                  "student_logits, teacher_logits, target: expected shapes (N, K, h, w), (N, K, h, w) and (N, H, W)");
  cuda::UpsampledSizes size{student_logits.size(0)};
  size.align_corners = align_corners;
  for (int d = 0; d < 2; ++d) {
    size.student[d] = student_logits.size(d + 2), size.teacher[d] = teacher_logits.size(d + 2);
    const int64_t larger = std::max(size.student[d], size.teacher[d]);
    size.labels[d] = target ? target->size(d + 1) : larger;
    STD_TORCH_CHECK(larger <= size.labels[d] && (larger > 0 || size.labels[d] == 0),
                    "student_logits, teacher_logits: expected at least one row and column, and at most the labels'");
  }
  STD_TORCH_CHECK(teacher_logits.size(0) == size.images && teacher_logits.size(1) == student_logits.size(1) &&
                      (!target || target->size(0) == size.images),
                  "teacher_logits, target: expected the batch, and teacher_logits the classes, of student_logits");
  const bool last = channels_last(student_logits), teacher_last = channels_last(teacher_logits);
  Prepared<cuda::Upsampled> prepared(student_logits, last, teacher_logits, teacher_last, target, class_weight, values,
                                     target ? ignore_index : std::nullopt, coupled, reduction, needs_grad);
  cuda::Upsampled& call = prepared.call;
  call.student.last = call.grad.last = last, call.teacher.last = teacher_last;
  return prepared.run(cuda::upsampled_plan(call, size, device), device, cuda::upsampled_run);
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
