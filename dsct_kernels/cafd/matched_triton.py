"""Matched CAFD has no Triton kernel yet: this says so where one is asked for."""

from torch import Tensor


def why_not(*tensors: Tensor) -> str | None:
    return "matched_cafd_loss has no Triton kernel; the reference serves every device"
