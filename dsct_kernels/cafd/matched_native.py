"""Matched CAFD through the compiled kernels of csrc/cafd: C++ on CPU, CUDA on NVIDIA."""

from torch import Tensor

from .. import values
from ..backends import NATIVE_MISSING
from ..values import Number
from . import matched_op
from .native import why_not

__all__ = ["matched_cafd", "why_not"]

if NATIVE_MISSING is None:
    _ops = matched_op.register("")


def matched_cafd(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    channel_temperature: Number | None,
    temperature: Number,
    reduction: int,
) -> Tensor:
    """The loss; the arguments are reference.matched_cafd's."""
    uniform = channel_temperature is None
    pair = (1.0 if channel_temperature is None else channel_temperature, temperature)
    temperatures = values.packed(pair, student.device)
    return matched_op.call(_ops, student, teacher, mask, temperatures, uniform, reduction)
