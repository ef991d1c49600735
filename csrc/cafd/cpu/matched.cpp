// Matched CAFD on CPU: what is split how, over torch's threads. The loops are in matched_loops.h.
//
// The work is cut into blocks that depend on the shape alone, and their results are joined in order: the result is
// bitwise the same for any number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cpu_isa.h"
#include "common/cpu_numbers.h"
#include "common/huge_pages.h"
#include "host.h"
#include "matched_args.h"
#include "matched_ops.h"

namespace dsct {
namespace {

constexpr int64_t kRowsTask = 64 * 1024;  // elements of each network in one task, by rows
constexpr int64_t kJoin = 128;            // channels that are joined in one task; a multiple of 16

const MatchedKernels& kernels() {
#ifdef DSCT_X86_ISAS
  switch (cpu_isa()) {
    case CpuIsa::kAvx512:
      return matched_kernels_avx512();
    case CpuIsa::kAvx2:
      return matched_kernels_avx2();
    default:
      break;
  }
#endif
  return matched_kernels_default();
}

// Every position's channels side by side, and the positions one after the other.
bool dense_positions(const Features& x) {
  return x.stride_c == 1 && (x.W == 1 || x.stride_w == x.C) && (x.H == 1 || x.stride_h == x.W * x.C);
}

struct Call {
  MatchedMaps maps;
  double channel_temperature;
  const MatchedLoops* loops;
  bool by_positions;

  Call(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask, const Tensor& temperatures,
       bool uniform)
      : maps{features_of("student", student),
             features_of("teacher", teacher),
             float_type("student", student),
             float_type("teacher", teacher),
             0,
             nullptr},
        channel_temperature(0),
        loops(&kernels().loops[is_double(student) || is_double(teacher) ? 1 : 0]),
        by_positions(maps.student.C > 1 && dense_positions(maps.student) && dense_positions(maps.teacher)) {
    const Features &s = maps.student, &t = maps.teacher;
    if (t.N != s.N || t.C != s.C || t.H != s.H || t.W != s.W)
      throw std::invalid_argument("teacher: expected the shape of student");
    if (mask.has_value()) {
      if (mask->scalar_type() != ScalarType::Bool || mask->numel() != s.N * positions(s) || !mask->is_contiguous() ||
          !mask->is_cpu())
        throw std::invalid_argument("mask: expected contiguous bools, (N, 1, H, W) of student");
      maps.mask = static_cast<const bool*>(mask->const_data_ptr());
    }
    const double* numbers = numbers_of<double>("temperatures", temperatures, 2);
    maps.temperature = positive("temperature", numbers[1]);
    if (!uniform) channel_temperature = positive("channel_temperature", numbers[0]);
  }
  static double positive(const char* name, double value) {
    if (!(value > 0 && std::isfinite(value)))
      throw std::invalid_argument(std::string(name) + ": expected a finite number > 0, got " + std::to_string(value));
    return value;
  }
  int64_t N() const { return maps.student.N; }
  int64_t C() const { return maps.student.C; }

  // Every range of positions and, by rows, of channels: f(n, first channel, end, first position, count, scratch).
  // `block` positions at a time.
  template <class F>
  void each(int64_t block, const F& f) const {
    const int64_t count = positions(maps.student), blocks = (count + block - 1) / block;
    const int64_t rows =
        by_positions ? C() : std::clamp<int64_t>(kRowsTask / std::min(block, count), 1, C());  // of one task
    const int64_t groups = (C() + rows - 1) / rows;
    // An element costs two exps: some four times what kMinWork counts in.
    parallel(N() * blocks * groups, 4 * rows * std::min(block, count), [&](int64_t begin, int64_t end) {
      const Buffer scratch = allocate(loops->scratch(maps));
      for (int64_t task = begin; task < end; task++) {
        const int64_t group = task % groups, first = task / groups % blocks * block, n = task / groups / blocks;
        f(n, group * rows, std::min((group + 1) * rows, C()), first, std::min(block, count - first), scratch.get());
      }
    });
  }
};

void check_reduction(int64_t reduction) {
  if (reduction < 0 || reduction > 2)
    throw std::invalid_argument("reduction: expected 0 (none), 1 (mean) or 2 (sum), got " + std::to_string(reduction));
}

void put(const Tensor& x, int64_t i, double value) {
  if (is_double(x))
    static_cast<double*>(x.mutable_data_ptr())[i] = value;
  else
    static_cast<float*>(x.mutable_data_ptr())[i] = static_cast<float>(value);
}

}  // namespace

std::tuple<Tensor, Tensor> matched_cafd_cpu(const Tensor& student, const Tensor& teacher,
                                            const std::optional<Tensor>& mask, const Tensor& temperatures, bool uniform,
                                            int64_t reduction) {
  check_reduction(reduction);
  const Call call(student, teacher, mask, temperatures, uniform);
  const MatchedLoops& loops = *call.loops;
  const int64_t N = call.N(), C = call.C(), pitch = loops.pitch_c(C);
  Tensor stats = torch::stable::new_empty(student, {N, kMatchedStats, C}, ScalarType::Double);
  const ScalarType loss_type = acc_type(is_double(student) || is_double(teacher));
  Tensor loss = reduction == 0 ? torch::stable::new_empty(student, {N}, loss_type)
                               : torch::stable::new_empty(student, {}, loss_type);
  double* const saved = static_cast<double*>(stats.mutable_data_ptr());

  const int64_t block = loops.block(call.maps, call.by_positions);
  const int64_t blocks = (positions(call.maps.student) + block - 1) / block, part = kMatchedFields * pitch;
  const Buffer memory = allocate(static_cast<size_t>(N * (blocks * part + 2 * pitch)) * sizeof(double));
  double* const parts = reinterpret_cast<double*>(memory.get());
  double *const kl = parts + N * blocks * part, *const strength = kl + N * pitch;
  std::vector<double> losses(static_cast<size_t>(N));
  if (N > 0) {
    call.each(block, [&](int64_t n, int64_t begin, int64_t end, int64_t first, int64_t count, void* scratch) {
      double* to = parts + (n * blocks + first / block) * part;
      if (call.by_positions)
        loops.part_positions(call.maps, n, first, count, to, scratch);
      else
        loops.part_rows(call.maps, n, begin, end, first, count, to, scratch);
    });
    const int64_t groups = (C + kJoin - 1) / kJoin;
    parallel(N * groups, 64 * std::min(C, kJoin) * blocks, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; task++) {
        const int64_t n = task / groups, c = task % groups * kJoin;
        loops.join(call.maps, c, std::min(c + kJoin, C), parts + n * blocks * part, blocks,
                   saved + n * kMatchedStats * C, kl + n * pitch, strength + n * pitch);
      }
    });
    parallel(N, 32 * C, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++)
        losses[static_cast<size_t>(n)] = loops.finish(call.maps, call.channel_temperature, kl + n * pitch,
                                                      strength + n * pitch, saved + n * kMatchedStats * C);
    });
  }
  double total = 0;
  for (int64_t n = 0; n < N; n++) {
    total += losses[static_cast<size_t>(n)];
    if (reduction == 0) put(loss, n, losses[static_cast<size_t>(n)]);
  }
  if (reduction != 0) put(loss, 0, reduction == 1 ? total / static_cast<double>(std::max<int64_t>(1, N)) : total);
  return {loss, stats};
}

