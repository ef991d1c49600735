"""TNKD of logits smaller than the labels, in Triton: the kernels that triton_upsampled.py launches.

A cell is a logit of the smaller map; an interval lies between two cells, and the pixels within it are interpolated from
these two. A program takes some of the student's intervals along a row, a lane one pixel of theirs, and walks down the
label rows of a strip of intervals. Of each class it holds, interpolated along the row, what stands above a label row
and what is to be added towards below: a logit is one multiply-add. The gradient of a pixel is added to two sums in the
same way, which cross to the cells when the walk leaves an interval: the sums over each interval's pixels, weighted for
its left and its right cell, go to the slab, and are added up by the second kernel, in a fixed order.
V and D are the `Variant` and the `Divisor` of triton.py, M the `March` of triton_upsampled.py; a network's logits come
as its `Cells`.
"""

# mypy: ignore-errors

from collections import namedtuple

import triton
import triton.language as tl

from ..triton_math import LOW
from . import triton_kernels as full

# A direction of the maps: cells, outputs, in float64 cells from one output to the next and outputs of a cell; and
# never: 0, but the compiler cannot know, and rounds a product before it goes on.
Axis = namedtuple("Axis", "inputs outputs step over never")
# Where the lanes find a network's logits: the sample, their cells and classes in a row, how far the cells on the right,
# the next row and the next chunk of classes are; the weights of the cells and of those on the right.
Lanes = namedtuple("Lanes", "sample within right down chunk near far")


@triton.jit
def axis_of(inputs, outputs, never, ALIGN: tl.constexpr):
    """`Axis`."""
    ENDS: tl.constexpr = 1.0 if ALIGN else 0.0  # are cells
    cells = tl.cast(inputs, tl.float64) - ENDS
    pixels = tl.cast(outputs, tl.float64) - ENDS
    step = tl.where(pixels > 0, cells / tl.maximum(pixels, 1.0), 0.0)
    return Axis(inputs, outputs, step, pixels / tl.maximum(cells, 1.0), never)


@triton.jit
def taps(i, axis, ALIGN: tl.constexpr):
    """Of output i the interval, which is -1 before the first cell, the cell it looks at, the weights of that and of the
    next, in float32. As dsct_kernels/tnkd/upsample.py has them, in float64."""
    HALF: tl.constexpr = 0.0 if ALIGN else 0.5
    at = (tl.cast(i, tl.float64) + HALF) * axis.step
    at = (at.to(tl.int64, bitcast=True) + axis.never).to(tl.float64, bitcast=True) - HALF
    from_first = tl.where(at < 0, 0.0, at)
    low = tl.minimum(from_first.to(tl.int32), axis.inputs - 1)
    far = tl.where(low + 1 < axis.inputs, from_first - low.to(tl.float64), 0.0)
    return tl.where(at < 0, -1, low), low, (1.0 - far).to(tl.float32), far.to(tl.float32)


@triton.jit
def first_of(interval, axis, ALIGN: tl.constexpr):
    """The first output that lies in this interval or behind it."""
    HALF: tl.constexpr = 0.0 if ALIGN else 0.5
    at = (tl.cast(interval, tl.float64) + HALF) * axis.over - HALF
    i = tl.minimum(tl.maximum(at, 0.0).to(tl.int32), axis.outputs)
    for _ in tl.static_range(2):
        there, _low, _near, _far = taps(i, axis, ALIGN)
        i += (there < interval).to(tl.int32)
    return tl.where(interval < axis.inputs, tl.minimum(i, axis.outputs), axis.outputs)


@triton.jit
def _sides(interval, near, far):
    """The weights of an interval's two cells: before the first cell the second is the one looked at."""
    return tl.where(interval < 0, 0.0, near), tl.where(interval < 0, near, far)


@triton.jit
def _columns(across, slot, axis, M: tl.constexpr):
    """The pixels of intervals across: which, whether there is one, and its taps."""
    interval = across // M.parts
    x = first_of(interval, axis, M.align) + across % M.parts * M.slots + slot
    beyond = x >= axis.outputs  # the last interval is a short one; what lies before the first cell goes with it
    x = tl.where(beyond, x - axis.outputs, x)
    lies, cell, near, far = taps(x, axis, M.align)
    return x, tl.where(beyond, (lies < 0) & (interval == axis.inputs - 1), lies == interval), lies, cell, near, far


@triton.jit
def _strides(x, V: tl.constexpr):
    """How far apart the cells of a row are, rows, classes, and samples."""
    if V.last:
        return V.num_classes, x.width * V.num_classes, 1, tl.cast(x.height * x.width, tl.int64) * V.num_classes
    return 1, x.width, x.height * x.width, tl.cast(x.height * x.width, tl.int64) * V.num_classes


@triton.jit
def _lanes(x, n, cell, near, far, k, V: tl.constexpr):
    """`Lanes`."""
    right, down, next_class, next_sample = _strides(x, V)
    within = cell * right + k * next_class
    return Lanes(x.logits + n * next_sample, within, right, down, V.classes * next_class, near, far)


