"""The tnkd ops: signature, results, autograd. The forward pass already holds the gradient; backward only multiplies it.

Every backend's op has the arguments and results of `dsct_kernels::tnkd` (docs/ops.md), so one rule serves them all.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import checks, values
from ..autograd import first_derivative_only
from ..dtypes import acc_dtype
from ..torch_private import BelowAutograd, graph_is_kept, saved_tensors_hooked
from .objective import MEAN, NONE, Objective

# As csrc/ops.cpp has it: tests/test_ops.py compares the two.
SIGNATURE = (
    "(Tensor student_logits, Tensor teacher_logits, Tensor? target, Tensor? class_weight, Tensor values, "
    "Tensor? ignore_index, bool coupled, int reduction, bool needs_grad) "
    "-> (Tensor loss, Tensor parts, Tensor grad, Tensor grad_scale)"
)
UPSAMPLED_SIGNATURE = SIGNATURE.replace("bool needs_grad", "bool align_corners, bool needs_grad")
TENSORS = 6  # of the ops' arguments: student_logits to ignore_index; coupled follows
InPlaceScale = Callable[[Tensor, Tensor], None]
NAMES = {False: "tnkd_loss", True: "kd_loss"}  # by coupled: whose second derivative is asked for


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
        with BelowAutograd():
            loss, parts, grad, grad_scale = op(*args, True)
        anchor = grad.new_empty(0)  # an output, so that it leads to the student's graph, without keeping the student
        ctx.mark_non_differentiable(parts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, grad_scale, anchor)
        ctx.per_pixel, ctx.scale_, ctx.others, ctx.coupled = loss.dim() > 0, scale_, len(args) - 1, args[TENSORS]
        ctx.hooked = saved_tensors_hooked()
        return loss, parts, anchor

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        grad = None
        if grad_output is not None:
            grad, scale, anchor = ctx.saved_tensors
            if ctx.per_pixel or not (grad.is_cuda or values.readable(grad_output)):
                grad = scaled(grad, grad_output * scale, ctx.per_pixel)
            else:
                keep = ctx.hooked or graph_is_kept()
                grad = handed_over(grad, scale, grad_output, ctx.scale_, keep)
            grad = first_derivative_only(grad, anchor, NAMES[ctx.coupled])
        return None, None, grad, *[None] * ctx.others


class EagerMap(torch.autograd.Function):
    """The map of `op`, where a number of the student's belongs to several pixels: its gradient waits for what comes in.

    `of_map` then takes it, from the inputs again: nothing of the map's size times K is kept, or made.
    """

    @staticmethod
    def forward(ctx: Any, op: Callable[..., Any], of_map: Callable[..., Tensor], *args: Any) -> tuple[Tensor, Tensor]:
        with BelowAutograd():
            loss, parts, _, _ = op(*args, False)
        ctx.mark_non_differentiable(parts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:TENSORS])
        ctx.of_map, ctx.coupled, ctx.align_corners, ctx.others = of_map, args[TENSORS], args[-1], len(args) - 1
        return loss, parts

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return None, None, _gradient_of_map(ctx, grad_output), *[None] * ctx.others


def _gradient_of_map(ctx: Any, grad_output: Tensor | None) -> Tensor | None:
    if grad_output is None:
        return None
    inputs = ctx.saved_tensors
    grad = ctx.of_map(*inputs, ctx.coupled, ctx.align_corners, grad_output)
    return first_derivative_only(grad, inputs[0], NAMES[ctx.coupled])


def register(name: str, fake: Callable[..., Any], of_map: Callable[..., Tensor] | None = None) -> Callable[..., Any]:
    """The op `name`, of the contract of dsct_kernels::tnkd, given its fake and its autograd; its output `grad` is never
    written. of_map: what takes the gradient of a map, or None where `grad` holds it."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        loss, parts, grad, grad_scale = output
        ctx.mark_non_differentiable(parts, grad, grad_scale)
        ctx.set_materialize_grads(False)
        ctx.per_pixel, ctx.others, ctx.coupled = loss.dim() > 0, len(inputs) - 1, inputs[TENSORS]
        ctx.of_map = of_map if ctx.per_pixel else None
        if ctx.of_map is None:
            ctx.save_for_backward(grad, grad_scale, inputs[0])
        else:
            ctx.save_for_backward(*inputs[:TENSORS])
            ctx.align_corners = inputs[-2]

    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        grad = None
        if ctx.of_map is not None:
            grad = _gradient_of_map(ctx, grad_output)
        elif grad_output is not None:
            grad, scale, student = ctx.saved_tensors
            factor = torch.ops.dsct_kernels.upstream(grad_output, student) * scale
            grad = first_derivative_only(scaled(grad, factor, ctx.per_pixel), student, NAMES[ctx.coupled])
        return grad, *[None] * ctx.others

    torch.library.register_fake(f"dsct_kernels::{name}", fake)
    torch.library.register_autograd(f"dsct_kernels::{name}", backward, setup_context=setup_context)
    op: Callable[..., Any] = getattr(torch.ops.dsct_kernels, name).default
    return op


