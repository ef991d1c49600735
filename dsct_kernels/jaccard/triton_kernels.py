"""The soft Jaccard loss in Triton: the kernels that triton.py launches. Formulas: docs/derivations.md, "Soft Jaccard".

As in tnkd/triton_kernels.py a program walks over tiles of CLASSES x PIXELS, and holds every class of a pixel, in
V.chunks tiles: whatever goes over classes stays in registers, and so do the sums over pixels that the loss needs, each
lane's for its own pixels, until the program's end.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from ..tnkd.triton_kernels import added, exponentials, place, read, write, zeros
from ..triton_math import LOW, numbers_of, reciprocal


@triton.jit
def _softmax(tiles, counts, scale):
    """Exponentials of every class and their sum; where nothing counts 0 stands for whatever was read. Nothing but -inf:
    -inf less -inf is NaN, as it has to be."""
    found = ()
    top = tl.full(tiles[0].shape, LOW, tl.float32)
    for c in tl.static_range(tl.constexpr(len(tiles))):
        found += (tl.where(counts, tiles[c].to(tl.float32), 0.0),)
        top = tl.maximum(top, found[c])
    return exponentials(found, scale, tl.max(top, 0, keep_dims=True) * scale)


@triton.jit
def _tile(tile, student, teacher, share, inner, plane, blocks, scale, V: tl.constexpr):
    """Where the tile is, v of its pixels, 0 past the end, and both networks' exponentials and one over their sums."""
    here = place(tile, inner, plane, blocks, V)
    k = tl.arange(0, V.classes)[:, None]
    s_tiles = read(student, here, k, V)
    t_tiles = read(teacher, here, k, V)
    v = tl.where(here.inside, 1.0, 0.0)
    if share is not None:
        p = tl.arange(0, V.pixels)
        v = tl.load(share + here.first + p, mask=p < here.left, other=0.0)[None, :]
    e_s, sum_s = _softmax(s_tiles, v != 0, scale)
    e_t, sum_t = _softmax(t_tiles, v != 0, scale)
    return here, v, e_s, reciprocal(sum_s), e_t, reciprocal(sum_t)


@triton.jit(do_not_specialize=["inner", "blocks", "tiles"])
def jaccard_sums_kernel(student, teacher, share, partial, inner, plane, blocks, tiles, numbers, V: tl.constexpr):
    """partial[program] = the sums of v q, v (p + q) and v |p - q| of every class: the first read of both maps."""
    scale = numbers_of(numbers, 1)[1]
    sums = zeros(3 * V.chunks, V.classes, V.pixels)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _here, v, e_s, by_s, e_t, by_t = _tile(tile, student, teacher, share, inner, plane, blocks, scale, V)
        by_s = v * by_s
        by_t = v * by_t
        now = ()
        for c in tl.static_range(tl.constexpr(V.chunks)):
            ours = e_s[c] * by_s
            theirs = e_t[c] * by_t
            # not |p - q|, whose product may be fused into the difference: equal networks would differ. A NaN that max
            # and min drop is in the other sums
            now += (theirs, ours + theirs, tl.maximum(ours, theirs) - tl.minimum(ours, theirs))
        sums = added(sums, now)
    for c in tl.static_range(tl.constexpr(V.chunks)):
        one = c * V.classes + tl.arange(0, V.classes)
        at = partial + tl.program_id(0).to(tl.int64) * 3 * V.num_classes + one
        for i in tl.static_range(3):
            total = tl.sum(sums[3 * c + i], 1).to(tl.float64)
            tl.store(at + i * V.num_classes, total, mask=one < V.num_classes)


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
    tl.store(loss, (tl.sum(part, 0) / every + nan).to(tl.float32))
    square = every * all_ * all_
    tl.store(coefficients + c, tl.where(there, -2.0 * apart / square, 0.0) + nan, mask=known)
    tl.store(coefficients + num_classes + c, tl.where(there, 2.0 * both / square, 0.0) + nan, mask=known)


@triton.jit(do_not_specialize=["inner", "blocks", "tiles"])
def jaccard_write_kernel(student, teacher, share, coefficients, grad, inner, plane, blocks, tiles, numbers,
                         V: tl.constexpr):  # fmt: skip
    """The gradient, p (h - sum_k p_k h_k) v / tau with h = a + b sign(p - q): the second read, and the one write."""
    tau = numbers_of(numbers, 1)[0]
    scale = numbers_of(numbers, 1)[1]
    by_tau = (1.0 / tau.to(tl.float64)).to(tl.float32)
    k = tl.arange(0, V.classes)[:, None]
    above = ()
    below = ()
    for c in tl.static_range(tl.constexpr(V.chunks)):
        one = c * V.classes + k
        a = tl.load(coefficients + one, mask=one < V.num_classes, other=0.0)
        b = tl.load(coefficients + V.num_classes + one, mask=one < V.num_classes, other=0.0)
        above += ((a + b).to(tl.float32),)
        below += ((a - b).to(tl.float32),)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        here, v, e_s, by_s, e_t, by_t = _tile(tile, student, teacher, share, inner, plane, blocks, scale, V)
        h = ()
        mean = tl.full([V.classes, V.pixels], 0.0, tl.float32)
        for c in tl.static_range(tl.constexpr(V.chunks)):
            ours = e_s[c] * by_s
            there = e_t[c] * by_t
            level = tl.where(ours < there, below[c], (above[c] + below[c]) * 0.5)
            h += (tl.where(ours > there, above[c], level),)
            mean += e_s[c] * h[c]
        mean = tl.sum(mean, 0, keep_dims=True) * by_s
        by = by_s * v * by_tau
        for c in tl.static_range(tl.constexpr(V.chunks)):
            g = e_s[c] * by * (h[c] - mean)
            write(grad, here, k, c, tl.where(v != 0, g, 0.0), V)  # whatever comes from upstream
