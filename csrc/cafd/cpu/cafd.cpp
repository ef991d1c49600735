// CAFD on CPU: what is split how, in which order, over torch's threads. The loops are in loops.h.
//
// Samples are taken in groups that fit into the last-level cache, so that the second read of a sample comes from there.
// Within a sample the work is cut into blocks that depend on its shape alone, and their partial results are joined in
// order: the result is bitwise the same for any number of threads.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "args.h"
#include "cafd/stats.h"
#include "common/cpu_isa.h"
#include "common/cpu_numbers.h"
#include "common/huge_pages.h"
#include "host.h"
#include "ops.h"

namespace dsct {
namespace {

constexpr int64_t kBlock = 64 * 1024;  // elements of a sample in one block, while 8 of them are enough
constexpr int64_t kMapChunk = 2048;    // positions of a map in one task; a multiple of every vector

const CafdKernels& kernels() {
#ifdef DSCT_X86_ISAS
  switch (cpu_isa()) {
    case CpuIsa::kAvx512:
      return cafd_kernels_avx512();
    case CpuIsa::kAvx2:
      return cafd_kernels_avx2();
    default:
      break;
  }
#endif
  return cafd_kernels_default();
}

struct Temperatures {
  double channel, spatial;
};

Temperatures temperatures_of(const Tensor& temperatures) {
  const double* numbers = numbers_of<double>("temperatures", temperatures, 2);
  const char* names[] = {"channel_temperature", "spatial_temperature"};
  for (int i = 0; i < 2; i++)
    if (!(numbers[i] > 0 && std::isfinite(numbers[i])))
      throw std::invalid_argument(std::string(names[i]) + ": expected a finite number > 0, got " +
                                  std::to_string(numbers[i]));
  return {numbers[0], numbers[1]};
}

int64_t stats_row(const Features& x) { return dsct::stats_row(x.C, positions(x)); }

// Samples whose second read should still find them in cache.
int64_t group_size(int64_t bytes_per_sample, int64_t samples) {
  const int64_t cache = std::max<int64_t>(int64_t(8) << 20, (int64_t(3) << 20) * torch::stable::get_num_threads());
  return std::clamp<int64_t>(cache / std::max<int64_t>(1, bytes_per_sample), 1, std::max<int64_t>(1, samples));
}

// A network on its way through the forward.
struct Network {
  Side side;
  const CafdLoops* loops;
  bool by_positions, mixed;
  int64_t element_size, blocks, part_bytes;  // blocks of a sample; bytes of one block's partial result
  std::vector<double> strength;

  Network(const char* name, const Tensor& x, double channel_temperature, double spatial_temperature, bool mixed_map)
      : side{features_of(name, x), channel_temperature, spatial_temperature, nullptr, nullptr},
        loops(&kernels().loops[static_cast<int>(float_type(name, x))]),
        by_positions(walk_positions(side.x)),
        mixed(mixed_map),
        element_size(static_cast<int64_t>(x.element_size())),
        blocks(std::clamp<int64_t>(elements() / kBlock, 1, 8)),
        part_bytes(by_positions ? loops->moments_bytes(side.x)
                                : static_cast<int64_t>(loops->acc_size) * 2 * loops->pitch(positions(side.x))),
        strength(static_cast<size_t>(side.x.N * side.x.C)) {
    side.strength = strength.data();
  }
  int64_t elements() const { return side.x.C * positions(side.x); }
  // Channels or positions before `block`.
  int64_t start(int64_t block) const { return (by_positions ? positions(side.x) : side.x.C) * block / blocks; }
  char* map(int64_t n, int64_t i) const {
    return static_cast<char*>(side.stats) +
           (n * stats_row(side.x) + 4 * side.x.C + i) * static_cast<int64_t>(loops->acc_size);
  }
  // A block's bytes where they lie in one piece.
  Ahead bytes(int64_t n, int64_t block) const {
    const Features& x = side.x;
    const bool in_one =
        by_positions ? x.stride_w == x.C && (x.H == 1 || x.stride_h == x.W * x.C)
                     : x.stride_c == positions(x) && (x.W == 1 || x.stride_w == 1) && (x.H == 1 || x.stride_h == x.W);
    if (!in_one) return {nullptr, nullptr};
    const char* sample = static_cast<const char*>(x.data) + n * x.stride_n * element_size;
    const int64_t run = (by_positions ? x.C : positions(x)) * element_size;
    return {sample + start(block) * run, sample + start(block + 1) * run};
  }
};

// Samples of some networks that go through the forward together.
struct Step {
  std::vector<const Network*> networks;
  int64_t first, count;
  char* parts;

