"""What the test files share: the error rule, strided copies of a tensor, and the kernels' other instruction sets."""

import ctypes
import itertools
import mmap
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dsct_kernels import backends
from dsct_kernels.cafd import reference as cafd_reference

ROOT = pathlib.Path(__file__).resolve().parents[1]
ISAS = ("default", "avx2", "avx512")


def pairs(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Of the product of the axes as few as it takes for every two values of two axes to meet. The same every time.

    What breaks by a value or by two together is found, at a fraction of the product's cost; three together are not.
    """
    left = {(i, a, j, b) for i, j in itertools.combinations(range(len(axes)), 2)
            for a in range(len(axes[i])) for b in range(len(axes[j]))}  # fmt: skip

    def met(at: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
        return {(i, at[i], j, at[j]) for i, j in itertools.combinations(range(len(axes)), 2)} & left

    chosen = []
    while left:
        best = max(itertools.product(*(range(len(axis)) for axis in axes)), key=lambda at: len(met(at)))
        left -= met(best)
        chosen.append(tuple(axis[i] for axis, i in zip(axes, best, strict=True)))
    return chosen


# Run by a process of its own: the tests of each file whose names hold what is chosen.
RUN_CHOSEN = """
import ast, sys, pytest
for file, chosen in ast.literal_eval(sys.argv[1]).items():
    if code := pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-k", chosen, file]):
        sys.exit(code)
"""


def run_again_with(isa: str, chosen: dict[str, str]) -> None:
    """The tests of each file whose names hold what is chosen, in a process of their own, with the kernels of `isa`."""
    info = backends.build_info()
    if os.environ.get("DSCT_KERNELS_CPU"):
        pytest.skip("already in such a process")
    if isa not in info["cpu_isas"]:  # type: ignore[operator]
        pytest.skip(f"{isa} is not built in")
    if ISAS.index(isa) >= ISAS.index(str(info["cpu_isa"])):
        pytest.skip(f"this run is {info['cpu_isa']} already, or the machine has no {isa}")
    command = [sys.executable, "-c", RUN_CHOSEN, repr(chosen)]
    environment = {**os.environ, "DSCT_KERNELS_CPU": isa}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def before_a_forbidden_page(x: Tensor) -> Tensor:
    """A copy that ends where a page ends, and the next one must not be touched: who does ends the process. Linux."""
    bytes = x.numel() * x.element_size()
    room = -(-bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + room), mmap.PAGESIZE, 0) == 0
    flat = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=room - bytes)
    return flat.as_strided(x.shape, x.stride()).copy_(x)


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
