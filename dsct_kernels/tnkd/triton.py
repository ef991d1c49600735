"""TNKD (and the pixel cross-entropy) on Triton: loss and gradient in one pass over the logits (triton_kernels.py).

Three launches: count the valid pixels from the labels alone (only where an average needs it); the pass over the logits,
as many programs as the GPU can have at work, each of which walks over tiles of pixels and holds all the classes of one
in registers, as a tuple; and one program that adds the programs' sums in a fixed order. Nothing is atomic and nothing
comes back to the host.

Variants: one kernel is compiled for each K and combination of dtypes, layout and flags that a process uses: a training
run uses one or two.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import triton_common
from ..triton_common import define, fast, fold, launch, most_programs, next_power_of_2, on_device, product
from . import op
from .objective import MEAN, NONE, Objective
from .plan import MOST_CLASSES, Config, candidates, choose
from .upsample import to_labels

__all__ = ["candidates", "choose", "scale_in_place", "tnkd", "why_not"]

MOST_COMPILED = 4  # kernels of one variant, forward and backward
COUNT_PROGRAMS = 256  # upper bound, and the length of the vector in which every program adds the counts up
COUNT_BLOCK = 4096
SCALE_BLOCK = 2048
FINISH_BLOCK = 4096  # partial sums added at a time, of any number: one kernel for every batch
PIXEL_RANK = 4  # pixel dimensions that may stay after folding: three for the program, one for the lanes


def why_not(*tensors: Tensor | None) -> str | None:
    """Why this backend cannot serve logits (N, K, *spatial) where they are, or None."""
    for x in tensors:
        if x is not None and x.dim() > 1 and x.shape[1] > MOST_CLASSES:
            return f"its kernel holds every class of a pixel in registers, {MOST_CLASSES} at most, got {x.shape[1]}"
    return triton_common.why_not(*tensors)


# ------------------------------------------------------------------------------------------------- the launches


def _pixel_strides(x: Tensor) -> list[int]:
    return [x.stride(0), *x.stride()[2:]]


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
    num_classes, num_pixels = student.shape[1], product(student.shape) // student.shape[1]
    if num_classes > MOST_CLASSES:
        raise ValueError(f"student: expected at most {MOST_CLASSES} classes, got {num_classes}")
    if num_pixels == 0:
        return loss.zero_(), parts.zero_(), grad, grad_scale.fill_(1.0)
    shape = [student.shape[0], *student.shape[2:]]
    student_strides = _pixel_strides(student)
    folded = fold(shape, [
        student_strides,
        _pixel_strides(teacher),
        list(target.stride()) if target is not None else student_strides,  # what isn't there must not hinder merging
        _pixel_strides(grad) if needs_grad else student_strides,
        list(loss.stride()) if reduction == NONE else student_strides,
    ], PIXEL_RANK)  # fmt: skip
    if folded is None:  # more than PIXEL_RANK dimensions with strides that do not merge: make them merge
        loss, parts, copied, grad_scale = forward(
            student.contiguous(), teacher.contiguous(), None if target is None else target.contiguous(), class_weight,
            values, ignore_index, coupled, reduction, needs_grad, config, by_pointer
        )  # fmt: skip
        return loss, parts, grad.copy_(copied), grad_scale
    sizes, (s, t, y, g, m), rank = folded

    asked = read(values, ignore_index if target is not None else None, by_pointer)
    with_ce, has_ignore = asked.with_ce, asked.has_ignore

    if config is None:
        itemsize = 8 if loss.dtype == torch.float64 else min(student.element_size(), teacher.element_size())
        config = choose(num_classes, itemsize, s[-1] == 1, sizes[-1], with_ce)
    blocks = -(-sizes[-1] // config.pixels)
    tiles = blocks * product(sizes[:-1])
    programs = min(tiles, most_programs(student, config.warps))
    logits = (student, teacher, grad) if needs_grad else (student, teacher)
    dense = all(x.stride(1) == 1 and at[-1] == num_classes for x, at in zip(logits, (s, t, g), strict=False))
    mean = reduction == MEAN
    weighted = class_weight is not None and with_ce
    # without ignored pixels and class weights the count is known from the shape, and the labels are read once
    counted = mean and target is not None and (has_ignore or weighted)
    if mean and weighted and target is None:
        raise ValueError(
            "target: expected labels (the teacher's argmax) where class weights are averaged over, got None"
        )
    weight = class_weight if weighted else None
    float16 = student.dtype == torch.float16  # whose gradient leaves a power of two to grad_scale
    largest_weight = weight.amax() if float16 and weight is not None else None
    acc = kernels.tl.float64 if loss.dtype == torch.float64 else kernels.tl.float32
    flags: dict[str, Any] = {
        "NONE_": reduction == NONE,
        "MEAN_": mean,
        "FLOAT16": float16,
        "HAS_COUNT": counted,
        "HAS_WEIGHT": weighted,
        "WITH_CE": with_ce,
        "COUNTS": COUNT_PROGRAMS,
        "ACC": acc,
    }

    partial = loss.new_empty([3, programs])
    counts = weights = None
    num_counts = 0
    with on_device(student):
        if counted:
            assert target is not None
            counts, weights = count(target, weight, num_classes, asked, loss)
            num_counts = counts.numel()
        launch(
            kernels.tnkd_kernel, programs, config.warps,
            student, teacher, target, weight, largest_weight, counts, weights, grad if needs_grad else None,
            loss if reduction == NONE else None, partial, num_pixels, num_counts,
            sizes[1], sizes[2], sizes[3], blocks, tiles, student.stride(1), *s, teacher.stride(1), *t,
            grad.stride(1) if needs_grad else 0, *g, *y, *m, asked.temperature, 1.0 / asked.temperature,
            *asked.weights, asked.ignore, asked.at, asked.ignore_at,
            NUM_CLASSES=num_classes, CHUNKS=-(-num_classes // config.classes), PIXELS=config.pixels,
            CLASSES=config.classes, RANK=rank, DENSE=dense,
            WHOLE=sizes[-1] % config.pixels == 0, HAS_TARGET=target is not None, HAS_IGNORE=has_ignore,
            NEEDS_GRAD=needs_grad, COUPLED=coupled, FAST=fast(loss),
            NEAR=loss.dtype == student.dtype == torch.float32, **flags)  # fmt: skip
        launch(
            kernels.finish_kernel, 1, 8,
            partial, largest_weight, counts, weights, loss, parts, grad_scale, programs, num_counts, num_pixels, 1.0,
            asked.temperature, *asked.weights, asked.at, BLOCK=FINISH_BLOCK, **flags)  # fmt: skip
    return loss, parts, grad, grad_scale


class Asked(NamedTuple):
    """The ops' numbers, as arguments of the kernels: read here where they lie on the CPU, else by the kernels."""

    temperature: float
    weights: tuple[float, float, float]  # of TCKD, NCKD and CE
    at: Tensor | None  # where all these are to be read
    with_ce: bool
    has_ignore: bool
    ignore: int
    ignore_at: Tensor | None


