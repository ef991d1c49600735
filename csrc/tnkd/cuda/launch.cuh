// TNKD and cross-entropy on the GPU: which variant of the kernel serves a call, how large its launch is, and the
// launch.
//
//   encode_labels: labels become codes, and are counted; a mean has to know its divisor before the first gradient.
//   tnkd_kernel: loss and gradient, every logit read once.
//
// Every block writes its partial sums; the block that finishes last adds them up in block order, so the result does
// not depend on timing. These sources also compile for the host (see cuda_launch.h).
#pragma once

#include <algorithm>
#include <initializer_list>

#include "kernel.cuh"
#include "tiles.cuh"

namespace dsct::cuda {

// Where memory is shared out to the workspace: the ticket and the largest weight, then counts, weights, partials and
// codes. Returns their bytes, a multiple of 16.
inline int64_t place_workspace(Call& in, void* memory, int64_t blocks, bool wide) {
  constexpr int kMostBlocks = 256;
  Workspace& work = in.work;
  const int64_t wanted = ceil_div(in.labels, kCountThreads * kCountPixels * 2);
  work.count_blocks = static_cast<int>(std::clamp<int64_t>(wanted, 1, kMostBlocks));
  double* numbers = static_cast<double*>(memory);
  work.ticket = static_cast<unsigned*>(memory), work.largest_weight = numbers + 1;
  work.counts = numbers + 2, work.weights = work.counts + work.count_blocks;
  work.partials = work.weights + work.count_blocks;
  const int64_t before = ceil_div(2 + 2 * work.count_blocks + 3 * blocks, 2) * 2;
  work.codes = numbers + before;
  return before * int64_t{sizeof(double)} + ceil_div(in.labels, 16) * 16 * (wide ? 2 : 1);
}

inline void encode(const Call& in, bool wide, cudaStream_t stream) {
  launch("tnkd", encode_labels, in.work.count_blocks, kCountThreads, 2 * kWarp * sizeof(double), stream, in, wide);
}

// Whether logits (N, K, *spatial) lie as kernels take them: without gaps, on 16 bytes, and the pixels of a class side
// by side or, with `last`, the classes of a pixel.
inline bool is_dense(const void* data, int64_t dims, const int64_t* size, const int64_t* stride, bool last) {
  int64_t step = 1;
  for (int64_t i = 0; i < dims; ++i) {  // from the innermost dimension
    const int64_t d = !last ? dims - 1 - i : i == 0 ? 1 : i == dims - 1 ? 0 : dims - i;
    if (size[d] != 1 && stride[d] != step) return false;
    step *= size[d];
  }
  return on_16_bytes(data);
}

// The launch chosen for a call.
struct TnkdPlan {
  Logits call;
  bool planes = false;
  int classes = 0;  // of a thread; 0: no variant takes the call
  int warps = 1;    // that share out a pixel's
  int64_t blocks = 1;
  size_t shared = kHeadBytes;

