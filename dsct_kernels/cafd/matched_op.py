"""The ops of matched CAFD: signatures, results, autograd.

What is saved is the two maps, which exist anyway, and a few numbers a row: the backward takes both softmaxes again and
writes the gradient once, the upstream factor multiplied in before anything is rounded to the student's dtype.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import values
from ..autograd import Ops, first_derivative_only, with_fakes
from ..dtypes import acc_dtype
from ..torch_private import BelowAutograd
from ..values import Number

# As csrc/ops.cpp has them: tests/test_ops.py compares the two.
SIGNATURES = {
    "matched_cafd": "(Tensor student, Tensor teacher, Tensor? mask, Tensor temperatures, bool uniform, int reduction) "
    "-> (Tensor loss, Tensor stats)",
    "matched_cafd_backward": "(Tensor student, Tensor teacher, Tensor? mask, Tensor stats, Tensor temperatures, "
    "Tensor grad_output, int reduction) -> Tensor",
}


def fake(
    student: Tensor, teacher: Tensor, mask: Tensor | None, temperatures: Tensor, uniform: bool, reduction: int
) -> tuple[Tensor, Tensor]:
    """What the forward op returns, empty. stats: MatchedStat in csrc/cafd/stats.h, for every backend."""
    n, c = student.shape[:2]
    loss = student.new_empty([n] if reduction == 0 else [], dtype=acc_dtype(student, teacher))
    return loss, student.new_empty([n, 5, c], dtype=torch.float64)


def _gradient(ctx: Any, backward: Callable[..., Any], grad_output: Tensor | None) -> Tensor | None:
    if grad_output is None:
        return None
    student, *saved = ctx.saved_tensors
    grad = backward(student, *saved, grad_output, ctx.reduction)
    return first_derivative_only(grad, student, "matched_cafd_loss")


def register(suffix: str) -> Ops:
    """The ops with this suffix, given their fakes and autograd."""
    ops = with_fakes(SIGNATURES, suffix, fake)

    def context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        student, teacher, mask, temperatures, _, ctx.reduction = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student, teacher, mask, output[1], temperatures)

    def gradient(ctx: Any, grad_output: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, ops.backward, grad_output), None, None, None, None, None

    torch.library.register_autograd(f"dsct_kernels::matched_cafd{suffix}", gradient, setup_context=context)
    return ops


class _Eager(torch.autograd.Function):
    """The op with its gradient, outside of torch.compile: half the overhead of the op's own registered autograd."""

    @staticmethod
    def forward(ctx: Any, ops: Ops, *args: Any) -> Tensor:
        with BelowAutograd():
            loss, stats = ops.forward(*args)
        student, teacher, mask, temperatures, _, ctx.reduction = args
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student, teacher, mask, stats, temperatures)
        ctx.backward_op = ops.backward
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, _gradient(ctx, ctx.backward_op, grad_output), None, None, None, None, None


def matched_cafd(
    ops: Ops,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    channel_temperature: Number | None,
    temperature: Number,
    reduction: int,
) -> Tensor:
    """The loss, differentiable in `student`; the arguments are reference.matched_cafd's."""
    uniform = channel_temperature is None
    pair = (1.0 if channel_temperature is None else channel_temperature, temperature)
    args = (student, teacher, mask, values.packed(pair, student.device), uniform, reduction)
    if student.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Eager.apply(ops, *args)
    return ops.forward(*args)[0]