def _results(
    student_logits: Tensor, teacher_logits: Tensor, shape: list[Any], needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = acc_dtype(student_logits, teacher_logits)
    return (
        student_logits.new_empty(shape, dtype=acc),
        student_logits.new_empty([3], dtype=acc),
        torch.empty_like(student_logits) if needs_grad else student_logits.new_empty([0]),
        student_logits.new_empty([], dtype=acc),
    )


def fake(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    class_weight: Tensor | None,
    values: Tensor,
    ignore_index: Tensor | None,
    coupled: bool,
    reduction: int,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes, dtypes and strides of what the op returns."""
    shape = [student_logits.shape[0], *student_logits.shape[2:]] if reduction == NONE else []
    return _results(student_logits, teacher_logits, shape, needs_grad)


def fake_upsampled(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    class_weight: Tensor | None,
    values: Tensor,
    ignore_index: Tensor | None,
    coupled: bool,
    reduction: int,
    align_corners: bool,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same of tnkd_upsampled, whose map has the labels' size, and no gradient before one comes in."""
    shape = []
    if reduction == NONE:
        shape = [student_logits.shape[0], *checks.label_size(student_logits, teacher_logits, target)]
    return _results(student_logits, teacher_logits, shape, needs_grad and reduction != NONE)


def fake_of_map(student_logits: Tensor, *_: Any) -> Tensor:
    """The same of tnkd_upsampled_backward: the gradient."""
    return torch.empty_like(student_logits)


def labels(teacher_logits: Tensor, target: Tensor | None, objective: Objective) -> Tensor | None:
    """`target`, or the teacher's argmax where the ops on a GPU cannot do without: they find it on the way, and a mean
    over class weights needs their sum before the first gradient. Nothing is ignored then."""
    averaged = objective.class_weight is not None and objective.reduction == MEAN and objective.may_have_ce()
    return teacher_logits.argmax(1) if target is None and averaged else target


def call(op: Callable[..., Any], scale_: InPlaceScale, student_logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """(loss, parts) of the op, differentiable in student_logits; `args` are the op's, without needs_grad."""
    needs_grad = student_logits.requires_grad and torch.is_grad_enabled()
    if needs_grad and not torch.compiler.is_compiling():
        return EagerTNKD.apply(op, scale_, student_logits, *args)[:2]
    return op(student_logits, *args, needs_grad)[:2]


def call_map(
    op: Callable[..., Any], of_map: Callable[..., Tensor], student_logits: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    """The same of a map whose gradient `of_map` takes."""
    needs_grad = student_logits.requires_grad and torch.is_grad_enabled()
    if needs_grad and not torch.compiler.is_compiling():
        return EagerMap.apply(op, of_map, student_logits, *args)
    return op(student_logits, *args, needs_grad)[:2]
