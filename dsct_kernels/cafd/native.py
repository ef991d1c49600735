"""CAFD through the compiled kernels of csrc/cafd: C++ on CPU, CUDA on NVIDIA."""

import torch
from torch import Tensor

from .. import values
from ..backends import NATIVE_MISSING
from ..backends import why_not_native as why_not
from ..values import Number
from . import autograd

__all__ = ["attention_map", "cafd", "why_not"]

if NATIVE_MISSING is None:
    _cafd = torch.ops.dsct_kernels.cafd.default
    _map = torch.ops.dsct_kernels.attention_map.default
    _backward = torch.ops.dsct_kernels.attention_map_backward.default

    def _acc(x: Tensor) -> torch.dtype:
        return torch.float64 if x.dtype == torch.float64 else torch.float32

    def _stats(x: Tensor) -> Tensor:
        # What backward needs: 4 numbers a channel, 2 a position, 1 a sample. Which, and in an order of its own, say
        # csrc/cafd/cpu/ops.h for the CPU and Stats in csrc/cafd/cuda/network.cuh for CUDA.
        n, c, h, w = x.shape
        return x.new_empty([n, 4 * c + 2 * h * w + 1], dtype=_acc(x))

    @torch.library.register_fake("dsct_kernels::cafd")
    def _(
        student: Tensor, teacher: Tensor, temperatures: Tensor, reduction: int, needs_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, _, h, w = student.shape
        loss = student.new_empty([n] if reduction == 0 else [], dtype=torch.promote_types(_acc(student), _acc(teacher)))
        grad_map = student.new_empty([n, h, w] if needs_grad else [0], dtype=_acc(student))
        return loss, grad_map, _stats(student)

    @torch.library.register_fake("dsct_kernels::attention_map")
    def _(features: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
        n, _, h, w = features.shape
        return features.new_empty([n, h, w], dtype=_acc(features)), _stats(features)

    @torch.library.register_fake("dsct_kernels::attention_map_backward")
    def _(features: Tensor, grad_map: Tensor, stats: Tensor, temperatures: Tensor) -> Tensor:
        return torch.empty_like(features)

    autograd.register("dsct_kernels::cafd", "dsct_kernels::attention_map", _backward)


def cafd(
    student: Tensor, teacher: Tensor, channel_temperature: Number, spatial_temperature: Number, reduction: int
) -> Tensor:
    """The loss of one stage; the arguments are reference.cafd's."""
    temperatures = values.packed((channel_temperature, spatial_temperature), student.device)
    return autograd.call(_cafd, _backward, student, teacher, temperatures, reduction)


def attention_map(features: Tensor, channel_temperature: Number, spatial_temperature: Number) -> Tensor:
    """A, (N, H, W), differentiable."""
    return _map(features, values.packed((channel_temperature, spatial_temperature), features.device))[0]
