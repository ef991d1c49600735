"""Logits of two networks laid over each other at the smaller size: averages over cells, and what their labels say."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, checks
from .autograd import LIBRARY
from .dtypes import acc_dtype
from .values import label_value, readable


def overlaid(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    ignore_index: int | Tensor | None,
    backend: str,
    classes: int = 2,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Student, teacher and the share of each cell's labels that counts, checked, at the smaller of the two sizes.

    The share is (N, *spatial) in the dtype that the loss computes in; None: all of every cell. The teacher is detached.
    """
    ignored = label_value("ignore_index", ignore_index)
    size = checks.overlaid(student_logits, teacher_logits, target, classes)
    checks.ignore_index_is_no_class(ignore_index, student_logits.shape[1], target)
    acc = acc_dtype(student_logits, teacher_logits)
    share = None if target is None or ignored is None else labelled(target, ignored, size, acc, backend)
    student = averaged(student_logits, size, acc, target, ignored, backend)
    return student, averaged(teacher_logits.detach(), size, acc, target, ignored, backend), share


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


def labelled(
    target: Tensor, ignored: int | Tensor, size: list[int], dtype: torch.dtype, backend: str = "auto"
) -> Tensor:
    """(N, *size): the share of each cell's labels that are not ignored, contiguous."""
    native = backends.NATIVE_MISSING is None and backends.asked(backend) in ("auto", "native")
    if native and target.dim() == 3 and readable(target) and not isinstance(ignored, Tensor):
        share: Tensor = torch.ops.dsct_kernels.labelled(target, ignored, *size, dtype == torch.float64)
        return share
    limits = torch.iinfo(target.dtype)
    if torch.compiler.is_compiling() or isinstance(ignored, Tensor) or not limits.min <= ignored <= limits.max:
        target = target.long()  # an int8 tensor compared with the number 255 would find it equal to -1
    share = (target != ignored).to(dtype).contiguous()
    if list(share.shape[1:]) == size:
        return share
    return _averages(share.unsqueeze(1), size).squeeze(1)


def averaged(
    maps: Tensor,
    size: list[int],
    dtype: torch.dtype,
    target: Tensor | None = None,
    ignored: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """(N, K, *size): as they are where they have that size, else adaptive averages in `dtype`.

    Positions weigh by the share of their labels that counts, so that what is ignored has no part in an average.
    """
    if list(maps.shape[2:]) == size:
        return maps
    maps = maps.to(dtype)
    if target is None or ignored is None:
        return _averages(maps, size)
    share = labelled(target, ignored, list(maps.shape[2:]), dtype, backend).unsqueeze(1)
    total = _averages(share, size)
    return _averages(torch.where(share > 0, maps * share, 0), size) / torch.where(total > 0, total, 1)


def _averages(maps: Tensor, size: list[int]) -> Tensor:
    height, width = size
    if maps.device.type == "cuda":
        return pool(maps.flatten(0, 1), (height, width)).unflatten(0, maps.shape[:2])
    if torch.compiler.is_compiling():  # one op for any sizes: Inductor cannot lower torch's where it sees them change
        compiled: Tensor = torch.ops.dsct_kernels.average(maps, height, width)
        return compiled
    return F.adaptive_avg_pool2d(maps, (height, width))


if backends.NATIVE_MISSING is None:

    @torch.library.register_fake("dsct_kernels::labelled")
    def _(target: Tensor, ignore_index: int, height: int, width: int, wide: bool) -> Tensor:
        return target.new_empty([target.shape[0], height, width], dtype=torch.float64 if wide else torch.float32)


LIBRARY.define("average(Tensor maps, SymInt height, SymInt width) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define("average_backward(Tensor grad, SymInt height, SymInt width) -> Tensor",
               tags=(torch.Tag.pt2_compliant_tag,))  # fmt: skip


@torch.library.impl(LIBRARY, "average", "CompositeExplicitAutograd")
def _average(maps: Tensor, height: int, width: int) -> Tensor:
    return F.adaptive_avg_pool2d(maps.detach(), (height, width)).contiguous()


@torch.library.impl(LIBRARY, "average_backward", "CompositeExplicitAutograd")
def _average_backward(grad: Tensor, height: int, width: int) -> Tensor:
    maps = grad.new_empty([*grad.shape[:2], height, width])
    return torch.ops.aten._adaptive_avg_pool2d_backward(grad.contiguous(), maps).contiguous()


def _fake(x: Tensor, height: int, width: int) -> Tensor:
    return x.new_empty([*x.shape[:2], height, width])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.size = inputs[0].shape[-2:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    height, width = ctx.size
    return torch.ops.dsct_kernels.average_backward(grad, height, width), None, None


torch.library.register_fake("dsct_kernels::average", _fake, lib=LIBRARY)
torch.library.register_fake("dsct_kernels::average_backward", _fake, lib=LIBRARY)
torch.library.register_autograd("dsct_kernels::average", _backward, setup_context=_setup_context, lib=LIBRARY)
