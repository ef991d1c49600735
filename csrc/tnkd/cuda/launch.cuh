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

constexpr int kMaxCountBlocks = 256;
inline int count_blocks(int64_t pixels) {
  return static_cast<int>(std::clamp<int64_t>(ceil_div(pixels, kCountThreads * kCountPixels * 2), 1, kMaxCountBlocks));
}

// The launch chosen for a call. Workspace and kernel sizes follow from it alone.
struct TnkdPlan {
  bool planes = false;
  int classes = 0;  // of a thread; 0: no variant takes the call
  int pixels = 1, warps = 1, unit = 1;
  int64_t tiles_per_image = 1, tiles = 0, blocks = 1;
  int count_blocks = 1;
  size_t shared = kHeadBytes;
};

inline LogitMap map_of(const TnkdArgs& args, const void* data, FloatType type, const Strides& strides, bool runs) {
  const int bytes = size_of(type), row = static_cast<int>(args.classes) * bytes;
  LogitMap net{};
  net.data = static_cast<unsigned char*>(const_cast<void*>(data)), net.type = type;
  net.image = strides.image * bytes, net.klass = strides.klass * bytes, net.pixel = strides.pixel * bytes;
  net.step = static_cast<unsigned>(net.klass);
  net.runs = runs && row % 16 == 0, net.pitch = net.runs ? (row / 16 | 1) * 16 : row;
  net.rows = strides.klass == 1 && (net.pixel == row || args.pixels == 1) && on_16_bytes(data) && net.image % 16 == 0;
  return net;
}

inline Logits logits_of(const TnkdArgs& args, bool runs) {
  Logits in{};
  in.student = map_of(args, args.student, args.student_type, args.student_strides, runs);
  in.teacher = map_of(args, args.teacher, args.teacher_type, args.teacher_strides, runs);
  in.grad = map_of(args, args.grad, args.student_type, args.grad_strides, runs);
  in.loss_map = static_cast<float*>(args.loss_map), in.class_weight = static_cast<const float*>(args.class_weight);
  in.pixels = args.pixels, in.classes = static_cast<int>(args.classes);
  return in;
}

// Whether lanes can step through a network in planes, `pixels` at a time.
inline bool in_planes(const TnkdArgs& args, const LogitMap& net, int pixels) {
  const int64_t run = pixels * size_of(net.type);
  return net.data == nullptr ||
         (net.pixel == size_of(net.type) && args.pixels % pixels == 0 && net.klass < int64_t{1} << 32 &&
          reinterpret_cast<uintptr_t>(net.data) % run == 0 && net.klass % run == 0 && net.image % run == 0);
}

// The dtypes that have variants for planes: one for both networks, or a float32 student of a 16-bit teacher.
inline bool planes_take(FloatType student, FloatType teacher) {
  return student == teacher || student == FloatType::kF32;
}

// Of the plan, the row for so many classes, `unit` of which stay together in a warp; nullptr: there are too many.
constexpr const PlanesRow* row_for(int64_t classes, int unit = 1) {
  for (const PlanesRow& row : kPlanes) {
    const bool held = row.lanes == 1 || ceil_div(classes / unit, row.lanes) * unit <= kMostClasses;
    if (classes <= row.most_classes && held) return row.lanes <= kMostWarps ? &row : nullptr;
  }
  return nullptr;
}

inline TnkdPlan tnkd_plan(const TnkdArgs& args, const Device& device) {
  TnkdPlan plan;
  Logits in = logits_of(args, true);
  plan.count_blocks = count_blocks(args.images * args.pixels);
  auto all_in_planes = [&](int pixels) {
    return planes_take(args.student_type, args.teacher_type) && in_planes(args, in.student, pixels) &&
           in_planes(args, in.teacher, pixels) && in_planes(args, in.grad, pixels);
  };
  const PlanesRow* row = row_for(args.classes);
  if (row == nullptr) return plan;
  const int pixels = row->pixels(size_of(args.student_type));
  plan.planes = all_in_planes(pixels);
  if (plan.planes) {
    plan.pixels = pixels;
  } else {
    for (const LogitMap& net : {in.student, in.teacher}) {
      if (net.runs) plan.unit = std::max(plan.unit, 16 / size_of(net.type));
    }
    if (row_for(args.classes, plan.unit) == nullptr) plan.unit = 1;  // at the price of bank conflicts
    row = row_for(args.classes, plan.unit);
  }
  plan.warps = row->lanes;
  const bool split = plan.warps > 1;
  const int tile = tile_pixels(split, plan.pixels);
  plan.shared += exchange_bytes(plan.warps, tile);
  if (!plan.planes) {
    in = logits_of(args, plan.unit > 1);
    plan.shared += (in.student.pitch + in.teacher.pitch) * tile;
  }
  plan.tiles_per_image = std::max<int64_t>(ceil_div(args.pixels, tile), 1);
  plan.tiles = args.images * ceil_div(args.pixels, tile);
  if (args.student_type == FloatType::kF64 || args.teacher_type == FloatType::kF64 ||
      plan.shared > static_cast<size_t>(device.shared_bytes) || plan.tiles > std::numeric_limits<int32_t>::max()) {
    return plan;
  }
  plan.classes = args.classes > 8 ? kMostClasses : plan.planes && args.classes <= 6 ? 6 : 8;
  // As many blocks as are at work at once: 16 warps a multiprocessor.
  const int resident = split ? std::max(1, kMostWarps / plan.warps) : kMostWarps * kWarp / kWholeThreads;
  plan.blocks = std::clamp<int64_t>(plan.tiles, 1, device.multiprocessors * resident);
  return plan;
}

