"""The soft Jaccard loss in plain PyTorch: the formula as written, and the truth that every kernel is checked against.

Autograd differentiates it; the kernels use the closed form of docs/derivations.md.
"""

import torch
from torch import Tensor

from .. import values
from ..dtypes import acc_dtype
from ..values import Number


def jaccard(student_logits: Tensor, teacher_logits: Tensor, share: Tensor | None, temperature: Number) -> Tensor:
    """The loss of two maps of one shape, differentiable in the student. share: (N, *spatial), how much of each position
    counts; None: all of it."""
    acc = acc_dtype(student_logits, teacher_logits)
    student, teacher = student_logits.to(acc), teacher_logits.detach().to(acc)
    (number,) = values.as_scalars((temperature,), student.device, acc)
    temperature = values.sound(number, positive=True)
    if share is not None:  # whatever stands where nothing counts, NaN and inf too, must not reach the arithmetic
        v = share.to(acc).unsqueeze(1)
        student, teacher = torch.where(v == 0, 0, student), torch.where(v == 0, 0, teacher)
    p, q = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
    if share is not None:
        p, q = p * v, q * v
    pixels = [d for d in range(student.dim()) if d != 1]
    both, apart = (p + q).sum(pixels), (p - q).abs().sum(pixels)
    there = q.sum(pixels) > 0.5
    # 1 - (both - apart) / (both + apart), in the form that keeps its digits where it is small
    per_class = torch.where(there, 2 * apart / torch.where(there, both + apart, 1), 0)
    loss = per_class.sum() / there.sum().clamp(min=1)
    # Never hidden, also in a class that does not count.
    return loss * torch.where((both + apart).isnan().any(), torch.nan, 1.0).to(acc)
