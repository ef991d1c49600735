"""KD, plain knowledge distillation of logits, per pixel: the kernels of TNKD with coupled weights."""

from typing import Any

from torch import Tensor

from .. import checks
from ..checks import Reduction
from ..module import keywords_of
from ..values import DEFAULT_IGNORE_INDEX, IgnoreIndex, Number, Temperature, label_value, positive
from .loss import PixelLoss, logit_loss
from .objective import Objective


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: Temperature = 1.0,
    ignore_index: IgnoreIndex = DEFAULT_IGNORE_INDEX,
    align_corners: bool = False,
    reduction: Reduction = "mean",
    num_items: Number | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Knowledge distillation, per pixel: the KL divergence of the whole softmax.

    With :math:`p = \text{softmax}(\text{logits} / \tau)`, for student S and teacher T:

    .. math::
        l = \tau^2 KL(p^T \| p^S) = \tau^2 \sum_j p^T_j \log \frac{p^T_j}{p^S_j}

    Hinton et al. 2015 (arXiv 1503.02531) at every pixel, as CIRKD has it and most loops. It is TNKD whose non-target
    term weighs :math:`1 - b^T`, whatever the label, and takes TNKD's one pass.

    Args:
        student_logits, teacher_logits: as for `tnkd_loss`. A class that is -inf in the teacher adds nothing; one that
            is -inf in the student alone makes the loss inf.
        target: (N, *spatial) labels in [0, K) or `ignore_index`, or None: every pixel counts, at the larger of the two
            resolutions. Labels say which pixels count and, for logits smaller than they are, the output resolution;
            the loss of a pixel does not depend on its label.
        temperature: tau, > 0, divides the logits. A value that may change at every step, as for `tnkd_loss`.
        ignore_index, align_corners, reduction, num_items, backend: as for `tnkd_loss`.

    Returns:
        The loss, float32 (float64 where an input is float64). Its gradient has the student's dtype. No valid pixel: 0.

    Raises:
        TypeError, ValueError, RuntimeError: as for `tnkd_loss`.

    Example:
        >>> import torch
        >>> from dsct_kernels import kd_loss
        >>> student = torch.randn(2, 6, 16, 16, requires_grad=True)
        >>> loss = kd_loss(student, torch.randn(2, 6, 32, 32), torch.randint(0, 6, (2, 64, 64)), temperature=4.0)
        >>> loss.backward()
        >>> student.grad.shape
        torch.Size([2, 6, 16, 16])
    """
    objective = Objective(
        tckd_weight=1.0,
        nckd_weight=1.0,
        temperature=positive("temperature", temperature),
        ignore_index=label_value("ignore_index", ignore_index),
        reduction=checks.reduction(reduction),
        align_corners=align_corners,
        coupled=True,
    )
    items = checks.num_items(num_items, reduction)
    checks.logits(student_logits, teacher_logits, target)
    checks.ignore_index_is_no_class(ignore_index, student_logits.shape[1], target)
    return logit_loss(student_logits, teacher_logits, target, objective, backend, items)[0]


class KDLoss(PixelLoss):
    """`kd_loss` as a module: the keywords are given once.

    Example:
        >>> import torch
        >>> from dsct_kernels import KDLoss
        >>> criterion = KDLoss(temperature=4.0)
        >>> criterion(torch.randn(2, 6, 8, 8), torch.randn(2, 6, 8, 8)).shape
        torch.Size([])
    """

    function = staticmethod(kd_loss)

    @keywords_of(kd_loss)
    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
