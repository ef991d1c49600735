"""What the test files share: the error rule, and strided copies of a tensor."""

import torch
from torch import Tensor


def relative_error(got: Tensor, truth: Tensor) -> float:
    """||got - truth|| / ||truth|| in float64 (the plain norm of the difference where truth is 0)."""
    got, truth = got.detach().double().cpu(), truth.detach().double().cpu()
    scale = truth.norm().item()
    return (got - truth).norm().item() / (scale if scale > 0 else 1.0)


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


def strided_copy(x: Tensor, layout: str) -> Tensor:
    """The same numbers in another memory layout: contiguous, channels_last, sliced, transposed."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":  # class or channel fastest, for any number of dimensions
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":  # not dense: every second element of a larger buffer, with an offset
        big = x.new_full([2 * s + 1 for s in x.shape], float("nan") if x.is_floating_point() else 99)
        view = big[tuple(slice(1, 1 + 2 * s, 2) for s in x.shape)]
        view.copy_(x)
        return view
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    raise ValueError(layout)


LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed")
