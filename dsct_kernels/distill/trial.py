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
from .datasets import identity
from .loop import classes_of, load_pixels, predicted, schedule, seed_everything
from .methods import Objective, method

FOLDS = 3


@dataclass(frozen=True)
class Job:
    """One run and all it depends on. `cfg` holds the data, the sizes and the budget."""

    cfg: Config
    method: str
    strides: tuple[int, ...]
    out: Path = field(compare=False)

    def settings(self) -> dict[str, Any]:
        kept = ("data", "val_tiles", "teacher", "student", "seed", "teacher_seed", "crop", "batch", "teacher_steps",
                "student_steps", "teacher_lr", "student_lr", "weight_decay", "scale_jitter", "colour_jitter", "scenes",
                "scene_size", "downscale", "window", "precision")  # fmt: skip
        values = {**{k: v for k, v in asdict(self.cfg).items() if k in kept}, **identity(self.cfg)}
        parsed = method(self.method)
        if not parsed.teacher:
            values = {k: v for k, v in values.items() if not k.startswith("teacher")}
        return {**values, "balance": parsed.balance, "parts": [asdict(part) for part in parsed.parts],
                "strides": self.strides if parsed.features else None}  # fmt: skip

    @property
    def key(self) -> str:
        return digest(self.settings())

    @property
    def teacher_key(self) -> str:
        kept = ("data", "val_tiles", "teacher", "teacher_seed", "crop", "batch", "teacher_steps", "teacher_lr",
                "downscale", "weight_decay", "scale_jitter", "colour_jitter", "scenes", "scene_size",
                "precision")  # fmt: skip
        return digest({**{k: v for k, v in asdict(self.cfg).items() if k in kept}, **identity(self.cfg)})

    @property
    def teacher_file(self) -> Path:
        return self.out / "teachers" / f"{self.teacher_key}.pt"

    @property
    def answers_file(self) -> Path:
        """What the teacher says of every crop of this seed."""
        kept = (self.teacher_key, self.cfg.seed, self.cfg.student_steps, *self.strides)
        return self.out / "answers" / ("-".join(map(str, kept)) + ".pt")


def digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


@lru_cache(maxsize=FOLDS)
def pixels_of(cfg: Config) -> tuple[data.Pixels, data.Pixels]:
    return load_pixels(cfg, torch.device("cpu"))


def pixels(cfg: Config) -> tuple[data.Pixels, data.Pixels]:
    kept = ("data", "root", "val_tiles", "bands", "labels", "cache_mb", "scenes", "scene_size", "downscale")
    return pixels_of(replace(Config(), **{name: getattr(cfg, name) for name in kept}))


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


def device_of(cfg: Config) -> torch.device:
    cuda = torch.cuda.is_available() and cfg.device != "cpu"
    return torch.device("cuda" if cuda else "cpu")


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


def crops_of(cfg: Config, train: data.Pixels, seed: int) -> data.Crops:
    return data.Crops(train, cfg.crop, cfg.batch, seed, cfg.scale_jitter, cfg.colour_jitter)


