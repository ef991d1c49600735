// tnkd_upsampled_kernel: loss and gradient of logits that are smaller than the labels; nothing of the labels' size.
//
// A lane is a column of labels and walks down a strip of rows. Of each network it holds, for every class of its, the
// two rows of logits that the label row lies between, interpolated along the row: a logit is two multiply-adds away.
// The gradient goes the same way back, into two rows; when a row of the student's has seen all its label rows, it goes
// through shared memory to the student's columns, and into a slab of the tile's own. add_slabs then adds up the slabs
// that share a number. Every sum has a fixed order: rows, then columns, then tiles.
#pragma once

#include "kernel.cuh"

#ifndef DSCT_KNOWN_ROW
#define DSCT_KNOWN_ROW(terms, y, groups, done)
#endif

namespace dsct::cuda {

// One dimension of a network and of the labels: where F.interpolate looks, as dsct_kernels/tnkd/upsample.py has it.
struct Axis {
  int inputs, outputs;
  double step;  // inputs an output
  bool align_corners;
};
struct Tap {
  int low, last;    // the two inputs; one and the same where the second has no weight
  float near, far;  // their weights

  // The same sum where there is but one: 0 times what has no weight could be NaN.
  DSCT_DEVICE float first() const { return last == low ? 0.5f : near; }
  DSCT_DEVICE float second() const { return last == low ? 0.5f : far; }
};
// Rounded as torch does, never fused: a place that is a whole number has one tap.
DSCT_DEVICE Tap tap_of(const Axis& axis, int i) {
#ifdef __CUDA_ARCH__
  const double middle = __dadd_rn(__dmul_rn(i + 0.5, axis.step), -0.5), corner = __dmul_rn(i, axis.step);
#else
  const double middle = (i + 0.5) * axis.step - 0.5, corner = i * axis.step;
#endif
  const double at = axis.align_corners ? corner : fmax(middle, 0.0);
  const int low = std::min(static_cast<int>(at), axis.inputs - 1);
  const double far = low + 1 < axis.inputs ? fmin(fmax(at - low, 0.0), 1.0) : 0;
  return {low, low + (far != 0), static_cast<float>(1 - far), static_cast<float>(far)};
}

// One network's logits, or their gradient; strides in bytes.
struct SmallMap {
  unsigned char* data;
  int64_t image, row, column;
  unsigned step;  // from class to class
  FloatType type;
  Axis y, x;
};

// A call. Tiles of `rows` x `columns` labels, the last of a row or column of tiles perhaps smaller.
struct Upsampled {
  SmallMap student, teacher, grad;
  const void* codes;  // of the labels: encode_labels'
  const float* class_weight;
  float* slabs;  // [tile][row][class][column], what a tile has of the gradient; nullptr: none is asked for
  int images, classes, height, width;
  int rows, columns, tiles_x, tiles_y;
  unsigned tiles;
  int slab_rows, slab_columns;  // the most that a tile reaches

  DSCT_HOST_DEVICE int64_t slab_floats() const {
    return static_cast<int64_t>(slab_rows) * classes * slab_columns;  // of a tile
  }
  DSCT_DEVICE float* slab(int64_t tile, int row) const {
    return slabs + tile * slab_floats() + static_cast<int64_t>(row) * classes * slab_columns;
  }
};

// Of a class, both networks' two rows, interpolated to a lane's column. They wait in shared memory, each lane's its
// own: registers are for the gradient.
struct alignas(16) Held {
  float upper[2], lower[2];  // student, teacher

  DSCT_DEVICE void mix(const Tap& student, const Tap& teacher, float& zs, float& zt) const {
    zs = fmaf(lower[0], student.second(), upper[0] * student.first());
    zt = fmaf(lower[1], teacher.second(), upper[1] * teacher.first());
  }
};

// What both networks' taps are at a row or a column of labels.
struct Taps {
  Tap student, teacher;
};

// A tile: where it lies among the labels, and in the student.
struct Tile {
  int64_t image, first_pixel;
  int y, x, height, width;
  int first_row, first_column, columns;  // of the student's that it reaches

  DSCT_DEVICE Tile(const Upsampled& in, int64_t tile) {
    const int per_image = in.tiles_x * in.tiles_y;
    image = tile / per_image;
    const int rest = static_cast<int>(tile - image * per_image);
    y = rest / in.tiles_x * in.rows, x = rest % in.tiles_x * in.columns;
    first_pixel = (image * in.height + y) * in.width + x;
    height = std::min(in.rows, in.height - y), width = std::min(in.columns, in.width - x);
    first_row = tap_of(in.student.y, y).low, first_column = tap_of(in.student.x, x).low;
    columns = tap_of(in.student.x, x + width - 1).last - first_column + 1;
  }
};

// A block's shared memory behind its head.
struct Shared {
  static constexpr int kRun = 4;  // classes that go together on the way to the slab

