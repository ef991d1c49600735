"""TNKD, target / non-target knowledge distillation of logits, per pixel: the public function and its module."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import backends, checks, values
from ..checks import Reduction
from ..module import LossModule, keywords_of
from ..values import DEFAULT_IGNORE_INDEX, IgnoreIndex, Number, Temperature, Weight, label_value, positive, weight
from . import native, reference, triton, triton_upsampled
from .objective import SUM, Objective


@dataclass(frozen=True)
class TNKDBackend(backends.Backend):
    tnkd: Callable[[Tensor, Tensor | None, Tensor | None, Objective], tuple[Tensor, Tensor]]
    upsamples_on: tuple[str, ...] = ()  # devices where its kernels read logits smaller than the labels as they are
    most_classes: int | None = None  # that its kernels serve on a GPU; None: any number


BACKENDS = (
    TNKDBackend("reference", backends.always, reference.tnkd),
    TNKDBackend("native", native.why_not, native.tnkd, native.UPSAMPLES_ON, native.MOST_CLASSES_ON_CUDA),
    TNKDBackend("triton", triton.why_not, triton_upsampled.tnkd, triton_upsampled.UPSAMPLES_ON, triton.MOST_CLASSES),
)


def tnkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    alpha: Weight = 1.0,
    beta: Weight = 0.5,
    temperature: Temperature = 1.0,
    ignore_index: IgnoreIndex = DEFAULT_IGNORE_INDEX,
    align_corners: bool = False,
    reduction: Reduction = "mean",
    num_items: Number | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Target / non-target knowledge distillation, per pixel.

    With :math:`z = \text{logits} / \tau`, :math:`u = z_y - \log\sum_{j \ne y} e^{z_j}`, :math:`b = \sigma(u)` and
    :math:`q = \text{softmax}_{j \ne y}(z)`, for student S and teacher T:

    .. math::
        l = \tau^2 \left( \alpha\, KL(\text{Bernoulli}(b^T) \| \text{Bernoulli}(b^S)) + \beta\, KL(q^T \| q^S) \right)

    The decoupling is DKD's (Zhao et al., CVPR 2022, arXiv 2203.08679), applied to every pixel.

    Args:
        student_logits: (N, K) or (N, K, *spatial), K >= 2; float16, bfloat16, float32 or float64, any strides.
        teacher_logits: the same N, K and number of dimensions; may differ in dtype and strides. Never gets a gradient.
        target: (N, *spatial) labels in [0, K) or `ignore_index`; uint8, int8, int16, int32 or int64. It sets the output
            resolution: (N, K, H, W) logits smaller than it are upsampled (bilinear). None: every pixel counts, its
            label is the teacher's argmax, at the larger of the two resolutions.
        alpha: weight of the target term, >= 0. This and the next three are numbers (Python's or numpy's) or 0-d
            tensors: values that may change at every step, also under torch.compile, without compiling anew. One that
            lies on a GPU is never waited for; if it is not what is expected here, the loss is NaN.
        beta: weight of the non-target term, >= 0.
        temperature: tau, > 0, divides the logits.
        ignore_index: label of the pixels that contribute exactly nothing; None ignores none. With more than 255 classes
            it has to be given, since the default is one of them.
        align_corners: how smaller logits are upsampled, as in `F.interpolate`.
        reduction: "mean" over the valid pixels, "sum", or "none" for the map (N, *spatial), 0 at ignored pixels.
        num_items: None, or what "mean" divides by in place of the number of valid pixels of this call: a number or a
            0-d tensor, > 0, that nobody waits for. With the valid pixels of all the micro-batches of a step, their
            gradients add up to those of one large batch; over ranks, whose gradients DDP averages, it is the valid
            pixels of all of them divided by the number of ranks. 0 is taken for 1: with no valid pixel anywhere the
            loss is 0.
        backend: "auto", "reference", "native" or "triton"; DSCT_KERNELS_BACKEND sets what "auto" means.

    Returns:
        The loss, float32 (float64 where an input is float64). Its gradient has the student's dtype. No valid pixel: 0.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what came and what was expected. A label
            outside [0, K) is a ValueError on CPU. On GPU, where looking would stall the stream, it makes the loss NaN;
            with DSCT_KERNELS_CHECK=1 it is the same ValueError.
        RuntimeError: the named backend cannot serve the call (it says why), or a second derivative is asked for.

    Example:
        >>> import torch
        >>> from dsct_kernels import tnkd_loss
        >>> student = torch.randn(2, 6, 64, 64, requires_grad=True)
        >>> teacher = torch.randn(2, 6, 64, 64)
        >>> target = torch.randint(0, 6, (2, 64, 64), dtype=torch.uint8)
        >>> loss = tnkd_loss(student, teacher, target)
        >>> loss.backward()
        >>> student.grad.shape
        torch.Size([2, 6, 64, 64])
    """
    objective = Objective(
        tckd_weight=weight("alpha", alpha),
        nckd_weight=weight("beta", beta),
        temperature=positive("temperature", temperature),
        ignore_index=label_value("ignore_index", ignore_index),
        reduction=checks.reduction(reduction),
        align_corners=align_corners,
    )
    items = checks.num_items(num_items, reduction)
    checks.logits(student_logits, teacher_logits, target)
    checks.ignore_index_is_no_class(ignore_index, student_logits.shape[1], target)
    return logit_loss(student_logits, teacher_logits, target, objective, backend, items)[0]


