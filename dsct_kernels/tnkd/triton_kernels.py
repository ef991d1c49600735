"""TNKD (and the pixel cross-entropy) in Triton: the kernels that triton.py launches.

For every pixel, with d_j = logit_j - max_{k != y} logit_k, e_j = exp(d_j / tau) and e_y left out:

    u    = d_y / tau - log(sum e)            b = sigmoid(u)
    TCKD = b^T (softplus(-u^S) - softplus(-u^T)) + (1 - b^T) (softplus(u^S) - softplus(u^T))
    NCKD = sum e^T (d^T - d^S) / (tau sum e^T) - log(sum e^T) + log(sum e^S)

COUPLED: (1 - b^T) NCKD takes the place of NCKD; with equal weights the sum is plain KD, the KL of the whole softmax.

A tile is CLASSES x PIXELS, at any strides. Differences are taken before they are divided by tau: they are exact where
the logits are close, whatever their magnitude.
"""

# mypy: ignore-errors

import triton
import triton.language as tl
from triton.language.extra import libdevice


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
def _pixel(top_s, top_t, sum_s, sum_t, sum_1, y_s, y_t, cross, tau, over_tau, tckd_weight, nckd_weight, ce_factor,
           mean_factor, TWO_CLASSES: tl.constexpr, COUPLED: tl.constexpr, WITH_CE: tl.constexpr, FAST: tl.constexpr,
           NEAR: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Sums over the classes of one network pair -> the three terms, and the four factors of the gradient.

    top: max over j != y; sum: of exp((x_j - top) / tau), sum_1: at temperature 1; y: the target's logit;
    cross: sum of e^T_j (d^T_j - d^S_j). Gradient: by_s * e^S_j + by_t * e^T_j + by_1 * e1_j, and at_y for the target.
    """
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
    u_s = tl.where(none_s, float("inf"), (y_s - top_s) * over_tau - (log_t + log_ratio))
    u_t = tl.where(none_t, float("inf"), (y_t - top_t) * over_tau - log_t)
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
        nckd = cross * over_t * over_tau + log_ratio
        nckd = tl.where(none_s, float("inf"), nckd)
        nckd = tl.where(none_t, 0.0, nckd)
        nckd_weight = tl.where(none_t, 0.0, nckd_weight)  # a teacher without other classes: nothing to learn from it
    # Both seen from the teacher's less likely side (v_t <= 0). With p = sigmoid(v_t) and delta = v_s - v_t,
    # TCKD = softplus(v_s) - softplus(v_t) - p delta = log(1 + p (exp(delta) - 1)) - p delta:
    # the second form near the teacher, where the first would cancel, the first away from it, where nothing overflows.
    side = tl.where(u_t > 0, -1.0, 1.0)
    v_s = u_s * side
    v_t = u_t * side
    e_s = tl.exp2(tl.abs(v_s) * -1.4426950408889634)
    e_t = tl.exp2(tl.abs(v_t) * -1.4426950408889634)
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
        u_1 = tl.where(none_s, float("inf"), (y_s - top_s) - _log(sum_1, ACC))
        e_1 = tl.exp2(tl.abs(u_1) * -1.4426950408889634)
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
def _factors(counts, weights, largest_weight, num_counts, num_pixels, tau, tckd_weight, nckd_weight, ce_weight,
             MEAN_: tl.constexpr, FLOAT16: tl.constexpr, HAS_COUNT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
             WITH_CE: tl.constexpr, COUNTS: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """What the gradient of CE and of the TNKD terms is multiplied by, ce_weight/weights and 1/count, both divided by
    the third: the power of two that is left to grad_scale."""
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
        outside = _float16_scale(bound, ACC)
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
def _labels(target, class_weight, at, inside, num_classes, ignore, HAS_TARGET: tl.constexpr, HAS_IGNORE: tl.constexpr,
            HAS_WEIGHT: tl.constexpr, found, ACC: tl.constexpr):  # fmt: skip
    """Label, whether the pixel counts, whether the label is a class, its weight. `found`: the teacher's argmax."""
    valid = inside
    if HAS_TARGET:
        label = tl.load(target + at, mask=inside, other=0).to(tl.int64)
        if HAS_IGNORE:
            valid = inside & (label != ignore)
    else:
        label = found.to(tl.int64)
    known = (label >= 0) & (label < num_classes)
    weight = tl.where(valid, 1.0, 0.0).to(ACC)
    if HAS_WEIGHT:
        weight = tl.load(class_weight + label, mask=valid & known, other=0.0)
    return tl.where(known, label, -1).to(tl.int32), valid, known, weight


# What changes with the batch is not specialised: Triton would compile anew where it becomes 1 or a multiple of 16.
@triton.jit(do_not_specialize=["num_pixels", "num_counts", "num_programs", "size_1", "size_2", "blocks", "ignore"])
def tnkd_kernel(
    student, teacher, target, class_weight, largest_weight, counts, weights, grad, loss_map, partial,
    num_classes, num_pixels, num_counts, num_programs, size_1, size_2, inner, blocks,
    s_k, s_0, s_1, s_2, s_p, t_k, t_0, t_1, t_2, t_p, g_k, g_0, g_1, g_2, g_p,
    y_0, y_1, y_2, y_p, l_0, l_1, l_2, l_p,
    tau_: tl.float64, over_tau_: tl.float64, tckd_weight_: tl.float64, nckd_weight_: tl.float64,
    ce_weight_: tl.float64, ignore, values, ignore_at,
    NUM_CLASSES: tl.constexpr, CHUNKS: tl.constexpr, PIXELS: tl.constexpr, CLASSES: tl.constexpr,
    UNROLL: tl.constexpr, RESIDENT: tl.constexpr, KEEP_CE: tl.constexpr, RANK: tl.constexpr, WHOLE: tl.constexpr,
    HAS_TARGET: tl.constexpr, HAS_IGNORE: tl.constexpr, HAS_COUNT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    WITH_CE: tl.constexpr, NEEDS_GRAD: tl.constexpr, NONE_: tl.constexpr, MEAN_: tl.constexpr, FLOAT16: tl.constexpr,
    COUPLED: tl.constexpr, COUNTS: tl.constexpr, FAST: tl.constexpr, NEAR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of PIXELS pixels. WHOLE: every pixel of every tile exists, and no access needs a mask for it.

    All that is one number a pixel is kept CLASSES x PIXELS, the same in every row: in the layout of the logits, so that
    nothing moves between threads but the sums over classes.
    """
    tau_, over_tau_, tckd_weight_, nckd_weight_, ce_weight_ = _numbers(values, tau_, over_tau_, tckd_weight_,
                                                                       nckd_weight_, ce_weight_, WITH_CE)  # fmt: skip
    ignore = _ignored(ignore_at, ignore)
    tau = tl.full([], tau_, ACC)
    over_tau = tl.full([], over_tau_, ACC)  # from float64, rounded once: a GPU's short division is off by two units
    tckd_weight = tl.full([], tckd_weight_, ACC)
    nckd_weight = tl.full([], nckd_weight_, ACC)
    to_2 = tl.full([], 1.4426950408889634, ACC)  # exp(d / tau) = exp2(d * to_2 / tau)
    to_2_tau = tl.full([], over_tau_ * 1.4426950408889634, ACC)

    # ---- which pixels: a row (three folded dimensions) and a block of its inner dimension
    program = tl.program_id(0)
    i_0, i_1, i_2, start_p = _place(program, blocks, size_1, size_2, RANK)
    start_p *= PIXELS
    k = tl.arange(0, CLASSES)[:, None]
    p32 = tl.arange(0, PIXELS)[None, :]  # of this tile: a folded dimension may have more than 2^31
    inside = (k >= 0) & (p32 >= 0)
    if not WHOLE:
        inside = inside & (p32 < inner - start_p)
    p = p32.to(tl.int64)
    k_wide = k.to(tl.int64)
    s_at = student + (i_0 * s_0 + i_1 * s_1 + i_2 * s_2 + start_p * s_p) + (k_wide * s_k + p * s_p)
    t_at = teacher + (i_0 * t_0 + i_1 * t_1 + i_2 * t_2 + start_p * t_p) + (k_wide * t_k + p * t_p)
    y_at = i_0 * y_0 + i_1 * y_1 + i_2 * y_2 + start_p * y_p + (k_wide * 0 + p * y_p)
    s_step = tl.full([], CLASSES, tl.int64) * s_k
    t_step = tl.full([], CLASSES, tl.int64) * t_k
    low = float("-inf")

    ce_factor, mean_factor, _ = _factors(counts, weights, largest_weight, num_counts, num_pixels, tau, tckd_weight,
                                         nckd_weight, ce_weight_, MEAN_, FLOAT16, HAS_COUNT, HAS_WEIGHT, WITH_CE,
                                         COUNTS, ACC)  # fmt: skip

    top_s = tl.full([CLASSES, PIXELS], low, ACC)
    top_t = tl.full([CLASSES, PIXELS], low, ACC)
    y_s = tl.zeros([CLASSES, PIXELS], ACC)
    y_t = tl.zeros([CLASSES, PIXELS], ACC)
    sum_s = tl.zeros([CLASSES, PIXELS], ACC)
    sum_t = tl.zeros([CLASSES, PIXELS], ACC)
    sum_1 = tl.zeros([CLASSES, PIXELS], ACC)
    cross = tl.zeros([CLASSES, PIXELS], ACC)
    if RESIDENT:
        # ---- every logit of the tile, once (only the last chunk may need a mask for its classes)
        s_tiles = ()
        t_tiles = ()
        for c in tl.static_range(CHUNKS):
            if (c + 1) * CLASSES <= NUM_CLASSES:
                if WHOLE:
                    s_tiles += (tl.load(s_at + c * s_step),)
                    t_tiles += (tl.load(t_at + c * t_step),)
                else:
                    s_tiles += (tl.load(s_at + c * s_step, mask=inside, other=low),)
                    t_tiles += (tl.load(t_at + c * t_step, mask=inside, other=low),)
            else:
                there = inside & (c * CLASSES + k < NUM_CLASSES)
                s_tiles += (tl.load(s_at + c * s_step, mask=there, other=low),)
                t_tiles += (tl.load(t_at + c * t_step, mask=there, other=low),)
        found = p32
        if not HAS_TARGET:
            best = tl.full([CLASSES, PIXELS], low, ACC)
            for c in tl.static_range(CHUNKS):
                best = tl.maximum(best, t_tiles[c].to(ACC))
            best = tl.max(best, 0, keep_dims=True)
            first = tl.full([CLASSES, PIXELS], 2147483647, tl.int32)
            for c in tl.static_range(CHUNKS):
                index = tl.where(t_tiles[c].to(ACC) == best, c * CLASSES + k, 2147483647)
                first = tl.minimum(first, index)
            found = tl.min(first, 0, keep_dims=True) + k * 0
        y, valid, known, weight = _labels(target, class_weight, y_at, inside, num_classes, ignore, HAS_TARGET,
                                          HAS_IGNORE, HAS_WEIGHT, found, ACC)  # fmt: skip

        # ---- the target's logit aside, the maximum of the others
        s_others = ()
        t_others = ()
        for c in tl.static_range(CHUNKS):
            is_y = c * CLASSES + k == y
            s = s_tiles[c].to(ACC)
            t = t_tiles[c].to(ACC)
            y_s = tl.where(is_y, s, y_s)
            y_t = tl.where(is_y, t, y_t)
            s_others += (tl.where(is_y, low, s),)
            t_others += (tl.where(is_y, low, t),)
            top_s = tl.maximum(top_s, s_others[c])
            top_t = tl.maximum(top_t, t_others[c])
        m_s = _finite_max(tl.max(top_s, 0, keep_dims=True))
        m_t = _finite_max(tl.max(top_t, 0, keep_dims=True))

        # ---- exponentials, kept for the gradient, and their sums
        e_s = ()
        e_t = ()
        e_1 = ()
        for c in tl.static_range(CHUNKS):
            d_s = s_others[c] - m_s
            d_t = t_others[c] - m_t
            e_s += (tl.exp2(d_s * to_2_tau),)
            e_t += (tl.exp2(d_t * to_2_tau),)
            sum_s += e_s[c]
            sum_t += e_t[c]
            cross += tl.where(e_t[c] == 0, 0.0, e_t[c] * (d_t - d_s))
            if WITH_CE:
                e = tl.exp2(d_s * to_2)
                sum_1 += e
                if KEEP_CE:
                    e_1 += (e,)
        sum_s = tl.sum(sum_s, 0, keep_dims=True)
        sum_t = tl.sum(sum_t, 0, keep_dims=True)
        if WITH_CE:
            sum_1 = tl.sum(sum_1, 0, keep_dims=True)
    else:
        span = UNROLL * CLASSES
        found = p32
        if not HAS_TARGET:
            best = tl.full([CLASSES, PIXELS], low, ACC)
            first = tl.zeros([CLASSES, PIXELS], tl.int32)
            at = t_at
            for start in range(0, num_classes, CLASSES):
                index = start + k
                t = tl.load(at, mask=inside & (index < num_classes), other=low).to(ACC)
                first = tl.where(t > best, index, first)
                best = tl.maximum(best, t)
                at += t_step
            most = tl.max(best, 0, keep_dims=True)
            found = tl.min(tl.where(best == most, first, 2147483647), 0, keep_dims=True) + k * 0
        y, valid, known, weight = _labels(target, class_weight, y_at, inside, num_classes, ignore, HAS_TARGET,
                                          HAS_IGNORE, HAS_WEIGHT, found, ACC)  # fmt: skip

        # ---- first walk: maximum and sum of every lane's own classes, rescaled once per UNROLL tiles
        s_ptr = s_at
        t_ptr = t_at
        for start in range(0, num_classes, span):
            s_new = ()
            t_new = ()
            for c in tl.static_range(UNROLL):
                there = inside & (start + c * CLASSES + k < num_classes)
                s_new += (tl.load(s_ptr + c * s_step, mask=there, other=low),)
                t_new += (tl.load(t_ptr + c * t_step, mask=there, other=low),)
            new_s = top_s
            new_t = top_t
            s_others = ()
            t_others = ()
            for c in tl.static_range(UNROLL):
                is_y = start + c * CLASSES + k == y
                s = s_new[c].to(ACC)
                t = t_new[c].to(ACC)
                y_s = tl.where(is_y, s, y_s)
                y_t = tl.where(is_y, t, y_t)
                s_others += (tl.where(is_y, low, s),)
                t_others += (tl.where(is_y, low, t),)
                new_s = tl.maximum(new_s, s_others[c])
                new_t = tl.maximum(new_t, t_others[c])
            base_s = _finite_max(new_s)
            base_t = _finite_max(new_t)
            sum_s *= tl.exp2((top_s - base_s) * to_2_tau)
            sum_t *= tl.exp2((top_t - base_t) * to_2_tau)
            if WITH_CE:
                sum_1 *= tl.exp2((top_s - base_s) * to_2)
            for c in tl.static_range(UNROLL):
                sum_s += tl.exp2((s_others[c] - base_s) * to_2_tau)
                sum_t += tl.exp2((t_others[c] - base_t) * to_2_tau)
                if WITH_CE:
                    sum_1 += tl.exp2((s_others[c] - base_s) * to_2)
            top_s = new_s
            top_t = new_t
            s_ptr += UNROLL * s_step
            t_ptr += UNROLL * t_step
        m_s = _finite_max(tl.max(top_s, 0, keep_dims=True))
        m_t = _finite_max(tl.max(top_t, 0, keep_dims=True))
        if WITH_CE:
            sum_1 = tl.sum(sum_1 * tl.exp2((top_s - m_s) * to_2), 0, keep_dims=True)
        sum_s = tl.sum(sum_s * tl.exp2((top_s - m_s) * to_2_tau), 0, keep_dims=True)
        sum_t = tl.sum(sum_t * tl.exp2((top_t - m_t) * to_2_tau), 0, keep_dims=True)

    nan = float("nan")
    y_s = tl.where(known, tl.sum(y_s, 0, keep_dims=True), nan)  # a bad label: NaN spreads to the loss and every factor
    y_t = tl.sum(y_t, 0, keep_dims=True) + k * 0.0

    g_at = s_at
    if NEEDS_GRAD:
        g_at = grad + (i_0 * g_0 + i_1 * g_1 + i_2 * g_2 + start_p * g_p) + (k_wide * g_k + p * g_p)
    g_step = tl.full([], CLASSES, tl.int64) * g_k
    out = student.dtype.element_ty
    if RESIDENT:
        ce, tckd, nckd, by_s, by_t, by_1, at_y = _pixel(
            m_s, m_t, sum_s, sum_t, sum_1, y_s, y_t, tl.sum(cross, 0, keep_dims=True), tau, over_tau, tckd_weight,
            nckd_weight, ce_factor * weight, mean_factor, NUM_CLASSES == 2, COUPLED, WITH_CE, FAST, NEAR,
            ACC)  # fmt: skip
        if NEEDS_GRAD:
            # 0, but the compiler cannot know: else it keeps a predicate for each logit since the first comparison,
            # packed into registers, which took a third of all instructions
            y_late = tl.where(valid, y, -2) + (tau < 0).to(tl.int32)
            valid_late = y_late != -2
            for c in tl.static_range(CHUNKS):
                g = by_s * e_s[c] + by_t * e_t[c]
                if WITH_CE:
                    if KEEP_CE:
                        g += by_1 * e_1[c]
                    else:  # once more, from the logits as they came, which take half the registers
                        g += by_1 * tl.exp2((s_tiles[c].to(ACC) - m_s) * to_2)
                g = tl.where(c * CLASSES + k == y_late, at_y, g)
                g = tl.where(valid_late, g, 0.0).to(out)
                if (c + 1) * CLASSES <= NUM_CLASSES:
                    if WHOLE:
                        tl.store(g_at + c * g_step, g)
                    else:
                        tl.store(g_at + c * g_step, g, mask=inside)
                else:
                    tl.store(g_at + c * g_step, g, mask=inside & (c * CLASSES + k < NUM_CLASSES))
    else:
        # ---- second walk: the same tiles, from cache
        _, _, _, by_s, by_t, by_1, at_y = _pixel(
            m_s, m_t, sum_s, sum_t, sum_1, y_s, y_t, y_s * 0.0, tau, over_tau, tckd_weight, nckd_weight,
            ce_factor * weight, mean_factor, NUM_CLASSES == 2, COUPLED, WITH_CE, FAST, NEAR, ACC)  # fmt: skip
        for start in range(0, num_classes, span):
            s_new = ()
            t_new = ()
            for c in tl.static_range(UNROLL):
                there = inside & (start + c * CLASSES + k < num_classes)
                s_new += (tl.load(s_at + c * s_step, mask=there, other=low),)
                t_new += (tl.load(t_at + c * t_step, mask=there, other=low),)
            for c in tl.static_range(UNROLL):
                index = start + c * CLASSES + k
                is_y = index == y
                d_s = tl.where(is_y, low, s_new[c].to(ACC)) - m_s
                d_t = tl.where(is_y, low, t_new[c].to(ACC)) - m_t
                e_s_c = tl.exp2(d_s * to_2_tau)
                e_t_c = tl.exp2(d_t * to_2_tau)
                cross += tl.where(e_t_c == 0, 0.0, e_t_c * (d_t - d_s))
                if NEEDS_GRAD:
                    g = by_s * e_s_c + by_t * e_t_c
                    if WITH_CE:
                        g += by_1 * tl.exp2(d_s * to_2)
                    g = tl.where(is_y, at_y, g)
                    g = tl.where(valid, g, 0.0)
                    tl.store(g_at + c * g_step, g.to(out), mask=inside & (index < num_classes))
            s_at += UNROLL * s_step
            t_at += UNROLL * t_step
            g_at += UNROLL * g_step
        ce, tckd, nckd, _, _, _, _ = _pixel(
            m_s, m_t, sum_s, sum_t, sum_1, y_s, y_t, tl.sum(cross, 0, keep_dims=True), tau, over_tau, tckd_weight,
            nckd_weight, ce_factor * weight, mean_factor, NUM_CLASSES == 2, COUPLED, WITH_CE, FAST, NEAR,
            ACC)  # fmt: skip

    # ---- sums of this block, each pixel once; an ignored pixel's NaN is dropped by selection, never by multiplication
    tckd = tl.where(valid, tckd, 0.0) * (tau * tau)
    nckd = tl.where(valid, tl.where(known, nckd, nan), 0.0) * (tau * tau)
    if WITH_CE:
        ce = tl.where(valid & (known == 0), nan, tl.where(weight == 0, 0.0, ce * weight))
        tl.store(partial + program, tl.sum(tl.where(k == 0, ce, 0.0)))
    if NONE_:
        value = _weighted(tckd_weight, tckd) + _weighted(nckd_weight, nckd)
        if WITH_CE:
            value += _weighted(tl.full([], ce_weight_, ACC), ce)
        l_at = loss_map + (i_0 * l_0 + i_1 * l_1 + i_2 * l_2 + start_p * l_p) + (k_wide * 0 + p * l_p)
        tl.store(l_at, value, mask=inside & (k == 0))
    tl.store(partial + num_programs + program, tl.sum(tl.where(k == 0, tckd, 0.0)))
    tl.store(partial + 2 * num_programs + program, tl.sum(tl.where(k == 0, nckd, 0.0)))


@triton.jit(do_not_specialize=["num_programs", "num_counts", "num_pixels"])
def finish_kernel(partial, largest_weight, counts, weights, loss, parts, grad_scale, num_programs, num_counts,
                   num_pixels, tau_: tl.float64, tckd_weight_: tl.float64, nckd_weight_: tl.float64,
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
        _, _, outside = _factors(counts, weights, largest_weight, num_counts, num_pixels, tl.full([], tau_, ACC),
                                 tl.full([], tckd_weight_, ACC), tl.full([], nckd_weight_, ACC), ce_weight_, MEAN_,
                                 FLOAT16, HAS_COUNT, HAS_WEIGHT, WITH_CE, COUNTS, ACC)  # fmt: skip
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
