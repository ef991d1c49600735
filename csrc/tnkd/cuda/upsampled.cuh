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
#define DSCT_KNOWN_CALL(class_weight, terms, groups)
#define DSCT_KNOWN_LABEL(y)
#define DSCT_KNOWN_TYPE(type)
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
  // Both inputs in a word.
  DSCT_DEVICE unsigned packed() const { return low * 2u + (last != low); }
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
  int64_t image;               // bytes from one to the next
  unsigned row, column, step;  // and from class to class
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
  unsigned slab_row;
  // Where a block's shared memory has what Shared names.
  unsigned columns_at, shares_at, begins_at, grad_at, exchange_at, held_at;

  DSCT_DEVICE Four* slab(int64_t tile, int row) const {
    return slabs + static_cast<uint64_t>(tile * slab_rows + row) * slab_row;
  }
  DSCT_HOST_DEVICE const SmallMap& net(int n) const { return n == 0 ? student : teacher; }
  DSCT_HOST_DEVICE int first_class(int group) const { return classes * group / groups; }
};

// Of a class, both networks' two rows, interpolated to a lane's column. They wait in shared memory, each lane's its
// own: registers are for the gradient.
struct alignas(8) Both {
  float student, teacher;
};
struct alignas(16) Held {
  Both row[2];  // by slot
};

// A row of labels: what leaves and comes in before it, and the weights of what is then held.
struct alignas(16) Row {
  float weight[2][2];     // [slot][student, teacher]
  unsigned taps[2];       // of student, teacher: packed
  float near;             // of the student's first tap, in the gradient
  unsigned short leaves;  // rows of the student's that have seen all their label rows
  unsigned short loads;   // rows of the networks, four bits for each: 1 + 2 slot + network

  DSCT_DEVICE void mix(const Held& held, float& zs, float& zt) const {
    zs = fmaf(held.row[1].student, weight[1][0], held.row[0].student * weight[0][0]);
    zt = fmaf(held.row[1].teacher, weight[1][1], held.row[0].teacher * weight[0][1]);
  }
};
// A column of labels, in one network.
struct alignas(8) Column {
  unsigned taps;
  float second;  // its weight
};

// What groups exchange of a column: six numbers apart, neighbours meet no bank twice.
struct alignas(8) Six {
  float lane[6];
};
static_assert(kParts == 6 && kVerdicts == 6);

// A tile: where it lies among the labels, in the networks, and which columns of the student's it reaches.
struct alignas(16) Tile {
  int64_t image[2], first_pixel;
  int y, x, height, width;
  int first_column, columns;
  unsigned items, inverse;  // of narrow_row, and 2^31 / columns

  DSCT_DEVICE Tile(const Upsampled& in, int64_t tile) {
    const int per_image = in.tiles_x * in.tiles_y, n = static_cast<int>(tile / per_image);
    const int rest = static_cast<int>(tile % per_image);
    for (int i = 0; i < 2; ++i) image[i] = n * in.net(i).image;
    y = rest / in.tiles_x * in.rows, x = rest % in.tiles_x * in.columns;
    first_pixel = (static_cast<int64_t>(n) * in.height + y) * in.width + x;
    height = std::min(in.rows, in.height - y), width = std::min(in.columns, in.width - x);
    first_column = tap_of(in.student.x, x).low;
    columns = tap_of(in.student.x, x + width - 1).last - first_column + 1;
    items = in.groups * in.fours * columns, inverse = (1u << 31) / columns + 1;
  }
};

// A block's shared memory behind its head.
struct Shared {
  Tile* tile;
  Held* zeros;       // what an ignored pixel reads
  Row* rows;         // of the tile; behind its last, where the gradient ends
  Column* columns;   // of the student, then of the teacher
  unsigned* begins;  // [c + 1]: the first column whose first tap is the tile's c-th of the student's, or a later one
  float* shares;     // of all columns that c has something of, for one c after the other
  Four* grad;        // [group][four classes][column], a row of the gradient at the labels' width
  Six* exchange;     // of groups that share classes: what each has of a column, [group][column]; the verdict on it; and
                     // its target's logits
  Held* held;        // of a thread's classes, an odd number of places a thread: no bank conflicts

