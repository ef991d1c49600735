"""The soft Jaccard loss through the compiled kernels of csrc/jaccard: C++ on CPU."""

from typing import Any

from torch import Tensor

from ..backends import NATIVE_MISSING
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


def jaccard(*args: Any) -> Tensor:
    """The loss; the arguments are reference.jaccard's."""
    return op.jaccard(_ops, *args)
