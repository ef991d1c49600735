"""Matched CAFD in Triton: the kernels that matched_triton.py launches. Formulas: docs/derivations.md, "CAFD, matched".

Maps are tiles of dense maps, both laid out alike, as in triton_kernels.py. A program walks over a stretch of positions;
each element of its tile keeps maxima and sums of its own, so that nothing moves between lanes on the way. The stretches
of a row come together in order, in float64. What both passes take from the temperature is k = log2(e) / tau, rounded
once: exp(x / tau) = exp2(x k).
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from ..triton_math import LN_2, LOW, finite_max, numbers_of, offsets
from .triton_kernels import along, read, store_each, stretch


@triton.jit
def _moved(top_t, top_s, m_t, m_s, z_t, z_s, cross, k):
    """Sums against the maxima m, as they are against the maxima `top`."""
    base_t = finite_max(top_t)
    base_s = finite_max(top_s)
    by_t = tl.exp2((m_t - base_t) * k)
    by_s = tl.exp2((m_s - base_s) * k)
    shift = (finite_max(m_t) - base_t) - (finite_max(m_s) - base_s)
    cross = tl.where(by_t == 0, 0.0, by_t * (cross + z_t * shift))  # no mass: 0 times whatever the student has there
    return z_t * by_t, z_s * by_s, cross


@triton.jit
def _counted(x, mask, sample, p, end):
    """-inf where the mask, from `sample` on, says that a position does not count."""
    x = x.to(tl.float32)
    if mask is not None:
        x = tl.where(tl.load(mask + sample + p, mask=p < end, other=0)[None, :] != 0, x, LOW)
    return x


@triton.jit(do_not_specialize=["splits", "steps"])
def matched_part_kernel(student, teacher, mask, partial, splits, steps, positions, numbers,
                        CHANNELS: tl.constexpr, TILE: tl.constexpr, UNIFORM: tl.constexpr):  # fmt: skip
    """partial[n, split] = maxima of teacher and student, their sums of exponentials, sum of e^T (x^T - x^S) and of
    |teacher|, of every channel over the positions of that split: the one read of both maps."""
    k = numbers_of(numbers, 2)[2]
    length = steps * (TILE.positions * TILE.unroll)
    n, split, first_c, first, end = stretch(tl.program_id(0), splits, length, CHANNELS, positions, TILE.channels)
    c = along(first_c, TILE.channels)
    map_at = n * CHANNELS * positions
    m_t = tl.full([TILE.channels, TILE.positions], LOW, tl.float32)
    m_s = m_t
    z_t = tl.full([TILE.channels, TILE.positions], 0.0, tl.float32)
    z_s = z_t
    cross = z_t
    size = z_t
    for start in range(first, end, TILE.positions * TILE.unroll):
        tiles_s = read(student + map_at, c, start, end, CHANNELS, positions, TILE)
        tiles_t = read(teacher + map_at, c, start, end, CHANNELS, positions, TILE)
        xs_s = ()
        xs_t = ()
        top_s = m_s
        top_t = m_t
        for u in tl.static_range(tl.constexpr(TILE.unroll)):
            p = along(start + u * TILE.positions, TILE.positions)
            xs_s += (_counted(tiles_s[u], mask, n * positions, p, end),)
            xs_t += (_counted(tiles_t[u], mask, n * positions, p, end),)
            top_s = tl.maximum(top_s, xs_s[u])
            top_t = tl.maximum(top_t, xs_t[u])
        z_t, z_s, cross = _moved(top_t, top_s, m_t, m_s, z_t, z_s, cross, k)
        m_t = top_t
        m_s = top_s
        base_t = finite_max(m_t)
        base_s = finite_max(m_s)
        for u in tl.static_range(tl.constexpr(TILE.unroll)):
            x_t = xs_t[u] - base_t
            x_s = xs_s[u] - base_s
            e_t = tl.exp2(x_t * k)
            z_t += e_t
            z_s += tl.exp2(x_s * k)
            cross += tl.where(e_t == 0, 0.0, e_t * (x_t - x_s))  # 0 log 0 = 0; a NaN is no 0
            if not UNIFORM:
                size += tl.where(xs_t[u] == LOW, 0.0, tl.abs(xs_t[u]))
    top_t = tl.max(m_t, 1)
    top_s = tl.max(m_s, 1)
    z_t, z_s, cross = _moved(top_t[:, None], top_s[:, None], m_t, m_s, z_t, z_s, cross, k)
    found = (top_t, top_s, tl.sum(z_t, 1), tl.sum(z_s, 1), tl.sum(cross, 1), tl.sum(size, 1))
    store_each(partial + (n * splits + split) * 6 * CHANNELS + c, CHANNELS, found, c < CHANNELS)


@triton.jit
def _partials(partial, n, splits, first, c, channels, SPLITS: tl.constexpr):
    """What matched_part_kernel has stored, of these splits, in float64."""
    i = first + tl.arange(0, SPLITS)[None, :]
    at = partial + (n * splits + i) * 6 * channels + c[:, None]
    there = (c < channels)[:, None] & (i < splits)
    found = ()
    for which in tl.static_range(6):
        found += (tl.load(at + which * channels, mask=there, other=LOW if which < 2 else 0.0).to(tl.float64),)
    return found


@triton.jit(do_not_specialize=["splits"])
def matched_join_kernel(partial, stats, loss, numbers, factor, channels, splits, BLOCK: tl.constexpr,
                        SPLITS: tl.constexpr, UNIFORM: tl.constexpr):  # fmt: skip
    """A sample's rows put together, SPLITS of each at a time: its stats, and its loss, times factor."""
    n = tl.program_id(0).to(tl.int64)
    channel_t = numbers_of(numbers, 2)[0]
    tau = numbers_of(numbers, 2)[1]
    tau = tau.to(tl.float64)
    k = numbers_of(numbers, 2)[2]
    k = k.to(tl.float64)
    c = tl.arange(0, BLOCK)
    known = c < channels
    top_t = tl.full([BLOCK], LOW, tl.float64)
    top_s = top_t
    for first in range(0, splits, SPLITS):
        found = _partials(partial, n, splits, first, c, channels, SPLITS)
        top_t = tl.maximum(top_t, tl.max(found[0], 1))
        top_s = tl.maximum(top_s, tl.max(found[1], 1))
    z_t = tl.zeros([BLOCK], tl.float64)
    z_s = z_t
    cross = z_t
    size = z_t
    for first in range(0, splits, SPLITS):
        m_t, m_s, part_t, part_s, part, magnitude = _partials(partial, n, splits, first, c, channels, SPLITS)
        part_t, part_s, part = _moved(top_t[:, None], top_s[:, None], m_t, m_s, part_t, part_s, part, k)
        z_t += tl.sum(part_t, 1)
        z_s += tl.sum(part_s, 1)
        cross += tl.sum(part, 1)
        size += tl.sum(magnitude, 1)
    dead_t = z_t == 0
    dead_s = z_s == 0
    some_t = tl.where(dead_t, 1.0, z_t)
    some_s = tl.where(dead_s, 1.0, z_s)
    # the log of the ratio, not a difference of two logs: it keeps its digits where the networks agree
    kl = cross / some_t * (k * LN_2) + tl.log(some_s / some_t)
    kl = tl.where(dead_s & (z_t == z_t), float("inf"), kl)
    kl = tl.where(dead_t, z_s - z_s, kl)  # a row that the teacher has nothing in: 0, or the NaN that the student has
    w = tl.full([BLOCK], 1.0, tl.float64) / channels
    if not UNIFORM:
        mean = tl.sum(size, 0) / channels
        r = tl.where(known, tl.where(mean == 0, 1.0, size / mean), LOW)  # a silent teacher: all channels alike
        w = tl.exp((r - tl.max(r, 0)) / channel_t.to(tl.float64))
        w = w / tl.sum(w, 0)
    # a weight that is only rounded to 0 hides nothing: 0 * inf would be NaN
    part = tl.where((w == 0) & (kl == float("inf")), kl, w * kl)
    tl.store(loss + n, (tl.sum(tl.where(known, part, 0.0), 0) * tau * tau * factor).to(tl.float32))
    over_s = tl.where(dead_t, z_s - z_s, tl.where(dead_s, 0.0, 1.0 / some_s))
    found = (finite_max(top_s), over_s, finite_max(top_t), tl.where(dead_t, 0.0, 1.0 / some_t), w)
    store_each(stats + n * 5 * channels + c, channels, found, known)


