"""CAFD's matched form, for maps whose channels correspond, such as logits: the public function and the module."""

from types import ModuleType
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, checks
from ..values import Number, ValueModule, positive
from . import matched_native, matched_triton, reference


def _positive_or_none(name: str, value: object) -> Number | None:
    return None if value is None else positive(name, value)


def matched_cafd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: Number = 4.0,
    channel_temperature: Number | None = 1.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""Channel-weighted distillation of maps whose channels correspond: logits, or features behind an adapter.

    .. math::
        loss_n = \tau^2 \sum_c w_c\, KL(P^T_c \| P^S_c), \quad P_{c,i} = \text{softmax}_i(z_{c,i} / \tau), \quad
        g_c = \text{mean}_i |z^T_{c,i}|, \quad w = \text{softmax}_c(g / \text{mean}_c\, g / \tau_c)

    with i over positions. Channels weigh as much as they do in the teacher's `channel_attention_map`, but each is
    compared with its own counterpart. With ``channel_temperature=None`` all weigh 1 / C: that is CWD (Shu et al., ICCV
    2021, arXiv 2011.13256) exactly. Maps that differ in H or W are average-pooled (adaptively) to the smaller of the
    two, in float32 (float64).

    Args:
        student: (N, C, H, W), float16, bfloat16, float32 or float64, any strides. Where a channel is -inf in both
            networks, nobody looks, and nothing is learnt.
        teacher: the same N and C; may differ in H, W, dtype and strides. Gets no gradient.
        temperature: :math:`\tau` > 0. Both temperatures are numbers or 0-d tensors, and may change at every step (see
            `tnkd_loss`).
        channel_temperature: :math:`\tau_c` > 0, divides the channels' relative strength before its softmax; None: every
            channel weighs the same.
        reduction: "mean" over the batch, "sum", or "none" for (N,).
        backend: "auto", "reference" or "native" (CPU); "triton" has no kernel for it. DSCT_KERNELS_BACKEND sets what
            "auto" means.

    Returns:
        The loss, float32 (float64 where an input is float64). Its gradient has the student's dtype. N = 0: 0. A teacher
        that looks where the student is -inf: inf. NaN or +inf in a map: NaN.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what came and what was expected.
        RuntimeError: the named backend cannot serve the call (it says why), or a second derivative is asked for.

    Example:
        >>> import torch
        >>> from dsct_kernels import matched_cafd_loss
        >>> student = torch.randn(2, 6, 32, 32, requires_grad=True)
        >>> teacher = torch.randn(2, 6, 64, 64)
        >>> matched_cafd_loss(student, teacher).backward()
        >>> student.grad.shape
        torch.Size([2, 6, 32, 32])
    """
    temperature = positive("temperature", temperature)
    channel_temperature = _positive_or_none("channel_temperature", channel_temperature)
    reduce = checks.reduction(reduction)
    checks.features("student", student)
    checks.features("teacher", teacher)
    if student.shape[0] != teacher.shape[0] or student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"teacher: expected the batch and channels of student {tuple(student.shape)}, got {tuple(teacher.shape)}"
        )
    checks.same_device("teacher", teacher, "student", student)
    teacher = teacher.detach()
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    student, teacher = _pooled(student, size), _pooled(teacher, size)
    return _choose(backend, student, teacher).matched_cafd(student, teacher, channel_temperature, temperature, reduce)


def _pooled(x: Tensor, size: tuple[int, int]) -> Tensor:
    if x.shape[2:] == size:
        return x
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if x.device.type != "cuda":
        return F.adaptive_avg_pool2d(x, size)
    return reference.pool(x.flatten(0, 1), size).unflatten(0, x.shape[:2])


def _choose(backend: str, *tensors: Tensor) -> ModuleType:
    return backends.choose(backend, reference, matched_native, matched_triton, *tensors)


class MatchedCAFDLoss(ValueModule):
    """`matched_cafd_loss` as a module: the keywords are given once. It has no parameters.

    Example:
        >>> import torch
        >>> from dsct_kernels import MatchedCAFDLoss
        >>> MatchedCAFDLoss(reduction="none")(torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)).shape
        torch.Size([3])
    """

    VALUES: ClassVar = {"temperature": positive, "channel_temperature": _positive_or_none}

    def __init__(
        self,
        *,
        temperature: Number = 4.0,
        channel_temperature: Number | None = 1.0,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        checks.reduction(reduction)
        self.temperature, self.channel_temperature = temperature, channel_temperature
        self.reduction, self.backend = reduction, backend

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss; shapes as for `matched_cafd_loss`."""
        return matched_cafd_loss(student, teacher, **self.values(), reduction=self.reduction, backend=self.backend)

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, channel_temperature={self.channel_temperature}, "
            f"reduction={self.reduction!r}, backend={self.backend!r}"
        )
