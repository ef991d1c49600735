"""Soft Jaccard: the intersection over union of the student's and the teacher's probabilities, and its module."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import backends
from ..module import LossModule, keywords_of
from ..pool import overlaid
from ..values import DEFAULT_IGNORE_INDEX, IgnoreIndex, Number, Temperature, positive
from . import native, reference, triton


@dataclass(frozen=True)
class JaccardBackend(backends.Backend):
    jaccard: Callable[[Tensor, Tensor, Tensor | None, Number], Tensor]


BACKENDS = (
    JaccardBackend("reference", backends.always, reference.jaccard),
    JaccardBackend("native", native.why_not, native.jaccard),
    JaccardBackend("triton", triton.why_not, triton.jaccard),
)


def jaccard_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: Temperature = 1.0,
    ignore_index: IgnoreIndex = DEFAULT_IGNORE_INDEX,
    backend: str = "auto",
) -> Tensor:
    r"""One minus the soft intersection over union of what student and teacher see, over the whole batch.

    With :math:`p = \text{softmax}_c(z^S / \tau)`, :math:`q = \text{softmax}_c(z^T / \tau)` and :math:`v_i` in [0, 1],
    how much of cell i is labelled, over all samples and positions i, per class c:

    .. math::
        S_c = \sum_i v_i (p_{c,i} + q_{c,i}), \quad D_c = \sum_i v_i |p_{c,i} - q_{c,i}|, \quad
        l = \text{mean}_{c : \sum_i v_i q_{c,i} > 1/2} \left( 1 - \frac{S_c - D_c}{S_c + D_c} \right)

    the mean over the classes of which the teacher sees more than half a cell. After the Jaccard metric losses (Wang et
    al., NeurIPS 2023, arXiv 2302.05666), with the teacher's probabilities as the soft labels.

    Args:
        student_logits: (N, K) or (N, K, *spatial), K >= 2; float16, bfloat16, float32 or float64, any strides.
        teacher_logits: the same N, K and number of dimensions; may differ in dtype and strides, and (N, K, H, W) in
            size: the larger is averaged down (adaptively, by what is not ignored) to the smaller H and the smaller
            W. Never gets a gradient.
        target: (N, *spatial) labels, uint8, int8, int16, int32 or int64; (N, H', W') of the logits' size or larger.
            It only says what is ignored: a cell of the logits counts by the share of its labels that are not
            `ignore_index`, and with none of them contributes exactly nothing. None: every cell counts.
        temperature: tau, > 0, divides the logits. This and the next are numbers (Python's or numpy's) or 0-d tensors:
            values that may change at every step, also under torch.compile, without compiling anew.
        ignore_index: label of the pixels that do not count; None ignores none. With more than 255 classes it has to be
            given where there is a target, since the default is one of them.
        backend: "auto", "reference", "native" (CPU) or "triton" (GPUs, up to 1024 classes); DSCT_KERNELS_BACKEND sets
            what "auto" means.

    Returns:
        The loss, (), float32 (float64 where an input is float64), in [0, 1]. Its gradient has the student's dtype.
        Nothing labelled, or no class there: 0. NaN where a cell that counts holds NaN or +inf, or -inf alone.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what came and what was expected.
        RuntimeError: the named backend cannot serve the call (it says why), or a second derivative is asked for.

    Example:
        >>> import torch
        >>> from dsct_kernels import jaccard_loss
        >>> student = torch.randn(2, 6, 32, 32, requires_grad=True)
        >>> teacher = torch.randn(2, 6, 16, 16)
        >>> target = torch.randint(0, 6, (2, 128, 128), dtype=torch.uint8)
        >>> loss = jaccard_loss(student, teacher, target)
        >>> loss.backward()
        >>> student.grad.shape
        torch.Size([2, 6, 32, 32])
    """
    temperature = positive("temperature", temperature)
    return of_maps(*overlaid(student_logits, teacher_logits, target, ignore_index, backend), temperature, backend)


def of_maps(student: Tensor, teacher: Tensor, share: Tensor | None, temperature: Number, backend: str) -> Tensor:
    """The loss of what `overlaid` returns; the temperature is checked already."""
    return backends.choose(backend, BACKENDS, student, teacher).jaccard(student, teacher, share, temperature)


class JaccardLoss(LossModule):
    """`jaccard_loss` as a module: the keywords are given once.

    Example:
        >>> import torch
        >>> from dsct_kernels import JaccardLoss
        >>> criterion = JaccardLoss(ignore_index=0)
        >>> criterion(torch.randn(2, 6, 8, 8), torch.randn(2, 6, 8, 8), torch.randint(0, 6, (2, 32, 32))).shape
        torch.Size([])
    """

    @keywords_of(jaccard_loss)
    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        """The loss; shapes as for `jaccard_loss`."""
        return jaccard_loss(student_logits, teacher_logits, target, **self.keywords())

    if TYPE_CHECKING:
        __call__ = forward
