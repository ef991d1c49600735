"""The soft Jaccard loss on Triton (triton_kernels.py): two launches forward, and a sum of torch's, one backward.

Forward: per program the sums over its pixels, from one read of both networks' logits; these added up in a fixed order;
the loss and the coefficients of its gradient. Backward reads both again and writes the gradient. Tiles are TNKD's
(tnkd/plan.py), of half as many pixels where a lane would hold too much: beside each logit it keeps three sums.
"""

from typing import Any

import torch
from torch import Tensor

from ..tnkd import plan
from ..tnkd.triton import Walk, why_not
from ..triton_common import define, dense, launch, next_power_of_2, numbers_for, on_device, settled
from . import op

__all__ = ["jaccard", "why_not"]

MOST_COMPILED = 3  # kernels of one variant, forward and backward
MOST_HELD = 20  # logits of one network that a lane holds
# A program takes the room of so many of its size: its sums fill the registers, and fewer of them are left to add.
CROWD = 4


def choose(num_classes: int, itemsize: int, pixels_adjacent: bool, inner: int) -> plan.Config:
    config = plan.choose(num_classes, itemsize, pixels_adjacent, inner)
    while config.held(num_classes) > MOST_HELD and config.pixels > 1:
        config = plan.Config(config.pixels // 2, config.classes, config.warps)
    return config


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
    walk = Walk(student, teacher, choose, config)
    programs = walk.programs(student, CROWD)
    partial = coefficients.new_empty([programs, 3 * classes])
    block = max(16, next_power_of_2(classes))
    with on_device(student):
        launch(
            kernels.jaccard_sums_kernel, programs, walk.warps,
            dense(student, walk.last), dense(teacher, walk.last), share, partial, *walk.sizes,
            numbers_for(temperature, by_pointer), V=walk.variant)  # fmt: skip
        sums = partial.sum(0)
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
    walk = Walk(student, teacher, choose, config)
    out = dense(grad, walk.last)
    with on_device(student):
        launch(
            kernels.jaccard_write_kernel, walk.programs(student, CROWD), walk.warps,
            dense(student, walk.last), dense(teacher, walk.last), share, coefficients.contiguous(), out, *walk.sizes,
            numbers_for(temperature, by_pointer), V=walk.variant)  # fmt: skip
    return settled(grad, out, walk.last)


define("jaccard_triton", op.SIGNATURES["jaccard"], forward)
define("jaccard_backward_triton", op.SIGNATURES["jaccard_backward"], backward)
_ops = op.register("_triton")


def jaccard(*args: Any) -> Tensor:
    """The loss; the arguments are reference.jaccard's."""
    return op.jaccard(_ops, *args)
