"""The loop: one network, trained with the DSCT loss if it has a teacher, else with cross-entropy."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from . import data, models
from .config import Arm
from .engine import Training
from .log import PARTS
from .objective import cross_entropy, distillation, schedule
from .teacher import Teacher

if TYPE_CHECKING:
    from .run import Run


class Interrupted(Exception):
    """Ctrl-C came and the checkpoint is written."""


def train(run: "Run", arm: Arm, model: nn.Module, teacher: nn.Module | None) -> nn.Module:
    """`model` trained as `arm` says, from where its checkpoint is, if there is one."""
    cfg, acc = run.cfg, run.accelerator
    steps, top_lr, seed = run.budget(arm)
    crops = data.Crops(
        run.train_pixels, cfg.crop, cfg.batch, seed, cfg.scale_jitter, cfg.colour_jitter, acc.process_index
    )
    teaching = Teacher.of(run, arm.loss, teacher, model) if teacher is not None else None
    training = Training(cfg, acc, model, top_lr)
    start, sums = run.restore(arm, training)  # sums: of the parts of the loss, and how many steps they are of
    training.model.train()

    for step, crop in enumerate(crops.loader(start, steps), start):
        images, target = data.images(to_device(crop, acc.device), run.normalisation.maximum)
        with acc.autocast():
            student_out = models.forward(training.model, images, teaching.asks if teaching else ())
        if teaching is not None:
            teacher_out = teaching(images)
            losses: tuple[torch.Tensor, ...] = distillation(student_out, teacher_out, target, arm.loss, cfg.backend)
        else:
            losses = (cross_entropy(student_out, target, cfg.backend),)
        lr = top_lr * schedule(step, steps)
        training.step(losses[0], lr)

        sums[: len(losses)] += torch.stack([part.detach().float() for part in losses])
        sums[-1] += 1
        done = step + 1
        if done % cfg.log_every == 0 or done == steps:
            run.log.losses(arm, done, steps, (sums[:-1] / sums[-1]).tolist(), lr)
            sums.zero_()
        if cfg.eval_every and done % cfg.eval_every == 0 and done < steps:
            run.log.record(arm.phase, done, {"miou": run.scores(training.plain())["miou"]})
            training.model.train()
        stop = run.should_stop()
        if done < steps and (stop or done % cfg.checkpoint_every == 0):
            run.save(arm, done, training, sums)
        if stop:
            run.log.close()
            raise Interrupted
    if teaching is not None:
        run.teacher_cost = teaching.close()
    return training.finished()


def no_sums(device: torch.device) -> torch.Tensor:
    return torch.zeros(len(PARTS) + 1, device=device)


def to_device(batch: tuple[torch.Tensor, ...], device: torch.device) -> tuple[torch.Tensor, ...]:
    return tuple(part.to(device, non_blocking=True) for part in batch)
