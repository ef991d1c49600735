"""TNKD through the compiled kernels of csrc/tnkd: C++ on CPU, CUDA on NVIDIA."""

import torch
from torch import Tensor

from ..backends import NATIVE_MISSING, why_not_native
from . import op
from .objective import NONE, Objective
from .plan import PLANES
from .upsample import smaller, to_labels

__all__ = ["UPSAMPLES_ON", "tnkd", "tnkd_upsampled", "why_not"]

UPSAMPLES_ON = ("cpu", "cuda")  # where logits smaller than the labels are read as they are; on CUDA not for a map
# csrc/tnkd/cuda/kernel.cuh: at most 16 warps share out a pixel's classes.
MOST_CLASSES_ON_CUDA = max(most for most, *_, lanes, _ in PLANES if lanes <= 16)


def why_not(*logits: Tensor) -> str | None:
    """Why these kernels cannot serve a call with these logits, or None where they can."""
    reason = why_not_native(*logits)
    return why_not_cuda(*logits) if reason is None and logits[0].is_cuda else reason


def why_not_cuda(*logits: Tensor) -> str | None:
    """What of it lies in the logits and not in the machine."""
    for x in logits:
        if x.dtype == torch.float64:
            return "the CUDA kernels read logits of 16 and 32 bits, not float64"
        if x.dim() > 1 and x.shape[1] > MOST_CLASSES_ON_CUDA:
            return f"the CUDA kernels take up to {MOST_CLASSES_ON_CUDA} classes, not {x.shape[1]}"
    return None


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
    elif student_logits.device.type in UPSAMPLES_ON and (not student_logits.is_cuda or objective.reduction != NONE):
        return tnkd_upsampled(student_logits, teacher_logits, target, objective)
    else:
        student, teacher = to_labels(student_logits, teacher_logits, target, objective.align_corners)
    packed = objective.packed(target, student.device)
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
