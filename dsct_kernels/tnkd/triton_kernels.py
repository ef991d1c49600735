"""TNKD (and the pixel cross-entropy) in Triton: the kernels that triton.py launches.

For every pixel, with e_j = exp(logit_j / tau) relative to the largest but the target's, and e_y left out:

    u    = logit_y / tau - log(sum e)        b = sigmoid(u)
    TCKD = b^T (softplus(-u^S) - softplus(-u^T)) + (1 - b^T) (softplus(u^S) - softplus(u^T))
    NCKD = sum e^T (log e^T - log e^S) / sum e^T - log(sum e^T) + log(sum e^S)

COUPLED: (1 - b^T) NCKD takes the place of NCKD; with equal weights the sum is plain KD, the KL of the whole softmax.

A tile is CLASSES x PIXELS, at any strides. Exponents are one fused multiply-add, rounded once, relative to their size:
exact where the logits are close, for |logit| / tau up to 10^8 (above, the shift's own rounding leaves float32's range).
"""

# mypy: ignore-errors

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .. import triton_common

LOG2_E = tl.constexpr(triton_common.LOG2_E)
LN_2 = tl.constexpr(triton_common.LN_2)


@triton.jit
def _reciprocal(x, FAST: tl.constexpr):
    """1 / x. FAST: the hardware's, good to one unit in the last place, in place of nine instructions."""
    if FAST:
        return libdevice.fast_dividef(1.0, x)
    return 1.0 / x


@triton.jit
def _log(x, ACC: tl.constexpr):
    """log(x) of a sum of exponentials: positive and normal, or NaN, which stays NaN. Shorter than tl.log."""
    if tl.float64 == ACC:  # with an else: Triton compiles what follows a return, and a float64 has no 32 bits to take
        log = tl.log(x)
    else:
        bits = x.to(tl.int32, bitcast=True)
        exponent = (bits - 0x3F3504F3) & -0x800000  # of the power of two that leaves a mantissa in [0.707, 1.414)
        f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
        z = f * f
        p = 7.0376836292e-2
        p = p * f - 1.1514610310e-1
        p = p * f + 1.1676998740e-1
        p = p * f - 1.2420140846e-1
        p = p * f + 1.4249322787e-1
        p = p * f - 1.6668057665e-1
        p = p * f + 2.0000714765e-1
        p = p * f - 2.4999993993e-1
        p = p * f + 3.3333331174e-1
        f += z * (f * p - 0.5)
        log = exponent.to(tl.float32) * 8.262958405176314e-8 + f + (x - x)  # log(2) / 2^23; NaN - NaN
    return log


@triton.jit
def _log1p(e, ACC: tl.constexpr):
    """log(1 + e) for 0 <= e <= 1, relative to its size: tiny e gives e. A polynomial, exact to 5e-9 before rounding."""
    if tl.float64 == ACC:
        more = 1.0 + e
        return tl.where(more == 1.0, e, tl.log(more) * (e / (more - 1.0)))
    p = -0.0032563784727292254
    p = p * e + 0.019907160925644585
    p = p * e - 0.05706420076122008
    p = p * e + 0.10614264687062452
    p = p * e - 0.15311863102217202
    p = p * e + 0.19678117256353023
    p = p * e - 0.2495455887108236
    p = p * e + 0.333300040352213
    p = p * e - 0.4999990399276394
    return (p * e + 1.0) * e


@triton.jit
def _expm1_tail(x):
    """(exp(x) - 1 - x) / x^2 for |x| <= 1, exact to 2e-9."""
    p = 2.812654656736413e-06
    p = p * x + 2.5358644052175805e-05
    p = p * x + 0.00019836986029986292
    p = p * x + 0.0013885394437238574
    p = p * x + 0.00833334494382143
    p = p * x + 0.04166673496365547
    p = p * x + 0.1666666716337204
    return p * x + 0.5


