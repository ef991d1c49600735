"""TNKD (and the pixel cross-entropy) in Triton: the kernels that triton.py launches.

For every pixel, with e_j = exp(logit_j / tau) relative to the largest but the target's, and e_y left out:

    u    = logit_y / tau - log(sum e)        b = sigmoid(u)
    TCKD = b^T (softplus(-u^S) - softplus(-u^T)) + (1 - b^T) (softplus(u^S) - softplus(u^T))
    NCKD = sum e^T (log e^T - log e^S) / sum e^T - log(sum e^T) + log(sum e^S)

COUPLED: (1 - b^T) NCKD takes the place of NCKD; with equal weights the sum is plain KD, the KL of the whole softmax.

A tile is CLASSES x PIXELS of dense maps. Exponents are one fused multiply-add, rounded once, relative to their size:
exact where the logits are close, for |logit| / tau up to 10^8 (above, the shift's own rounding leaves float32's range).
In every kernel V is the `Variant` of triton.py, D its `Divisor`.
"""

# mypy: ignore-errors

from collections import namedtuple

import triton
import triton.language as tl

from .. import triton_math
from ..triton_math import LN_2, LOG2_E, LOW, finite_max, reciprocal

Numbers = namedtuple("Numbers", "ce tckd nckd tau to_2_tau")  # weights, temperature, log2(e) over that
# Of a tile the first pixel, of all; how many are left from there; where in the maps the tile is, and how far the next
# chunk of classes; which pixels exist.
Place = namedtuple("Place", "first left at step inside")
# The class, -1 where it is none; whether the pixel counts; whether it is a class; its weight in cross-entropy.
Label = namedtuple("Label", "y valid known weight")


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
def _u(at_y, none, log_sum):
    """u, of the target's exponent; infinite where every other class is absent and the target has all the mass. +inf is
    no number to learn from, and would pass for that, which in turn would hide a NaN."""
    u = tl.where(none, float("inf"), tl.fma(at_y, LN_2, -log_sum))
    return tl.where(at_y < float("inf"), u, float("nan"))


@triton.jit
def _weighted(weight, part):
    """A part with weight 0 takes no part: 0 * inf would be NaN. But a NaN is never hidden."""
    return tl.where(weight == 0, tl.where(part == part, 0.0, part), weight * part)


@triton.jit
def numbers_of(numbers, V: tl.constexpr):
    """`Numbers`, as they came or from device memory."""
    found = triton_math.numbers_of(numbers, 4 if V.with_ce else 3)
    if V.with_ce:
        found = Numbers(*found)
    else:
        found = Numbers(0.0, *found)
    return found


@triton.jit
def ignored(ignore):
    """ignore_index, as it came or from device memory. Not for None: Triton 3.6 returns none of those."""
    if ignore.dtype.is_ptr():
        ignore = tl.load(ignore)
    return ignore


