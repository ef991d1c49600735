"""One run of a comparison: the teacher of a fold, what it says of the crops of a seed, and a student's training."""

import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import adapter, data, models
from .config import Config
from .data import classes_of, load_pixels
from .datasets import identity
from .engine import device_of, seed_everything
from .evaluate import predicted
from .methods import Objective, method
from .objective import schedule

FOLDS = 3


@dataclass(frozen=True)
class Job:
    """One run and all it depends on. `cfg` holds the data, the sizes and the budget."""

    cfg: Config
    method: str
    strides: tuple[int, ...]
    out: Path = field(compare=False)
    labelled: float = 1.0  # share of the training tiles' images whose labels are known; the teacher sees no others

    def settings(self) -> dict[str, Any]:
        kept = ("data", "val_tiles", "teacher", "student", "seed", "teacher_seed", "crop", "batch", "teacher_steps",
                "student_steps", "teacher_lr", "student_lr", "weight_decay", "scale_jitter", "colour_jitter", "scenes",
                "scene_size", "downscale", "window", "precision")  # fmt: skip
        values = {**{k: v for k, v in asdict(self.cfg).items() if k in kept}, **identity(self.cfg)}
        parsed = method(self.method)
        if not parsed.teacher:
            values = {k: v for k, v in values.items() if not k.startswith("teacher")}
        values.update(self.of_labels())
        if parsed.unlabelled:
            values["unlabelled"] = parsed.unlabelled
        return {**values, "balance": parsed.balance, "parts": [asdict(part) for part in parsed.parts],
                "strides": self.strides if parsed.features else None}  # fmt: skip

    def of_labels(self) -> dict[str, float]:
        """Nothing where all labels are known, so that runs from before there was a share are known again."""
        return {"labelled": self.labelled} if self.labelled < 1 else {}

    @property
    def key(self) -> str:
        return digest(self.settings())

    @property
    def teacher_key(self) -> str:
        kept = ("data", "val_tiles", "teacher", "teacher_seed", "crop", "batch", "teacher_steps", "teacher_lr",
                "downscale", "weight_decay", "scale_jitter", "colour_jitter", "scenes", "scene_size",
                "precision")  # fmt: skip
        values = {k: v for k, v in asdict(self.cfg).items() if k in kept}
        return digest({**values, **identity(self.cfg), **self.of_labels()})

    @property
    def teacher_file(self) -> Path:
        return self.out / "teachers" / f"{self.teacher_key}.pt"

    def answers_file(self, unlabelled: bool = False) -> Path:
        """What the teacher says of every crop of this seed, of images with labels or of those without."""
        kept = (self.teacher_key, self.cfg.seed, self.cfg.student_steps, *self.strides)
        return self.out / "answers" / ("-".join(map(str, kept)) + ("-unlabelled" if unlabelled else "") + ".pt")

    def answers_files(self) -> list[Path]:
        """Those that the method learns from."""
        parsed = method(self.method)
        return [self.answers_file(which) for which in (False, True)[: parsed.teacher + bool(parsed.unlabelled)]]


def digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


@lru_cache(maxsize=FOLDS)
def pixels_of(cfg: Config, labelled: float) -> tuple[data.Pixels, data.Pixels, data.Pixels | None]:
    train, val = load_pixels(cfg, torch.device("cpu"))
    if labelled == 1:
        return train, val, None
    known, unknown = data.share(train.tiles, labelled)
    return (
        data.Pixels(known, cfg.cache_mb, normalisation=train.normalisation),
        val,
        data.Pixels(unknown, cfg.cache_mb, normalisation=train.normalisation),
    )


def pixels(job: Job) -> tuple[data.Pixels, data.Pixels, data.Pixels | None]:
    """Training tiles, validation tiles, and the training tiles whose labels are not known, if there are any."""
    kept = ("data", "root", "val_tiles", "bands", "labels", "cache_mb", "scenes", "scene_size", "downscale")
    return pixels_of(replace(Config(), **{name: getattr(job.cfg, name) for name in kept}), job.labelled)


STRIP = 1024  # rows of a tile that are looked at together


def frequency(train: data.Pixels, classes: int) -> torch.Tensor:
    counts = torch.zeros(classes)
    for i, tile in enumerate(train.tiles):
        here = torch.zeros(classes, dtype=torch.long)
        for y in range(0, tile.height, STRIP):
            labels = data.labels(train.window(i, y, 0, STRIP, tile.width)).flatten()
            here += torch.bincount(labels[labels != data.IGNORE], minlength=classes)
        counts += here
    return counts / counts.sum()


