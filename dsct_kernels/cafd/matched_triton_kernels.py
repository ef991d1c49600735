"""Matched CAFD in Triton: the kernels that matched_triton.py launches. Formulas: docs/derivations.md, "CAFD, matched".

Maps are tiles of CHANNELS x POSITIONS at any strides, as in triton_kernels.py. A program walks over a stretch of
positions; each element of its tile keeps maxima and sums of its own, so that nothing moves between lanes on the way.
DENSE: how far apart positions are where channels_last maps have no gaps, known to the compiler, for wider accesses.
The stretches of a row come together in order, in float64. What both passes take from the temperature is k = log2(e) /
tau, rounded once: exp(x / tau) = exp2(x k).
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from .. import triton_common
from .triton_kernels import _finite_max, _numbers, _offsets, _scale

LOW = tl.constexpr(float("-inf"))
LN_2 = tl.constexpr(triton_common.LN_2)


@triton.jit
def _moved(top_t, top_s, m_t, m_s, z_t, z_s, cross, k):
    """Sums against the maxima m, as they are against the maxima `top`."""
    base_t = _finite_max(top_t)
    base_s = _finite_max(top_s)
    by_t = tl.exp2((m_t - base_t) * k)
    by_s = tl.exp2((m_s - base_s) * k)
    shift = (_finite_max(m_t) - base_t) - (_finite_max(m_s) - base_s)
    cross = tl.where(by_t == 0, 0.0, by_t * (cross + z_t * shift))  # no mass: 0 times whatever the student has there
    return z_t * by_t, z_s * by_s, cross


@triton.jit
def _counted(x, mask_at, inside, ACC: tl.constexpr):
    """-inf where the mask says that a position does not count."""
    x = x.to(ACC)
    if mask_at is not None:
        x = tl.where(tl.load(mask_at, mask=inside, other=0)[None, :] != 0, x, LOW)
    return x


@triton.jit(do_not_specialize=["splits"])
def matched_part_kernel(
    student, teacher, mask, partial, scale_: tl.float64, temperatures, channels, positions, width,
    s_n, s_c, s_h, s_w, t_n, t_c, t_h, t_w, splits, span,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, UNROLL: tl.constexpr, FLAT_S: tl.constexpr, FLAT_T: tl.constexpr,
    DENSE: tl.constexpr, UNIFORM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """partial[n, split] = maxima of teacher and student, their sums of exponentials, sum of e^T (x^T - x^S) and of
    |teacher|, of every channel over the positions of that split: the one read of both maps."""
    if DENSE > 0:
        channels = DENSE
        s_w = DENSE
        t_w = DENSE
    program = tl.program_id(0)
    k = tl.full([], _scale(temperatures, scale_), ACC)
    channel_blocks = tl.cdiv(channels, CHANNELS)
    split = program % splits
    n = (program // splits // channel_blocks).to(tl.int64)
    c = program // splits % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    c_wide = c.to(tl.int64)[:, None]
    at_s = student + n * s_n + c_wide * s_c
    at_t = teacher + n * t_n + c_wide * t_c
    m_t = tl.full([CHANNELS, POSITIONS], LOW, ACC)
    m_s = m_t
    z_t = tl.zeros([CHANNELS, POSITIONS], ACC)
    z_s = z_t
    cross = z_t
    size = z_t
    first = split * span
    last = tl.minimum(first + span, positions)
    for start in range(first, last, POSITIONS * UNROLL):
        tiles_s = ()
        tiles_t = ()
        for u in tl.static_range(UNROLL):
            p = start + u * POSITIONS + tl.arange(0, POSITIONS)
            there = (c < channels)[:, None] & (p < last)[None, :]
            tiles_s += (tl.load(at_s + _offsets(p, width, s_h, s_w, FLAT_S)[None, :], mask=there, other=LOW),)
            tiles_t += (tl.load(at_t + _offsets(p, width, t_h, t_w, FLAT_T)[None, :], mask=there, other=LOW),)
        xs_s = ()
        xs_t = ()
        top_s = m_s
        top_t = m_t
        for u in tl.static_range(UNROLL):
            p = start + u * POSITIONS + tl.arange(0, POSITIONS)
            mask_at = mask
            if mask is not None:
                mask_at = mask + n * positions + p
            xs_s += (_counted(tiles_s[u], mask_at, p < last, ACC),)
            xs_t += (_counted(tiles_t[u], mask_at, p < last, ACC),)
            top_s = tl.maximum(top_s, xs_s[u])
            top_t = tl.maximum(top_t, xs_t[u])
        z_t, z_s, cross = _moved(top_t, top_s, m_t, m_s, z_t, z_s, cross, k)
        m_t = top_t
        m_s = top_s
        base_t = _finite_max(m_t)
        base_s = _finite_max(m_s)
        for u in tl.static_range(UNROLL):
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
    out = partial + (n * splits + split) * 6 * channels + c
    known = c < channels
    tl.store(out, top_t, mask=known)
    tl.store(out + channels, top_s, mask=known)
    tl.store(out + 2 * channels, tl.sum(z_t, 1), mask=known)
    tl.store(out + 3 * channels, tl.sum(z_s, 1), mask=known)
    tl.store(out + 4 * channels, tl.sum(cross, 1), mask=known)
    tl.store(out + 5 * channels, tl.sum(size, 1), mask=known)


@triton.jit
def _partial(at, which: tl.constexpr, channels, there, other):
    return tl.load(at + which * channels, mask=there, other=other).to(tl.float64)


@triton.jit(do_not_specialize=["splits"])
def matched_join_kernel(
    partial, stats, loss, channel_t_: tl.float64, tau_: tl.float64, scale_: tl.float64, temperatures,
    factor: tl.float64, channels, splits,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, UNIFORM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A sample's rows put together, SPLITS of each at a time: its stats, and its loss, times factor."""
    n = tl.program_id(0).to(tl.int64)
    channel_t, tau, scale_ = _numbers(temperatures, channel_t_, tau_, scale_)
    tau = tl.full([], tau, tl.float64)
    k = tl.full([], scale_, ACC).to(tl.float64)
    c = tl.arange(0, BLOCK)
    known = c < channels
    top_t = tl.full([BLOCK], LOW, tl.float64)
    top_s = top_t
    for first in range(0, splits, SPLITS):
        i = first + tl.arange(0, SPLITS)[None, :]
        at = partial + (n * splits + i) * 6 * channels + c[:, None]
        there = known[:, None] & (i < splits)
        top_t = tl.maximum(top_t, tl.max(_partial(at, 0, channels, there, LOW), 1))
        top_s = tl.maximum(top_s, tl.max(_partial(at, 1, channels, there, LOW), 1))
    z_t = tl.zeros([BLOCK], tl.float64)
    z_s = z_t
    cross = z_t
    size = z_t
    for first in range(0, splits, SPLITS):
        i = first + tl.arange(0, SPLITS)[None, :]
        at = partial + (n * splits + i) * 6 * channels + c[:, None]
        there = known[:, None] & (i < splits)
        more_t, more_s, more = _moved(
            top_t[:, None], top_s[:, None],
            _partial(at, 0, channels, there, LOW), _partial(at, 1, channels, there, LOW),
            _partial(at, 2, channels, there, 0.0), _partial(at, 3, channels, there, 0.0),
            _partial(at, 4, channels, there, 0.0), k)  # fmt: skip
        z_t += tl.sum(more_t, 1)
        z_s += tl.sum(more_s, 1)
        cross += tl.sum(more, 1)
        size += tl.sum(_partial(at, 5, channels, there, 0.0), 1)
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
        w = tl.exp((r - tl.max(r, 0)) / tl.full([], channel_t, tl.float64))
        w = w / tl.sum(w, 0)
    # a weight that is only rounded to 0 hides nothing: 0 * inf would be NaN
    part = tl.where((w == 0) & (kl == float("inf")), kl, w * kl)
    tl.store(loss + n, (tl.sum(tl.where(known, part, 0.0), 0) * tau * tau * factor).to(loss.dtype.element_ty))
    out = stats + n * 5 * channels + c
    tl.store(out, _finite_max(top_s), mask=known)
    tl.store(out + channels, tl.where(dead_t, z_s - z_s, tl.where(dead_s, 0.0, 1.0 / some_s)), mask=known)
    tl.store(out + 2 * channels, _finite_max(top_t), mask=known)
    tl.store(out + 3 * channels, tl.where(dead_t, 0.0, 1.0 / some_t), mask=known)
    tl.store(out + 4 * channels, w, mask=known)


