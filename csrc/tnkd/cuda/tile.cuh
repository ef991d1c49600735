// Tiles of pixels of any layout, to shared memory and back.
#pragma once

#include "args.cuh"

namespace dsct::cuda {

// One network's logits, or their gradient: classes side by side at every pixel (channels_last), or pixels side by side
// in every class.
struct TileTensor {
  const void* data;
  int64_t image, klass;  // strides; pixels are `classes` apart (rows) or 1
  bool rows, packs;      // packs: every run starts on 16 bytes
};

struct Tiles {
  TileTensor student, teacher, grad;
  float* loss_map;
  const float* class_weight;
  int64_t target_image, pixels_per_image;
  unsigned tiles_per_image, tiles;
  int classes;
  int groups_log2;  // neighbouring threads that share a pixel: class j belongs to thread j % groups of them
  int pixels_log2;  // of a tile
  int tile_bytes;   // of one network's tile in shared memory
};

// Between two classes of a tile in planes: 16 bytes more than its pixels, so that classes fall into different banks.
template <typename T>
DSCT_HOST_DEVICE constexpr int tile_row(int pixels) {
  return pixels + Pack<T>::kSize;
}

// Starts copying a tile into shared memory; wait_for_copies() and a barrier later it is there.
template <typename T>
DSCT_DEVICE void fetch_tile(const TileTensor& from, T* tile, unsigned image, int64_t start, int pixels,
                            const Tiles& in) {
  constexpr int kSize = Pack<T>::kSize;
  const T* base = at<T>(from.data, image * from.image + start * (from.rows ? in.classes : 1));
  if (from.rows) {
    const int count = pixels * in.classes, packs = from.packs ? count / kSize : 0;
    for (int i = threadIdx.x; i < packs; i += blockDim.x) copy_pack_async(tile + i * kSize, base + i * kSize);
    for (int i = packs * kSize + threadIdx.x; i < count; i += blockDim.x) tile[i] = base[i];
  } else {
    const int size = from.packs ? kSize : 1, width_log2 = in.pixels_log2 - (from.packs ? pack_log2<T>() : 0);
    for (int i = threadIdx.x; i < in.classes << width_log2; i += blockDim.x) {
      const int j = i >> width_log2, p = (i & ((1 << width_log2) - 1)) * size;
      if (p >= pixels) continue;
      T* to = tile + j * tile_row<T>(1 << in.pixels_log2) + p;
      if (from.packs) {
        copy_pack_async(to, base + j * from.klass + p);
      } else {
        *to = base[j * from.klass + p];
      }
    }
  }
}

template <typename T>
DSCT_DEVICE void store_tile(const TileTensor& to, const T* tile, unsigned image, int64_t start, int pixels,
                            const Tiles& in) {
  constexpr int kSize = Pack<T>::kSize;
  T* base = const_cast<T*>(at<T>(to.data, image * to.image + start * (to.rows ? in.classes : 1)));
  if (to.rows) {
    const int count = pixels * in.classes, packs = to.packs ? count / kSize : 0;
    for (int i = threadIdx.x; i < packs; i += blockDim.x) {
      store_pack(base + i * kSize, *reinterpret_cast<const Pack<T>*>(tile + i * kSize));
    }
    for (int i = packs * kSize + threadIdx.x; i < count; i += blockDim.x) base[i] = tile[i];
  } else {
    const int size = to.packs ? kSize : 1, width_log2 = in.pixels_log2 - (to.packs ? pack_log2<T>() : 0);
    for (int i = threadIdx.x; i < in.classes << width_log2; i += blockDim.x) {
      const int j = i >> width_log2, p = (i & ((1 << width_log2) - 1)) * size;
      if (p >= pixels) continue;
      const T* from = tile + j * tile_row<T>(1 << in.pixels_log2) + p;
      if (to.packs) {
        store_pack(base + j * to.klass + p, *reinterpret_cast<const Pack<T>*>(from));
      } else {
        base[j * to.klass + p] = *from;
      }
    }
  }
}

}  // namespace dsct::cuda
