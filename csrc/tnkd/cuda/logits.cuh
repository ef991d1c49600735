// Both networks' logits at the labels' size, and what of them a thread works on.
#pragma once

#include "call.cuh"

namespace dsct::cuda {

// One network's logits, or their gradient.
struct LogitMap {
  unsigned char* data;
  FloatType type;
  unsigned step;  // bytes from class to class, of planes. Of each network its own, or the compiler shares products out
  // Where a tile of pixels passes through shared memory (tiles.cuh) the classes of a pixel lie side by side there, and
  // pixels `pitch` bytes apart. runs: they are runs of 16 bytes; an odd number of them is a pitch, so that lanes that
  // each read a run of their own pixel meet different banks.
  // `tile`: where its tile begins; the gradient takes the student's place.
  int pitch, tile;
  bool runs;
};

// Without gaps and on 16 bytes, all three alike: (N, K, *spatial), or, with classes `last`, one image of (pixels, K).
struct Logits : Call {
  LogitMap student, teacher, grad;  // grad without data: none is asked for
  bool last;
  int64_t pixels;  // of an image
  unsigned tiles_per_image, tiles;
  int unit;  // classes that no two warps share out
};

// What a thread works on: its classes, and of the tile that its block has come to, its pixels.
struct Place {
  const Logits& in;
  unsigned char* shared;  // for tiles
  int first, classes;
  unsigned image, tile, more_images, more_tiles;  // and from one tile of the block to its next
  int64_t start;                                  // the tile's first pixel
  int pixels;                                     // of the tile
  int mine;                                       // the thread's first pixel of the tile,
  bool inside;                                    // which is there
  int at;                                         // and if it is not, one that is

  DSCT_DEVICE Place(const Logits& in, unsigned char* shared, int warp, int warps) : in(in), shared(shared) {
    first = in.classes / in.unit * warp / warps * in.unit;
    classes = in.classes / in.unit * (warp + 1) / warps * in.unit - first;
    image = blockIdx.x / in.tiles_per_image, tile = blockIdx.x % in.tiles_per_image;
    more_images = gridDim.x / in.tiles_per_image, more_tiles = gridDim.x % in.tiles_per_image;
  }
  DSCT_DEVICE void enter(int tile_pixels, int first_pixel) {
    start = static_cast<int64_t>(tile) * tile_pixels;
    pixels = in.pixels - start < tile_pixels ? static_cast<int>(in.pixels - start) : tile_pixels;
    mine = first_pixel, inside = mine < pixels, at = inside ? mine : 0;
  }
  DSCT_DEVICE void next() {
    image += more_images, tile += more_tiles;
    if (tile >= in.tiles_per_image) tile -= in.tiles_per_image, ++image;
  }
  // Of the thread's first pixel, among all.
  DSCT_DEVICE int64_t pixel() const { return image * in.pixels + start + at; }
};

// So many of a thread's classes are there whatever K: the plan takes the smallest variant that will do.
constexpr int sure_classes(int classes) { return classes > 8 ? 8 : 2; }

// Calls body with a null pointer to the type of a network's numbers, which have kSize bytes, or (0) any.
template <int kSize, typename Body>
DSCT_DEVICE void by_type(FloatType type, const Body& body) {
  if constexpr (kSize != 2) {
    if (kSize == 4 || type == FloatType::kF32) return body(static_cast<float*>(nullptr));
  }
  if constexpr (kSize != 4) {
    type == FloatType::kBF16 ? body(static_cast<BFloat16*>(nullptr)) : body(static_cast<Half*>(nullptr));
  }
}

// Class j (of all) of the thread's pixel v: both networks' logits, or the gradient.
template <int kSize, typename Source>
DSCT_DEVICE float logit_at(const Source& p, const LogitMap& net, int v, int j) {
  const unsigned char* from = p.template number<kSize>(net, v, j);
  float z = 0;
  by_type<kSize>(net.type, [&]<typename E>(E*) { z = *reinterpret_cast<const E*>(from); });
  return z;
}
template <typename Source>
DSCT_DEVICE void store_at(const Source& p, int v, int j, float g) {
  unsigned char* to = p.template number<Source::kS>(p.in.grad, v, j);
  by_type<Source::kS>(p.in.grad.type, [&]<typename E>(E*) { *reinterpret_cast<E*>(to) = static_cast<E>(g); });
}

}  // namespace dsct::cuda
