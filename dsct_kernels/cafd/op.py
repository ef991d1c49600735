"""The CAFD ops: signatures, results, autograd.

Whatever gradient comes in becomes one of the map, and one op takes that to the features. Every backend's ops have the
arguments and results of `dsct_kernels::cafd`, `::attention_map` and `::attention_map_backward` (docs/ops.md), so one
rule serves them all.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import values
from ..autograd import first_derivative_only
from ..dtypes import acc_dtype
from ..torch_private import BelowAutograd
from ..values import Number
from . import reference

Op = Callable[..., Any]

# As csrc/ops.cpp has them: tests/test_ops.py compares the two.
SIGNATURES = {
    "cafd": "(Tensor student_features, Tensor teacher_features, Tensor temperatures, int reduction, bool needs_grad) "
    "-> (Tensor loss, Tensor grad_map, Tensor stats)",
    "attention_map": "(Tensor features, Tensor temperatures) -> (Tensor map, Tensor stats)",
    "attention_map_backward": "(Tensor features, Tensor grad_map, Tensor stats, Tensor temperatures) -> Tensor",
}


class Ops(NamedTuple):
    """A backend's."""

    cafd: Op
    attention_map: Op
    attention_map_backward: Op


class Results:
    """What a backend's ops return, empty: a sample of its `stats` takes stats_row(channels, positions) numbers."""

    def __init__(self, stats_row: Callable[[int, int], int]) -> None:
        self.stats_row = stats_row

    def cafd(
        self, student: Tensor, teacher: Tensor, temperatures: Tensor, reduction: int, needs_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, _, h, w = student.shape
        loss = student.new_empty([n] if reduction == 0 else [], dtype=acc_dtype(student, teacher))
        grad_map = student.new_empty([n, h, w] if needs_grad else [0], dtype=acc_dtype(student))
        return loss, grad_map, self._stats(student)

    def attention_map(self, features: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
        n, _, h, w = features.shape
        return features.new_empty([n, h, w], dtype=acc_dtype(features)), self._stats(features)

    def attention_map_backward(self, features: Tensor, grad_map: Tensor, stats: Tensor, temperatures: Tensor) -> Tensor:
        return torch.empty_like(features)

    def _stats(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.new_empty([n, self.stats_row(c, h * w)], dtype=acc_dtype(x))


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
        with BelowAutograd():
            loss, grad_map, stats = op(student, teacher, temperatures, reduction, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student, grad_map, stats, temperatures)
        ctx.backward_op = backward_op
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, _cafd_backward(ctx, ctx.backward_op, grad_output), None, None, None


def register(suffix: str, results: Results) -> Ops:
    """The ops `cafd`, `attention_map` and `attention_map_backward` with this suffix, given their fakes and autograd."""
    names = [f"{name}{suffix}" for name in SIGNATURES]
    fakes: tuple[Op, ...] = (results.cafd, results.attention_map, results.attention_map_backward)
    for name, fake in zip(names, fakes, strict=True):
        torch.library.register_fake(f"dsct_kernels::{name}", fake)
    ops = Ops(*(getattr(torch.ops.dsct_kernels, name).default for name in names))

    def cafd_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, grad_map, stats = output
        ctx.mark_non_differentiable(grad_map, stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], grad_map, stats, inputs[2])

    def cafd_backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return _cafd_backward(ctx, ops.attention_map_backward, grad_output), None, None, None, None

    def map_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, stats = output
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], stats, inputs[1])

    def map_backward(ctx: Any, grad_map: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return _map_backward(ctx, ops.attention_map_backward, grad_map), None

    torch.library.register_autograd(f"dsct_kernels::{names[0]}", cafd_backward, setup_context=cafd_context)
    torch.library.register_autograd(f"dsct_kernels::{names[1]}", map_backward, setup_context=map_context)
    return ops


def cafd(
    ops: Ops, student: Tensor, teacher: Tensor, channel_temperature: Number, spatial_temperature: Number, reduction: int
) -> Tensor:
    """The loss of one stage, differentiable in `student`; the arguments are reference.cafd's."""
    temperatures = values.packed((channel_temperature, spatial_temperature), student.device)
    needs_grad = student.requires_grad and torch.is_grad_enabled()
    if needs_grad and not torch.compiler.is_compiling():
        return EagerCAFD.apply(ops.cafd, ops.attention_map_backward, student, teacher, temperatures, reduction)
    return ops.cafd(student, teacher, temperatures, reduction, needs_grad)[0]


def cafd_pooled(
    ops: Ops, student: Tensor, teacher: Tensor, channel_temperature: Number, spatial_temperature: Number, reduction: int
) -> Tensor:
    """The same for maps of two sizes on a GPU: the kernels leave one number a position, which is pooled and compared in
    float64, whose plain sum of logs keeps what float32 would lose near the teacher."""
    maps = (attention_map(ops, x, channel_temperature, spatial_temperature) for x in (student, teacher.detach()))
    loss = reference.map_loss(*(x.double() for x in maps))
    return reference.reduced(loss, reduction).to(acc_dtype(student, teacher))


def attention_map(ops: Ops, features: Tensor, channel_temperature: Number, spatial_temperature: Number) -> Tensor:
    """A, (N, H, W), differentiable."""
    temperatures = values.packed((channel_temperature, spatial_temperature), features.device)
    return ops.attention_map(features, temperatures)[0]
