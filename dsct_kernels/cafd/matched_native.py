"""Matched CAFD through the compiled kernels of csrc/cafd: C++ on CPU, CUDA on NVIDIA."""

from typing import Any

from torch import Tensor

from ..backends import NATIVE_MISSING
from . import matched_op
from .native import why_not

__all__ = ["matched_cafd", "why_not"]

if NATIVE_MISSING is None:
    _ops = matched_op.register("")


def matched_cafd(*args: Any) -> Tensor:
    """The loss; the arguments are reference.matched_cafd's."""
    return matched_op.matched_cafd(_ops, *args)
