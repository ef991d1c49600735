// any_layout: what the fast kernels cannot take.
#pragma once

#include "result.cuh"

namespace dsct::cuda {

template <typename A>
struct AnyLayout {
  const void* student;
  const void* teacher;
  void* grad;
  void* loss_map;
  const A* class_weight;
  FloatType student_type, teacher_type;
  int64_t student_class, teacher_class, grad_class, pixels;
  int classes;
  Space space;
  PixelStride student_stride, teacher_stride, grad_stride, target_stride;
};

// One thread per pixel; the classes are read three times, the second and third from cache where they fit.
template <typename A, bool kOnDevice>
__global__ void __launch_bounds__(128, 1)
    any_layout(AnyLayout<A> in, Labels labels, Terms<A> terms, Workspace work, Result<A> result) {
  if constexpr (kOnDevice) read_numbers(terms), read_ignore(labels);
  DSCT_SHARED(shared);
  double* scratch = reinterpret_cast<double*>(shared);
  wait_for_previous();
  const Factors<A> factors = factors_of<A>(norms_of(add_counts(work, scratch), terms, work, result));
  constexpr A kLog2E = A(1.4426950408889634074);

  PixelLoss<A> total = {0, 0, 0};
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t pixel = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; pixel < in.pixels; pixel += step) {
    const int64_t at_s = offset_of(pixel, in.space, in.student_stride.at);
    const int64_t at_t = offset_of(pixel, in.space, in.teacher_stride.at);
    auto student = [&](int j) { return load_number<A>(in.student, in.student_type, at_s + j * in.student_class); };
    auto teacher = [&](int j) { return load_number<A>(in.teacher, in.teacher_type, at_t + j * in.teacher_class); };

    int y = 0;
    if (labels.pointer == nullptr) {
      A best = teacher(0);
      for (int j = 1; j < in.classes; ++j) {
        const A z = teacher(j);
        if (z > best) best = z, y = j;
      }
    } else {
      y = load_label(labels, offset_of(pixel, in.space, in.target_stride.at));
    }
    PixelSums<A> z;
    z.student_target = z.teacher_target = 0;
    A max_s = -infinity<A>(), max_t = -infinity<A>();
    for (int j = 0; j < in.classes; ++j) {
      const A zs = student(j), zt = teacher(j);
      if (j == y) {
        z.student_target = zs, z.teacher_target = zt;
      } else {
        max_s = larger(max_s, zs);
        max_t = larger(max_t, zt);
      }
    }
    if (max_s == -infinity<A>()) max_s = 0;
    if (max_t == -infinity<A>()) max_t = 0;
    z.student_base = max_s * terms.log2_scale, z.teacher_base = max_t * terms.log2_scale, z.ce_base = max_s * kLog2E;
    auto power_s = [&](A x) { return std::fma(x, terms.log2_scale, -z.student_base); };
    auto power_t = [&](A x) { return std::fma(x, terms.log2_scale, -z.teacher_base); };
    auto exp_ce = [&](A x) { return exp2_fast(std::fma(x, kLog2E, -z.ce_base)); };
    z.student_sum = z.teacher_sum = z.cross = z.ce_sum = 0;
    for (int j = 0; j < in.classes; ++j) {
      if (j == y) continue;
      const A zs = student(j), ds = power_s(zs), dt = power_t(teacher(j)), exp_t = exp2_fast(dt);
      z.student_sum += exp2_fast(ds);
      z.teacher_sum += exp_t;
      if (exp_t != 0) z.cross += exp_t * (dt - ds);
      if (terms.with_ce) z.ce_sum += exp_ce(zs);
    }
    PixelLoss<A> loss;
    PixelGrad<A> grad;
    judge_pixel(z, y, terms, in.class_weight, factors.kd, factors.ce, loss, grad);
    total.ce += loss.ce, total.tckd += loss.tckd, total.nckd += loss.nckd;
    if (in.loss_map != nullptr) static_cast<A*>(in.loss_map)[pixel] = pixel_loss(loss, terms);
    if (in.grad == nullptr) continue;
    const int64_t at_g = offset_of(pixel, in.space, in.grad_stride.at);
    for (int j = 0; j < in.classes; ++j) {
      A g = 0;
      if (y != kIgnored) {
        const A zs = student(j);
        g = grad.student * exp2_fast(power_s(zs)) + grad.teacher * exp2_fast(power_t(teacher(j)));
        if (terms.with_ce) g += grad.ce * exp_ce(zs);
        if (j == y) g = grad.target;
      }
      store_number(in.grad, in.student_type, at_g + j * in.grad_class, g);
    }
  }
  finish_block(total, terms, work, result, scratch);
}

}  // namespace dsct::cuda
