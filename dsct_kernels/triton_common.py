"""What the Triton backends share: whether they can serve a call, how kernels are launched, how tensors are laid out.

Triton compiles each kernel for the number of classes, a power-of-two size class of C and H*W of features, and each
combination of dtypes, layout and flags that a process uses: of most losses a training run uses one or two.
"""

import contextlib
import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backends import constant_when_compiled

OLDEST = (3, 6)
LOG2_E = math.log2(math.e)  # exp(x) = exp2(x * LOG2_E)
LN_2 = math.log(2)
WARPS = 64  # a multiprocessor has room for no more

FP_FUSION = True  # a * b + c in one rounding: what Triton's default is differs from version to version

LIBRARY = torch.library.Library("dsct_kernels", "FRAGMENT")
# What the fake kernels promise is the strides that inputs have: Inductor must not re-lay them.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def define(name: str, signature: str, run: Callable[..., Any]) -> None:
    """The op of this name. On the CPU only the interpreter runs it."""
    LIBRARY.define(name + signature, tags=TAGS)
    for device in ("CUDA", "CPU"):
        LIBRARY.impl(name, run, device)


def interpreted() -> bool:
    """Kernels run in Triton's interpreter: decided by the environment before triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def why_not(*tensors: Tensor | None) -> str | None:
    """Why Triton cannot serve these tensors where they are, or None."""
    for tensor in tensors:
        if tensor is not None:
            if tensor.dtype == torch.float64:
                return "its kernels compute in float32, and float64 is the reference's"
            if tensor.numel() >= tensor.shape[0] * 2**31 > 0:
                return "its kernels count the numbers of a sample in 32 bits"
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


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make that the tensor's."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def most_programs(tensor: Tensor, warps: int) -> int:
    """How many programs share out a launch's tiles: what `WARPS` of a multiprocessor are, for all of its GPU's.

    Few, so that few partial sums are left to add; and the same at every call, as the order of those sums follows it.
    """
    if not tensor.is_cuda:
        return 2  # the interpreter's, which are to walk, too
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count * WARPS // warps


def launch(kernel: Any, programs: int, warps: int, *args: Any, **constants: Any) -> None:
    """The only place a kernel is started from: the ahead-of-time test replaces it to see every launch."""
    kernel[(programs,)](*args, num_warps=warps, enable_fp_fusion=FP_FUSION, **constants)


def read_by_kernels(numbers: Tensor, by_pointer: bool | None) -> bool:
    """Numbers on the CPU are read here and become the kernels' arguments; those on a GPU are read by the kernels, and
    the host is not asked. `by_pointer` makes that choice: the interpreter's tensors all lie on the CPU."""
    return numbers.device.type != "cpu" if by_pointer is None else by_pointer


def numbers_for(numbers: Tensor, by_pointer: bool | None) -> Tensor | tuple[float, ...]:
    """An op's numbers, the last of them a temperature, as the kernels take them (`numbers_of` in triton_math.py): where
    they lie, or as they are, with log2(e) / the temperature behind them."""
    if read_by_kernels(numbers, by_pointer):
        return numbers
    known = numbers.tolist()
    return (*known, LOG2_E / known[-1])


def channels_last(x: Tensor) -> bool:
    """Whether (N, C, *spatial) is laid out as (N, *spatial, C), if with gaps."""
    return x.shape[1] > 1 and x.stride(1) == 1


def dense(x: Tensor, last: bool) -> Tensor:
    """(N, C, *spatial) without gaps, or, where channels are to be `last`, (N, *spatial, C): a copy if it has to be."""
    if x.dtype == torch.float64:
        raise ValueError("expected tensors of 16 or 32 bits, in which the Triton kernels compute, got float64")
    return (x.movedim(1, -1) if last else x).contiguous()


def settled(grad: Tensor, written: Tensor, last: bool) -> Tensor:
    """`grad`, when its `dense` has been written."""
    if written.data_ptr() == grad.data_ptr():
        return grad
    return grad.copy_(written.movedim(-1, 1) if last else written)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
