"""TNKD on Triton of logits smaller than the labels: read at their own size, and nothing of the labels' size is made.

Two launches: the walk over the labels (triton_upsampled_kernels.py), which leaves the gradient's sums, the losses' and
the number of valid pixels of each program; and the sum of all that, in a fixed order, which divides by that number.
With class weights in a mean a third comes first, as in triton.py: cross-entropy is divided by another sum.
"""

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..triton_common import define, fast, launch, most_programs, next_power_of_2, on_device
from . import op, triton
from .objective import MEAN, NONE, Objective
from .plan import MOST_CLASSES, UpsampledConfig, choose_upsampled
from .triton import COUNT_PROGRAMS, FINISH_BLOCK, count, read, scale_in_place
from .upsample import smaller

__all__ = ["UPSAMPLES_ON", "forward", "serves", "tnkd"]

UPSAMPLES_ON = ("cuda", "cpu")  # the latter under the interpreter; what `serves` leaves out is upsampled beforehand
MOST_PROGRAMS = 4096  # whose counts every program of the second kernel adds up
COLLECTED = (16, 64)  # classes and cells of a row that a program adds up at a time


def serves(student: Tensor, teacher: Tensor, target: Tensor | None, objective: Objective) -> bool:
    """Whether this file has the call: not a map, not float64, not a mean over class weights that nobody has labelled.

    A map's gradient would be known only when the upstream one is; the others are rare. Their logits are upsampled
    beforehand.
    """
    averaged = objective.class_weight is not None and objective.reduction == MEAN and objective.may_have_ce()
    narrow = torch.float64 not in (student.dtype, teacher.dtype)
    return objective.reduction != NONE and narrow and not (target is None and averaged)


def _step(inputs: int, outputs: int, align_corners: bool) -> tuple[float, float]:
    """Cells from one output to the next, and how many outputs a cell has."""
    if align_corners:
        return ((inputs - 1) / (outputs - 1) if outputs > 1 else 0.0), (outputs - 1) / max(1, inputs - 1)
    return inputs / outputs, outputs / inputs


def _gathered(inputs: int, outputs: int, align_corners: bool) -> float:
    """No less than what the weights of a cell's outputs add up to."""
    if inputs in (1, outputs):
        return float(outputs // inputs)
    return _step(inputs, outputs, align_corners)[1] + 2


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
    if reduction == NONE or loss.dtype == torch.float64:
        raise ValueError("student: expected a mean or a sum in 16 or 32 bits, got a map or float64")
    height, width = checks.label_size(student, teacher, target)
    num_pixels = samples * height * width
    if num_pixels == 0:
        return loss.zero_(), parts.zero_(), grad, grad_scale.fill_(1.0)
    (h_s, w_s), (h_t, w_t) = student.shape[2:], teacher.shape[2:]

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
    slab_size = samples * strips * (config.rows + 1) * num_classes * 2 * side if needs_grad else 0
    slab, partial = (loss.new_empty(size) for size in (slab_size, 3 * programs))
    own_counts = torch.empty(programs, dtype=torch.int64, device=student.device)
    steps = [_step(*sizes, align_corners) for sizes in ((h_s, height), (w_s, width), (h_t, height), (w_t, width))]
    counts, weights = own_counts, None
    with on_device(student):
        if weighted:
            assert target is not None
            counts, weights = count(target, weight, num_classes, asked, loss)
        flags: dict[str, Any] = {
            "NUM_CLASSES": num_classes, "ROWS": config.rows, "ALIGN": align_corners, "WITH_CE": asked.with_ce,
            "HAS_WEIGHT": weight is not None, "COUNTS": COUNT_PROGRAMS if weighted else MOST_PROGRAMS,
        }  # fmt: skip
        launch(
            kernels.march_kernel, programs, config.warps,
            student, teacher, target, weight, counts if weighted else None, weights, slab, own_counts, partial,
            num_pixels, counts.numel(), items, tiles, strips, config.parts, height, width, h_s, w_s, h_t, w_t,
            *student.stride(), *teacher.stride(), *(target.stride() if target is not None else (0, 0, 0)),
            *steps[0], *steps[1], steps[2][0], steps[3][0], asked.temperature, 1.0 / asked.temperature, *asked.weights,
            asked.ignore, 0, asked.at, asked.ignore_at,
            CHUNKS=-(-num_classes // config.classes), PIXELS=config.pixels, CLASSES=config.classes, SLOTS=config.slots,
            HAS_TARGET=target is not None, HAS_IGNORE=asked.has_ignore, HAS_COUNT=weighted, NEEDS_GRAD=needs_grad,
            SAME=teacher.shape == student.shape, COUPLED=coupled, FAST=fast(loss), **flags)  # fmt: skip
        classes, columns = (min(most, next_power_of_2(n)) for most, n in zip(COLLECTED, (num_classes, w_s)))
        class_tiles, cell_tiles = -(-num_classes // classes), -(-w_s // columns)
        cells = samples * h_s * class_tiles * cell_tiles if needs_grad else 0
        gathered = _gathered(h_s, height, align_corners) * _gathered(w_s, width, align_corners)
        launch(
            kernels.collect_kernel, max(1, min(cells, most_programs(student, 8))), 4,
            slab, grad if needs_grad else None, partial, largest_weight, counts, weights, loss, parts, grad_scale,
            programs, counts.numel(), num_pixels, cells, cell_tiles, class_tiles, strips, config.parts, side, h_s, w_s,
            *(grad.stride() if needs_grad else (0, 0, 0, 0)), gathered, asked.temperature,
            *asked.weights, asked.at, CLASSES=classes, COLUMNS=columns, MEAN_=mean, FLOAT16=float16,
            HAS_COUNT=mean and asked.has_ignore, NEEDS_GRAD=needs_grad, BLOCK=FINISH_BLOCK, **flags)  # fmt: skip
    return loss, parts, grad, grad_scale


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
