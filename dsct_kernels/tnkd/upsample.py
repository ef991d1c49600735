"""Bilinear upsampling of logits to the resolution of the labels; its gradient adds in a fixed order on every device.

A tap of weight 0 takes no part, so that a class that is -inf in a cell is absent where that cell has a part and nowhere
else: F.interpolate makes NaN of 0 * -inf. Where every logit is finite, on the CPU, it serves all the same.

The native kernels (csrc/tnkd/cpu/upsampled.h, csrc/tnkd/cuda/upsampled.cuh) have taps of their own, equal to `taps`,
and none of these tensors.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..autograd import LIBRARY
from ..values import plain, readable


def smaller(student_logits: Tensor, teacher_logits: Tensor | None, target: Tensor | None) -> bool:
    """Whether any of the logits are smaller than the labels; the teacher None: the student again."""
    teacher_logits = student_logits if teacher_logits is None else teacher_logits
    size = checks.label_size(student_logits, teacher_logits, target)
    return list(student_logits.shape[2:]) != size or list(teacher_logits.shape[2:]) != size


def to_labels(
    student_logits: Tensor, teacher_logits: Tensor | None, target: Tensor | None, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """Student and teacher at the labels' size; the teacher None: the student again, detached."""
    size = checks.label_size(student_logits, student_logits if teacher_logits is None else teacher_logits, target)
    student = upsample(student_logits, size, align_corners)
    return student, student.detach() if teacher_logits is None else upsample(teacher_logits, size, align_corners)


def upsample(logits: Tensor, size: list[int], align_corners: bool) -> Tensor:
    """(N, K, *size), in float32 or better where that takes interpolation."""
    if list(logits.shape[2:]) == size:
        return logits
    height, width = size
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if torch.compiler.is_compiling():  # one op for any sizes, where the loop over the taps would be unrolled for each
        compiled: Tensor = torch.ops.dsct_kernels.upsample(logits, height, width, align_corners)
        return compiled
    if logits.device.type == "cpu" or not plain():
        return bilinear(logits, height, width, align_corners)
    result: Tensor = FixedOrder.apply(logits, height, width, align_corners)
    return result


def bilinear(logits: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    if readable(logits) and bool(logits.detach().sum().isfinite()):
        return F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=align_corners)
    for dim, size in ((-2, height), (-1, width)):  # rows first: they are copied whole
        if logits.shape[dim] != size:
            logits = lerp(logits, dim, size, align_corners)
    return logits


def lerp(x: Tensor, dim: int, size: int, align_corners: bool) -> Tensor:
    """Linear interpolation of `x` along `dim` to `size`; what has no weight is not looked at."""
    low, high, weight = taps(x.shape[dim], size, align_corners, x.device)
    weight = weight.view([-1] + [1] * (-1 - dim))
    near, far = x.index_select(dim, low), x.index_select(dim, high)
    mixed = near * (1 - weight).to(x.dtype) + far * weight.to(x.dtype)
    return torch.where(weight == 0, near, mixed)


def taps(inputs: int, outputs: int, align_corners: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The two inputs of each output and the weight of the second, in float64: where F.interpolate looks."""
    i = torch.arange(outputs, device=device).double()
    if align_corners:
        at = i * ((inputs - 1) / (outputs - 1) if outputs > 1 else 0.0)
    else:
        at = ((i + 0.5) * (inputs / outputs) - 0.5).clamp(min=0)
    low = at.long().clamp(max=inputs - 1)
    high = (low + 1).clamp(max=inputs - 1)
    return low, high, torch.where(high == low, 0.0, (at - low).clamp(0, 1))


class FixedOrder(torch.autograd.Function):
    """`bilinear`, whose own backward adds with atomics on a GPU: in another order, to other digits, every time."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
        return bilinear(logits, height, width, align_corners)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logits, ctx.height, ctx.width, ctx.align_corners = inputs
        ctx.size = logits.shape[-2:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        height, width = ctx.size
        return gathered(grad, height, width, ctx.align_corners), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return bilinear(tangent, ctx.height, ctx.width, ctx.align_corners)


def gathered(grad: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    """What (height, width) inputs get of the outputs that were interpolated from them."""
    for dim, size in ((-2, height), (-1, width)):
        if grad.shape[dim] != size:
            grad = gather(grad, dim, size, align_corners)
    return grad


def gather(grad: Tensor, dim: int, size: int, align_corners: bool) -> Tensor:
    """What `size` inputs get of the outputs along `dim` that were interpolated from them: one tap after the other.

    Not a matrix product, which TF32 may round, and which is mostly zeros.
    """
    outputs = grad.shape[dim]
    low, high, weight = taps(size, outputs, align_corners, grad.device)
    i = torch.arange(size, device=grad.device).unsqueeze(1)
    weights = (low == i) * (1 - weight) + (high == i) * weight  # (size, outputs)
    # outputs less than one input away on either side, and one for the roundings
    reach = outputs if size == 1 else max(2 * outputs / size, 2 * (outputs - 1) / (size - 1))
    count = min(outputs, int(reach) + 2)
    first = (weights != 0).to(torch.uint8).argmax(1, keepdim=True).clamp(max=outputs - count)
    index = first + torch.arange(count, device=grad.device)
    weights = weights.gather(1, index).to(grad.dtype)
    shape = [-1] + [1] * (-1 - dim)
    total = grad.index_select(dim, index[:, 0]) * weights[:, 0].view(shape)
    for tap in range(1, count):
        total = torch.addcmul(total, grad.index_select(dim, index[:, tap]), weights[:, tap].view(shape))
    return total


# ------------------------------------------------------------------------------------------- as an op, when compiled

LIBRARY.define("upsample(Tensor logits, SymInt height, SymInt width, bool align_corners) -> Tensor",
               tags=(torch.Tag.pt2_compliant_tag,))  # fmt: skip
LIBRARY.define("upsample_backward(Tensor grad, SymInt height, SymInt width, bool align_corners) -> Tensor",
               tags=(torch.Tag.pt2_compliant_tag,))  # fmt: skip


@torch.library.impl(LIBRARY, "upsample", "CompositeExplicitAutograd")
def _upsample(logits: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    return bilinear(logits.detach(), height, width, align_corners).contiguous()


@torch.library.impl(LIBRARY, "upsample_backward", "CompositeExplicitAutograd")
def _upsample_backward(grad: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    if grad.device.type == "cpu":  # in a fixed order already
        to = [*grad.shape[:2], height, width]
        return torch.ops.aten.upsample_bilinear2d_backward(grad, grad.shape[2:], to, align_corners).contiguous()
    return gathered(grad, height, width, align_corners).contiguous()


def _fake(x: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    return x.new_empty([*x.shape[:2], height, width])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.size, ctx.align_corners = inputs[0].shape[-2:], inputs[3]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    height, width = ctx.size
    return torch.ops.dsct_kernels.upsample_backward(grad, height, width, ctx.align_corners), None, None, None


torch.library.register_fake("dsct_kernels::upsample", _fake, lib=LIBRARY)
torch.library.register_fake("dsct_kernels::upsample_backward", _fake, lib=LIBRARY)
torch.library.register_autograd("dsct_kernels::upsample", _backward, setup_context=_setup_context, lib=LIBRARY)
