// staged: tiles pass through shared memory, and neighbouring threads share a pixel's classes.
#pragma once

#include "result.cuh"
#include "sums.cuh"
#include "tile.cuh"

namespace dsct::cuda {

constexpr int staged_threads(int classes) { return classes > 16 ? 256 : 512; }
// Blocks that a multiprocessor should hold at once: registers are given out accordingly.
constexpr int staged_blocks(int classes, Ce ce) { return classes > 10 || ce == Ce::kOwn ? 1 : 2; }

constexpr int kElsewhere = -3;  // a class, but not one of this thread's

// What a pixel's threads leave for the one that judges it, and what that one answers.
enum Sum { kStudentBase, kTeacherBase, kCeBase, kStudentSum, kTeacherSum, kCross, kCeSum, kSums };
enum Verdict { kGradS, kGradT, kGradCe, kGradTarget, kVerdicts };

constexpr size_t tile_shared_bytes(int pixels, int tile_bytes) {
  return kScratch * sizeof(double) + sizeof(float) * (kSums + 1) * pixels + 4 * static_cast<size_t>(tile_bytes);
}

// More classes than one thread holds, either memory layout, any alignment. Tiles of pixels pass through shared memory,
// where the next one arrives while this one is worked on; the gradient takes the student's place there and leaves in
// 16-byte stores.
template <typename T, int kClasses, Ce kCe, bool kOnDevice>
__global__ void __launch_bounds__(staged_threads(kClasses), staged_blocks(kClasses, kCe))
    staged(Tiles in, Labels labels, Terms<float> terms, Workspace work, Result<float> result) {
  if constexpr (kOnDevice) read_numbers(terms), read_ignore(labels);
  DSCT_SHARED(shared);
  double* scratch = reinterpret_cast<double*>(shared);
  const int groups = 1 << in.groups_log2, group = threadIdx.x & (groups - 1), tile_pixels = 1 << in.pixels_log2;
  float* sums = reinterpret_cast<float*>(scratch + kScratch);  // [kSums][tile_pixels], then [kVerdicts][tile_pixels]
  int* y_tile = reinterpret_cast<int*>(sums + kSums * tile_pixels);
  unsigned char* buffers = reinterpret_cast<unsigned char*>(y_tile + tile_pixels);  // [2][student, teacher]
  auto buffer = [&](int which, int network) {
    return reinterpret_cast<T*>(buffers + (2 * which + network) * in.tile_bytes);
  };
  // Where class j of pixel p is: p * pixel_step + j * class_step.
  const int row = tile_row<T>(tile_pixels);
  const int pixel_s = in.student.rows ? in.classes : 1, class_s = in.student.rows ? 1 : row;
  const int pixel_t = in.teacher.rows ? in.classes : 1, class_t = in.teacher.rows ? 1 : row;

  auto fetch = [&](unsigned work_tile, int which) {
    const unsigned image = work_tile / in.tiles_per_image;
    const int64_t start = static_cast<int64_t>(work_tile - image * in.tiles_per_image) << in.pixels_log2;
    const int64_t left = in.pixels_per_image - start;
    const int pixels = left < tile_pixels ? static_cast<int>(left) : tile_pixels;
    fetch_tile(in.student, buffer(which, 0), image, start, pixels, in);
    fetch_tile(in.teacher, buffer(which, 1), image, start, pixels, in);
  };

  Factors<float> factors;
  PixelLoss<float> total = {0, 0, 0};
  if (blockIdx.x < in.tiles) fetch(blockIdx.x, 0);
  int which = 0;
  for (unsigned work_tile = blockIdx.x; work_tile < in.tiles; work_tile += gridDim.x, which ^= 1) {
    const unsigned image = work_tile / in.tiles_per_image;
    const int64_t start = static_cast<int64_t>(work_tile - image * in.tiles_per_image) << in.pixels_log2;
    const int64_t left = in.pixels_per_image - start;
    const int pixels = left < tile_pixels ? static_cast<int>(left) : tile_pixels;
    T* student = buffer(which, 0);
    const T* teacher = buffer(which, 1);
    if (labels.pointer != nullptr) {
      for (int p = threadIdx.x; p < tile_pixels; p += blockDim.x) {
        y_tile[p] = p < pixels ? load_label(labels, image * in.target_image + start + p) : kIgnored;
      }
    }
    if (work_tile == blockIdx.x) {
      wait_for_previous();
      factors = factors_of<float>(norms_of(add_counts(work, scratch), terms, work, result));
    }
    wait_for_copies();
    __syncthreads();
    if (work_tile + gridDim.x < in.tiles) fetch(work_tile + gridDim.x, which ^ 1);

    float es[kClasses], et[kClasses], ec[kCe == Ce::kOwn ? kClasses : 1];
    const int p = threadIdx.x >> in.groups_log2;
    const bool inside = p < pixels;
#pragma unroll
    for (int i = 0; i < kClasses; ++i) {
      const int j = group + (i << in.groups_log2);
      const bool here = inside && j < in.classes;
      es[i] = here ? static_cast<float>(student[p * pixel_s + j * class_s]) : -infinity<float>();
      et[i] = here ? static_cast<float>(teacher[p * pixel_t + j * class_t]) : -infinity<float>();
    }
    int y;
    if (labels.pointer == nullptr) {
      // The teacher's argmax, smallest index on a tie. A NaN must lose in every thread alike.
      float best = et[0] == et[0] ? et[0] : -infinity<float>();
      y = group;
#pragma unroll
      for (int i = 1; i < kClasses; ++i) {
        if (et[i] > best) best = et[i], y = group + (i << in.groups_log2);
      }
      for (int offset = 1; offset < groups; offset *= 2) {
        const float z = __shfl_xor_sync(kFullMask, best, offset);
        const int j = __shfl_xor_sync(kFullMask, y, offset);
        if (z > best || (z == best && j < y)) best = z, y = j;
      }
      if (!inside) y = kIgnored;
      if (group == 0) y_tile[p] = y;
    } else {
      y = y_tile[p];
    }
    const int slot = y >= 0 && (y & (groups - 1)) == group ? y >> in.groups_log2 : y < 0 ? y : kElsewhere;
#pragma unroll
    for (int i = 0; i < kClasses; ++i) {
      if (i == slot) es[i] = et[i] = -infinity<float>();
    }
    auto join = [&](float value, auto combine) {
      for (int offset = 1; offset < groups; offset *= 2) {
        value = combine(value, __shfl_xor_sync(kFullMask, value, offset));
      }
      return value;
    };
    const PixelSums<float> z = sum_exponentials<kCe>(es, et, ec, terms, join);
    if (group == 0 && inside) {
      const float mine[kSums] = {z.student_base, z.teacher_base, z.ce_base, z.student_sum,
                                 z.teacher_sum,  z.cross,        z.ce_sum};
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[(i << in.pixels_log2) + p] = mine[i];
    }
    __syncthreads();

    for (int p = threadIdx.x; p < pixels; p += blockDim.x) {
      const int y = y_tile[p];
      auto sum = [&](int i) { return sums[(i << in.pixels_log2) + p]; };
      PixelSums<float> z = {sum(kStudentBase),
                            sum(kTeacherBase),
                            sum(kStudentSum),
                            sum(kTeacherSum),
                            sum(kCross),
                            sum(kCeBase),
                            sum(kCeSum),
                            0,
                            0};
      if (y >= 0) {
        z.student_target = static_cast<float>(student[p * pixel_s + y * class_s]);
        z.teacher_target = static_cast<float>(teacher[p * pixel_t + y * class_t]);
      }
      PixelLoss<float> loss;
      PixelGrad<float> grad;
      judge_pixel(z, y, terms, in.class_weight, factors.kd, factors.ce, loss, grad);
      total.ce += loss.ce, total.tckd += loss.tckd, total.nckd += loss.nckd;
      if (in.loss_map != nullptr) in.loss_map[image * in.pixels_per_image + start + p] = pixel_loss(loss, terms);
      const float answer[kVerdicts] = {grad.student, grad.teacher, grad.ce, grad.target};
#pragma unroll
      for (int i = 0; i < kVerdicts; ++i) sums[(i << in.pixels_log2) + p] = answer[i];
    }
    __syncthreads();

    if (in.grad.data != nullptr) {
      if (inside) {
        auto answer = [&](int i) { return sums[(i << in.pixels_log2) + p]; };
        const GradientOf<kCe> gradient(terms, {answer(kGradS), answer(kGradT), answer(kGradCe), answer(kGradTarget)});
#pragma unroll
        for (int i = 0; i < kClasses; ++i) {
          const int j = group + (i << in.groups_log2);
          float g = gradient(es[i], et[i], ec[kCe == Ce::kOwn ? i : 0]);
          if (i == slot) g = gradient.factors.target;
          if (slot == kIgnored) g = 0;  // whatever stands in the logits
          if (j < in.classes) student[p * pixel_s + j * class_s] = static_cast<T>(g);
        }
      }
      __syncthreads();
      store_tile(in.grad, student, image, start, pixels, in);
    }
    __syncthreads();  // this tile's memory is about to be filled again
  }
  finish_block(total, terms, work, result, scratch);
}

}  // namespace dsct::cuda
