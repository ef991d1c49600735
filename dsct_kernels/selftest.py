"""`python -m dsct_kernels --check`: the kernels against the reference in float64, on the machine at hand.

The rule that the tests go by: a kernel's error against float64, in the loss and in the gradient, is at most twice that
of the reference in the inputs' own dtype, plus 1e-6 relative.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import Backend
from .cafd import loss as cafd
from .cafd import matched
from .dsct import dsct_loss
from .jaccard import loss as jaccard
from .tnkd import loss as tnkd
from .tnkd.kd import kd_loss

UPSTREAM = 1024.0  # comes into every loss, as from a GradScaler: without it float16 holds too few of the digits


def relative_error(got: Tensor, truth: Tensor) -> float:
    """||got - truth|| / ||truth|| in float64 (the plain norm of the difference where truth is 0)."""
    got, truth = got.detach().double().cpu(), truth.detach().double().cpu()
    scale = truth.norm().item()
    return (got - truth).norm().item() / (scale if scale > 0 else 1.0)


@dataclass(frozen=True)
class Problem:
    """What one call of any of the losses takes."""

    student: Tensor  # (N, K, H, W)
    teacher: Tensor  # (N, K, H, W)
    labels: Tensor  # (N, H, W)
    large_labels: Tensor  # (N, 4 H, 4 W)
    student_features: Tensor  # (N, C, h, w)
    teacher_features: Tensor  # (N, C', h', w')
    class_weight: Tensor  # (K,)

    @classmethod
    def drawn(cls, shape: tuple[int, int, int, int], dtype: torch.dtype, layout: torch.memory_format) -> "Problem":
        n, k, h, w = shape
        generator = torch.Generator().manual_seed(k)

        def numbers(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).mul(2).to(dtype).contiguous(memory_format=layout)

        def labels(*size: int) -> Tensor:
            y = torch.randint(0, k, size, generator=generator, dtype=torch.uint8)
            return torch.where(torch.rand(size, generator=generator) < 0.1, 255, y)

        return cls(
            numbers(*shape), numbers(*shape), labels(n, h, w), labels(n, 4 * h, 4 * w),
            numbers(n, 24, h, w), numbers(n, 40, h // 2, w // 2), torch.rand(k, generator=generator) + 0.5,
        )  # fmt: skip

    def each(self, change: Callable[[Tensor], Tensor]) -> "Problem":
        return Problem(*map(change, vars(self).values()))


@dataclass(frozen=True)
class Loss:
    name: str
    offered: Callable[[], tuple[Backend, ...]]
    call: Callable[[Problem, str], Tensor]
    learns: tuple[str, ...] = ("student",)  # whose gradients are looked at


LOSSES = (
    Loss("tnkd", lambda: tnkd.BACKENDS,
         lambda p, backend: tnkd.tnkd_loss(p.student, p.teacher, p.labels, temperature=2, backend=backend)),
    Loss("low-resolution", lambda: tnkd.BACKENDS,
         lambda p, backend: tnkd.tnkd_loss(p.student, p.teacher, p.large_labels, temperature=2, backend=backend)),
    Loss("kd", lambda: tnkd.BACKENDS,
         lambda p, backend: kd_loss(p.student, p.teacher, p.large_labels, temperature=2, backend=backend)),
    Loss("cafd", lambda: cafd.BACKENDS,
         lambda p, backend: cafd.cafd_loss(p.student_features, p.teacher_features, backend=backend),
         ("student_features",)),
    Loss("matched", lambda: matched.BACKENDS,
         lambda p, backend: matched.matched_cafd_loss(p.student, p.teacher, p.large_labels, backend=backend)),
    Loss("jaccard", lambda: jaccard.BACKENDS,
         lambda p, backend: jaccard.jaccard_loss(p.student, p.teacher, p.large_labels, backend=backend)),
    Loss("dsct", lambda: tnkd.BACKENDS,
         lambda p, backend: dsct_loss(
             p.student, p.teacher, p.large_labels, p.student_features, p.teacher_features, tnkd_weight=0.5,
             class_weight=p.class_weight, backend=backend).total,
         ("student", "student_features")),
)  # fmt: skip
# Every dtype, layout and number of classes that has code of its own meets each of the others' at least once; more would
# have a GPU's owner wait for Triton's compiler.
CASES = (
    ((2, 6, 33, 29), torch.float32, torch.contiguous_format),
    ((2, 6, 33, 29), torch.bfloat16, torch.channels_last),
    ((1, 19, 24, 40), torch.float16, torch.contiguous_format),
    ((1, 19, 24, 40), torch.float32, torch.channels_last),
    ((1, 150, 16, 16), torch.float32, torch.contiguous_format),
    ((2, 6, 9, 8), torch.float64, torch.contiguous_format),
)


def in_float64(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def gradients(loss: Loss, problem: Problem, backend: str) -> list[Tensor]:
    """The loss, and the gradient of everything that learns from it."""
    leaves = {name: getattr(problem, name).detach().requires_grad_() for name in loss.learns}
    value = loss.call(Problem(**{**vars(problem), **leaves}), backend)
    return [value.detach(), *torch.autograd.grad(value * UPSTREAM, list(leaves.values()))]


def share_of_allowed(got: Tensor, reference: Tensor, truth: Tensor) -> float:
    """The error of `got` in units of the allowed one: above 1 it is too large, NaN where a number is missing.

    A loss is a difference of terms: a few roundings of 1 are allowed where the reference hits it by luck.
    """
    rounding = 8 * torch.finfo(got.dtype).eps / max(1e-3, truth.norm().item()) if got.dim() == 0 else 0.0
    return relative_error(got, truth) / (2 * relative_error(reference, truth) + 1e-6 + rounding)


def worst(loss: Loss, backend: Backend, device: torch.device) -> tuple[float, str]:
    """The largest share of the allowed error over all cases that the backend serves, and where it is."""
    found = (-1.0, "")
    for shape, dtype, layout in CASES:
        problem = Problem.drawn(shape, dtype, layout)
        there = problem.each(lambda x: x.to(device))
        if backend.why_not(there.student, there.teacher) is not None:
            continue
        truths = gradients(loss, problem.each(in_float64), "reference")  # on the CPU, wherever the kernel is
        owns, gots = gradients(loss, there, "reference"), gradients(loss, there, backend.name)
        names = ("loss", *(f"gradient of {name}" for name in loss.learns))
        for name, got, own, truth in zip(names, gots, owns, truths, strict=True):
            share = share_of_allowed(got, own, truth)
            if not share <= found[0]:
                kind = f"{str(dtype).removeprefix('torch.')}, {str(layout).removeprefix('torch.')}"
                found = (share, f"{name}, {shape}, {kind}")
            if share != share:
                return found
    return found


def check(devices: list[torch.device]) -> bool:
    """Prints a line for every usable kernel; whether all passed, and there was one."""
    print(
        "error against the reference in float64, in units of the allowed one (twice that of the reference in the "
        "inputs' dtype, plus 1e-6); the worst case"
    )
    start, passed = time.perf_counter(), []
    for device in devices:
        for loss in LOSSES:
            for backend in loss.offered()[1:]:
                if backend.why_not(torch.zeros((1, 2, 1, 1), device=device)) is not None:
                    continue
                if backend.name == "triton" and device.type == "cpu":  # its interpreter: minutes, and for tests only
                    continue
                try:
                    share, where = worst(loss, backend, device)
                except Exception as error:
                    passed.append(False)
                    said = f"FAILED  {type(error).__name__}: {error}"
                else:
                    passed.append(share <= 1)
                    said = f"{share:6.2f}  {'ok    ' if passed[-1] else 'FAILED'}  {where}"
                print(f"  {device!s:7} {backend.name:7} {loss.name:15} {said}", flush=True)
    print(f"{sum(passed)} of {len(passed)} passed in {time.perf_counter() - start:.1f} s")
    if not passed:
        print("no kernel is usable here: `python -m dsct_kernels` says why")
    return bool(passed) and all(passed)
