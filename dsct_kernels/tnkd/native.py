"""TNKD through the compiled kernels of csrc/tnkd: C++ on CPU, CUDA on NVIDIA."""

from typing import Any

import torch
from torch import Tensor

from ..backends import NATIVE_MISSING
from ..backends import why_not_native as why_not
from . import autograd

__all__ = ["tnkd", "tnkd_upsampled", "upsamples", "why_not"]


def _scale(grad: Tensor, factor: Tensor) -> None:
    torch.ops.dsct_kernels.scale_(grad, factor)


if NATIVE_MISSING is None:
    _op = torch.ops.dsct_kernels.tnkd.default
    torch.library.register_fake("dsct_kernels::tnkd", autograd.fake)
    autograd.register("dsct_kernels::tnkd")
    _upsampled = torch.ops.dsct_kernels.tnkd_upsampled.default
    torch.library.register_fake("dsct_kernels::tnkd_upsampled", autograd.fake_upsampled)
    autograd.register("dsct_kernels::tnkd_upsampled")


def tnkd(student_logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """(loss, parts); the arguments are reference.tnkd's."""
    args = autograd.packed(student_logits, *args)
    if student_logits.is_cuda:
        args = autograd.with_labels(*args)
    return autograd.call(_op, _scale, student_logits, *args)


def upsamples(student_logits: Tensor, teacher_logits: Tensor, size: list[int], reduction: int) -> bool:
    """Whether `tnkd_upsampled` serves: on CPU, logits of which some are smaller than `size`.

    Not for the gradient of a map: what comes in for its pixels has to be known before they are added up.
    """
    if student_logits.device.type != "cpu" or len(size) != 2:
        return False
    if list(student_logits.shape[2:]) == size and list(teacher_logits.shape[2:]) == size:
        return False
    return reduction != 0 or not (student_logits.requires_grad and torch.is_grad_enabled())


def tnkd_upsampled(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None, align_corners: bool, *args: Any
) -> tuple[Tensor, Tensor]:
    """As `tnkd` of the logits upsampled to the labels' size, which is never made; `args`: all behind the target."""
    args = autograd.packed(student_logits, teacher_logits, target, *args)
    return autograd.call(_upsampled, _scale, student_logits, *args, align_corners)
