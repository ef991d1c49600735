"""TNKD (and the pixel cross-entropy) in Triton: the kernels that triton.py launches.

For every pixel, with e_j = exp(logit_j / tau) relative to the largest but the target's, and e_y left out:

    u    = logit_y / tau - log(sum e)        b = sigmoid(u)
    TCKD = b^T (softplus(-u^S) - softplus(-u^T)) + (1 - b^T) (softplus(u^S) - softplus(u^T))
    NCKD = sum e^T (log e^T - log e^S) / sum e^T - log(sum e^T) + log(sum e^S)

COUPLED: (1 - b^T) NCKD takes the place of NCKD; with equal weights the sum is plain KD, the KL of the whole softmax.

A tile is CLASSES x PIXELS of dense maps. Exponents are one fused multiply-add, rounded once, relative to their size:
exact where the logits are close, for |logit| / tau up to 10^8 (above, the shift's own rounding leaves float32's range).
V, in every kernel: the `Variant` of triton.py.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from ..triton_math import LN_2, LOG2_E, LOW, finite_max, reciprocal


@triton.jit
def _log(x):
    """log(x) of a sum of exponentials: positive and normal, or NaN, which stays NaN. Shorter than tl.log."""
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
    return exponent.to(tl.float32) * 8.262958405176314e-8 + f + (x - x)  # log(2) / 2^23; NaN - NaN


@triton.jit
def _log1p(x):
    """log(1 + x) for x > -1, relative to its size."""
    more = 1.0 + x
    return _log(more) + (x - (more - 1.0)) * reciprocal(more)


@triton.jit
def _weighted(weight, part):
    """A part with weight 0 takes no part: 0 * inf would be NaN. But a NaN is never hidden."""
    return tl.where(weight == 0, tl.where(part == part, 0.0, part), weight * part)


@triton.jit
def numbers_of(numbers, V: tl.constexpr):
    """Temperature, log2(e) / temperature and the weights of TCKD, NCKD and CE, as they came or from device memory,
    divided in float64 and rounded once. Nobody has looked at those: what the host refuses makes every loss NaN."""
    if isinstance(numbers, tl.tensor):
        ce_weight = tl.full([], 1.0, tl.float64)
        if V.with_ce:  # else its weight, the first, is not among them
            ce_weight = tl.load(numbers)
            numbers += 1
        tckd_weight = tl.load(numbers)
        nckd_weight = tl.load(numbers + 1)
        tau = tl.load(numbers + 2)
        least = tl.minimum(tl.minimum(ce_weight, tckd_weight), nckd_weight)  # drops a NaN, which the sum does not
        tau = tl.where(tau > 0, tau, float("nan"))
        tau = tl.where(least >= 0, tau, float("nan"))
        tau = tl.where(ce_weight + tckd_weight + nckd_weight + tau < float("inf"), tau, float("nan"))
        to_2_tau = (tl.full([], LOG2_E, tl.float64) / tau).to(tl.float32)
        tau = tau.to(tl.float32)
        tckd_weight = tckd_weight.to(tl.float32)
        nckd_weight = nckd_weight.to(tl.float32)
        ce_weight = ce_weight.to(tl.float32)
    else:
        tau, to_2_tau, tckd_weight, nckd_weight, ce_weight = numbers
    return tau, to_2_tau, tckd_weight, nckd_weight, ce_weight


@triton.jit
def ignored(ignore):
    """ignore_index, as it came or from device memory. Not for None: Triton 3.6 returns none of those."""
    if ignore.dtype.is_ptr():
        ignore = tl.load(ignore)
    return ignore


@triton.jit
def _pixel(shift_s, shift_t, shift_1, sum_s, sum_t, sum_1, y_s, y_t, cross, to_2_tau, tau, tckd_weight, nckd_weight,
           ce_factor, mean_factor, V: tl.constexpr):  # fmt: skip
    """Sums over the classes of one network pair -> the three terms, and the four factors of the gradient.

    sum: of e_j = exp2(x_j * to_2_tau - shift), sum_1: at temperature 1; y: the target's logit; cross: sum of e^T_j
    times the difference of the exponents. The shift is a rounded product: 2^its error is in every e_j of the pixel and
    in y's exponent alike, and cancels. Gradient: by_s * e^S_j + by_t * e^T_j + by_1 * e1_j, and at_y for the target.
    """
    none_s = sum_s == 0  # every other class absent: the target has all the mass
    none_t = sum_t == 0
    sum_s = tl.where(none_s, 1.0, sum_s)
    sum_t = tl.where(none_t, 1.0, sum_t)
    over_s = reciprocal(sum_s)
    over_t = reciprocal(sum_t)
    log_t = _log(sum_t)
    ratio = sum_s * over_t
    ratio += tl.fma(-ratio, sum_t, sum_s) * over_t  # what was rounded away: equal sums have the ratio 1, its log is 0
    log_ratio = _log(ratio)
    u_s = tl.where(none_s, float("inf"), tl.fma(tl.fma(y_s, to_2_tau, -shift_s), LN_2, -(log_t + log_ratio)))
    u_t = tl.where(none_t, float("inf"), tl.fma(tl.fma(y_t, to_2_tau, -shift_t), LN_2, -log_t))
    # +inf is no number to learn from, and would pass for an absence of others, which in turn would hide a NaN
    u_s = tl.where(y_s < float("inf"), u_s, float("nan"))
    u_t = tl.where(y_t < float("inf"), u_t, float("nan"))
    if V.num_classes == 2:  # one beside the target: nothing to compare, not even where the student has it at -inf
        nckd = log_ratio * 0.0
        if V.coupled:  # which the sum of KD does tell
            nckd = tl.where(none_s, float("inf"), nckd)
        else:
            nckd_weight = nckd_weight * 0.0
    else:
        nckd = cross * over_t * LN_2 + log_ratio
        nckd = tl.where(none_s, float("inf"), nckd)
        nckd = tl.where(none_t, 0.0, nckd)
        nckd_weight = tl.where(none_t, 0.0, nckd_weight)  # a teacher without other classes: nothing to learn from it
    # Both seen from the teacher's less likely side (v_t <= 0). With p = sigmoid(v_t),
    # TCKD = softplus(v_s) - softplus(v_t) - p (v_s - v_t), and a softplus is max(v, 0) + log(1 + exp(-|v|))
    side = tl.where(u_t > 0, -1.0, 1.0)
    v_s = u_s * side
    v_t = u_t * side
    e_s = tl.exp2(tl.abs(v_s) * -LOG2_E)
    e_t = tl.exp2(tl.abs(v_t) * -LOG2_E)
    more_t = reciprocal(1.0 + e_t)
    less_t = e_t * more_t
    more_s = reciprocal(1.0 + e_s)
    side_s = more_s * tl.where(v_s >= 0, 1.0, e_s)
    # 0 * log 0 = 0: a side that the teacher gives no mass adds nothing, however far off the student is
    rare = tl.where(less_t == 0, 0.0, less_t * (tl.maximum(-v_s, 0.0) + v_t))
    tckd = _log1p((e_s - e_t) * more_t) + (more_t * tl.maximum(v_s, 0.0) + rare)
    gap = side_s - less_t
    gap *= side  # b^S - b^T
    if V.coupled:
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
    if V.with_ce:
        u_1 = tl.where(none_s, float("inf"), tl.fma(tl.fma(y_s, LOG2_E, -shift_1), LN_2, -_log(sum_1)))
        e_1 = tl.exp2(tl.abs(u_1) * -LOG2_E)
        missed = reciprocal(1.0 + e_1) * tl.where(u_1 >= 0, e_1, 1.0)
        ce = tl.maximum(-u_1, 0.0) + _log1p(e_1)
        by_1 = ce_factor * missed * tl.where(none_s, 0.0, reciprocal(sum_1))
        at_y -= ce_factor * missed
    return ce, tckd, nckd, by_s, by_t, by_1, at_y


@triton.jit(do_not_specialize=["samples", "ignore"])
def count_kernel(target, class_weight, counts, samples, plane, num_classes, ignore, BLOCK: tl.constexpr):
    """counts[0, program] = its valid labels, counts[1, program] = their class weights added up."""
    if ignore is not None:
        ignore = ignored(ignore)
    total = tl.cast(samples, tl.int64) * plane
    p = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.int32)
    weight = tl.zeros([BLOCK], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(total, BLOCK), tl.num_programs(0)):
        start = tl.cast(block, tl.int64) * BLOCK
        valid = p < total - start
        label = tl.load(target + start + p, mask=valid, other=0).to(tl.int64)
        if ignore is not None:
            valid = valid & (label != ignore)
        count += valid.to(tl.int32)
        if class_weight is not None:
            known = valid & (label >= 0) & (label < num_classes)
            weight += tl.load(class_weight + label, mask=known, other=0.0)
    tl.store(counts + tl.program_id(0), tl.sum(count, 0).to(tl.float32))
    if class_weight is not None:
        tl.store(counts + tl.num_programs(0) + tl.program_id(0), tl.sum(weight, 0))


@triton.jit
def totals(counts, num_counts, num_pixels, V: tl.constexpr, COUNTS: tl.constexpr):
    """The number of valid pixels and the sum of their class weights, added in the same order by everyone who asks."""
    count = tl.cast(num_pixels, tl.float32)
    if counts is not None:
        i = tl.arange(0, COUNTS)
        count = tl.sum(tl.load(counts + i, mask=i < num_counts, other=0.0).to(tl.float64), 0).to(tl.float32)
    weight = count
    if V.weighted:
        weight = tl.sum(tl.load(counts + num_counts + i, mask=i < num_counts, other=0.0), 0)
    return count, weight


@triton.jit
def factors(counts, largest_weight, num_counts, num_pixels, gathered, numbers, V: tl.constexpr, COUNTS: tl.constexpr):
    """What the gradient of CE and of the TNKD terms is multiplied by, ce_weight/weights and 1/count, both divided by
    the third: the power of two that is left to grad_scale. gathered: how many pixels a logit may have, by weight."""
    tau, _, tckd_weight, nckd_weight, ce_factor = numbers
    mean_factor = tl.full([], 1.0, tl.float32)
    outside = mean_factor
    if V.mean:
        count, weight = totals(counts, num_counts, num_pixels, V, COUNTS)
        mean_factor = tl.where(count > 0, 1.0 / count, 0.0)
        ce_factor = tl.where(weight > 0, ce_factor * (1.0 / weight), 0.0)
    if V.float16:
        bound = tau * (tckd_weight + nckd_weight) * mean_factor
        if V.with_ce:
            if largest_weight is not None:
                bound += ce_factor * tl.load(largest_weight)
            else:
                bound += ce_factor
        outside = _float16_scale(bound * gathered)
        mean_factor /= outside
        ce_factor /= outside
    return ce_factor, mean_factor, outside


@triton.jit
def _float16_scale(bound):
    """The power of two that a float16 gradient is stored divided by, of a bound on its entries.

    It has to wait for the upstream gradient, often a GradScaler's 65536, with its digits: what is smaller than 6e-5, as
    a mean over many pixels is, would lose them. Divided by this it rounds once, and no entry reaches 2^15; float16 ends
    at 65504. From the bound's exponent bits: the host is not asked.
    """
    power = tl.maximum(bound, 1.9259299443872359e-34).to(tl.int32, bitcast=True) & 0x7F800000  # 2^-112: no subnormal
    scale = power.to(tl.float32, bitcast=True) * 6.103515625e-05  # 2^-14
    return tl.where((bound > 0) & (bound < float("inf")), scale, 1.0)


@triton.jit
def labels(label, class_weight, inside, ignore, V: tl.constexpr):
    """Label, whether the pixel counts, whether the label is a class, its weight."""
    label = label.to(tl.int64)
    valid = inside
    if ignore is not None:
        valid = inside & (label != ignore)
    known = (label >= 0) & (label < V.num_classes)
    weight = tl.where(valid, 1.0, 0.0)
    if class_weight is not None:
        weight = tl.load(class_weight + label, mask=valid & known, other=0.0)
    return tl.where(known, label, -1).to(tl.int32), valid, known, weight


@triton.jit
def place(tile, inner, plane, blocks, V: tl.constexpr):
    """Of a tile the first pixel, of all; how many are left from there; where in the maps the tile is, and how far the
    next chunk of classes; which pixels exist. channels_last has all its pixels in one sample, of `inner`."""
    n = (tile // blocks).to(tl.int64)
    start = (tile % blocks).to(tl.int64) * V.pixels
    k = tl.arange(0, V.classes)[:, None]
    p = tl.arange(0, V.pixels)[None, :]
    if V.last:
        # n is 0, but the compiler cannot know: else it loads labels in wider vectors, and lays out logits after them,
        # which takes a fifth more instructions
        first = n * inner + start
        left = inner - start
        at = start * V.num_classes + (p * V.num_classes + k)
        step = V.classes
    else:
        first = n * plane + start  # whose divisors the compiler may know, not those of `inner`
        left = plane - start
        at = (n * V.num_classes * plane + start) + (k * plane + p)
        step = V.classes * plane
    inside = (k >= 0) & (p >= 0)
    if not V.whole:
        inside = inside & (p < left)
    return first, left, at, step, inside


@triton.jit
def read(at, step, inside, k, V: tl.constexpr):
    """Every logit of the tile, once (only the last chunk may need a mask for its classes)."""
    tiles = ()
    for c in tl.static_range(tl.constexpr(V.chunks)):
        if (c + 1) * V.classes > V.num_classes:
            tiles += (tl.load(at + c * step, mask=inside & (c * V.classes + k < V.num_classes), other=LOW),)
        elif V.whole:
            tiles += (tl.load(at + c * step),)
        else:
            tiles += (tl.load(at + c * step, mask=inside, other=LOW),)
    return tiles


@triton.jit
def likeliest(tiles, k, V: tl.constexpr):
    """The class of the largest logit, the first of equals."""
    best = tiles[0]
    for c in tl.static_range(1, tl.constexpr(V.chunks)):
        best = tl.maximum(best, tiles[c])
    best = tl.max(best, 0, keep_dims=True)
    first = tl.where(tiles[0] == best, k, 2147483647)
    for c in tl.static_range(1, tl.constexpr(V.chunks)):
        first = tl.minimum(first, tl.where(tiles[c] == best, c * V.classes + k, 2147483647))
    return tl.min(first, 0, keep_dims=True) + k * 0


@triton.jit
def _aside(tiles, y, k, V: tl.constexpr):
    """The target's logit, the others (-inf in its place) and their maximum."""
    others = ()
    at_y = tl.zeros(tiles[0].shape, tl.float32)
    top = tl.full(tiles[0].shape, LOW, tl.float32)
    for c in tl.static_range(tl.constexpr(V.chunks)):
        is_y = c * V.classes + k == y
        x = tiles[c].to(tl.float32)
        at_y = tl.where(is_y, x, at_y)
        others += (tl.where(is_y, LOW, x),)
        top = tl.maximum(top, others[c])
    return tl.sum(at_y, 0, keep_dims=True) + k * 0.0, others, finite_max(tl.max(top, 0, keep_dims=True))