@triton.jit
def _finite_max(m):
    """A maximum that may be subtracted: -inf (nothing there) becomes 0."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _weighted(weight, part):
    """A part with weight 0 takes no part: 0 * inf would be NaN. But a NaN is never hidden."""
    return tl.where(weight == 0, tl.where(part == part, 0.0, part), weight * part)


@triton.jit
def _numbers(values, tau, over_tau, tckd_weight, nckd_weight, ce_weight, WITH_CE: tl.constexpr):
    """Temperature, its reciprocal and the three weights, as they came or, where there are `values`, from device memory,
    in float64, to be rounded once. Nobody has looked at those: what the host refuses makes every loss NaN."""
    if values is not None:
        if WITH_CE:  # else its weight, the first, is not among them
            ce_weight = tl.load(values)
            values += 1
        tckd_weight = tl.load(values)
        nckd_weight = tl.load(values + 1)
        tau = tl.load(values + 2)
        least = tl.minimum(tl.minimum(ce_weight, tckd_weight), nckd_weight)  # drops a NaN, which the sum does not
        tau = tl.where(tau > 0, tau, float("nan"))
        tau = tl.where(least >= 0, tau, float("nan"))
        tau = tl.where(ce_weight + tckd_weight + nckd_weight + tau < float("inf"), tau, float("nan"))
        over_tau = 1.0 / tau
    return tau, over_tau, tckd_weight, nckd_weight, ce_weight


@triton.jit
def _ignored(ignore_at, ignore):
    """ignore_index, as it came or from device memory."""
    if ignore_at is not None:
        ignore = tl.load(ignore_at)
    return ignore


@triton.jit
def _pixel(shift_s, shift_t, shift_1, sum_s, sum_t, sum_1, y_s, y_t, cross, to_2, to_2_tau, tau, tckd_weight,
           nckd_weight, ce_factor, mean_factor, TWO_CLASSES: tl.constexpr, COUPLED: tl.constexpr,
           WITH_CE: tl.constexpr, FAST: tl.constexpr, NEAR: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Sums over the classes of one network pair -> the three terms, and the four factors of the gradient.

    sum: of e_j = exp2(x_j * to_2_tau - shift), sum_1: at temperature 1; y: the target's logit; cross: sum of e^T_j
    times the difference of the exponents. The shift is a rounded product: 2^its error is in every e_j of the pixel and
    in y's exponent alike, and cancels. Gradient: by_s * e^S_j + by_t * e^T_j + by_1 * e1_j, and at_y for the target.
    """
    ln_2 = tl.full([], LN_2, ACC)
    none_s = sum_s == 0  # every other class absent: the target has all the mass
    none_t = sum_t == 0
    sum_s = tl.where(none_s, 1.0, sum_s)
    sum_t = tl.where(none_t, 1.0, sum_t)
    over_s = _reciprocal(sum_s, FAST)
    over_t = _reciprocal(sum_t, FAST)
    log_t = _log(sum_t, ACC)
    ratio = sum_s * over_t
    ratio += tl.fma(-ratio, sum_t, sum_s) * over_t  # what was rounded away: equal sums have the ratio 1, its log is 0
    log_ratio = _log(ratio, ACC)
    u_s = tl.where(none_s, float("inf"), tl.fma(tl.fma(y_s, to_2_tau, -shift_s), ln_2, -(log_t + log_ratio)))
    u_t = tl.where(none_t, float("inf"), tl.fma(tl.fma(y_t, to_2_tau, -shift_t), ln_2, -log_t))
    # +inf is no number to learn from, and would pass for an absence of others, which in turn would hide a NaN
    u_s = tl.where(y_s < float("inf"), u_s, float("nan"))
    u_t = tl.where(y_t < float("inf"), u_t, float("nan"))
    if TWO_CLASSES:  # one beside the target: nothing to compare, not even where the student has it at -inf
        nckd = log_ratio * 0.0
        if COUPLED:  # which the sum of KD does tell
            nckd = tl.where(none_s, float("inf"), nckd)
        else:
            nckd_weight = nckd_weight * 0.0
    else:
        nckd = cross * over_t * ln_2 + log_ratio
        nckd = tl.where(none_s, float("inf"), nckd)
        nckd = tl.where(none_t, 0.0, nckd)
        nckd_weight = tl.where(none_t, 0.0, nckd_weight)  # a teacher without other classes: nothing to learn from it
    # Both seen from the teacher's less likely side (v_t <= 0). With p = sigmoid(v_t) and delta = v_s - v_t,
    # TCKD = softplus(v_s) - softplus(v_t) - p delta = log(1 + p (exp(delta) - 1)) - p delta:
    # the second form near the teacher, where the first would cancel, the first away from it, where nothing overflows.
    side = tl.where(u_t > 0, -1.0, 1.0)
    v_s = u_s * side
    v_t = u_t * side
    e_s = tl.exp2(tl.abs(v_s) * -LOG2_E)
    e_t = tl.exp2(tl.abs(v_t) * -LOG2_E)
    more_t = _reciprocal(1.0 + e_t, FAST)
    less_t = e_t * more_t
    more_s = _reciprocal(1.0 + e_s, FAST)
    side_s = more_s * tl.where(v_s >= 0, 1.0, e_s)
    # 0 * log 0 = 0: a side that the teacher gives no mass adds nothing, however far off the student is
    rare = tl.where(less_t == 0, 0.0, less_t * (tl.maximum(-v_s, 0.0) + v_t))
    far = more_t * tl.maximum(v_s, 0.0) + rare
    x = (e_s - e_t) * more_t  # softplus(v_s) - softplus(v_t) less what is above 0: log(1 + x)
    rest = far
    if NEAR:
        delta = v_s - v_t
        near = tl.abs(delta) < 1.0
        x = tl.where(near, less_t * (delta + delta * delta * _expm1_tail(delta)), x)
        rest = tl.where(near, -less_t * delta, far)
    one_more = 1.0 + x
    lost = (x - (one_more - 1.0)) * _reciprocal(one_more, FAST)  # where both are sure, all there is
    tckd = _log(one_more, ACC) + lost + rest
    gap = side_s - less_t
    gap *= side  # b^S - b^T
    if COUPLED:
        others_s = tl.where(u_t > 0, side_s, more_s * tl.where(v_s >= 0, e_s, 1.0))  # 1 - b^S
        others_t = tl.where(u_t > 0, less_t, more_t)
        nckd = tl.where(others_t == 0, 0.0, others_t * nckd)
        by_s = (tau * mean_factor) * (tckd_weight * others_s + (nckd_weight - tckd_weight) * others_t) * over_s
        by_t = (-tau * mean_factor * nckd_weight) * others_t * over_t
    else:
        by_s = (tau * mean_factor) * (nckd_weight - tckd_weight * gap) * over_s
        by_t = (-tau * mean_factor * nckd_weight) * over_t
    at_y = (tau * mean_factor * tckd_weight) * gap
    ce = gap
    by_1 = gap
    if WITH_CE:
        u_1 = tl.where(none_s, float("inf"), tl.fma(tl.fma(y_s, to_2, -shift_1), ln_2, -_log(sum_1, ACC)))
        e_1 = tl.exp2(tl.abs(u_1) * -LOG2_E)
        missed = _reciprocal(1.0 + e_1, FAST) * tl.where(u_1 >= 0, e_1, 1.0)
        ce = tl.maximum(-u_1, 0.0) + _log1p(e_1, ACC)
        by_1 = ce_factor * missed * tl.where(none_s, 0.0, _reciprocal(sum_1, FAST))
        at_y -= ce_factor * missed
    return ce, tckd, nckd, by_s, by_t, by_1, at_y