def build(
    name: str, classes: tuple[str, ...], device: torch.device, normalisation: models.Normalisation = models.IMAGENET
) -> nn.Module:
    """A network with fresh weights, or one from a folder, its logits as its head makes them; channels_last: faster.

    `package.module:function` calls the function with the number of classes; any module may come of it (see adapter).
    """
    network: Any
    bands = len(normalisation.mean)
    if bands != 3 and (name == "efficientnet-lite0" or ":" in name):
        raise ValueError(f"{name} reads images of 3 bands, but those of the data have {bands}; see --bands")
    if name == "efficientnet-lite0":
        network = adapter.efficientnet_fpn(len(classes))
    elif ":" in name:
        network = adapter.from_function(name, len(classes))
    else:
        network = models.build(name, classes, normalisation=normalisation)
        if type(network).__name__ == "UperNetForSemanticSegmentation":  # it upsamples what its head made
            mean, std = (network.get_buffer(n).flatten().tolist() for n in ("pixel_mean", "pixel_std"))
            network = adapter.Adapter(network, logits="decode_head", mean=mean, std=std)
    network = network.to(device).to(memory_format=torch.channels_last)
    return network


def inputs(
    batch: tuple[torch.Tensor, ...], train: data.Pixels, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, bands, H, W) in 0..1 with colour jitter, and labels (N, H, W) uint8."""
    return data.images(tuple(part.to(device, non_blocking=True) for part in batch), train.normalisation.maximum)


@dataclass
class Lessons:
    """The crops of a seed, batch by batch, and what the teacher says of each."""

    crops: data.Crops
    answer: Callable[[int], models.Output] | None = None
    weight: float = 1.0
    labelled: bool = True


def crops_of(cfg: Config, pixels: data.Pixels, seed: int, labelled: bool = True) -> data.Crops:
    """Those of unlabelled images are drawn with other random numbers."""
    return data.Crops(pixels, cfg.crop, cfg.batch, seed, cfg.scale_jitter, cfg.colour_jitter, stream=int(not labelled))


def loss_of(
    student: nn.Module,
    objective: Objective,
    lessons: list[Lessons],
    batches: tuple[tuple[torch.Tensor, ...], ...],
    step: int,
    done: float,
    strides: tuple[int, ...],
    device: torch.device,
) -> torch.Tensor:
    """One step's loss. All crops pass through the student together."""
    given = [inputs(batch, lesson.crops.pixels, device) for batch, lesson in zip(batches, lessons, strict=True)]
    out = models.forward(student, torch.cat([images for images, _ in given]), strides)
    total: torch.Tensor = torch.zeros((), device=device)
    first = 0
    for lesson, (images, target) in zip(lessons, given, strict=True):
        last = first + len(images)
        part = out.part(first, last)
        said = lesson.answer(step) if lesson.answer else None
        if not lesson.labelled and said is not None:
            target = data.pseudo_labels(target, said.logits)
        total = total + lesson.weight * objective(part, said, target, done)
        first = last
    return total