@triton.jit
def _row(lanes, row, k, V: tl.constexpr):
    """The pixels' logits on a row of cells. What has no weight is not looked at."""
    at = lanes.sample + row * lanes.down + lanes.within
    tiles = ()
    for c in tl.static_range(tl.constexpr(V.chunks)):
        there = c * V.classes + k < V.num_classes
        left = tl.load(at, mask=there, other=LOW).to(tl.float32)
        right = tl.load(at + lanes.right, mask=there & (lanes.far > 0), other=0.0).to(tl.float32)
        tiles += (tl.fma(right, lanes.far, left * lanes.near),)
        at += lanes.chunk
    return tiles


@triton.jit
def _label_row(held, row, lanes, axis, k, V: tl.constexpr, M: tl.constexpr):
    """The logits of a label row, its interval and the weights of that one's two cells. held: two rows of cells, which,
    and which; of those that the row lies between one is fetched, or both, or none."""
    upper, lower, of_upper, of_lower = held
    interval, low, near, far = taps(row, axis, M.align)
    below = tl.where(far > 0, tl.minimum(low + 1, axis.inputs - 1), low)  # the upper where the lower has no weight
    fetches = tl.where(of_lower == low, 1, 2)
    fetches = tl.where((of_upper == low) & (of_lower == below), 0, fetches)
    for fetch in range(0, fetches):
        upper = lower
        lower = _row(lanes, tl.where(fetch + 1 < fetches, low, below), k, V)
    by_upper = tl.where(far > 0, near, 0.5)  # of the same row twice, so that nothing is multiplied by 0
    by_lower = tl.where(far > 0, far, 0.5)
    tiles = ()
    for c in tl.static_range(tl.constexpr(V.chunks)):
        tiles += (tl.fma(lower[c], by_lower, upper[c] * by_upper),)
    over, under = _sides(interval, near, far)
    return (upper, lower, low, below), tiles, over, under


@triton.jit
def _added(above, below, over, under, k, y, of, e, V: tl.constexpr):
    """The sums for the rows of cells above and below, with the gradient of a label row; y: -2 where it is ignored."""
    up = ()
    down = ()
    for c in tl.static_range(tl.constexpr(V.chunks)):
        g = full.gradient(c, k, y, of, e, V)
        up += (tl.fma(g, over, above[c]),)
        down += (tl.fma(g, under, below[c]),)
    return up, down


