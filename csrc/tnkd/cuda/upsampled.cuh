// tnkd_upsampled_kernel: loss and gradient of logits that are smaller than the labels; nothing of the labels' size.
//
// A lane is a column of labels and walks down a strip of rows. Of each network it holds, for every class of its, the
// two rows of logits that the label row lies between, interpolated along the row: a logit is two multiply-adds away.
// The gradient goes the same way back, into two rows; when a row of the student's has seen all its label rows, it goes
// through shared memory to the student's columns, and into a slab of the tile's own. add_slabs then adds up the slabs
// that share a number. Every sum has a fixed order: rows, then columns, then tiles.
#pragma once

#include "kernel.cuh"

#ifndef DSCT_KNOWN_CALL  // as DSCT_KNOWN
#define DSCT_KNOWN_CALL(in, terms, groups)
#define DSCT_KNOWN_LABEL(y)
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
  // Even inputs wait in slot 0, odd ones in slot 1; one alone in both.
  DSCT_DEVICE int input(int slot) const { return low % 2 == slot ? low : last; }
  DSCT_DEVICE float weight(int slot) const { return low % 2 == slot ? first() : second(); }
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

// One network's logits, or their gradient: without gaps, (N, K, h, w), or, with classes `last`, (N, h, w, K).
struct SmallMap {
  unsigned char* data;
  FloatType type;
  bool last;
  Axis y, x;
  int64_t image, row, column;  // bytes from one to the next
  unsigned step;               // and from class to class
};

// Four classes of a column.
struct alignas(16) Four {
  float lane[4];
};

// A call. Tiles of `rows` x `columns` labels, the last of a row or column of tiles perhaps smaller.
struct Upsampled : Call {
  SmallMap student, teacher, grad;
  Four* slabs;  // [tile][row][four classes of a group][column], a tile's gradient; nullptr: none is asked for
  int images, height, width;  // of the labels
  int rows, columns, tiles_x, tiles_y;
  unsigned tiles;
  int slab_rows, slab_columns;  // the most that a tile reaches
  int groups, fours;            // of threads that share classes; and of classes, in a group

  DSCT_HOST_DEVICE int64_t slab_row() const { return static_cast<int64_t>(groups) * fours * slab_columns; }
  DSCT_DEVICE Four* slab(int64_t tile, int row) const { return slabs + (tile * slab_rows + row) * slab_row(); }
  DSCT_HOST_DEVICE int first_class(int group) const { return classes * group / groups; }
};

// Of a class, both networks' two rows, interpolated to a lane's column. They wait in shared memory, each lane's its
// own: registers are for the gradient.
struct alignas(16) Held {
  float row[2][2];  // [slot][student, teacher]
};
// What both networks' taps are at a row or a column of labels.
struct Taps {
  Tap student, teacher;

  DSCT_DEVICE void mix(const Held& held, float& zs, float& zt) const {
    zs = fmaf(held.row[1][0], student.weight(1), held.row[0][0] * student.weight(0));
    zt = fmaf(held.row[1][1], teacher.weight(1), held.row[0][1] * teacher.weight(0));
  }
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
  Held* held;            // of a thread's classes, an odd number of places a thread: no bank conflicts
  Held* zeros;           // what an ignored pixel reads
  Taps *rows, *columns;  // of the tile; before its first row, no row; behind its last, where its gradient ends
  Tile* tile;
  int* begins;      // [c + 1]: the first column whose first tap is the tile's c-th of the student's, or a later one
  Four* grad;       // [group][four classes][column], a row of the gradient at the labels' width
  float* exchange;  // of groups that share classes: [kParts][group][column], [kVerdicts][column], [2][column]

  // Eight neighbours, or eight that are 2, 4 or 8 apart, meet no bank twice.
  static DSCT_HOST_DEVICE unsigned place(unsigned column) { return column + column / 8; }