@triton.jit
def exponentials(others, scale, shift):
    """exp2(others * scale - shift), and their sum."""
    found = ()
    total = tl.zeros(others[0].shape, tl.float32)
    for c in tl.static_range(tl.constexpr(len(others))):
        found += (tl.exp2(tl.fma(others[c], scale, -shift)),)
        total += found[c]
    return found, tl.sum(total, 0, keep_dims=True)


@triton.jit
def judged(s_tiles, t_tiles, y, known, weight, k, numbers, ce_factor, mean_factor, V: tl.constexpr):
    """The terms of the tile's pixels, and what makes their gradient: factors and exponentials."""
    tau, to_2_tau, tckd_weight, nckd_weight, _ = numbers
    y_s, s_others, top_s = _aside(s_tiles, y, k, V)
    y_t, t_others, top_t = _aside(t_tiles, y, k, V)
    shift_s = top_s * to_2_tau
    shift_t = top_t * to_2_tau
    e_s, sum_s = exponentials(s_others, to_2_tau, shift_s)
    e_t, sum_t = exponentials(t_others, to_2_tau, shift_t)
    e_1 = e_s
    sum_1 = sum_s
    if V.with_ce:
        e_1, sum_1 = exponentials(s_others, LOG2_E, top_s * LOG2_E)
    # of e^T times the difference, a class that the teacher rules out left out
    cross = tl.zeros(e_t[0].shape, tl.float32)
    for c in tl.static_range(tl.constexpr(V.chunks)):
        apart = tl.fma(t_others[c], to_2_tau, -shift_t) - tl.fma(s_others[c], to_2_tau, -shift_s)
        cross += e_t[c] * tl.where(e_t[c] == 0, 0.0, apart)
    y_s = tl.where(known, y_s, float("nan"))  # a bad label: NaN spreads to the loss and every factor
    ce, tckd, nckd, by_s, by_t, by_1, at_y = _pixel(
        shift_s, shift_t, top_s * LOG2_E, sum_s, sum_t, sum_1, y_s, y_t, tl.sum(cross, 0, keep_dims=True), to_2_tau,
        tau, tckd_weight, nckd_weight, ce_factor * weight, mean_factor, V)  # fmt: skip
    return (ce, tckd, nckd), (by_s, by_t, by_1, at_y), (e_s, e_t, e_1)


