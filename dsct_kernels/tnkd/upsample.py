"""Bilinear upsampling of logits to the resolution of the labels; its gradient adds in a fixed order on every device."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def upsample(logits: Tensor, size: list[int]) -> Tensor:
    """(N, K, *size), in float32 or better where that takes interpolation."""
    if list(logits.shape[2:]) == size:
        return logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits.clamp(min=torch.finfo(logits.dtype).min)  # a class at -inf stays absent: 0 * -inf would be NaN
    if logits.device.type == "cpu":
        return bilinear(logits, *size)
    function = FixedOrder if torch.compiler.is_compiling() else FixedOrderBothModes
    result: Tensor = function.apply(logits, *size)
    return result


def bilinear(logits: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)


class FixedOrder(torch.autograd.Function):
    """`bilinear`, whose own backward adds with atomics on a GPU: in another order, to other digits, every time."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, height: int, width: int) -> Tensor:
        return bilinear(logits, height, width)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logits, ctx.height, ctx.width = inputs
        ctx.size = logits.shape[-2:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        for dim, size in zip((-2, -1), ctx.size, strict=True):  # rows first: they are copied whole
            if grad.shape[dim] != size:
                grad = gather(grad, dim, size)
        return grad, None, None


class FixedOrderBothModes(FixedOrder):
    """The same with a forward-mode derivative, which torch.compile does not trace."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return bilinear(tangent, ctx.height, ctx.width)


def gather(grad: Tensor, dim: int, size: int) -> Tensor:
    """What `size` inputs get of the outputs along `dim` that were interpolated from them: one tap after the other.

    Not a matrix product, which TF32 may round, and which is mostly zeros.
    """
    outputs = grad.shape[dim]
    one_each = torch.eye(size, dtype=grad.dtype, device=grad.device).unsqueeze(0)
    weights = F.interpolate(one_each, size=outputs, mode="linear", align_corners=False)[0]  # (size, outputs)
    taps = min(outputs, -(-2 * outputs // size) + 1)  # outputs less than one input away, and one for the roundings
    first = (weights != 0).to(torch.uint8).argmax(1, keepdim=True).clamp(max=outputs - taps)
    index = first + torch.arange(taps, device=grad.device)
    weights = weights.gather(1, index)
    shape = [-1] + [1] * (-1 - dim)
    total = grad.index_select(dim, index[:, 0]) * weights[:, 0].view(shape)
    for tap in range(1, taps):
        total = torch.addcmul(total, grad.index_select(dim, index[:, tap]), weights[:, tap].view(shape))
    return total
