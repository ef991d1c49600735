"""TNKD through the compiled kernels of csrc/tnkd: C++ on CPU, CUDA on NVIDIA."""

import torch
from torch import Tensor

from ..backends import NATIVE_MISSING
from ..backends import why_not_native as why_not
from . import op
from .objective import NONE, Objective
from .upsample import smaller, to_labels

__all__ = ["UPSAMPLES_ON", "tnkd", "tnkd_upsampled", "upsamples", "why_not"]

UPSAMPLES_ON = ("cpu",)  # where logits smaller than the labels are read as they are


def _scale(grad: Tensor, factor: Tensor) -> None:
    torch.ops.dsct_kernels.scale_(grad, factor)


if NATIVE_MISSING is None:
    _op = op.register("tnkd", op.fake)
    _upsampled = op.register("tnkd_upsampled", op.fake_upsampled)


def tnkd(
    student_logits: Tensor, teacher_logits: Tensor | None, target: Tensor | None, objective: Objective
) -> tuple[Tensor, Tensor]:
    """(loss, parts); the arguments are reference.tnkd's."""
    if not smaller(student_logits, teacher_logits, target):
        student, teacher = student_logits, student_logits.detach() if teacher_logits is None else teacher_logits
    elif upsamples(student_logits, objective.reduction):
        return tnkd_upsampled(student_logits, teacher_logits, target, objective)
    else:
        student, teacher = to_labels(student_logits, teacher_logits, target, objective.align_corners)
    packed = objective.packed(target, student.device)
    if student.is_cuda:
        target = op.labels(teacher, target, objective)
    return op.call(_op, _scale, student, teacher, target, *packed)


def upsamples(student_logits: Tensor, reduction: int) -> bool:
    """Whether `tnkd_upsampled` serves logits of which some are smaller than the labels: on CPU.

    Not for the gradient of a map: what comes in for its pixels has to be known before they are added up.
    """
    if student_logits.device.type not in UPSAMPLES_ON:
        return False
    return reduction != NONE or not (student_logits.requires_grad and torch.is_grad_enabled())


def tnkd_upsampled(
    student_logits: Tensor, teacher_logits: Tensor | None, target: Tensor | None, objective: Objective
) -> tuple[Tensor, Tensor]:
    """As `tnkd` of the logits upsampled to the labels' size, which is never made."""
    teacher = student_logits.detach() if teacher_logits is None else teacher_logits
    packed = objective.packed(target, student_logits.device)
    return op.call(_upsampled, _scale, student_logits, teacher, target, *packed, objective.align_corners)
