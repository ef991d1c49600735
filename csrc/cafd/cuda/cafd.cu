// The ops of CAFD, of either form, on CUDA: what the kernels (launch.cuh, matched.cuh) need to know of torch's tensors.
#include "common/cuda_tensor.h"
#include "launch.cuh"
#include "matched.cuh"
#include "ops.h"

namespace dsct {
namespace {

cuda::Temperatures temperatures_of(const Tensor& temperatures, const Tensor& like) {
  const double* values = numbers_of<double>("temperatures", temperatures, 2, like);
  if (temperatures.is_cpu()) return {values[0], values[1]};
  return {1, 1, values};
}

cuda::Features features_of(const char* name, const Tensor& tensor) {
  int64_t size[4], stride[4];
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.dim() == 4, name, ": expected (N, C, H, W) on a CUDA device");
  for (int d = 0; d < 4; ++d) size[d] = tensor.size(d), stride[d] = tensor.stride(d);
  const cuda::Features f = cuda::make_features(tensor.const_data_ptr(), float_type(name, tensor), size, stride);
  STD_TORCH_CHECK(f.type != FloatType::kF64, name, ": expected a dtype of 16 or 32 bits, got float64");
  return f;
}

float* data_of(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// One network, and the tensors that its kernels write.
struct Prepared {
  cuda::CafdPlan plan;
  Tensor stats, workspace;
  cuda::Network network;
  Prepared(const char* name, const Tensor& tensor, float* map, const cuda::Device& device) {
    const cuda::Features f = features_of(name, tensor);
    plan = cuda::cafd_plan(f, nullptr, device);
    stats = make_empty(tensor, {f.samples, stats_row(f.channels, f.positions())}, ScalarType::Float);
    workspace = make_empty(tensor, {cuda::map_workspace(f, plan)}, ScalarType::Float);
    network = cuda::network_of(f, plan, data_of(stats), map, data_of(workspace));
  }
};

cuda::Matched matched_of(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                         int64_t reduction) {
  cuda::Matched in{};
  in.student = features_of("student", student), in.teacher = features_of("teacher", teacher);
  for (int d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(student.size(d) == teacher.size(d), "teacher: expected the shape of student");
  }
  if (mask) {
    STD_TORCH_CHECK(mask->is_cuda() && mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() &&
                        mask->numel() == in.student.samples * in.student.positions(),
                    "mask: expected contiguous bools, (N, 1, H, W) of student, on its device");
    in.mask = static_cast<const bool*>(mask->const_data_ptr());
  }
  STD_TORCH_CHECK(reduction >= 0 && reduction <= 2, "reduction: expected 0 (none), 1 (mean) or 2 (sum), got ",
                  reduction);
  in.none = reduction == 0;
  in.norm = reduction == 1 ? 1 / static_cast<double>(std::max<int64_t>(in.student.samples, 1)) : 1;
  return in;
}

double* doubles(const Tensor& tensor) { return static_cast<double*>(tensor.mutable_data_ptr()); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cafd_cuda(const Tensor& student_features, const Tensor& teacher_features,
                                             const Tensor& temperatures, int64_t reduction, bool needs_grad) {
  const torch::stable::accelerator::DeviceGuard guard(student_features.get_device_index());
  const cuda::Device device = cuda::device_of(student_features.get_device_index());
  const Prepared student("student_features", student_features, nullptr, device);
  const Prepared teacher("teacher_features", teacher_features, nullptr, device);
  const cuda::Features &s = student.network.f, &t = teacher.network.f;
  STD_TORCH_CHECK(s.samples == t.samples && s.height == t.height && s.width == t.width,
                  "teacher_features: expected N, H and W of student_features; maps of other sizes are pooled outside");
  const bool none = reduction == 0;
  Tensor loss = none ? make_empty(student_features, {s.samples}, ScalarType::Float)
                     : make_empty(student_features, {}, ScalarType::Float);
  const Tensor losses = none ? loss : make_empty(student_features, {s.samples}, ScalarType::Float);
  const Tensor grad_map = needs_grad ? make_empty(student_features, {s.samples, s.height, s.width}, ScalarType::Float)
                                     : make_empty(student_features, {0}, ScalarType::Float);
  if (s.samples == 0) return {torch::stable::zero_(loss), grad_map, student.stats};
  cuda::Comparison comparison{};
  comparison.losses = data_of(losses);
  comparison.norm = reduction == 1 ? 1 / static_cast<float>(s.samples) : 1.0f;
  comparison.loss = none ? nullptr : data_of(loss);
  comparison.grad_map = needs_grad ? data_of(grad_map) : nullptr;
  cuda::cafd_run(comparison, {student.network, teacher.network}, temperatures_of(temperatures, student_features),
                 data_of(student.workspace), device, cuda::stream_of(student_features));
  return {loss, grad_map, student.stats};
}

std::tuple<Tensor, Tensor> attention_map_cuda(const Tensor& features, const Tensor& temperatures) {
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const cuda::Device device = cuda::device_of(features.get_device_index());
  const Tensor map = make_empty(features, {features.size(0), features.size(2), features.size(3)}, ScalarType::Float);
  const Prepared run("features", features, data_of(map), device);
  if (features.size(0) > 0) {
    cuda::maps_run(&run.network, 1, temperatures_of(temperatures, features), data_of(run.workspace), device,
                   cuda::stream_of(features));
  }
  return {map, run.stats};
}

Tensor attention_map_backward_cuda(const Tensor& features, const Tensor& grad_map, const Tensor& stats,
                                   const Tensor& temperatures) {
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const cuda::Device device = cuda::device_of(features.get_device_index());
  // Another op may hand over a strided D, or a slice that starts anywhere; the kernels read 16 bytes of a row at once.
  Tensor dense = grad_map.is_contiguous() ? grad_map : torch::stable::contiguous(grad_map);
  if (!cuda::on_16_bytes(dense.const_data_ptr())) dense = torch::stable::clone(dense);
  const Tensor grad = empty_like(features);
  const cuda::Features f = features_of("features", features), out = features_of("grad", grad);
  const cuda::CafdPlan plan = cuda::cafd_plan(f, &out, device);
  const Tensor workspace = make_empty(features, {cuda::backward_workspace(f, plan)}, ScalarType::Float);
  cuda::backward_run(f, out, plan, temperatures_of(temperatures, features), data_of(stats), data_of(dense),
                     data_of(workspace), device, cuda::stream_of(features));
  return grad;
}

std::tuple<Tensor, Tensor> matched_cafd_cuda(const Tensor& student, const Tensor& teacher,
                                             const std::optional<Tensor>& mask, const Tensor& temperatures,
                                             bool uniform, int64_t reduction) {
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  const cuda::Device device = cuda::device_of(student.get_device_index());
  cuda::Matched in = matched_of(student, teacher, mask, reduction);
  const Tensor stats =
      make_empty(student, {in.student.samples, kMatchedStats, in.student.channels}, ScalarType::Double);
  Tensor loss = in.none ? make_empty(student, {in.student.samples}, ScalarType::Float)
                        : make_empty(student, {}, ScalarType::Float);
  if (in.student.samples == 0) return {torch::stable::zero_(loss), stats};
  in.uniform = uniform;
  in.stats = doubles(stats), in.loss = static_cast<float*>(loss.mutable_data_ptr());
  cuda::plan_matched(in, device, false);
  const Tensor workspace = make_empty(student, {cuda::matched_workspace(in)}, ScalarType::Double);
  cuda::matched_run(in, temperatures_of(temperatures, student), doubles(workspace), device, cuda::stream_of(student));
  return {loss, stats};
}

Tensor matched_cafd_backward_cuda(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                                  const Tensor& stats, const Tensor& temperatures, const Tensor& grad_output,
                                  int64_t reduction) {
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  cuda::Matched in = matched_of(student, teacher, mask, reduction);
  STD_TORCH_CHECK(stats.is_cuda() && stats.scalar_type() == ScalarType::Double && stats.is_contiguous() &&
                      stats.numel() == in.student.samples * kMatchedStats * in.student.channels,
                  "stats: expected what the forward returned for these maps");
  STD_TORCH_CHECK(grad_output.is_cuda() && grad_output.scalar_type() == ScalarType::Float &&
                      grad_output.dim() == (in.none ? 1 : 0) && (!in.none || grad_output.size(0) == in.student.samples),
                  "grad_output: expected the shape and dtype of the loss");
  const Tensor grad = empty_like(student);
  if (in.student.samples == 0) return grad;
  in.out = features_of("grad", grad);
  in.stats = doubles(stats);
  in.upstream = static_cast<const float*>(grad_output.const_data_ptr());
  in.upstream_stride = in.none ? grad_output.stride(0) : 0;
  cuda::plan_matched(in, cuda::device_of(student.get_device_index()), true);
  const Tensor head = make_empty(student, {cuda::kHead / 2}, ScalarType::Double);
  cuda::matched_backward_run(in, temperatures_of(temperatures, student), doubles(head), cuda::stream_of(student));
  return grad;
}

}  // namespace dsct
