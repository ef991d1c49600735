"""TNKD (and the pixel cross-entropy) on Triton: loss and gradient in one pass over the logits (triton_kernels.py).

Three launches: count the valid pixels from the labels alone (only where an average needs it); the pass over the logits,
as many programs as the GPU can have at work, each of which walks over tiles of pixels and holds all the classes of one
in registers, as a tuple; and one program that adds the programs' sums in a fixed order. Nothing is atomic and nothing
comes back to the host.

Variants: one kernel is compiled for each K and combination of dtypes, layout and flags that a process uses: a training
run uses one or two.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import triton_common
from ..triton_common import (
    LOG2_E,
    channels_last,
    define,
    dense,
    launch,
    most_programs,
    on_device,
    read_by_kernels,
    settled,
)
from . import op
from .objective import MEAN, NONE, Objective
from .plan import MOST_CLASSES, Config, choose
from .upsample import to_labels

__all__ = ["choose", "scale_in_place", "tnkd", "why_not"]

MOST_COMPILED = 4  # kernels of one variant, forward and backward
COUNT_PROGRAMS = 256  # upper bound, and the length of the vector in which every program adds the counts up
COUNT_BLOCK = 4096
SCALE_BLOCK = 2048
FINISH_BLOCK = 4096  # partial sums added at a time, of any number: one kernel for every batch


def why_not(*tensors: Tensor | None) -> str | None:
    """Why this backend cannot serve logits (N, K, *spatial) where they are, or None."""
    for x in tensors:
        if x is not None and x.dim() > 1 and x.shape[1] > MOST_CLASSES:
            return f"its kernel holds every class of a pixel in registers, {MOST_CLASSES} at most, got {x.shape[1]}"
    return triton_common.why_not(*tensors)


# ------------------------------------------------------------------------------------------------- the launches


class Variant(NamedTuple):
    """What kernels of TNKD and Jaccard are compiled for, beside types: a constant of theirs, as it is."""

    num_classes: int
    chunks: int  # tiles that have all of a pixel's classes
    pixels: int
    classes: int  # of a tile
    last: bool  # channels_last
    whole: bool  # every pixel of every tile exists, and no access needs a mask for it
    coupled: bool = False
    with_ce: bool = False
    mean: bool = False
    weighted: bool = False  # by classes
    float16: bool = False  # whose gradient leaves a power of two to grad_scale


class Walk:
    """The tiles of a call, and how programs share them out. table: plan.choose, or one like it; config replaces it."""

    def __init__(self, student: Tensor, teacher: Tensor, table: Callable[..., Config], config: Config | None) -> None:
        samples, num_classes = student.shape[:2]
        plane = student[0, 0].numel()
        self.last = channels_last(student)
        inner = samples * plane if self.last else plane
        itemsize = min(student.element_size(), teacher.element_size())
        config = config or table(num_classes, itemsize, not self.last, inner)
        blocks = -(-inner // config.pixels)
        tiles = blocks if self.last else samples * blocks
        self.sizes = (inner, plane, blocks, tiles)
        self.warps = config.warps
        chunks, whole = -(-num_classes // config.classes), inner % config.pixels == 0
        self.variant = Variant(num_classes, chunks, config.pixels, config.classes, self.last, whole)

    def programs(self, like: Tensor, crowd: int = 1) -> int:
        """crowd: a program takes the room of so many of its size."""
        return min(self.sizes[-1], max(1, most_programs(like, crowd * self.warps)))


def forward(
    student: Tensor,  # (N, K, *spatial)
    teacher: Tensor,  # (N, K, *spatial)
    target: Tensor | None,  # (N, *spatial)
    class_weight: Tensor | None,  # (K,)
    values: Tensor,  # (4,) float64: the weights of CE, TCKD and NCKD, the temperature; (3,), without the first: no CE
    ignore_index: Tensor | None,  # () int64
    coupled: bool,
    reduction: int,
    needs_grad: bool,
    config: Config | None = None,
    by_pointer: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op: loss, parts, grad, grad_scale (docs/ops.md). `config` replaces the table's launch choice.

    Numbers on the CPU are read here and become the kernels' arguments; those on the GPU are read by the kernels, and
    the host is not asked. `by_pointer` makes that choice for both (the interpreter's tensors all lie on the CPU).
    """
    from . import triton_kernels as kernels

    loss, parts, grad, grad_scale = op.fake(
        student, teacher, target, class_weight, values, ignore_index, coupled, reduction, needs_grad)  # fmt: skip
    num_classes, num_pixels = student.shape[1], student.numel() // student.shape[1]
    if num_classes > MOST_CLASSES:
        raise ValueError(f"student: expected at most {MOST_CLASSES} classes, got {num_classes}")
    if num_pixels == 0:
        return loss.zero_(), parts.zero_(), grad, grad_scale.fill_(1.0)
    asked = read(values, ignore_index if target is not None else None, by_pointer)
    walk = Walk(student, teacher, functools.partial(choose, with_ce=asked.with_ce), config)
    programs = walk.programs(student)
    weight = class_weight if asked.with_ce else None
    mean, float16 = reduction == MEAN, student.dtype == torch.float16
    if mean and weight is not None and target is None:
        raise ValueError(
            "target: expected labels (the teacher's argmax) where class weights are averaged over, got None"
        )
    target = None if target is None else target.contiguous()
    largest_weight = weight.amax() if float16 and weight is not None else None
    variant = walk.variant._replace(
        coupled=coupled, with_ce=asked.with_ce, mean=mean, weighted=weight is not None, float16=float16
    )
    partial = loss.new_empty([3, programs])
    out, counts, num_counts = dense(grad, walk.last) if needs_grad else None, None, 0
    with on_device(student):
        # without ignored pixels and class weights the count is known from the shape, and the labels are read once
        if mean and target is not None and (asked.ignore is not None or weight is not None):
            counts = count(target, weight, num_classes, asked.ignore)
            num_counts = counts.shape[1]
        launch(
            kernels.tnkd_kernel, programs, walk.warps,
            dense(student, walk.last), dense(teacher, walk.last), target, weight, largest_weight, counts, out,
            loss if reduction == NONE else None, partial, num_pixels, num_counts, *walk.sizes, asked.numbers,
            asked.ignore, V=variant, COUNTS=COUNT_PROGRAMS)  # fmt: skip
        launch(
            kernels.finish_kernel, 1, 8,
            partial, largest_weight, counts, None if reduction == NONE else loss, parts, grad_scale, programs,
            num_counts, num_pixels, 1.0, asked.numbers, V=variant, COUNTS=COUNT_PROGRAMS,
            BLOCK=FINISH_BLOCK)  # fmt: skip
    return loss, parts, grad if out is None else settled(grad, out, walk.last), grad_scale


