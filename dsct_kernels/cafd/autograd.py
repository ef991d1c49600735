"""Autograd of the CAFD ops: whatever comes in becomes a gradient of the map, and one op takes that to the features.

Every backend's ops have the arguments and results of `dsct_kernels::cafd`, `::attention_map` and
`::attention_map_backward` (docs/ops.md), so one rule serves them all.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..autograd import first_derivative_only

Op = Callable[..., Any]


def _cafd_backward(ctx: Any, backward_op: Op, grad_output: Tensor | None) -> Tensor | None:
    if grad_output is None:
        return None
    features, grad_map, stats, temperatures = ctx.saved_tensors
    factor = grad_output if grad_output.dim() == 0 else grad_output.view(-1, 1, 1)
    grad_map = (grad_map * factor).to(grad_map.dtype)  # a float64 teacher makes the loss and its gradient float64
    return first_derivative_only(backward_op(features, grad_map, stats, temperatures), features, "cafd_loss")


def _map_backward(ctx: Any, backward_op: Op, grad_map: Tensor | None) -> Tensor | None:
    if grad_map is None:
        return None
    features, stats, temperatures = ctx.saved_tensors
    grad = backward_op(features, grad_map.contiguous(), stats, temperatures)
    return first_derivative_only(grad, features, "channel_attention_map")


class EagerCAFD(torch.autograd.Function):
    """The op with its gradient, outside of torch.compile: half the overhead of the op's own registered autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        op: Op,
        backward_op: Op,
        student: Tensor,
        teacher: Tensor,
        temperatures: Tensor,
        reduction: int,
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():  # past the op's own autograd
            loss, grad_map, stats = op(student, teacher, temperatures, reduction, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student, grad_map, stats, temperatures)
        ctx.backward_op = backward_op
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, _cafd_backward(ctx, ctx.backward_op, grad_output), None, None, None


def register(cafd: str, attention_map: str, attention_map_backward: Op) -> None:
    """Gives the ops named `cafd` and `attention_map` their autograd; `attention_map_backward` is the op itself."""

    def cafd_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, grad_map, stats = output
        ctx.mark_non_differentiable(grad_map, stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], grad_map, stats, inputs[2])

    def cafd_backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return _cafd_backward(ctx, attention_map_backward, grad_output), None, None, None, None

    def map_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, stats = output
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], stats, inputs[1])

    def map_backward(ctx: Any, grad_map: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return _map_backward(ctx, attention_map_backward, grad_map), None

    torch.library.register_autograd(cafd, cafd_backward, setup_context=cafd_context)
    torch.library.register_autograd(attention_map, map_backward, setup_context=map_context)


def call(op: Op, backward_op: Op, student: Tensor, teacher: Tensor, temperatures: Tensor, reduction: int) -> Tensor:
    """The loss of one stage, differentiable in `student`."""
    needs_grad = student.requires_grad and torch.is_grad_enabled()
    if needs_grad and not torch.compiler.is_compiling():
        return EagerCAFD.apply(op, backward_op, student, teacher, temperatures, reduction)
    return op(student, teacher, temperatures, reduction, needs_grad)[0]
