// The CAFD ops on CUDA: what the kernels (launch.cuh) need to know of torch's tensors.
#include "common/cuda_tensor.h"
#include "launch.cuh"
#include "ops.h"

namespace dsct {
namespace {

using cuda::CafdPlan;
using cuda::Features;
using cuda::Temperatures;

Temperatures temperatures_of(const Tensor& temperatures, const Tensor& like) {
  const double* values = numbers_of<double>("temperatures", temperatures, 2, like);
  if (temperatures.is_cpu()) return {values[0], values[1]};
  return {1, 1, values};
}

Features features_of(const char* name, const Tensor& tensor) {
  int64_t size[4], stride[4];
  for (int d = 0; d < 4; ++d) size[d] = tensor.size(d), stride[d] = tensor.stride(d);
  const Features f = cuda::make_features(tensor.const_data_ptr(), float_type(name, tensor), size, stride);
  STD_TORCH_CHECK(f.positions() <= std::numeric_limits<int32_t>::max(), name, ": more than 2^31 positions a sample");
  return f;
}

ScalarType acc_of(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename A>
constexpr ScalarType scalar_type() {
  return std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
}

template <typename A>
A* data_of(const Tensor& tensor) {
  return static_cast<A*>(tensor.mutable_data_ptr());
}

// One network, and the tensors that its kernels write.
template <typename A>
struct Prepared {
  CafdPlan plan;
  Tensor stats, workspace;
  cuda::Network<A> network;
  Prepared(const Tensor& tensor, const Features& f, A* map, const cuda::Device& device)
      : plan(cuda::cafd_plan(f, nullptr, device)),
        stats(make_empty(tensor, {f.samples, stats_row(f.channels, f.positions())}, scalar_type<A>())),
        workspace(make_empty(tensor, {cuda::map_workspace(f, plan)}, scalar_type<A>())),
        network(cuda::network<A>(f, plan, data_of<A>(stats), map, data_of<A>(workspace))) {}
};

template <typename SA, typename TA>
std::tuple<Tensor, Tensor, Tensor> run_cafd(const Tensor& student, const Tensor& teacher,
                                            const Temperatures& temperatures, int64_t reduction, bool needs_grad,
                                            const cuda::Device& device, cudaStream_t stream) {
  using A = std::common_type_t<SA, TA>;
  const Features s = features_of("student_features", student), t = features_of("teacher_features", teacher);
  const Prepared<SA> s_run(student, s, nullptr, device);
  const Prepared<TA> t_run(teacher, t, nullptr, device);
  const ScalarType acc = scalar_type<A>();
  const bool none = reduction == 0;
  const Tensor loss = none ? make_empty(student, {s.samples}, acc) : make_empty(student, {}, acc);
  const Tensor grad_map = needs_grad ? make_empty(student, {s.samples, s.height, s.width}, scalar_type<SA>())
                                     : make_empty(student, {0}, scalar_type<SA>());
  cuda::Comparison<A> comparison{};
  auto grid = [](const Features& f) { return cuda::Grid{static_cast<int>(f.height), static_cast<int>(f.width)}; };
  comparison.student = grid(s), comparison.teacher = grid(t);
  comparison.common = {std::min(comparison.student.height, comparison.teacher.height),
                       std::min(comparison.student.width, comparison.teacher.width)};
  const int64_t positions = static_cast<int64_t>(comparison.common.height) * comparison.common.width;
  // 16 bytes for the ticket, the losses of the samples, and the pooled maps.
  const Tensor workspace =
      make_empty(student, {16 / static_cast<int64_t>(sizeof(A)) + s.samples * (1 + 3 * positions)}, acc);
  comparison.ticket = static_cast<unsigned*>(workspace.mutable_data_ptr());
  comparison.losses = none ? data_of<A>(loss) : data_of<A>(workspace) + 16 / sizeof(A);
  comparison.pooled = data_of<A>(workspace) + 16 / sizeof(A) + s.samples;
  comparison.samples = s.samples;
  comparison.norm = reduction == 1 ? A(1) / static_cast<A>(std::max<int64_t>(s.samples, 1)) : A(1);
  comparison.loss = none ? nullptr : data_of<A>(loss);
  cuda::cafd_run(comparison, s_run.network, s_run.plan, t_run.network, t_run.plan, temperatures,
                 needs_grad ? data_of<SA>(grad_map) : nullptr, device, stream);
  return {loss, grad_map, s_run.stats};
}

template <typename A>
Tensor run_map(const Tensor& features, const Features& f, const Tensor& map, const Temperatures& temperatures,
               const cuda::Device& device, cudaStream_t stream) {
  const Prepared<A> run(features, f, data_of<A>(map), device);
  cuda::maps_run(&run.network, 1, run.plan.layout, temperatures, nullptr, device, stream);
  return run.stats;
}

template <typename A>
Tensor run_backward(const Tensor& features, const Tensor& grad_map, const Tensor& stats,
                    const Temperatures& temperatures, const cuda::Device& device, cudaStream_t stream) {
  const Tensor grad = empty_like(features);
  const Features f = features_of("features", features), out = features_of("grad", grad);
  const CafdPlan plan = cuda::cafd_plan(f, &out, device);
  const Tensor workspace = make_empty(features, {cuda::backward_workspace(f, plan)}, scalar_type<A>());
  cuda::backward_run<A>(f, out, plan, temperatures, data_of<A>(stats), data_of<A>(grad_map), data_of<A>(workspace),
                        device, stream);
  return grad;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cafd_cuda(const Tensor& student_features, const Tensor& teacher_features,
                                             const Tensor& temperatures, int64_t reduction, bool needs_grad) {
  const torch::stable::accelerator::DeviceGuard guard(student_features.get_device_index());
  const cuda::Device device = cuda::device_of(student_features.get_device_index());
  const bool s = acc_of(student_features) == ScalarType::Double, t = acc_of(teacher_features) == ScalarType::Double;
  auto run = s ? (t ? run_cafd<double, double> : run_cafd<double, float>)
               : (t ? run_cafd<float, double> : run_cafd<float, float>);
  return run(student_features, teacher_features, temperatures_of(temperatures, student_features), reduction, needs_grad,
             device, cuda::stream_of(student_features));
}

std::tuple<Tensor, Tensor> attention_map_cuda(const Tensor& features, const Tensor& temperatures) {
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const cuda::Device device = cuda::device_of(features.get_device_index());
  const Features f = features_of("features", features);
  const Tensor map = make_empty(features, {f.samples, f.height, f.width}, acc_of(features));
  cudaStream_t stream = cuda::stream_of(features);
  auto run = acc_of(features) == ScalarType::Double ? run_map<double> : run_map<float>;
  const Tensor stats = run(features, f, map, temperatures_of(temperatures, features), device, stream);
  return {map, stats};
}

Tensor attention_map_backward_cuda(const Tensor& features, const Tensor& grad_map, const Tensor& stats,
                                   const Tensor& temperatures) {
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const cuda::Device device = cuda::device_of(features.get_device_index());
  auto run = acc_of(features) == ScalarType::Double ? run_backward<double> : run_backward<float>;
  // Another op may hand over a strided D, or a slice that starts anywhere; the kernels read 16 bytes of a row at once.
  Tensor dense = grad_map.is_contiguous() ? grad_map : torch::stable::contiguous(grad_map);
  if (!cuda::on_16_bytes(dense.const_data_ptr())) dense = torch::stable::clone(dense);
  return run(features, dense, stats, temperatures_of(temperatures, features), device, cuda::stream_of(features));
}

}  // namespace dsct
