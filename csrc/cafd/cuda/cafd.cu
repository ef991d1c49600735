// The ops of CAFD, of either form, on CUDA: what the kernels (*.cuh) need to know of torch's tensors.
#include "backward.cuh"
#include "common/cuda_tensor.h"
#include "matched.cuh"
#include "ops.h"

namespace dsct {
namespace {

// Where an op runs, and by which temperatures.
struct Call {
  torch::stable::accelerator::DeviceGuard guard;
  cuda::Device device;
  cudaStream_t stream;
  cuda::Temperatures temperatures{};
  Call(const Tensor& like, const Tensor& numbers)
      : guard(like.get_device_index()),
        device(cuda::device_of(like.get_device_index())),
        stream(cuda::stream_of(like)) {
    const double* values = numbers_of<double>("temperatures", numbers, 2, like);
    if (numbers.is_cpu()) {
      temperatures.scales = cuda::scales_of(values[0], values[1]);
    } else {
      temperatures.values = values;
    }
  }
};

// Strides that no kernel steps through are copied first.
Tensor served(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.dim() == 4, name, ": expected (N, C, H, W) on a CUDA device");
  STD_TORCH_CHECK(float_type(name, tensor) != FloatType::kF64, name, ": expected 16 or 32 bits, got float64");
  const bool even = cuda::even_steps(tensor.sizes().data(), tensor.strides().data());
  return even ? tensor : torch::stable::contiguous(tensor);
}

cuda::Features features_of(const Tensor& tensor) {
  return cuda::make_features(tensor.const_data_ptr(), float_type("features", tensor), tensor.sizes().data(),
                             tensor.strides().data());
}

template <typename T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// A gradient with the strides that autograd is promised. Where kernels cannot step through them, it is copied last.
template <typename Write>
Tensor gradient_of(const Tensor& like, const Write& write) {
  Tensor grad = empty_like(like);
  const bool even = cuda::even_steps(grad.sizes().data(), grad.strides().data());
  const Tensor out = even ? grad : make_empty(like, {grad.sizes().begin(), grad.sizes().end()});
  if (like.size(0) > 0) write(features_of(out));
  if (!even) torch::stable::copy_(grad, out);
  return grad;
}

double norm_of(const Tensor& like, int64_t reduction) {
  STD_TORCH_CHECK(reduction >= 0 && reduction <= 2, "reduction: expected 0 (none), 1 (mean) or 2 (sum), got ",
                  reduction);
  return reduction == 1 ? 1 / static_cast<double>(like.size(0)) : 1;
}

// The loss, and what the kernels add it up in.
struct Result {
  Tensor loss, each;
  cuda::Losses losses;
  Result(const Tensor& like, int64_t reduction)
      : loss(make_empty(like, std::vector<int64_t>(reduction == 0, like.size(0)), ScalarType::Float)),
        each(make_empty(like, {like.size(0) + 1}, ScalarType::Double)),
        losses{data_of<float>(loss), reduction == 0 ? nullptr : data_of<double>(each), norm_of(like, reduction)} {
    if (like.size(0) == 0) torch::stable::zero_(loss);
  }
};

// One network of condensed CAFD, and the tensors that its kernels write.
struct Prepared {
  Tensor features, stats, sums;
  cuda::Network network;
  Prepared(const char* name, const Tensor& tensor, float* map, const Call& call) : features(served(name, tensor)) {
    const cuda::Features f = features_of(features);
    const cuda::CafdPlan plan = cuda::cafd_plan(f, call.device);
    stats = make_empty(tensor, {f.samples, stats_row(f.channels, f.positions)}, ScalarType::Float);
    sums = make_empty(tensor, {3 * plan.sums}, ScalarType::Float);
    network = cuda::make_network(f, plan, data_of<float>(stats), data_of<float>(sums), map);
  }
};

// All of a call of matched CAFD but where results go. student, teacher: served.
cuda::Matched matched_of(const Call& call, const Tensor& student, const Tensor& teacher,
                         const std::optional<Tensor>& mask) {
  cuda::Matched in{};
  in.student = features_of(student), in.teacher = features_of(teacher), in.temperatures = call.temperatures;
  in.plan = cuda::cafd_plan(in.student, call.device);
  for (int d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(student.size(d) == teacher.size(d), "teacher: expected the shape of student");
  }
  if (mask) {
    STD_TORCH_CHECK(mask->is_cuda() && mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() &&
                        mask->numel() == in.student.samples * in.student.positions,
                    "mask: expected contiguous bools, (N, 1, H, W) of student, on its device");
    in.mask = static_cast<const bool*>(mask->const_data_ptr());
  }
  return in;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cafd_cuda(const Tensor& student_features, const Tensor& teacher_features,
                                             const Tensor& temperatures, int64_t reduction, bool needs_grad) {
  const Call call(student_features, temperatures);
  const Prepared student("student_features", student_features, nullptr, call);
  const Prepared teacher("teacher_features", teacher_features, nullptr, call);
  const int64_t samples = student_features.size(0), height = student_features.size(2), width = student_features.size(3);
  STD_TORCH_CHECK(
      teacher_features.size(0) == samples && teacher_features.size(2) == height && teacher_features.size(3) == width,
      "teacher_features: expected N, H and W of student_features; maps of other sizes are pooled outside");
  const Result result(student_features, reduction);
  const std::vector<int64_t> map = needs_grad ? std::vector<int64_t>{samples, height, width} : std::vector<int64_t>{0};
  const Tensor grad_map = make_empty(student_features, map, ScalarType::Float);
  if (samples > 0) {
    cuda::cafd_run({{student.network, teacher.network}, call.temperatures, result.losses},
                   needs_grad ? data_of<float>(grad_map) : nullptr, call.device, call.stream);
  }
  return {result.loss, grad_map, student.stats};
}

std::tuple<Tensor, Tensor> attention_map_cuda(const Tensor& features, const Tensor& temperatures) {
  const Call call(features, temperatures);
  const Tensor map = make_empty(features, {features.size(0), features.size(2), features.size(3)}, ScalarType::Float);
  const Prepared run("features", features, data_of<float>(map), call);
  if (features.size(0) > 0) cuda::maps_run({{run.network}, call.temperatures}, call.device, call.stream);
  return {map, run.stats};
}

Tensor attention_map_backward_cuda(const Tensor& features, const Tensor& grad_map, const Tensor& stats,
                                   const Tensor& temperatures) {
  const Call call(features, temperatures);
  const Tensor read = served("features", features), d = torch::stable::contiguous(grad_map);
  return gradient_of(features, [&](const cuda::Features& out) {
    const cuda::Backward in = cuda::make_backward(features_of(read), out, data_of<float>(stats), data_of<float>(d),
                                                  call.temperatures, call.device);
    const Tensor workspace = make_empty(features, {3 * in.f.samples + in.plan.sums}, ScalarType::Float);
    cuda::backward_run(in, data_of<float>(workspace), call.device, call.stream);
  });
}

std::tuple<Tensor, Tensor> matched_cafd_cuda(const Tensor& student, const Tensor& teacher,
                                             const std::optional<Tensor>& mask, const Tensor& temperatures,
                                             bool uniform, int64_t reduction) {
  const Call call(student, temperatures);
  const Tensor read_s = served("student", student), read_t = served("teacher", teacher);
  cuda::Matched in = matched_of(call, read_s, read_t, mask);
  const Result result(student, reduction);
  const Tensor stats = make_empty(student, {student.size(0), kMatchedStats, student.size(1)}, ScalarType::Double);
  if (student.size(0) == 0) return {result.loss, stats};
  in.uniform = uniform, in.losses = result.losses, in.stats = data_of<double>(stats);
  const Tensor workspace = make_empty(student, {cuda::matched_workspace(in)}, ScalarType::Double);
  cuda::matched_run(in, data_of<double>(workspace), call.device, call.stream);
  return {result.loss, stats};
}

Tensor matched_cafd_backward_cuda(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                                  const Tensor& stats, const Tensor& temperatures, const Tensor& grad_output,
                                  int64_t reduction) {
  const Call call(student, temperatures);
  const Tensor read_s = served("student", student), read_t = served("teacher", teacher);
  cuda::Matched in = matched_of(call, read_s, read_t, mask);
  STD_TORCH_CHECK(stats.is_cuda() && stats.scalar_type() == ScalarType::Double && stats.is_contiguous() &&
                      stats.numel() == student.size(0) * kMatchedStats * student.size(1),
                  "stats: expected what the forward returned for these maps");
  const bool none = reduction == 0;
  STD_TORCH_CHECK(grad_output.is_cuda() && grad_output.scalar_type() == ScalarType::Float &&
                      grad_output.dim() == (none ? 1 : 0) && (!none || grad_output.size(0) == student.size(0)),
                  "grad_output: expected the shape and dtype of the loss");
  in.losses.norm = norm_of(student, reduction);
  in.stats = data_of<double>(stats), in.upstream = data_of<float>(grad_output);
  in.upstream_stride = none ? grad_output.stride(0) : 0;
  return gradient_of(student, [&](const cuda::Features& out) {
    in.out = out;
    cuda::matched_backward_run(in, call.stream);
  });
}

}  // namespace dsct
