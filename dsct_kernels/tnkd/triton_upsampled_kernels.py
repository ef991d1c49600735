"""TNKD of logits smaller than the labels, in Triton: the kernels that triton_upsampled.py launches.

A cell is a logit of the smaller map; an interval lies between two cells, and the pixels within it are interpolated from
these two. A program takes some of the student's intervals along a row, a lane one pixel of theirs, and walks down the
label rows of a strip of intervals. Of each class it holds, interpolated along the row, what stands above a label row
and what is to be added towards below: a logit is one multiply-add. The gradient of a pixel is added to two sums in the
same way, which cross to the cells when the walk leaves an interval: the sums over each interval's pixels, weighted for
its left and its right cell, go to the slab, and are added up by the second kernel, in a fixed order.
V is the `Variant` of triton.py, M the `March` of triton_upsampled.py; a network's logits come as its `Cells`.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from ..triton_math import LOW
from .triton_kernels import (
    counted,
    factors,
    finish_kernel,
    gradient,
    ignored,
    judged,
    labels,
    late,
    likeliest,
    numbers_of,
    store_sums,
    totals,
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
def _steps(inputs, outputs, ALIGN: tl.constexpr):
    """Cells from one output to the next, and how many outputs a cell has."""
    inputs = tl.cast(inputs, tl.float64)
    outputs = tl.cast(outputs, tl.float64)
    if ALIGN:
        inputs -= 1.0
        outputs -= 1.0
        return tl.where(outputs > 0, inputs / tl.maximum(outputs, 1.0), 0.0), outputs / tl.maximum(inputs, 1.0)
    return inputs / outputs, outputs / inputs


@triton.jit
def _columns(across, slot, parts, cells, outputs, step, over_step, never, M: tl.constexpr):
    """The pixels of intervals across: which, whether there is one, the cell it looks at, the weights of that and of the
    next, and those of the interval's left and right cells."""
    interval = across // parts
    x = _first(interval, cells, outputs, step, over_step, never, M.align) + across % parts * M.slots + slot
    beyond = x >= outputs  # the last interval is a short one; what lies before the first cell goes with it
    x = tl.where(beyond, x - outputs, x)
    lies, cell, near, far = _taps(x, cells, step, never, M.align)
    inside = tl.where(beyond, (lies < 0) & (interval == cells - 1), lies == interval)
    return x, inside, cell, near, far, tl.where(beyond, 0.0, near), tl.where(beyond, near, far)


@triton.jit
def _strides(x, V: tl.constexpr):
    """How far apart the cells of a row are, rows, classes, and samples."""
    if V.last:
        return V.num_classes, x.width * V.num_classes, 1, tl.cast(x.height * x.width, tl.int64) * V.num_classes
    return 1, x.width, x.height * x.width, tl.cast(x.height * x.width, tl.int64) * V.num_classes


@triton.jit
def _row(x, at, near, far, k, V: tl.constexpr):
    """The pixels' logits on a row of cells. What has no weight is not looked at."""
    next_cell, _, next_class, _ = _strides(x, V)
    tiles = ()
    for c in tl.static_range(tl.constexpr(V.chunks)):
        if (c + 1) * V.classes > V.num_classes:
            there = c * V.classes + k < V.num_classes
            left = tl.load(at, mask=there, other=LOW).to(tl.float32)
            right = tl.load(at + next_cell, mask=there & (far > 0), other=0.0).to(tl.float32)
        else:
            left = tl.load(at).to(tl.float32)
            right = tl.load(at + next_cell, mask=(far > 0) & (k >= 0), other=0.0).to(tl.float32)
        tiles += (tl.fma(right, far, left * near),)
        at += V.classes * next_class
    return tiles


@triton.jit
def _below(low, far, rows):
    """The lower of the two rows of cells that a label row lies between; the upper where the lower has no weight."""
    return tl.where(far > 0, tl.minimum(low + 1, rows - 1), low)


@triton.jit
def _moved(held, rows, low, below, x, at, within, near, far, k, V: tl.constexpr):
    """Rows `low` and `below` of cells from those that are held: one is fetched, or both, or none."""
    upper, lower = held
    fetches = tl.where(rows[1] == low, 1, 2)
    fetches = tl.where((rows[0] == low) & (rows[1] == below), 0, fetches)
    for fetch in range(0, fetches):
        row = tl.where(fetch + 1 < fetches, low, below)
        upper = lower
        lower = _row(x, at + row * _strides(x, V)[1] + within, near, far, k, V)
    return upper, lower


