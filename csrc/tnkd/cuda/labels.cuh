// Labels of any integer type, and where pixels lie.
#pragma once

#include <type_traits>

#include "args.cuh"

namespace dsct::cuda {

constexpr int kIgnored = -1;  // what a label becomes where it is ignore_index
constexpr int kBad = -2;      // and where it is no class at all

struct Labels {
  const void* pointer;  // or nullptr: the teacher's argmax
  LabelType type;
  bool has_ignore, has_narrow_ignore;  // narrow: ignore_index as a label of 32 bits or fewer may hold it
  int64_t ignore;
  int narrow_ignore;
  int classes;
  bool packs;                   // runs of 8 labels lie side by side on 16 bytes (or on their own size, if less)
  const int64_t* ignore_value;  // on the device: what `ignore` is to be read from, or nullptr
};

DSCT_HOST_DEVICE void set_ignore(Labels& labels, int64_t ignore) {
  labels.has_ignore = true;
  labels.ignore = ignore;
  labels.narrow_ignore = static_cast<int>(ignore);
  labels.has_narrow_ignore = labels.narrow_ignore == ignore;
}

DSCT_DEVICE void read_ignore(Labels& labels) {
  if (labels.ignore_value != nullptr) set_ignore(labels, *labels.ignore_value);
}

// kIgnored, kBad or the class.
template <typename L>
DSCT_DEVICE int classify(L label, const Labels& labels) {
  if constexpr (sizeof(L) == 8) {
    if (labels.has_ignore && label == labels.ignore) return kIgnored;
    return static_cast<uint64_t>(label) < static_cast<uint64_t>(labels.classes) ? static_cast<int>(label) : kBad;
  } else {
    const int narrow = label;
    if (labels.has_narrow_ignore && narrow == labels.narrow_ignore) return kIgnored;
    return static_cast<unsigned>(narrow) < static_cast<unsigned>(labels.classes) ? narrow : kBad;
  }
}

// Calls body with a null pointer of the labels' type.
template <typename Body>
DSCT_DEVICE void with_label_type(LabelType type, const Body& body) {
  switch (type) {
    case LabelType::kU8:
      return body(static_cast<const uint8_t*>(nullptr));
    case LabelType::kI8:
      return body(static_cast<const int8_t*>(nullptr));
    case LabelType::kI16:
      return body(static_cast<const int16_t*>(nullptr));
    case LabelType::kI32:
      return body(static_cast<const int32_t*>(nullptr));
    default:
      return body(static_cast<const int64_t*>(nullptr));
  }
}

DSCT_DEVICE int load_label(const Labels& labels, int64_t offset) {
  int y = 0;
  with_label_type(labels.type,
                  [&](auto null) { y = classify(static_cast<decltype(null)>(labels.pointer)[offset], labels); });
  return y;
}

template <typename L, int kBytes>
struct alignas(kBytes) LabelPack {
  L lane[kBytes / sizeof(L)];
};

// kCount labels side by side, in loads of up to 16 bytes where `labels.packs` says that they are aligned.
template <int kCount>
DSCT_DEVICE void load_labels(const Labels& labels, int64_t offset, int (&y)[kCount]) {
  with_label_type(labels.type, [&](auto null) {
    using L = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
    const L* from = static_cast<const L*>(labels.pointer) + offset;
    if (labels.packs) {
      constexpr int kBytes = kCount * sizeof(L) < 16 ? kCount * sizeof(L) : 16, kEach = kBytes / sizeof(L);
#pragma unroll
      for (int i = 0; i < kCount / kEach; ++i) {
        const LabelPack<L, kBytes> pack = *reinterpret_cast<const LabelPack<L, kBytes>*>(from + i * kEach);
#pragma unroll
        for (int v = 0; v < kEach; ++v) y[i * kEach + v] = classify(pack.lane[v], labels);
      }
    } else {
#pragma unroll
      for (int v = 0; v < kCount; ++v) y[v] = classify(from[v], labels);
    }
  });
}

// The offset of pixel `index` (row-major over `size`) in a tensor with these strides.
struct Space {
  int dims;
  int64_t size[kMaxDims];
};

DSCT_DEVICE int64_t offset_of(int64_t index, const Space& space, const int64_t (&stride)[kMaxDims]) {
  int64_t offset = 0;
#pragma unroll
  for (int d = kMaxDims - 1; d > 0; --d) {  // unrolled: a run-time index would put the arrays on the stack
    if (d >= space.dims) continue;
    const int64_t rest = index / space.size[d];
    offset += (index - rest * space.size[d]) * stride[d];
    index = rest;
  }
  return offset + index * stride[0];
}

struct PixelStride {
  int64_t at[kMaxDims];
};

}  // namespace dsct::cuda