static void zero_ignored(const MatchedMaps& m, int64_t n, Tensor& grad) {
  const int64_t C = m.student.C, H = m.student.H, W = m.student.W;
  const size_t bytes = static_cast<size_t>(grad.element_size());
  char* const data = static_cast<char*>(grad.mutable_data_ptr());
  for (int64_t i = 0; i < H * W; i++) {
    if (m.mask[n * H * W + i]) continue;
    const int64_t at = n * grad.stride(0) + i / W * grad.stride(2) + i % W * grad.stride(3);
    for (int64_t c = 0; c < C; c++) memset(data + (at + c * grad.stride(1)) * static_cast<int64_t>(bytes), 0, bytes);
  }
}

Tensor matched_cafd_backward_cpu(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                                 const Tensor& stats, const Tensor& temperatures, const Tensor& grad_output,
                                 int64_t reduction) {
  check_reduction(reduction);
  Call call(student, teacher, mask, temperatures, true);
  const MatchedLoops& loops = *call.loops;
  const int64_t N = call.N(), C = call.C();
  if (stats.numel() != N * kMatchedStats * C || stats.scalar_type() != ScalarType::Double || !stats.is_contiguous())
    throw std::invalid_argument("stats: expected what the forward returned for these maps");
  const bool per_sample = reduction == 0;
  if (grad_output.dim() != (per_sample ? 1 : 0) || (per_sample && grad_output.size(0) != N) ||
      grad_output.scalar_type() != acc_type(is_double(student) || is_double(teacher)))
    throw std::invalid_argument("grad_output: expected the shape and dtype of the loss");
  Tensor grad = torch::stable::empty_like(student);
  if (N == 0) return grad;
  const Features out{grad.mutable_data_ptr(),
                     N,
                     C,
                     call.maps.student.H,
                     call.maps.student.W,
                     grad.stride(0),
                     grad.stride(1),
                     grad.stride(2),
                     grad.stride(3)};
  advise_huge_pages(out.data, static_cast<size_t>(grad.numel()) * grad.element_size());
  call.by_positions = call.by_positions && dense_positions(out);

  const double* const saved = static_cast<const double*>(stats.const_data_ptr());
  std::vector<double> scale(static_cast<size_t>(N));
  for (int64_t n = 0; n < N; n++) {
    const int64_t i = per_sample ? n * grad_output.stride(0) : 0;
    const double upstream = is_double(grad_output) ? static_cast<const double*>(grad_output.const_data_ptr())[i]
                                                   : static_cast<const float*>(grad_output.const_data_ptr())[i];
    scale[static_cast<size_t>(n)] = reduction == 1 ? upstream / static_cast<double>(N) : upstream;
  }
  const bool stream = static_cast<int64_t>(grad.numel() * grad.element_size()) >= kStreamBytes;
  // Ranges that are large enough to make what is set up for each worth it.
  const int64_t whole = loops.backward_block(call.maps);
  const int64_t block =
      call.by_positions ? std::max<int64_t>(1, kRowsTask / (C * whole)) * whole : loops.block(call.maps, false);
  call.each(block, [&](int64_t n, int64_t begin, int64_t end, int64_t first, int64_t count, void* scratch) {
    const double* row = saved + n * kMatchedStats * C;
    if (call.by_positions)
      loops.backward_positions(call.maps, n, first, count, row, scale[static_cast<size_t>(n)], out, stream, scratch);
    else
      loops.backward_rows(call.maps, n, begin, end, first, count, row, scale[static_cast<size_t>(n)], out, stream,
                          scratch);
  });
  // 0 * inf: what does not count gets exactly 0, whatever comes from upstream.
  for (int64_t n = 0; n < N; n++)
    if (call.maps.mask != nullptr && !std::isfinite(scale[static_cast<size_t>(n)])) zero_ignored(call.maps, n, grad);
  return grad;
}

}  // namespace dsct