def logit_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target: Tensor | None,
    objective: Objective,
    backend: str,
    num_items: Number | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, parts) of everything that reads the logits at the labels' size: TNKD and cross-entropy, in one pass.

    All but the labels is checked already. Without a teacher TNKD is 0, that of the student and itself. num_items: what
    a mean is divided by, cross-entropy's weighted sum too.
    """
    if num_items is not None:
        items = values.divisor(num_items, student_logits.device)
        half = student_logits.dtype == torch.float16  # whose gradient is scaled afterwards anyway, and has no digits
        summed = objective._replace(reduction=SUM) if half else objective.divided_by(items)
        loss, parts = logit_loss(student_logits, teacher_logits, target, summed, backend)
        return (loss / items).to(loss.dtype) if half else loss, parts / items
    teacher = None if teacher_logits is None else teacher_logits.detach()
    serving = backends.choose(backend, BACKENDS, student_logits, *[] if teacher is None else [teacher])
    ignored = objective.ignore_index
    if target is not None and not isinstance(ignored, Tensor) and serving.name != "native" and values.readable(target):
        checks.labels(target, student_logits.shape[1], ignored)  # the native CPU kernel looks at every label anyway
    elif target is not None and target.is_cuda and values.plain() and checks.label_checks_asked_for():
        checks.labels(target, student_logits.shape[1], ignored)
    return serving.tnkd(student_logits, teacher, target, objective)


class PixelLoss(LossModule):
    """What TNKDLoss and KDLoss share: how they are called."""

    function: ClassVar[Callable[..., Tensor]]

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None = None,
        *,
        num_items: Number | None = None,
    ) -> Tensor:
        """The loss; shapes, and num_items, which changes at every step, as for the function."""
        loss: Tensor = type(self).function(
            student_logits, teacher_logits, target, num_items=num_items, **self.keywords()
        )
        return loss

    if TYPE_CHECKING:
        __call__ = forward


class TNKDLoss(PixelLoss):
    """`tnkd_loss` as a module: the keywords are given once.

    Example:
        >>> import torch
        >>> from dsct_kernels import TNKDLoss
        >>> criterion = TNKDLoss(temperature=4.0, ignore_index=0)
        >>> criterion(torch.randn(2, 6, 8, 8), torch.randn(2, 6, 8, 8), torch.randint(0, 6, (2, 8, 8))).shape
        torch.Size([])
    """

    function = staticmethod(tnkd_loss)

    @keywords_of(tnkd_loss)
    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
