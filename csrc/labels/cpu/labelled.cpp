// The share of each cell's labels that count, in one pass over the labels: torch's way, a comparison, a conversion and
// an adaptive average, takes six times as long.
#include <algorithm>
#include <limits>
#include <vector>

#include "common/cpu_logits.h"
#include "ops.h"

namespace dsct {
namespace {

constexpr int64_t kLabelsOfTask = 1 << 16;

// The cell of an output along one dimension, as adaptive_avg_pool2d has it: they overlap where sizes do not divide.
struct Range {
  int64_t begin, end;
};
Range cell(int64_t i, int64_t inputs, int64_t outputs) {
  return {i * inputs / outputs, ((i + 1) * inputs + outputs - 1) / outputs};
}

struct Labels {
  const void* data;
  int64_t strides[3];
  int64_t height, width;
};

// counts[x] += whether label x of the row counts.
template <class L>
void count_row(const L* row, int64_t stride, int64_t width, L ignored, uint32_t* counts) {
  if (stride == 1) {
    for (int64_t x = 0; x < width; x++) counts[x] += row[x] != ignored;
  } else {
    for (int64_t x = 0; x < width; x++) counts[x] += row[x * stride] != ignored;
  }
}

template <class L, class S>
void share_rows(const Labels& labels, int64_t ignored, int64_t height, int64_t width, int64_t begin, int64_t end,
                S* to) {
  if (ignored < int64_t(std::numeric_limits<L>::min()) || ignored > int64_t(std::numeric_limits<L>::max())) {
    std::fill(to + begin * width, to + end * width, S(1));
    return;
  }
  std::vector<uint32_t> counts(static_cast<size_t>(labels.width));
  for (int64_t i = begin; i < end; i++) {
    const Range rows = cell(i % height, labels.height, height);
    const L* sample = static_cast<const L*>(labels.data) + i / height * labels.strides[0];
    std::fill(counts.begin(), counts.end(), 0);
    for (int64_t y = rows.begin; y < rows.end; y++)
      count_row(sample + y * labels.strides[1], labels.strides[2], labels.width, L(ignored), counts.data());
    for (int64_t x = 0; x < width; x++) {
      const Range columns = cell(x, labels.width, width);
      uint64_t count = 0;
      for (int64_t c = columns.begin; c < columns.end; c++) count += counts[size_t(c)];
      to[i * width + x] = S(count) / S((rows.end - rows.begin) * (columns.end - columns.begin));
    }
  }
}

template <class S>
void share_of(LabelType type, const Labels& labels, int64_t ignored, int64_t height, int64_t width, int64_t begin,
              int64_t end, S* to) {
  switch (type) {
    case LabelType::kU8:
      return share_rows<uint8_t>(labels, ignored, height, width, begin, end, to);
    case LabelType::kI8:
      return share_rows<int8_t>(labels, ignored, height, width, begin, end, to);
    case LabelType::kI16:
      return share_rows<int16_t>(labels, ignored, height, width, begin, end, to);
    case LabelType::kI32:
      return share_rows<int32_t>(labels, ignored, height, width, begin, end, to);
    case LabelType::kI64:
      return share_rows<int64_t>(labels, ignored, height, width, begin, end, to);
  }
}

}  // namespace

Tensor labelled_cpu(const Tensor& target, int64_t ignore_index, int64_t height, int64_t width, bool wide) {
  const LabelType type = label_type("target", target);
  if (target.dim() != 3) fail("target: expected shape (N, H, W), got " + shape(target.sizes()));
  const Labels labels = {
      target.const_data_ptr(), {target.stride(0), target.stride(1), target.stride(2)}, target.size(1), target.size(2)};
  if (height < 0 || width < 0 || (labels.height == 0 && height > 0) || (labels.width == 0 && width > 0))
    fail("target: " + shape(target.sizes()) + " has no cells of " + shape(std::vector<int64_t>{height, width}));
  const Tensor share = fresh({target.size(0), height, width}, wide ? ScalarType::Double : ScalarType::Float);
  const int64_t rows = target.size(0) * height;
  if (rows == 0 || width == 0) return share;
  const int64_t row_labels = std::max<int64_t>(1, target.numel() / rows);
  const int64_t chunk = std::max<int64_t>(1, kLabelsOfTask / row_labels);
  void* to = share.mutable_data_ptr();
  for_chunks(rows, chunk, target.numel() < kSerialLogits, [&](int64_t, int64_t begin, int64_t end) {
    if (wide)
      share_of(type, labels, ignore_index, height, width, begin, end, static_cast<double*>(to));
    else
      share_of(type, labels, ignore_index, height, width, begin, end, static_cast<float*>(to));
  });
  return share;
}

}  // namespace dsct