  // Eight neighbours, or eight that are 2, 4 or 8 apart, meet no bank twice.
  static DSCT_HOST_DEVICE unsigned place(unsigned column) { return column + column / 8; }

  DSCT_DEVICE Shared(const Upsampled& in, unsigned char* shared, int classes) {
    tile = reinterpret_cast<Tile*>(shared + kHeadBytes), zeros = reinterpret_cast<Held*>(tile + 1);
    rows = reinterpret_cast<Row*>(zeros + classes);
    columns = reinterpret_cast<Column*>(shared + in.columns_at);
    shares = reinterpret_cast<float*>(shared + in.shares_at);
    begins = reinterpret_cast<unsigned*>(shared + in.begins_at);
    grad = reinterpret_cast<Four*>(shared + in.grad_at);
    exchange = reinterpret_cast<Six*>(shared + in.exchange_at);
    held = reinterpret_cast<Held*>(shared + in.held_at);
  }
  // Sets where all of it is; returns its end.
  static size_t lay_out(Upsampled& in, int classes) {
    size_t end = kHeadBytes + sizeof(Tile) + classes * sizeof(Held) + (in.rows + 1) * sizeof(Row);
    auto put = [&](unsigned& at, size_t size) { at = static_cast<unsigned>(end), end += (size + 15) / 16 * 16; };
    put(in.columns_at, 2 * in.columns * sizeof(Column));
    put(in.shares_at, in.columns * 2 * sizeof(float));
    put(in.begins_at, (in.slab_columns + 2) * sizeof(int));
    put(in.grad_at, in.groups * in.fours * place(in.columns) * sizeof(Four));
    put(in.held_at, (classes | 1) * in.groups * in.columns * sizeof(Held));
    put(in.exchange_at, in.groups == 1 ? 0 : (in.groups + 2) * in.columns * sizeof(Six));
    return end;
  }
  // All threads of the block; a barrier has to follow.
  DSCT_DEVICE void fill(const Upsampled& in) const {
    const Tile& t = *tile;
    for (int r = threadIdx.x; r <= t.height; r += blockDim.x) {
      Row& row = rows[r];
      unsigned leaves = 0, loads = 0;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const Tap tap = tap_of(in.net(n).y, t.y + std::min(r, t.height - 1));
        const Tap before = r == 0 ? Tap{-1, -1, 0, 0} : tap_of(in.net(n).y, t.y + r - 1);
#pragma unroll
        for (int slot = 0; slot < 2; ++slot) {
          row.weight[slot][n] = tap.weight(slot);
          if (before.input(slot) != tap.input(slot)) loads = loads << 4 | (1 + 2 * slot + n);
        }
        row.taps[n] = tap.packed();
        if (n == 1) continue;
        row.near = tap.near;
        if (r > 0 && in.slabs != nullptr) leaves = (r < t.height ? tap.low : tap.last + 1) - before.low;
      }
      row.leaves = leaves, row.loads = loads;
    }
    for (int c = threadIdx.x; c < in.columns; c += blockDim.x) {
      const int x = t.x + std::min(c, t.width - 1);  // where there is none, one that is
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const Tap tap = tap_of(in.net(n).x, x);
        columns[n * in.columns + c] = {tap.packed(), tap.second()};
      }
      if (c >= t.width) continue;
      const int at = static_cast<int>(columns[c].taps / 2) - t.first_column;
      const int before = c == 0 ? -2 : tap_of(in.student.x, x - 1).low - t.first_column;
      for (int i = before + 1; i <= at; ++i) begins[i + 1] = c;
      for (int i = at + 1; c == t.width - 1 && i <= t.columns; ++i) begins[i + 1] = t.width;
    }
    __syncthreads();
    for (int c = threadIdx.x; c < t.width; c += blockDim.x) {
      const Tap tap = tap_of(in.student.x, t.x + c);
      const unsigned* begin = begins + tap.low - t.first_column;
      shares[c + begin[1]] = tap.near, shares[c + begin[2]] = tap.far;
    }
  }
};

