"""CAFD's matched form, for maps whose channels correspond, such as logits: the public function and the module."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import backends, checks
from ..checks import Reduction
from ..module import LossModule, keywords_of
from ..pool import overlaid
from ..values import DEFAULT_IGNORE_INDEX, IgnoreIndex, Number, Temperature, positive, positive_or_none
from . import matched_native, matched_triton, reference


@dataclass(frozen=True)
class MatchedBackend(backends.Backend):
    matched_cafd: Callable[[Tensor, Tensor, Tensor | None, Number | None, Number, int], Tensor]


BACKENDS = (
    MatchedBackend("reference", backends.always, reference.matched_cafd),
    MatchedBackend("native", matched_native.why_not, matched_native.matched_cafd),
    MatchedBackend("triton", matched_triton.why_not, matched_triton.matched_cafd),
)


def matched_cafd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: Temperature = 4.0,
    channel_temperature: Temperature | None = 1.0,
    ignore_index: IgnoreIndex = DEFAULT_IGNORE_INDEX,
    reduction: Reduction = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""Channel-weighted distillation of maps whose channels correspond: logits, or features behind an adapter.

    .. math::
        loss_n = \tau^2 \sum_c w_c\, KL(P^T_c \| P^S_c), \quad P_{c,i} = \text{softmax}_i(z_{c,i} / \tau), \quad
        g_c = \text{mean}_i |z^T_{c,i}|, \quad w = \text{softmax}_c(g / \text{mean}_c\, g / \tau_c)

    with i over positions. Channels weigh as much as they do in the teacher's `channel_attention_map`, but each is
    compared with its own counterpart. With ``channel_temperature=None`` all weigh 1 / C: that is CWD (Shu et al., ICCV
    2021, arXiv 2011.13256) exactly. Maps that differ in H or W are average-pooled (adaptively, by what is not ignored)
    to the smaller of the two, in float32 (float64).

    Args:
        student_logits: (N, C, H, W), float16, bfloat16, float32 or float64, any strides; also (N, C) and
            (N, C, *spatial). Where a channel is -inf in both networks, nobody looks, and nothing is learnt. Any maps
            whose channels correspond will do.
        teacher_logits: the same N and C; may differ in dtype and strides, and (N, C, H, W) in size. Gets no gradient.
        target: (N, *spatial) labels of the logits' size or larger, any integer dtype, or None. It only says what is
            ignored: a cell without a label that counts has no part in the softmax, whatever the logits hold there.
        temperature: :math:`\tau` > 0. Both temperatures are numbers or 0-d tensors, and may change at every step (see
            `tnkd_loss`).
        channel_temperature: :math:`\tau_c` > 0, divides the channels' relative strength before its softmax; None: every
            channel weighs the same.
        ignore_index: as for `jaccard_loss`.
        reduction: "mean" over the batch, "sum", or "none" for (N,).
        backend: "auto", "reference", "native" or "triton" (GPUs). DSCT_KERNELS_BACKEND sets what "auto" means.

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
        >>> target = torch.randint(0, 6, (2, 128, 128), dtype=torch.uint8)
        >>> matched_cafd_loss(student, teacher, target).backward()
        >>> student.grad.shape
        torch.Size([2, 6, 32, 32])
    """
    temperature = positive("temperature", temperature)
    channel_temperature = positive_or_none("channel_temperature", channel_temperature)
    maps = overlaid(student_logits, teacher_logits, target, ignore_index, backend, classes=1)
    return of_maps(*maps, temperature, channel_temperature, reduction, backend)


def of_maps(
    student: Tensor,
    teacher: Tensor,
    share: Tensor | None,
    temperature: Number,
    channel_temperature: Number | None,
    reduction: Reduction,
    backend: str,
) -> Tensor:
    """The loss of what `overlaid` returns; the numbers are checked already."""
    student, teacher = _maps(student), _maps(teacher)
    mask = None if share is None else _maps(share.unsqueeze(1) > 0)
    serving = backends.choose(backend, BACKENDS, student, teacher)
    reduce = checks.reduction(reduction)
    return serving.matched_cafd(student, teacher, mask, channel_temperature, temperature, reduce)


def _maps(x: Tensor) -> Tensor:
    """(N, C, *spatial) as (N, C, H, W)."""
    return x if x.dim() == 4 else x.reshape(*x.shape[:2], -1, 1)


class MatchedCAFDLoss(LossModule):
    """`matched_cafd_loss` as a module: the keywords are given once. It has no parameters.

    Example:
        >>> import torch
        >>> from dsct_kernels import MatchedCAFDLoss
        >>> MatchedCAFDLoss(reduction="none")(torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)).shape
        torch.Size([3])
    """

    @keywords_of(matched_cafd_loss)
    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        """The loss; shapes as for `matched_cafd_loss`."""
        return matched_cafd_loss(student_logits, teacher_logits, target, **self.keywords())

    if TYPE_CHECKING:
        __call__ = forward
