"""Autograd of the tnkd ops. The forward pass already holds the gradient; backward only multiplies it by what comes in.

Every backend's op has the results and the first seven arguments of `dsct_kernels::tnkd` (docs/ops.md), so one rule
serves them all.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import values
from ..autograd import first_derivative_only
from ..values import Number

REDUCTION = 6  # position of the argument `reduction`, 0 for none
InPlaceScale = Callable[[Tensor, Tensor], None]


def scaled(grad: Tensor, factor: Tensor, per_pixel: bool) -> Tensor:
    """grad * factor as a new tensor, the product taken in float32 or better; 0 stays 0, whatever the factor is."""
    wide = grad.to(factor.dtype)
    product = wide * (factor.unsqueeze(1) if per_pixel else factor)
    return torch.where(wide == 0, 0, product).to(grad.dtype)


def handed_over(grad: Tensor, grad_scale: Tensor, grad_output: Tensor, scale_: InPlaceScale, keep: bool) -> Tensor:
    """The same for the scalar grad_scale * grad_output, without a second tensor where `grad` need not be kept.

    Where it need not, this is its last use, and it becomes the result: as it is where the factor is 1, scaled in place
    where not.
    """
    if grad.device.type == "cpu":
        number = float(grad_output) * float(grad_scale)  # a Python number is not rounded to half precision
        if number == 1:
            return grad.clone() if keep else grad
        if not math.isfinite(number):
            return scaled(grad, grad_output * grad_scale, False)
        return grad * number if keep else grad.mul_(number)
    if keep:
        grad = grad.clone()
    scale_(grad, grad_output * grad_scale)  # returns at once where the factor is 1, without asking the host
    return grad


class EagerTNKD(torch.autograd.Function):
    """The op with its gradient, outside of torch.compile: half the overhead of the op's own registered autograd."""

    @staticmethod
    def forward(ctx: Any, op: Callable[..., Any], scale_: InPlaceScale, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():  # past the op's own autograd: a fifth of a small call
            loss, parts, grad, grad_scale = op(*args, True)
        anchor = grad.new_empty(0)  # an output, so that it leads to the student's graph, without keeping the student
        ctx.mark_non_differentiable(parts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, grad_scale, anchor)
        ctx.per_pixel, ctx.scale_, ctx.others = args[REDUCTION] == 0, scale_, len(args) - 1
        # Somebody's saved_tensors_hooks may hold on to what is saved here.
        ctx.hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        return loss, parts, anchor

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        grad = None
        if grad_output is not None:
            grad, scale, anchor = ctx.saved_tensors
            if ctx.per_pixel or not (grad.is_cuda or values.readable(grad_output)):
                grad = scaled(grad, grad_output * scale, ctx.per_pixel)
            else:
                keep = ctx.hooked or torch._C._autograd._get_current_graph_task_keep_graph()  # retain_graph=True
                grad = handed_over(grad, scale, grad_output, ctx.scale_, keep)
            grad = first_derivative_only(grad, anchor, "tnkd_loss")
        return None, None, grad, *[None] * ctx.others


def register(name: str) -> None:
    """Gives the op `name`, of the contract of dsct_kernels::tnkd, its autograd; its output `grad` is never written."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, parts, grad, grad_scale = output
        ctx.mark_non_differentiable(parts, grad, grad_scale)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, grad_scale, inputs[0])
        ctx.per_pixel, ctx.others = inputs[REDUCTION] == 0, len(inputs) - 1

    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        grad = None
        if grad_output is not None:
            grad, scale, student = ctx.saved_tensors
            factor = torch.ops.dsct_kernels.upstream(grad_output, student) * scale
            grad = first_derivative_only(scaled(grad, factor, ctx.per_pixel), student, "tnkd_loss")
        return grad, *[None] * ctx.others

    torch.library.register_autograd(name, backward, setup_context=setup_context)


def fake(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    class_weight: Tensor | None,
    numbers: Tensor,
    ignore_index: Tensor | None,
    reduction: int,
    with_ce: bool,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes, dtypes and strides of what the op returns."""
    acc = torch.float64 if torch.float64 in (student_logits.dtype, teacher_logits.dtype) else torch.float32
    shape = [student_logits.shape[0], *student_logits.shape[2:]] if reduction == 0 else []
    return (
        student_logits.new_empty(shape, dtype=acc),
        student_logits.new_empty([3], dtype=acc),
        torch.empty_like(student_logits) if needs_grad else student_logits.new_empty([0]),
        student_logits.new_empty([], dtype=acc),
    )


def fake_upsampled(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same of tnkd_upsampled, whose map has the labels' size."""
    reduction, needs_grad = rest[REDUCTION - 3], rest[-1]
    acc = torch.float64 if torch.float64 in (student_logits.dtype, teacher_logits.dtype) else torch.float32
    shape = []
    if reduction == 0 and target is not None:
        shape = list(target.shape)
    elif reduction == 0:
        sizes = zip(student_logits.shape[2:], teacher_logits.shape[2:])
        shape = [student_logits.shape[0], *(torch.sym_max(a, b) for a, b in sizes)]
    return (
        student_logits.new_empty(shape, dtype=acc),
        student_logits.new_empty([3], dtype=acc),
        torch.empty_like(student_logits) if needs_grad else student_logits.new_empty([0]),
        student_logits.new_empty([], dtype=acc),
    )


def packed(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    class_weight: Tensor | None,
    ce_weight: Number,
    tckd_weight: Number,
    nckd_weight: Number,
    temperature: Number,
    ignore_index: int | Tensor | None,
    reduction: int,
    with_ce: bool,
) -> tuple[Any, ...]:
    """reference.tnkd's arguments behind student_logits as the op's: its numbers as tensors."""
    device = student_logits.device
    numbers = values.packed((ce_weight, tckd_weight, nckd_weight, temperature), device)
    index = values.packed_index(ignore_index, device) if target is not None else None
    return teacher_logits, target, class_weight, numbers, index, reduction, with_ce


def with_labels(
    teacher_logits: Tensor, target: Tensor | None, class_weight: Tensor | None, *rest: Any
) -> tuple[Any, ...]:
    """The op's arguments behind student_logits, with the teacher's argmax as target where an op cannot do without.

    A mean over class weights needs their sum before the first gradient; the GPU kernels find the argmax on the way.
    """
    *numbers, ignore_index, reduction, with_ce = rest
    if target is None and class_weight is not None and with_ce and reduction == 1:
        target, ignore_index = teacher_logits.argmax(1), None
    return teacher_logits, target, class_weight, *numbers, ignore_index, reduction, with_ce


def call(op: Callable[..., Any], scale_: InPlaceScale, student_logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """(loss, parts) of the op, differentiable in student_logits; `args` are the op's, without needs_grad."""
    needs_grad = student_logits.requires_grad and torch.is_grad_enabled()
    if needs_grad and not torch.compiler.is_compiling():
        return EagerTNKD.apply(op, scale_, student_logits, *args)[:2]
    return op(student_logits, *args, needs_grad)[:2]
