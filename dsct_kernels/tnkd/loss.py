"""TNKD, target / non-target knowledge distillation of logits, per pixel: the public function and its module."""

import torch
from torch import Tensor, nn

from .. import backends, checks
from . import native, reference, triton
from .upsample import upsample


def tnkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 2.0,
    temperature: float = 2.0,
    ignore_index: int | None = 255,
    reduction: str = "mean",
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
            resolution: (N, K, H, W) logits smaller than it are upsampled (bilinear, align_corners=False). None: every
            pixel counts, its label is the teacher's argmax, at the larger of the two resolutions.
        alpha: weight of the target term, >= 0.
        beta: weight of the non-target term, >= 0.
        temperature: tau, > 0, divides the logits. Under torch.compile a changed value compiles anew.
        ignore_index: label of the pixels that contribute exactly nothing; None ignores none.
        reduction: "mean" over the valid pixels, "sum", or "none" for the map (N, *spatial), 0 at ignored pixels.
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
    checks.weight("alpha", alpha)
    checks.weight("beta", beta)
    return logit_loss(
        student_logits,
        teacher_logits,
        target,
        None,
        0.0,
        alpha,
        beta,
        temperature,
        ignore_index,
        reduction,
        False,
        backend,
    )[0]


def logit_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    class_weight: Tensor | None,
    ce_weight: float,
    tckd_weight: float,
    nckd_weight: float,
    temperature: float,
    ignore_index: int | None,
    reduction: str,
    with_ce: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(loss, parts) of everything that reads the logits: TNKD and, with_ce, cross-entropy, in one pass."""
    checks.positive("temperature", temperature)
    checks.ignore_index(ignore_index)
    reduce = checks.reduction(reduction)
    size = checks.logits(student_logits, teacher_logits, target)
    module = backends.choose(backend, reference, native, triton, student_logits)
    if target is not None and not torch.compiler.is_compiling() and not backends.transforming():
        # The native CPU kernel looks at every label anyway, and raises the same error.
        on_cpu = student_logits.device.type == "cpu"
        if (on_cpu and module is not native) or (not on_cpu and checks.label_checks_asked_for()):
            checks.labels(target, student_logits.shape[1], ignore_index)
    return module.tnkd(
        upsample(student_logits, size),
        upsample(teacher_logits.detach(), size),
        target,
        class_weight,
        ce_weight,
        tckd_weight,
        nckd_weight,
        temperature,
        ignore_index,
        reduce,
        with_ce,
    )


class TNKDLoss(nn.Module):
    """`tnkd_loss` as a module: the keywords are given once.

    Example:
        >>> import torch
        >>> from dsct_kernels import TNKDLoss
        >>> criterion = TNKDLoss(temperature=4.0, ignore_index=0)
        >>> criterion(torch.randn(2, 6, 8, 8), torch.randn(2, 6, 8, 8), torch.randint(0, 6, (2, 8, 8))).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 2.0,
        temperature: float = 2.0,
        ignore_index: int | None = 255,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        checks.weight("alpha", alpha)
        checks.weight("beta", beta)
        checks.positive("temperature", temperature)
        checks.ignore_index(ignore_index)
        checks.reduction(reduction)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        self.ignore_index, self.reduction, self.backend = ignore_index, reduction, backend

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        """The loss; shapes as for `tnkd_loss`."""
        return tnkd_loss(
            student_logits,
            teacher_logits,
            target,
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha}, beta={self.beta}, temperature={self.temperature}, ignore_index={self.ignore_index}, "
            f"reduction={self.reduction!r}, backend={self.backend!r}"
        )
