"""CAFD in Triton: the kernels that triton.py launches.

Features are tiles of CHANNELS x POSITIONS at any strides; Triton lays a tile's lanes along the dimension that is
adjacent in memory. What the forward pass leaves for the backward pass, `stats`, is one row a sample:

    A (HW) | B (HW) | m (C) | 1/z (C) | w (C) | r (C) | mean_c g_c | sum_c w_c r_c

with m_c the maximum of channel c, z_c = sum_i exp((F_ci - m_c) / tau), B_i = sum_c w_c r_c P_ci. With D = dloss/dA,
sum_k w_k rho_k = sum_i A_i D_i and sum_k w_k r_k rho_k = sum_i B_i D_i, so the gradient of a channel needs only its own
row besides. `scale` is log2(e) / tau, so that exp(x / tau) = exp2(x * scale), divided in float64, as a GPU's short
division may be two units off: by the host, or, where there are `temperatures` (channel, spatial), by the kernel.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from .. import triton_common

EPS = tl.constexpr(1e-6)
LOG2_E = tl.constexpr(triton_common.LOG2_E)


@triton.jit
def _temperature(temperatures, WHICH: tl.constexpr):
    """From device memory, where nobody has looked at it: what the host refuses makes everything NaN."""
    tau = tl.load(temperatures + WHICH)
    tau = tl.where(tau > 0, tau, float("nan"))
    return tl.where(tau < float("inf"), tau, float("nan"))


@triton.jit
def _numbers(temperatures, channel_t, tau, scale):
    """Channel temperature, spatial temperature and scale, in float64: as they came, or from device memory."""
    if temperatures is not None:
        channel_t = _temperature(temperatures, 0)
        tau = _temperature(temperatures, 1)
        scale = tl.full([], LOG2_E, tl.float64) / tau  # of float32, were it a mere number
    return channel_t, tau, scale


@triton.jit
def _scale(temperatures, scale):
    """The last of _numbers."""
    if temperatures is not None:
        scale = tl.full([], LOG2_E, tl.float64) / _temperature(temperatures, 1)
    return scale


@triton.jit
def _finite_max(m):
    """A maximum that may be subtracted: -inf (nothing there) becomes 0."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _offsets(p, width, s_h, s_w, FLAT: tl.constexpr):
    """Where positions lie: one stride where rows follow each other without a gap, else row and column."""
    p = p.to(tl.int64)
    if FLAT:
        return p * s_w
    return p // width * s_h + p % width * s_w


