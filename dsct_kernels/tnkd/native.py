"""TNKD through the compiled kernels of csrc/tnkd: C++ on CPU, CUDA on NVIDIA."""

import torch
from torch import Tensor

from ..backends import NATIVE_MISSING
from ..backends import why_not_native as why_not
from . import op
from .objective import NONE, Objective
from .upsample import smaller, to_labels

__all__ = ["UPSAMPLES_ON", "tnkd", "tnkd_upsampled", "why_not"]

UPSAMPLES_ON = ("cpu",)  # where logits smaller than the labels are read as they are


def _scale(grad: Tensor, factor: Tensor) -> None:
    torch.ops.dsct_kernels.scale_(grad, factor)


if NATIVE_MISSING is None:
    _op = op.register("tnkd", op.fake)
    _of_map = torch.ops.dsct_kernels.tnkd_upsampled_backward.default
    torch.library.register_fake("dsct_kernels::tnkd_upsampled_backward", op.fake_of_map)
    _upsampled = op.register("tnkd_upsampled", op.fake_upsampled, _of_map)


def tnkd(
    student_logits: Tensor, teacher_logits: Tensor | None, target: Tensor | None, objective: Objective
) -> tuple[Tensor, Tensor]:
    """(loss, parts); the arguments are reference.tnkd's."""
    if not smaller(student_logits, teacher_logits, target):
        student, teacher = student_logits, student_logits.detach() if teacher_logits is None else teacher_logits
    elif student_logits.device.type in UPSAMPLES_ON:
        return tnkd_upsampled(student_logits, teacher_logits, target, objective)
    else:
        student, teacher = to_labels(student_logits, teacher_logits, target, objective.align_corners)
    packed = objective.packed(target, student.device)
    if student.is_cuda:
        target = op.labels(teacher, target, objective)
    return op.call(_op, _scale, student, teacher, target, *packed)


def tnkd_upsampled(
    student_logits: Tensor, teacher_logits: Tensor | None, target: Tensor | None, objective: Objective
) -> tuple[Tensor, Tensor]:
    """As `tnkd` of the logits upsampled to the labels' size, which is never made."""
    teacher = student_logits.detach() if teacher_logits is None else teacher_logits
    packed = objective.packed(target, student_logits.device)
    args = student_logits, teacher, target, *packed, objective.align_corners
    if objective.reduction == NONE:
        return op.call_map(_upsampled, _of_map, *args)
    return op.call(_upsampled, _scale, *args)
