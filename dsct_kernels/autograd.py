"""What the autograd of both losses shares: one rule for second derivatives, compiled or not."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

LIBRARY = torch.library.Library("dsct_kernels", "FRAGMENT")
LIBRARY.define("upstream(Tensor grad_output, Tensor student) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl(LIBRARY, "upstream", "CompositeExplicitAutograd")
def _upstream(grad_output: Tensor, student: Tensor) -> Tensor:
    """A copy of the small grad_output. Only that a compiled backward holds on to `student` matters: a graph that was
    asked for a second derivative then sees where it would have to go, and torch.compile refuses instead of giving None.
    """
    return grad_output.clone()


@torch.library.register_fake("dsct_kernels::upstream", lib=LIBRARY)
def _(grad_output: Tensor, student: Tensor) -> Tensor:
    return torch.empty_like(grad_output)


class _FirstOnly(torch.autograd.Function):
    """`grad`, connected to what it is a gradient of, so that differentiating it again meets an error, never a gap."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, anchor: Tensor, name: str) -> Tensor:
        ctx.name = name
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, None, None]:
        raise RuntimeError(
            f"{ctx.name} has a first derivative only: its gradient was differentiated again (create_graph=True)"
        )


def first_derivative_only(grad: Tensor, anchor: Tensor, name: str) -> Tensor:
    """`grad`; under create_graph=True with an error in its graph instead of a silently missing term.

    anchor: any tensor whose graph leads to what was differentiated.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return grad
    return _FirstOnly.apply(grad, anchor, name)


class Ops(NamedTuple):
    """A backend's op, and the one that takes its gradient."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def with_fakes(names: Iterable[str], suffix: str, fake: Callable[..., Any]) -> Ops:
    """The two ops of these names and this suffix, given their fakes: a gradient is like the student, which is first."""
    forward, backward = (f"{name}{suffix}" for name in names)
    torch.library.register_fake(f"dsct_kernels::{forward}", fake)
    torch.library.register_fake(f"dsct_kernels::{backward}", lambda student, *_: torch.empty_like(student))
    return Ops(*(getattr(torch.ops.dsct_kernels, name).default for name in (forward, backward)))
