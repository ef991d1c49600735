"""Matched CAFD through the compiled kernels of csrc/cafd: C++ on CPU."""

from torch import Tensor

from .. import values
from ..backends import NATIVE_MISSING, why_not_native
from ..values import Number
from . import matched_op

__all__ = ["matched_cafd", "why_not"]

if NATIVE_MISSING is None:
    _ops = matched_op.register("")


def why_not(*tensors: Tensor) -> str | None:
    if tensors[0].device.type != "cpu":
        return f"matched_cafd_loss has a native kernel for cpu alone, not for {tensors[0].device.type}"
    return why_not_native(*tensors)


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
