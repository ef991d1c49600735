// Runs the CUDA kernels on the host for one or more cases, each a text file that names tensors and numbers.
// Test-only; see shim.h and harness.py, which writes the cases and reads the results. After --list, launches are listed
// and nothing is run, read, written or allocated, however large the tensors.
#include <cstdio>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>

// A build may leave out what its cases do not need: the planted mistakes are compiled one op at a time.
#ifndef WITHOUT_CAFD
#include "cafd/cuda/backward.cuh"
#include "cafd/cuda/matched.cuh"
#endif
#if !defined(WITHOUT_TNKD) || !defined(WITHOUT_UPSAMPLED)
#include "tnkd/cuda/scale.cuh"
#include "tnkd/cuda/upsampled_launch.cuh"
#endif

namespace {

using namespace dsct::cuda;
using dsct::FloatType;
using dsct::LabelType;

// A buffer of exactly these bytes, on 16: an access beyond its end is one that AddressSanitizer reports.
struct Buffer {
  explicit Buffer(size_t bytes) : bytes(bytes) {
    if (shim::list_only) return;
    if (posix_memalign(&data, 16, std::max<size_t>(bytes, 1)) != 0) throw std::bad_alloc();
    std::memset(data, 0xff, bytes);  // NaN in every floating-point dtype
  }
  ~Buffer() {
    if (!shim::list_only) std::free(data);
  }
  Buffer(const Buffer&) = delete;
  void* data = reinterpret_cast<void*>(4096);  // what a listed launch is given: aligned, and not null
  size_t bytes;
};

struct Tensor {
  std::string dtype;
  std::vector<int64_t> size, stride;
  std::shared_ptr<Buffer> buffer;
  int64_t offset = 0;
  int itemsize() const {
    static const std::map<std::string, int> sizes = {{"float32", 4}, {"float64", 8}, {"float16", 2}, {"bfloat16", 2},
                                                     {"uint8", 1},   {"bool", 1},    {"int8", 1},    {"int16", 2},
                                                     {"int32", 4},   {"int64", 8}};
    return sizes.at(dtype);
  }
  void* data() const { return static_cast<char*>(buffer->data) + offset * itemsize(); }
  int64_t numel() const {
    int64_t count = 1;
    for (int64_t n : size) count *= n;
    return count;
  }
};

FloatType float_type(const std::string& name) {
  if (name == "float32") return FloatType::kF32;
  if (name == "float64") return FloatType::kF64;
  return name == "float16" ? FloatType::kF16 : FloatType::kBF16;
}

struct Case {
  std::map<std::string, Tensor> tensors;
  std::map<std::string, double> numbers;
  std::string op, folder;