  int64_t blocks() const {  // of one sample
    int64_t total = 0;
    for (const Network* net : networks) total += net->blocks;
    return total;
  }
  int64_t part_bytes() const {
    int64_t total = 0;
    for (const Network* net : networks) total += net->blocks * net->part_bytes;
    return total;
  }
  struct Task {
    const Network* net;
    int64_t n, block;
    char* part;
  };
  Task task(int64_t t) const {
    const int64_t sample = t / blocks();
    int64_t block = t % blocks();
    char* part = parts + sample * part_bytes();
    for (const Network* net : networks) {
      if (block < net->blocks) return {net, first + sample, block, part + block * net->part_bytes};
      part += net->blocks * net->part_bytes;
      block -= net->blocks;
    }
    return {};
  }
};

// Everything together where it fits into cache, else one network after the other, some samples at a time.
std::vector<Step> plan(const std::vector<const Network*>& networks) {
  const int64_t N = networks[0]->side.x.N;
  int64_t bytes = 0;
  for (const Network* net : networks) bytes += net->elements() * net->element_size;
  if (group_size(bytes, N) == N) return {{networks, 0, N, nullptr}};
  std::vector<Step> steps;
  for (const Network* net : networks) {
    const int64_t group = group_size(net->elements() * net->element_size, N);
    for (int64_t first = 0; first < N; first += group)
      steps.push_back({{net}, first, std::min(group, N - first), nullptr});
  }
  return steps;
}

// The attention maps of every network. The second read of one step goes side by side with the first read of the next:
// that one waits for memory, while this one computes. When the last network's maps are final, done(n, chunk) is called
// for every kMapChunk positions of every sample.
template <class Done>
void attend(const std::vector<const Network*>& networks, const Done& done) {
  std::vector<Step> steps = plan(networks);
  size_t scratch_bytes = 0, parts_bytes = 0;
  for (const Network* net : networks) scratch_bytes = std::max(scratch_bytes, net->loops->scratch(net->side.x));
  for (const Step& step : steps)
    parts_bytes = std::max(parts_bytes, static_cast<size_t>(step.part_bytes() * step.count));
  const Buffer parts[2] = {allocate(parts_bytes), allocate(steps.size() > 1 ? parts_bytes : 0)};
  for (size_t i = 0; i < steps.size(); i++) steps[i].parts = parts[i % 2].get();

  int64_t work = 1;  // elements in a task
  for (const Network* net : networks) work = std::max(work, net->elements() / net->blocks);

  for (size_t i = 0; i <= steps.size(); i++) {
    const Step* now = i > 0 ? &steps[i - 1] : nullptr;
    const Step* next = i < steps.size() ? &steps[i] : nullptr;
    const int64_t second = now ? now->count * now->blocks() : 0, first = next ? next->count * next->blocks() : 0;
    parallel(std::max(first, second), work, [&](int64_t begin, int64_t end) {
      const Buffer scratch = allocate(scratch_bytes);
      for (int64_t t = begin; t < end; t++) {
        const Step::Task b = t < first ? next->task(t) : Step::Task{};
        if (t < second) {
          const Step::Task a = now->task(t);
          const int64_t from = a.net->start(a.block), to = a.net->start(a.block + 1);
          const Ahead ahead = t < first ? b.net->bytes(b.n, b.block) : Ahead{nullptr, nullptr};
          if (a.net->by_positions)
            a.net->loops->attend_positions(a.net->side, a.n, from, to, a.net->mixed, ahead, scratch.get());
          else
            a.net->loops->attend_rows(a.net->side, a.n, from, to, a.net->mixed, ahead, a.part, scratch.get());
        }
        if (t < first) {
          const int64_t from = b.net->start(b.block), to = b.net->start(b.block + 1);
          if (b.net->by_positions)
            b.net->loops->moments_positions(b.net->side, b.n, from, to, b.part, scratch.get());
          else
            b.net->loops->moments_rows(b.net->side, b.n, from, to, scratch.get());
        }
      }
    });
    int64_t longest = 0, small_work = 1;
    if (now)
      for (const Network* net : now->networks) longest = std::max(longest, positions(net->side.x));
    if (next)
      for (const Network* net : next->networks) small_work = std::max(small_work, 16 * net->side.x.C);
    small_work = std::max(small_work, 12 * std::min(longest, kMapChunk));
    const int64_t chunks = (longest + kMapChunk - 1) / kMapChunk, joins = now ? now->count * chunks : 0;
    const int64_t nets = next ? static_cast<int64_t>(next->networks.size()) : 0;
    parallel(joins + (next ? next->count * nets : 0), small_work, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        if (t >= joins) {
          const int64_t sample = (t - joins) / nets, which = (t - joins) % nets;
          int64_t block = sample * next->blocks();
          for (int64_t k = 0; k < which; k++) block += next->networks[static_cast<size_t>(k)]->blocks;
          const Step::Task task = next->task(block);
          if (task.net->by_positions)
            task.net->loops->join_moments(task.net->side, task.n, task.part, task.net->blocks);
          task.net->loops->weights(task.net->side, task.n);
          continue;
        }
        const int64_t sample = t / chunks, chunk = t % chunks;
        int64_t block = sample * now->blocks();
        for (const Network* net : now->networks) {
          const int64_t from = chunk * kMapChunk, to = std::min(from + kMapChunk, positions(net->side.x));
          if (!net->by_positions && from < to)
            net->loops->join_maps(net->side, now->first + sample, from, to, net->mixed, now->task(block).part,
                                  net->blocks);
          block += net->blocks;
        }
        if (now->networks.back() == networks.back()) done(now->first + sample, chunk);
      }
    });
  }
}