class Asked(NamedTuple):
    """The ops' numbers, as arguments of the kernels: read here where they lie on the CPU, else by the kernels."""

    numbers: Tensor | tuple[float, ...]  # temperature, log2(e) / temperature, weights of TCKD, NCKD and CE
    with_ce: bool
    ignore: Tensor | int | None


def read(values: Tensor, ignore_index: Tensor | None, by_pointer: bool | None) -> Asked:
    """by_pointer: as for `forward`."""
    ignore: Tensor | int | None = ignore_index
    if ignore_index is not None and not read_by_kernels(ignore_index, by_pointer):
        ignore = int(ignore_index)
    if read_by_kernels(values, by_pointer):
        return Asked(values, len(values) == 4, ignore)
    ce, tckd, nckd, temperature = [0.0, *values.tolist()][-4:]
    return Asked((temperature, LOG2_E / temperature, tckd, nckd, ce), ce != 0, ignore)


def count(target: Tensor, class_weight: Tensor | None, num_classes: int, ignore: Tensor | int | None) -> Tensor:
    """(2, programs): valid labels, and their class weights added up, in up to COUNT_PROGRAMS partial sums."""
    from . import triton_kernels as kernels

    programs = min(-(-target.numel() // COUNT_BLOCK), COUNT_PROGRAMS)
    counts = torch.empty([2, programs], dtype=torch.float32, device=target.device)
    launch(
        kernels.count_kernel, programs, 4,
        target, class_weight, counts, len(target), target[0].numel(), num_classes, ignore,
        BLOCK=COUNT_BLOCK)  # fmt: skip
    return counts


def scale_in_place(grad: Tensor, factor: Tensor) -> None:
    """grad *= factor, a scalar on grad's device: one launch, which ends at once where the factor is exactly 1.

    grad must be dense, in any memory format: its storage is walked from end to end.
    """
    from . import triton_kernels as kernels

    total = grad.numel()
    if total == 0:
        return
    with on_device(grad):
        launch(kernels.scale_kernel, -(-total // SCALE_BLOCK), 4, grad, factor, total, BLOCK=SCALE_BLOCK)


define("tnkd_triton", op.SIGNATURE, forward)
_op = op.register("tnkd_triton", op.fake)


def tnkd(
    student_logits: Tensor, teacher_logits: Tensor | None, target: Tensor | None, objective: Objective
) -> tuple[Tensor, Tensor]:
    """(loss, parts); the arguments are reference.tnkd's."""
    student, teacher = to_labels(student_logits, teacher_logits, target, objective.align_corners)
    packed = objective.packed(target, student.device)
    return op.call(_op, scale_in_place, student, teacher, op.labels(teacher, target, objective), *packed)
