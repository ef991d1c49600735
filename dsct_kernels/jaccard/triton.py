"""The soft Jaccard loss on Triton (triton_kernels.py): three launches forward, one backward.

Forward: per program the sums over its pixels, from one read of both networks' logits; these added up in a fixed order;
the loss and the coefficients of its gradient. Backward reads both again and writes the gradient. Tiles are TNKD's
(tnkd/plan.py), of half as many pixels where a lane would hold too much: beside each logit it keeps three sums.

Variants: one of each kernel for each K and combination of dtypes, layout and labels or none.
"""

from typing import Any

import torch
from torch import Tensor

from .. import values
from ..tnkd import plan
from ..tnkd.triton import PIXEL_RANK, why_not
from ..triton_common import define, fast, fold, launch, most_programs, next_power_of_2, on_device, product
from ..values import Number
from . import op

__all__ = ["jaccard", "why_not"]

MOST_COMPILED = 4  # kernels of one variant, forward and backward
MOST_HELD = 20  # logits of one network that a lane holds
CROWD = 4  # a program takes the room of so many of its size: its sums fill the registers, and fewer of them are left


def choose(num_classes: int, itemsize: int, pixels_adjacent: bool, inner: int) -> plan.Config:
    config = plan.choose(num_classes, itemsize, pixels_adjacent, inner)
    while config.held(num_classes) > MOST_HELD and config.pixels > 1:
        config = plan.Config(config.pixels // 2, config.classes, config.warps)
    return config


class _Walk:
    """The tiles of a call: sizes and strides of what is read and written, and all that the kernels take from them."""

    def __init__(
        self, logits: list[Tensor], share: Tensor | None, acc: torch.dtype, config: plan.Config | None
    ) -> None:
        student = logits[0]
        shape, strides = [student.shape[0], *student.shape[2:]], [[x.stride(0), *x.stride()[2:]] for x in logits]
        folded = fold(shape, [*strides, strides[0] if share is None else list(share.stride())], PIXEL_RANK)
        self.fits = folded is not None
        if folded is None:
            return
        sizes, at, rank = folded
        classes = student.shape[1]
        itemsize = 8 if acc == torch.float64 else min(x.element_size() for x in logits)
        self.config = config or choose(classes, itemsize, at[0][-1] == 1, sizes[-1])
        blocks = -(-sizes[-1] // self.config.pixels)
        tiles = blocks * product(sizes[:-1])
        self.programs = min(tiles, max(1, most_programs(student, CROWD * self.config.warps)))
        self.place = (*sizes[1:], blocks, tiles)
        pairs = list(zip(logits, at, strict=False))
        self.strides = [stride for x, own in pairs for stride in (x.stride(1), *own)] + at[-1]
        self.constants: dict[str, Any] = {
            "NUM_CLASSES": classes,
            "CHUNKS": -(-classes // self.config.classes),
            "PIXELS": self.config.pixels,
            "CLASSES": self.config.classes,
            "RANK": rank,
            "DENSE": all(x.stride(1) == 1 and own[-1] == classes for x, own in pairs),
            "WHOLE": sizes[-1] % self.config.pixels == 0,
        }


def _temperature(temperature: Tensor, by_pointer: bool | None) -> tuple[float, Tensor | None]:
    """1 / tau, and where the kernels find tau instead: on a GPU, whose host is not asked."""
    if temperature.device.type != "cpu" if by_pointer is None else by_pointer:
        return 1.0, temperature
    return 1.0 / temperature.item(), None


def _acc(student: Tensor, teacher: Tensor) -> dict[str, Any]:
    from .triton_kernels import tl

    loss, _ = op.fake(student, teacher, None, student)
    return {"ACC": tl.float64 if loss.dtype == torch.float64 else tl.float32, "FAST": fast(loss)}


def forward(
    student: Tensor,  # (N, K, *spatial)
    teacher: Tensor,  # (N, K, *spatial)
    share: Tensor | None,  # (N, *spatial), contiguous
    temperature: Tensor,  # (1,) float64
    config: plan.Config | None = None,
    by_pointer: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The op: loss, coefficients (docs/ops.md). `config` replaces the table's choice."""
    from . import triton_kernels as kernels

    loss, coefficients = op.fake(student, teacher, share, temperature)
    classes = student.shape[1]
    if student.numel() == 0:
        return loss.zero_(), coefficients.zero_()
    walk = _Walk([student, teacher], share, loss.dtype, config)
    if not walk.fits:  # more dimensions than the kernel has, with strides that do not merge: make them merge
        return forward(student.contiguous(), teacher.contiguous(), share, temperature, config, by_pointer)
    partial = loss.new_empty([walk.programs, 3, classes])
    sums = coefficients.new_empty([3, classes])
    with on_device(student):
        launch(
            kernels.jaccard_sums_kernel, walk.programs, walk.config.warps,
            student, teacher, share, partial, *_temperature(temperature, by_pointer), *walk.place, *walk.strides,
            **walk.constants, **_acc(student, teacher))  # fmt: skip
        launch(
            kernels.jaccard_add_kernel, -(-3 * classes // 16), 4,
            partial, sums, walk.programs, 3 * classes, ROWS=128, COLUMNS=16)  # fmt: skip
        block = max(16, next_power_of_2(classes))
        launch(kernels.jaccard_finish_kernel, 1, 4, sums, loss, coefficients, classes, BLOCK=block)
    return loss, coefficients


def backward(
    student: Tensor,
    teacher: Tensor,
    share: Tensor | None,
    temperature: Tensor,
    coefficients: Tensor,  # (2, K) float64
    config: plan.Config | None = None,
    by_pointer: bool | None = None,
) -> Tensor:
    """The op jaccard_backward: the gradient of the student's logits for these coefficients."""
    from . import triton_kernels as kernels

    grad = torch.empty_like(student)
    if student.numel() == 0:
        return grad
    numbers = _acc(student, teacher)
    acc = torch.float64 if numbers["ACC"] is kernels.tl.float64 else torch.float32
    walk = _Walk([student, teacher, grad], share, acc, config)
    if not walk.fits:
        rest = (share, temperature, coefficients, config, by_pointer)
        return grad.copy_(backward(student.contiguous(), teacher.contiguous(), *rest))
    with on_device(student):
        launch(
            kernels.jaccard_write_kernel, walk.programs, walk.config.warps,
            student, teacher, share, coefficients.contiguous(), grad, *_temperature(temperature, by_pointer),
            *walk.place, *walk.strides, **walk.constants, **numbers)  # fmt: skip
    return grad


define("jaccard_triton", op.SIGNATURES["jaccard"], forward)
define("jaccard_backward_triton", op.SIGNATURES["jaccard_backward"], backward)
_ops = op.register("_triton")


def jaccard(student_logits: Tensor, teacher_logits: Tensor, share: Tensor | None, temperature: Number) -> Tensor:
    """The loss; the arguments are reference.jaccard's."""
    packed = values.packed((temperature,), student_logits.device)
    return op.call(_ops, student_logits, teacher_logits.detach(), share, packed)