  int64_t place_workspace(void* memory) { return cuda::place_workspace(call, memory, blocks, warps > 1); }
};

// Of the plan, the row for so many classes, `unit` of which stay together in a warp; nullptr: there are too many.
constexpr const PlanesRow* row_for(int64_t classes, int unit = 1) {
  for (const PlanesRow& row : kPlanes) {
    const bool held = row.lanes == 1 || ceil_div(classes / unit, row.lanes) * unit <= kMostClasses;
    if (classes <= row.most_classes && held) return row.lanes <= kMostWarps ? &row : nullptr;
  }
  return nullptr;
}

// From all of a call but what a plan decides on.
inline TnkdPlan tnkd_plan(const Logits& call, const Device& device) {
  TnkdPlan plan{call};
  Logits& in = plan.call;
  const PlanesRow* row = row_for(in.classes);
  if (row == nullptr) return plan;
  int pixels = row->pixels(size_of(in.student.type));
  // One dtype for both networks, or a float32 student of a 16-bit teacher; steps of 32 bits.
  plan.planes = !in.last && in.pixels % pixels == 0 && in.pixels < int64_t{1} << 30 &&
                (in.student.type == in.teacher.type || in.student.type == FloatType::kF32);
  LogitMap* const maps[3] = {&in.student, &in.teacher, &in.grad};
  in.unit = 1;
  if (!plan.planes) {
    pixels = 1;
    auto in_runs = [&](const LogitMap& net) { return in.classes * size_of(net.type) % 16 == 0; };
    for (const LogitMap* net : maps) in.unit = std::max(in.unit, in_runs(*net) ? 16 / size_of(net->type) : 1);
    if (row_for(in.classes, in.unit) == nullptr) in.unit = 1;  // at the price of bank conflicts
    row = row_for(in.classes, in.unit);
    for (LogitMap* net : maps) {
      const int bytes = in.classes * size_of(net->type);
      net->runs = in.unit > 1 && in_runs(*net), net->pitch = net->runs ? (bytes / 16 | 1) * 16 : bytes;
    }
  }
  for (LogitMap* net : maps) net->step = static_cast<unsigned>(in.pixels * size_of(net->type));
  plan.warps = row->lanes;
  const bool split = plan.warps > 1;
  const int tile = tile_pixels(split, pixels);
  plan.shared += exchange_bytes(plan.warps, tile);
  in.teacher.tile = in.student.pitch * tile;
  if (!plan.planes) plan.shared += (in.student.pitch + in.teacher.pitch) * tile;
  const int64_t tiles = ceil_div(in.pixels, tile), all = in.labels == 0 ? 0 : in.labels / in.pixels * tiles;
  in.tiles_per_image = static_cast<unsigned>(std::max<int64_t>(tiles, 1)), in.tiles = static_cast<unsigned>(all);
  if (plan.shared > static_cast<size_t>(device.shared_bytes) || all > std::numeric_limits<int32_t>::max()) return plan;
  plan.classes = in.classes > 8 ? kMostClasses : plan.planes && in.classes <= 6 ? 6 : 8;
  // As many blocks as are at work at once: 16 warps a multiprocessor.
  const int resident = split ? std::max(1, kMostWarps / plan.warps) : kMostWarps * kWarp / kWholeThreads;
  plan.blocks = std::clamp<int64_t>(all, 1, device.multiprocessors * resident);
  return plan;
}

// Calls body with the variant that the plan names.
template <int kS, int kT, typename Body>
void with_planes(const TnkdPlan& plan, const Body& body) {
  constexpr int kFew = row_for(kMostClasses)->pixels(kS), kMany = row_for(8)->pixels(kS);
  if (plan.warps > 1) return body(tnkd_kernel<Planes<kS, kT, kFew>, kMostClasses, true>);
  if (plan.classes == kMostClasses) return body(tnkd_kernel<Planes<kS, kT, kFew>, kMostClasses, false>);
  if (plan.classes == 8) return body(tnkd_kernel<Planes<kS, kT, kMany>, 8, false>);
  return body(tnkd_kernel<Planes<kS, kT, kMany>, 6, false>);
}
template <typename Body>
void with_kernel(const TnkdPlan& plan, const Body& body) {
  if (!plan.planes) {
    if (plan.warps > 1) return body(tnkd_kernel<Tiles<true>, kMostClasses, true>);
    if (plan.classes == kMostClasses) return body(tnkd_kernel<Tiles<false>, kMostClasses, false>);
    return body(tnkd_kernel<Tiles<false>, 8, false>);
  }
  if (size_of(plan.call.student.type) == 2) return with_planes<2, 2>(plan, body);
  if (size_of(plan.call.teacher.type) == 2) return with_planes<4, 2>(plan, body);
  return with_planes<4, 4>(plan, body);
}

inline const char* kernel_name(const TnkdPlan& plan) {
  return plan.planes ? plan.warps > 1 ? "planes_split" : "planes" : plan.warps > 1 ? "tiles_split" : "tiles";
}

// The whole op, once the workspace is placed: two launches on `stream`, nothing else.
inline void tnkd_run(const TnkdPlan& plan, const Device& device, cudaStream_t stream) {
  encode(plan.call, plan.warps > 1, stream);
  with_kernel(plan, [&](auto kernel) {
    launch_early("tnkd", device, kernel, plan.blocks, plan.warps > 1 ? plan.warps * kWarp : kWholeThreads, plan.shared,
                 stream, plan.call);
  });
}

}  // namespace dsct::cuda
