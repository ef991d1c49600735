"""CAFD in plain PyTorch: the formulas as written, and the truth that every kernel is checked against.

Autograd differentiates it; the kernels use the closed forms of docs/derivations.md.
"""

import torch
from torch import Tensor

from .. import values
from ..dtypes import acc_dtype
from ..pool import pool
from ..values import Number

EPS = 1e-6


def attention_map(features: Tensor, channel_temperature: Number, spatial_temperature: Number) -> Tensor:
    """A, (N, H, W): where the channels look, each weighted by how strongly it speaks."""
    n, _, h, w = features.shape
    f = features.to(acc_dtype(features)).flatten(2)
    numbers = values.as_scalars((channel_temperature, spatial_temperature), f.device, f.dtype)
    channel_temperature, spatial_temperature = (values.sound(t, positive=True) for t in numbers)
    p = (f / spatial_temperature).softmax(-1)  # P_{c,i}
    weight = channel_weights(f.abs().mean(-1), channel_temperature)  # w_c
    return (weight.unsqueeze(-1) * p).sum(1).view(n, h, w)


def channel_weights(g: Tensor, channel_temperature: Number) -> Tensor:
    """w, (N, C): how much each channel counts, from how strongly it speaks."""
    g_mean = g.mean(-1, keepdim=True)
    r = torch.where(g_mean == 0, 1, g / torch.where(g_mean == 0, 1, g_mean))  # all-zero features: all channels alike
    return (r / channel_temperature).softmax(-1)


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
    acc = acc_dtype(student, teacher)
    return reduced(map_loss(student.to(acc), teacher.to(acc)), reduction)


def reduced(loss: Tensor, reduction: int) -> Tensor:
    """() for mean (1) and sum (2) of (N,), which none (0) leaves as it is."""
    if reduction == 0:
        return loss
    return loss.sum() / (max(loss.shape[0], 1) if reduction == 1 else 1)


def matched_cafd(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    channel_temperature: Number | None,
    temperature: Number,
    reduction: int,
) -> Tensor:
    """The loss of maps of one shape whose channels correspond, differentiable in the student.

    mask: (N, 1, H, W) bool, where anything counts; None: everywhere. channel_temperature None: every channel weighs
    1 / C.
    """
    acc = acc_dtype(student, teacher)
    s, t = student.to(acc).flatten(2), teacher.detach().to(acc).flatten(2)
    if mask is not None:  # as where both networks have no mass
        s, t = (torch.where(mask.flatten(2), x, -torch.inf) for x in (s, t))
    pair = (1.0 if channel_temperature is None else channel_temperature, temperature)
    tau_c, tau = (values.sound(x, positive=True) for x in values.as_scalars(pair, s.device, acc))
    log_s, log_t = log_softmax(s / tau), log_softmax(t / tau)
    p = log_t.exp()
    kl = torch.where(p == 0, 0, p * (log_t - log_s)).sum(-1)  # (N, C); 0 log 0 = 0, for -inf too
    sound = (s.detach().amax(-1) < torch.inf) & (t.amax(-1) < torch.inf)
    kl = kl + torch.where(sound, 0.0, torch.nan)  # a row without a softmax, which 0 log 0 might have left out
    if channel_temperature is None:
        loss = kl.mean(-1)
    else:
        weight = channel_weights(t.abs().masked_fill(t == -torch.inf, 0).mean(-1), tau_c)
        # A weight that is only rounded to 0 hides nothing: 0 * inf would be NaN.
        loss = torch.where((weight == 0) & (kl == torch.inf), torch.inf, weight * kl).sum(-1)
    return reduced(loss * (tau * tau), reduction)


def log_softmax(x: Tensor) -> Tensor:
    """Over positions; a row that is -inf throughout stays so, and has no mass."""
    dead = (x == -torch.inf).all(-1, keepdim=True)
    return torch.where(dead, x, x.masked_fill(dead, 0).log_softmax(-1))