  Held *held, *zeros;    // of a thread's classes, an odd number of places a thread: no bank conflicts; what an ignored
                         // pixel reads
  Taps *rows, *columns;  // of the tile; before its first row, no row; behind its last, where its gradient ends
  Tile* tile;
  int* begins;      // [c + 1]: the first column whose first tap is the tile's c-th of the student's, or a later one
  float* grad;      // [class][column], `pitch` apart
  float* exchange;  // of groups that share classes: [kParts][group][column], [kVerdicts][column], [2][column]

  static DSCT_HOST_DEVICE int place(int column) { return column + column / kWarp; }  // every fourth in its own bank
  static DSCT_HOST_DEVICE int pitch(int columns) { return place(columns) + (columns < kWarp); }

  DSCT_HOST_DEVICE Shared(const Upsampled& in, unsigned char* shared, int threads, int held_classes) {
    zeros = reinterpret_cast<Held*>(shared + kHeadBytes), held = zeros + held_classes;
    rows = reinterpret_cast<Taps*>(held + (held_classes | 1) * threads) + 1, columns = rows + in.rows + 1;
    tile = reinterpret_cast<Tile*>(columns + in.columns);
    begins = reinterpret_cast<int*>(tile + 1);
    grad = reinterpret_cast<float*>(begins + in.slab_columns + 2);
    exchange = grad + (in.classes + kRun - 1) / kRun * kRun * pitch(in.columns);
  }
  // Where it ends.
  DSCT_HOST_DEVICE unsigned char* end(const Upsampled& in, int groups) const {
    const int numbers = groups == 1 ? 0 : (kParts * groups + kVerdicts + 2) * in.columns;
    return reinterpret_cast<unsigned char*>(exchange + numbers);
  }
  // All threads of the block; a barrier has to follow.
  DSCT_DEVICE void fill(const Upsampled& in) const {
    const Tile& t = *tile;
    for (int r = threadIdx.x; r < t.height; r += blockDim.x) {
      rows[r] = {tap_of(in.student.y, t.y + r), tap_of(in.teacher.y, t.y + r)};
    }
    if (threadIdx.x == 0) rows[-1].student = rows[-1].teacher = {-1, -1, 0, 0};
    if (threadIdx.x == 0) rows[t.height].student.low = tap_of(in.student.y, t.y + t.height - 1).last + 1;
    for (int c = threadIdx.x; c < in.columns; c += blockDim.x) {
      const int x = t.x + std::min(c, t.width - 1);  // where there is none, one that is
      columns[c] = {tap_of(in.student.x, x), tap_of(in.teacher.x, x)};
      if (c >= t.width) continue;
      const int at = columns[c].student.low - t.first_column;
      const int before = c == 0 ? -2 : tap_of(in.student.x, t.x + c - 1).low - t.first_column;
      for (int i = before + 1; i <= at; ++i) begins[i + 1] = c;
      for (int i = at + 1; c == t.width - 1 && i <= t.columns; ++i) begins[i + 1] = t.width;
    }
  }
};

// Row `row` of a network becomes the lower one that a lane holds of it, or both.
template <int kNet, typename E>
DSCT_DEVICE void load_row(const SmallMap& net, const Tap& column, int64_t image, int row, int first, int classes,
                          Held* held) {
  const unsigned char* base = net.data + image * net.image + row * net.row + first * static_cast<int64_t>(net.step);
  const unsigned char *one = base + column.low * net.column, *two = base + column.last * net.column;
  const float near = column.first(), far = column.second();
#pragma unroll 4
  for (int i = 0; i < classes; ++i, one += net.step, two += net.step) {
    const float z = static_cast<float>(*reinterpret_cast<const E*>(one)) * near;
    held[i].lower[kNet] = fmaf(static_cast<float>(*reinterpret_cast<const E*>(two)), far, z);
  }
}

// The two rows of a network that a lane holds go from those of one label row to those of another; one that is there
// already is not read again.
template <int kNet>
DSCT_DEVICE void move_to(const SmallMap& net, const Tap& column, int64_t image, const Tap& before, const Tap& tap,
                         int first, int classes, Held* held) {
  int row = before.low, next = before.last;
#pragma unroll 1
  while (row != tap.low || next != tap.last) {
    const int want = row == tap.low ? tap.last : tap.low;
    if (next != want) {
      next = want;
      if (net.type == FloatType::kF32) load_row<kNet, float>(net, column, image, next, first, classes, held);
      if (net.type == FloatType::kBF16) load_row<kNet, BFloat16>(net, column, image, next, first, classes, held);
      if (net.type == FloatType::kF16) load_row<kNet, Half>(net, column, image, next, first, classes, held);
    }
    if (row != tap.low) {
      row = tap.low;
#pragma unroll 4
      for (int i = 0; i < classes; ++i) held[i].upper[kNet] = held[i].lower[kNet];
    }
  }
}

// One row of the student's gradient: from the columns of labels to those of the student.
DSCT_DEVICE void narrow_row(const Upsampled& in, const Shared& shared, float* slab) {
  constexpr int kRun = Shared::kRun;
  const int columns = shared.tile->columns, runs = (in.classes + kRun - 1) / kRun, pitch = Shared::pitch(in.columns);
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < static_cast<unsigned>(runs * columns); i += blockDim.x) {
    const int k = i / columns, c = i % columns;
    float sum[kRun] = {};
    auto add = [&](const float* weights, int begin, int end) {
#pragma unroll 1
      for (int x = begin; x < end; ++x) {
        const float weight = weights[x * (sizeof(Taps) / sizeof(float))];
        const float* from = shared.grad + k * pitch + Shared::place(x);
#pragma unroll
        for (int v = 0; v < kRun; ++v) sum[v] = fmaf(from[v * runs * pitch], weight, sum[v]);
      }
    };
    add(&shared.columns->student.far, shared.begins[c], shared.begins[c + 1]);
    add(&shared.columns->student.near, shared.begins[c + 1], shared.begins[c + 2]);
#pragma unroll
    for (int v = 0; v < kRun; ++v) {
      if (k + v * runs < in.classes) slab[(k + v * runs) * in.slab_columns + c] = sum[v];
    }
  }
}