@triton.jit
def _over_interval(x, LANES: tl.constexpr):
    """Added up over so many lanes, all of which then have the sum."""
    parted = tl.reshape(x, [x.shape[0], x.shape[1] // LANES, LANES])
    return tl.reshape(tl.broadcast_to(tl.sum(parted, 2, keep_dims=True), parted.shape), x.shape)


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
@triton.jit(do_not_specialize=["items", "ignore", "never"])
def march_kernel(s, t, target, class_weight, D, slab, own_counts, partial, items, tiles, strips, height, width, numbers,
                 ignore, never, V: tl.constexpr, M: tl.constexpr):  # fmt: skip
    """Loss and gradient of a strip of M.rows intervals down, V.pixels // M.slots across; then of the next strip that is
    this program's. The slab: (N, strips, M.rows + 1, K, left and right, intervals across), in float32, or None."""
    FIRST: tl.constexpr = 0 if M.align else -1  # the interval
    N = full.numbers_of(numbers, V)
    if ignore is not None:
        ignore = full.ignored(ignore)
    of_ce = N.ce
    if V.weighted:  # of a mean: what the second kernel divides by is the number of pixels
        count, total = full.totals(D, V)
        of_ce = tl.where(total > 0, N.ce * (count / total), 0.0)
    by = (of_ce, N.tau * N.tckd, N.tau * N.nckd)
    y_axis = axis_of(s.height, height, never, M.align)
    x_axis = axis_of(s.width, width, never, M.align)
    y_axis_t, x_axis_t = y_axis, x_axis
    if not M.same:
        y_axis_t = axis_of(t.height, height, never, M.align)
        x_axis_t = axis_of(t.width, width, never, M.align)
    k = tl.arange(0, V.classes)[:, None]
    p = tl.arange(0, V.pixels)[None, :]
    slot = p % M.slots + k * 0
    side = tiles * (V.pixels // M.slots)
    sums = full.zeros(3 if V.with_ce else 2, V.classes, V.pixels)
    nothing = full.zeros(V.chunks, V.classes, V.pixels)
    pixels = tl.full([V.classes, V.pixels], 0, tl.int32)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        tile = item % tiles
        strip = item // tiles % strips
        n = (item // tiles // strips).to(tl.int64)
        across = tile * (V.pixels // M.slots) + p // M.slots
        x, inside, lies, cell, near, far = _columns(across, slot, x_axis, M)
        to_left, to_right = _sides(lies, near, far)
        s_lanes = _lanes(s, n, cell, near, far, k, V)
        _lies, cell, near, far = taps(x, x_axis_t, M.align)
        t_lanes = _lanes(t, n, cell, near, far, k, V)
        slab_at = slab
        if slab is not None:
            slab_at = slab + ((n * strips + strip) * (M.rows + 1) * V.num_classes + k) * (2 * side) + across
        none = tl.full([], -1, tl.int32)
        s_held = (nothing, nothing, none, none)
        t_held = s_held
        above, below = nothing, nothing
        first = strip * M.rows + FIRST
        end = first_of(first, y_axis, M.align)
        following = k + p
        y_at = target
        if target is not None:
            y_at = target + n * height * width
            following = tl.load(y_at + tl.minimum(end, height - 1) * width + x, mask=inside, other=0)
        for interval_row in range(first, first + M.rows + 1):  # and a row of cells more
            begin = end
            if interval_row < first + M.rows:
                end = first_of(interval_row + 1, y_axis, M.align)
            for row in range(begin, end):
                s_held, s_tiles, over, under = _label_row(s_held, row, s_lanes, y_axis, k, V, M)
                t_held, t_tiles, _over, _under = _label_row(t_held, row, t_lanes, y_axis_t, k, V, M)
                if target is not None:  # fetched a row ahead
                    label = following
                    following = tl.load(y_at + tl.minimum(row + 1, height - 1) * width + x, mask=inside, other=0)
                else:
                    label = full.likeliest(t_tiles, k, V)
                label = full.labels(label, class_weight, inside, ignore, V)
                terms, of, e = full.judged(s_tiles, t_tiles, label, k, N.to_2_tau, by, V)
                if slab is not None:
                    above, below = _added(above, below, over, under, k, full.late(label, N.tau), of, e, V)
                sums = full.added(sums, full.counted(terms, label, N.tau, V))
                pixels += label.valid.to(tl.int32)
            if slab is not None:
                _to_slab(slab_at, side, above, to_left, to_right, slot, k, V, M)
                slab_at += V.num_classes * 2 * side
                above, below = below, nothing
    full.store_sums(partial, sums, k)
    tl.store(own_counts + tl.program_id(0), tl.sum(tl.where(k == 0, pixels, 0)).to(tl.float32))


@triton.jit
def _slab_row(at, side, columns, cells, parts, there):
    """What a row of intervals has for these cells: of the intervals on their right and on their left, part by part."""
    total = tl.zeros(there.shape, tl.float32)
    on_left = tl.where(columns > 0, columns, cells) - 1
    for part in range(parts):
        total += tl.load(at + columns * parts + part, mask=there, other=0.0)
        total += tl.load(at + side + on_left * parts + part, mask=there, other=0.0)
    return total


@triton.jit(do_not_specialize=["num_programs", "items"])
def collect_kernel(slab, x, partial, D, loss, parts, grad_scale, num_programs, items, strips, side, numbers,
                   V: tl.constexpr, M: tl.constexpr, CLASSES: tl.constexpr, COLUMNS: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    """The gradient, x, from the slab, divided, and, by the first program, the loss: what finish_kernel does."""
    FIRST: tl.constexpr = 0 if M.align else -1
    if slab is not None:
        by, _by_ce, _outside = full.factors(D, full.numbers_of(numbers, V), V)
        k = tl.arange(0, CLASSES)[:, None]
        c = tl.arange(0, COLUMNS)[None, :]
        right, down, next_class, next_sample = _strides(x, V)
        tiles = tl.cdiv(x.width, COLUMNS)
        class_tiles = tl.cdiv(V.num_classes, CLASSES)
        for item in range(tl.program_id(0), items, tl.num_programs(0)):
            columns = item % tiles * COLUMNS + c
            classes = item // tiles % class_tiles * CLASSES + k
            row = item // tiles // class_tiles % x.height
            n = (item // tiles // class_tiles // x.height).to(tl.int64)
            there = (columns < x.width) & (classes < V.num_classes)
            strip = (row - FIRST) // M.rows
            within = (row - FIRST) % M.rows
            at = slab + ((n * strips + strip) * (M.rows + 1) * V.num_classes + classes) * (2 * side)
            total = _slab_row(at + within * (V.num_classes * 2) * side, side, columns, x.width, M.parts, there)
            if strip > 0 and within == 0:  # the strip above has something, too: its last row, right before this one
                total += _slab_row(at - V.num_classes * 2 * side, side, columns, x.width, M.parts, there)
            at = x.logits + n * next_sample + (row * down + classes * next_class + columns * right)
            tl.store(at, (total * by).to(x.logits.dtype.element_ty), mask=there)
    if tl.program_id(0) == 0:
        full.finish_kernel(partial, D, loss, parts, grad_scale, num_programs, numbers, V, BLOCK)
