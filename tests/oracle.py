"""What is right: the reference in float64, and how far a kernel may be from it.

A kernel's results, the reference's in the same dtype, and the reference's in float64 (`learnt`, `three`) go by one
rule (`assert_as_good_as_reference`, CAFD's with the roundings that its terms cost).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsct_kernels import cafd_loss, tnkd_loss
from dsct_kernels.cafd import reference as cafd_reference
from dsct_kernels.selftest import in_float64, relative_error

# A loss is a difference of terms of size 1 (TNKD: temperature^2); where it is near 0, a few roundings of these remain.
ROUNDING = {torch.float32: 4 * 1.2e-7, torch.float64: 4 * 2.3e-16}

# --- the three results -----------------------------------------------------------------------------------------------


def learnt(
    loss_of: Callable[[Tensor], Any], student: Tensor, upstream: Callable[[Tensor], Tensor] = torch.ones_like
) -> tuple[Tensor, ...]:
    """(loss, whatever `loss_of` returns beside it, the student's gradient), detached; `upstream` says of a loss what
    comes in for it."""
    leaf = student.detach().requires_grad_()
    loss, *rest = result if isinstance(result := loss_of(leaf), tuple) else (result,)
    (grad,) = torch.autograd.grad(loss, leaf, upstream(loss))
    return loss.detach(), *(x.detach() for x in rest), grad


def three(run: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, Any, Any]:
    """What `run` gives of a backend, the last of the arguments; of the reference; and of the reference in float64."""
    *inputs, backend = arguments
    wide = [in_float64(x) if isinstance(x, Tensor) else x for x in inputs]
    return run(*inputs, backend, **options), run(*inputs, "reference", **options), run(*wide, "reference", **options)


# --- the rule --------------------------------------------------------------------------------------------------------


def assert_as_good_as_reference(
    got: Tensor, reference: Tensor, truth: Tensor, what: str, extra: float = 1e-6, floor: float = 0.0
) -> None:
    """The rule of the spec: a kernel's error against float64 is at most twice the reference's own, plus 1e-6 relative.

    got: the kernel's result. reference: the eager reference's, on the same inputs in their own dtype. truth: the
    reference's on the same inputs taken to float64. A non-finite truth has to be matched exactly. floor: an absolute
    error that is always allowed; for a loss that is a difference of terms of size 1 and may be 0.
    """
    assert got.shape == truth.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    finite = truth.isfinite()
    if not finite.all():
        same = got.double().cpu()[~finite.cpu()], truth.double().cpu()[~finite.cpu()]
        assert torch.equal(*(x.nan_to_num(nan=123.0) for x in same)), f"{what}: {same[0]} where float64 has {same[1]}"
        got, reference, truth = (torch.where(finite.to(x.device), x, 0) for x in (got, reference, truth))
    error, allowed = relative_error(got, truth), 2 * relative_error(reference, truth) + extra
    if floor and (got.double().cpu() - truth.double().cpu()).norm() <= floor:
        return
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def _cafd_terms(student: Tensor, teacher: Tensor, channel_t: float, spatial_t: float, reduction: int) -> Tensor:
    """The size of the gradient's terms before they cancel, elementwise: what a rounding is relative to."""
    f = student.double().flatten(2)
    p = (f / spatial_t).softmax(-1)
    g = f.abs().mean(-1)
    mean = g.mean(-1, keepdim=True)
    w = (torch.where(mean == 0, 1, g / mean) / channel_t).softmax(-1)
    a = cafd_reference.attention_map(student.detach().double(), channel_t, spatial_t).requires_grad_()
    loss = cafd_reference.map_loss(a, cafd_reference.attention_map(teacher.double(), channel_t, spatial_t)).sum()
    d = torch.autograd.grad(loss, a)[0].flatten(1).unsqueeze(1).abs()
    if student.shape[2:] != teacher.shape[2:]:
        d = d + 1  # rescaling the pooled map takes away the mean of terms of about this size
    if reduction == 1:
        d = d / len(f)
    rho = (p * d).sum(-1)
    look = w.unsqueeze(-1) * p * (d + rho.unsqueeze(-1)) / spatial_t
    speak = w * (rho + (w * rho).sum(-1, keepdim=True)) / channel_t / mean.clamp_min(1e-300) / f.shape[-1]
    return look + torch.where(mean == 0, 0, speak).unsqueeze(-1)


def assert_cafd_as_good_as_reference(
    got: tuple[Tensor, Tensor],
    reference: tuple[Tensor, Tensor],
    truth: tuple[Tensor, Tensor],
    student: Tensor,
    teacher: Tensor,
    what: str,
    channel_t: float = 1.0,
    spatial_t: float = 1.0,
    reduction: int = 1,
    extra: float = 1e-6,
) -> None:
    """The error rule on CAFD's (loss, gradient).

    The loss is a sum of a log(a / b), the gradient a difference of terms: where they cancel to something small, the
    reference may hit it by luck. Eight roundings of what is added and taken away are always allowed. `extra` is what
    the gradient's own dtype asks for.
    """
    acc = torch.finfo(got[0].dtype)
    rounding = 8 * acc.eps * max(1.0, 0.1 / channel_t)
    terms = _cafd_terms(student, teacher, channel_t, spatial_t, reduction).norm().item()
    sizes = (("loss", 2.0 * len(student), 1e-6), ("gradient", terms, extra))
    for (name, size, relative), *values in zip(sizes, got, reference, truth, strict=True):
        norm = values[2].norm().item()
        cancelled = (rounding * size + acc.tiny) / (norm or 1.0) if norm < float("inf") else 0.0
        assert_as_good_as_reference(*values, f"{name} {what}", relative + cancelled)


# --- both losses through the public functions ------------------------------------------------------------------------


def problem(device, shape=(2, 5, 3, 4), dtype=torch.float32, seed=0, scale=3.0):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(shape, generator=g) * scale for _ in range(2))
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=g)
    return student.to(device, dtype), teacher.to(device, dtype), target.to(device)


