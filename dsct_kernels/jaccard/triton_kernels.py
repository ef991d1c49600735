"""The soft Jaccard loss in Triton: the kernels that triton.py launches. Formulas: docs/derivations.md, "Soft Jaccard".

As in tnkd/triton_kernels.py a program walks over tiles of CLASSES x PIXELS, at any strides, and holds every class of a
pixel, in CHUNKS tiles: whatever goes over classes stays in registers, and so do the sums over pixels that the loss
needs, each lane's for its own pixels, until the program's end.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from ..cafd.triton_kernels import LOG2_E, _temperature
from ..tnkd.triton_kernels import _exponentials, _place, _read, _reciprocal


@triton.jit
def _over_tau(temperature, over_tau):
    """1 / tau in float64, as it came or from device memory."""
    if temperature is not None:
        over_tau = 1.0 / _temperature(temperature, 0)
    return tl.full([], over_tau, tl.float64)


@triton.jit
def _softmax(tiles, counts, scale, CHUNKS: tl.constexpr, ALL: tl.constexpr, ACC: tl.constexpr):
    """Exponentials of every class and their sum; where nothing counts 0 stands for whatever was read. Nothing but -inf:
    -inf less -inf is NaN, as it has to be."""
    found = ()
    top = tl.full(tiles[0].shape, float("-inf"), ACC)
    for c in tl.static_range(CHUNKS):
        x = tiles[c].to(ACC)
        if not ALL:
            x = tl.where(counts, x, 0.0)
        found += (x,)
        top = tl.maximum(top, x)
    return _exponentials(found, scale, tl.max(top, 0, keep_dims=True) * scale, CHUNKS, ACC)


@triton.jit
def _both(s_at, t_at, v_at, s_step, t_step, inside, one_inside, k, scale, NUM_CLASSES: tl.constexpr,
          CHUNKS: tl.constexpr, CLASSES: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """v of the tile's pixels, 0 past the end, and both networks' exponentials and their sums."""
    s_tiles = _read(s_at, s_step, inside, k, NUM_CLASSES, CHUNKS, CLASSES, WHOLE)
    t_tiles = _read(t_at, t_step, inside, k, NUM_CLASSES, CHUNKS, CLASSES, WHOLE)
    v = tl.where(inside, 1.0, 0.0).to(ACC)
    if v_at is not None:
        v = tl.load(v_at, mask=one_inside, other=0.0)[None, :]
    e_s, sum_s = _softmax(s_tiles, v != 0, scale, CHUNKS, WHOLE and v_at is None, ACC)
    e_t, sum_t = _softmax(t_tiles, v != 0, scale, CHUNKS, WHOLE and v_at is None, ACC)
    return v, e_s, sum_s, e_t, sum_t


@triton.jit
def _tile(tile, student, teacher, share, size_1, size_2, inner, blocks, s_k, s_0, s_1, s_2, s_p, t_k, t_0, t_1, t_2,
          t_p, v_0, v_1, v_2, v_p, scale, NUM_CLASSES: tl.constexpr, CHUNKS: tl.constexpr, PIXELS: tl.constexpr,
          CLASSES: tl.constexpr, RANK: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """What `_both` makes of a tile, which of it is there, and where it is."""
    i_0, i_1, i_2, start_p = _place(tile, blocks, size_1, size_2, RANK)
    start_p *= PIXELS
    k = tl.arange(0, CLASSES)[:, None]
    p = tl.arange(0, PIXELS)[None, :]
    k_wide = k.to(tl.int64)
    p_wide = p.to(tl.int64)
    one = tl.arange(0, PIXELS).to(tl.int64)
    inside = (k >= 0) & (p >= 0)
    if not WHOLE:
        inside = inside & (p < inner - start_p)
    s_at = student + (i_0 * s_0 + i_1 * s_1 + i_2 * s_2 + start_p * s_p) + (k_wide * s_k + p_wide * s_p)
    t_at = teacher + (i_0 * t_0 + i_1 * t_1 + i_2 * t_2 + start_p * t_p) + (k_wide * t_k + p_wide * t_p)
    v_at = share
    if share is not None:
        v_at = share + (i_0 * v_0 + i_1 * v_1 + i_2 * v_2 + start_p * v_p) + one * v_p
    s_step = tl.full([], CLASSES, tl.int64) * s_k
    t_step = tl.full([], CLASSES, tl.int64) * t_k
    v, e_s, sum_s, e_t, sum_t = _both(s_at, t_at, v_at, s_step, t_step, inside, one < inner - start_p, k, scale,
                                      NUM_CLASSES, CHUNKS, CLASSES, WHOLE, ACC)  # fmt: skip
    return v, e_s, sum_s, e_t, sum_t, inside, i_0, i_1, i_2, start_p


@triton.jit(do_not_specialize=["size_1", "size_2", "blocks", "tiles"])
def jaccard_sums_kernel(
    student, teacher, share, partial, over_tau_: tl.float64, temperature, size_1, size_2, inner, blocks, tiles,
    s_k, s_0, s_1, s_2, s_p, t_k, t_0, t_1, t_2, t_p, v_0, v_1, v_2, v_p,
    NUM_CLASSES: tl.constexpr, CHUNKS: tl.constexpr, PIXELS: tl.constexpr, CLASSES: tl.constexpr, RANK: tl.constexpr,
    DENSE: tl.constexpr, WHOLE: tl.constexpr, FAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """partial[program] = the sums of v q, v (p + q) and v |p - q| of every class: the first read of both maps."""
    scale = tl.full([], _over_tau(temperature, over_tau_) * LOG2_E, ACC)
    if DENSE:
        s_p = NUM_CLASSES
        t_p = NUM_CLASSES
    theirs = ()
    both = ()
    apart = ()
    for _ in tl.static_range(CHUNKS):
        theirs += (tl.zeros([CLASSES, PIXELS], ACC),)
        both += (tl.zeros([CLASSES, PIXELS], ACC),)
        apart += (tl.zeros([CLASSES, PIXELS], ACC),)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        v, e_s, sum_s, e_t, sum_t, _inside, _0, _1, _2, _start_p = _tile(
            tile, student, teacher, share, size_1, size_2, inner, blocks, s_k, s_0, s_1, s_2, s_p, t_k, t_0, t_1, t_2,
            t_p, v_0, v_1, v_2, v_p, scale, NUM_CLASSES, CHUNKS, PIXELS, CLASSES, RANK, WHOLE, ACC)  # fmt: skip
        by_s = v * _reciprocal(sum_s, FAST)
        by_t = v * _reciprocal(sum_t, FAST)
        theirs_now = ()
        both_now = ()
        apart_now = ()
        for c in tl.static_range(CHUNKS):
            ours = e_s[c] * by_s
            there = e_t[c] * by_t
            theirs_now += (theirs[c] + there,)
            both_now += (both[c] + (ours + there),)
            # not |p - q|, whose product may be fused into the difference: equal networks would differ. A NaN that max
            # and min drop is in the other sums
            apart_now += (apart[c] + (tl.maximum(ours, there) - tl.minimum(ours, there)),)
        theirs = theirs_now
        both = both_now
        apart = apart_now
    for c in tl.static_range(CHUNKS):
        one = c * CLASSES + tl.arange(0, CLASSES)
        at = partial + tl.program_id(0).to(tl.int64) * 3 * NUM_CLASSES + one
        tl.store(at, tl.sum(theirs[c], 1), mask=one < NUM_CLASSES)
        tl.store(at + NUM_CLASSES, tl.sum(both[c], 1), mask=one < NUM_CLASSES)
        tl.store(at + 2 * NUM_CLASSES, tl.sum(apart[c], 1), mask=one < NUM_CLASSES)


@triton.jit(do_not_specialize=["programs"])
def jaccard_add_kernel(partial, sums, programs, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """sums = the programs' added up, in order, in float64: COLUMNS of them a program."""
    i = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        there = (row < programs)[:, None] & (i < columns)[None, :]
        total += tl.load(partial + row[:, None] * columns + i[None, :], mask=there, other=0.0).to(tl.float64)
    tl.store(sums + i, tl.sum(total, 0), mask=i < columns)