@triton.jit
def _place(program, blocks, size_1, size_2, RANK: tl.constexpr):
    """Where in the RANK folded dimensions (three of a program's, one in blocks) a program is, by 32-bit divisions."""
    if RANK == 1:
        i_2 = program * 0
        block = program
    else:
        i_2 = program // blocks
        block = program % blocks
    i_1 = program * 0
    i_0 = program * 0
    if RANK > 2:
        i_1 = i_2 // size_2
        i_2 = i_2 % size_2
        if RANK > 3:
            i_0 = i_1 // size_1
            i_1 = i_1 % size_1
    return i_0.to(tl.int64), i_1.to(tl.int64), i_2.to(tl.int64), block.to(tl.int64)


@triton.jit(do_not_specialize=["size_1", "size_2", "blocks", "total_blocks", "ignore"])
def count_kernel(target, class_weight, counts, weights, size_1, size_2, inner, blocks, total_blocks, num_classes,
                  stride_0, stride_1, stride_2, stride_p, ignore, ignore_at,
                  HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr,
                  ACC: tl.constexpr):  # fmt: skip
    """counts[program] = its valid labels, weights[program] = their class weights added up."""
    ignore = _ignored(ignore_at, ignore)
    count = tl.zeros([BLOCK], tl.int64)
    weight = tl.zeros([BLOCK], ACC)
    for block in range(tl.program_id(0), total_blocks, tl.num_programs(0)):
        i_0, i_1, i_2, start = _place(block, blocks, size_1, size_2, RANK)
        start *= BLOCK
        at = i_0 * stride_0 + i_1 * stride_1 + i_2 * stride_2
        p = tl.arange(0, BLOCK)
        inside = p < inner - start
        label = tl.load(target + at + start * stride_p + p.to(tl.int64) * stride_p, mask=inside, other=0).to(tl.int64)
        valid = inside
        if HAS_IGNORE:
            valid = inside & (label != ignore)
        count += valid.to(tl.int64)
        if HAS_WEIGHT:
            known = valid & (label >= 0) & (label < num_classes)
            weight += tl.load(class_weight + label, mask=known, other=0.0)
    tl.store(counts + tl.program_id(0), tl.sum(count, 0))
    if HAS_WEIGHT:
        tl.store(weights + tl.program_id(0), tl.sum(weight, 0))