@triton.jit
def _between(held, near, far, V: tl.constexpr):
    """The logits of a label row."""
    upper, lower = held
    near = tl.where(far > 0, near, 0.5)  # of the same row twice, so that nothing is multiplied by 0
    far = tl.where(far > 0, far, 0.5)
    tiles = ()
    for c in tl.static_range(tl.constexpr(V.chunks)):
        tiles += (tl.fma(lower[c], far, upper[c] * near),)
    return tiles


@triton.jit
def _nothing(V: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(tl.constexpr(V.chunks)):
        tiles += (tl.full([V.classes, V.pixels], 0.0, tl.float32),)
    return tiles


@triton.jit
def _added(above, below, near, far, k, y, by, e, V: tl.constexpr):
    """The sums for the rows of cells above and below, with the gradient of a label row; y: -2 where it is ignored."""
    up = ()
    down = ()
    for c in tl.static_range(tl.constexpr(V.chunks)):
        g = gradient(c, k, y, by, e, V)
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
def _to_slab(at, side, sums, to_left, to_right, slot, k, V: tl.constexpr, M: tl.constexpr):
    """The sums of a row of intervals for their left cells and, `side` further on, for their right ones."""
    for c in tl.static_range(tl.constexpr(V.chunks)):
        left = _over_interval(sums[c] * to_left, M.slots)
        right = _over_interval(sums[c] * to_right, M.slots)
        there = c * V.classes + k < V.num_classes
        if M.slots > 1:  # one store, of two of its pixels
            tl.store(at + slot * side, tl.where(slot == 0, left, right), mask=there & (slot < 2))
        else:
            tl.store(at, left, mask=there)
            tl.store(at + side, right, mask=there)
        at += V.classes * 2 * side


# What changes with the batch is not specialised: Triton would compile anew where it becomes 1 or a multiple of 16.
@triton.jit(do_not_specialize=["num_pixels", "num_counts", "items", "ignore", "never"])
def march_kernel(s, t, target, class_weight, counts, slab, own_counts, partial, num_pixels, num_counts, items, tiles,
                 strips, parts, height, width, numbers, ignore, never, V: tl.constexpr, M: tl.constexpr,
                 COUNTS: tl.constexpr):  # fmt: skip
    """Loss and gradient of a strip of M.rows intervals down, V.pixels // M.slots across; then of the next strip that is
    this program's. The slab: (N, strips, M.rows + 1, K, left and right, intervals across), in float32, or None."""
    FIRST: tl.constexpr = 0 if M.align else -1  # the interval
    numbers = numbers_of(numbers, V)
    if ignore is not None:
        ignore = ignored(ignore)
    tau = numbers[0]
    ce_factor = numbers[4]
    if counts is not None:  # of a mean, with class weights: what the second kernel divides by is the number of pixels
        count, total = totals(counts, num_counts, num_pixels, V, COUNTS)
        ce_factor = tl.where(total > 0, ce_factor * (count / total), 0.0)
    step_y, over_y = _steps(s.height, height, M.align)
    step_x, over_x = _steps(s.width, width, M.align)
    step_y_t, _over_y = _steps(t.height, height, M.align)
    step_x_t, _over_x = _steps(t.width, width, M.align)
    k = tl.arange(0, V.classes)[:, None]
    p = tl.arange(0, V.pixels)[None, :]
    slot = p % M.slots + k * 0
    side = tiles * (V.pixels // M.slots)
    ce_sum = tl.full([V.classes, V.pixels], 0.0, tl.float32)
    tckd_sum = ce_sum
    nckd_sum = ce_sum
    pixels = tl.full([V.classes, V.pixels], 0, tl.int32)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        tile = item % tiles
        strip = item // tiles % strips
        n = (item // tiles // strips).to(tl.int64)
        across = tile * (V.pixels // M.slots) + p // M.slots
        x, inside, cell, near_s, far_s, to_left, to_right = _columns(
            across, slot, parts, s.width, width, step_x, over_x, never, M
        )
        next_cell, _, next_class, next_sample = _strides(s, V)
        s_at = s.logits + n * next_sample
        s_in = cell * next_cell + k * next_class
        near_t = near_s
        far_t = far_s
        if not M.same:
            _beside, cell, near_t, far_t = _taps(x, t.width, step_x_t, never, M.align)
        next_cell, _, next_class, next_sample = _strides(t, V)
        t_at = t.logits + n * next_sample
        t_in = cell * next_cell + k * next_class
        slab_at = slab
        if slab is not None:
            slab_at = slab + ((n * strips + strip) * (M.rows + 1) * V.num_classes + k) * (2 * side) + across
        none = tl.full([], -1, tl.int32)
        s_rows = (none, none)
        t_rows = (none, none)
        above = _nothing(V)
        below = above
        s_held = (above, above)
        t_held = (above, above)
        first = strip * M.rows + FIRST
        end = _first(first, s.height, height, step_y, over_y, never, M.align)
        following = k + p
        y_at = target
        if target is not None:
            y_at = target + n * height * width
            following = tl.load(y_at + tl.minimum(end, height - 1) * width + x, mask=inside, other=0)
        for interval_row in range(first, first + M.rows + 1):  # and a row of cells more
            begin = end
            if interval_row < first + M.rows:
                end = _first(interval_row + 1, s.height, height, step_y, over_y, never, M.align)
            for row in range(begin, end):
                before, low, near, far = _taps(row, s.height, step_y, never, M.align)
                lower = _below(low, far, s.height)
                s_held = _moved(s_held, s_rows, low, lower, s, s_at, s_in, near_s, far_s, k, V)
                s_rows = (low, lower)
                t_low, t_near, t_far, t_lower = low, near, far, lower
                if not M.same:
                    _lies, t_low, t_near, t_far = _taps(row, t.height, step_y_t, never, M.align)
                    t_lower = _below(t_low, t_far, t.height)
                t_held = _moved(t_held, t_rows, t_low, t_lower, t, t_at, t_in, near_t, far_t, k, V)
                t_rows = (t_low, t_lower)
                s_tiles = _between(s_held, near, far, V)
                t_tiles = _between(t_held, t_near, t_far, V)
                if target is not None:  # fetched a row ahead
                    label = following
                    following = tl.load(y_at + tl.minimum(row + 1, height - 1) * width + x, mask=inside, other=0)
                else:
                    label = likeliest(t_tiles, k, V)
                y, valid, known, weight = labels(label, class_weight, inside, ignore, V)
                terms, by, e = judged(s_tiles, t_tiles, y, known, weight, k, numbers, ce_factor, 1.0, V)
                if slab is not None:
                    over = tl.where(before < 0, 0.0, near)
                    under = tl.where(before < 0, near, far)
                    above, below = _added(above, below, over, under, k, late(y, valid, tau), by, e, V)
                ce, tckd, nckd = counted(terms, valid, known, weight, tau, V)
                tckd_sum += tckd
                nckd_sum += nckd
                pixels += valid.to(tl.int32)
                if V.with_ce:
                    ce_sum += ce
            if slab is not None:
                _to_slab(slab_at, side, above, to_left, to_right, slot, k, V, M)
                slab_at += V.num_classes * 2 * side
                above = below
                below = _nothing(V)
    store_sums(partial, (ce_sum, tckd_sum, nckd_sum), k, V)
    tl.store(own_counts + tl.program_id(0), tl.sum(tl.where(k == 0, pixels, 0)).to(tl.float32))


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
def collect_kernel(slab, x, partial, largest_weight, counts, loss, parts_, grad_scale, num_programs, num_counts,
                   num_pixels, items, tiles, class_tiles, strips, parts, side, gathered, numbers, V: tl.constexpr,
                   M: tl.constexpr, CLASSES: tl.constexpr, COLUMNS: tl.constexpr, COUNTS: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    """The gradient, x, from the slab, divided, and, by the first program, the loss: what finish_kernel does."""
    FIRST: tl.constexpr = 0 if M.align else -1
    if slab is not None:
        _, factor, _ = factors(
            counts, largest_weight, num_counts, num_pixels, gathered, numbers_of(numbers, V), V, COUNTS
        )
        k = tl.arange(0, CLASSES)[:, None]
        c = tl.arange(0, COLUMNS)[None, :]
        next_cell, next_row, next_class, next_sample = _strides(x, V)
        for item in range(tl.program_id(0), items, tl.num_programs(0)):
            columns = item % tiles * COLUMNS + c
            classes = item // tiles % class_tiles * CLASSES + k
            row = item // tiles // class_tiles % x.height
            n = (item // tiles // class_tiles // x.height).to(tl.int64)
            there = (columns < x.width) & (classes < V.num_classes)
            strip = (row - FIRST) // M.rows
            down = (row - FIRST) % M.rows
            at = slab + ((n * strips + strip) * (M.rows + 1) * V.num_classes + classes) * (2 * side)
            total = _slab_row(at + down * (V.num_classes * 2) * side, side, columns, x.width, parts, there)
            if strip > 0 and down == 0:  # the strip above has something, too: its last row, right before this one
                total += _slab_row(at - V.num_classes * 2 * side, side, columns, x.width, parts, there)
            at = x.logits + n * next_sample + (row * next_row + classes * next_class + columns * next_cell)
            tl.store(at, (total * factor).to(x.logits.dtype.element_ty), mask=there)
    if tl.program_id(0) == 0:
        finish_kernel(partial, largest_weight, counts, loss, parts_, grad_scale, num_programs, num_counts, num_pixels,
                      gathered, numbers, V, COUNTS, BLOCK)  # fmt: skip
