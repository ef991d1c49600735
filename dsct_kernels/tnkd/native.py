"""TNKD through the compiled kernels of csrc/tnkd: C++ on CPU, CUDA on NVIDIA."""

from typing import Any

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


def tnkd(student_logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """(loss, parts); the arguments are reference.tnkd's."""
    args = autograd.packed(student_logits, *args)
    if student_logits.is_cuda:
        args = autograd.with_labels(*args)
    return autograd.call(_op, _scale, student_logits, *args)