// 8 bytes for the ticket, 8 for the largest weight, then counts, weights, partials and codes.
inline Workspace workspace_of(void* memory, int count_blocks, int64_t blocks) {
  Workspace work{};
  double* numbers = static_cast<double*>(memory);
  work.ticket = static_cast<unsigned*>(memory), work.largest_weight = numbers + 1;
  work.counts = numbers + 2, work.weights = work.counts + count_blocks;
  work.partials = work.weights + count_blocks, work.count_blocks = count_blocks;
  work.codes = numbers + ceil_div(2 + 2 * count_blocks + 3 * blocks, 2) * 2;
  return work;
}
// Up to the codes' end; a multiple of 16.
inline int64_t workspace_bytes(int count_blocks, int64_t blocks, int64_t pixels, bool wide) {
  const Workspace work = workspace_of(nullptr, count_blocks, blocks);
  return reinterpret_cast<uintptr_t>(work.codes) + ceil_div(pixels, 16) * 16 * (wide ? 2 : 1);
}
inline int64_t tnkd_workspace_bytes(const TnkdPlan& plan, const TnkdArgs& args) {
  return workspace_bytes(plan.count_blocks, plan.blocks, args.images * args.pixels, plan.warps > 1);
}

inline Terms<float> terms_of(const TnkdArgs& args) {
  Terms<float> terms{};
  set_numbers(terms, args.ce_weight, args.tckd_weight, args.nckd_weight, args.temperature);
  terms.with_ce = args.with_ce, terms.two_classes = args.classes == 2, terms.coupled = args.coupled;
  terms.values = args.values;
  return terms;
}
inline Result<float> result_of(const TnkdArgs& args, double gathered = 1) {
  return {static_cast<float*>(args.loss),       static_cast<float*>(args.parts),
          static_cast<float*>(args.grad_scale), args.mean,
          args.student_type == FloatType::kF16, gathered};
}
inline void encode(const TnkdArgs& args, int64_t pixels, bool wide, const Workspace& work, cudaStream_t stream) {
  launch("tnkd", encode_labels, work.count_blocks, kCountThreads, 2 * kWarp * sizeof(double), stream, args.target,
         args.target_type, on_16_bytes(args.target), args.has_ignore, args.ignore_index, args.ignore_index_value,
         static_cast<int>(args.classes), pixels, static_cast<const float*>(args.class_weight), wide, work);
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
void with_kernel(const TnkdPlan& plan, FloatType student, FloatType teacher, const Body& body) {
  if (!plan.planes) {
    if (plan.warps > 1) return body(tnkd_kernel<Tiles<true>, kMostClasses, true>);
    if (plan.classes == kMostClasses) return body(tnkd_kernel<Tiles<false>, kMostClasses, false>);
    return body(tnkd_kernel<Tiles<false>, 8, false>);
  }
  if (size_of(student) == 2) return with_planes<2, 2>(plan, body);
  if (size_of(teacher) == 2) return with_planes<4, 2>(plan, body);
  return with_planes<4, 4>(plan, body);
}

inline const char* kernel_name(const TnkdPlan& plan) {
  return plan.planes ? plan.warps > 1 ? "planes_split" : "planes" : plan.warps > 1 ? "tiles_split" : "tiles";
}

// The whole op: two launches on `stream`, nothing else.
inline void tnkd_run(const TnkdArgs& args, const TnkdPlan& plan, const Device& device, cudaStream_t stream) {
  const Workspace work = workspace_of(args.workspace, plan.count_blocks, plan.blocks);
  encode(args, args.images * args.pixels, plan.warps > 1, work, stream);
  Logits in = logits_of(args, plan.unit > 1);
  in.codes = work.codes, in.unit = plan.unit;
  in.tiles_per_image = static_cast<unsigned>(plan.tiles_per_image), in.tiles = static_cast<unsigned>(plan.tiles);
  with_kernel(plan, args.student_type, args.teacher_type, [&](auto kernel) {
    launch_early("tnkd", device, kernel, plan.blocks, plan.warps > 1 ? plan.warps * kWarp : kWholeThreads, plan.shared,
                 stream, in, terms_of(args), work, result_of(args));
  });
}

}  // namespace dsct::cuda
