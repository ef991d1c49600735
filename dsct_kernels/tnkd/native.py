"""TNKD through the compiled kernels of csrc/tnkd: C++ on CPU, CUDA on NVIDIA."""

import torch
from torch import Tensor

from ..backends import NATIVE_MISSING
from ..backends import why_not_native as why_not
from . import autograd

__all__ = ["tnkd", "why_not"]


def _scale(grad: Tensor, factor: Tensor) -> None:
    torch.ops.dsct_kernels.scale_(grad, factor)


if NATIVE_MISSING is None:
    _op = torch.ops.dsct_kernels.tnkd.default
    torch.library.register_fake("dsct_kernels::tnkd", autograd.fake)
    autograd.register("dsct_kernels::tnkd")


def tnkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    class_weight: Tensor | None,
    ce_weight: float,
    tckd_weight: float,
    nckd_weight: float,
    temperature: float,
    ignore_index: int | None,
    reduction: int,
    with_ce: bool,
) -> tuple[Tensor, Tensor]:
    """(loss, parts); the arguments are reference.tnkd's."""
    if student_logits.is_cuda and autograd.lacks_labels(target, class_weight, reduction, with_ce):
        target, ignore_index = teacher_logits.argmax(1), None
    return autograd.call(
        _op, _scale, student_logits, teacher_logits, target, class_weight, ce_weight, tckd_weight, nckd_weight,
        temperature, ignore_index, reduction, with_ce)  # fmt: skip