@triton.jit
def late(y, valid, tau):
    """The label for `gradient`, -2 where the pixel does not count. Plus 0, but the compiler cannot know: else it keeps
    a predicate for each logit since the first comparison, packed into registers: a third of all instructions."""
    return tl.where(valid, y, -2) + (tau < 0).to(tl.int32)


@triton.jit
def gradient(c, k, y, by, e, V: tl.constexpr):
    """The gradient of a chunk's logits; y: -2 where the pixel does not count."""
    by_s, by_t, by_1, at_y = by
    e_s, e_t, e_1 = e
    g = by_s * e_s[c] + by_t * e_t[c]
    if V.with_ce:
        g += by_1 * e_1[c]
    g = tl.where(c * V.classes + k == y, at_y, g)
    return tl.where(y != -2, g, 0.0)


@triton.jit
def write(at, step, inside, k, c, g, V: tl.constexpr):
    """A chunk's gradient."""
    g = g.to(at.dtype.scalar.element_ty)
    if (c + 1) * V.classes > V.num_classes:
        tl.store(at + c * step, g, mask=inside & (c * V.classes + k < V.num_classes))
    elif V.whole:
        tl.store(at + c * step, g)
    else:
        tl.store(at + c * step, g, mask=inside)


@triton.jit
def counted(terms, valid, known, weight, tau, V: tl.constexpr):
    """The terms as they are added up: an ignored pixel's NaN is dropped by selection, never by multiplication."""
    ce, tckd, nckd = terms
    tckd = tl.where(valid, tckd, 0.0) * (tau * tau)
    nckd = tl.where(valid, tl.where(known, nckd, float("nan")), 0.0) * (tau * tau)
    if V.with_ce:
        ce = tl.where(valid & (known == 0), float("nan"), tl.where(weight == 0, 0.0, ce * weight))
    return ce, tckd, nckd


