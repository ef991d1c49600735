"""Weights, temperatures and ignore_index: values that may change from step to step, as numbers or as 0-d tensors.

A number that can be read here and now becomes a Python number, and a bad one is refused. One that cannot, because it
lies on a GPU or because the call is being traced, stays a tensor: nothing waits for a device, no value becomes a
constant of a compiled graph, and a bad one makes the loss NaN (on the CPU the op refuses it when it runs).
"""

import enum
import functools
import numbers
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import TypeAliasType

from . import torch_private

Number = float | Tensor
# What a keyword of a loss may be, by the names that signatures and help() show. CHECKS, below, goes by them, too.
Weight = TypeAliasType("Weight", Number)  # finite and >= 0
Temperature = TypeAliasType("Temperature", Number)  # finite and > 0
IgnoreIndex = TypeAliasType("IgnoreIndex", int | Tensor | None)
INF = float("inf")


class _Default(enum.Enum):
    """The default of ignore_index, told apart from a 255 that somebody asked for: with K > 255 it is a class.

    Not a subclass of int: torch.compile takes a constant for any other that is equal to it.
    """

    IGNORE_INDEX = 255

    def __repr__(self) -> str:
        return str(self.value)


DEFAULT_IGNORE_INDEX = cast(int, _Default.IGNORE_INDEX)


def plain() -> bool:
    """Whether calls here run as they stand: nobody traces, transforms or intercepts them."""
    return not (
        torch.compiler.is_compiling() or torch_private.transforms_active() or torch_private.dispatch_intercepted()
    )


def readable(x: Tensor) -> bool:
    """Whether the numbers in `x` can be looked at without waiting for a device, and exist at all."""
    return (
        x.is_cpu
        and plain()
        and type(x).__torch_dispatch__ is Tensor.__torch_dispatch__
        and not torch_private.batched(x)
    )


def number(name: str, value: object) -> Number:
    """`value` as a float, or as a tensor where it cannot be read."""
    if type(value) is float:  # first, since most calls bring just that
        return value
    if isinstance(value, Tensor):
        _check_tensor(name, value, "a number")
        return value.item() if readable(value) else value
    if torch.compiler.is_compiling() and not isinstance(value, (bool, str, type(None))):
        return value  # type: ignore[return-value]  # a float or an int whose value the graph is not to depend on
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    return float(value)


def _check_tensor(name: str, value: Tensor, expected: str) -> None:
    if value.dim() != 0 or value.dtype == torch.bool or value.dtype.is_complex:
        kind = f"a tensor of shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}"
        raise TypeError(f"{name}: expected {expected} or a 0-d tensor, got {kind}")
    if value.requires_grad:
        raise ValueError(f"{name}: expected a value without a gradient, since it gets none: pass {name}.detach()")


def positive(name: str, value: object) -> Number:
    x = number(name, value)
    if isinstance(x, Tensor) or torch.compiler.is_compiling() or 0 < x < INF:
        return x
    raise ValueError(f"{name}: expected a finite number > 0, got {value}")


def weight(name: str, value: object) -> Number:
    x = number(name, value)
    if isinstance(x, Tensor) or torch.compiler.is_compiling() or 0 <= x < INF:
        return x
    raise ValueError(f"{name}: expected a finite number >= 0, got {value}")


def label_value(name: str, value: object) -> int | Tensor | None:
    """`value` as an int, or as a tensor where it cannot be read."""
    if value is None:
        return None
    if value is DEFAULT_IGNORE_INDEX:
        return 255
    if isinstance(value, Tensor):
        _check_tensor(name, value, "an int, None")
        if value.dtype.is_floating_point:
            raise TypeError(f"{name}: expected an int or None, got a tensor of {value.dtype}")
        return int(value.item()) if readable(value) else value
    if torch.compiler.is_compiling() and not isinstance(value, (bool, str, float)):
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an int or None, got {type(value).__name__}")
    if not -(2**63) <= int(value) < 2**63:
        raise ValueError(f"{name}: expected a number that int64 holds, got {value}")
    return int(value)


def positive_or_none(name: str, value: object) -> Number | None:
    return None if value is None else positive(name, value)


# What a module (module.py) checks its keywords with, by their annotations in the function's signature.
CHECKS: dict[Any, Callable[[str, object], Any]] = {
    Weight: weight,
    Temperature: positive,
    Temperature | None: positive_or_none,
    IgnoreIndex: label_value,
}


def known_zero(value: Number) -> bool:
    """Whether a part of this weight can be left out beforehand; never so while compiling, for any value."""
    return not torch.compiler.is_compiling() and not isinstance(value, Tensor) and value == 0


def packed(values: tuple[Number, ...], device: torch.device) -> Tensor:
    """(len(values),) float64 as the ops take them: on the CPU where all are known, else on `device`."""
    if not torch.compiler.is_compiling():
        for x in values:
            if isinstance(x, Tensor):
                break
        else:
            return _kept(values) if plain() else torch.tensor(values, dtype=torch.float64, device="cpu")
    # A product with a tensor is what keeps torch.compile from taking a number for a constant.
    one = torch.ones((), dtype=torch.float64, device=device)
    return torch.stack([one * x for x in values])


def packed_index(value: int | Tensor | None, device: torch.device) -> Tensor | None:
    """() int64, likewise."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value.detach().to(torch.int64)
    if plain():
        return _kept_index(int(value))
    if not torch.compiler.is_compiling():
        return torch.tensor(int(value), dtype=torch.int64, device="cpu")
    return torch.full((), value, dtype=torch.int64, device=device)


# A training loop asks for the same few numbers again and again: a tensor of them takes longer to make than to use.
@functools.lru_cache(maxsize=64)
def _kept(values: tuple[float, ...]) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float64, device="cpu")


@functools.lru_cache(maxsize=64)
def _kept_index(value: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.int64, device="cpu")


def as_scalars(values: tuple[Number, ...], device: torch.device, dtype: torch.dtype) -> tuple[Number, ...]:
    """For the reference: Python numbers as they are; else 0-d tensors of `dtype` on `device`."""
    if not torch.compiler.is_compiling() and not any(isinstance(x, Tensor) for x in values):
        return values
    return packed(values, device).to(dtype).unbind()


def sound(value: Number, positive: bool = False) -> Number:
    """`value`; a tensor that is negative (0, where it has to be positive) or not finite becomes NaN."""
    if not isinstance(value, Tensor):
        return value
    return torch.where((value > 0 if positive else value >= 0) & value.isfinite(), value, torch.nan)


def weighted(value: Number, part: Tensor) -> Tensor:
    """value * part; a part with weight 0 takes no part, since 0 * inf would be NaN."""
    if isinstance(value, Tensor):
        return torch.where(value == 0, 0, value * part)
    return part * value if value != 0 else torch.zeros_like(part)


def divisor(value: Number, device: torch.device) -> Number:
    """A number of items that a sum is divided by. 0 is as good as 1: where nothing counts the sum is 0."""
    if isinstance(value, Tensor) or torch.compiler.is_compiling():
        items = packed((value,), device)[0]
        return torch.where(items == 0, 1, sound(items))
    return value or 1.0