  explicit Case(const std::string& path) {
    std::ifstream file(path);
    folder = path.substr(0, path.rfind('/') + 1);
    std::string line;
    while (std::getline(file, line)) {
      std::istringstream words(line);
      std::string kind, name;
      words >> kind >> name;
      if (kind == "op") {
        op = name;
      } else if (kind == "number") {
        words >> numbers[name];
      } else {  // tensor NAME DTYPE BYTES OFFSET DIMS SIZE... STRIDE... [FILE]
        Tensor tensor;
        size_t bytes, dims;
        std::string source;
        words >> tensor.dtype >> bytes >> tensor.offset >> dims;
        tensor.size.resize(dims), tensor.stride.resize(dims);
        for (auto& x : tensor.size) words >> x;
        for (auto& x : tensor.stride) words >> x;
        tensor.buffer = std::make_shared<Buffer>(bytes);
        if (words >> source && !shim::list_only) {
          std::ifstream(folder + source, std::ios::binary).read(static_cast<char*>(tensor.buffer->data), bytes);
        }
        tensors[name] = tensor;
      }
    }
  }
  const Tensor* find(const std::string& name) const {
    const auto it = tensors.find(name);
    return it == tensors.end() ? nullptr : &it->second;
  }
  void* data(const std::string& name) const { return find(name) == nullptr ? nullptr : find(name)->data(); }
  void write(const std::string& name) const {
    if (find(name) == nullptr || shim::list_only) return;
    const Buffer& buffer = *find(name)->buffer;
    std::ofstream(folder + "out_" + name, std::ios::binary).write(static_cast<const char*>(buffer.data), buffer.bytes);
  }
};

Device device_of(const Case& c) {
  const auto shared = c.numbers.find("shared_bytes");
  Device device;
  device.multiprocessors = static_cast<int>(c.numbers.at("multiprocessors"));
  device.shared_bytes = shared == c.numbers.end() ? 232448 : static_cast<int>(shared->second);
  return device;
}

#if !defined(WITHOUT_TNKD) || !defined(WITHOUT_UPSAMPLED)
template <typename Map>
void set_map(Map& map, const Case& c, const std::string& name, bool last) {
  const Tensor& tensor = *c.find(name);
  map.data = static_cast<unsigned char*>(tensor.data()), map.type = float_type(tensor.dtype);
  if (!is_dense(map.data, static_cast<int64_t>(tensor.size.size()), tensor.size.data(), tensor.stride.data(), last)) {
    throw std::invalid_argument(name + ": laid out as tnkd.cu would copy it");
  }
}

// All but sizes.
template <typename C>
C call_of(const Case& c, bool last, bool teacher_last) {
  static const std::map<std::string, LabelType> labels = {{"uint8", LabelType::kU8},
                                                          {"int8", LabelType::kI8},
                                                          {"int16", LabelType::kI16},
                                                          {"int32", LabelType::kI32},
                                                          {"int64", LabelType::kI64}};
  C call{};
  set_map(call.student, c, "student", last), set_map(call.teacher, c, "teacher", teacher_last);
  call.grad.type = call.student.type, call.float16 = call.student.type == FloatType::kF16;
  if (c.find("grad") != nullptr) set_map(call.grad, c, "grad", last);
  if (const Tensor* target = c.find("target")) {
    call.target = target->data(), call.target_type = labels.at(target->dtype), call.labels = target->numel();
  }
  call.classes = static_cast<int>(c.find("student")->size[1]);
  call.class_weight = static_cast<const float*>(c.data("class_weight"));
  call.loss = static_cast<float*>(c.data("loss")), call.loss_map = static_cast<float*>(c.data("loss_map"));
  call.parts = static_cast<float*>(c.data("parts")), call.grad_scale = static_cast<float*>(c.data("grad_scale"));
  call.ce_weight = c.numbers.at("ce_weight"), call.tckd_weight = c.numbers.at("tckd_weight");
  call.nckd_weight = c.numbers.at("nckd_weight"), call.temperature = c.numbers.at("temperature");
  call.has_ignore = c.numbers.count("ignore_index") > 0;
  if (call.has_ignore) call.ignore_index = static_cast<int64_t>(c.numbers.at("ignore_index"));
  call.values = static_cast<const double*>(c.data("values"));
  call.ignore_index_value = static_cast<const int64_t*>(c.data("ignore_index"));
  if (call.ignore_index_value != nullptr) call.has_ignore = true;
  call.mean = c.numbers.at("reduction") == 1, call.with_ce = c.numbers.at("with_ce") != 0;
  call.coupled = c.numbers.at("coupled") != 0;
  return call;
}

bool channels_last(const Tensor& logits) { return logits.size[1] > 1 && logits.stride[1] == 1; }

void write_tnkd(const Case& c) {
  for (const char* name : {"grad", "loss", "loss_map", "parts", "grad_scale"}) c.write(name);
}

template <typename Plan, typename Run>
void run_plan(const Case& c, Plan plan, const std::string& name, const Run& launch) {
  if (plan.classes == 0) {
    std::cout << "none\n";
    return;
  }
  Buffer workspace(plan.place_workspace(nullptr));
  plan.place_workspace(workspace.data);
  launch(plan, device_of(c), nullptr);
  std::cout << name << "\n";
  write_tnkd(c);
}

#ifndef WITHOUT_TNKD
void run_tnkd(const Case& c) {
  const Tensor& student = *c.find("student");
  const bool last = channels_last(student);
  auto call = call_of<Logits>(c, last, last);
  call.last = last, call.pixels = last || call.labels == 0 ? call.labels : call.labels / student.size[0];
  const TnkdPlan plan = tnkd_plan(call, device_of(c));
  run_plan(c, plan, kernel_name(plan), tnkd_run);
}

#endif

#ifndef WITHOUT_UPSAMPLED
void run_upsampled(const Case& c) {
  const Tensor &student = *c.find("student"), &teacher = *c.find("teacher"), *target = c.find("target");
  const bool last = channels_last(student), teacher_last = channels_last(teacher);
  auto call = call_of<Upsampled>(c, last, teacher_last);
  call.student.last = call.grad.last = last, call.teacher.last = teacher_last;
  UpsampledSizes size{student.size[0]};
  size.align_corners = c.numbers.at("align_corners") != 0;
  for (int d : {0, 1}) {
    size.student[d] = student.size[d + 2], size.teacher[d] = teacher.size[d + 2];
    size.labels[d] = target == nullptr ? std::max(size.student[d], size.teacher[d]) : target->size[d + 1];
  }
  const UpsampledPlan plan = upsampled_plan(call, size, device_of(c));
  const auto variant = {plan.classes, plan.call.groups, plan.call.columns};
  std::string name = "upsampled";
  for (int number : variant) name += "_" + std::to_string(number);
  run_plan(c, plan, name, upsampled_run);
}

#endif

void run_scale(const Case& c) {
  const Tensor &grad = *c.find("grad"), &factor = *c.find("factor");
  scale_run(grad.data(), float_type(grad.dtype), static_cast<const float*>(factor.data()),
            static_cast<int64_t>(grad.buffer->bytes / grad.itemsize()) - grad.offset, device_of(c), nullptr);
  std::cout << "scale\n";
  c.write("grad");
}

#endif

#ifndef WITHOUT_CAFD
Temperatures temperatures_of(const Case& c) {
  const auto* values = static_cast<const double*>(c.data("temperatures"));
  return {scales_of(c.numbers.at("channel_temperature"), c.numbers.at("spatial_temperature")), values};
}

Features features_of(const Tensor& tensor) {
  return make_features(tensor.data(), float_type(tensor.dtype), tensor.size.data(), tensor.stride.data());
}

template <typename T>
T* data_of(const Buffer& buffer) {
  return static_cast<T*>(buffer.data);
}

// each: (samples + 1) doubles.
Losses losses_of(const Case& c, const Buffer& each, int64_t samples) {
  const double reduction = c.numbers.at("reduction");
  return {static_cast<float*>(c.data("loss")), reduction == 0 ? nullptr : data_of<double>(each),
          reduction == 1 ? 1 / static_cast<double>(samples) : 1};
}

struct Prepared {
  Features f;
  CafdPlan plan;
  Buffer stats, sums;
  Network network;
  Prepared(const Case& c, const std::string& name)
      : f(features_of(*c.find(name))),
        plan(cafd_plan(f, device_of(c))),
        stats(f.samples * dsct::stats_row(f.channels, f.positions) * sizeof(float)),
        sums(3 * plan.sums * sizeof(float)),
        network(
            make_network(f, plan, data_of<float>(stats), data_of<float>(sums), static_cast<float*>(c.data("map")))) {
    std::cout << f.name() << " ";
  }
};

void run_backward(const Case& c, const std::string& name, const Prepared& forward, const char* grad_map) {
  const Features out = features_of(*c.find("grad"));
  const Backward in = make_backward(forward.f, out, data_of<float>(forward.stats),
                                    static_cast<float*>(c.data(grad_map)), temperatures_of(c), device_of(c));
  Buffer workspace((3 * in.f.samples + in.plan.sums) * sizeof(float));
  backward_run(in, data_of<float>(workspace), device_of(c), nullptr);
  std::cout << (in.held > 0 ? "held" : "twice") << "\n";
  c.write("grad");
}

void run_cafd(const Case& c) {
  const Prepared student(c, "student"), teacher(c, "teacher");
  Buffer each((student.f.samples + 1) * sizeof(double));
  cafd_run({{student.network, teacher.network}, temperatures_of(c), losses_of(c, each, student.f.samples)},
           static_cast<float*>(c.data("grad_map")), device_of(c), nullptr);
  c.write("loss"), c.write("grad_map");
  run_backward(c, "student", student, "grad_map");
}

void run_attention_map(const Case& c) {
  const Prepared run(c, "features");
  maps_run({{run.network}, temperatures_of(c)}, device_of(c), nullptr);
  c.write("map");
  run_backward(c, "features", run, "map_grad");
}

void run_matched(const Case& c) {
  Matched in{};
  in.student = features_of(*c.find("student")), in.teacher = features_of(*c.find("teacher"));
  in.mask = static_cast<const bool*>(c.data("mask"));
  in.temperatures = temperatures_of(c), in.plan = cafd_plan(in.student, device_of(c));
  in.uniform = c.numbers.at("uniform") != 0;
  Buffer each((in.student.samples + 1) * sizeof(double));
  Buffer stats(in.student.samples * dsct::kMatchedStats * in.student.channels * sizeof(double));
  in.losses = losses_of(c, each, in.student.samples), in.stats = data_of<double>(stats);
  Buffer workspace(matched_workspace(in) * sizeof(double));
  matched_run(in, data_of<double>(workspace), device_of(c), nullptr);
  c.write("loss");
  if (c.find("grad") != nullptr) {
    in.out = features_of(*c.find("grad"));
    in.upstream = static_cast<const float*>(c.data("upstream"));
    in.upstream_stride = c.numbers.at("reduction") == 0 ? c.find("upstream")->stride[0] : 0;
    matched_backward_run(in, nullptr);
    c.write("grad");
  }
  std::cout << in.student.name() << " " << in.teacher.name() << "\n";
}

#endif

void run(const Case& c) {
#ifndef WITHOUT_TNKD
  if (c.op == "tnkd") return run_tnkd(c);
#endif
#ifndef WITHOUT_UPSAMPLED
  if (c.op == "tnkd_upsampled") return run_upsampled(c);
#endif
#if !defined(WITHOUT_TNKD) || !defined(WITHOUT_UPSAMPLED)
  if (c.op == "scale") return run_scale(c);
#endif
#ifndef WITHOUT_CAFD
  if (c.op == "map") return run_attention_map(c);
  if (c.op == "cafd") return run_cafd(c);
  if (c.op == "matched") return run_matched(c);
#endif
}

}  // namespace

int main(int argc, char** argv) {
  shim::list_only = argc > 1 && std::string(argv[1]) == "--list";
  for (int i = shim::list_only ? 2 : 1; i < argc; ++i) run(Case(argv[i]));
}
