"""Which backend serves a call, and why the others do not.

A loss folder holds one module per backend, `reference`, `native` and `triton`, with the same functions in each. The
loss lists them as records of its own, derived from `Backend`, in its `BACKENDS`.
"""

import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import torch_private

F = TypeVar("F", bound=Callable[..., Any])

BACKENDS = ("auto", "reference", "native", "triton")


@dataclass(frozen=True)
class Backend:
    """One way to compute a loss. Each loss derives its own record, with its functions as fields."""

    name: str
    why_not: Callable[..., str | None]  # of a call's tensors: None where the backend can serve them, else the reason


B = TypeVar("B", bound=Backend)


def always(*tensors: Tensor) -> None:
    """The `why_not` of a reference: it serves every device and dtype that torch does."""


# With build isolation, pip's default, torch is not there and nothing can be built.
INSTALL = 'pip install torch pybind11 ninja "setuptools>=77" && pip install --no-build-isolation .'


def left_out() -> str | None:
    """What setup.py left out of this installation and why, or None: written down, since pip hides what is printed."""
    note = Path(__file__).with_name("_left_out.txt")
    return note.read_text().strip() if note.exists() else None


def _why_missing(error: ImportError) -> str:
    if error.name == "dsct_kernels._C" and isinstance(error, ModuleNotFoundError):
        why = f"the native kernels are not built into this installation ({left_out() or error})"
    else:
        why = f"the native kernels cannot be loaded ({error})"
    return f"{why}; reinstall with: {INSTALL}"


try:
    _C: ModuleType | None = importlib.import_module("dsct_kernels._C")
    NATIVE_MISSING: str | None = None
except ImportError as error:
    _C = None
    NATIVE_MISSING = _why_missing(error)
    # Here and not only in setup.py, whose output pip hides: nobody should time the reference for the kernels.
    warnings.warn(f"dsct_kernels: {NATIVE_MISSING}", stacklevel=2)


def constant_when_compiled(function: F) -> F:
    """torch.compiler.assume_constant_result without what it imports: all of torch._dynamo, as long again as torch.

    The mark is all that it leaves on the function (tests/test_import.py compares the two).
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def build_info() -> dict[str, object]:
    """Compiler, instruction sets built in and in use, CUDA architectures and torch version of the native build."""
    if _C is None:
        raise ImportError(NATIVE_MISSING)
    return _C.build_info()


def why_not_native(*tensors: Tensor) -> str | None:
    """Why the native backend cannot serve these tensors, or None where it can."""
    if NATIVE_MISSING is not None:
        return NATIVE_MISSING
    device = tensors[0].device
    if device.type == "cpu":
        return None
    if device.type == "cuda":
        return _why_not_native_cuda(device.index)
    return f"the native kernels run on cpu and cuda, not on {device.type}"


_cuda_answers: dict[int, str | None] = {}


@constant_when_compiled
def _why_not_native_cuda(index: int) -> str | None:
    if index not in _cuda_answers:
        archs = str(build_info()["cuda_archs"])
        have = torch.cuda.get_device_capability(index)
        _cuda_answers[index] = _why_not_arch(archs, have)
    return _cuda_answers[index]


def _why_not_arch(archs: str, have: tuple[int, int]) -> str | None:
    if not archs:
        why = left_out() or "reinstall where torch has CUDA and an nvcc is found"
        return f"the native kernels were built without CUDA: {why}"
    for arch in archs.replace(",", ";").replace(" ", ";").split(";"):
        ptx = arch.endswith("+PTX")
        try:
            major, minor = (int(x) for x in arch.removesuffix("+PTX").rstrip("af").split("."))
        except ValueError:  # "", or a name like Hopper: nothing is known of what it covers
            continue
        if (major == have[0] and minor <= have[1]) or (ptx and (major, minor) <= have):
            return None
    return f"the native kernels were built for CUDA {archs}, this GPU is {have[0]}.{have[1]}"


def transforming() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, ...) is at work: its tensors have no data to look at."""
    return not torch.compiler.is_compiling() and torch_private.transforms_active()


def why_no_kernel(*tensors: Tensor) -> str | None:
    """Why no kernel, native or Triton, can serve this call: they bring one derivative, backward, and nothing else."""
    if torch.compiler.is_compiling():
        return None
    if transforming():
        return "only the reference goes through the transforms of torch.func"
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        return "only the reference has a forward-mode derivative"
    return None


def default_backend() -> str:
    """The backend that "auto" stands for: DSCT_KERNELS_BACKEND, or "auto" itself."""
    name = os.environ.get("DSCT_KERNELS_BACKEND") or "auto"
    if name not in BACKENDS:
        raise ValueError(f"DSCT_KERNELS_BACKEND: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def known(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")


def asked(backend: str) -> str:
    """What is asked for: `backend`, or, where that is "auto", what "auto" stands for."""
    return default_backend() if backend == "auto" else backend


def else_reference(backend: str, offered: tuple[Backend, ...], *tensors: Tensor) -> str:
    """What to ask for in a part of an objective that has no kernels on every device: `backend`, or the reference."""
    known(backend)
    name = asked(backend)
    serves = name == "auto" or any(b.name == name and b.why_not(*tensors) is None for b in offered)
    return backend if serves else "reference"


def choose(backend: str, offered: tuple[B, ...], *tensors: Tensor) -> B:
    """The one that serves these tensors: a backend that is named serves or raises; "auto" falls back.

    offered: a loss's backends, the reference first, then in the order of preference.
    """
    backend = asked(backend)
    if backend == "auto":
        if why_no_kernel(*tensors) is None:
            # CPU: Triton would run under its interpreter, never unasked. Elsewhere the measured order:
            # benchmarks/results.
            unasked = "triton" if tensors[0].device.type == "cpu" else None
            for candidate in offered[1:]:
                if candidate.name != unasked and candidate.why_not(*tensors) is None:
                    return candidate
        return offered[0]
    known(backend)
    for candidate in offered:
        if candidate.name == backend:
            reason = candidate.why_not(*tensors)
            if reason is None and candidate is not offered[0]:
                reason = why_no_kernel(*tensors)
            if reason is not None:
                raise RuntimeError(f"backend={backend!r} cannot serve this call: {reason}")
            return candidate
    raise RuntimeError(
        f"backend={backend!r} cannot serve this call: this loss has no {backend.capitalize()} kernels yet"
    )
