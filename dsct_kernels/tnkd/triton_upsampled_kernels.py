"""TNKD of logits smaller than the labels, in Triton: the kernels that triton_upsampled.py launches.

A cell is a logit of the smaller map; an interval lies between two cells, and the pixels within it are interpolated from
these two. A program takes some of the student's intervals along a row, a lane one pixel of theirs, and walks down the
label rows of a strip of intervals. Of each class it holds, interpolated along the row, what stands above a label row
and what is to be added towards below: a logit is one multiply-add. The gradient of a pixel is added to two sums in the
same way, which cross to the cells when the walk leaves an interval: the sums over each interval's pixels, weighted for
its left and its right cell, go to the slab, and are added up by the second kernel, in a fixed order.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from .triton_kernels import (
    LOG2_E,
    _counted,
    _factors,
    _gradient,
    _ignored,
    _judged,
    _labels,
    _likeliest,
    _numbers,
    _store_sums,
    _totals,
    finish_kernel,
)


@triton.jit
def _taps(i, inputs, step, never, ALIGN: tl.constexpr):
    """Of output i the interval, which is -1 before the first cell, the cell it looks at, the weights of that and of the
    next, in float32. As dsct_kernels/tnkd/upsample.py has them, in float64. never: 0, but the compiler cannot know,
    and rounds the product before it goes on."""
    at = tl.cast(i, tl.float64)
    if not ALIGN:
        at += 0.5
    at *= step
    at = (at.to(tl.int64, bitcast=True) + never).to(tl.float64, bitcast=True)
    if not ALIGN:
        at -= 0.5
    from_first = tl.where(at < 0, 0.0, at)
    low = tl.minimum(from_first.to(tl.int32), inputs - 1)
    far = tl.where(low + 1 < inputs, from_first - low.to(tl.float64), 0.0)
    return tl.where(at < 0, -1, low), low, (1.0 - far).to(tl.float32), far.to(tl.float32)


@triton.jit
def _first(interval, inputs, outputs, step, over_step, never, ALIGN: tl.constexpr):
    """The first output that lies in this interval or behind it."""
    at = tl.cast(interval, tl.float64)
    if ALIGN:
        at *= over_step
    else:
        at = (at + 0.5) * over_step - 0.5
    i = tl.minimum(tl.maximum(at, 0.0).to(tl.int32), outputs)
    for _ in tl.static_range(2):
        there, _low, _near, _far = _taps(i, inputs, step, never, ALIGN)
        i += (there < interval).to(tl.int32)
    return tl.where(interval < inputs, tl.minimum(i, outputs), outputs)


@triton.jit
def _columns(across, slot, parts, cells, outputs, step, over_step, never, SLOTS: tl.constexpr, ALIGN: tl.constexpr):
    """The pixels of intervals across: which, whether there is one, the cell it looks at, the weights of that and of the
    next, and those of the interval's left and right cells."""
    interval = across // parts
    x = _first(interval, cells, outputs, step, over_step, never, ALIGN) + across % parts * SLOTS + slot
    beyond = x >= outputs  # the last interval is a short one; what lies before the first cell goes with it
    x = tl.where(beyond, x - outputs, x)
    lies, cell, near, far = _taps(x, cells, step, never, ALIGN)
    inside = tl.where(beyond, (lies < 0) & (interval == cells - 1), lies == interval)
    return x, inside, cell, near, far, tl.where(beyond, 0.0, near), tl.where(beyond, near, far)


@triton.jit
def _row(at, step, next_cell, near, far, k, NUM_CLASSES: tl.constexpr, CHUNKS: tl.constexpr, CLASSES: tl.constexpr):
    """The pixels' logits on a row of cells. What has no weight is not looked at."""
    tiles = ()
    for c in tl.static_range(CHUNKS):
        if (c + 1) * CLASSES > NUM_CLASSES:
            there = c * CLASSES + k < NUM_CLASSES
            left = tl.load(at, mask=there & (near > 0), other=float("-inf")).to(tl.float32)
            right = tl.load(at + next_cell, mask=there & (far > 0), other=0.0).to(tl.float32)
        else:
            left = tl.load(at).to(tl.float32)
            right = tl.load(at + next_cell, mask=(far > 0) & (k >= 0), other=0.0).to(tl.float32)
        tiles += (tl.fma(right, far, left * near),)
        at += step
    return tiles