@triton.jit
def jaccard_finish_kernel(sums, loss, coefficients, num_classes, BLOCK: tl.constexpr):
    """One program: the loss, and a and b of its gradient."""
    c = tl.arange(0, BLOCK)
    known = c < num_classes
    theirs = tl.load(sums + c, mask=known, other=0.0)
    both = tl.load(sums + num_classes + c, mask=known, other=0.0)
    apart = tl.load(sums + 2 * num_classes + c, mask=known, other=0.0)
    # a NaN in any class: one that the teacher does not see must not hide it
    bad = tl.sum(tl.where((both + apart) == (both + apart), 0, 1), 0) > 0
    nan = tl.where(bad, float("nan"), 0.0).to(tl.float64)
    there = theirs > 0.5
    every = tl.maximum(tl.sum(there.to(tl.int32), 0), 1).to(tl.float64)
    all_ = tl.where(there, both + apart, 1.0)
    part = tl.where(there, 2.0 * apart / all_, 0.0)  # 1 - IoU, in the form that keeps its digits where it is small
    tl.store(loss, (tl.sum(part, 0) / every + nan).to(loss.dtype.element_ty))
    square = every * all_ * all_
    tl.store(coefficients + c, tl.where(there, -2.0 * apart / square, 0.0) + nan, mask=known)
    tl.store(coefficients + num_classes + c, tl.where(there, 2.0 * both / square, 0.0) + nan, mask=known)


