"""The dtype that everything is computed in."""

import torch
from torch import Tensor


def acc_dtype(*inputs: Tensor) -> torch.dtype:
    """float64 where an input is float64, else float32: of the arithmetic, and of the loss that comes out."""
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32
