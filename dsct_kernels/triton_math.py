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
def numbers_of(numbers, COUNT: tl.constexpr):
    """The COUNT numbers of an op, the last of them a temperature, and log2(e) over that: exp(x / tau) = exp2(x * it).

    As `numbers_for` (triton_common.py) gives them, or from device memory, divided in float64 and rounded once. Nobody
    has looked at those: what the host refuses makes the temperature NaN, and everything with it.
    """
    found = numbers
    if isinstance(numbers, tl.tensor):
        found = ()
        tau = tl.load(numbers + (COUNT - 1))
        tau = tl.where((tau > 0) & (tau < float("inf")), tau, float("nan"))
        for i in tl.static_range(COUNT - 1):
            one = tl.load(numbers + i)
            tau = tl.where((one >= 0) & (one < float("inf")), tau, float("nan"))
            found += (one.to(tl.float32),)
        found += (tau.to(tl.float32), (tl.full([], LOG2_E, tl.float64) / tau).to(tl.float32))
    return found
