"""What the Triton kernels share: whether they can serve a call, how they are launched, how strides fold."""

import contextlib
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .backends import constant_when_compiled

OLDEST = (3, 6)
LOG2_E = math.log2(math.e)  # exp(x) = exp2(x * LOG2_E)
LN_2 = math.log(2)
WARPS = 64  # a multiprocessor has room for no more

FP_FUSION = True  # a * b + c in one rounding: what Triton's default is differs from version to version

LIBRARY = torch.library.Library("dsct_kernels", "FRAGMENT")
# Inputs are read at the strides they have, and the fake kernels promise the student's: Inductor must not re-lay them.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def define(name: str, signature: str, run: Callable[..., Any]) -> None:
    """The op of this name. On the CPU only the interpreter runs it."""
    LIBRARY.define(name + signature, tags=TAGS)
    for device in ("CUDA", "CPU"):
        LIBRARY.impl(name, run, device)


def interpreted() -> bool:
    """Kernels run in Triton's interpreter: decided by the environment before triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def why_not(*tensors: torch.Tensor | None) -> str | None:
    """Why Triton cannot serve these tensors where they are, or None."""
    for tensor in tensors:
        if tensor is not None:
            reason = _why_not_on(tensor.device.type, tensor.device.index)
            if reason is not None:
                return reason
    return None


_answers: dict[tuple[str, int | None], str | None] = {}


@constant_when_compiled
def _why_not_on(device: str, index: int | None) -> str | None:
    if (device, index) not in _answers:
        _answers[device, index] = _look(device, index)
    return _answers[device, index]


def _look(device: str, index: int | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install 'triton>=3.6')"
    if device == "cpu" and not interpreted():
        return "the tensors are on the CPU, where Triton runs only under TRITON_INTERPRET=1 (slow, for tests)"
    if device not in ("cpu", "cuda"):
        return f"the Triton kernels run on cuda, not on {device}"
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        return f"triton {triton.__version__} is too old: 3.6 or newer is needed"
    if device == "cpu":
        return None
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
        return "the Triton kernels need compute capability 8.0 or newer"
    try:
        triton.runtime.driver.active.get_current_device()  # its first use compiles what launches kernels
    except Exception as error:
        return f"Triton cannot launch kernels here, for which it needs a C compiler and Python.h: {error}"
    return None


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make that the tensor's."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def most_programs(tensor: torch.Tensor, warps: int) -> int:
    """How many programs share out a launch's tiles: what `WARPS` of a multiprocessor are, for all of its GPU's.

    Few, so that few partial sums are left to add; and the same at every call, as the order of those sums follows it.
    """
    if not tensor.is_cuda:
        return 2  # the interpreter's, which are to walk, too
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count * WARPS // warps


def launch(kernel: Any, programs: int, warps: int, *args: Any, **constants: Any) -> None:
    """The only place a kernel is started from: the ahead-of-time test replaces it to see every launch."""
    kernel[(programs,)](*args, num_warps=warps, enable_fp_fusion=FP_FUSION, **constants)


def fast(result: torch.Tensor) -> bool:
    """Whether the hardware's approximate instructions serve: float32 arithmetic, and a GPU under it."""
    return result.dtype == torch.float32 and not interpreted()


def fold(
    shape: Sequence[int], strides: Sequence[Sequence[int]], rank: int
) -> tuple[list[int], list[list[int]], int] | None:
    """The same index space in as few dimensions as all these strides allow, padded in front to `rank`; how few.

    Dimensions come out in the order of the first tensor's strides, longest first, so that the last is the one to give
    to the lanes. None where more than `rank` dimensions remain. A batch of one stays a dimension where a larger batch
    would: their launches are to be of one kind.
    """
    order = sorted((d for d in range(len(shape)) if shape[d] != 1), key=lambda d: -strides[0][d])
    sizes: list[int] = []
    folded: list[list[int]] = [[] for _ in strides]
    for d in order:
        if sizes and all(out[-1] == s[d] * shape[d] for out, s in zip(folded, strides, strict=True)):
            sizes[-1] *= shape[d]
            for out, s in zip(folded, strides, strict=True):
                out[-1] = s[d]
        else:
            sizes.append(shape[d])
            for out, s in zip(folded, strides, strict=True):
                out.append(s[d])
    if len(sizes) > rank:
        return None
    both = list(zip(folded, strides, strict=True))
    if shape[0] == 1 and 0 < len(sizes) < rank and any(s[0] != out[0] * sizes[0] for out, s in both):
        sizes.insert(0, 1)
        for out, s in both:
            out.insert(0, s[0])
    pad = rank - len(sizes)
    return [1] * pad + sizes, [[0] * pad + out for out in folded], max(1, len(sizes))


def product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
