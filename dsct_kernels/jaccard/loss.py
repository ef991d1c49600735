"""Soft Jaccard: the intersection over union of the student's and the teacher's probabilities, and its module."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, checks
from ..autograd import LIBRARY
from ..values import DEFAULT_IGNORE_INDEX, Number, ValueModule, label_value, positive
from . import native, reference


def jaccard_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: Number = 1.0,
    ignore_index: int | Tensor | None = DEFAULT_IGNORE_INDEX,
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
            size: the larger is averaged down (adaptively) to the smaller H and the smaller W. Never gets a gradient.
        target: (N, *spatial) labels, uint8, int8, int16, int32 or int64; (N, H', W') of the logits' size or larger.
            It only says what is ignored: a cell of the logits counts by the share of its labels that are not
            `ignore_index`, and with none of them contributes exactly nothing. None: every cell counts.
        temperature: tau, > 0, divides the logits. This and the next are numbers (Python's or numpy's) or 0-d tensors:
            values that may change at every step, also under torch.compile, without compiling anew.
        ignore_index: label of the pixels that do not count; None ignores none. With more than 255 classes it has to be
            given where there is a target, since the default is one of them.
        backend: "auto", "reference" or "native" (CPU); DSCT_KERNELS_BACKEND sets what "auto" means.

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
    ignored = label_value("ignore_index", ignore_index)
    size = checks.overlaid(student_logits, teacher_logits, target)
    checks.ignore_index_is_no_class(ignore_index, student_logits.shape[1], target)
    module = backends.choose(backend, reference, native, None, student_logits, teacher_logits)
    acc = torch.float64 if torch.float64 in (student_logits.dtype, teacher_logits.dtype) else torch.float32
    share = None if target is None or ignored is None else labelled(target, ignored, size, acc)
    student, teacher = averaged(student_logits, size, acc), averaged(teacher_logits.detach(), size, acc)
    return module.jaccard(student, teacher, share, temperature)


def labelled(target: Tensor, ignored: int | Tensor, size: list[int], dtype: torch.dtype) -> Tensor:
    """(N, *size): the share of each cell's labels that are not ignored, contiguous."""
    limits = torch.iinfo(target.dtype)
    if torch.compiler.is_compiling() or isinstance(ignored, Tensor) or not limits.min <= ignored <= limits.max:
        target = target.long()  # an int8 tensor compared with the number 255 would find it equal to -1
    share = (target != ignored).to(dtype).contiguous()
    if list(share.shape[1:]) == size:
        return share
    return averaged(share.unsqueeze(1), size, dtype).squeeze(1)


def averaged(maps: Tensor, size: list[int], dtype: torch.dtype) -> Tensor:
    """(N, K, *size): as they are where they have that size, else adaptive averages in `dtype`."""
    if list(maps.shape[2:]) == size:
        return maps
    height, width = size
    if (
        torch.compiler.is_compiling()
    ):  # one op for any sizes: Inductor cannot lower torch's for sizes that it sees change
        compiled: Tensor = torch.ops.dsct_kernels.average(maps.to(dtype), height, width)
        return compiled
    return F.adaptive_avg_pool2d(maps.to(dtype), (height, width))


LIBRARY.define("average(Tensor maps, SymInt height, SymInt width) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define("average_backward(Tensor grad, SymInt height, SymInt width) -> Tensor",
               tags=(torch.Tag.pt2_compliant_tag,))  # fmt: skip


@torch.library.impl(LIBRARY, "average", "CompositeExplicitAutograd")
def _average(maps: Tensor, height: int, width: int) -> Tensor:
    return F.adaptive_avg_pool2d(maps.detach(), (height, width)).contiguous()


@torch.library.impl(LIBRARY, "average_backward", "CompositeExplicitAutograd")
def _average_backward(grad: Tensor, height: int, width: int) -> Tensor:
    maps = grad.new_empty([*grad.shape[:2], height, width])
    return torch.ops.aten._adaptive_avg_pool2d_backward(grad.contiguous(), maps).contiguous()


def _fake(x: Tensor, height: int, width: int) -> Tensor:
    return x.new_empty([*x.shape[:2], height, width])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.size = inputs[0].shape[-2:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    height, width = ctx.size
    return torch.ops.dsct_kernels.average_backward(grad, height, width), None, None


torch.library.register_fake("dsct_kernels::average", _fake, lib=LIBRARY)
torch.library.register_fake("dsct_kernels::average_backward", _fake, lib=LIBRARY)
torch.library.register_autograd("dsct_kernels::average", _backward, setup_context=_setup_context, lib=LIBRARY)


class JaccardLoss(ValueModule):
    """`jaccard_loss` as a module: the keywords are given once.

    Example:
        >>> import torch
        >>> from dsct_kernels import JaccardLoss
        >>> criterion = JaccardLoss(ignore_index=0)
        >>> criterion(torch.randn(2, 6, 8, 8), torch.randn(2, 6, 8, 8), torch.randint(0, 6, (2, 32, 32))).shape
        torch.Size([])
    """

    VALUES: ClassVar = {"temperature": positive, "ignore_index": label_value}

    def __init__(
        self,
        *,
        temperature: Number = 1.0,
        ignore_index: int | Tensor | None = DEFAULT_IGNORE_INDEX,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.temperature, self.ignore_index, self.backend = temperature, ignore_index, backend

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        """The loss; shapes as for `jaccard_loss`."""
        return jaccard_loss(student_logits, teacher_logits, target, **self.values(), backend=self.backend)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, ignore_index={self.ignore_index}, backend={self.backend!r}"
