"""The jaccard ops: results and autograd. Their signatures stand in csrc/ops.cpp, the one backend that has them."""

from typing import Any

import torch
from torch import Tensor

from ..autograd import first_derivative_only
from ..backends import NATIVE_MISSING
from ..dtypes import acc_dtype
from ..torch_private import BelowAutograd


def _student_grad(ctx: Any, grad_output: Tensor | None) -> Tensor | None:
    """Nothing of the maps' size was kept: backward reads the logits again. What comes in is multiplied into the few
    coefficients, in float64, before a small number can underflow in a float16 gradient."""
    if grad_output is None:
        return None
    student, teacher, share, temperature, coefficients = ctx.saved_tensors
    grad = _backward(student, teacher, share, temperature, (coefficients * grad_output).to(coefficients.dtype))
    return first_derivative_only(grad, student, "jaccard_loss")


class EagerJaccard(torch.autograd.Function):
    """The op with its gradient, outside of torch.compile: half the overhead of the op's own registered autograd."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, share: Tensor | None, temperature: Tensor) -> Tensor:
        with BelowAutograd():
            loss, coefficients = _forward(student, teacher, share, temperature)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student, teacher, share, temperature, coefficients)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        return _student_grad(ctx, grad_output), None, None, None


if NATIVE_MISSING is None:
    _forward = torch.ops.dsct_kernels.jaccard.default
    _backward = torch.ops.dsct_kernels.jaccard_backward.default

    @torch.library.register_fake("dsct_kernels::jaccard")
    def _(student: Tensor, teacher: Tensor, share: Tensor | None, temperature: Tensor) -> tuple[Tensor, Tensor]:
        acc = acc_dtype(student, teacher)
        return student.new_empty([], dtype=acc), student.new_empty([2, student.shape[1]], dtype=torch.float64)

    @torch.library.register_fake("dsct_kernels::jaccard_backward")
    def _(student: Tensor, teacher: Tensor, share: Tensor | None, temperature: Tensor, coefficients: Tensor) -> Tensor:
        return torch.empty_like(student)

    def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, coefficients = output
        ctx.mark_non_differentiable(coefficients)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, coefficients)

    def _op_backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return _student_grad(ctx, grad_output), None, None, None

    torch.library.register_autograd("dsct_kernels::jaccard", _op_backward, setup_context=_context)


def call(student: Tensor, teacher: Tensor, share: Tensor | None, temperature: Tensor) -> Tensor:
    """The loss, differentiable in `student`."""
    if student.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return EagerJaccard.apply(student, teacher, share, temperature)
    return _forward(student, teacher, share, temperature)[0]
