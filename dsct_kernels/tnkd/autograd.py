"""Autograd of the tnkd ops. The forward pass already holds the gradient; backward only multiplies it by what comes in.

Every backend's op has the arguments and results of `dsct_kernels::tnkd` (docs/ops.md), so one rule serves them all.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..autograd import first_derivative_only

NUM_INPUTS = 9
REDUCTION = 6  # position of the argument `reduction`, 0 for none
InPlaceScale = Callable[[Tensor, Tensor], None]


def scaled(grad: Tensor, grad_scale: Tensor, grad_output: Tensor, per_pixel: bool) -> Tensor:
    """grad * (grad_scale * grad_output) as a new tensor, the product taken in float32 or better."""
    factor = (grad_output.unsqueeze(1) if per_pixel else grad_output) * grad_scale
    return (grad.to(grad_scale.dtype) * factor).to(grad.dtype)


def handed_over(grad: Tensor, grad_scale: Tensor, grad_output: Tensor, scale_: InPlaceScale, keep: bool) -> Tensor:
    """The same for a scalar grad_output, without a second tensor of its size where `grad` need not be kept.

    Where it need not, this is its last use, and it becomes the result: as it is where the factor is 1, scaled in place
    where not.
    """
    if grad.device.type == "cpu":
        number = float(grad_output) * float(grad_scale)  # a Python number is not rounded to half precision
        if keep:
            return grad * number
        return grad if number == 1 else grad.mul_(number)
    if keep:
        grad = grad.clone()
    scale_(grad, grad_output * grad_scale)  # returns at once where the factor is 1, without asking the host
    return grad


class EagerTNKD(torch.autograd.Function):
    """The op with its gradient, outside of torch.compile: half the overhead of the op's own registered autograd."""

    @staticmethod
    def forward(ctx: Any, op: Callable[..., Any], scale_: InPlaceScale, *args: Any) -> tuple[Tensor, Tensor]:
        loss, parts, grad, grad_scale = op(*args, True)
        ctx.mark_non_differentiable(parts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, grad_scale)
        ctx.per_pixel, ctx.scale_ = args[REDUCTION] == 0, scale_
        # Somebody's saved_tensors_hooks may hold on to what is saved here.
        ctx.hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        return loss, parts

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        grad = None
        if grad_output is not None:
            grad, scale = ctx.saved_tensors
            if ctx.per_pixel:
                grad = scaled(grad, scale, grad_output, True)
            else:
                keep = ctx.hooked or torch._C._autograd._get_current_graph_task_keep_graph()  # retain_graph=True
                grad = handed_over(grad, scale, grad_output, ctx.scale_, keep)
            grad = first_derivative_only(grad, "tnkd_loss")
        return None, None, grad, *[None] * (NUM_INPUTS - 2)


def register(name: str) -> None:
    """Gives the op `name`, of the contract of dsct_kernels::tnkd, its autograd; its output `grad` is never written."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, parts, grad, grad_scale = output
        ctx.mark_non_differentiable(parts, grad, grad_scale)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, grad_scale)
        ctx.per_pixel = inputs[REDUCTION] == 0

    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        grad = None
        if grad_output is not None:
            grad, scale = ctx.saved_tensors
            grad = first_derivative_only(scaled(grad, scale, grad_output, ctx.per_pixel), "tnkd_loss")
        return grad, *[None] * (NUM_INPUTS - 1)

    torch.library.register_autograd(name, backward, setup_context=setup_context)


def fake(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    class_weight: Tensor | None,
    values: Tensor,
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


def packed(
    teacher_logits: Tensor,
    target: Tensor | None,
    class_weight: Tensor | None,
    ce_weight: float,
    tckd_weight: float,
    nckd_weight: float,
    temperature: float,
    ignore_index: int | None,
    reduction: int,
    with_ce: bool,
) -> tuple[Any, ...]:
    """reference.tnkd's arguments behind student_logits as the op's: numbers as tensors on the CPU."""
    values = torch.tensor([ce_weight, tckd_weight, nckd_weight, temperature], dtype=torch.float64, device="cpu")
    index = None if ignore_index is None else torch.tensor(ignore_index, dtype=torch.int64, device="cpu")
    return teacher_logits, target, class_weight, values, index, reduction, with_ce


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
        return EagerTNKD.apply(op, scale_, student_logits, *args)
    return op(student_logits, *args, needs_grad)[:2]
