"""The loop: one network, trained with the DSCT loss if it has a teacher, else with cross-entropy."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from . import data, models
from .config import Arm
from .engine import Training
from .log import PARTS
from .objective import Lesson, cross_entropy, distilled, schedule, taught
from .teacher import Teacher

if TYPE_CHECKING:
    from .run import Run


class Interrupted(Exception):
    """Ctrl-C came and the checkpoint is written."""


def train(run: "Run", arm: Arm, model: nn.Module, teacher: nn.Module | None) -> nn.Module:
    """`model` trained as `arm` says, from where its checkpoint is, if there is one."""
    cfg, acc = run.cfg, run.accelerator
    steps, top_lr, seed = cfg.budget(arm)
    size, jitter = cfg.batch * cfg.accumulate, (cfg.scale_jitter, cfg.colour_jitter)
    where = (acc.process_index, acc.num_processes)
    sources = [run.train_pixels, *([run.unlabelled] if run.unlabelled and teacher is not None else [])]
    crops = [data.Crops(one, cfg.crop, size, seed, *jitter, *where, stream=k) for k, one in enumerate(sources)]
    teaching = Teacher.of(run, arm.loss, teacher, model) if teacher is not None else None
    training = Training(cfg, acc, model, top_lr)
    start, sums = run.restore(arm, training)  # sums: of the parts of the loss, and how many steps they are of
    training.model.train()

    for step, found in enumerate(zip(*(one.loader(start, steps) for one in crops), strict=True), start):
        lessons = [Lesson.of(acc, to_device(one, acc.device), run.normalisation.maximum, cfg) for one in found]
        lr = top_lr * schedule(step, steps, cfg.schedule, cfg.power)
        loss = arm.loss.warmed(taught(step, steps, cfg.distill_warmup))
        parts = torch.zeros(len(PARTS), device=acc.device)
        for batches in zip(*(one.batches(cfg.batch) for one in lessons), strict=True):
            images = torch.cat([one.images for one in batches])
            with acc.accumulate(training.model):
                with acc.autocast():
                    student_out = models.forward(training.model, images, teaching.asks if teaching else ())
                if teaching is not None:
                    losses = tuple(distilled(student_out, teaching(images), batches, loss, cfg))
                else:
                    losses = (cross_entropy(student_out, batches[0].target, cfg.backend, batches[0].items),)
                training.step(losses[0], lr)
                parts[: len(losses)] += torch.stack([part.detach().float() for part in losses])

        done = step + 1
        sums[:-1] += acc.reduce(parts / cfg.accumulate, "mean")
        sums[-1] += 1
        if done % cfg.log_every == 0 or done == steps:
            run.log.losses(arm, done, steps, (sums[:-1] / sums[-1]).tolist(), lr)
            sums.zero_()
        if cfg.eval_every and done % cfg.eval_every == 0 and done < steps:
            run.look(arm, done, training.plain())
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
