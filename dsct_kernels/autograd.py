"""What the autograd of both losses shares: one rule for second derivatives."""

import torch
from torch import Tensor


def first_derivative_only(grad: Tensor, name: str) -> Tensor:
    """`grad`; under create_graph=True, `grad` with an error in its graph instead of a silently missing term."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return grad
    message = f"{name} has a first derivative only: its gradient was differentiated again (create_graph=True)"
    error = torch._C._functions.DelayedError(message.encode(), 1)
    return error(grad.detach().requires_grad_())
