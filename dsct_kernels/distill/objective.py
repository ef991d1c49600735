"""What is minimised: `dsct_loss` with a run's settings, exactly averaged over a step; and how rates and weights go."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dsct_kernels import DSCTLosses, dsct_loss

from . import data, models
from .config import Config, Loss

UNTAUGHT = Loss(matched_weight=0.0, jaccard_weight=0.0)


def cross_entropy(
    student: models.Output, target: torch.Tensor, backend: str, items: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean over the labelled pixels, 0 without any: `dsct_loss` less all that a teacher has a part in. It reads smaller
    logits as they are, where F.cross_entropy would have them upsampled."""
    return distillation(student, student, target, UNTAUGHT, backend, items).total


def distillation(
    student: models.Output,
    teacher: models.Output,
    target: torch.Tensor,
    loss: Loss,
    backend: str,
    items: torch.Tensor | None = None,
) -> DSCTLosses:
    """`items`: see `labelled_pixels`; None: the labelled pixels of this batch."""
    keywords = {name: value for name, value in asdict(loss).items() if name not in ("strides", "taps")}
    return dsct_loss(
        student.logits,
        teacher.logits,
        target,
        student.features or None,
        teacher.features or None,
        **keywords,
        ignore_index=data.IGNORE,
        num_items=items,
        backend=backend,
    )


@dataclass
class Lesson:
    """Crops that a step learns from: with labels; or without, for the teacher to label, where every target is 0."""

    images: torch.Tensor
    target: torch.Tensor
    items: torch.Tensor | None  # see `labelled_pixels`

    @staticmethod
    def of(acc: Any, crops: tuple[torch.Tensor, ...], maximum: float, cfg: Config) -> "Lesson":
        images, target = data.images(crops, maximum)
        return Lesson(images, target, labelled_pixels(acc, target, cfg.accumulate))

    def batches(self, size: int) -> Iterator["Lesson"]:
        for images, target in zip(self.images.split(size), self.target.split(size), strict=True):
            yield Lesson(images, target, self.items)


def distilled(
    student: models.Output, teacher: models.Output, lessons: Sequence[Lesson], loss: Loss, cfg: Config
) -> tuple[torch.Tensor, ...]:
    """`distillation` of labelled crops, and of unlabelled ones, if any went through both networks behind them: the
    total is of both, its parts are of the labelled."""
    with_labels, *without = lessons
    n = len(with_labels.images)
    both = student.part(0, n), teacher.part(0, n)
    found = distillation(*both, with_labels.target, loss, cfg.backend, with_labels.items)
    if not without:
        return tuple(found)
    both = student.part(n, None), teacher.part(n, None)
    target = data.pseudo_labels(without[0].target, both[1].logits)
    more = distillation(*both, target, loss, cfg.backend, without[0].items)
    return found.total + cfg.unlabelled_weight * more.total, *found[1:]


def labelled_pixels(acc: Any, target: torch.Tensor, batches: int) -> torch.Tensor | None:
    """Labelled pixels per batch of a step, on average over all batches of all processes; None where there is one.

    target (N, H, W) is this process's part of the step, in `batches` equal batches. A sum over a batch's pixels that is
    divided by this number is, averaged over all batches, the mean over all labelled pixels of the step. Means over
    samples need nothing of the kind, since all batches have as many samples.
    """
    everywhere = batches * acc.num_processes
    if everywhere == 1:
        return None
    return (acc.reduce((target != data.IGNORE).sum(), "sum").clamp(min=1).double() / everywhere).float()


def schedule(step: int, steps: int, kind: str = "cosine", power: float = 0.9) -> float:
    """Factor of the learning rate: linear warm-up over the first 5%, then a cosine down to 1%, or (1 - t)^power."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    t = (step - warm) / max(1, steps - warm)
    return (1 - t) ** power if kind == "poly" else 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * t))


def taught(step: int, steps: int, warmup: float) -> float:
    """Factor of all that is learnt from the teacher: rises linearly over the first `warmup` of the steps."""
    return min(1.0, (step + 1) / max(1.0, warmup * steps))