@triton.jit(do_not_specialize=["upstream_n"])
def matched_write_kernel(student, teacher, mask, stats, upstream, grad, factor, positions, upstream_n, numbers,
                         CHANNELS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """The gradient of a tile: the second read of both maps, and the one write. From the last sample to the first, as
    matched_part_kernel has read that last."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    tau = numbers_of(numbers, 2)[1]
    k = numbers_of(numbers, 2)[2]
    blocks = tl.cdiv(positions, TILE.positions)
    n, _split, first_c, first, end = stretch(program, blocks, TILE.positions, CHANNELS, positions, TILE.channels)
    c = along(first_c, TILE.channels)
    p = along(first, TILE.positions)
    known = c < CHANNELS
    map_at = n * CHANNELS * positions
    x_s = _counted(read(student + map_at, c, first, end, CHANNELS, positions, TILE)[0], mask, n * positions, p, end)
    x_t = _counted(read(teacher + map_at, c, first, end, CHANNELS, positions, TILE)[0], mask, n * positions, p, end)
    at = stats + n * 5 * CHANNELS + c
    by = tl.load(upstream + n * upstream_n).to(tl.float64) * factor * tau.to(tl.float64)
    by *= tl.load(at + 4 * CHANNELS, mask=known, other=0.0)
    by_s = by * tl.load(at + CHANNELS, mask=known, other=0.0)
    by_t = by * tl.load(at + 3 * CHANNELS, mask=known, other=0.0)
    # by_s e^S - by_t e^T, exactly 0 for equal networks: no term is larger than those that it replaces
    least = tl.where(by_s < by_t, by_s, by_t)
    more_s = (by_s - least).to(tl.float32)[:, None]
    more_t = (by_t - least).to(tl.float32)[:, None]
    e_s = tl.exp2((x_s - tl.load(at, mask=known, other=0.0).to(tl.float32)[:, None]) * k)
    e_t = tl.exp2((x_t - tl.load(at + 2 * CHANNELS, mask=known, other=0.0).to(tl.float32)[:, None]) * k)
    g = (e_s - e_t) * least.to(tl.float32)[:, None] + (e_s * more_s - e_t * more_t)
    g = tl.where((x_s == LOW) & (x_t == LOW), 0.0, g)  # whatever comes from upstream
    at = grad + map_at + offsets(c, p, CHANNELS, positions, TILE.last)
    tl.store(at, g.to(grad.dtype.element_ty), mask=known[:, None] & (p < end)[None, :])