// --- maps of unequal sizes ---

// Output cell o of adaptive average pooling covers [start, stop): cells may overlap.
int64_t bin_start(int64_t o, int64_t out, int64_t in) { return o * in / out; }
int64_t bin_stop(int64_t o, int64_t out, int64_t in) { return ((o + 1) * in + out - 1) / out; }

struct Grid {
  int64_t H, W;
};

// adaptive_avg_pool2d, rescaled to sum 1; returns the sum before that.
template <class S>
double pool(const S* map, Grid in, Grid out, double* pooled) {
  double total = 0;
  for (int64_t oh = 0; oh < out.H; oh++)
    for (int64_t ow = 0; ow < out.W; ow++) {
      const int64_t h0 = bin_start(oh, out.H, in.H), h1 = bin_stop(oh, out.H, in.H);
      const int64_t w0 = bin_start(ow, out.W, in.W), w1 = bin_stop(ow, out.W, in.W);
      double sum = 0;
      for (int64_t h = h0; h < h1; h++)
        for (int64_t w = w0; w < w1; w++) sum += static_cast<double>(map[h * in.W + w]);
      sum /= static_cast<double>((h1 - h0) * (w1 - w0));
      pooled[oh * out.W + ow] = sum;
      total += sum;
    }
  for (int64_t i = 0; i < out.H * out.W; i++) pooled[i] /= total;
  return total;
}

