// TNKD and cross-entropy on the GPU: loss and gradient in one pass over the logits.
//
//   count_pixels   labels only: how many pixels are valid, and the sum of their class weights (block partials)
//   planes_whole   classes in planes (NCHW), few of them: a thread holds all classes of 16 bytes of pixels in registers
//   staged         more classes, channels_last, mixed layouts, odd sizes: tiles pass through shared memory, and
//                  neighbouring threads share a pixel's classes
//   any_layout     one thread per pixel, any strides, any K, any dtype: what the fast kernels cannot take
//
// Every block writes its partial sums; the block that finishes last adds them up in block order, so the result does
// not depend on timing. These sources also compile for the host (see cuda_launch.h).
#pragma once

#include "plan.cuh"

namespace dsct::cuda {

template <typename A>
Terms<A> terms_of(const TnkdArgs& args) {
  Terms<A> terms{};
  set_numbers(terms, args.ce_weight, args.tckd_weight, args.nckd_weight, args.temperature);
  terms.with_ce = args.with_ce;
  terms.two_classes = args.classes == 2;
  terms.coupled = args.coupled;
  terms.values = args.values;
  return terms;
}

template <typename A>
Result<A> result_of(const TnkdArgs& args) {
  return {static_cast<A*>(args.loss), static_cast<A*>(args.parts), static_cast<A*>(args.grad_scale), args.mean,
          args.student_type == FloatType::kF16};
}

inline Workspace workspace_of(const TnkdArgs& args, const TnkdPlan& plan) {
  char* base = static_cast<char*>(args.workspace) + 16;
  Workspace work;
  work.ticket = static_cast<unsigned*>(args.workspace);
  work.largest_weight = static_cast<double*>(args.workspace) + 1;
  work.counts = reinterpret_cast<double*>(base);
  work.weights = reinterpret_cast<double*>(base + 8 * plan.count_blocks);
  work.partials = reinterpret_cast<double*>(base + 16 * plan.count_blocks);
  work.count_blocks = plan.count_blocks;
  return work;
}

inline int64_t image_stride(const TnkdArgs& args, const Strides& strides) {
  return args.dims == 1 ? 0 : strides.pixel[0];
}

inline bool on_device(const TnkdArgs& args) { return args.values != nullptr || args.ignore_index_value != nullptr; }

// A temperature that the host does not know may be any.
inline Ce cross_entropy(const TnkdArgs& args) {
  if (!args.with_ce) return Ce::kNone;
  return !on_device(args) && (args.temperature == 1 || args.temperature == 2) ? Ce::kPowers : Ce::kOwn;
}

template <typename T>
void launch_whole(const TnkdPlan& plan, const TnkdArgs& args, const Labels& labels, const Workspace& work,
                  const Device& device, cudaStream_t stream) {
  Planes in;
  in.student = args.student, in.teacher = args.teacher, in.grad = args.grad;
  in.loss_map = static_cast<float*>(args.loss_map), in.class_weight = static_cast<const float*>(args.class_weight);
  in.student_image = image_stride(args, args.student_strides), in.student_class = args.student_strides.klass;
  in.teacher_image = image_stride(args, args.teacher_strides), in.teacher_class = args.teacher_strides.klass;
  in.grad_image = image_stride(args, args.grad_strides), in.grad_class = args.grad_strides.klass;
  in.target_image = args.dims == 1 ? 0 : args.target_strides[0];
  in.pixels_per_image = args.size[args.dims - 1];
  in.tiles_per_image = static_cast<unsigned>(plan.tiles_per_image), in.tiles = static_cast<unsigned>(plan.tiles);
  in.classes = static_cast<int>(args.classes);
  const Ce ce = cross_entropy(args);
  one_of(WholeClasses(), plan.classes_per_thread, [&](auto classes) {
    constexpr int kClasses = decltype(classes)::value;
    const auto kernel = on_device(args)     ? ce == Ce::kNone ? planes_whole<T, kClasses, Ce::kNone, true>
                                                              : planes_whole<T, kClasses, Ce::kOwn, true>
                        : ce == Ce::kNone   ? planes_whole<T, kClasses, Ce::kNone, false>
                        : ce == Ce::kPowers ? planes_whole<T, kClasses, Ce::kPowers, false>
                                            : planes_whole<T, kClasses, Ce::kOwn, false>;
    launch_early("tnkd", device, kernel, plan.blocks, plan.threads, plan.shared, stream, in, labels,
                 terms_of<float>(args), work, result_of<float>(args));
  });
}

template <typename T>
void launch_staged(const TnkdPlan& plan, const TnkdArgs& args, const Labels& labels, const Workspace& work,
                   const Device& device, cudaStream_t stream) {
  auto tensor = [&](const void* data, const Strides& strides) {
    return TileTensor{data, image_stride(args, strides), strides.klass, shape_of(args, strides) == Shape::kRows,
                      on_packs(args, data, strides, Pack<T>::kSize)};
  };
  Tiles in;
  in.student = tensor(args.student, args.student_strides), in.teacher = tensor(args.teacher, args.teacher_strides);
  in.grad = tensor(args.grad, args.grad_strides);
  in.loss_map = static_cast<float*>(args.loss_map), in.class_weight = static_cast<const float*>(args.class_weight);
  in.target_image = args.dims == 1 ? 0 : args.target_strides[0];
  in.pixels_per_image = args.size[args.dims - 1];
  in.tiles_per_image = static_cast<unsigned>(plan.tiles_per_image), in.tiles = static_cast<unsigned>(plan.tiles);
  in.classes = static_cast<int>(args.classes);
  in.groups_log2 = plan.groups_log2, in.pixels_log2 = plan.pixels_log2, in.tile_bytes = plan.tile_bytes;
  one_of(StagedClasses(), plan.classes_per_thread, [&](auto classes) {
    constexpr int kClasses = decltype(classes)::value;
    const bool own = cross_entropy(args) == Ce::kOwn;
    const auto kernel = on_device(args)
                            ? own ? staged<T, kClasses, Ce::kOwn, true> : staged<T, kClasses, Ce::kPowers, true>
                        : own ? staged<T, kClasses, Ce::kOwn, false>
                              : staged<T, kClasses, Ce::kPowers, false>;
    launch_early("tnkd", device, kernel, plan.blocks, plan.threads, plan.shared, stream, in, labels,
                 terms_of<float>(args), work, result_of<float>(args));
  });
}

template <typename A>
void launch_any(const TnkdPlan& plan, const TnkdArgs& args, const Labels& labels, const Workspace& work,
                const Device& device, cudaStream_t stream) {
  AnyLayout<A> in;
  in.student = args.student, in.teacher = args.teacher, in.grad = args.grad;
  in.loss_map = args.loss_map, in.class_weight = static_cast<const A*>(args.class_weight);
  in.student_type = args.student_type, in.teacher_type = args.teacher_type;
  in.student_class = args.student_strides.klass, in.teacher_class = args.teacher_strides.klass;
  in.grad_class = args.grad_strides.klass, in.pixels = args.pixels, in.classes = static_cast<int>(args.classes);
  in.space.dims = args.dims;
  for (int d = 0; d < kMaxDims; ++d) {
    in.space.size[d] = args.size[d];
    in.student_stride.at[d] = args.student_strides.pixel[d];
    in.teacher_stride.at[d] = args.teacher_strides.pixel[d];
    in.grad_stride.at[d] = args.grad_strides.pixel[d];
    in.target_stride.at[d] = args.target_strides[d];
  }
  const auto kernel = on_device(args) ? any_layout<A, true> : any_layout<A, false>;
  launch_early("tnkd", device, kernel, plan.blocks, plan.threads, plan.shared, stream, in, labels, terms_of<A>(args),
               work, result_of<A>(args));
}

inline Labels labels_of(const TnkdArgs& args) {
  Labels labels{};
  labels.pointer = args.target;
  labels.type = args.target_type;
  if (args.has_ignore) set_ignore(labels, args.ignore_index);
  labels.ignore_value = args.ignore_index_value;
  labels.classes = static_cast<int>(args.classes);
  labels.packs = on_16_bytes(args.target) && args.target_strides[args.dims - 1] == 1 &&
                 (args.dims == 1 || (args.dims == 2 && args.target_strides[0] % 8 == 0));
  return labels;
}

// The whole op: two launches on `stream`, nothing else.
inline void tnkd_run(const TnkdArgs& args, const TnkdPlan& plan, const Device& device, cudaStream_t stream) {
  const bool wide = args.student_type == FloatType::kF64 || args.teacher_type == FloatType::kF64;
  const Workspace work = workspace_of(args, plan);
  const Labels labels = labels_of(args);
  // The labels by themselves: dimensions that the logits keep apart are one here, and then they are counted in packs.
  Space space{};
  PixelStride target_stride{};
  for (int d = 0; d < args.dims; ++d) {
    const int last = space.dims - 1;
    if (last >= 0 && target_stride.at[last] == args.target_strides[d] * args.size[d]) {
      space.size[last] *= args.size[d];
    } else {
      space.size[space.dims++] = args.size[d];
    }
    target_stride.at[space.dims - 1] = args.target_strides[d];
  }
  Labels counted = labels;
  counted.packs = on_16_bytes(args.target) && space.dims == 1 && target_stride.at[0] == 1;
  const bool count = args.mean && args.target != nullptr && (args.has_ignore || args.class_weight != nullptr);
  const size_t shared = 2 * kWarp * sizeof(double);
  const auto count_labels = [&](auto kernel, auto* class_weight) {
    launch("tnkd", kernel, plan.count_blocks, kCountThreads, shared, stream, counted, space, target_stride, args.pixels,
           class_weight, count, work);
  };
  if (wide) {
    count_labels(on_device(args) ? count_pixels<double, true> : count_pixels<double, false>,
                 static_cast<const double*>(args.class_weight));
    return launch_any<double>(plan, args, labels, work, device, stream);
  }
  count_labels(on_device(args) ? count_pixels<float, true> : count_pixels<float, false>,
               static_cast<const float*>(args.class_weight));
  auto by_dtype = [&](auto type) {
    using T = decltype(type);
    if (plan.kernel == Kernel::kWhole) return launch_whole<T>(plan, args, labels, work, device, stream);
    return launch_staged<T>(plan, args, labels, work, device, stream);
  };
  if (plan.kernel == Kernel::kAny) return launch_any<float>(plan, args, labels, work, device, stream);
  switch (args.student_type) {
    case FloatType::kF32:
      return by_dtype(float());
    case FloatType::kF16:
      return by_dtype(Half());
    default:
      return by_dtype(BFloat16());
  }
}

}  // namespace dsct::cuda