def fit(
    cfg: Config,
    train: data.Pixels,
    student: nn.Module,
    objective: Objective,
    steps: int,
    lr: float,
    seed: int,
    strides: tuple[int, ...],
    answer: Callable[[int], models.Output] | None,
    device: torch.device,
) -> None:
    seed_everything(seed)
    everything = [*student.parameters(), *objective.parameters()]
    lost = torch.zeros((), device=device)
    optimizer = torch.optim.AdamW(everything, lr=lr, weight_decay=cfg.weight_decay, foreach=True)
    student.train()
    for step, batch in enumerate(crops_of(cfg, train, seed).loader(0, steps)):
        images, target = inputs(batch, train, device)
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, steps)
        out = models.forward(student, images, strides)
        loss = objective(out, answer(step) if answer else None, target, step / steps)
        lost += ~loss.detach().isfinite()
        loss.backward()
        nn.utils.clip_grad_norm_(everything, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if lost:
        raise FloatingPointError(f"the loss was not finite in {int(lost)} of {steps} steps")
    student.eval()


def train_teacher(job: Job) -> dict[str, Any]:
    cfg, device = job.cfg, device_of(job.cfg)
    classes, _ = classes_of(cfg)
    train, val = pixels(cfg)
    seed_everything(cfg.teacher_seed)
    network = build(cfg.teacher, classes, device, train.normalisation)
    objective = Objective(method("alone"), frequency(train, len(classes)), models.Output(torch.empty(0), []), None).to(
        device
    )
    if not (Path(cfg.teacher) / "config.json").is_file():  # a folder holds a network that is ready
        fit(cfg, train, network, objective, cfg.teacher_steps, cfg.teacher_lr, cfg.teacher_seed, (), None, device)
    result = evaluate(cfg, network, val, len(classes), device)
    save_atomically(job.teacher_file, {"model": network.state_dict(), "result": result})
    return result


@torch.no_grad()
def ask_teacher(job: Job) -> None:
    """Logits and features of the teacher for every crop of this seed, in half precision."""
    cfg, device = job.cfg, device_of(job.cfg)
    classes, _ = classes_of(cfg)
    train, _ = pixels(cfg)
    network = build(cfg.teacher, classes, device, train.normalisation)
    network.load_state_dict(torch.load(job.teacher_file, weights_only=True)["model"])
    network.eval()
    logits: list[torch.Tensor] = []
    features: list[list[torch.Tensor]] = [[] for _ in job.strides]
    for batch in crops_of(cfg, train, cfg.seed).loader(0, cfg.student_steps):
        images, _ = inputs(batch, train, device)
        out = models.forward(network, images, job.strides)
        logits.append(out.logits.half().cpu())
        for kept, maps in zip(features, out.features, strict=True):
            kept.append(maps.half().cpu())
    save_atomically(
        job.answers_file,
        {"logits": torch.stack(logits), "strides": job.strides, "features": [torch.stack(maps) for maps in features]},
    )


def save_atomically(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(content, temporary)
    os.replace(temporary, path)


def run(job: Job) -> dict[str, Any]:
    """One student: train with the method, evaluate on the held-out tiles."""
    cfg, device = job.cfg, device_of(job.cfg)
    chosen = method(job.method)
    classes, _ = classes_of(cfg)
    train, val = pixels(cfg)
    seed_everything(cfg.seed)
    student = build(cfg.student, classes, device, train.normalisation)
    strides = job.strides if chosen.features else ()
    answers: Callable[[int], models.Output] | None = None
    if chosen.teacher:
        kept = torch.load(job.answers_file, weights_only=True, mmap=True)

        def answers(step: int) -> models.Output:
            features = [maps[step].to(device).float() for maps in kept["features"]] if strides else []
            return models.Output(kept["logits"][step].to(device).float(), features)

    with torch.no_grad():
        probe = models.forward(
            student.eval(), torch.zeros(1, train.channels - 1, cfg.crop, cfg.crop, device=device), strides
        )
    objective = Objective(chosen, frequency(train, len(classes)), probe, answers(0) if answers else None).to(device)
    kept_mb = memory(cfg, train, student, objective, strides, answers, device)
    started = time.perf_counter()
    fit(cfg, train, student, objective, cfg.student_steps, cfg.student_lr, cfg.seed, strides, answers, device)
    seconds = time.perf_counter() - started
    result = evaluate(cfg, student, val, len(classes), device)
    return {**result, "ms_per_step": round(1000 * seconds / cfg.student_steps, 1), "kept_mb": kept_mb}


def memory(
    cfg: Config,
    train: data.Pixels,
    student: nn.Module,
    objective: Objective,
    strides: tuple[int, ...],
    answer: Callable[[int], models.Output] | None,
    device: torch.device,
) -> float:
    """MiB that one step keeps for its backward pass, each storage counted once. Leaves the student as it was."""
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    crops, target = inputs(crops_of(cfg, train, cfg.seed)[0], train, device)
    network = copy.deepcopy(student).train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        objective(models.forward(network, crops, strides), answer(0) if answer else None, target, 0.0)
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
