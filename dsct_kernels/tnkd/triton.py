"""TNKD (and the pixel cross-entropy) on Triton: loss and gradient in one pass over the logits (triton_kernels.py).

Three launches: count the valid pixels from the labels alone (only where an average needs it); the pass over the logits,
as many programs as the GPU can have at work, each of which walks over tiles of pixels and holds all the classes of one
in registers, as a tuple; and one program that adds the programs' sums in a fixed order. Nothing is atomic and nothing
comes back to the host.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import triton_common
from ..triton_common import channels_last, define, dense, launch, most_programs, numbers_for, on_device, settled
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
    whole: bool = False  # every pixel of every tile exists, and no access needs a mask for it
    coupled: bool = False
    with_ce: bool = False
    mean: bool = False
    weighted: bool = False  # by classes
    float16: bool = False  # whose gradient leaves a power of two to grad_scale
    counts: int = COUNT_PROGRAMS  # upper bound


class Divisor(NamedTuple):
    """What sums and gradient are divided by. Numbers as floats, for which Triton compiles nothing anew."""

    counts: Tensor | None  # (2, programs): valid pixels, and their class weights; None: all of the pixels
    programs: float
    pixels: float
    largest_weight: Tensor | None  # of classes, for float16
    gathered: float = 1.0  # how many pixels a logit has a part in, by weight, at most


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


class Asked:
    """What a call of either op comes to: numbers and tensors as arguments of the kernels, and flags of their Variant.

    Numbers on the CPU are read here; those on the GPU are read by the kernels, and the host is not asked.
    """

    def __init__(
        self,
        student: Tensor,
        target: Tensor | None,
        class_weight: Tensor | None,
        values: Tensor,  # (4,) float64: weights of CE, TCKD and NCKD, the temperature; (3,), without the first: no CE
        ignore_index: Tensor | None,  # () int64
        coupled: bool,
        reduction: int,
        by_pointer: bool | None,
    ) -> None:
        if student.shape[1] > MOST_CLASSES:
            raise ValueError(f"student: expected at most {MOST_CLASSES} classes, got {student.shape[1]}")
        self.numbers = numbers_for(values, by_pointer)
        with_ce = len(values) == 4
        if not isinstance(self.numbers, Tensor):
            with_ce = with_ce and self.numbers[0] != 0
            self.numbers = self.numbers if with_ce else self.numbers[-4:]
        self.target = None if target is None else target.contiguous()
        self.ignore: Tensor | int | None = None if target is None else ignore_index
        if self.ignore is not None and not triton_common.read_by_kernels(self.ignore, by_pointer):
            self.ignore = int(self.ignore)
        self.weight = class_weight if with_ce else None
        self.mean, float16 = reduction == MEAN, student.dtype == torch.float16
        self.weighted = self.mean and self.weight is not None
        if self.weighted and target is None:
            raise ValueError(
                "target: expected labels (the teacher's argmax) where class weights are averaged over, got None"
            )
        self.largest_weight = self.weight.amax() if float16 and self.weight is not None else None
        self.flags: dict[str, Any] = dict(
            coupled=coupled, with_ce=with_ce, mean=self.mean, weighted=self.weighted, float16=float16
        )

    def divisor(self, counts: Tensor | None, num_pixels: int, gathered: float = 1.0) -> Divisor:
        programs = 0 if counts is None else counts.shape[-1]
        return Divisor(counts, float(programs), float(num_pixels), self.largest_weight, gathered)

    def counts(self, num_classes: int) -> Tensor:
        """(2, programs): valid labels, and their class weights added up, in up to COUNT_PROGRAMS partial sums."""
        from . import triton_kernels as kernels

        assert self.target is not None
        programs = min(-(-self.target.numel() // COUNT_BLOCK), COUNT_PROGRAMS)
        counts = torch.empty([2, programs], dtype=torch.float32, device=self.target.device)
        launch(
            kernels.count_kernel, programs, 4,
            self.target, self.weight, counts, len(self.target), self.target[0].numel(), num_classes, self.ignore,
            BLOCK=COUNT_BLOCK)  # fmt: skip
        return counts


def forward(
    student: Tensor,  # (N, K, *spatial)
    teacher: Tensor,  # (N, K, *spatial)
    target: Tensor | None,  # (N, *spatial)
    class_weight: Tensor | None,  # (K,)
    values: Tensor,
    ignore_index: Tensor | None,
    coupled: bool,
    reduction: int,
    needs_grad: bool,
    config: Config | None = None,
    by_pointer: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op: loss, parts, grad, grad_scale (docs/ops.md). `config` replaces the table's launch choice, by_pointer the
    choice of who reads the numbers (the interpreter's tensors all lie on the CPU)."""
    from . import triton_kernels as kernels

    args = (student, teacher, target, class_weight, values, ignore_index, coupled, reduction)
    loss, parts, grad, grad_scale = op.fake(*args, needs_grad)
    asked = Asked(student, *args[2:], by_pointer)
    num_classes, num_pixels = student.shape[1], student.numel() // student.shape[1]
    if num_pixels == 0:
        return loss.zero_(), parts.zero_(), grad, grad_scale.fill_(1.0)
    walk = Walk(student, teacher, functools.partial(choose, with_ce=asked.flags["with_ce"]), config)
    programs = walk.programs(student)
    variant = walk.variant._replace(**asked.flags)
    partial = loss.new_empty([3, programs])
    out, counts = dense(grad, walk.last) if needs_grad else None, None
    with on_device(student):
        # without ignored pixels and class weights the count is known from the shape, and the labels are read once
        if asked.mean and (asked.ignore is not None or asked.weighted):
            counts = asked.counts(num_classes)
        divisor = asked.divisor(counts, num_pixels)
        launch(
            kernels.tnkd_kernel, programs, walk.warps,
            dense(student, walk.last), dense(teacher, walk.last), asked.target, asked.weight, divisor, out,
            loss if reduction == NONE else None, partial, *walk.sizes, asked.numbers, asked.ignore,
            V=variant)  # fmt: skip
        launch(
            kernels.finish_kernel, 1, 8,
            partial, divisor, None if reduction == NONE else loss, parts, grad_scale, programs, asked.numbers,
            V=variant, BLOCK=FINISH_BLOCK)  # fmt: skip
    return loss, parts, grad if out is None else settled(grad, out, walk.last), grad_scale


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