@triton.jit
def store_sums(partial, sums, k, V: tl.constexpr):
    """The sums of this program, each pixel once."""
    at = partial + tl.program_id(0)
    for i in tl.static_range(0 if V.with_ce else 1, 3):
        tl.store(at + i * tl.num_programs(0), tl.sum(tl.where(k == 0, sums[i], 0.0)))


@triton.jit
def _value(ce, tckd, nckd, numbers, V: tl.constexpr):
    """The weighted sum."""
    _, _, tckd_weight, nckd_weight, ce_weight = numbers
    value = _weighted(tckd_weight, tckd) + _weighted(nckd_weight, nckd)
    if V.with_ce:
        value += _weighted(ce_weight, ce)
    return value


# What changes with the batch is not specialised: Triton would compile anew where it becomes 1 or a multiple of 16.
@triton.jit(do_not_specialize=["num_pixels", "num_counts", "inner", "blocks", "tiles", "ignore"])
def tnkd_kernel(student, teacher, target, class_weight, largest_weight, counts, grad, loss_map, partial, num_pixels,
                num_counts, inner, plane, blocks, tiles, numbers, ignore, V: tl.constexpr,
                COUNTS: tl.constexpr):  # fmt: skip
    """Loss and gradient, V.pixels at a time: tile after tile, as many apart as there are programs.

    All that is one number a pixel is kept CLASSES x PIXELS, the same in every row: in the layout of the logits, so that
    nothing moves between threads but the sums over classes.
    """
    numbers = numbers_of(numbers, V)
    if ignore is not None:
        ignore = ignored(ignore)
    tau = numbers[0]
    ce_factor, mean_factor, _ = factors(counts, largest_weight, num_counts, num_pixels, 1.0, numbers, V, COUNTS)
    k = tl.arange(0, V.classes)[:, None]
    p = tl.arange(0, V.pixels)[None, :]
    ce_sum = tl.full([V.classes, V.pixels], 0.0, tl.float32)
    tckd_sum = ce_sum
    nckd_sum = ce_sum
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first, _left, at, step, inside = place(tile, inner, plane, blocks, V)
        s_tiles = read(student + at, step, inside, k, V)
        t_tiles = read(teacher + at, step, inside, k, V)
        if target is not None:
            label = tl.load(target + first + (k * 0 + p), mask=inside, other=0)
        else:
            label = likeliest(t_tiles, k, V)
        y, valid, known, weight = labels(label, class_weight, inside, ignore, V)
        terms, by, e = judged(s_tiles, t_tiles, y, known, weight, k, numbers, ce_factor, mean_factor, V)
        if grad is not None:
            y_late = late(y, valid, tau)
            for c in tl.static_range(tl.constexpr(V.chunks)):
                write(grad + at, step, inside, k, c, gradient(c, k, y_late, by, e, V), V)

        ce, tckd, nckd = counted(terms, valid, known, weight, tau, V)
        tckd_sum += tckd
        nckd_sum += nckd
        if V.with_ce:
            ce_sum += ce
        if loss_map is not None:
            value = _value(ce, tckd, nckd, numbers, V)
            tl.store(loss_map + first + (k * 0 + p), value, mask=inside & (k == 0))

    store_sums(partial, (ce_sum, tckd_sum, nckd_sum), k, V)


