"""CAFD in plain PyTorch: the formulas as written, and the truth that every kernel is checked against.

Autograd differentiates it; the kernels use the closed forms of docs/derivations.md.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import values
from ..values import Number

EPS = 1e-6


def attention_map(features: Tensor, channel_temperature: Number, spatial_temperature: Number) -> Tensor:
    """A, (N, H, W): where the channels look, each weighted by how strongly it speaks."""
    n, _, h, w = features.shape
    f = features.to(torch.float64 if features.dtype == torch.float64 else torch.float32).flatten(2)
    numbers = values.as_scalars((channel_temperature, spatial_temperature), f.device, f.dtype)
    channel_temperature, spatial_temperature = (values.sound(t, positive=True) for t in numbers)
    p = (f / spatial_temperature).softmax(-1)  # P_{c,i}
    g = f.abs().mean(-1)  # g_c
    g_mean = g.mean(-1, keepdim=True)
    r = torch.where(g_mean == 0, 1, g / torch.where(g_mean == 0, 1, g_mean))  # all-zero features: all channels alike
    weight = (r / channel_temperature).softmax(-1)  # w_c
    return (weight.unsqueeze(-1) * p).sum(1).view(n, h, w)


def pool(a: Tensor, size: tuple[int, int]) -> Tensor:
    """F.adaptive_avg_pool2d of maps (N, H, W); on CUDA, where its gradient adds with atomics, as matrix products."""
    if a.device.type != "cuda":
        return F.adaptive_avg_pool2d(a.unsqueeze(1), size).squeeze(1)
    rows, columns = (pooling(n, to, a.device) for n, to in zip(a.shape[1:], size, strict=True))
    return (rows @ a.double() @ columns.T).to(a.dtype)


def pooling(size: int, to: int, device: torch.device) -> Tensor:
    """(to, size) matrix in float64 that averages as adaptive_avg_pool does."""
    i = torch.arange(size, device=device)
    o = torch.arange(to, device=device).unsqueeze(1)
    first, last = o * size // to, ((o + 1) * size + to - 1) // to
    inside = (i >= first) & (i < last)
    return inside.to(torch.float64) / (last - first)


def map_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """KL(teacher || student) of two attention maps, (N,), on the smaller of the two grids, both smoothed by EPS."""
    size = (min(student_map.shape[1], teacher_map.shape[1]), min(student_map.shape[2], teacher_map.shape[2]))

    def on_common_grid(a: Tensor) -> Tensor:
        if a.shape[1:] != size:
            a = pool(a, size)
            a = a / a.sum((1, 2), keepdim=True)
        return (1 - EPS) * a + EPS / (size[0] * size[1])

    student, teacher = on_common_grid(student_map), on_common_grid(teacher_map)
    return (teacher * (teacher.log() - student.log())).sum((1, 2))


def cafd(
    student_features: Tensor,
    teacher_features: Tensor,
    channel_temperature: Number,
    spatial_temperature: Number,
    reduction: int,
) -> Tensor:
    """The CAFD loss of one stage: () for mean (1) and sum (2), (N,) for none (0); differentiable in the student."""
    student = attention_map(student_features, channel_temperature, spatial_temperature)
    teacher = attention_map(teacher_features.detach(), channel_temperature, spatial_temperature)
    acc = torch.promote_types(student.dtype, teacher.dtype)
    loss = map_loss(student.to(acc), teacher.to(acc))
    if reduction == 0:
        return loss
    return loss.sum() / (max(loss.shape[0], 1) if reduction == 1 else 1)


def why_not(*tensors: Tensor) -> str | None:
    """The reference serves every device and dtype that torch does."""
    return None