@triton.jit
def _pixel(at_s, sum_s, at_t, sum_t, at_1, sum_1, cross, by_ce, by_tckd, by_nckd, V: tl.constexpr):
    """Sums over the classes of one network pair -> the terms, TCKD, NCKD and CE, and what makes the gradient.

    sum: of e_j = exp2(x_j * to_2_tau - shift), at: the target's exponent, both of the student, of the teacher, and of
    the student at temperature 1; cross: sum of e^T_j times the difference of the exponents. The shift is a rounded
    product: 2^its error is in every e_j of the pixel and in the target's exponent alike, and cancels. by: a term's
    factor in the gradient, which is of_s * e^S_j + of_t * e^T_j + of_1 * e1_j, and of_y for the target.
    """
    none_s = sum_s == 0
    none_t = sum_t == 0
    sum_s = tl.where(none_s, 1.0, sum_s)
    sum_t = tl.where(none_t, 1.0, sum_t)
    over_s = reciprocal(sum_s)
    over_t = reciprocal(sum_t)
    log_t = _log(sum_t)
    ratio = sum_s * over_t
    ratio += tl.fma(-ratio, sum_t, sum_s) * over_t  # what was rounded away: equal sums have the ratio 1, its log is 0
    log_ratio = _log(ratio)
    u_s = _u(at_s, none_s, log_t + log_ratio)
    u_t = _u(at_t, none_t, log_t)
    if V.num_classes == 2:  # one beside the target: nothing to compare, not even where the student has it at -inf
        nckd = log_ratio * 0.0
        if V.coupled:  # which the sum of KD does tell
            nckd = tl.where(none_s, float("inf"), nckd)
        else:
            by_nckd = by_nckd * 0.0
    else:
        nckd = cross * over_t * LN_2 + log_ratio
        nckd = tl.where(none_s, float("inf"), nckd)
        nckd = tl.where(none_t, 0.0, nckd)
        by_nckd = tl.where(none_t, 0.0, by_nckd)  # a teacher without other classes: nothing to learn from it
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
    of_y = by_tckd * gap
    if V.coupled:
        others_s = tl.where(u_t > 0, side_s, more_s * tl.where(v_s >= 0, e_s, 1.0))  # 1 - b^S
        others_t = tl.where(u_t > 0, less_t, more_t)
        nckd = tl.where(others_t == 0, 0.0, others_t * nckd)
        of_s = (by_tckd * others_s + (by_nckd - by_tckd) * others_t) * over_s
        of_t = -by_nckd * others_t * over_t
    else:
        of_s = (by_nckd - of_y) * over_s
        of_t = -by_nckd * over_t
    ce = gap
    of_1 = gap
    if V.with_ce:
        sum_1 = tl.where(none_s, 1.0, sum_1)
        u_1 = _u(at_1, none_s, _log(sum_1))
        e_1 = tl.exp2(tl.abs(u_1) * -LOG2_E)
        missed = by_ce * reciprocal(1.0 + e_1) * tl.where(u_1 >= 0, e_1, 1.0)
        ce = tl.maximum(-u_1, 0.0) + _log1p(e_1)
        of_1 = missed * reciprocal(sum_1)
        of_y -= missed
    return (tckd, nckd, ce), (of_s, of_t, of_1, of_y)


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
def totals(D, V: tl.constexpr):
    """The number of valid pixels and the sum of their class weights, added in the same order by everyone who asks."""
    count = D.pixels
    if D.counts is not None:
        i = tl.arange(0, V.counts)
        count = tl.sum(tl.load(D.counts + i, mask=i < D.programs, other=0.0).to(tl.float64), 0).to(tl.float32)
    weight = count
    if V.weighted:
        weight = tl.sum(tl.load(D.counts + tl.cast(D.programs, tl.int32) + i, mask=i < D.programs, other=0.0), 0)
    return count, weight


@triton.jit
def averages(D, V: tl.constexpr):
    """What the sums of TNKD's terms and of cross-entropy are multiplied by: 1, or one over what is averaged over."""
    of_tnkd = tl.full([], 1.0, tl.float32)
    of_ce = of_tnkd
    if V.mean:
        count, weight = totals(D, V)
        of_tnkd = tl.where(count > 0, 1.0 / count, 0.0)
        of_ce = tl.where(weight > 0, 1.0 / weight, 0.0)
    return of_tnkd, of_ce


@triton.jit
def factors(D, N, V: tl.constexpr):
    """What the gradients of TNKD's terms and, weighted, of cross-entropy are multiplied by, both divided by the third:
    the power of two that is left to grad_scale."""
    of_tnkd, of_ce = averages(D, V)
    of_ce *= N.ce
    outside = tl.full([], 1.0, tl.float32)
    if V.float16:
        bound = N.tau * (N.tckd + N.nckd) * of_tnkd
        if V.with_ce:
            if D.largest_weight is not None:
                bound += of_ce * tl.load(D.largest_weight)
            else:
                bound += of_ce
        outside = _float16_scale(bound * D.gathered)
        of_tnkd /= outside
        of_ce /= outside
    return of_tnkd, of_ce, outside


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
    """`Label`."""
    label = label.to(tl.int64)
    valid = inside
    if ignore is not None:
        valid = inside & (label != ignore)
    known = (label >= 0) & (label < V.num_classes)
    weight = tl.where(valid, 1.0, 0.0)
    if class_weight is not None:
        weight = tl.load(class_weight + label, mask=valid & known, other=0.0)
    return Label(tl.where(known, label, -1).to(tl.int32), valid, known, weight)


@triton.jit
def place(tile, inner, plane, blocks, V: tl.constexpr):
    """`Place`. channels_last has all its pixels in one sample, of `inner`."""
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
    return Place(first, left, at, step, inside)


