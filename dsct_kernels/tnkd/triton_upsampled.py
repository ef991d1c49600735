"""TNKD on Triton of logits smaller than the labels: read at their own size, and nothing of the labels' size is made.

Two launches: the walk over the labels (triton_upsampled_kernels.py), which leaves the gradient's sums, the losses' and
the number of valid pixels of each program; and the sum of all that, in a fixed order, which divides by that number.
With class weights in a mean a third comes first, as in triton.py: cross-entropy is divided by another sum.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..triton_common import channels_last, define, dense, launch, most_programs, next_power_of_2, on_device, settled
from . import op, triton
from .objective import MEAN, NONE, Objective
from .plan import MOST_CLASSES, UpsampledConfig, choose_upsampled
from .triton import COUNT_PROGRAMS, FINISH_BLOCK, Variant, count, read, scale_in_place
from .upsample import smaller

__all__ = ["UPSAMPLES_ON", "forward", "serves", "tnkd"]

UPSAMPLES_ON = ("cuda", "cpu")  # the latter under the interpreter; what `serves` leaves out is upsampled beforehand
MOST_PROGRAMS = 4096  # whose counts every program of the second kernel adds up
COLLECTED = (16, 64)  # classes and cells of a row that a program adds up at a time


class Cells(NamedTuple):
    """A network's logits, dense, or the gradient."""

    logits: Tensor | None
    height: int
    width: int


class March(NamedTuple):
    """What march_kernel is compiled for beside a `Variant`: a constant of the kernels, as it is."""

    slots: int
    rows: int
    align: bool
    same: bool  # both networks' logits have one size


def serves(student: Tensor, teacher: Tensor, target: Tensor | None, objective: Objective) -> bool:
    """Whether this file has the call: not a map, not a mean over class weights that nobody has labelled.

    A map's gradient would be known only when the upstream one is; the others are rare. Their logits are upsampled
    beforehand.
    """
    averaged = objective.class_weight is not None and objective.reduction == MEAN and objective.may_have_ce()
    return objective.reduction != NONE and not (target is None and averaged)


def _gathered(inputs: int, outputs: int, align_corners: bool) -> float:
    """No less than what the weights of a cell's outputs add up to."""
    if inputs in (1, outputs):
        return float(outputs // inputs)
    return ((outputs - 1) / (inputs - 1) if align_corners else outputs / inputs) + 2


def forward(
    student: Tensor,  # (N, K, h, w)
    teacher: Tensor,  # (N, K, h, w)
    target: Tensor | None,  # (N, H, W)
    class_weight: Tensor | None,
    values: Tensor,
    ignore_index: Tensor | None,
    coupled: bool,
    reduction: int,
    align_corners: bool,
    needs_grad: bool,
    config: UpsampledConfig | None = None,
    by_pointer: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op: loss, parts, grad, grad_scale (docs/ops.md). The last two arguments are as for triton.forward."""
    from . import triton_upsampled_kernels as kernels

    loss, parts, grad, grad_scale = op.fake_upsampled(
        student, teacher, target, class_weight, values, ignore_index, coupled, reduction, align_corners, needs_grad
    )  # fmt: skip
    samples, num_classes = student.shape[:2]
    if num_classes > MOST_CLASSES:
        raise ValueError(f"student: expected at most {MOST_CLASSES} classes, got {num_classes}")
    if reduction == NONE:
        raise ValueError("reduction: expected a mean or a sum, got none")
    height, width = checks.label_size(student, teacher, target)
    num_pixels = samples * height * width
    if num_pixels == 0:
        return loss.zero_(), parts.zero_(), grad, grad_scale.fill_(1.0)
    h_s, w_s = student.shape[2:]

    asked = read(values, ignore_index if target is not None else None, by_pointer)
    weight, mean, float16 = class_weight if asked.with_ce else None, reduction == MEAN, student.dtype == torch.float16
    weighted = mean and weight is not None
    if weighted and target is None:
        raise ValueError("target: expected labels where class weights are averaged over, got None")
    largest_weight = weight.amax() if float16 and weight is not None else None

    if config is None:
        config = choose_upsampled(num_classes, (h_s, w_s), (height, width), align_corners)
    before = 0 if align_corners else 1  # intervals before the first cell
    tiles = -(-w_s * config.parts // (config.pixels // config.slots))
    strips = -(-(h_s + before) // config.rows)
    items = samples * strips * tiles
    programs = min(items, most_programs(student, 2 * config.warps), MOST_PROGRAMS)
    side = tiles * config.pixels // config.slots
    last = channels_last(student)
    variant = Variant(
        num_classes, -(-num_classes // config.classes), config.pixels, config.classes, last, False, coupled,
        asked.with_ce, mean, weighted, float16
    )  # fmt: skip
    march = March(config.slots, config.rows, align_corners, teacher.shape == student.shape)
    slab_size = samples * strips * (config.rows + 1) * num_classes * 2 * side
    slab, out = (loss.new_empty(slab_size), dense(grad, last)) if needs_grad else (None, None)
    partial, own_counts = (loss.new_empty(size, dtype=torch.float32) for size in (3 * programs, programs))
    target = None if target is None else target.contiguous()
    counts, most = own_counts if mean and asked.ignore is not None else None, MOST_PROGRAMS
    with on_device(student):
        if weighted:
            assert target is not None
            counts, most = count(target, weight, num_classes, asked.ignore), COUNT_PROGRAMS
        num_counts = 0 if counts is None else counts.shape[-1]
        launch(
            kernels.march_kernel, programs, config.warps,
            Cells(dense(student, last), h_s, w_s), Cells(dense(teacher, last), *teacher.shape[2:]), target, weight,
            counts if weighted else None, slab, own_counts, partial, num_pixels, num_counts, items, tiles, strips,
            config.parts, height, width, asked.numbers, asked.ignore, 0, V=variant, M=march, COUNTS=most)  # fmt: skip
        classes, columns = (min(most, next_power_of_2(n)) for most, n in zip(COLLECTED, (num_classes, w_s)))
        class_tiles, cell_tiles = -(-num_classes // classes), -(-w_s // columns)
        cells = samples * h_s * class_tiles * cell_tiles if needs_grad else 0
        gathered = _gathered(h_s, height, align_corners) * _gathered(w_s, width, align_corners)
        launch(
            kernels.collect_kernel, max(1, min(cells, most_programs(student, 8))), 4,
            slab, Cells(out, h_s, w_s), partial, largest_weight, counts, loss, parts, grad_scale, programs, num_counts,
            num_pixels, cells, cell_tiles, class_tiles, strips, config.parts, side, gathered, asked.numbers, V=variant,
            M=march, CLASSES=classes, COLUMNS=columns, COUNTS=most, BLOCK=FINISH_BLOCK)  # fmt: skip
    return loss, parts, grad if out is None else settled(grad, out, last), grad_scale


define("tnkd_triton_upsampled", op.UPSAMPLED_SIGNATURE, forward)
_op = op.register("tnkd_triton_upsampled", op.fake_upsampled)


def tnkd(
    student_logits: Tensor, teacher_logits: Tensor | None, target: Tensor | None, objective: Objective
) -> tuple[Tensor, Tensor]:
    """(loss, parts) of every call that Triton has; the arguments are reference.tnkd's."""
    teacher = student_logits.detach() if teacher_logits is None else teacher_logits
    if not (smaller(student_logits, teacher, target) and serves(student_logits, teacher, target, objective)):
        return triton.tnkd(student_logits, teacher_logits, target, objective)
    args = objective.packed(target, student_logits.device)
    return op.call(_op, scale_in_place, student_logits, teacher, target, *args, objective.align_corners)
