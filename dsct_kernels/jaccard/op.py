"""The jaccard ops: signatures, results, autograd.

Nothing of the maps' size is kept: backward reads the logits again. What comes in is multiplied into the few
coefficients, in float64, before a small number can underflow in a float16 gradient.
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
    "jaccard": "(Tensor student_logits, Tensor teacher_logits, Tensor? share, Tensor temperature) "
    "-> (Tensor loss, Tensor coefficients)",
    "jaccard_backward": "(Tensor student_logits, Tensor teacher_logits, Tensor? share, Tensor temperature, "
    "Tensor coefficients) -> Tensor",
}


def fake(student: Tensor, teacher: Tensor, share: Tensor | None, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """What the forward op returns, empty."""
    loss = student.new_empty([], dtype=acc_dtype(student, teacher))
    return loss, student.new_empty([2, student.shape[1]], dtype=torch.float64)


def _gradient(ctx: Any, backward: Callable[..., Any], grad_output: Tensor | None) -> Tensor | None:
    if grad_output is None:
        return None
    student, teacher, share, temperature, coefficients = ctx.saved_tensors
    grad = backward(student, teacher, share, temperature, (coefficients * grad_output).to(coefficients.dtype))
    return first_derivative_only(grad, student, "jaccard_loss")


class EagerJaccard(torch.autograd.Function):
    """The op with its gradient, outside of torch.compile: half the overhead of the op's own registered autograd."""

    @staticmethod
    def forward(
        ctx: Any, ops: Ops, student: Tensor, teacher: Tensor, share: Tensor | None, temperature: Tensor
    ) -> Tensor:
        with BelowAutograd():
            loss, coefficients = ops.forward(student, teacher, share, temperature)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student, teacher, share, temperature, coefficients)
        ctx.backward_op = ops.backward
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, _gradient(ctx, ctx.backward_op, grad_output), None, None, None


def register(suffix: str) -> Ops:
    """The ops with this suffix, given their fakes and autograd."""
    ops = with_fakes(SIGNATURES, suffix, fake)

    def context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, coefficients = output
        ctx.mark_non_differentiable(coefficients)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, coefficients)

    def gradient(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, ops.backward, grad_output), None, None, None

    torch.library.register_autograd(f"dsct_kernels::jaccard{suffix}", gradient, setup_context=context)
    return ops


def jaccard(ops: Ops, student: Tensor, teacher: Tensor, share: Tensor | None, temperature: Number) -> Tensor:
    """The loss, differentiable in `student`; the arguments are reference.jaccard's."""
    args = (student, teacher.detach(), share, values.packed((temperature,), student.device))
    if student.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return EagerJaccard.apply(ops, *args)
    return ops.forward(*args)[0]