@triton.jit
def read(logits, here, k, V: tl.constexpr):
    """Every logit of the tile, once. The compiler drops a mask that is true throughout."""
    tiles = ()
    for c in tl.static_range(tl.constexpr(V.chunks)):
        there = here.inside & (c * V.classes + k < V.num_classes)
        tiles += (tl.load(logits + here.at + c * here.step, mask=there, other=LOW),)
    return tiles


@triton.jit
def write(grad, here, k, c, g, V: tl.constexpr):
    """A chunk's gradient."""
    there = here.inside & (c * V.classes + k < V.num_classes)
    tl.store(grad + here.at + c * here.step, g.to(grad.dtype.element_ty), mask=there)


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
def judged(s_tiles, t_tiles, label, k, scale, by, V: tl.constexpr):
    """The terms of the tile's pixels, and what makes their gradient: factors and exponentials. by: as for `_pixel`."""
    by_ce, by_tckd, by_nckd = by
    y_s, s_others, top_s = _aside(s_tiles, label.y, k, V)
    y_t, t_others, top_t = _aside(t_tiles, label.y, k, V)
    y_s = tl.where(label.known, y_s, float("nan"))  # a bad label: NaN spreads to the loss and every factor
    shift_s = top_s * scale
    shift_t = top_t * scale
    at_s = tl.fma(y_s, scale, -shift_s)
    e_s, sum_s = exponentials(s_others, scale, shift_s)
    e_t, sum_t = exponentials(t_others, scale, shift_t)
    at_1, e_1, sum_1 = at_s, e_s, sum_s
    if V.with_ce:
        at_1 = tl.fma(y_s, LOG2_E, top_s * -LOG2_E)
        e_1, sum_1 = exponentials(s_others, LOG2_E, top_s * LOG2_E)
    # of e^T times the difference, a class that the teacher rules out left out
    cross = tl.zeros(e_t[0].shape, tl.float32)
    for c in tl.static_range(tl.constexpr(V.chunks)):
        apart = tl.fma(t_others[c], scale, -shift_t) - tl.fma(s_others[c], scale, -shift_s)
        cross += e_t[c] * tl.where(e_t[c] == 0, 0.0, apart)
    terms, of = _pixel(at_s, sum_s, tl.fma(y_t, scale, -shift_t), sum_t, at_1, sum_1, tl.sum(cross, 0, keep_dims=True),
                       by_ce * label.weight, by_tckd, by_nckd, V)  # fmt: skip
    return terms, of, (e_s, e_t, e_1)


@triton.jit
def late(label, tau):
    """The class for `gradient`, -2 where the pixel does not count. Plus 0, but the compiler cannot know: else it keeps
    a predicate for each logit since the first comparison, packed into registers: a third of all instructions."""
    never = tau < 0
    return tl.where(label.valid, label.y, -2) + never.to(tl.int32)


@triton.jit
def gradient(c, k, y, of, e, V: tl.constexpr):
    """The gradient of a chunk's logits; y: -2 where the pixel does not count."""
    of_s, of_t, of_1, of_y = of
    e_s, e_t, e_1 = e
    g = of_s * e_s[c] + of_t * e_t[c]
    if V.with_ce:
        g += of_1 * e_1[c]
    g = tl.where(c * V.classes + k == y, of_y, g)
    return tl.where(y != -2, g, 0.0)


@triton.jit
def counted(terms, label, tau, V: tl.constexpr):
    """TCKD, NCKD and, if there is one, CE, as they are added up: an ignored pixel's NaN is dropped by selection, never
    by multiplication."""
    tckd, nckd, ce = terms
    tckd = tl.where(label.valid, tckd, 0.0) * (tau * tau)
    nckd = tl.where(label.valid, tl.where(label.known, nckd, float("nan")), 0.0) * (tau * tau)
    found = (tckd, nckd)
    if V.with_ce:
        ce = tl.where(label.weight == 0, 0.0, ce * label.weight)
        found += (tl.where(label.valid & (label.known == 0), float("nan"), ce),)
    return found


@triton.jit
def zeros(COUNT: tl.constexpr, CLASSES: tl.constexpr, PIXELS: tl.constexpr):
    """So many tiles of 0."""
    found = ()
    for _ in tl.static_range(COUNT):
        found += (tl.full([CLASSES, PIXELS], 0.0, tl.float32),)
    return found