  DSCT_HOST_DEVICE Shared(const Upsampled& in, unsigned char* shared, int threads, int held_classes) {
    zeros = reinterpret_cast<Held*>(shared + kHeadBytes), held = zeros + held_classes;
    rows = reinterpret_cast<Taps*>(held + (held_classes | 1) * threads) + 1, columns = rows + in.rows + 1;
    tile = reinterpret_cast<Tile*>(columns + in.columns);
    grad = reinterpret_cast<Four*>(tile + 1);
    exchange = reinterpret_cast<float*>(grad + in.groups * in.fours * place(in.columns));
    begins = reinterpret_cast<int*>(exchange + (in.groups == 1 ? 0 : kParts * in.groups + kVerdicts + 2) * in.columns);
  }
  DSCT_HOST_DEVICE unsigned char* end(const Upsampled& in) const {
    return reinterpret_cast<unsigned char*>(begins + in.slab_columns + 2);
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

// A row of a network, interpolated to a lane's column, for each class of the thread; the loads of four are under way
// together.
template <typename E>
DSCT_DEVICE void load_row(const SmallMap& net, const Tap& column, const unsigned char* row, int classes, Held* held,
                          int slot, int network) {
  const unsigned char *one = row + column.low * net.column, *two = row + column.last * net.column;
  const float near = column.first(), far = column.second();
  float* to = held->row[slot] + network;
  auto load = [&](auto count) {
    constexpr int kCount = decltype(count)::value;
    float a[kCount], b[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      a[i] = static_cast<float>(load_pack_cached<E, 1>(reinterpret_cast<const E*>(one)).lane[0]), one += net.step;
      b[i] = static_cast<float>(load_pack_cached<E, 1>(reinterpret_cast<const E*>(two)).lane[0]), two += net.step;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i * (sizeof(Held) / sizeof(float))] = fmaf(b[i], far, a[i] * near);
    to += kCount * (sizeof(Held) / sizeof(float));
  };
#pragma unroll 1
  for (int i = 4; i <= classes; i += 4) load(std::integral_constant<int, 4>{});
#pragma unroll 1
  for (int i = classes % 4; i > 0; --i) load(std::integral_constant<int, 1>{});
}

// What a lane holds of a network goes from one label row's taps to another's.
template <int kNet>
DSCT_DEVICE void move_to(const SmallMap& net, const Tap& column, int64_t image, const Tap& before, const Tap& tap,
                         int first, int classes, Held* held) {
  if (before.low == tap.low && before.last == tap.last) return;
#pragma unroll 1
  for (int slot = 0; slot < 2; ++slot) {
    if (before.input(slot) == tap.input(slot)) continue;
    const unsigned char* row =
        net.data + image * net.image + tap.input(slot) * net.row + first * static_cast<int64_t>(net.step);
    if (net.type == FloatType::kF32) load_row<float>(net, column, row, classes, held, slot, kNet);
    if (net.type == FloatType::kBF16) load_row<BFloat16>(net, column, row, classes, held, slot, kNet);
    if (net.type == FloatType::kF16) load_row<Half>(net, column, row, classes, held, slot, kNet);
  }
}

// The row above, of which all is there, goes into shared memory; the one below takes its place.
template <int kClasses>
DSCT_DEVICE void leave_row(const Upsampled& in, const Shared& shared, int group, int column, float (&above)[kClasses],
                           float (&below)[kClasses]) {
  constexpr int kFours = (kClasses + 3) / 4;
#pragma unroll
  for (int i = 0; i < kClasses; i += 4) {
    Four four{};
#pragma unroll
    for (int v = 0; v < 4 && i + v < kClasses; ++v) {
      four.lane[v] = above[i + v], above[i + v] = below[i + v], below[i + v] = 0;
    }
    shared.grad[(group * kFours + i / 4) * Shared::place(in.columns) + Shared::place(column)] = four;
  }
}

// One row of the student's gradient: from the columns of labels to those of the student.
DSCT_DEVICE void narrow_row(const Upsampled& in, const Shared& shared, Four* slab) {
  const unsigned columns = shared.tile->columns;
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < in.groups * in.fours * columns; i += blockDim.x) {
    const unsigned run = i / columns, c = i % columns;
    const Four* from = shared.grad + run * Shared::place(in.columns);
    Four sum{};
    auto add = [&](const float* weights, unsigned begin, unsigned end) {
#pragma unroll 1
      for (unsigned x = begin; x < end; ++x) {
        const float weight = weights[x * (sizeof(Taps) / sizeof(float))];
        const Four four = from[Shared::place(x)];
#pragma unroll
        for (int v = 0; v < 4; ++v) sum.lane[v] = fmaf(four.lane[v], weight, sum.lane[v]);
      }
    };
    add(&shared.columns->student.far, shared.begins[c], shared.begins[c + 1]);
    add(&shared.columns->student.near, shared.begins[c + 1], shared.begins[c + 2]);
    slab[run * in.slab_columns + c] = sum;
  }
}

// Blocks of a multiprocessor that registers have to be left for. sm_120 has shared memory for one or two.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kWholeBlocks = 3;
#else
constexpr int kWholeBlocks = 4;
#endif

// A thread holds the classes of a column, both networks': all of them, or (kSplit) its group's; groups of `columns`
// threads then meet twice a row, as the warps of tnkd_kernel do.
template <int kClasses, bool kSplit>
__global__ void __launch_bounds__(kSplit ? kMostWarps * kWarp : kWholeThreads, kSplit ? 1 : kWholeBlocks)
    tnkd_upsampled_kernel(Upsampled in) {
  DSCT_SHARED(memory);
  wait_for_previous();
  const Head& head = set_up(memory, in);
  const Shared shared(in, memory, blockDim.x, kClasses);
  Terms terms = head.terms;
  int groups = kSplit ? in.groups : 1;
  DSCT_KNOWN_CALL(in, terms, groups)
  const int group = kSplit ? threadIdx.x / in.columns : 0, column = kSplit ? threadIdx.x % in.columns : threadIdx.x;
  const int first = in.first_class(group), classes = in.first_class(group + 1) - first;
  const float absent = -infinity<float>();
  Held* held = shared.held + threadIdx.x * (kClasses | 1);
  for (int i = classes; i < kClasses; ++i) held[i] = {{{absent, absent}, {absent, absent}}};
  for (int i = threadIdx.x; i < kClasses; i += blockDim.x) shared.zeros[i] = {};
  float* parts = shared.exchange + column;
  float *verdicts = parts + kParts * groups * in.columns, *targets = verdicts + kVerdicts * in.columns;

  PixelLoss total{};
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
        leave_row(in, shared, group, column, above, below);
        __syncthreads();
        narrow_row(in, shared, in.slab(t, row - tile.first_row));
        __syncthreads();
      }
      if (r == tile.height) break;
      int label[1];
      const bool inside = column < tile.width;
      load_codes<kSplit>(in.work.codes, tile.first_pixel + static_cast<int64_t>(r) * in.width + (inside ? column : 0),
                         inside, label);
      const int y = label[0];
      const Taps taps = shared.rows[r];
      DSCT_KNOWN_LABEL(y)
      const Taps &before = shared.rows[r - 1], &at = shared.columns[column];
      move_to<0>(in.student, at.student, tile.image, before.student, taps.student, first, classes, held);
      move_to<1>(in.teacher, at.teacher, tile.image, before.teacher, taps.teacher, first, classes, held);
      // The target is absent from the sums over the others.
      float es[kClasses], et[kClasses], target_s = 0, target_t = 0;
      const Held* from = y == kIgnored ? shared.zeros : held;  // whatever stands there
      Held *const target = held + (y - first), kept = {};
      const bool mine = static_cast<unsigned>(y - first) < static_cast<unsigned>(classes);
      if (mine) kept = *target, *target = {{{absent, absent}, {absent, absent}}};
#pragma unroll
      for (int i = 0; i < kClasses; ++i) taps.mix(from[i], es[i], et[i]);
      if (mine) taps.mix(kept, target_s, target_t), *target = kept;
      float max_s, max_t, up_s = 1, up_t = 1;
      PixelSums z = sum_exponentials(es, et, terms, max_s, max_t);
      PixelGrad grad;
      auto judge = [&](PixelSums sums) {
        PixelLoss loss;
        judge_pixel(sums, y, judged_by(head, terms), in.class_weight, head.kd, head.ce, loss, grad);
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
        grad = take_verdict([&](int i) { return verdicts[i * in.columns]; }, max_s, max_t, terms, z, up_s, up_t);
      }
      differentiate(es, et, terms, grad, up_s, up_t, z.ce_base, [&](int i) {
        float zs, zt;
        taps.mix(from[i], zs, zt);
        return zs;
      });
#pragma unroll
      for (int i = 0; i < kClasses; ++i) {
        const float g = i == y - first ? grad.target : es[i];
        above[i] = fmaf(g, taps.student.near, above[i]), below[i] = fmaf(g, taps.student.far, below[i]);
      }
    }
  }
  finish_block(total, head, in);
}