@triton.jit
def _below(low, far, rows):
    """The lower of the two rows of cells that a label row lies between; the upper where the lower has no weight."""
    return tl.where(far > 0, tl.minimum(low + 1, rows - 1), low)


@triton.jit
def _moved(upper, lower, upper_row, lower_row, low, below, at, s_y, step, next_cell, near, far, k,
           NUM_CLASSES: tl.constexpr, CHUNKS: tl.constexpr, CLASSES: tl.constexpr):  # fmt: skip
    """Rows `low` and `below` of cells from those that are held: one is fetched, or both, or none."""
    fetches = tl.where(lower_row == low, 1, 2)
    fetches = tl.where((upper_row == low) & (lower_row == below), 0, fetches)
    for fetch in range(0, fetches):
        row = tl.where(fetch + 1 < fetches, low, below).to(tl.int64)
        upper = lower
        lower = _row(at + row * s_y, step, next_cell, near, far, k, NUM_CLASSES, CHUNKS, CLASSES)
    return upper, lower


@triton.jit
def _between(upper, lower, near, far, CHUNKS: tl.constexpr):
    """The logits of a label row."""
    near = tl.where(far > 0, near, 0.5)  # of the same row twice, so that nothing is multiplied by 0
    far = tl.where(far > 0, far, 0.5)
    tiles = ()
    for c in tl.static_range(CHUNKS):
        tiles += (tl.fma(lower[c], far, upper[c] * near),)
    return tiles


