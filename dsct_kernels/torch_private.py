"""Every call into private parts of torch, with what it is for: where a new torch breaks something, it is here."""

import torch
from torch import Tensor

# Past an op's own autograd, inside of an autograd.Function that has the gradient already: a fifth of a small call.
BelowAutograd = torch._C._AutoDispatchBelowAutograd


def transforms_active() -> bool:
    """Whether torch.func (grad, vmap, jvp, ...) is at work."""
    return torch._C._are_functorch_transforms_active()


def dispatch_intercepted() -> bool:
    """Whether a TorchDispatchMode (fake tensors, make_fx, ...) is at work."""
    return torch._C._len_torch_dispatch_stack() > 0


def batched(x: Tensor) -> bool:
    """Whether it stands for a batch of tensors: autograd.grad(is_grads_batched=True)."""
    return torch._C._functorch.is_legacy_batchedtensor(x)


def saved_tensors_hooked() -> bool:
    """Whether somebody's saved_tensors_hooks are given whatever is saved for backward."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def graph_is_kept() -> bool:
    """Within a backward: whether it was called with retain_graph=True."""
    return torch._C._autograd._get_current_graph_task_keep_graph()
