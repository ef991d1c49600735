// TNKD of logits smaller than the labels on the GPU: tiles, and the launches.
//
//   encode_labels, or label_by_teacher: as for tnkd_kernel. Labels are read once either way, and the pass over them
//   knows the divisors of a mean before the first gradient; they differ where classes have weights.
//   tnkd_upsampled_kernel: loss, and each tile's part of the gradient.
//   add_slabs: the gradient.
#pragma once

#include "launch.cuh"
#include "upsampled.cuh"

namespace dsct::cuda {

// What a plan needs to know beside data, dtypes and layouts.
struct UpsampledSizes {
  int64_t images, labels[2], student[2], teacher[2];  // height, width
  bool align_corners;
};

struct UpsampledPlan {
  Upsampled call;
  int classes = 0;  // of a thread; 0: no variant takes the call
  int64_t blocks = 1;
  size_t shared = 0;

  // With the slabs of a gradient behind it.
  int64_t place_workspace(void* memory) {
    const int64_t bytes = cuda::place_workspace(call, memory, blocks, call.groups > 1);
    if (call.grad.data == nullptr) return bytes;
    call.slabs = reinterpret_cast<Four*>(static_cast<unsigned char*>(memory) + bytes);
    return bytes + int64_t{call.tiles} * call.slab_rows * call.slab_row * int64_t{sizeof(Four)};
  }
};

inline Axis axis_of(int64_t inputs, int64_t outputs, bool align_corners) {
  const double step = align_corners ? outputs > 1 ? double(inputs - 1) / double(outputs - 1) : 0
                                    : double(inputs) / double(std::max<int64_t>(outputs, 1));
  return {static_cast<int>(inputs), static_cast<int>(outputs), step, align_corners};
}
// The most inputs that so many neighbouring outputs look at.
inline int reach(const Axis& axis, int outputs) {
  return std::min(axis.inputs, static_cast<int>((outputs - 1) * axis.step + 1e-3) + 3);
}
// At least what the weights of an input add up to.
inline double gathered(const Axis& axis) {
  if (axis.inputs == axis.outputs) return 1;
  return axis.step > 0 ? 1 / axis.step + 1 : axis.outputs;
}

// From data, dtype and layout.
inline void complete(SmallMap& map, const Upsampled& in, const int64_t (&size)[2], bool align_corners) {
  map.y = axis_of(size[0], in.height, align_corners), map.x = axis_of(size[1], in.width, align_corners);
  const int64_t bytes = size_of(map.type), cells = size[0] * size[1];
  map.image = in.classes * cells * bytes, map.step = static_cast<unsigned>(map.last ? bytes : cells * bytes);
  map.column = static_cast<unsigned>(map.last ? in.classes * bytes : bytes);
  map.row = static_cast<unsigned>(size[1] * map.column);
}

// Tiles of so many rows; their number is what the fewest rounds of `resident` blocks, with the least work, want.
inline void set_rows(Upsampled& in, int64_t resident) {
  // Each tile costs some three rows more, and what it reaches beyond itself is added up anew: four rows of the
  // student's.
  constexpr int kLeast = 16, kMost = 128;
  const double four = in.student.y.step > 0 ? 4 / in.student.y.step : kMost;
  const int least = std::clamp(static_cast<int>(std::min<double>(four, kMost)), kLeast, kMost);
  int64_t best = std::numeric_limits<int64_t>::max();
  for (int rows = least; rows <= kMost; ++rows) {
    const int64_t tiles = int64_t{in.images} * in.tiles_x * ceil_div(in.height, rows);
    const int64_t cost = ceil_div(tiles, resident) * (std::min(rows, in.height) + 3);
    if (cost < best) best = cost, in.rows = rows;
  }
  in.rows = std::max(1, std::min(in.rows, in.height));
  in.tiles_y = static_cast<int>(ceil_div(in.height, in.rows));
  in.slab_rows = reach(in.student.y, in.rows);
}

constexpr int kMostHeld = 19;  // classes of a thread

inline UpsampledPlan upsampled_plan(const Upsampled& call, const UpsampledSizes& size, const Device& device) {
  UpsampledPlan plan{call};
  Upsampled& in = plan.call;
  for (int64_t most : {size.images, size.labels[0], size.labels[1]}) {
    if (most > std::numeric_limits<int32_t>::max() / 2) return plan;
  }
  for (const auto& cells : {size.student, size.teacher}) {
    if (cells[0] * cells[1] >= int64_t{1} << 30 || cells[1] * in.classes >= int64_t{1} << 30) return plan;
  }
  in.images = static_cast<int>(size.images), in.labels = size.images * size.labels[0] * size.labels[1];
  in.height = static_cast<int>(size.labels[0]), in.width = static_cast<int>(size.labels[1]);
  complete(in.student, in, size.student, size.align_corners);
  complete(in.grad, in, size.student, size.align_corners);
  complete(in.teacher, in, size.teacher, size.align_corners);
  in.gathered = gathered(in.student.y) * gathered(in.student.x);
  const bool split = in.classes > kMostHeld;
  int classes = kMostHeld;
  for (int held : {12, 8, 6}) {
    if (in.classes <= held) classes = held;
  }
  in.fours = (classes + 3) / 4;
  in.columns = split ? kWarp : std::clamp<int>(ceil_div(in.width, kWarp) * kWarp, kWarp, kWholeThreads);
  for (;; in.columns /= 2) {
    const int whole = kWarp / std::min(in.columns, kWarp);  // groups of a warp
    in.groups = split ? static_cast<int>(ceil_div(ceil_div(in.classes, kMostHeld), whole) * whole) : 1;
    const int threads = in.groups * in.columns;
    in.tiles_x = static_cast<int>(ceil_div(in.width, in.columns));
    in.slab_columns = reach(in.student.x, in.columns);
    in.slab_row = in.groups * in.fours * in.slab_columns;
    set_rows(in, int64_t{device.multiprocessors} * std::max(1, kMostWarps * kWarp / threads));
    plan.shared = Shared::lay_out(in, classes);
    if (threads <= kMostWarps * kWarp && plan.shared <= static_cast<size_t>(device.shared_bytes) / 2) break;
    if (!split || in.columns == 8) break;  // with fewer of them a second block would fit beside it, no more
  }
  const int64_t tiles = int64_t{in.images} * in.tiles_x * in.tiles_y;
  if (in.groups * in.columns > kMostWarps * kWarp || plan.shared > static_cast<size_t>(device.shared_bytes) ||
      tiles > std::numeric_limits<int32_t>::max() || in.classes > kMostWarps * kMostClasses) {
    return plan;
  }
  in.tiles = static_cast<unsigned>(tiles);
  plan.classes = classes;
  plan.blocks = std::clamp<int64_t>(
      tiles, 1, int64_t{device.multiprocessors} * std::max(1, kMostWarps * kWarp / (in.groups * in.columns)));
  return plan;
}

template <typename Body>
void with_upsampled_kernel(const UpsampledPlan& plan, const Body& body) {
  if (plan.call.groups > 1) return body(tnkd_upsampled_kernel<kMostHeld, true>);
  if (plan.classes == 6) return body(tnkd_upsampled_kernel<6, false>);
  if (plan.classes == 8) return body(tnkd_upsampled_kernel<8, false>);
  if (plan.classes == 12) return body(tnkd_upsampled_kernel<12, false>);
  return body(tnkd_upsampled_kernel<kMostHeld, false>);
}

// The whole op, once the workspace is placed: three launches on `stream`, nothing else; two without a gradient.
inline void upsampled_run(const UpsampledPlan& plan, const Device& device, cudaStream_t stream) {
  const Upsampled& in = plan.call;
  const bool wide = in.groups > 1;
  if (in.target != nullptr) {
    encode(in, wide, stream);
  } else {
    launch("tnkd_upsampled", label_by_teacher, in.work.count_blocks, kCountThreads, 2 * kWarp * sizeof(double), stream,
           in, wide);
  }
  with_upsampled_kernel(plan, [&](auto kernel) {
    launch_early("tnkd_upsampled", device, kernel, plan.blocks, in.groups * in.columns, plan.shared, stream, in);
  });
  if (in.grad.data == nullptr) return;
  const int64_t rows = int64_t{in.images} * in.grad.y.inputs * in.groups * in.fours;
  const int threads = std::clamp<int>(ceil_div(in.grad.x.inputs, kWarp) * kWarp, kWarp, kSlabThreads);
  launch("tnkd_upsampled", add_slabs, rows, threads, 0, stream, in);
}

}  // namespace dsct::cuda