@triton.jit(do_not_specialize=["num_programs", "num_counts", "num_pixels"])
def finish_kernel(partial, largest_weight, counts, loss, parts, grad_scale, num_programs, num_counts, num_pixels,
                  gathered, numbers, V: tl.constexpr, COUNTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One program: the partial sums in a fixed order, the averages, the weighted loss. loss: None where it is a map."""
    numbers = numbers_of(numbers, V)
    ce = tl.zeros([BLOCK], tl.float32)
    tckd = tl.zeros([BLOCK], tl.float32)
    nckd = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_programs, BLOCK):
        i = start + tl.arange(0, BLOCK)
        there = i < num_programs
        if V.with_ce:
            ce += tl.load(partial + i, mask=there, other=0.0)
        tckd += tl.load(partial + num_programs + i, mask=there, other=0.0)
        nckd += tl.load(partial + 2 * num_programs + i, mask=there, other=0.0)
    ce = tl.sum(ce, 0)
    tckd = tl.sum(tckd, 0)
    nckd = tl.sum(nckd, 0)
    if V.mean:
        count, weight = totals(counts, num_counts, num_pixels, V, COUNTS)
        over = tl.where(count > 0, 1.0 / count, 0.0)
        tckd *= over
        nckd *= over
        ce *= tl.where(weight > 0, 1.0 / weight, 0.0)
    if loss is not None:
        tl.store(loss, _value(ce, tckd, nckd, numbers, V))
    tl.store(parts, tl.where(numbers[4] == 0, 0.0, ce))  # what takes no part is reported 0
    tl.store(parts + 1, tckd)
    tl.store(parts + 2, nckd)
    tl.store(grad_scale, factors(counts, largest_weight, num_counts, num_pixels, gathered, numbers, V, COUNTS)[2])


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
