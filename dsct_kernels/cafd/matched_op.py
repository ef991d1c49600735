"""The ops of matched CAFD: results and autograd. Their signatures stand in csrc/ops.cpp, the one backend that has them.

What is saved is the two maps, which exist anyway, and a few numbers a row: the backward takes both softmaxes again and
writes the gradient once, the upstream factor multiplied in before anything is rounded to the student's dtype.
"""

from typing import Any

import torch
from torch import Tensor

from ..autograd import first_derivative_only
from ..backends import NATIVE_MISSING
from ..dtypes import acc_dtype
from ..torch_private import BelowAutograd

if NATIVE_MISSING is None:
    _forward = torch.ops.dsct_kernels.matched_cafd.default
    _backward = torch.ops.dsct_kernels.matched_cafd_backward.default

    @torch.library.register_fake("dsct_kernels::matched_cafd")
    def _(
        student: Tensor,
        teacher: Tensor,
        mask: Tensor | None,
        temperatures: Tensor,
        uniform: bool,
        reduction: int,
    ) -> tuple[Tensor, Tensor]:
        n, c = student.shape[:2]
        acc = acc_dtype(student, teacher)
        loss = student.new_empty([n] if reduction == 0 else [], dtype=acc)
        return loss, student.new_empty([n, 5, c], dtype=torch.float64)  # MatchedStat in csrc/cafd/cpu/matched_args.h

    @torch.library.register_fake("dsct_kernels::matched_cafd_backward")
    def _(
        student: Tensor,
        teacher: Tensor,
        mask: Tensor | None,
        stats: Tensor,
        temperatures: Tensor,
        grad_output: Tensor,
        reduction: int,
    ) -> Tensor:
        return torch.empty_like(student)

    def _gradient(ctx: Any, grad_output: Tensor | None) -> Tensor | None:
        if grad_output is None:
            return None
        student, *saved = ctx.saved_tensors
        grad = _backward(student, *saved, grad_output, ctx.reduction)
        return first_derivative_only(grad, student, "matched_cafd_loss")

    def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        student, teacher, mask, temperatures, _, ctx.reduction = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student, teacher, mask, output[1], temperatures)

    def _registered(ctx: Any, grad_output: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, grad_output), None, None, None, None, None

    torch.library.register_autograd("dsct_kernels::matched_cafd", _registered, setup_context=_context)


class _Eager(torch.autograd.Function):
    """The op with its gradient, outside of torch.compile: half the overhead of the op's own registered autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor | None,
        temperatures: Tensor,
        uniform: bool,
        reduction: int,
    ) -> Tensor:
        with BelowAutograd():
            loss, stats = _forward(student, teacher, mask, temperatures, uniform, reduction)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student, teacher, mask, stats, temperatures)
        ctx.reduction = reduction
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, grad_output), None, None, None, None, None


def call(
    student: Tensor, teacher: Tensor, mask: Tensor | None, temperatures: Tensor, uniform: bool, reduction: int
) -> Tensor:
    """The loss, differentiable in `student`."""
    if student.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Eager.apply(student, teacher, mask, temperatures, uniform, reduction)
    return _forward(student, teacher, mask, temperatures, uniform, reduction)[0]