def features(device, shape=(2, 6, 5, 4), dtype=torch.float32, seed=0, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(shape, generator=g) * scale).to(device, dtype) for _ in range(2))


def tnkd(student, teacher, target, backend, **kw):
    """(loss, gradient)."""
    return learnt(lambda s: tnkd_loss(s, teacher, target, backend=backend, **kw), student)


def check_tnkd(student, teacher, target, backend, **kw):
    """The error rule: the backend and the reference in the inputs' dtype, both against float64."""
    (loss, grad), (ref_loss, ref_grad), (true_loss, true_grad) = three(tnkd, student, teacher, target, backend, **kw)
    assert grad.dtype == student.dtype and loss.dtype == ref_loss.dtype
    # A pixel's loss is a difference of terms of size tau^2 (alpha + beta), its gradient one of size tau (alpha + beta).
    tau, pixels = kw.get("temperature", 2.0), max(1, student.numel() // student.shape[1])
    unit = ROUNDING[loss.dtype] * (kw.get("alpha", 1.0) + kw.get("beta", 2.0))
    over_pixels = {"mean": 1.0, "sum": pixels, "none": pixels**0.5}[kw.get("reduction", "mean")]
    assert_as_good_as_reference(loss, ref_loss, true_loss, "loss", floor=unit * max(1.0, tau**2) * over_pixels)
    over_pixels = pixels**-0.5 if kw.get("reduction", "mean") == "mean" else pixels**0.5
    assert_as_good_as_reference(grad, ref_grad, true_grad, "gradient", floor=unit * tau * over_pixels)
    return loss, grad


def cafd(student, teacher, backend, **kw):
    """(loss, gradient)."""
    return learnt(lambda s: cafd_loss(s, teacher, backend=backend, **kw), student)


def cancelling_terms(student, teacher, channel_temperature=1.0, spatial_temperature=1.0, **_):
    """The size of the terms A_i D_i whose differences are CAFD's gradient: where attention is one-hot, D is 10^6 and
    the gradient is what is left of them."""
    both = [cafd_reference.attention_map(x, channel_temperature, spatial_temperature) for x in (student, teacher)]
    attention = both[0].detach().requires_grad_()
    (d,) = torch.autograd.grad(cafd_reference.map_loss(attention, both[1]).sum(), attention)
    strength = student.abs().mean((1, 2, 3)).clamp(min=1e-30).min()
    terms = (attention * d).norm() * (1 / spatial_temperature + 1 / (channel_temperature * strength))
    return max(terms.item(), 1e-6)


def check_cafd(student, teacher, backend, **kw):
    (loss, grad), (ref_loss, ref_grad), (true_loss, true_grad) = three(cafd, student, teacher, backend, **kw)
    assert grad.dtype == student.dtype and loss.dtype == ref_loss.dtype
    assert_as_good_as_reference(loss, ref_loss, true_loss, "loss", floor=ROUNDING[loss.dtype])
    floor = ROUNDING[loss.dtype] * cancelling_terms(student.double(), teacher.double(), **kw)
    assert_as_good_as_reference(grad, ref_grad, true_grad, "gradient", floor=floor)
    return loss, grad
