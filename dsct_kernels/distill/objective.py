"""What is minimised: `dsct_loss` with a run's settings, and how the learning rate goes."""

import math
from dataclasses import asdict

import torch

from dsct_kernels import DSCTLosses, dsct_loss

from . import data, models
from .config import Loss

UNTAUGHT = Loss(matched_weight=0.0, jaccard_weight=0.0)


def cross_entropy(student: models.Output, target: torch.Tensor, backend: str) -> torch.Tensor:
    """Mean over the labelled pixels, 0 without any: `dsct_loss` less all that a teacher has a part in. It reads smaller
    logits as they are, where F.cross_entropy would have them upsampled."""
    return distillation(student, student, target, UNTAUGHT, backend).total


def distillation(
    student: models.Output, teacher: models.Output, target: torch.Tensor, loss: Loss, backend: str
) -> DSCTLosses:
    keywords = {name: value for name, value in asdict(loss).items() if name not in ("strides", "taps")}
    return dsct_loss(
        student.logits,
        teacher.logits,
        target,
        student.features or None,
        teacher.features or None,
        **keywords,
        ignore_index=data.IGNORE,
        backend=backend,
    )


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over the first 5%, then a cosine down to 1%."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
