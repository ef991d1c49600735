"""CAFD through the compiled kernels of csrc/cafd: C++ on CPU, CUDA on NVIDIA."""

from torch import Tensor

from .. import values
from ..backends import NATIVE_MISSING
from ..backends import why_not_native as why_not
from ..values import Number
from . import op

__all__ = ["attention_map", "cafd", "why_not"]


def stats_row(channels: int, positions: int) -> int:
    """What backward needs of a sample: 4 numbers a channel, 2 a position, 1 for all. Which, and in an order of its own,
    say csrc/cafd/cpu/ops.h for the CPU and Stats in csrc/cafd/cuda/network.cuh for CUDA."""
    return 4 * channels + 2 * positions + 1


if NATIVE_MISSING is None:
    _cafd, _map, _backward = op.register("", op.Results(stats_row))


def cafd(
    student: Tensor, teacher: Tensor, channel_temperature: Number, spatial_temperature: Number, reduction: int
) -> Tensor:
    """The loss of one stage; the arguments are reference.cafd's."""
    temperatures = values.packed((channel_temperature, spatial_temperature), student.device)
    return op.call(_cafd, _backward, student, teacher, temperatures, reduction)


def attention_map(features: Tensor, channel_temperature: Number, spatial_temperature: Number) -> Tensor:
    """A, (N, H, W), differentiable."""
    attention: Tensor = _map(features, values.packed((channel_temperature, spatial_temperature), features.device))[0]
    return attention
