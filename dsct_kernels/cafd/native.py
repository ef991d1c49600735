"""CAFD through the compiled kernels of csrc/cafd: C++ on CPU, CUDA on NVIDIA."""

import torch
from torch import Tensor

from .. import values
from ..backends import NATIVE_MISSING, why_not_native
from ..dtypes import acc_dtype
from ..values import Number
from . import op, reference

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
    _cafd, _map, _backward = op.register("", op.Results(stats_row))


def cafd(
    student: Tensor, teacher: Tensor, channel_temperature: Number, spatial_temperature: Number, reduction: int
) -> Tensor:
    """The loss of one stage; the arguments are reference.cafd's."""
    if student.is_cuda and student.shape[2:] != teacher.shape[2:]:
        return cafd_pooled(student, teacher, channel_temperature, spatial_temperature, reduction)
    temperatures = values.packed((channel_temperature, spatial_temperature), student.device)
    return op.call(_cafd, _backward, student, teacher, temperatures, reduction)


def cafd_pooled(
    student: Tensor, teacher: Tensor, channel_temperature: Number, spatial_temperature: Number, reduction: int
) -> Tensor:
    """The same for maps of two sizes: the kernels leave one number a position, which is pooled and compared in float64,
    whose plain sum of logs keeps what float32 would lose near the teacher."""
    maps = (attention_map(x, channel_temperature, spatial_temperature) for x in (student, teacher.detach()))
    loss = reference.map_loss(*(x.double() for x in maps))
    return reference.reduced(loss, reduction).to(acc_dtype(student, teacher))


def attention_map(features: Tensor, channel_temperature: Number, spatial_temperature: Number) -> Tensor:
    """A, (N, H, W), differentiable."""
    attention: Tensor = _map(features, values.packed((channel_temperature, spatial_temperature), features.device))[0]
    return attention