@triton.jit
def added(a, b):
    """Term by term."""
    found = ()
    for i in tl.static_range(tl.constexpr(len(a))):
        found += (a[i] + b[i],)
    return found


@triton.jit
def store_sums(partial, sums, k):
    """The sums of this program, each pixel once."""
    for i in tl.static_range(tl.constexpr(len(sums))):
        at = partial + i * tl.num_programs(0) + tl.program_id(0)
        tl.store(at, tl.sum(tl.where(k == 0, sums[i], 0.0)))


@triton.jit
def _value(terms, N, V: tl.constexpr):
    """The weighted sum."""
    value = _weighted(N.tckd, terms[0]) + _weighted(N.nckd, terms[1])
    if V.with_ce:
        value += _weighted(N.ce, terms[2])
    return value


# What changes with the batch is not specialised: Triton would compile anew where it becomes 1 or a multiple of 16.
@triton.jit(do_not_specialize=["inner", "blocks", "tiles", "ignore"])
def tnkd_kernel(student, teacher, target, class_weight, D, grad, loss_map, partial, inner, plane, blocks, tiles,
                numbers, ignore, V: tl.constexpr):  # fmt: skip
    """Loss and gradient, V.pixels at a time: tile after tile, as many apart as there are programs.

    All that is one number a pixel is kept CLASSES x PIXELS, the same in every row: in the layout of the logits, so that
    nothing moves between threads but the sums over classes.
    """
    N = numbers_of(numbers, V)
    if ignore is not None:
        ignore = ignored(ignore)
    of_tnkd, of_ce, _outside = factors(D, N, V)
    by = (of_ce, N.tau * of_tnkd * N.tckd, N.tau * of_tnkd * N.nckd)
    k = tl.arange(0, V.classes)[:, None]
    p = tl.arange(0, V.pixels)[None, :]
    sums = zeros(3 if V.with_ce else 2, V.classes, V.pixels)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        here = place(tile, inner, plane, blocks, V)
        s_tiles = read(student, here, k, V)
        t_tiles = read(teacher, here, k, V)
        if target is not None:
            label = tl.load(target + here.first + (k * 0 + p), mask=here.inside, other=0)
        else:
            label = likeliest(t_tiles, k, V)
        label = labels(label, class_weight, here.inside, ignore, V)
        terms, of, e = judged(s_tiles, t_tiles, label, k, N.to_2_tau, by, V)
        if grad is not None:
            y = late(label, N.tau)
            for c in tl.static_range(tl.constexpr(V.chunks)):
                write(grad, here, k, c, gradient(c, k, y, of, e, V), V)
        terms = counted(terms, label, N.tau, V)
        sums = added(sums, terms)
        if loss_map is not None:
            tl.store(loss_map + here.first + (k * 0 + p), _value(terms, N, V), mask=here.inside & (k == 0))
    store_sums(partial, sums, k)


@triton.jit(do_not_specialize=["num_programs"])
def finish_kernel(partial, D, loss, parts, grad_scale, num_programs, numbers, V: tl.constexpr, BLOCK: tl.constexpr):
    """One program: the partial sums in a fixed order, the averages, the weighted loss. loss: None where it is a map."""
    N = numbers_of(numbers, V)
    sums = zeros(3 if V.with_ce else 2, 1, BLOCK)
    for start in range(0, num_programs, BLOCK):
        i = start + tl.arange(0, BLOCK)[None, :]
        part = ()
        for term in tl.static_range(tl.constexpr(len(sums))):
            part += (tl.load(partial + term * num_programs + i, mask=i < num_programs, other=0.0),)
        sums = added(sums, part)
    of_tnkd, of_ce = averages(D, V)
    terms = (tl.sum(sums[0]) * of_tnkd, tl.sum(sums[1]) * of_tnkd)
    ce = of_ce * 0.0
    if V.with_ce:
        terms += (tl.sum(sums[2]) * of_ce,)
        ce = tl.where(N.ce == 0, 0.0, terms[2])  # what takes no part is reported 0
    if loss is not None:
        tl.store(loss, _value(terms, N, V))
    tl.store(parts, ce)
    tl.store(parts + 1, terms[0])
    tl.store(parts + 2, terms[1])
    tl.store(grad_scale, factors(D, N, V)[2])


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