// encode_labels where there are no labels: the upsampled teacher's argmax, the smallest class of a tie.
__global__ void __launch_bounds__(kCountThreads) label_by_teacher(Upsampled in, bool wide) {
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
      auto number = [&](const unsigned char* at) { return load_number(at, in.teacher.type, 0); };
      const float above = fmaf(number(upper + last), x.second(), number(upper + low) * x.first());
      const float below = fmaf(number(lower + last), x.second(), number(lower + low) * x.first());
      const float z = fmaf(below, y.second(), above * y.first());
      if (z > most) most = z, label = k;
    }
    sums[0] += 1;
    if (in.class_weight != nullptr) sums[1] += in.class_weight[label];
    wide ? static_cast<short*>(in.work.codes)[p] = label : static_cast<signed char*>(in.work.codes)[p] = label;
  }
  finish_count(sums, in, shared);
}

// The tiles [begin, end) of one dimension, of `size` labels each, that reach input i.
DSCT_DEVICE void tiles_at(const Axis& axis, int i, int size, int& begin, int& end) {
  const int tiles = (axis.outputs + size - 1) / size;
  auto first = [&](int tile) { return tap_of(axis, tile * size).low; };
  auto last = [&](int tile) { return tap_of(axis, std::min((tile + 1) * size, axis.outputs) - 1).last; };
  // Not before the outputs that look at i - 1, of which it may have the second tap.
  begin = axis.step > 0 ? static_cast<int>(fmax((i - 1) / axis.step - 2, 0.0)) / size : 0;
  while (begin < tiles - 1 && last(begin) < i) ++begin;
  end = begin;
  while (end < tiles && first(end) <= i) ++end;
}