@triton.jit(do_not_specialize=["upstream_n"])
def matched_write_kernel(
    student, teacher, mask, stats, upstream, grad, tau_: tl.float64, scale_: tl.float64, temperatures,
    factor: tl.float64, channels, positions, width, upstream_n, s_n, s_c, s_h, s_w, t_n, t_c, t_h, t_w,
    g_n, g_c, g_h, g_w, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, FLAT_S: tl.constexpr, FLAT_T: tl.constexpr,
    FLAT_G: tl.constexpr, DENSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile: the second read of both maps, and the one write. From the last sample to the first, as
    matched_part_kernel has read that last."""
    if DENSE > 0:
        channels = DENSE
        s_w = DENSE
        t_w = DENSE
        g_w = DENSE
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    _, tau, scale_ = _numbers(temperatures, tau_, tau_, scale_)
    k = tl.full([], scale_, ACC)
    channel_blocks = tl.cdiv(channels, CHANNELS)
    position_blocks = tl.cdiv(positions, POSITIONS)
    n = (program // position_blocks // channel_blocks).to(tl.int64)
    c = program // position_blocks % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    p = program % position_blocks * POSITIONS + tl.arange(0, POSITIONS)
    known = c < channels
    there = known[:, None] & (p < positions)[None, :]
    c_wide = c.to(tl.int64)[:, None]
    x_s = tl.load(student + n * s_n + c_wide * s_c + _offsets(p, width, s_h, s_w, FLAT_S)[None, :], mask=there,
                  other=LOW)  # fmt: skip
    x_t = tl.load(teacher + n * t_n + c_wide * t_c + _offsets(p, width, t_h, t_w, FLAT_T)[None, :], mask=there,
                  other=LOW)  # fmt: skip
    mask_at = mask
    if mask is not None:
        mask_at = mask + n * positions + p
    x_s = _counted(x_s, mask_at, p < positions, ACC)
    x_t = _counted(x_t, mask_at, p < positions, ACC)
    at = stats + n * 5 * channels + c
    by = tl.load(upstream + n * upstream_n).to(tl.float64) * factor * tl.full([], tau, tl.float64)
    by *= tl.load(at + 4 * channels, mask=known, other=0.0)
    by_s = by * tl.load(at + channels, mask=known, other=0.0)
    by_t = by * tl.load(at + 3 * channels, mask=known, other=0.0)
    # by_s e^S - by_t e^T, exactly 0 for equal networks: no term is larger than those that it replaces
    least = tl.where(by_s < by_t, by_s, by_t)
    more_s = (by_s - least).to(ACC)[:, None]
    more_t = (by_t - least).to(ACC)[:, None]
    m_s = tl.load(at, mask=known, other=0.0).to(ACC)[:, None]
    m_t = tl.load(at + 2 * channels, mask=known, other=0.0).to(ACC)[:, None]
    e_s = tl.exp2((x_s - m_s) * k)
    e_t = tl.exp2((x_t - m_t) * k)
    g = (e_s - e_t) * least.to(ACC)[:, None] + (e_s * more_s - e_t * more_t)
    g = tl.where((x_s == LOW) & (x_t == LOW), 0.0, g)  # whatever comes from upstream
    tl.store(grad + n * g_n + c_wide * g_c + _offsets(p, width, g_h, g_w, FLAT_G)[None, :],
             g.to(grad.dtype.element_ty), mask=there)  # fmt: skip