@triton.jit
def _nothing(like, CHUNKS: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(CHUNKS):
        tiles += (tl.zeros(like.shape, tl.float32),)
    return tiles


@triton.jit
def _added(above, below, near, far, k, y, by_s, e_s, by_t, e_t, by_1, e_1, at_y, CHUNKS: tl.constexpr,
           CLASSES: tl.constexpr, WITH_CE: tl.constexpr):  # fmt: skip
    """The sums for the rows of cells above and below, with the gradient of a label row; y: -2 where it is ignored."""
    up = ()
    down = ()
    for c in tl.static_range(CHUNKS):
        g = _gradient(c, k, y, by_s, e_s, by_t, e_t, by_1, e_1, at_y, CLASSES, WITH_CE)
        up += (tl.fma(g, near, above[c]),)
        down += (tl.fma(g, far, below[c]),)
    return up, down


@triton.jit
def _over_interval(x, SLOTS: tl.constexpr):
    """Added up over each interval's pixels, all of which then have the sum."""
    if SLOTS > 1:
        parted = tl.reshape(x, [x.shape[0], x.shape[1] // SLOTS, SLOTS])
        x = tl.reshape(tl.broadcast_to(tl.sum(parted, 2, keep_dims=True), parted.shape), x.shape)
    return x


@triton.jit
def _to_slab(at, side, sums, to_left, to_right, slot, k, NUM_CLASSES: tl.constexpr, CHUNKS: tl.constexpr,
             CLASSES: tl.constexpr, SLOTS: tl.constexpr):  # fmt: skip
    """The sums of a row of intervals for their left cells and, `side` further on, for their right ones."""
    for c in tl.static_range(CHUNKS):
        left = _over_interval(sums[c] * to_left, SLOTS)
        right = _over_interval(sums[c] * to_right, SLOTS)
        there = c * CLASSES + k < NUM_CLASSES
        if SLOTS > 1:  # one store, of two of its pixels
            tl.store(at + slot * side, tl.where(slot == 0, left, right), mask=there & (slot < 2))
        else:
            tl.store(at, left, mask=there)
            tl.store(at + side, right, mask=there)
        at += CLASSES * 2 * side


# What changes with the batch is not specialised: Triton would compile anew where it becomes 1 or a multiple of 16.
@triton.jit(do_not_specialize=["num_pixels", "num_counts", "items", "ignore", "never"])
def march_kernel(
    student, teacher, target, class_weight, counts, weights, slab, own_counts, partial,
    num_pixels, num_counts, items, tiles, strips, parts, height, width, h_s, w_s, h_t, w_t,
    s_n, s_k, s_y, s_x, t_n, t_k, t_y, t_x, y_n, y_y, y_x,
    step_y_s: tl.float64, over_y_s: tl.float64, step_x_s: tl.float64, over_x_s: tl.float64,
    step_y_t: tl.float64, step_x_t: tl.float64,
    tau_: tl.float64, over_tau_: tl.float64, tckd_weight_: tl.float64, nckd_weight_: tl.float64,
    ce_weight_: tl.float64, ignore, never, values, ignore_at,
    NUM_CLASSES: tl.constexpr, CHUNKS: tl.constexpr, PIXELS: tl.constexpr, CLASSES: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr, ALIGN: tl.constexpr, HAS_TARGET: tl.constexpr, HAS_IGNORE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_COUNT: tl.constexpr, WITH_CE: tl.constexpr, NEEDS_GRAD: tl.constexpr,
    COUPLED: tl.constexpr, SAME: tl.constexpr, COUNTS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of a strip of ROWS intervals down, PIXELS // SLOTS across; then of the next strip that is this
    program's. The slab: (N, strips, ROWS + 1, K, left and right, intervals across), in float32."""
    ACC: tl.constexpr = tl.float32
    FIRST: tl.constexpr = 0 if ALIGN else -1  # the interval
    tau_, over_tau_, tckd_weight_, nckd_weight_, ce_weight_ = _numbers(values, tau_, over_tau_, tckd_weight_,
                                                                       nckd_weight_, ce_weight_, WITH_CE)  # fmt: skip
    ignore = _ignored(ignore_at, ignore)
    tau = tl.full([], tau_, ACC)
    tckd_weight = tl.full([], tckd_weight_, ACC)
    nckd_weight = tl.full([], nckd_weight_, ACC)
    to_2 = tl.full([], LOG2_E, ACC)  # exp(x / tau) = exp2(x * to_2_tau)
    to_2_tau = tl.full([], over_tau_ * LOG2_E, ACC)  # from float64, rounded once
    ce_factor = tl.full([], ce_weight_, ACC)
    if HAS_COUNT:  # of a mean, with class weights: what the second kernel divides by is the number of pixels
        count, total = _totals(counts, weights, num_counts, num_pixels, HAS_COUNT, HAS_WEIGHT, COUNTS, ACC)
        ce_factor = tl.where(total > 0, ce_factor * (count / total), 0.0)
    k = tl.arange(0, CLASSES)[:, None]
    p = tl.arange(0, PIXELS)[None, :]
    slot = p % SLOTS + k * 0
    s_step = tl.full([], CLASSES, tl.int64) * s_k
    t_step = tl.full([], CLASSES, tl.int64) * t_k
    side = tiles * (PIXELS // SLOTS)
    ce_sum = tl.zeros([CLASSES, PIXELS], ACC)
    tckd_sum = tl.zeros([CLASSES, PIXELS], ACC)
    nckd_sum = tl.zeros([CLASSES, PIXELS], ACC)
    counted = tl.zeros([CLASSES, PIXELS], tl.int32)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        tile = item % tiles
        strip = item // tiles % strips
        n = (item // tiles // strips).to(tl.int64)
        across = tile * (PIXELS // SLOTS) + p // SLOTS
        x, inside, cell, near_s, far_s, to_left, to_right = _columns(
            across, slot, parts, w_s, width, step_x_s, over_x_s, never, SLOTS, ALIGN)  # fmt: skip
        s_at = student + n * s_n + (cell.to(tl.int64) * s_x + k.to(tl.int64) * s_k)
        near_t = near_s
        far_t = far_s
        if not SAME:
            _beside, cell, near_t, far_t = _taps(x, w_t, step_x_t, never, ALIGN)
        t_at = teacher + n * t_n + (cell.to(tl.int64) * t_x + k.to(tl.int64) * t_k)
        y_at = n * y_n + x.to(tl.int64) * y_x
        slab_at = slab + ((n * strips + strip) * (ROWS + 1) * NUM_CLASSES + k) * (2 * side) + across
        none = tl.full([], -1, tl.int32)
        s_up, s_down, t_up, t_down = none, none, none, none
        s_upper = _nothing(x, CHUNKS)
        s_lower = _nothing(x, CHUNKS)
        t_upper = _nothing(x, CHUNKS)
        t_lower = _nothing(x, CHUNKS)
        above = _nothing(x, CHUNKS)
        below = _nothing(x, CHUNKS)
        first = strip * ROWS + FIRST
        end = _first(first, h_s, height, step_y_s, over_y_s, never, ALIGN)
        following = k + p
        if HAS_TARGET:
            following = tl.load(target + y_at + tl.minimum(end, height - 1).to(tl.int64) * y_y, mask=inside, other=0)
        for interval_row in range(first, first + ROWS + 1):  # and a row of cells more
            begin = end
            if interval_row < first + ROWS:
                end = _first(interval_row + 1, h_s, height, step_y_s, over_y_s, never, ALIGN)
            for row in range(begin, end):
                before, low, near, far = _taps(row, h_s, step_y_s, never, ALIGN)
                down = _below(low, far, h_s)
                s_upper, s_lower = _moved(s_upper, s_lower, s_up, s_down, low, down, s_at, s_y, s_step, s_x, near_s,
                                          far_s, k, NUM_CLASSES, CHUNKS, CLASSES)  # fmt: skip
                if SAME:
                    t_up, t_down, t_low, t_near, t_far, t_below = s_up, s_down, low, near, far, down
                else:
                    _lies, t_low, t_near, t_far = _taps(row, h_t, step_y_t, never, ALIGN)
                    t_below = _below(t_low, t_far, h_t)
                t_upper, t_lower = _moved(t_upper, t_lower, t_up, t_down, t_low, t_below, t_at, t_y, t_step, t_x,
                                          near_t, far_t, k, NUM_CLASSES, CHUNKS, CLASSES)  # fmt: skip
                s_up, s_down, t_up, t_down = low, down, t_low, t_below
                s_tiles = _between(s_upper, s_lower, near, far, CHUNKS)
                t_tiles = _between(t_upper, t_lower, t_near, t_far, CHUNKS)
                if HAS_TARGET:  # fetched a row ahead
                    label = following
                    next_row = tl.minimum(row + 1, height - 1).to(tl.int64)
                    following = tl.load(target + y_at + next_row * y_y, mask=inside, other=0)
                else:
                    label = _likeliest(t_tiles, k, CHUNKS, CLASSES)
                y, valid, known, weight = _labels(label, class_weight, inside, NUM_CLASSES, ignore, HAS_IGNORE,
                                                  HAS_WEIGHT, ACC)  # fmt: skip
                ce, tckd, nckd, by_s, e_s, by_t, e_t, by_1, e_1, at_y = _judged(
                    s_tiles, t_tiles, y, known, weight, k, to_2, to_2_tau, tau, tckd_weight, nckd_weight, ce_factor,
                    1.0, NUM_CLASSES, CHUNKS, CLASSES, COUPLED, WITH_CE, FAST, True, ACC)  # fmt: skip
                if NEEDS_GRAD:
                    y_late = tl.where(valid, y, -2) + (tau < 0).to(tl.int32)  # as in tnkd_kernel
                    above, below = _added(
                        above, below, tl.where(before < 0, 0.0, near), tl.where(before < 0, near, far), k, y_late, by_s,
                        e_s, by_t, e_t, by_1, e_1, at_y, CHUNKS, CLASSES, WITH_CE)  # fmt: skip
                ce, tckd, nckd = _counted(ce, tckd, nckd, valid, known, weight, tau, WITH_CE)
                tckd_sum += tckd
                nckd_sum += nckd
                counted += valid.to(tl.int32)
                if WITH_CE:
                    ce_sum += ce
            if NEEDS_GRAD:
                _to_slab(slab_at, side, above, to_left, to_right, slot, k, NUM_CLASSES, CHUNKS, CLASSES, SLOTS)
                slab_at += NUM_CLASSES * 2 * side
                above = below
                below = _nothing(x, CHUNKS)
    _store_sums(partial, ce_sum, tckd_sum, nckd_sum, k, WITH_CE)
    tl.store(own_counts + tl.program_id(0), tl.sum(tl.where(k == 0, counted, 0).to(tl.int64)))


@triton.jit
def _slab_row(at, side, columns, cells, parts, there):
    """What a row of intervals has for these cells: of the intervals on their right and on their left, part by part."""
    total = tl.zeros(there.shape, tl.float32)
    on_left = tl.where(columns > 0, columns, cells) - 1
    for part in range(parts):
        total += tl.load(at + columns * parts + part, mask=there, other=0.0)
    for part in range(parts):
        total += tl.load(at + side + on_left * parts + part, mask=there, other=0.0)
    return total


@triton.jit(do_not_specialize=["num_pixels", "num_counts", "num_programs", "items"])
def collect_kernel(
    slab, grad, partial, largest_weight, counts, weights, loss, parts_, grad_scale,
    num_programs, num_counts, num_pixels, items, tiles, class_tiles, strips, parts, side, h_s, w_s,
    g_n, g_k, g_y, g_x, gathered, tau_: tl.float64, tckd_weight_: tl.float64, nckd_weight_: tl.float64,
    ce_weight_: tl.float64, values,
    NUM_CLASSES: tl.constexpr, CLASSES: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr,
    MEAN_: tl.constexpr, FLOAT16: tl.constexpr, HAS_COUNT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    WITH_CE: tl.constexpr, NEEDS_GRAD: tl.constexpr, COUNTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient from the slab, divided, and, by the first program, the loss: what finish_kernel does."""
    ACC: tl.constexpr = tl.float32
    FIRST: tl.constexpr = 0 if ALIGN else -1
    tau, _, tckd_weight, nckd_weight, ce_weight = _numbers(values, tau_, tau_, tckd_weight_, nckd_weight_, ce_weight_,
                                                           WITH_CE)  # fmt: skip
    if NEEDS_GRAD:
        _, factor, _ = _factors(counts, weights, largest_weight, num_counts, num_pixels, gathered,
                                tl.full([], tau, ACC), tl.full([], tckd_weight, ACC), tl.full([], nckd_weight, ACC),
                                ce_weight, MEAN_, FLOAT16, HAS_COUNT, HAS_WEIGHT, WITH_CE, COUNTS, ACC)  # fmt: skip
        k = tl.arange(0, CLASSES)[:, None]
        c = tl.arange(0, COLUMNS)[None, :]
        for item in range(tl.program_id(0), items, tl.num_programs(0)):
            columns = item % tiles * COLUMNS + c
            classes = item // tiles % class_tiles * CLASSES + k
            row = item // tiles // class_tiles % h_s
            n = (item // tiles // class_tiles // h_s).to(tl.int64)
            there = (columns < w_s) & (classes < NUM_CLASSES)
            strip = (row - FIRST) // ROWS
            down = (row - FIRST) % ROWS
            at = slab + ((n * strips + strip) * (ROWS + 1) * NUM_CLASSES + classes) * (2 * side)
            total = _slab_row(at + down * (NUM_CLASSES * 2) * side, side, columns, w_s, parts, there)
            if strip > 0 and down == 0:  # the strip above has something, too: its last row, right before this one
                total += _slab_row(at - NUM_CLASSES * 2 * side, side, columns, w_s, parts, there)
            g_at = grad + n * g_n + row.to(tl.int64) * g_y + classes.to(tl.int64) * g_k + columns.to(tl.int64) * g_x
            tl.store(g_at, (total * factor).to(grad.dtype.element_ty), mask=there)
    if tl.program_id(0) == 0:
        finish_kernel(partial, largest_weight, counts, weights, loss, parts_, grad_scale, num_programs, num_counts,
                      num_pixels, gathered, tau_, tckd_weight_, nckd_weight_, ce_weight_, values, False, MEAN_, FLOAT16,
                      HAS_COUNT, HAS_WEIGHT, WITH_CE, COUNTS, BLOCK, ACC)  # fmt: skip