// The gradient: what the tiles have of it, from top to bottom and from left to right. A block: one row of four classes.
constexpr int kSlabThreads = 128;
__global__ void __launch_bounds__(kSlabThreads, 1) add_slabs(Upsampled in) {
  const int fours = in.groups * in.fours, height = in.grad.y.inputs;
  const int run = blockIdx.x % fours, group = run / in.fours, row = blockIdx.x / fours % height;
  const int64_t image = blockIdx.x / fours / height;
  const int first = in.first_class(group) + run % in.fours * 4, classes = in.first_class(group + 1) - first;
  int y_begin, y_end, x_begin, x_end;
  tiles_at(in.grad.y, row, in.rows, y_begin, y_end);
  for (int column = threadIdx.x; column < in.grad.x.inputs; column += blockDim.x) {
    tiles_at(in.grad.x, column, in.columns, x_begin, x_end);
    Four sum{};
    for (int ty = y_begin; ty < y_end; ++ty) {
      for (int tx = x_begin; tx < x_end; ++tx) {
        const Four* slab =
            in.slab((image * in.tiles_y + ty) * in.tiles_x + tx, row - tap_of(in.grad.y, ty * in.rows).low);
        const Four part = slab[run * in.slab_columns + column - tap_of(in.grad.x, tx * in.columns).low];
#pragma unroll
        for (int v = 0; v < 4; ++v) sum.lane[v] += part.lane[v];
      }
    }
    unsigned char* to = in.grad.data + image * in.grad.image + row * in.grad.row + column * in.grad.column;
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const int64_t klass = (first + v) * static_cast<int64_t>(in.grad.step);
      if (v < classes) store_number(to + klass, in.grad.type, 0, sum.lane[v]);
    }
  }
}

}  // namespace dsct::cuda