def read(values: Tensor, ignore_index: Tensor | None, by_pointer: bool | None) -> Asked:
    """by_pointer: as for `forward`."""

    def for_kernels(number: Tensor) -> bool:
        return number.device.type != "cpu" if by_pointer is None else by_pointer

    at = values if for_kernels(values) else None
    ce, tckd, nckd, temperature = [1.0] * 4 if at is not None else [0.0, *values.tolist()][-4:]
    ignore, ignore_at = 0, None
    if ignore_index is not None and for_kernels(ignore_index):
        ignore_at = ignore_index
    elif ignore_index is not None:
        ignore = int(ignore_index)
    with_ce = len(values) == 4 and ce != 0
    return Asked(temperature, (tckd, nckd, ce), at, with_ce, ignore_index is not None, ignore, ignore_at)


def count(
    target: Tensor, class_weight: Tensor | None, num_classes: int, asked: Asked, like: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Valid labels, and their class weights added up, in up to COUNT_PROGRAMS partial sums."""
    from . import triton_kernels as kernels

    folded = fold(target.shape, [list(target.stride())], PIXEL_RANK)
    if folded is None:
        return count(target.contiguous(), class_weight, num_classes, asked, like)
    sizes, (strides,), rank = folded
    # where labels lie in one piece its length goes with the batch, and is not to choose the kernel
    block = COUNT_BLOCK if rank == 1 else min(COUNT_BLOCK, max(16, next_power_of_2(sizes[-1])))
    blocks = -(-sizes[-1] // block)
    total = blocks * product(sizes[:-1])
    programs = min(total, COUNT_PROGRAMS)
    counts = torch.empty(programs, dtype=torch.int64, device=target.device)
    weights = like.new_empty(programs) if class_weight is not None else None
    launch(
        kernels.count_kernel, programs, 4,
        target, class_weight, counts, weights, sizes[1], sizes[2], sizes[3], blocks, total, num_classes, *strides,
        asked.ignore, asked.ignore_at, HAS_IGNORE=asked.has_ignore, HAS_WEIGHT=class_weight is not None, BLOCK=block,
        RANK=rank, ACC=kernels.tl.float64 if like.dtype == torch.float64 else kernels.tl.float32)  # fmt: skip
    return counts, weights


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