// A thread holds the classes of a column, both networks': all of them, or (kSplit) its group's; groups of `columns`
// threads then meet twice a row, as the warps of tnkd_kernel do.
template <int kClasses, bool kSplit>
__global__ void __launch_bounds__(kSplit ? kMostWarps * kWarp : kWholeThreads, kSplit ? 1 : 4)
    tnkd_upsampled_kernel(Upsampled in, Terms<float> given, Workspace work, Result<float> result) {
  DSCT_SHARED(memory);
  const Call& call = set_up(memory, given, work, result);
  const Shared shared(in, memory, blockDim.x, kClasses);
  Terms<float> terms = call.terms;
  int groups = kSplit ? blockDim.x / in.columns : 1;
  const int group = kSplit ? threadIdx.x / in.columns : 0, column = kSplit ? threadIdx.x % in.columns : threadIdx.x;
  const int first = in.classes * group / groups, classes = in.classes * (group + 1) / groups - first;
  const float absent = -infinity<float>();
  Held* held = shared.held + threadIdx.x * (kClasses | 1);
  for (int i = classes; i < kClasses; ++i) held[i] = {{absent, absent}, {absent, absent}};
  for (int i = threadIdx.x; i < kClasses; i += blockDim.x) shared.zeros[i] = {};
  float* parts = shared.exchange + column;
  float *verdicts = parts + kParts * groups * in.columns, *targets = verdicts + kVerdicts * in.columns;

  PixelLoss<float> total{};
  for (unsigned t = blockIdx.x; t < in.tiles; t += gridDim.x) {
    __syncthreads();  // the tile before may still be read
    const Tile& tile = *shared.tile;
    if (threadIdx.x == 0) *shared.tile = Tile(in, t);
    __syncthreads();
    shared.fill(in);
    __syncthreads();
    float above[kClasses] = {}, below[kClasses] = {};
#pragma unroll 1
    for (int r = 0;; ++r) {
      for (int row = std::max(shared.rows[r - 1].student.low, tile.first_row);
           in.slabs != nullptr && row < shared.rows[r].student.low; ++row) {
#pragma unroll
        for (int i = 0; i < kClasses; ++i) {
          if (i < classes) shared.grad[(first + i) * Shared::pitch(in.columns) + Shared::place(column)] = above[i];
          above[i] = below[i], below[i] = 0;
        }
        __syncthreads();
        narrow_row(in, shared, in.slab(t, row - tile.first_row));
        __syncthreads();
      }
      if (r == tile.height) break;
      int label[1];
      const bool inside = column < tile.width;
      load_codes<kSplit>(in.codes, tile.first_pixel + static_cast<int64_t>(r) * in.width + (inside ? column : 0),
                         inside, label);
      const int y = label[0];
      const Tap tap_s = shared.rows[r].student, tap_t = shared.rows[r].teacher;
      DSCT_KNOWN_ROW(terms, y, groups, tap_s)
      const Taps &before = shared.rows[r - 1], &at = shared.columns[column];
      move_to<0>(in.student, at.student, tile.image, before.student, tap_s, first, classes, held);
      move_to<1>(in.teacher, at.teacher, tile.image, before.teacher, tap_t, first, classes, held);
      // The target is absent from the sums over the others.
      float es[kClasses], et[kClasses], target_s = 0, target_t = 0;
      const Held* from = y == kIgnored ? shared.zeros : held;  // whatever stands there
      Held *const target = held + (y - first), kept;
      const bool mine = static_cast<unsigned>(y - first) < static_cast<unsigned>(classes);
      if (mine) kept = *target, *target = {{absent, absent}, {absent, absent}};
#pragma unroll
      for (int i = 0; i < kClasses; ++i) from[i].mix(tap_s, tap_t, es[i], et[i]);
      if (mine) kept.mix(tap_s, tap_t, target_s, target_t), *target = kept;
      float max_s, max_t, up_s = 1, up_t = 1;
      PixelSums<float> z = sum_exponentials(es, et, terms, max_s, max_t);
      PixelGrad<float> grad;
      auto judge = [&](PixelSums<float> sums) {
        PixelLoss<float> loss;
        judge_pixel(sums, y, judged_by(call, terms), in.class_weight, call.factors.kd, call.factors.ce, loss, grad);
        total.ce += loss.ce, total.tckd += loss.tckd, total.nckd += loss.nckd;
      };
      if constexpr (!kSplit) {
        z.student_target = target_s, z.teacher_target = target_t;
        judge(z);
      } else {
        const float left[kParts] = {max_s, max_t, z.student_sum, z.teacher_sum, z.cross, z.ce_sum};
#pragma unroll
        for (int i = 0; i < kParts; ++i) parts[(i * groups + group) * in.columns] = left[i];
        if (mine) targets[0] = target_s, targets[in.columns] = target_t;
        __syncthreads();
        if (group == r % groups) {  // each in its turn
          auto part = [&](int i, int g) { return parts[(i * groups + g) * in.columns]; };
          float all_s, all_t;
          z = join_warps(part, groups, terms, all_s, all_t);
          if (y >= 0) z.student_target = targets[0], z.teacher_target = targets[in.columns];
          judge(z);
          const float answer[kVerdicts] = {all_s, all_t, grad.student, grad.teacher, grad.ce, grad.target};
#pragma unroll
          for (int i = 0; i < kVerdicts; ++i) verdicts[i * in.columns] = answer[i];
        }
        __syncthreads();
        auto answer = [&](int i) { return verdicts[i * in.columns]; };
        const PixelSums<float> own = from_bases(max_s, max_t, terms);
        z = from_bases(answer(kAllS), answer(kAllT), terms);
        up_s = max_s == -infinity<float>() ? 0 : exp2_fast(own.student_base - z.student_base);
        up_t = max_t == -infinity<float>() ? 0 : exp2_fast(own.teacher_base - z.teacher_base);
        grad = {answer(kGradS), answer(kGradT), answer(kGradCe), answer(kGradTarget)};
      }
      PixelGrad<float> shared_grad = grad;
      if (terms.own_exponentials()) shared_grad.ce = 0;
      differentiate(es, et, terms, shared_grad, up_s, up_t);
      if (terms.own_exponentials()) {
#pragma unroll
        for (int i = 0; i < kClasses; ++i) {
          float zs, zt;
          from[i].mix(tap_s, tap_t, zs, zt);
          es[i] = fmaf(grad.ce, exp2_fast(fmaf(zs, kLog2E, -z.ce_base)), es[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kClasses; ++i) {
        const float g = i == y - first ? grad.target : es[i];
        above[i] = fmaf(g, tap_s.near, above[i]), below[i] = fmaf(g, tap_s.far, below[i]);
      }
    }
  }
  finish_block(total, call, work, result);
}

// encode_labels where there are no labels: the upsampled teacher's argmax, the smallest class of a tie.
__global__ void __launch_bounds__(kCountThreads) label_by_teacher(Upsampled in, bool wide, Workspace work) {
  DSCT_SHARED(shared);
  double sums[2] = {0, 0};
  const int64_t pixels = static_cast<int64_t>(in.images) * in.height * in.width;
  for (int64_t p = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; p < pixels;
       p += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t line = p / in.width, image = line / in.height;
    const Tap y = tap_of(in.teacher.y, static_cast<int>(line - image * in.height));
    const Tap x = tap_of(in.teacher.x, static_cast<int>(p - line * in.width));
    const unsigned char* base = in.teacher.data + image * in.teacher.image;
    const unsigned char *upper = base + y.low * in.teacher.row, *lower = base + y.last * in.teacher.row;
    const int64_t low = x.low * in.teacher.column, last = x.last * in.teacher.column;
    float most = -infinity<float>();
    int label = 0;
    for (int k = 0; k < in.classes; ++k, upper += in.teacher.step, lower += in.teacher.step) {
      auto number = [&](const unsigned char* at) { return load_number<float>(at, in.teacher.type, 0); };
      const float above = fmaf(number(upper + last), x.second(), number(upper + low) * x.first());
      const float below = fmaf(number(lower + last), x.second(), number(lower + low) * x.first());
      const float z = fmaf(below, y.second(), above * y.first());
      if (z > most) most = z, label = k;
    }
    sums[0] += 1;
    if (in.class_weight != nullptr) sums[1] += in.class_weight[label];
    wide ? static_cast<short*>(work.codes)[p] = label : static_cast<signed char*>(work.codes)[p] = label;
  }
  finish_count(sums, in.class_weight, in.classes, work, shared);
}

// The tiles [begin, end) of one dimension, of `size` labels each, that reach input i.
DSCT_DEVICE void tiles_at(const Axis& axis, int i, int size, int& begin, int& end) {
  const int tiles = (axis.outputs + size - 1) / size;
  auto first = [&](int tile) { return tap_of(axis, tile * size).low; };
  auto last = [&](int tile) { return tap_of(axis, std::min((tile + 1) * size, axis.outputs) - 1).last; };
  // Not before the outputs that look at i - 1, of which it may have the second tap.
  begin = axis.step > 0 ? static_cast<int>(fmax((i - 1) / axis.step - 2, 0.0)) / size : 0;
  while (begin < tiles - 1 && last(begin) < i) ++begin;
  end = begin + 1;
  while (end < tiles && first(end) <= i) ++end;
}

// A row of the gradient: what the tiles have of it, from top to bottom and from left to right. A thread: one column,
// kSlabClasses classes at a time.
constexpr int kSlabThreads = 128, kSlabClasses = 8, kSlabRun = 32;
__global__ void __launch_bounds__(kSlabThreads) add_slabs(Upsampled in) {
  const int height = in.grad.y.inputs, width = in.grad.x.inputs, runs = (in.classes + kSlabRun - 1) / kSlabRun;
  const int k_first = blockIdx.x % runs * kSlabRun, row = blockIdx.x / runs % height;
  const int64_t image = blockIdx.x / runs / height;
  int y_begin, y_end, x_begin, x_end;
  tiles_at(in.grad.y, row, in.rows, y_begin, y_end);
  for (int column = threadIdx.x; column < width; column += blockDim.x) {
    tiles_at(in.grad.x, column, in.columns, x_begin, x_end);
#pragma unroll 1
    for (int k = k_first; k < std::min(k_first + kSlabRun, in.classes); k += kSlabClasses) {
      float sum[kSlabClasses] = {};
      for (int ty = y_begin; ty < y_end; ++ty) {
        for (int tx = x_begin; tx < x_end; ++tx) {
          const int64_t tile = (image * in.tiles_y + ty) * in.tiles_x + tx;
          const float* from = in.slab(tile, row - tap_of(in.grad.y, ty * in.rows).low) + column -
                              tap_of(in.grad.x, tx * in.columns).low;
#pragma unroll
          for (int v = 0; v < kSlabClasses; ++v) {
            if (k + v < in.classes) sum[v] += from[static_cast<int64_t>(k + v) * in.slab_columns];
          }
        }
      }
      unsigned char* to = in.grad.data + image * in.grad.image + row * in.grad.row + column * in.grad.column;
#pragma unroll
      for (int v = 0; v < kSlabClasses; ++v) {
        if (k + v < in.classes)
          store_number(to + (k + v) * static_cast<int64_t>(in.grad.step), in.grad.type, 0, sum[v]);
      }
    }
  }
}

}  // namespace dsct::cuda
