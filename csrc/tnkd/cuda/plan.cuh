// Which kernel serves a call, and how large its launch is.
#pragma once

#include <algorithm>

#include "any_layout.cuh"
#include "staged.cuh"
#include "whole.cuh"

namespace dsct::cuda {

constexpr int kMaxCountBlocks = 256, kAnyThreads = 128, kWholeThreads = 128;
constexpr int64_t kMaxTiles = std::numeric_limits<int32_t>::max();

// How many classes a thread may hold: the variants that are compiled.
template <int... kCounts>
struct ClassCounts {
  static constexpr int kLargest = std::max({kCounts...});
};
using WholeClasses = ClassCounts<2, 4, 6, 8>;
using StagedClasses = ClassCounts<2, 4, 6, 8, 10, 16, 32>;

// Calls body(integral_constant<int, m>) for the m among kCounts that equals `count`.
template <int... kCounts, typename Body>
void one_of(ClassCounts<kCounts...>, int count, const Body& body) {
  ((count == kCounts ? body(std::integral_constant<int, kCounts>{}) : void()), ...);
}

// The smallest count of classes a thread that holds K over `groups` threads; 0 where none does.
template <int... kCounts>
int smallest_count(ClassCounts<kCounts...>, int64_t classes, int groups) {
  int best = 0;
  for (int m : {kCounts...}) {
    if (static_cast<int64_t>(m) * groups >= classes && (best == 0 || m < best)) best = m;
  }
  return best;
}

enum class Kernel { kAny, kWhole, kStaged };

// The launch chosen for a call. Workspace and kernel sizes follow from it alone.
struct TnkdPlan {
  Kernel kernel = Kernel::kAny;
  int classes_per_thread = 0, groups_log2 = 0, pixels_log2 = 0, tile_bytes = 0, threads = kAnyThreads;
  int64_t tiles_per_image = 0, tiles = 0, blocks = 1;
  int count_blocks = 1;
  size_t shared = kScratch * sizeof(double);
};

inline const char* kernel_name(Kernel kernel) {
  return kernel == Kernel::kAny ? "any_layout" : kernel == Kernel::kWhole ? "planes_whole" : "staged";
}

// How the fast kernels see a tensor: pixels side by side in every class, classes side by side at every pixel, or
// neither.
enum class Shape { kPlanes, kRows, kNeither };

inline Shape shape_of(const TnkdArgs& args, const Strides& strides) {
  if (args.dims > 2) return Shape::kNeither;
  const int64_t pixel = strides.pixel[args.dims - 1], per_image = args.size[args.dims - 1];
  if (strides.klass == 1 && (pixel == args.classes || per_image == 1)) return Shape::kRows;
  return pixel == 1 || per_image == 1 ? Shape::kPlanes : Shape::kNeither;
}

// Every run of pixels (or of classes) that a kernel reads at once starts on 16 bytes.
inline bool on_packs(const TnkdArgs& args, const void* data, const Strides& strides, int vector) {
  const bool images = args.dims == 1 || strides.pixel[0] % vector == 0;
  if (shape_of(args, strides) == Shape::kRows) return on_16_bytes(data) && images;
  return on_16_bytes(data) && images && strides.klass % vector == 0 && args.size[args.dims - 1] % vector == 0;
}

inline TnkdPlan tnkd_plan(const TnkdArgs& args, const Device& device) {
  const bool count = args.mean && args.target != nullptr && (args.has_ignore || args.class_weight != nullptr);
  TnkdPlan plan;
  plan.count_blocks = count ? static_cast<int>(std::clamp<int64_t>(
                                  ceil_div(args.pixels, kCountThreads * kCountPixels * 2), 1, kMaxCountBlocks))
                            : 1;
  TnkdPlan any = plan;
  any.blocks = std::clamp<int64_t>(ceil_div(args.pixels, kAnyThreads), 1, 1 << 20);

  const Shape student = shape_of(args, args.student_strides), teacher = shape_of(args, args.teacher_strides);
  const Shape grad = args.grad == nullptr ? student : shape_of(args, args.grad_strides);
  if (args.pixels == 0 || args.student_type != args.teacher_type || args.student_type == FloatType::kF64 ||
      student == Shape::kNeither || teacher == Shape::kNeither || grad != student ||
      (args.target != nullptr && args.target_strides[args.dims - 1] != 1 && args.size[args.dims - 1] != 1)) {
    return any;
  }
  const int bytes = size_of(args.student_type), vector = 16 / bytes, k = static_cast<int>(args.classes);
  const int64_t images = args.dims == 2 ? args.size[0] : 1, per_image = args.size[args.dims - 1];
  if (student == Shape::kPlanes && teacher == Shape::kPlanes && k <= WholeClasses::kLargest &&
      on_packs(args, args.student, args.student_strides, vector) &&
      on_packs(args, args.teacher, args.teacher_strides, vector) &&
      on_packs(args, args.grad, args.grad_strides, vector)) {
    plan.kernel = Kernel::kWhole;
    plan.classes_per_thread = smallest_count(WholeClasses(), k, 1);
    plan.threads = kWholeThreads;
    plan.tiles_per_image = ceil_div(per_image, kWholeThreads * vector);
  } else {
    plan.kernel = Kernel::kStaged;
    // Up to 10 classes a thread, more only where a warp cannot share them out further.
    while (plan.groups_log2 < 5 && (10 << plan.groups_log2) < k) ++plan.groups_log2;
    plan.classes_per_thread = smallest_count(StagedClasses(), k, 1 << plan.groups_log2);
    if (plan.classes_per_thread == 0) return any;
    // One pixel for each group of threads; fewer where memory would not hold two tiles of each network, but 16 bytes.
    plan.threads = plan.groups_log2 >= 3 ? staged_threads(plan.classes_per_thread) : 256;
    for (;; plan.threads /= 2) {
      if (plan.threads >> plan.groups_log2 < vector) return any;
      plan.pixels_log2 = 0;
      while ((2 << plan.pixels_log2) <= plan.threads >> plan.groups_log2) ++plan.pixels_log2;
      plan.tile_bytes = static_cast<int>(ceil_div(k * ((1 << plan.pixels_log2) + vector) * bytes, 16)) * 16;
      plan.shared = tile_shared_bytes(1 << plan.pixels_log2, plan.tile_bytes);
      if (plan.shared <= static_cast<size_t>(device.shared_bytes)) break;
    }
    const int pixels = 1 << plan.pixels_log2;
    plan.tiles_per_image = ceil_div(per_image, pixels);
  }
  plan.tiles = plan.tiles_per_image * images;
  // Enough blocks to fill the chip and to even out the end, few enough to make their fixed cost small.
  plan.blocks = std::min<int64_t>(plan.tiles, device.multiprocessors * 8);
  return plan.tiles <= kMaxTiles ? plan : any;
}

// 8 bytes for the ticket, 8 for the largest weight, then counts, weights and partials.
inline int64_t tnkd_workspace_bytes(const TnkdPlan& plan) {
  return 16 + 16 * static_cast<int64_t>(plan.count_blocks) + 24 * plan.blocks;
}

}  // namespace dsct::cuda
