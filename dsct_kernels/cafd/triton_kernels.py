"""CAFD in Triton: the kernels that triton.py launches.

Features are tiles of CHANNELS x POSITIONS of dense maps; Triton lays a tile's lanes along the dimension that is
adjacent in memory. What the forward pass leaves for the backward pass, `stats`, is one row a sample:

    A (HW) | B (HW) | m (C) | 1/z (C) | w (C) | r (C) | mean_c g_c | sum_c w_c r_c

with m_c the maximum of channel c, z_c = sum_i exp((F_ci - m_c) / tau), B_i = sum_c w_c r_c P_ci. With D = dloss/dA,
sum_k w_k rho_k = sum_i A_i D_i and sum_k w_k r_k rho_k = sum_i B_i D_i, so the gradient of a channel needs only its own
row besides. A network comes as a `Maps` of triton.py, x here, and its tile as a `Tile`.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from ..triton_math import LOW, finite_max, numbers_of, offsets

EPS = tl.constexpr(1e-6)


@triton.jit
def stretch(program, splits, length, channels, positions, CHANNELS: tl.constexpr):
    """A program's sample, split of the positions, first channel, of CHANNELS, first position, and end of the split."""
    blocks = tl.cdiv(channels, CHANNELS)
    first = program % splits * length
    n = (program // splits // blocks).to(tl.int64)
    return n, program % splits, program // splits % blocks * CHANNELS, first, tl.minimum(first + length, positions)


@triton.jit
def along(first, SIZE: tl.constexpr):
    return first + tl.arange(0, SIZE)


@triton.jit
def read_tile(features, c, p, end, channels, positions, TILE: tl.constexpr):
    """-inf past the end."""
    there = (c < channels)[:, None] & (p < end)[None, :]
    return tl.load(features + offsets(c, p, channels, positions, TILE.last), mask=there, other=LOW)


@triton.jit
def read(features, c, start, end, channels, positions, TILE: tl.constexpr):
    """TILE.unroll tiles one after another along the positions, loaded together."""
    tiles = ()
    for u in tl.static_range(tl.constexpr(TILE.unroll)):
        p = along(start + u * TILE.positions, TILE.positions)
        tiles += (read_tile(features, c, p, end, channels, positions, TILE),)
    return tiles


@triton.jit
def store_each(at, step, found, mask):
    """Numbers of every channel, one kind `step` after the other."""
    for i in tl.static_range(tl.constexpr(len(found))):
        tl.store(at + i * step, found[i], mask=mask)


@triton.jit
def _row_stats(x, splits, steps, program, scale, TILE: tl.constexpr):
    """partial[n, split] = m, z, sum |F| of every channel over the positions of that split."""
    length = steps * (TILE.positions * TILE.unroll)
    n, split, first_c, first, end = stretch(program, splits, length, x.channels, x.positions, TILE.channels)
    c = along(first_c, TILE.channels)
    m = tl.full([TILE.channels, TILE.positions], LOW, tl.float32)
    z = tl.full([TILE.channels, TILE.positions], 0.0, tl.float32)
    g = tl.full([TILE.channels, TILE.positions], 0.0, tl.float32)
    for start in range(first, end, TILE.positions * TILE.unroll):
        tiles = read(x.features + n * x.channels * x.positions, c, start, end, x.channels, x.positions, TILE)
        new = m
        for u in tl.static_range(tl.constexpr(TILE.unroll)):
            new = tl.maximum(new, tiles[u].to(tl.float32))
        base = finite_max(new)
        z *= tl.exp2((m - base) * scale)
        for u in tl.static_range(tl.constexpr(TILE.unroll)):
            z += tl.exp2((tiles[u].to(tl.float32) - base) * scale)
            p = along(start + u * TILE.positions, TILE.positions)
            g += tl.where((p < end)[None, :], tl.abs(tiles[u].to(tl.float32)), 0.0)
        m = new
    most = tl.max(m, 1)
    found = (most, tl.sum(z * tl.exp2((m - finite_max(most)[:, None]) * scale), 1), tl.sum(g, 1))
    store_each(x.partial + (n * splits + split) * 3 * x.channels + c, x.channels, found, c < x.channels)


# What changes with the batch is not specialised: Triton would compile anew where it becomes 1 or a multiple of 16.
@triton.jit(do_not_specialize=["programs_s", "splits_s", "steps_s", "splits_t", "steps_t"])
def row_stats_kernel(s, t, splits_s, steps_s, splits_t, steps_t, programs_s, numbers, TILE_S: tl.constexpr,
                     TILE_T: tl.constexpr):  # fmt: skip
    """Both networks, or one, in one launch: the first programs_s programs are the student's."""
    program = tl.program_id(0)
    scale = numbers_of(numbers, 2)[2]
    if program < programs_s:
        _row_stats(s, splits_s, steps_s, program, scale, TILE_S)
    elif t is not None:
        _row_stats(t, splits_t, steps_t, program - programs_s, scale, TILE_T)


@triton.jit
def _channel_weights(x, splits, n, numbers, BLOCK: tl.constexpr):
    """The splits of one sample put together in order; r and w; into the sample's row of stats."""
    scale = numbers_of(numbers, 2)[2]
    c = tl.arange(0, BLOCK)
    there = c < x.channels
    m = tl.full([BLOCK], LOW, tl.float32)
    z = tl.zeros([BLOCK], tl.float32)
    g = tl.zeros([BLOCK], tl.float32)
    n = tl.cast(n, tl.int64)
    for split in range(0, splits):
        at = x.partial + (n * splits + split) * 3 * x.channels + c
        m_new = tl.load(at, mask=there, other=0.0)
        z_new = tl.load(at + x.channels, mask=there, other=0.0)
        g += tl.load(at + 2 * x.channels, mask=there, other=0.0)
        new = tl.maximum(m, m_new)
        base = finite_max(new)
        z = z * tl.exp2((m - base) * scale) + z_new * tl.exp2((m_new - base) * scale)
        m = new
    g = g / x.positions
    mean = tl.sum(g, 0) / x.channels
    r = tl.where(mean == 0, 1.0, g / mean)  # all-zero features: all channels alike
    v = tl.where(there, r, LOW) / numbers_of(numbers, 2)[0]
    v = tl.exp(v - tl.max(v, 0))
    w = v / tl.sum(v, 0)
    w = tl.where(mean == mean, w, mean)  # NaN stays NaN where a maximum would drop it
    end = 2 * x.positions + 4 * x.channels
    out = x.stats + n * x.row + 2 * x.positions
    store_each(out + c, x.channels, (m, 1.0 / z, w, r), there)
    last = tl.arange(0, 32)  # the two numbers of the sample, and zeros up to the end of its row
    sums = tl.where(last == 0, mean, tl.where(last == 1, tl.sum(tl.where(there, w * r, 0.0), 0), 0.0))
    tl.store(out + 4 * x.channels + last, sums, mask=end + last < x.row)


@triton.jit(do_not_specialize=["samples", "splits_s", "splits_t"])
def channel_weights_kernel(s, t, splits_s, splits_t, samples, numbers, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr):
    """One program a sample and network."""
    program = tl.program_id(0)
    if program < samples:
        _channel_weights(s, splits_s, program, numbers, BLOCK_S)
    elif t is not None:
        _channel_weights(t, splits_t, program - samples, numbers, BLOCK_T)


@triton.jit
def _weights(x, n, c):
    """m, 1/z, w and r of these channels, 0 past the last."""
    at = x.stats + n * x.row + 2 * x.positions + c
    m = tl.load(at, mask=c < x.channels, other=0.0)
    over_z = tl.load(at + x.channels, mask=c < x.channels, other=0.0)
    w = tl.load(at + 2 * x.channels, mask=c < x.channels, other=0.0)
    return m, over_z, w, tl.load(at + 3 * x.channels, mask=c < x.channels, other=0.0)


@triton.jit
def _maps(x, program, scale, TILE: tl.constexpr):
    """A and B at a block of positions, over all the channels: the second read of the features."""
    blocks = tl.cdiv(x.positions, TILE.positions)
    n = (program // blocks).to(tl.int64)
    p = along(program % blocks * TILE.positions, TILE.positions)
    inside = p < x.positions
    features = x.features + n * x.channels * x.positions
    a = tl.full([TILE.channels, TILE.positions], 0.0, tl.float32)
    b = tl.full([TILE.channels, TILE.positions], 0.0, tl.float32)
    for start in range(0, x.channels, TILE.channels * TILE.unroll):
        tiles = ()
        for u in tl.static_range(tl.constexpr(TILE.unroll)):
            c = along(start + u * TILE.channels, TILE.channels)
            tiles += (read_tile(features, c, p, x.positions, x.channels, x.positions, TILE),)
        for u in tl.static_range(tl.constexpr(TILE.unroll)):
            c = along(start + u * TILE.channels, TILE.channels)
            m, over_z, w, r = _weights(x, n, c)
            e = tl.exp2((tiles[u].to(tl.float32) - m[:, None]) * scale)
            a += e * (w * over_z)[:, None]
            b += e * (w * over_z * r)[:, None]
    total = tl.sum(a, 0)
    tl.store(x.stats + n * x.row + p, total, mask=inside)
    tl.store(x.stats + n * x.row + x.positions + p, tl.sum(b, 0), mask=inside)
    tl.store(x.map + n * x.positions + p, total, mask=inside)


@triton.jit(do_not_specialize=["programs_s"])
def maps_kernel(s, t, programs_s, numbers, TILE_S: tl.constexpr, TILE_T: tl.constexpr):
    """From the last sample to the first: what the statistics have read last still lies in L2. Backward turns again."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    scale = numbers_of(numbers, 2)[2]
    if program < programs_s:
        _maps(s, program, scale, TILE_S)
    elif t is not None:
        _maps(t, program - programs_s, scale, TILE_T)


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
def kl_kernel(s, t, loss, grad_map, factor, BLOCK: tl.constexpr):
    """loss[n] = factor * KL(A~T || A~S), grad_map = its gradient with respect to A^S. One program a sample."""
    n = tl.program_id(0).to(tl.int64)
    floor = tl.full([], EPS, tl.float32) / s.positions
    keep = 1.0 - tl.full([], EPS, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, s.positions, BLOCK):
        p = start + tl.arange(0, BLOCK)
        inside = p < s.positions
        raw_s = tl.load(s.stats + n * s.row + p, mask=inside, other=0.0)
        raw_t = tl.load(t.stats + n * t.row + p, mask=inside, other=0.0)
        a_s = keep * raw_s + floor
        a_t = keep * raw_t + floor
        total += tl.where(inside, _divergence(a_t, a_s, keep * (raw_s - raw_t)), 0.0)
        if grad_map is not None:
            tl.store(grad_map + n * s.positions + p, -factor * keep * a_t / a_s, mask=inside)
    tl.store(loss + n, tl.sum(total, 0) * factor)


@triton.jit
def center_kernel(x, grad_map, centered, products, BLOCK: tl.constexpr):
    """centered = D - sum_i A_i D_i; products[n] = the sums of A and of B times that. One program a sample.

    A constant added to D changes nothing but what cancels: with the mean taken out, next to nothing does.
    """
    n = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, x.positions, BLOCK):
        p = start + tl.arange(0, BLOCK)
        a = tl.load(x.stats + n * x.row + p, mask=p < x.positions, other=0.0)
        total += a * tl.load(grad_map + n * x.positions + p, mask=p < x.positions, other=0.0)
    mean = tl.sum(total, 0)
    a_d = tl.zeros([BLOCK], tl.float32)
    b_d = tl.zeros([BLOCK], tl.float32)
    for start in range(0, x.positions, BLOCK):
        p = start + tl.arange(0, BLOCK)
        inside = p < x.positions
        d = tl.load(grad_map + n * x.positions + p, mask=inside, other=0.0) - mean
        a_d += tl.load(x.stats + n * x.row + p, mask=inside, other=0.0) * d
        b_d += tl.load(x.stats + n * x.row + x.positions + p, mask=inside, other=0.0) * d
        tl.store(centered + n * x.positions + p, d, mask=inside)
    tl.store(products + 2 * n, tl.sum(a_d, 0))
    tl.store(products + 2 * n + 1, tl.sum(b_d, 0))


@triton.jit
def _by_magnitude(x, rho, w, products, n, channel_t):
    """dloss/dg_c / HW: what the gradient of a feature gets times its sign."""
    numbers = x.stats + n * x.row + 2 * x.positions + 4 * x.channels
    mean = tl.load(numbers)
    a_d = tl.load(products + 2 * n)
    pull = (tl.load(products + 2 * n + 1) - a_d * tl.load(numbers + 1)) / channel_t / x.channels
    s = w / channel_t * (rho - a_d)  # pull: (1/C) sum_k s_k r_k
    return tl.where(mean == 0, 0.0, (s - pull) / mean) / x.positions


@triton.jit(do_not_specialize=["splits", "steps"])
def rho_kernel(x, centered, splits, steps, numbers, TILE: tl.constexpr):
    """x.partial[n, split, c] = sum over the split's positions of P_ci D_i, for maps of more positions than a tile."""
    length = steps * (TILE.positions * TILE.unroll)
    program = tl.program_id(0)
    n, split, first_c, first, end = stretch(program, splits, length, x.channels, x.positions, TILE.channels)
    scale = numbers_of(numbers, 2)[2]
    c = along(first_c, TILE.channels)
    m, over_z, _w, _r = _weights(x, n, c)
    rho = tl.full([TILE.channels, TILE.positions], 0.0, tl.float32)
    for start in range(first, end, TILE.positions * TILE.unroll):
        tiles = read(x.features + n * x.channels * x.positions, c, start, end, x.channels, x.positions, TILE)
        for u in tl.static_range(tl.constexpr(TILE.unroll)):
            p = along(start + u * TILE.positions, TILE.positions)
            d = tl.load(centered + n * x.positions + p, mask=p < end, other=0.0)
            rho += tl.exp2((tiles[u].to(tl.float32) - m[:, None]) * scale) * d[None, :]
    tl.store(x.partial + (n * splits + split) * x.channels + c, tl.sum(rho, 1) * over_z, mask=c < x.channels)


@triton.jit(do_not_specialize=["splits"])
def write_kernel(x, centered, products, grad, splits, numbers, WHOLE: tl.constexpr, TILE: tl.constexpr):
    """The gradient of TILE.unroll tiles, one after another along the channels: the last read, and the write.

    WHOLE: a tile has all the positions, and rho_kernel is not needed. Else it has read the last sample last.
    """
    channel_t = numbers_of(numbers, 2)[0]
    tau = numbers_of(numbers, 2)[1]
    scale = numbers_of(numbers, 2)[2]
    program = tl.program_id(0)
    if not WHOLE:
        program = tl.num_programs(0) - 1 - program
    blocks = tl.cdiv(x.positions, TILE.positions)
    n, _split, first_c, first, _end = stretch(
        program, blocks, TILE.positions, x.channels, x.positions, TILE.channels * TILE.unroll
    )
    p = along(first, TILE.positions)
    inside = p < x.positions
    d = tl.load(centered + n * x.positions + p, mask=inside, other=0.0)
    for start in range(first_c, tl.minimum(first_c + TILE.channels * TILE.unroll, x.channels), TILE.channels):
        c = along(start, TILE.channels)
        known = c < x.channels
        there = known[:, None] & inside[None, :]
        at = n * x.channels * x.positions + offsets(c, p, x.channels, x.positions, TILE.last)
        f = tl.load(x.features + at, mask=there, other=LOW).to(tl.float32)
        m, over_z, w, _r = _weights(x, n, c)
        e = tl.exp2((f - m[:, None]) * scale)
        rho = tl.zeros_like(over_z)
        if WHOLE:
            rho = tl.sum(e * d[None, :], 1) * over_z
        else:
            for split in range(0, splits):
                rho += tl.load(x.partial + (n * splits + split) * x.channels + c, mask=known, other=0.0)
        by_g = _by_magnitude(x, rho, w, products, n, channel_t)[:, None]
        sign = tl.where(f > 0, by_g, tl.where(f < 0, -by_g, 0.0))
        g = e * (w * over_z / tau)[:, None] * (d[None, :] - rho[:, None]) + sign
        tl.store(grad + at, g.to(grad.dtype.element_ty), mask=there)
