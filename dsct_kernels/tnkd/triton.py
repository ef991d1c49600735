from torch import Tensor


def why_not(*tensors: Tensor) -> str | None:
    return "the Triton kernels have not landed yet"