// From grad = dloss/d pooled to dloss/d map.
template <class S>
void pool_backward(const double* grad, const double* pooled, double total, Grid in, Grid out, S* grad_map) {
  double along = 0;
  for (int64_t i = 0; i < out.H * out.W; i++) along += grad[i] * pooled[i];
  std::vector<double> sum(static_cast<size_t>(in.H * in.W), 0.0);
  for (int64_t oh = 0; oh < out.H; oh++)
    for (int64_t ow = 0; ow < out.W; ow++) {
      const int64_t h0 = bin_start(oh, out.H, in.H), h1 = bin_stop(oh, out.H, in.H);
      const int64_t w0 = bin_start(ow, out.W, in.W), w1 = bin_stop(ow, out.W, in.W);
      const double share = (grad[oh * out.W + ow] - along) / (total * static_cast<double>((h1 - h0) * (w1 - w0)));
      for (int64_t h = h0; h < h1; h++)
        for (int64_t w = w0; w < w1; w++) sum[static_cast<size_t>(h * in.W + w)] += share;
    }
  for (int64_t i = 0; i < in.H * in.W; i++) grad_map[i] = static_cast<S>(sum[static_cast<size_t>(i)]);
}

double pool_any(const Network& net, int64_t n, Grid out, double* pooled) {
  const Grid in{net.side.x.H, net.side.x.W};
  const void* map = net.map(n, 0);
  return net.loops->acc_size == 8 ? pool(static_cast<const double*>(map), in, out, pooled)
                                  : pool(static_cast<const float*>(map), in, out, pooled);
}

double divergence_on_common_grid(const Network& student, const Network& teacher, int64_t n, double scale,
                                 void* grad_map) {
  const Features &s = student.side.x, &t = teacher.side.x;
  const Grid grid{std::min(s.H, t.H), std::min(s.W, t.W)}, in{s.H, s.W};
  const int64_t count = grid.H * grid.W;
  std::vector<double> a(static_cast<size_t>(count)), b(a), grad(a);
  pool_any(teacher, n, grid, a.data());
  const double total = pool_any(student, n, grid, b.data());
  const double loss = kernels().divergence(b.data(), true, a.data(), true, count, count, scale,
                                           grad_map == nullptr ? nullptr : grad.data(), true);
  if (grad_map == nullptr) return loss;
  if (student.loops->acc_size == 8)
    pool_backward(grad.data(), b.data(), total, in, grid, static_cast<double*>(grad_map) + n * positions(s));
  else
    pool_backward(grad.data(), b.data(), total, in, grid, static_cast<float*>(grad_map) + n * positions(s));
  return loss;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cafd_cpu(const Tensor& student_features, const Tensor& teacher_features,
                                            const Tensor& temperatures, int64_t reduction, bool needs_grad) {
  const auto [channel_temperature, spatial_temperature] = temperatures_of(temperatures);
  if (reduction < 0 || reduction > 2)
    throw std::invalid_argument("reduction: expected 0 (none), 1 (mean) or 2 (sum), got " + std::to_string(reduction));
  Network student("student_features", student_features, channel_temperature, spatial_temperature, needs_grad);
  Network teacher("teacher_features", teacher_features, channel_temperature, spatial_temperature, false);
  const Features &s = student.side.x, &t = teacher.side.x;
  if (s.N != t.N)
    throw std::invalid_argument("teacher_features: expected a batch of " + std::to_string(s.N) + ", got " +
                                std::to_string(t.N));
  const bool student_double = is_double(student_features), teacher_double = is_double(teacher_features);
  const ScalarType acc = acc_type(student_double);

  Tensor stats = torch::stable::new_empty(student_features, {s.N, stats_row(s)}, acc);
  Tensor grad_map = needs_grad ? torch::stable::new_empty(student_features, {s.N, s.H, s.W}, acc)
                               : torch::stable::new_empty(student_features, {0}, acc);
  const ScalarType loss_type = acc_type(student_double || teacher_double);
  Tensor loss = reduction == 0 ? torch::stable::new_empty(student_features, {s.N}, loss_type)
                               : torch::stable::new_empty(student_features, {}, loss_type);
  student.side.stats = stats.mutable_data_ptr();
  const Buffer teacher_stats = allocate(static_cast<size_t>(t.N * stats_row(t)) * teacher.loops->acc_size);
  teacher.side.stats = teacher_stats.get();

  const double scale = reduction == 1 ? 1 / static_cast<double>(std::max<int64_t>(1, s.N)) : 1;
  char* grad = needs_grad ? static_cast<char*>(grad_map.mutable_data_ptr()) : nullptr;
  const bool same_grid = s.H == t.H && s.W == t.W;
  const int64_t chunks = same_grid ? (positions(s) + kMapChunk - 1) / kMapChunk : 1;
  std::vector<double> losses(static_cast<size_t>(s.N * chunks));
  if (s.N > 0)
    attend({&teacher, &student}, [&](int64_t n, int64_t chunk) {
      if (!same_grid) return;
      const int64_t i = chunk * kMapChunk, count = std::min(kMapChunk, positions(s) - i);
      char* to = grad ? grad + (n * positions(s) + i) * static_cast<int64_t>(student.loops->acc_size) : nullptr;
      losses[static_cast<size_t>(n * chunks + chunk)] =
          kernels().divergence(student.map(n, i), student_double, teacher.map(n, i), teacher_double, count,
                               positions(s), scale, to, student_double);
    });
  if (!same_grid)
    parallel(s.N, 8 * (positions(s) + positions(t)), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++)
        losses[static_cast<size_t>(n)] = divergence_on_common_grid(student, teacher, n, scale, grad);
    });

  if (!needs_grad)
    for (int64_t n = 0; n < s.N; n++)
      std::memset(student.map(n, positions(s)), 0, static_cast<size_t>(positions(s)) * student.loops->acc_size);
  double total = 0;
  for (int64_t n = 0; n < s.N; n++) {
    double sample = 0;
    for (int64_t chunk = 0; chunk < chunks; chunk++) sample += losses[static_cast<size_t>(n * chunks + chunk)];
    total += sample;
    if (reduction != 0) continue;
    if (loss_type == ScalarType::Double)
      static_cast<double*>(loss.mutable_data_ptr())[n] = sample;
    else
      static_cast<float*>(loss.mutable_data_ptr())[n] = static_cast<float>(sample);
  }
  if (reduction != 0) {
    if (loss_type == ScalarType::Double)
      *static_cast<double*>(loss.mutable_data_ptr()) = total * scale;
    else
      *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(total * scale);
  }
  return {loss, grad_map, stats};
}

