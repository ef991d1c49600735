"""CAFD through the compiled kernels of csrc/cafd: C++ on CPU, CUDA on NVIDIA."""

import torch
from torch import Tensor

from ..backends import NATIVE_MISSING, why_not_native
from ..values import Number
from . import op

__all__ = ["attention_map", "cafd", "why_not"]


def why_not(*maps: Tensor) -> str | None:
    """Why these kernels, of either form of CAFD, cannot serve a call with these maps, or None where they can."""
    reason = why_not_native(*maps)
    return why_not_cuda(*maps) if reason is None and maps[0].is_cuda else reason


def why_not_cuda(*maps: Tensor) -> str | None:
    """What of it lies in the maps and not in the machine."""
    if any(x.dtype == torch.float64 for x in maps):
        return "the CUDA kernels read maps of 16 and 32 bits, not float64"
    return None


def stats_row(channels: int, positions: int) -> int:
    """What backward needs of a sample: 4 numbers a channel, 2 a position, 1 for all. Which, and in an order of its own,
    say csrc/cafd/cpu/ops.h for the CPU and Stats in csrc/cafd/cuda/forward.cuh for CUDA."""
    return 4 * channels + 2 * positions + 1


if NATIVE_MISSING is None:
    _ops = op.register("", op.Results(stats_row))


def cafd(
    student: Tensor, teacher: Tensor, channel_temperature: Number, spatial_temperature: Number, reduction: int
) -> Tensor:
    """The loss of one stage; the arguments are reference.cafd's."""
    pooled = student.is_cuda and student.shape[2:] != teacher.shape[2:]
    loss = op.cafd_pooled if pooled else op.cafd
    return loss(_ops, student, teacher, channel_temperature, spatial_temperature, reduction)


def attention_map(features: Tensor, channel_temperature: Number, spatial_temperature: Number) -> Tensor:
    """A, (N, H, W), differentiable."""
    return op.attention_map(_ops, features, channel_temperature, spatial_temperature)
