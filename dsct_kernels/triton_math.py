"""What the kernels of several losses share, in Triton."""

# mypy: ignore-errors

import triton
import triton.language as tl
from triton.language.extra import libdevice

from . import triton_common

LOG2_E = tl.constexpr(triton_common.LOG2_E)
LN_2 = tl.constexpr(triton_common.LN_2)
LOW = tl.constexpr(float("-inf"))
INTERPRETED = tl.constexpr(triton_common.interpreted())


@triton.jit
def reciprocal(x):
    """1 / x: the hardware's, good to one unit in the last place, in place of nine instructions."""
    if INTERPRETED:
        return 1.0 / x
    return libdevice.fast_dividef(1.0, x)


@triton.jit
def finite_max(m):
    """A maximum that may be subtracted: -inf (nothing there) becomes 0."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def offsets(c, p, channels, positions, LAST: tl.constexpr):
    """Where a tile of channels and positions lies in a dense map, (C, P) or, with channels LAST, (P, C): 32 bits."""
    if LAST:
        return p[None, :] * channels + c[:, None]
    return c[:, None] * positions + p[None, :]


@triton.jit
def sound(tau):
    """A temperature from device memory, where nobody has looked at it: what the host refuses makes everything NaN."""
    tau = tl.where(tau > 0, tau, float("nan"))
    return tl.where(tau < float("inf"), tau, float("nan"))


@triton.jit
def temperature(numbers, WHICH: tl.constexpr):
    """One of `temperatures` (triton_common.py), as it came or from device memory."""
    if isinstance(numbers, tl.tensor):
        tau = sound(tl.load(numbers + WHICH)).to(tl.float32)
    else:
        tau = numbers[WHICH]
    return tau


@triton.jit
def to_exp2(numbers, LAST: tl.constexpr):
    """log2(e) / tau of the last temperature, so that exp(x / tau) = exp2(x * it): divided in float64, rounded once."""
    if isinstance(numbers, tl.tensor):
        scale = (tl.full([], LOG2_E, tl.float64) / sound(tl.load(numbers + LAST))).to(tl.float32)
    else:
        scale = numbers[LAST + 1]
    return scale