std::tuple<Tensor, Tensor> attention_map_cpu(const Tensor& features, const Tensor& temperatures) {
  const auto [channel_temperature, spatial_temperature] = temperatures_of(temperatures);
  Network net("features", features, channel_temperature, spatial_temperature, true);
  const Features& x = net.side.x;
  const ScalarType acc = acc_type(is_double(features));
  Tensor stats = torch::stable::new_empty(features, {x.N, stats_row(x)}, acc);
  Tensor map = torch::stable::new_empty(features, {x.N, x.H, x.W}, acc);
  net.side.stats = stats.mutable_data_ptr();
  char* to = static_cast<char*>(map.mutable_data_ptr());
  const int64_t bytes = static_cast<int64_t>(net.loops->acc_size);
  if (x.N > 0)
    attend({&net}, [&](int64_t n, int64_t chunk) {
      const int64_t i = chunk * kMapChunk, count = std::min(kMapChunk, positions(x) - i);
      std::memcpy(to + (n * positions(x) + i) * bytes, net.map(n, i), static_cast<size_t>(count * bytes));
    });
  return {map, stats};
}

Tensor attention_map_backward_cpu(const Tensor& features, const Tensor& grad_map, const Tensor& stats,
                                  const Tensor& temperatures) {
  const auto [channel_temperature, spatial_temperature] = temperatures_of(temperatures);
  const CafdLoops& loops = kernels().loops[static_cast<int>(float_type("features", features))];
  Side side{features_of("features", features), channel_temperature, spatial_temperature,
            const_cast<void*>(stats.const_data_ptr()), nullptr};
  const Features& x = side.x;
  const ScalarType acc = acc_type(is_double(features));
  if (grad_map.dim() != 3 || grad_map.size(0) != x.N || grad_map.size(1) != x.H || grad_map.size(2) != x.W ||
      grad_map.scalar_type() != acc)
    throw std::invalid_argument("grad_map: expected (N, H, W) of features, float32 (float64 for float64)");
  if (stats.numel() != x.N * stats_row(x) || stats.scalar_type() != acc || !stats.is_contiguous())
    throw std::invalid_argument("stats: expected what the forward returned for these features");
  Tensor grad = torch::stable::empty_like(features);
  if (x.N == 0) return grad;
  Features out{grad.mutable_data_ptr(), x.N,           x.C, x.H, x.W, grad.stride(0), grad.stride(1),
               grad.stride(2),          grad.stride(3)};
  advise_huge_pages(out.data, static_cast<size_t>(grad.numel()) * grad.element_size());

  const bool stream = static_cast<int64_t>(grad.numel() * grad.element_size()) >= kStreamBytes;
  const int64_t count = positions(x), acc_size = static_cast<int64_t>(loops.acc_size);
  const int64_t map_bytes = loops.pitch(count) * acc_size;
  const int64_t part_bytes = 2 * x.C * static_cast<int64_t>(sizeof(double));
  const bool by_positions = walk_positions(x) && (x.C == 1 || out.stride_c == 1);
  const int64_t elements = x.C * count;
  const int64_t blocks = std::clamp<int64_t>(elements / kBlock, 1, by_positions ? 8 : x.C);
  const int64_t group = group_size(2 * elements * static_cast<int64_t>(features.element_size()), x.N);
  const size_t scratch_bytes = loops.scratch(x);
  const char* d = static_cast<const char*>(grad_map.const_data_ptr());
  const Buffer centred = allocate(static_cast<size_t>(map_bytes * x.N));
  std::vector<Shared> shared(static_cast<size_t>(x.N));
  parallel(x.N, 8 * count, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++)
      loops.centre(side, n, d + n * grad_map.stride(0) * acc_size, grad_map.stride(1), grad_map.stride(2),
                   centred.get() + n * map_bytes, &shared[static_cast<size_t>(n)]);
  });
  const auto per_block = [&](int64_t first, int64_t samples, const auto& work) {
    parallel(samples * blocks, elements / blocks, [&](int64_t begin, int64_t end) {
      const Buffer scratch = allocate(scratch_bytes);
      for (int64_t task = begin; task < end; task++) {
        const int64_t n = first + task / blocks, block = task % blocks, walked = by_positions ? count : x.C;
        work(n, block, walked * block / blocks, walked * (block + 1) / blocks, scratch.get());
      }
    });
  };
  if (!by_positions) {
    per_block(0, x.N, [&](int64_t n, int64_t, int64_t from, int64_t to, void* scratch) {
      loops.backward_rows(side, n, from, to, centred.get() + n * map_bytes, shared[static_cast<size_t>(n)], out, stream,
                          scratch);
    });
    return grad;
  }
  const Buffer parts = allocate(static_cast<size_t>(part_bytes * blocks * group));
  std::vector<double> rho(static_cast<size_t>(x.C * group));
  for (int64_t first = 0; first < x.N; first += group) {
    const int64_t samples = std::min(group, x.N - first);
    per_block(first, samples, [&](int64_t n, int64_t block, int64_t from, int64_t to, void* scratch) {
      loops.rho_positions(side, n, from, to, centred.get() + n * map_bytes,
                          parts.get() + ((n - first) * blocks + block) * part_bytes, scratch);
    });
    for (int64_t n = first; n < first + samples; n++)
      loops.join_rho(side, parts.get() + (n - first) * blocks * part_bytes, blocks, rho.data() + (n - first) * x.C);
    per_block(first, samples, [&](int64_t n, int64_t, int64_t from, int64_t to, void* scratch) {
      loops.backward_positions(side, n, from, to, centred.get() + n * map_bytes, rho.data() + (n - first) * x.C,
                               shared[static_cast<size_t>(n)], out, stream, scratch);
    });
  }
  return grad;
}

}  // namespace dsct