@triton.jit
def _row_stats(features, partial, program, channels, positions, width, s_n, s_c, s_h, s_w, splits, span, scale_,
               CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, UNROLL: tl.constexpr, FLAT: tl.constexpr,
               ACC: tl.constexpr):  # fmt: skip
    """partial[n, split] = m, z, sum |F| of every channel over the positions of that split."""
    scale = tl.full([], scale_, ACC)
    split = program % splits
    channel_blocks = tl.cdiv(channels, CHANNELS)
    block = program // splits % channel_blocks
    n = (program // splits // channel_blocks).to(tl.int64)
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    at = features + n * s_n + (c.to(tl.int64) * s_c)[:, None]
    m = tl.full([CHANNELS, POSITIONS], float("-inf"), ACC)
    z = tl.zeros([CHANNELS, POSITIONS], ACC)
    g = tl.zeros([CHANNELS, POSITIONS], ACC)
    first = split * span
    last = tl.minimum(first + span, positions)
    for start in range(first, last, POSITIONS * UNROLL):
        tiles = ()
        for u in tl.static_range(UNROLL):
            p = start + u * POSITIONS + tl.arange(0, POSITIONS)
            there = (c < channels)[:, None] & (p < last)[None, :]
            tiles += (tl.load(at + _offsets(p, width, s_h, s_w, FLAT)[None, :], mask=there, other=float("-inf")),)
        new = m
        for u in tl.static_range(UNROLL):
            new = tl.maximum(new, tiles[u].to(ACC))
        base = _finite_max(new)
        z *= tl.exp2((m - base) * scale)
        for u in tl.static_range(UNROLL):
            x = tiles[u].to(ACC)
            p = start + u * POSITIONS + tl.arange(0, POSITIONS)
            z += tl.exp2((x - base) * scale)
            g += tl.where((p < last)[None, :], tl.abs(x), 0.0)
        m = new
    most = tl.max(m, 1)
    base = _finite_max(most)
    out = partial + ((n * splits + split) * 3) * channels + c
    tl.store(out, most, mask=c < channels)
    tl.store(out + channels, tl.sum(z * tl.exp2((m - base[:, None]) * scale), 1), mask=c < channels)
    tl.store(out + 2 * channels, tl.sum(g, 1), mask=c < channels)


# What changes with the batch is not specialised: Triton would compile anew where it becomes 1 or a multiple of 16.
@triton.jit(do_not_specialize=["programs_s", "splits_s", "splits_t"])
def row_stats_kernel(
    student, teacher, partial_s, partial_t, programs_s, scale_: tl.float64, temperatures,
    channels_s, positions_s, width_s, s_n, s_c, s_h, s_w, splits_s, span_s,
    channels_t, positions_t, width_t, t_n, t_c, t_h, t_w, splits_t, span_t,
    CHANNELS_S: tl.constexpr, POSITIONS_S: tl.constexpr, UNROLL_S: tl.constexpr, FLAT_S: tl.constexpr,
    ACC_S: tl.constexpr,
    CHANNELS_T: tl.constexpr, POSITIONS_T: tl.constexpr, UNROLL_T: tl.constexpr, FLAT_T: tl.constexpr,
    ACC_T: tl.constexpr,
    BOTH: tl.constexpr,
):  # fmt: skip
    """Both networks in one launch: the first programs_s programs are the student's."""
    program = tl.program_id(0)
    scale_ = _scale(temperatures, scale_)
    if BOTH:
        if program >= programs_s:
            _row_stats(teacher, partial_t, program - programs_s, channels_t, positions_t, width_t, t_n, t_c, t_h, t_w,
                       splits_t, span_t, scale_, CHANNELS_T, POSITIONS_T, UNROLL_T, FLAT_T, ACC_T)  # fmt: skip
        else:
            _row_stats(student, partial_s, program, channels_s, positions_s, width_s, s_n, s_c, s_h, s_w, splits_s,
                       span_s, scale_, CHANNELS_S, POSITIONS_S, UNROLL_S, FLAT_S, ACC_S)  # fmt: skip
    else:
        _row_stats(student, partial_s, program, channels_s, positions_s, width_s, s_n, s_c, s_h, s_w, splits_s, span_s,
                   scale_, CHANNELS_S, POSITIONS_S, UNROLL_S, FLAT_S, ACC_S)  # fmt: skip


@triton.jit
def _channel_weights(partial, stats, n, row, channels, positions, splits, channel_t_, scale_, BLOCK: tl.constexpr,
                     ACC: tl.constexpr):  # fmt: skip
    """The splits of one sample put together in order; r and w; into the sample's row of stats."""
    channel_t = tl.full([], channel_t_, ACC)
    scale = tl.full([], scale_, ACC)
    c = tl.arange(0, BLOCK)
    there = c < channels
    m = tl.full([BLOCK], float("-inf"), ACC)
    z = tl.zeros([BLOCK], ACC)
    g = tl.zeros([BLOCK], ACC)
    n = tl.cast(n, tl.int64)
    for split in range(0, splits):
        at = partial + ((n * splits + split) * 3) * channels + c
        m_new = tl.load(at, mask=there, other=0.0)
        z_new = tl.load(at + channels, mask=there, other=0.0)
        g += tl.load(at + 2 * channels, mask=there, other=0.0)
        new = tl.maximum(m, m_new)
        base = _finite_max(new)
        z = z * tl.exp2((m - base) * scale) + z_new * tl.exp2((m_new - base) * scale)
        m = new
    g = g / positions
    mean = tl.sum(g, 0) / channels
    r = tl.where(mean == 0, 1.0, g / mean)  # all-zero features: all channels alike
    v = tl.where(there, r, float("-inf")) / channel_t
    v = tl.exp(v - tl.max(v, 0))
    w = v / tl.sum(v, 0)
    w = tl.where(mean == mean, w, mean)  # NaN stays NaN where a maximum would drop it
    out = stats + n * row + 2 * positions
    tl.store(out + c, m, mask=there)
    tl.store(out + channels + c, 1.0 / z, mask=there)
    tl.store(out + 2 * channels + c, w, mask=there)
    tl.store(out + 3 * channels + c, r, mask=there)
    last = tl.arange(0, 32)  # the two numbers of the sample, and zeros up to the end of its row
    numbers = tl.where(last == 0, mean, tl.where(last == 1, tl.sum(tl.where(there, w * r, 0.0), 0), 0.0))
    tl.store(out + 4 * channels + last, numbers, mask=2 * positions + 4 * channels + last < row)


@triton.jit(do_not_specialize=["samples", "splits_s", "splits_t"])
def channel_weights_kernel(
    partial_s, partial_t, stats_s, stats_t, samples, channel_t_: tl.float64, scale_: tl.float64, temperatures,
    row_s, channels_s, positions_s, splits_s, row_t, channels_t, positions_t, splits_t,
    BLOCK_S: tl.constexpr, ACC_S: tl.constexpr, BLOCK_T: tl.constexpr, ACC_T: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """One program a sample and network."""
    program = tl.program_id(0)
    channel_t_, _, scale_ = _numbers(temperatures, channel_t_, channel_t_, scale_)
    if BOTH:
        if program >= samples:
            _channel_weights(partial_t, stats_t, program - samples, row_t, channels_t, positions_t, splits_t,
                             channel_t_, scale_, BLOCK_T, ACC_T)  # fmt: skip
        else:
            _channel_weights(partial_s, stats_s, program, row_s, channels_s, positions_s, splits_s,
                             channel_t_, scale_, BLOCK_S, ACC_S)  # fmt: skip
    else:
        _channel_weights(partial_s, stats_s, program, row_s, channels_s, positions_s, splits_s,
                         channel_t_, scale_, BLOCK_S, ACC_S)  # fmt: skip


@triton.jit
def _maps(features, stats, map_out, program, row, channels, positions, width, s_n, s_c, s_h, s_w, scale_,
          CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, UNROLL: tl.constexpr, FLAT: tl.constexpr,
          ACC: tl.constexpr):  # fmt: skip
    """A and B at a block of positions, over all the channels: the second read of the features."""
    scale = tl.full([], scale_, ACC)
    blocks = tl.cdiv(positions, POSITIONS)
    n = (program // blocks).to(tl.int64)
    p = program % blocks * POSITIONS + tl.arange(0, POSITIONS)
    at = features + n * s_n + _offsets(p, width, s_h, s_w, FLAT)[None, :]
    numbers = stats + n * row + 2 * positions
    a = tl.zeros([CHANNELS, POSITIONS], ACC)
    b = tl.zeros([CHANNELS, POSITIONS], ACC)
    for start in range(0, channels, CHANNELS * UNROLL):
        tiles = ()
        for u in tl.static_range(UNROLL):
            c = start + u * CHANNELS + tl.arange(0, CHANNELS)
            there = (c < channels)[:, None] & (p < positions)[None, :]
            tiles += (tl.load(at + (c.to(tl.int64) * s_c)[:, None], mask=there, other=float("-inf")),)
        for u in tl.static_range(UNROLL):
            c = start + u * CHANNELS + tl.arange(0, CHANNELS)
            there = c < channels
            m = tl.load(numbers + c, mask=there, other=0.0)
            over_z = tl.load(numbers + channels + c, mask=there, other=0.0)
            w = tl.load(numbers + 2 * channels + c, mask=there, other=0.0)
            r = tl.load(numbers + 3 * channels + c, mask=there, other=0.0)
            e = tl.exp2((tiles[u].to(ACC) - m[:, None]) * scale)
            a += e * (w * over_z)[:, None]
            b += e * (w * over_z * r)[:, None]
    out = stats + n * row + p
    inside = p < positions
    total = tl.sum(a, 0)
    tl.store(out, total, mask=inside)
    tl.store(out + positions, tl.sum(b, 0), mask=inside)
    if map_out is not None:
        tl.store(map_out + n * positions + p, total, mask=inside)


@triton.jit(do_not_specialize=["programs_s"])
def maps_kernel(
    student, teacher, stats_s, stats_t, map_s, map_t, programs_s, scale_: tl.float64, temperatures,
    row_s, channels_s, positions_s, width_s, s_n, s_c, s_h, s_w,
    row_t, channels_t, positions_t, width_t, t_n, t_c, t_h, t_w,
    CHANNELS_S: tl.constexpr, POSITIONS_S: tl.constexpr, UNROLL_S: tl.constexpr, FLAT_S: tl.constexpr,
    ACC_S: tl.constexpr,
    CHANNELS_T: tl.constexpr, POSITIONS_T: tl.constexpr, UNROLL_T: tl.constexpr, FLAT_T: tl.constexpr,
    ACC_T: tl.constexpr,
    BOTH: tl.constexpr,
):  # fmt: skip
    """From the last sample to the first: what the statistics have read last still lies in L2. Backward turns again."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    scale_ = _scale(temperatures, scale_)
    if BOTH:
        if program >= programs_s:
            _maps(teacher, stats_t, map_t, program - programs_s, row_t, channels_t, positions_t, width_t, t_n, t_c,
                  t_h, t_w, scale_, CHANNELS_T, POSITIONS_T, UNROLL_T, FLAT_T, ACC_T)  # fmt: skip
        else:
            _maps(student, stats_s, map_s, program, row_s, channels_s, positions_s, width_s, s_n, s_c, s_h, s_w,
                  scale_, CHANNELS_S, POSITIONS_S, UNROLL_S, FLAT_S, ACC_S)  # fmt: skip
    else:
        _maps(student, stats_s, map_s, program, row_s, channels_s, positions_s, width_s, s_n, s_c, s_h, s_w,
              scale_, CHANNELS_S, POSITIONS_S, UNROLL_S, FLAT_S, ACC_S)  # fmt: skip


@triton.jit
def _divergence(t, s, gap):
    """t log(t / s) + s - t, with gap = s - t. Both maps sum to 1, so what is added changes nothing in the sum over a
    map; but every term is now >= 0 and of second order where the maps are close, and so is what a rounding does to it.
    """
    x = gap / t
    near = tl.abs(x) < 0.5
    x = tl.where(near, x, 0.0)
    f = x / (2.0 + x)  # log(1 + x) = 2 atanh(f)
    f2 = f * f
    tail = f2 * (1.0 / 13) + 1.0 / 11
    tail = tail * f2 + 1.0 / 9
    tail = tail * f2 + 1.0 / 7
    tail = tail * f2 + 1.0 / 5
    tail = tail * f2 + 1.0 / 3
    return tl.where(near, t * f * (x - 2.0 * f2 * tail), t * (tl.log(t) - tl.log(s)) + gap)


@triton.jit
def kl_kernel(map_s, map_t, loss, grad_map, row_s, row_t, positions, factor_: tl.float64, NEEDS_GRAD: tl.constexpr,
              BLOCK: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """loss[n] = KL(A~T || A~S), grad_map = factor * dloss / dA^S. One program a sample."""
    n = tl.program_id(0).to(tl.int64)
    floor = tl.full([], EPS, ACC) / positions
    keep = 1.0 - tl.full([], EPS, ACC)
    factor = tl.full([], factor_, ACC) * keep
    total = tl.zeros([BLOCK], ACC)
    for start in range(0, positions, BLOCK):
        p = start + tl.arange(0, BLOCK)
        inside = p < positions
        raw_s = tl.load(map_s + n * row_s + p, mask=inside, other=0.0).to(ACC)
        raw_t = tl.load(map_t + n * row_t + p, mask=inside, other=0.0).to(ACC)
        s = keep * raw_s + floor
        t = keep * raw_t + floor
        total += tl.where(inside, _divergence(t, s, keep * (raw_s - raw_t)), 0.0)
        if NEEDS_GRAD:
            tl.store(grad_map + n * positions + p, (-factor * t / s).to(grad_map.dtype.element_ty), mask=inside)
    tl.store(loss + n, tl.sum(total, 0))


@triton.jit
def center_kernel(grad_map, stats, centered, products, row, positions, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """centered = D - sum_i A_i D_i; products[n] = the sums of A and of B times that. One program a sample.

    A constant added to D changes nothing but what cancels: with the mean taken out, next to nothing does.
    """
    n = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], ACC)
    for start in range(0, positions, BLOCK):
        p = start + tl.arange(0, BLOCK)
        a = tl.load(stats + n * row + p, mask=p < positions, other=0.0)
        total += a * tl.load(grad_map + n * positions + p, mask=p < positions, other=0.0)
    mean = tl.sum(total, 0)
    a_d = tl.zeros([BLOCK], ACC)
    b_d = tl.zeros([BLOCK], ACC)
    for start in range(0, positions, BLOCK):
        p = start + tl.arange(0, BLOCK)
        inside = p < positions
        d = tl.load(grad_map + n * positions + p, mask=inside, other=0.0) - mean
        a_d += tl.load(stats + n * row + p, mask=inside, other=0.0) * d
        b_d += tl.load(stats + n * row + positions + p, mask=inside, other=0.0) * d
        tl.store(centered + n * positions + p, d, mask=inside)
    tl.store(products + 2 * n, tl.sum(a_d, 0))
    tl.store(products + 2 * n + 1, tl.sum(b_d, 0))


@triton.jit
def _by_magnitude(rho, w, numbers, products, n, channels, positions, channel_t):
    """dloss/dg_c / HW: what the gradient of a feature gets times its sign."""
    mean = tl.load(numbers + 4 * channels)
    a_d = tl.load(products + 2 * n)
    pull = (tl.load(products + 2 * n + 1) - a_d * tl.load(numbers + 4 * channels + 1)) / channel_t / channels
    s = w / channel_t * (rho - a_d)  # pull: (1/C) sum_k s_k r_k
    return tl.where(mean == 0, 0.0, (s - pull) / mean) / positions


@triton.jit
def row_backward_kernel(features, centered, products, stats, grad, row, channels, positions, s_n, s_c, g_n, g_c, groups,
                        channel_t_: tl.float64, tau_: tl.float64, scale_: tl.float64, temperatures, ROWS: tl.constexpr,
                        BLOCK: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """The gradient of ROWS channels whose positions are adjacent: one read of the features, one write."""
    program = tl.program_id(0)
    n = (program // groups).to(tl.int64)
    channel_t_, tau_, scale_ = _numbers(temperatures, channel_t_, tau_, scale_)
    tau = tl.full([], tau_, ACC)
    channel_t = tl.full([], channel_t_, ACC)
    scale = tl.full([], scale_, ACC)
    p = tl.arange(0, BLOCK)
    inside = p < positions
    d = tl.load(centered + n * positions + p, mask=inside, other=0.0)
    numbers = stats + n * row + 2 * positions
    first = program % groups * ROWS
    for c in range(first, tl.minimum(first + ROWS, channels)):
        x = tl.load(features + n * s_n + tl.cast(c, tl.int64) * s_c + p, mask=inside, other=float("-inf")).to(ACC)
        e = tl.exp2((x - tl.load(numbers + c)) * scale) * tl.load(numbers + channels + c)  # P_ci
        w = tl.load(numbers + 2 * channels + c)
        rho = tl.sum(e * d, 0)
        by_g = _by_magnitude(rho, w, numbers, products, n, channels, positions, channel_t)
        sign = tl.where(x > 0, by_g, tl.where(x < 0, -by_g, 0.0))
        g = (w / tau) * e * (d - rho) + sign
        tl.store(grad + n * g_n + tl.cast(c, tl.int64) * g_c + p, g.to(grad.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["splits"])
def rho_kernel(features, grad_map, stats, partial, row, channels, positions, width, s_n, s_c, s_h, s_w, splits, span,
               scale_: tl.float64, temperatures, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, UNROLL: tl.constexpr,
               FLAT: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """partial[n, split, c] = sum over the split's positions of P_ci D_i, for any layout."""
    program = tl.program_id(0)
    split = program % splits
    channel_blocks = tl.cdiv(channels, CHANNELS)
    c = program // splits % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    n = (program // splits // channel_blocks).to(tl.int64)
    scale = tl.full([], _scale(temperatures, scale_), ACC)
    numbers = stats + n * row + 2 * positions
    known = c < channels
    m = tl.load(numbers + c, mask=known, other=0.0)
    at = features + n * s_n + (c.to(tl.int64) * s_c)[:, None]
    rho = tl.zeros([CHANNELS, POSITIONS], ACC)
    first = split * span
    last = tl.minimum(first + span, positions)
    for start in range(first, last, POSITIONS * UNROLL):
        tiles = ()
        for u in tl.static_range(UNROLL):
            p = start + u * POSITIONS + tl.arange(0, POSITIONS)
            there = known[:, None] & (p < last)[None, :]
            tiles += (tl.load(at + _offsets(p, width, s_h, s_w, FLAT)[None, :], mask=there, other=float("-inf")),)
        for u in tl.static_range(UNROLL):
            p = start + u * POSITIONS + tl.arange(0, POSITIONS)
            d = tl.load(grad_map + n * positions + p, mask=p < last, other=0.0).to(ACC)
            rho += tl.exp2((tiles[u].to(ACC) - m[:, None]) * scale) * d[None, :]
    total = tl.sum(rho, 1) * tl.load(numbers + channels + c, mask=known, other=0.0)
    tl.store(partial + (n * splits + split) * channels + c, total, mask=known)


@triton.jit(do_not_specialize=["splits"])
def write_kernel(features, centered, products, stats, partial, grad, row, channels, positions, width,
                 s_n, s_c, s_h, s_w, g_n, g_c, g_h, g_w, position_blocks, splits, channel_t_: tl.float64,
                 tau_: tl.float64, scale_: tl.float64, temperatures, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
                 FLAT: tl.constexpr, GRAD_FLAT: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """The gradient of a tile from the numbers of its channels, for any layout: the last read, and the write.

    From the last sample to the first: rho_kernel has read that last.
    """
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    channel_blocks = tl.cdiv(channels, CHANNELS)
    n = (program // position_blocks // channel_blocks).to(tl.int64)
    c = program % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    p = program // channel_blocks % position_blocks * POSITIONS + tl.arange(0, POSITIONS)
    channel_t_, tau_, scale_ = _numbers(temperatures, channel_t_, tau_, scale_)
    tau = tl.full([], tau_, ACC)
    known = c < channels
    inside = p < positions
    there = known[:, None] & inside[None, :]
    c_wide = c.to(tl.int64)[:, None]
    x = tl.load(features + n * s_n + c_wide * s_c + _offsets(p, width, s_h, s_w, FLAT)[None, :], mask=there,
                other=float("-inf")).to(ACC)  # fmt: skip
    numbers = stats + n * row + 2 * positions
    m = tl.load(numbers + c, mask=known, other=0.0)
    over_z = tl.load(numbers + channels + c, mask=known, other=0.0)
    w = tl.load(numbers + 2 * channels + c, mask=known, other=0.0)
    rho = tl.zeros([CHANNELS], ACC)
    for split in range(0, splits):
        rho += tl.load(partial + (n * splits + split) * channels + c, mask=known, other=0.0)
    by_g = _by_magnitude(rho, w, numbers, products, n, channels, positions, tl.full([], channel_t_, ACC))
    d = tl.load(centered + n * positions + p, mask=inside, other=0.0)
    e = tl.exp2((x - m[:, None]) * tl.full([], scale_, ACC))
    sign = tl.where(x > 0, by_g[:, None], tl.where(x < 0, -by_g[:, None], 0.0))
    g = e * (w * over_z / tau)[:, None] * (d[None, :] - rho[:, None]) + sign
    tl.store(grad + n * g_n + c_wide * g_c + _offsets(p, width, g_h, g_w, GRAD_FLAT)[None, :],
             g.to(grad.dtype.element_ty), mask=there)  # fmt: skip