// A row of a network, interpolated to a lane's column, for each class of the thread, into every fourth of `to`; the
// loads of four are under way together.
template <typename E>
DSCT_DEVICE void load_row(const unsigned char* one, const Column column, unsigned pixel, unsigned step, int classes,
                          float* to) {
  const unsigned char* two = one + (column.taps % 2 == 0 ? 0 : pixel);
  const float first = 1 - column.second;
#pragma unroll 4
  for (int i = 0; i < classes; ++i, one += step, two += step, to += 4) {
    *to = fmaf(*reinterpret_cast<const E*>(two), column.second, *reinterpret_cast<const E*>(one) * first);
  }
}

// What comes in: a row of a network, into a slot of a thread's classes.
DSCT_DEVICE void take_row(const Upsampled& in, const Shared& shared, const Row& row, unsigned load, int lane,
                          unsigned first, int classes, Held* held) {
  const unsigned n = load % 2, slot = load / 2, low = row.taps[n] / 2, input = low + ((low ^ slot) & row.taps[n] & 1);
  const SmallMap& net = in.net(n);
  const Column& column = shared.columns[n * in.columns + lane];
  const unsigned char* from = net.data + shared.tile->image[n] + static_cast<uint64_t>(input) * net.row +
                              static_cast<uint64_t>(first) * net.step +
                              static_cast<uint64_t>(column.taps / 2) * net.column;
  float* to = &held->row[0].student + load;
  FloatType type = net.type;
  DSCT_KNOWN_TYPE(type)
  if (type == FloatType::kF32) return load_row<float>(from, column, net.column, net.step, classes, to);
  if (type == FloatType::kBF16) return load_row<BFloat16>(from, column, net.column, net.step, classes, to);
  load_row<Half>(from, column, net.column, net.step, classes, to);
}

// The row above, of which all is there, goes into shared memory; the one below takes its place.
template <int kClasses>
DSCT_DEVICE void leave_row(const Upsampled& in, Four* to, float (&above)[kClasses], float (&below)[kClasses]) {
#pragma unroll
  for (int i = 0; i < kClasses; i += 4, to += Shared::place(in.columns)) {
    Four four{};
#pragma unroll
    for (int v = 0; v < 4 && i + v < kClasses; ++v) {
      four.lane[v] = above[i + v], above[i + v] = below[i + v], below[i + v] = 0;
    }
    *to = four;
  }
}