@triton.jit(do_not_specialize=["size_1", "size_2", "blocks", "tiles"])
def jaccard_write_kernel(
    student, teacher, share, coefficients, grad, over_tau_: tl.float64, temperature, size_1, size_2, inner, blocks,
    tiles, s_k, s_0, s_1, s_2, s_p, t_k, t_0, t_1, t_2, t_p, g_k, g_0, g_1, g_2, g_p, v_0, v_1, v_2, v_p,
    NUM_CLASSES: tl.constexpr, CHUNKS: tl.constexpr, PIXELS: tl.constexpr, CLASSES: tl.constexpr, RANK: tl.constexpr,
    DENSE: tl.constexpr, WHOLE: tl.constexpr, FAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient, p (h - sum_k p_k h_k) v / tau with h = a + b sign(p - q): the second read, and the one write."""
    over_tau = _over_tau(temperature, over_tau_)
    scale = tl.full([], over_tau * LOG2_E, ACC)
    by_tau = tl.full([], over_tau, ACC)
    if DENSE:
        s_p = NUM_CLASSES
        t_p = NUM_CLASSES
        g_p = NUM_CLASSES
    k = tl.arange(0, CLASSES)[:, None]
    p = tl.arange(0, PIXELS)[None, :]
    k_wide = k.to(tl.int64)
    p_wide = p.to(tl.int64)
    g_step = tl.full([], CLASSES, tl.int64) * g_k
    above = ()
    below = ()
    for c in tl.static_range(CHUNKS):
        a = tl.load(coefficients + c * CLASSES + k, mask=c * CLASSES + k < NUM_CLASSES, other=0.0)
        b = tl.load(coefficients + NUM_CLASSES + c * CLASSES + k, mask=c * CLASSES + k < NUM_CLASSES, other=0.0)
        above += ((a + b).to(ACC),)
        below += ((a - b).to(ACC),)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        v, e_s, sum_s, e_t, sum_t, inside, i_0, i_1, i_2, start_p = _tile(
            tile, student, teacher, share, size_1, size_2, inner, blocks, s_k, s_0, s_1, s_2, s_p, t_k, t_0, t_1, t_2,
            t_p, v_0, v_1, v_2, v_p, scale, NUM_CLASSES, CHUNKS, PIXELS, CLASSES, RANK, WHOLE, ACC)  # fmt: skip
        by_s = _reciprocal(sum_s, FAST)
        by_t = _reciprocal(sum_t, FAST)
        h = ()
        mean = tl.zeros([CLASSES, PIXELS], ACC)
        for c in tl.static_range(CHUNKS):
            ours = e_s[c] * by_s
            there = e_t[c] * by_t
            level = tl.where(ours < there, below[c], (above[c] + below[c]) * 0.5)
            h += (tl.where(ours > there, above[c], level),)
            mean += e_s[c] * h[c]
        mean = tl.sum(mean, 0, keep_dims=True) * by_s
        by = by_s * v * by_tau
        g_at = grad + (i_0 * g_0 + i_1 * g_1 + i_2 * g_2 + start_p * g_p) + (k_wide * g_k + p_wide * g_p)
        for c in tl.static_range(CHUNKS):
            g = e_s[c] * by * (h[c] - mean)
            g = tl.where(v != 0, g, 0.0).to(grad.dtype.element_ty)  # whatever comes from upstream
            tl.store(g_at + c * g_step, g, mask=inside & (c * CLASSES + k < NUM_CLASSES))
