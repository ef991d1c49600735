"""The soft Jaccard loss through the compiled kernels of csrc/jaccard: C++ on CPU."""

from torch import Tensor

from .. import values
from ..backends import NATIVE_MISSING
from ..values import Number
from . import op

__all__ = ["jaccard", "why_not"]

if NATIVE_MISSING is None:
    _ops = op.register("")


def why_not(*tensors: Tensor) -> str | None:
    """Why the native backend cannot serve these tensors, or None where it can."""
    if NATIVE_MISSING is not None:
        return NATIVE_MISSING
    device = tensors[0].device.type
    return None if device == "cpu" else f"the native kernels of jaccard run on cpu alone so far, not on {device}"


def jaccard(student_logits: Tensor, teacher_logits: Tensor, share: Tensor | None, temperature: Number) -> Tensor:
    """The loss; the arguments are reference.jaccard's."""
    packed = values.packed((temperature,), student_logits.device)
    return op.call(_ops, student_logits, teacher_logits.detach(), share, packed)