// One row of the student's gradient: from the columns of labels to those of the student.
DSCT_DEVICE void narrow_row(const Upsampled& in, const Shared& shared, Four* slab) {
  const Tile& tile = *shared.tile;
  const unsigned pitch = Shared::place(in.columns);
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < tile.items; i += blockDim.x) {
    const unsigned run = static_cast<uint64_t>(i) * tile.inverse >> 31, c = i - run * tile.columns;  // i / columns
    const Four* from = shared.grad + run * pitch;
    unsigned x = shared.begins[c];
    const unsigned end = shared.begins[c + 2];
    const float* weight = shared.shares + x + shared.begins[c + 1];
    Four sum{};
#pragma unroll 1
    for (; x < end; ++x, ++weight) {
      const Four four = from[Shared::place(x)];
#pragma unroll
      for (int v = 0; v < 4; ++v) sum.lane[v] = fmaf(four.lane[v], *weight, sum.lane[v]);
    }
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
    tnkd_upsampled_kernel(const __grid_constant__ Upsampled in) {
  DSCT_SHARED(memory);
  wait_for_previous();
  const Head& head = set_up(memory, in);
  const Shared shared(in, memory, kClasses);
  Terms terms = head.terms;
  int groups = kSplit ? in.groups : 1;
  const float* class_weight = in.class_weight;
  DSCT_KNOWN_CALL(class_weight, terms, groups)
  const int group = kSplit ? threadIdx.x / in.columns : 0, column = kSplit ? threadIdx.x % in.columns : threadIdx.x;
  const int first = in.first_class(group), classes = in.first_class(group + 1) - first;
  const float absent = -infinity<float>();
  Held* held = shared.held + threadIdx.x * (kClasses | 1);
  for (int i = classes; i < kClasses; ++i) held[i] = {{{absent, absent}, {absent, absent}}};
  for (int i = threadIdx.x; i < kClasses; i += blockDim.x) shared.zeros[i] = {};
  Six *const parts = shared.exchange + column, *const verdict = parts + groups * in.columns;
  float* const targets = verdict[in.columns].lane;
  Four* leaving = shared.grad + group * ((kClasses + 3) / 4) * Shared::place(in.columns) + Shared::place(column);

  PixelLoss total{};
  for (unsigned t = blockIdx.x; t < in.tiles; t += gridDim.x) {
    __syncthreads();  // the tile before may still be read
    const Tile& tile = *shared.tile;
    if (threadIdx.x == 0) *shared.tile = Tile(in, t);
    __syncthreads();
    shared.fill(in);
    __syncthreads();
    float above[kClasses] = {}, below[kClasses] = {};
    int left = 0;  // rows of the student's that have
    const bool inside = column < tile.width;
    unsigned pixel = inside ? column : 0;  // of the tile's
#pragma unroll 1
    for (int r = 0;; ++r, pixel += in.width) {
      const Row& row = shared.rows[r];
#pragma unroll 1
      for (int i = row.leaves; i > 0; --i, ++left) {
        leave_row(in, leaving, above, below);
        __syncthreads();
        narrow_row(in, shared, in.slab(t, left));
        __syncthreads();
      }
      if (r == tile.height) break;
      int label[1];
      load_codes<kSplit>(in.work.codes, tile.first_pixel + pixel, inside, label);
      const int y = label[0];
      DSCT_KNOWN_LABEL(y)
#pragma unroll 1
      for (unsigned i = row.loads; i != 0; i >>= 4) {
        take_row(in, shared, row, i % 16 - 1, column, first, classes, held);
      }
      // The target is absent from the sums over the others: one of its two rows is.
      float es[kClasses], et[kClasses], target_s = 0, target_t = 0;
      const Held* from = y == kIgnored ? shared.zeros : held;  // whatever stands there
      const bool mine = static_cast<unsigned>(y - first) < static_cast<unsigned>(classes);
      Held& target = held[y - first];
      Both kept{};
      if (mine) {
        row.mix(target, target_s, target_t);
        kept = target.row[0], target.row[0] = {absent, absent};
      }
#pragma unroll
      for (int i = 0; i < kClasses; ++i) row.mix(from[i], es[i], et[i]);
      if (mine) target.row[0] = kept;
      float max_s, max_t, up_s = 1, up_t = 1;
      PixelSums z = sum_exponentials(es, et, terms, max_s, max_t);
      PixelGrad grad;
      auto judge = [&](PixelSums sums) {
        PixelLoss loss;
        judge_pixel(sums, y, judged_by(head, terms), class_weight, head.kd, head.ce, loss, grad);
        total.ce += loss.ce, total.tckd += loss.tckd, total.nckd += loss.nckd;
      };
      if constexpr (!kSplit) {
        z.student_target = target_s, z.teacher_target = target_t;
        judge(z);
      } else {
        parts[group * in.columns] = {{max_s, max_t, z.student_sum, z.teacher_sum, z.cross, z.ce_sum}};
        if (mine) targets[0] = target_s, targets[1] = target_t;
        __syncthreads();
        if (group == r % groups) {  // each in its turn
          auto part = [&](int i, int g) { return parts[g * in.columns].lane[i]; };
          float all_s, all_t;
          z = join_warps(part, groups, terms, all_s, all_t);
          if (y >= 0) z.student_target = targets[0], z.teacher_target = targets[1];
          judge(z);
          *verdict = {{all_s, all_t, grad.student, grad.teacher, grad.ce, grad.target}};
        }
        __syncthreads();
        grad = take_verdict([&](int i) { return verdict->lane[i]; }, max_s, max_t, terms, z, up_s, up_t);
      }
      differentiate(es, et, terms, grad, up_s, up_t, z.ce_base, [&](int i) {
        float zs, zt;
        row.mix(from[i], zs, zt);
        return zs;
      });
      const float near = row.near, far = 1 - near;
      const unsigned which = mine ? 1u << (y - first) : 0;
#pragma unroll
      for (int i = 0; i < kClasses; ++i) {
        const float g = which >> i & 1 ? grad.target : es[i];
        above[i] = fmaf(g, near, above[i]), below[i] = fmaf(g, far, below[i]);
      }
    }
  }
  finish_block(total, head, in);
}

// encode_labels where there are no labels: the upsampled teacher's argmax, the smallest class of a tie.
__global__ void __launch_bounds__(kCountThreads) label_by_teacher(Upsampled in, bool wide) {
  DSCT_SHARED(shared);
  double sums[2] = {0, 0};
  const SmallMap& net = in.teacher;
  const int64_t pixels = static_cast<int64_t>(in.images) * in.height * in.width;
  for (int64_t p = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; p < pixels;
       p += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t line = p / in.width, image = line / in.height;
    const Tap y = tap_of(net.y, static_cast<int>(line - image * in.height));
    const Tap x = tap_of(net.x, static_cast<int>(p - line * in.width));
    const unsigned char* from = net.data + image * net.image;
    float most = -infinity<float>();
    int label = 0;
    for (int k = 0; k < in.classes; ++k, from += net.step) {
      auto number = [&](int64_t i, int64_t j) { return load_number(from + i * net.row + j * net.column, net.type, 0); };
      auto along = [&](int i) { return fmaf(number(i, x.last), x.second(), number(i, x.low) * x.first()); };
      const float z = fmaf(along(y.last), y.second(), along(y.low) * y.first());
      if (z > most) most = z, label = k;
    }
    sums[0] += 1;
    if (in.class_weight != nullptr) sums[1] += in.class_weight[label];
    wide ? static_cast<short*>(in.work.codes)[p] = label : static_cast<signed char*>(in.work.codes)[p] = label;
  }
  finish_count(sums, in, shared);
}

// add(tile, i's place in it) for each tile of one dimension, of `size` labels, that reaches input i.
template <typename Add>
DSCT_DEVICE void for_tiles(const Axis& axis, int i, int size, const Add& add) {
  // Not before the outputs that look at i - 1, of which it may have the second tap.
  int tile = axis.step > 0 ? static_cast<int>(fmax((i - 1) / axis.step - 2, 0.0)) / size : 0;
  for (; tile * size < axis.outputs; ++tile) {
    const int first = tap_of(axis, tile * size).low;
    if (first > i) return;
    if (tap_of(axis, std::min((tile + 1) * size, axis.outputs) - 1).last >= i) add(tile, i - first);
  }
}

// The gradient: what the tiles have of it, from top to bottom and from left to right. A block: one row of four classes.
constexpr int kSlabThreads = 128;
__global__ void __launch_bounds__(kSlabThreads, 1) add_slabs(Upsampled in) {
  const int fours = in.groups * in.fours, height = in.grad.y.inputs;
  const int run = blockIdx.x % fours, group = run / in.fours, row = blockIdx.x / fours % height;
  const int64_t image = blockIdx.x / fours / height;
  const int first = in.first_class(group) + run % in.fours * 4, classes = in.first_class(group + 1) - first;
  for (int column = threadIdx.x; column < in.grad.x.inputs; column += blockDim.x) {
    Four sum{};
    for_tiles(in.grad.y, row, in.rows, [&](int ty, int r) {
      for_tiles(in.grad.x, column, in.columns, [&](int tx, int c) {
        const Four part = in.slab((image * in.tiles_y + ty) * in.tiles_x + tx, r)[run * in.slab_columns + c];
#pragma unroll
        for (int v = 0; v < 4; ++v) sum.lane[v] += part.lane[v];
      });
    });
    const SmallMap& grad = in.grad;
    unsigned char* to = grad.data + image * grad.image + int64_t{row} * grad.row + int64_t{column} * grad.column;
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      if (v < classes) store_number(to + int64_t{first + v} * grad.step, grad.type, 0, sum.lane[v]);
    }
  }
}

}  // namespace dsct::cuda