def fit(
    cfg: Config,
    student: nn.Module,
    objective: Objective,
    lessons: list[Lessons],
    steps: int,
    lr: float,
    strides: tuple[int, ...],
    device: torch.device,
) -> None:
    seed_everything(lessons[0].crops.seed)
    everything = [*student.parameters(), *objective.parameters()]
    lost = torch.zeros((), device=device)
    optimizer = torch.optim.AdamW(everything, lr=lr, weight_decay=cfg.weight_decay, foreach=True)
    student.train()
    loaders = zip(*(lesson.crops.loader(0, steps) for lesson in lessons), strict=True)
    for step, batches in enumerate(loaders):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, steps)
        loss = loss_of(student, objective, lessons, batches, step, step / steps, strides, device)
        lost += ~loss.detach().isfinite()
        loss.backward()
        nn.utils.clip_grad_norm_(everything, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if lost:
        raise FloatingPointError(f"the loss was not finite in {int(lost)} of {steps} steps")
    student.eval()


def train_teacher(job: Job) -> dict[str, Any]:
    cfg, device = job.cfg, device_of(job.cfg.device)
    classes, _ = classes_of(cfg)
    train, val, _ = pixels(job)
    seed_everything(cfg.teacher_seed)
    network = build(cfg.teacher, classes, device, train.normalisation)
    objective = Objective(method("alone"), frequency(train, len(classes)), models.Output(torch.empty(0), []), None).to(
        device
    )
    if not (Path(cfg.teacher) / "config.json").is_file():  # a folder holds a network that is ready
        lessons = [Lessons(crops_of(cfg, train, cfg.teacher_seed))]
        fit(cfg, network, objective, lessons, cfg.teacher_steps, cfg.teacher_lr, (), device)
    result = evaluate(cfg, network, val, len(classes), device)
    save_atomically(job.teacher_file, {"model": network.state_dict(), "result": result})
    return result


@torch.no_grad()
def ask_teacher(job: Job) -> None:
    """Logits and features of the teacher for every crop of this seed, in half precision."""
    cfg, device = job.cfg, device_of(job.cfg.device)
    classes, _ = classes_of(cfg)
    train, _, unlabelled = pixels(job)
    network = build(cfg.teacher, classes, device, train.normalisation)
    network.load_state_dict(torch.load(job.teacher_file, weights_only=True)["model"])
    network.eval()
    for path, source, labelled in zip(job.answers_files(), (train, unlabelled), (True, False)):
        if source is None or path.is_file():
            continue
        logits: list[torch.Tensor] = []
        features: list[list[torch.Tensor]] = [[] for _ in job.strides]
        for batch in crops_of(cfg, source, cfg.seed, labelled).loader(0, cfg.student_steps):
            images, _ = inputs(batch, source, device)
            out = models.forward(network, images, job.strides)
            logits.append(out.logits.half().cpu())
            for kept, maps in zip(features, out.features, strict=True):
                kept.append(maps.half().cpu())
        save_atomically(
            path,
            {
                "logits": torch.stack(logits),
                "strides": job.strides,
                "features": [torch.stack(maps) for maps in features],
            },
        )


def save_atomically(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(content, temporary)
    os.replace(temporary, path)


def answers(path: Path, features: bool, device: torch.device) -> Callable[[int], models.Output]:
    kept = torch.load(path, weights_only=True, mmap=True)

    def of(step: int) -> models.Output:
        maps = [each[step].to(device).float() for each in kept["features"]] if features else []
        return models.Output(kept["logits"][step].to(device).float(), maps)

    return of


def run(job: Job) -> dict[str, Any]:
    """One student: train with the method, evaluate on the held-out tiles."""
    cfg, device = job.cfg, device_of(job.cfg.device)
    chosen = method(job.method)
    classes, _ = classes_of(cfg)
    train, val, unlabelled = pixels(job)
    seed_everything(cfg.seed)
    student = build(cfg.student, classes, device, train.normalisation)
    strides = job.strides if chosen.features else ()
    said = [answers(path, chosen.features, device) for path in job.answers_files()]
    lessons = [Lessons(crops_of(cfg, train, cfg.seed), said[0] if said else None)]
    if chosen.unlabelled and unlabelled is not None:
        lessons.append(Lessons(crops_of(cfg, unlabelled, cfg.seed, False), said[1], chosen.unlabelled, False))
    with torch.no_grad():
        probe = models.forward(
            student.eval(), torch.zeros(1, train.channels - 1, cfg.crop, cfg.crop, device=device), strides
        )
    objective = Objective(chosen, frequency(train, len(classes)), probe, said[0](0) if said else None).to(device)
    kept_mb = memory(student, objective, lessons, strides, device)
    started = time.perf_counter()
    fit(cfg, student, objective, lessons, cfg.student_steps, cfg.student_lr, strides, device)
    seconds = time.perf_counter() - started
    result = evaluate(cfg, student, val, len(classes), device)
    return {**result, "ms_per_step": round(1000 * seconds / cfg.student_steps, 1), "kept_mb": kept_mb}


def memory(
    student: nn.Module,
    objective: Objective,
    lessons: list[Lessons],
    strides: tuple[int, ...],
    device: torch.device,
) -> float:
    """MiB that one step keeps for its backward pass, each storage counted once. Leaves the student as it was."""
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    network = copy.deepcopy(student).train()
    batches = tuple(lesson.crops[0] for lesson in lessons)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(network, objective, lessons, batches, 0, 0.0, strides, device)
    return round(sum(storages.values()) / 2**20, 1)


@torch.no_grad()
def evaluate(cfg: Config, network: nn.Module, val: data.Pixels, classes: int, device: torch.device) -> dict[str, Any]:
    """IoU over whole held-out tiles: windows overlap by a quarter and their probabilities are averaged."""
    matrix = torch.zeros(classes, classes, dtype=torch.float64)
    network.eval()

    def logits(image: torch.Tensor) -> torch.Tensor:
        return models.forward(network, image).logits

    for i in range(len(val.tiles)):
        for y, found in predicted(val, i, cfg.window, classes, device, logits):
            label = data.labels(val.window(i, y, 0, *found.shape)).long().flatten()
            known = label != data.IGNORE
            pairs = label[known] * classes + found.cpu().flatten()[known]
            matrix += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    hit = matrix.diag()
    iou = hit / (matrix.sum(0) + matrix.sum(1) - hit)  # NaN for a class that is nowhere
    return {
        "miou": round(float(iou.nanmean()), 5),
        "iou": [None if math.isnan(v) else round(v, 5) for v in iou.tolist()],
        "accuracy": round(float(hit.sum() / matrix.sum()), 5),
    }
