// planes_whole: classes in planes, few of them; one thread holds all of them for its pixels.
#pragma once

#include <type_traits>

#include "result.cuh"
#include "sums.cuh"

namespace dsct::cuda {

// Each thread loads 16 bytes of pixels from each of its classes: 2 * kClasses loads in flight before the first use.
struct Planes {
  const void* student;
  const void* teacher;
  void* grad;
  float* loss_map;
  const float* class_weight;
  int64_t student_image, student_class, teacher_image, teacher_class, grad_image, grad_class, target_image;
  int64_t pixels_per_image;  // a multiple of the pixels in 16 bytes
  unsigned tiles_per_image, tiles;
  int classes;
};

// Both networks' logits of one thread. Absent ones become -inf, which counts as absent.
template <typename T, int kClasses>
DSCT_DEVICE void load_classes(const Planes& in, unsigned image, int64_t pixel, bool present, Pack<T> (&s)[kClasses],
                              Pack<T> (&t)[kClasses]) {
  const T* student = at<T>(in.student, image * in.student_image + pixel);
  const T* teacher = at<T>(in.teacher, image * in.teacher_image + pixel);
#pragma unroll
  for (int i = 0; i < kClasses; ++i) {
    const bool here = present && i < in.classes;
    s[i] = here ? load_pack(student + i * in.student_class) : fill_pack<T>(-infinity<float>());
    t[i] = here ? load_pack(teacher + i * in.teacher_class) : fill_pack<T>(-infinity<float>());
  }
}

template <typename T, int kClasses>
DSCT_DEVICE void store_classes(const Planes& in, unsigned image, int64_t pixel, const Pack<T> (&g)[kClasses]) {
  T* grad = static_cast<T*>(in.grad) + image * in.grad_image + pixel;
#pragma unroll
  for (int i = 0; i < kClasses; ++i) {
    if (i < in.classes) store_pack(grad + i * in.grad_class, g[i]);
  }
}

// Calls body(integral_constant<int, 0>) ... body(<kCount - 1>): a loop whose index is a compile-time constant, so that
// register arrays stay in registers however large the body.
template <int kCount, int kFirst = 0, typename Body>
DSCT_DEVICE void repeat(const Body& body) {
  if constexpr (kFirst < kCount) {
    body(std::integral_constant<int, kFirst>{});
    repeat<kCount, kFirst + 1>(body);
  }
}

// Few classes: one thread holds all of them for its pixels.
template <typename T, int kClasses, Ce kCe, bool kOnDevice>
__global__ void __launch_bounds__(128, 1)
    planes_whole(Planes in, Labels labels, Terms<float> terms, Workspace work, Result<float> result) {
  constexpr int kPixels = Pack<T>::kSize;
  DSCT_SHARED(shared);
  double* scratch = reinterpret_cast<double*>(shared);
  terms.with_ce = kCe != Ce::kNone;
  if constexpr (kOnDevice) read_numbers(terms), read_ignore(labels);
  Factors<float> factors;
  PixelLoss<float> total = {0, 0, 0};
  for (unsigned work_tile = blockIdx.x; work_tile < in.tiles; work_tile += gridDim.x) {
    const unsigned image = work_tile / in.tiles_per_image, tile = work_tile - image * in.tiles_per_image;
    const int64_t pixel = (static_cast<int64_t>(tile) * blockDim.x + threadIdx.x) * kPixels;
    const bool inside = pixel < in.pixels_per_image;
    Pack<T> s[kClasses], t[kClasses];
    load_classes(in, image, pixel, inside, s, t);
    int y[kPixels];
    if (labels.pointer == nullptr) {  // the teacher's argmax, smallest index on a tie
#pragma unroll
      for (int v = 0; v < kPixels; ++v) {
        float best = number(t[0], v);
        y[v] = inside ? 0 : kIgnored;
#pragma unroll
        for (int i = 1; i < kClasses; ++i) {
          const float z = number(t[i], v);
          if (z > best) best = z, y[v] = i;
        }
      }
    } else if (inside) {
      load_labels(labels, image * in.target_image + pixel, y);
    } else {
#pragma unroll
      for (int v = 0; v < kPixels; ++v) y[v] = kIgnored;
    }
    if (work_tile == blockIdx.x) {  // once, while the first logits are under way
      wait_for_previous();
      factors = factors_of<float>(norms_of(add_counts(work, scratch), terms, work, result));
    }
    repeat<kPixels>([&](auto index) {
      constexpr int v = decltype(index)::value;
      float es[kClasses], et[kClasses], ec[kCe == Ce::kOwn ? kClasses : 1], student_target = 0, teacher_target = 0;
#pragma unroll
      for (int i = 0; i < kClasses; ++i) {
        const bool is_target = i == y[v];
        const float zs = number(s[i], v), zt = number(t[i], v);
        student_target = is_target ? zs : student_target;
        teacher_target = is_target ? zt : teacher_target;
        es[i] = is_target ? -infinity<float>() : zs;
        et[i] = is_target ? -infinity<float>() : zt;
      }
      PixelSums<float> z = sum_exponentials<kCe>(es, et, ec, terms, [](float value, auto) { return value; });
      z.student_target = student_target, z.teacher_target = teacher_target;
      PixelLoss<float> loss;
      PixelGrad<float> grad;
      judge_pixel(z, y[v], terms, in.class_weight, factors.kd, factors.ce, loss, grad);
      total.ce += loss.ce, total.tckd += loss.tckd, total.nckd += loss.nckd;
      if (in.loss_map != nullptr && inside) {
        in.loss_map[image * in.pixels_per_image + pixel + v] = pixel_loss(loss, terms);
      }
      // The student's packs are not needed any more: the gradient takes their place.
      const GradientOf<kCe> gradient(terms, grad);
#pragma unroll
      for (int i = 0; i < kClasses; ++i) {
        const float g = gradient(es[i], et[i], ec[kCe == Ce::kOwn ? i : 0]);
        s[i].lane[v] = static_cast<T>(i == y[v] ? grad.target : g);
      }
    });
    if (in.grad != nullptr && inside) {
      bool keep[kPixels];
#pragma unroll
      for (int v = 0; v < kPixels; ++v) keep[v] = y[v] != kIgnored;
      keep_lanes(s, keep);
      store_classes(in, image, pixel, s);
    }
  }
  finish_block(total, terms, work, result, scratch);
}

}  // namespace dsct::cuda