@triton.jit
def _totals(counts, weights, num_counts, num_pixels, HAS_COUNT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
            COUNTS: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """The number of valid pixels and the sum of their class weights, added in the same order by everyone who asks."""
    i = tl.arange(0, COUNTS)
    count = tl.full([], num_pixels, ACC)
    if HAS_COUNT:
        count = tl.sum(tl.load(counts + i, mask=i < num_counts, other=0), 0).to(ACC)
    weight = count
    if HAS_WEIGHT:
        weight = tl.sum(tl.load(weights + i, mask=i < num_counts, other=0.0), 0)
    return count, weight


@triton.jit
def _factors(counts, weights, largest_weight, num_counts, num_pixels, gathered, tau, tckd_weight, nckd_weight,
             ce_weight, MEAN_: tl.constexpr, FLOAT16: tl.constexpr, HAS_COUNT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
             WITH_CE: tl.constexpr, COUNTS: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """What the gradient of CE and of the TNKD terms is multiplied by, ce_weight/weights and 1/count, both divided by
    the third: the power of two that is left to grad_scale. gathered: how many pixels a logit may have, by weight."""
    ce_factor = tl.full([], ce_weight, ACC)
    mean_factor = tl.full([], 1.0, ACC)
    outside = tl.full([], 1.0, ACC)
    if MEAN_:
        count, weight = _totals(counts, weights, num_counts, num_pixels, HAS_COUNT, HAS_WEIGHT, COUNTS, ACC)
        mean_factor = tl.where(count > 0, 1.0 / count, 0.0)
        ce_factor = tl.where(weight > 0, ce_factor * (1.0 / weight), 0.0)
    if FLOAT16:
        bound = tau * (tckd_weight + nckd_weight) * mean_factor
        if WITH_CE:
            if HAS_WEIGHT:
                bound += ce_factor * tl.load(largest_weight)
            else:
                bound += ce_factor
        outside = _float16_scale(bound * gathered, ACC)
        mean_factor /= outside
        ce_factor /= outside
    return ce_factor, mean_factor, outside


@triton.jit
def _float16_scale(bound, ACC: tl.constexpr):
    """The power of two that a float16 gradient is stored divided by, of a bound on its entries.

    It has to wait for the upstream gradient, often a GradScaler's 65536, with its digits: what is smaller than 6e-5, as
    a mean over many pixels is, would lose them. Divided by this it rounds once, and no entry reaches 2^15; float16 ends
    at 65504. From the bound's exponent bits: the host is not asked.
    """
    bound = bound.to(tl.float32)
    power = tl.maximum(bound, 1.9259299443872359e-34).to(tl.int32, bitcast=True) & 0x7F800000  # 2^-112: no subnormal
    scale = power.to(tl.float32, bitcast=True) * 6.103515625e-05  # 2^-14
    return tl.where((bound > 0) & (bound < float("inf")), scale, 1.0).to(ACC)


@triton.jit
def _labels(label, class_weight, inside, num_classes, ignore, HAS_IGNORE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
            ACC: tl.constexpr):  # fmt: skip
    """Label, whether the pixel counts, whether the label is a class, its weight."""
    label = label.to(tl.int64)
    valid = inside
    if HAS_IGNORE:
        valid = inside & (label != ignore)
    known = (label >= 0) & (label < num_classes)
    weight = tl.where(valid, 1.0, 0.0).to(ACC)
    if HAS_WEIGHT:
        weight = tl.load(class_weight + label, mask=valid & known, other=0.0)
    return tl.where(known, label, -1).to(tl.int32), valid, known, weight


@triton.jit
def _read(at, step, inside, k, NUM_CLASSES: tl.constexpr, CHUNKS: tl.constexpr, CLASSES: tl.constexpr,
          WHOLE: tl.constexpr):  # fmt: skip
    """Every logit of the tile, once (only the last chunk may need a mask for its classes)."""
    tiles = ()
    for c in tl.static_range(CHUNKS):
        if (c + 1) * CLASSES > NUM_CLASSES:
            there = inside & (c * CLASSES + k < NUM_CLASSES)
            tiles += (tl.load(at + c * step, mask=there, other=float("-inf")),)
        elif WHOLE:
            tiles += (tl.load(at + c * step),)
        else:
            tiles += (tl.load(at + c * step, mask=inside, other=float("-inf")),)
    return tiles


@triton.jit
def _likeliest(tiles, k, CHUNKS: tl.constexpr, CLASSES: tl.constexpr):
    """The class of the largest logit, the first of equals."""
    best = tiles[0]
    for c in tl.static_range(1, CHUNKS):
        best = tl.maximum(best, tiles[c])
    best = tl.max(best, 0, keep_dims=True)
    first = tl.where(tiles[0] == best, k, 2147483647)
    for c in tl.static_range(1, CHUNKS):
        first = tl.minimum(first, tl.where(tiles[c] == best, c * CLASSES + k, 2147483647))
    return tl.min(first, 0, keep_dims=True) + k * 0


@triton.jit
def _aside(tiles, y, k, CHUNKS: tl.constexpr, CLASSES: tl.constexpr, ACC: tl.constexpr):
    """The target's logit, the others (-inf in its place) and their maximum."""
    low = float("-inf")
    others = ()
    at_y = tl.zeros(tiles[0].shape, ACC)
    top = tl.full(tiles[0].shape, low, ACC)
    for c in tl.static_range(CHUNKS):
        is_y = c * CLASSES + k == y
        x = tiles[c].to(ACC)
        at_y = tl.where(is_y, x, at_y)
        others += (tl.where(is_y, low, x),)
        top = tl.maximum(top, others[c])
    return tl.sum(at_y, 0, keep_dims=True) + k * 0.0, others, _finite_max(tl.max(top, 0, keep_dims=True))


@triton.jit
def _exponentials(others, scale, shift, CHUNKS: tl.constexpr, ACC: tl.constexpr):
    """exp2(others * scale - shift), and their sum."""
    found = ()
    total = tl.zeros(others[0].shape, ACC)
    for c in tl.static_range(CHUNKS):
        found += (tl.exp2(tl.fma(others[c], scale, -shift)),)
        total += found[c]
    return found, tl.sum(total, 0, keep_dims=True)


@triton.jit
def _cross(s_others, t_others, e_t, scale, shift_s, shift_t, CHUNKS: tl.constexpr, ACC: tl.constexpr):
    """The sum of e^T times the difference of the exponents, a class that the teacher gives nothing left out."""
    cross = tl.zeros(e_t[0].shape, ACC)
    for c in tl.static_range(CHUNKS):
        apart = tl.fma(t_others[c], scale, -shift_t) - tl.fma(s_others[c], scale, -shift_s)
        cross += e_t[c] * tl.where(e_t[c] == 0, 0.0, apart)
    return tl.sum(cross, 0, keep_dims=True)


@triton.jit
def _judged(s_tiles, t_tiles, y, known, weight, k, to_2, to_2_tau, tau, tckd_weight, nckd_weight, ce_factor,
            mean_factor, NUM_CLASSES: tl.constexpr, CHUNKS: tl.constexpr, CLASSES: tl.constexpr,
            COUPLED: tl.constexpr, WITH_CE: tl.constexpr, FAST: tl.constexpr, NEAR: tl.constexpr,
            ACC: tl.constexpr):  # fmt: skip
    """The terms of the tile's pixels, and what makes their gradient: exponentials and factors."""
    y_s, s_others, top_s = _aside(s_tiles, y, k, CHUNKS, CLASSES, ACC)
    y_t, t_others, top_t = _aside(t_tiles, y, k, CHUNKS, CLASSES, ACC)
    shift_s = top_s * to_2_tau
    shift_t = top_t * to_2_tau
    e_s, sum_s = _exponentials(s_others, to_2_tau, shift_s, CHUNKS, ACC)
    e_t, sum_t = _exponentials(t_others, to_2_tau, shift_t, CHUNKS, ACC)
    e_1 = e_s
    sum_1 = sum_s
    if WITH_CE:
        e_1, sum_1 = _exponentials(s_others, to_2, top_s * to_2, CHUNKS, ACC)
    cross = _cross(s_others, t_others, e_t, to_2_tau, shift_s, shift_t, CHUNKS, ACC)
    y_s = tl.where(known, y_s, float("nan"))  # a bad label: NaN spreads to the loss and every factor
    ce, tckd, nckd, by_s, by_t, by_1, at_y = _pixel(
        shift_s, shift_t, top_s * to_2, sum_s, sum_t, sum_1, y_s, y_t, cross, to_2, to_2_tau, tau, tckd_weight,
        nckd_weight, ce_factor * weight, mean_factor, NUM_CLASSES == 2, COUPLED, WITH_CE, FAST, NEAR,
        ACC)  # fmt: skip
    return ce, tckd, nckd, by_s, e_s, by_t, e_t, by_1, e_1, at_y


@triton.jit
def _gradient(c, k, y, by_s, e_s, by_t, e_t, by_1, e_1, at_y, CLASSES: tl.constexpr, WITH_CE: tl.constexpr):
    """The gradient of a chunk's logits; y: -2 where the pixel does not count."""
    g = by_s * e_s[c] + by_t * e_t[c]
    if WITH_CE:
        g += by_1 * e_1[c]
    g = tl.where(c * CLASSES + k == y, at_y, g)
    return tl.where(y != -2, g, 0.0)


@triton.jit
def _write(at, step, inside, k, y, by_s, e_s, by_t, e_t, by_1, e_1, at_y, NUM_CLASSES: tl.constexpr,
           CHUNKS: tl.constexpr, CLASSES: tl.constexpr, WHOLE: tl.constexpr, WITH_CE: tl.constexpr):  # fmt: skip
    """The gradient of the tile."""
    out = at.dtype.scalar.element_ty
    for c in tl.static_range(CHUNKS):
        g = _gradient(c, k, y, by_s, e_s, by_t, e_t, by_1, e_1, at_y, CLASSES, WITH_CE).to(out)
        if (c + 1) * CLASSES > NUM_CLASSES:
            tl.store(at + c * step, g, mask=inside & (c * CLASSES + k < NUM_CLASSES))
        elif WHOLE:
            tl.store(at + c * step, g)
        else:
            tl.store(at + c * step, g, mask=inside)


@triton.jit
def _counted(ce, tckd, nckd, valid, known, weight, tau, WITH_CE: tl.constexpr):
    """The terms as they are added up: an ignored pixel's NaN is dropped by selection, never by multiplication."""
    tckd = tl.where(valid, tckd, 0.0) * (tau * tau)
    nckd = tl.where(valid, tl.where(known, nckd, float("nan")), 0.0) * (tau * tau)
    if WITH_CE:
        ce = tl.where(valid & (known == 0), float("nan"), tl.where(weight == 0, 0.0, ce * weight))
    return ce, tckd, nckd


@triton.jit
def _store_sums(partial, ce_sum, tckd_sum, nckd_sum, k, WITH_CE: tl.constexpr):
    """The sums of this program, each pixel once."""
    at = partial + tl.program_id(0)
    if WITH_CE:
        tl.store(at, tl.sum(tl.where(k == 0, ce_sum, 0.0)))
    tl.store(at + tl.num_programs(0), tl.sum(tl.where(k == 0, tckd_sum, 0.0)))
    tl.store(at + 2 * tl.num_programs(0), tl.sum(tl.where(k == 0, nckd_sum, 0.0)))


# What changes with the batch is not specialised: Triton would compile anew where it becomes 1 or a multiple of 16.
@triton.jit(do_not_specialize=["num_pixels", "num_counts", "size_1", "size_2", "blocks", "tiles", "ignore"])
def tnkd_kernel(
    student, teacher, target, class_weight, largest_weight, counts, weights, grad, loss_map, partial,
    num_pixels, num_counts, size_1, size_2, inner, blocks, tiles,
    s_k, s_0, s_1, s_2, s_p, t_k, t_0, t_1, t_2, t_p, g_k, g_0, g_1, g_2, g_p,
    y_0, y_1, y_2, y_p, l_0, l_1, l_2, l_p,
    tau_: tl.float64, over_tau_: tl.float64, tckd_weight_: tl.float64, nckd_weight_: tl.float64,
    ce_weight_: tl.float64, ignore, values, ignore_at,
    NUM_CLASSES: tl.constexpr, CHUNKS: tl.constexpr, PIXELS: tl.constexpr, CLASSES: tl.constexpr, RANK: tl.constexpr,
    DENSE: tl.constexpr, WHOLE: tl.constexpr, HAS_TARGET: tl.constexpr, HAS_IGNORE: tl.constexpr,
    HAS_COUNT: tl.constexpr, HAS_WEIGHT: tl.constexpr, WITH_CE: tl.constexpr, NEEDS_GRAD: tl.constexpr,
    NONE_: tl.constexpr, MEAN_: tl.constexpr, FLOAT16: tl.constexpr, COUPLED: tl.constexpr, COUNTS: tl.constexpr,
    FAST: tl.constexpr, NEAR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Loss and gradient, PIXELS pixels at a time: tile after tile, as many apart as there are programs.

    WHOLE: every pixel of every tile exists, and no access needs a mask for it. DENSE: channels_last without gaps, so
    that the compiler knows how far apart pixels are, and makes wider accesses where classes come in twos or fours.
    All that is one number a pixel is kept CLASSES x PIXELS, the same in every row: in the layout of the logits, so that
    nothing moves between threads but the sums over classes.
    """
    tau_, over_tau_, tckd_weight_, nckd_weight_, ce_weight_ = _numbers(values, tau_, over_tau_, tckd_weight_,
                                                                       nckd_weight_, ce_weight_, WITH_CE)  # fmt: skip
    ignore = _ignored(ignore_at, ignore)
    tau = tl.full([], tau_, ACC)
    tckd_weight = tl.full([], tckd_weight_, ACC)
    nckd_weight = tl.full([], nckd_weight_, ACC)
    to_2 = tl.full([], LOG2_E, ACC)  # exp(x / tau) = exp2(x * to_2_tau)
    to_2_tau = tl.full([], over_tau_ * LOG2_E, ACC)  # from float64, rounded once
    ce_factor, mean_factor, _ = _factors(counts, weights, largest_weight, num_counts, num_pixels, 1.0, tau, tckd_weight,
                                         nckd_weight, ce_weight_, MEAN_, FLOAT16, HAS_COUNT, HAS_WEIGHT, WITH_CE,
                                         COUNTS, ACC)  # fmt: skip
    if DENSE:
        s_p = NUM_CLASSES
        t_p = NUM_CLASSES
        g_p = NUM_CLASSES
    k = tl.arange(0, CLASSES)[:, None]
    p = tl.arange(0, PIXELS)[None, :]
    k_wide = k.to(tl.int64)
    p_wide = p.to(tl.int64)  # a folded dimension may have more than 2^31
    s_step = tl.full([], CLASSES, tl.int64) * s_k
    t_step = tl.full([], CLASSES, tl.int64) * t_k
    g_step = tl.full([], CLASSES, tl.int64) * g_k
    ce_sum = tl.zeros([CLASSES, PIXELS], ACC)
    tckd_sum = tl.zeros([CLASSES, PIXELS], ACC)
    nckd_sum = tl.zeros([CLASSES, PIXELS], ACC)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        i_0, i_1, i_2, start_p = _place(tile, blocks, size_1, size_2, RANK)
        start_p *= PIXELS
        inside = (k >= 0) & (p >= 0)
        if not WHOLE:
            inside = inside & (p < inner - start_p)
        s_tiles = _read(student + (i_0 * s_0 + i_1 * s_1 + i_2 * s_2 + start_p * s_p) + (k_wide * s_k + p_wide * s_p),
                        s_step, inside, k, NUM_CLASSES, CHUNKS, CLASSES, WHOLE)  # fmt: skip
        t_tiles = _read(teacher + (i_0 * t_0 + i_1 * t_1 + i_2 * t_2 + start_p * t_p) + (k_wide * t_k + p_wide * t_p),
                        t_step, inside, k, NUM_CLASSES, CHUNKS, CLASSES, WHOLE)  # fmt: skip
        y_at = i_0 * y_0 + i_1 * y_1 + i_2 * y_2 + start_p * y_p + (k_wide * 0 + p_wide * y_p)
        if HAS_TARGET:
            label = tl.load(target + y_at, mask=inside, other=0)
        else:
            label = _likeliest(t_tiles, k, CHUNKS, CLASSES)
        y, valid, known, weight = _labels(label, class_weight, inside, NUM_CLASSES, ignore, HAS_IGNORE, HAS_WEIGHT, ACC)
        ce, tckd, nckd, by_s, e_s, by_t, e_t, by_1, e_1, at_y = _judged(
            s_tiles, t_tiles, y, known, weight, k, to_2, to_2_tau, tau, tckd_weight, nckd_weight, ce_factor,
            mean_factor, NUM_CLASSES, CHUNKS, CLASSES, COUPLED, WITH_CE, FAST, NEAR, ACC)  # fmt: skip
        if NEEDS_GRAD:
            # plus 0, but the compiler cannot know: else it keeps a predicate for each logit since the first
            # comparison, packed into registers, which took a third of all instructions
            y_late = tl.where(valid, y, -2) + (tau < 0).to(tl.int32)
            g_at = grad + (i_0 * g_0 + i_1 * g_1 + i_2 * g_2 + start_p * g_p) + (k_wide * g_k + p_wide * g_p)
            _write(g_at, g_step, inside, k, y_late, by_s, e_s, by_t, e_t, by_1, e_1, at_y, NUM_CLASSES, CHUNKS,
                   CLASSES, WHOLE, WITH_CE)  # fmt: skip

        ce, tckd, nckd = _counted(ce, tckd, nckd, valid, known, weight, tau, WITH_CE)
        tckd_sum += tckd
        nckd_sum += nckd
        if WITH_CE:
            ce_sum += ce
        if NONE_:
            value = _weighted(tckd_weight, tckd) + _weighted(nckd_weight, nckd)
            if WITH_CE:
                value += _weighted(tl.full([], ce_weight_, ACC), ce)
            l_at = loss_map + (i_0 * l_0 + i_1 * l_1 + i_2 * l_2 + start_p * l_p) + (k_wide * 0 + p_wide * l_p)
            tl.store(l_at, value, mask=inside & (k == 0))

    _store_sums(partial, ce_sum, tckd_sum, nckd_sum, k, WITH_CE)


@triton.jit(do_not_specialize=["num_programs", "num_counts", "num_pixels"])
def finish_kernel(partial, largest_weight, counts, weights, loss, parts, grad_scale, num_programs, num_counts,
                   num_pixels, gathered, tau_: tl.float64, tckd_weight_: tl.float64, nckd_weight_: tl.float64,
                   ce_weight_: tl.float64, values, NONE_: tl.constexpr, MEAN_: tl.constexpr, FLOAT16: tl.constexpr,
                   HAS_COUNT: tl.constexpr, HAS_WEIGHT: tl.constexpr, WITH_CE: tl.constexpr, COUNTS: tl.constexpr,
                   BLOCK: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """One program: the partial sums in a fixed order, the averages, the weighted loss."""
    tau_, _, tckd_weight_, nckd_weight_, ce_weight_ = _numbers(values, tau_, tau_, tckd_weight_, nckd_weight_,
                                                               ce_weight_, WITH_CE)  # fmt: skip
    ce = tl.zeros([BLOCK], ACC)
    tckd = tl.zeros([BLOCK], ACC)
    nckd = tl.zeros([BLOCK], ACC)
    for start in range(0, num_programs, BLOCK):
        i = start + tl.arange(0, BLOCK)
        there = i < num_programs
        if WITH_CE:
            ce += tl.load(partial + i, mask=there, other=0.0)
        tckd += tl.load(partial + num_programs + i, mask=there, other=0.0)
        nckd += tl.load(partial + 2 * num_programs + i, mask=there, other=0.0)
    ce = tl.sum(ce, 0)
    tckd = tl.sum(tckd, 0)
    nckd = tl.sum(nckd, 0)
    outside = tl.full([], 1.0, ACC)
    if MEAN_:
        count, weight = _totals(counts, weights, num_counts, num_pixels, HAS_COUNT, HAS_WEIGHT, COUNTS, ACC)
        over = tl.where(count > 0, 1.0 / count, 0.0)
        tckd *= over
        nckd *= over
        ce *= tl.where(weight > 0, 1.0 / weight, 0.0)
    if FLOAT16:
        _, _, outside = _factors(counts, weights, largest_weight, num_counts, num_pixels, gathered,
                                 tl.full([], tau_, ACC), tl.full([], tckd_weight_, ACC), tl.full([], nckd_weight_, ACC),
                                 ce_weight_, MEAN_, FLOAT16, HAS_COUNT, HAS_WEIGHT, WITH_CE, COUNTS, ACC)  # fmt: skip
    if not NONE_:
        value = _weighted(tl.full([], tckd_weight_, ACC), tckd) + _weighted(tl.full([], nckd_weight_, ACC), nckd)
        if WITH_CE:
            value += _weighted(tl.full([], ce_weight_, ACC), ce)
        tl.store(loss, value)
    tl.store(parts, tl.where(ce_weight_ == 0, 0.0, ce))  # what takes no part is reported 0
    tl.store(parts + 1, tckd)
    tl.store(parts + 2, nckd)
    tl.store(grad_scale, outside)


@triton.jit
def scale_kernel(grad, factor, total, BLOCK: tl.constexpr):
    """grad *= factor; a factor of exactly 1 is seen on the device, and nothing else is read or written.

    0 stays 0 whatever the factor is: an ignored pixel gets nothing of an upstream inf or NaN.
    """
    by = tl.load(factor)
    if by != 1.0:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        there = i < total
        value = tl.load(grad + i, mask=there)
        tl.store(grad + i, tl.where(value == 0, value, (value.to(by.dtype) * by).to(value.dtype)), mask=there)
