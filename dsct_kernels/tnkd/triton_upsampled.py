"""TNKD on Triton of logits smaller than the labels: read at their own size, and nothing of the labels' size is made.

Two launches: the walk over the labels (triton_upsampled_kernels.py), which leaves the gradient's sums, the losses' and
the number of valid pixels of each program; and the sum of all that, in a fixed order, which divides by that number.
With class weights in a mean a third comes first, as in triton.py: cross-entropy is divided by another sum.
"""

from typing import NamedTuple

from torch import Tensor

from .. import checks
from ..triton_common import channels_last, define, dense, launch, most_programs, next_power_of_2, on_device, settled
from . import op, triton
from .objective import MEAN, NONE, Objective
from .plan import UpsampledConfig, choose_upsampled
from .triton import COUNT_PROGRAMS, FINISH_BLOCK, Asked, Variant, scale_in_place
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

    slots: int  # these three: of an UpsampledConfig
    parts: int
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

    args = (student, teacher, target, class_weight, values, ignore_index, coupled, reduction)
    loss, parts, grad, grad_scale = op.fake_upsampled(*args, align_corners, needs_grad)
    if reduction == NONE:
        raise ValueError("reduction: expected a mean or a sum, got none")
    asked = Asked(student, *args[2:], by_pointer)
    samples, num_classes, h, w = student.shape
    height, width = checks.label_size(student, teacher, target)
    num_pixels = samples * height * width
    if num_pixels == 0:
        return loss.zero_(), parts.zero_(), grad, grad_scale.fill_(1.0)

    pixels, classes, warps, slots, divided, rows = config or choose_upsampled(
        num_classes, (h, w), (height, width), align_corners
    )
    tiles = -(-w * divided // (pixels // slots))
    side = tiles * pixels // slots
    strips = -(-(h + (not align_corners)) // rows)  # of intervals: one more before the first cell
    items = samples * strips * tiles
    programs = min(items, most_programs(student, 2 * warps), MOST_PROGRAMS)
    last = channels_last(student)
    counts_of = COUNT_PROGRAMS if asked.weighted else MOST_PROGRAMS
    chunks = -(-num_classes // classes)
    variant = Variant(num_classes, chunks, pixels, classes, last, counts=counts_of)._replace(**asked.flags)
    march = March(slots, divided, rows, align_corners, teacher.shape == student.shape)
    slab = loss.new_empty([samples, strips, rows + 1, num_classes, 2, side]) if needs_grad else None
    out = dense(grad, last) if needs_grad else None
    partial, own_counts = loss.new_empty([3, programs]), loss.new_empty([programs])
    with on_device(student):
        counts = asked.counts(num_classes) if asked.weighted else own_counts
        divisor = asked.divisor(
            counts if asked.weighted or (asked.mean and asked.ignore is not None) else None, num_pixels,
            _gathered(h, height, align_corners) * _gathered(w, width, align_corners))  # fmt: skip
        launch(
            kernels.march_kernel, programs, warps,
            Cells(dense(student, last), h, w), Cells(dense(teacher, last), *teacher.shape[2:]), asked.target,
            asked.weight, divisor, slab, own_counts, partial, items, tiles, strips, height, width, asked.numbers,
            asked.ignore, 0, V=variant, M=march)  # fmt: skip
        classes, columns = (min(most, next_power_of_2(n)) for most, n in zip(COLLECTED, (num_classes, w)))
        cells = samples * h * -(-num_classes // classes) * -(-w // columns) if needs_grad else 0
        launch(
            kernels.collect_kernel, max(1, min(cells, most_programs(student, 8))), 4,
            slab, Cells(out, h, w), partial, divisor, loss, parts, grad_scale, programs, cells, strips, side,
            asked.numbers, V=variant, M=march, CLASSES=classes, COLUMNS=columns, BLOCK=FINISH_BLOCK)  # fmt: skip
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
