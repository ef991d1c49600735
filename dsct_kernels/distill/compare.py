"""`dsct-distill compare`: does a loss help, and does it beat the others? Methods x folds x seeds, one table.

Every method trains the same student from the same weights on the same crops for the same number of steps. The teacher
is trained once per fold, and what it says of the crops of a seed is kept, so that a method with a teacher costs little
more than the student alone. Every finished run is a line of `runs.jsonl` in the output folder under all the settings
it depends on: the same command again, or a larger one, does only what is missing.
"""

import argparse
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dsct_kernels import cafd_loss, tnkd_loss

from . import adapter, candidates, data, models, rivals
from .config import Config

FOLDS = 3
TEACHER_PRESETS = ("efficientnet-lite0", *models.PRESETS)

# ------------------------------------------------------------------------------------------------ methods


@dataclass
class Batch:
    """What the two networks said of one batch of crops, and what is known about it."""

    student: models.Output
    teacher: models.Output
    target: torch.Tensor  # (N, H, W) uint8, 255 is ignored
    frequency: torch.Tensor  # (K,) share of each class in the labelled pixels of the training tiles


def _logits(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda b, **settings: loss(b.student.logits, b.teacher.logits, **settings)


def _labelled(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda b, **settings: loss(b.student.logits, b.teacher.logits, b.target, **settings)


def _features(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda b, **settings: loss(b.student.features, b.teacher.features, **settings)


def _condensed(b: Batch, *, temperature: float = 4.0) -> torch.Tensor:
    pair = rivals.same_size(b.student.logits, b.teacher.logits)
    return temperature**2 * cafd_loss(*pair, spatial_temperature=temperature)


@dataclass(frozen=True)
class Term:
    """One loss that a method may add to the cross-entropy."""

    call: Callable[..., torch.Tensor]
    reads: Callable[..., Any]  # whose keyword arguments are the settings of the term
    weight: float = 1.0
    features: bool = False
    teacher: bool = True


TERMS: dict[str, Term] = {
    "kd": Term(_labelled(rivals.kd), rivals.kd),
    "dkd": Term(_labelled(rivals.dkd), rivals.dkd),
    "cwd": Term(_logits(rivals.cwd), rivals.cwd, weight=3.0),
    "cwd_features": Term(lambda b, **s: b, rivals.cwd, features=True),  # owns a convolution: see Objective
    "at": Term(_features(rivals.at), rivals.at, weight=500.0, features=True),
    "uniform": Term(lambda b, **s: rivals.uniform(b.student.features, **s), rivals.uniform, features=True, teacher=False),
    "tnkd": Term(
        lambda b, **s: tnkd_loss(b.student.logits, b.teacher.logits, b.target, ignore_index=data.IGNORE, **s), tnkd_loss
    ),
    "cafd": Term(_features(cafd_loss), cafd_loss, features=True),
    "condensed": Term(_condensed, _condensed, weight=3.0),
    "matched": Term(_logits(candidates.matched), candidates.matched, weight=3.0),
    "over_positions": Term(_labelled(candidates.over_positions), candidates.over_positions, weight=3.0),
    "rows": Term(_logits(candidates.rows_kl), candidates.rows_kl, weight=3.0),
    "balanced_kd": Term(
        lambda b, **s: candidates.balanced_kd(b.student.logits, b.teacher.logits, b.target, b.frequency, **s),
        candidates.balanced_kd,
    ),
}


@dataclass(frozen=True)
class Part:
    term: str
    weight: float
    anneal: str  # "no", "cosine" (to 0 at the last step), "linear"
    settings: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Method:
    """`alone`, or terms joined by +, each with its settings: `balanced+cwd:temperature=4:weight=3`."""

    text: str
    parts: tuple[Part, ...]
    balance: float  # cross-entropy weighs a class 1 / frequency^balance

    @property
    def features(self) -> bool:
        return any(TERMS[part.term].features for part in self.parts)

    @property
    def teacher(self) -> bool:
        return any(TERMS[part.term].teacher for part in self.parts)


def method(text: str) -> Method:
    parts: list[Part] = []
    balance = 0.0
    for piece in text.split("+"):
        name, *changes = piece.split(":")
        pairs = dict(change.partition("=")[::2] for change in changes)
        if name == "alone":
            known: dict[str, Any] = {}
        elif name == "balanced":
            known = {"power": 0.5}
        elif name in TERMS:
            keywords = inspect.signature(TERMS[name].reads).parameters.values()
            known = {p.name: p.default for p in keywords if p.kind is p.KEYWORD_ONLY}
            known = {k: v for k, v in known.items() if k not in ("ignore_index", "backend", "reduction", "align_corners")}
            known |= {"weight": TERMS[name].weight, "anneal": "no"}
        else:
            names = ", ".join(("alone", "balanced", *TERMS))
            raise ValueError(f"method {text!r}: {name!r} is none of {names}")
        for key, value in pairs.items():
            if key not in known:
                raise ValueError(f"method {text!r}: {name} has no setting {key!r}; it has: {', '.join(known) or 'none'}")
            try:
                known[key] = value if isinstance(known[key], str) else float(value)
            except ValueError as error:
                raise ValueError(f"method {text!r}: {key} of {name} must be a number, got {value!r}") from error
            if not isinstance(known[key], str) and not 0 <= known[key] < math.inf:
                raise ValueError(f"method {text!r}: {key} of {name} must be finite and not negative, got {value!r}")
        if name == "balanced":
            balance = known["power"]
        elif name != "alone":
            weight, anneal = known.pop("weight"), known.pop("anneal")
            if anneal not in ANNEAL:
                raise ValueError(f"method {text!r}: anneal must be one of {', '.join(ANNEAL)}, got {anneal!r}")
            parts.append(Part(name, weight, anneal, tuple(sorted(known.items()))))
    return Method(text, tuple(parts), balance)


ANNEAL: dict[str, Callable[[float], float]] = {
    "no": lambda _done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "late": lambda done: min(1.0, 2 * done),
}


class Objective(nn.Module):
    """Cross-entropy and the terms of a method. A term that learns something (cwd_features) keeps it here."""

    def __init__(self, method: Method, frequency: torch.Tensor, student: models.Output, teacher: models.Output | None):
        super().__init__()
        self.method = method
        self.register_buffer("frequency", frequency)
        weight = frequency.clamp(min=1e-6).pow(-method.balance)
        self.register_buffer("class_weight", weight / weight.mean() if method.balance else None)
        self.project = nn.ModuleList()
        if teacher is not None and any(part.term == "cwd_features" for part in method.parts):
            pairs = zip(student.features, teacher.features, strict=True)
            self.project.extend(nn.Conv2d(s.shape[1], t.shape[1], 1, bias=False) for s, t in pairs)

    def forward(self, student: models.Output, teacher: models.Output | None, target: torch.Tensor, done: float) -> torch.Tensor:
        logits = rivals.at_labels(student.logits, target)
        weight = self.class_weight
        labels = target.long()
        if weight is None:
            valid = (target != data.IGNORE).sum().clamp(min=1)
            total = F.cross_entropy(logits, labels, ignore_index=data.IGNORE, reduction="sum") / valid
        else:
            total = F.cross_entropy(logits, labels, weight=weight, ignore_index=data.IGNORE)
        batch = Batch(student, teacher or student, target, self.get_buffer("frequency"))
        for part in self.method.parts:
            settings = dict(part.settings)
            if part.term == "cwd_features":
                pairs = zip(self.project, student.features, batch.teacher.features, strict=True)
                values = [rivals.cwd(conv(s.float()), t, **settings) for conv, s, t in pairs]
                value = torch.stack(values).mean()
            else:
                value = TERMS[part.term].call(batch, **settings)
            total = total + part.weight * ANNEAL[part.anneal](done) * value
        return total


# ------------------------------------------------------------------------------------------------ one run


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
        values = {k: v for k, v in asdict(self.cfg).items() if k in kept}
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
        kept = ("data", "val_tiles", "teacher", "teacher_seed", "crop", "batch", "teacher_steps", "teacher_lr", "downscale",
                "weight_decay", "scale_jitter", "colour_jitter", "scenes", "scene_size", "precision")  # fmt: skip
        return digest({k: v for k, v in asdict(self.cfg).items() if k in kept})

    @property
    def teacher_file(self) -> Path:
        return self.out / "teachers" / f"{self.teacher_key}.pt"

    @property
    def answers_file(self) -> Path:
        """What the teacher says of every crop of this seed."""
        return self.out / "answers" / f"{self.teacher_key}-{self.cfg.seed}-{self.cfg.student_steps}.pt"


def digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


@lru_cache(maxsize=FOLDS)
def pixels_of(cfg: Config) -> tuple[data.Pixels, data.Pixels]:
    from .loop import load_pixels

    return load_pixels(cfg, torch.device("cpu"))


def pixels(cfg: Config) -> tuple[data.Pixels, data.Pixels]:
    kept = ("data", "root", "val_tiles", "cache_mb", "scenes", "scene_size", "downscale")
    return pixels_of(replace(Config(), **{name: getattr(cfg, name) for name in kept}))


def frequency(train: data.Pixels, classes: int) -> torch.Tensor:
    counts = torch.zeros(classes)
    for i, tile in enumerate(train.tiles):
        labels = train.window(i, 0, 0, tile.height, tile.width)[..., 3].flatten().long()
        counts += torch.bincount(labels[labels != data.IGNORE], minlength=classes)
    return counts / counts.sum()


def device_of(cfg: Config) -> torch.device:
    cuda = torch.cuda.is_available() and cfg.device != "cpu"
    return torch.device("cuda" if cuda else "cpu")


def build(name: str, classes: tuple[str, ...]) -> nn.Module:
    if name == "efficientnet-lite0":
        return adapter.efficientnet_fpn(len(classes))
    network = models.build(name, classes)
    if type(network).__name__ == "UperNetForSemanticSegmentation":  # it upsamples its logits: take them as its head made them
        mean, std = network.get_buffer("pixel_mean"), network.get_buffer("pixel_std")
        return adapter.Adapter(network, logits="decode_head", mean=mean.flatten().tolist(), std=std.flatten().tolist())
    return network


def inputs(batch: tuple[torch.Tensor, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, H, W) in 0..1 with colour jitter, and labels (N, H, W) uint8."""
    crops, gain, shift = (part.to(device, non_blocking=True) for part in batch)
    images = crops[..., :3].permute(0, 3, 1, 2).float() / 255
    return (images - 0.5) * gain[:, :, None, None] + 0.5 + shift[:, :, None, None], crops[..., 3]


def crops_of(cfg: Config, train: data.Pixels, seed: int) -> data.Crops:
    return data.Crops(train, cfg.crop, cfg.batch, seed, cfg.scale_jitter, cfg.colour_jitter)


def fit(
    cfg: Config,
    train: data.Pixels,
    student: nn.Module,
    objective: Callable[..., torch.Tensor],
    parameters: Iterable[nn.Parameter],
    steps: int,
    lr: float,
    seed: int,
    strides: tuple[int, ...],
    answer: Callable[[int], models.Output] | None,
    device: torch.device,
) -> None:
    from .loop import schedule, seed_everything

    seed_everything(seed)
    everything = list(parameters)
    optimizer = torch.optim.AdamW(everything, lr=lr, weight_decay=cfg.weight_decay, foreach=True)
    student.train()
    for step, batch in enumerate(crops_of(cfg, train, seed).loader(0, steps)):
        images, target = inputs(batch, device)
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, steps)
        out = models.forward(student, images, strides)
        loss = objective(out, answer(step) if answer else None, target, step / steps)
        loss.backward()
        nn.utils.clip_grad_norm_(everything, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    student.eval()


def train_teacher(job: Job) -> dict[str, Any]:
    from .loop import classes_of, seed_everything

    cfg, device = job.cfg, device_of(job.cfg)
    classes, _ = classes_of(cfg)
    train, val = pixels(cfg)
    seed_everything(cfg.teacher_seed)
    network = build(cfg.teacher, classes).to(device, memory_format=torch.channels_last)
    objective = Objective(method("alone"), frequency(train, len(classes)), models.Output(torch.empty(0), []), None).to(device)
    fit(cfg, train, network, objective, network.parameters(), cfg.teacher_steps, cfg.teacher_lr, cfg.teacher_seed, (), None, device)
    result = evaluate(cfg, network, val, len(classes), device)
    save_atomically(job.teacher_file, {"model": network.state_dict(), "result": result})
    return result


@torch.no_grad()
def ask_teacher(job: Job) -> None:
    """Logits and features of the teacher for every crop of this seed, in half precision."""
    from .loop import classes_of

    cfg, device = job.cfg, device_of(job.cfg)
    classes, _ = classes_of(cfg)
    train, _ = pixels(cfg)
    network = build(cfg.teacher, classes).to(device, memory_format=torch.channels_last)
    network.load_state_dict(torch.load(job.teacher_file, weights_only=True)["model"])
    network.eval()
    logits, features = [], [[] for _ in job.strides]
    for batch in crops_of(cfg, train, cfg.seed).loader(0, cfg.student_steps):
        images, _ = inputs(batch, device)
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
    from .loop import classes_of, seed_everything

    cfg, device = job.cfg, device_of(job.cfg)
    chosen = method(job.method)
    classes, _ = classes_of(cfg)
    train, val = pixels(cfg)
    seed_everything(cfg.seed)
    student = build(cfg.student, classes).to(device, memory_format=torch.channels_last)
    strides = job.strides if chosen.features else ()
    answers: Callable[[int], models.Output] | None = None
    if chosen.teacher:
        kept = torch.load(job.answers_file, weights_only=True, mmap=True)

        def answers(step: int) -> models.Output:
            features = [maps[step].to(device).float() for maps in kept["features"]] if strides else []
            return models.Output(kept["logits"][step].to(device).float(), features)

    with torch.no_grad():
        probe = models.forward(student.eval(), torch.zeros(1, 3, cfg.crop, cfg.crop, device=device), strides)
    objective = Objective(chosen, frequency(train, len(classes)), probe, answers(0) if answers else None).to(device)
    started = time.perf_counter()
    everything = [*student.parameters(), *objective.parameters()]
    fit(cfg, train, student, objective, everything, cfg.student_steps, cfg.student_lr, cfg.seed, strides, answers, device)
    seconds = time.perf_counter() - started
    return {**evaluate(cfg, student, val, len(classes), device), "ms_per_step": round(1000 * seconds / cfg.student_steps, 1)}


@torch.no_grad()
def evaluate(cfg: Config, network: nn.Module, val: data.Pixels, classes: int, device: torch.device) -> dict[str, Any]:
    """IoU over whole held-out tiles: windows overlap by a quarter and their probabilities are averaged."""
    from .loop import window_starts

    matrix = torch.zeros(classes, classes, dtype=torch.float64)
    network.eval()
    size = cfg.window
    for i, tile in enumerate(val.tiles):
        scores = torch.zeros(classes, tile.height, tile.width, device=device)
        for y in window_starts(tile.height, size):
            for x in window_starts(tile.width, size):
                window = val.window(i, y, x, size, size)[..., :3].to(device)
                h, w = window.shape[:2]
                image = F.pad(window.permute(2, 0, 1)[None].float() / 255, (0, -w % 32, 0, -h % 32), mode="replicate")
                logits = models.forward(network, image).logits.float()
                logits = F.interpolate(logits, size=image.shape[-2:], mode="bilinear", align_corners=False)
                scores[:, y : y + h, x : x + w] += logits[0, :, :h, :w].softmax(0)
        label = val.window(i, 0, 0, tile.height, tile.width)[..., 3].long().flatten()
        known = label != data.IGNORE
        pairs = label[known] * classes + scores.argmax(0).cpu().flatten()[known]
        matrix += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    hit = matrix.diag()
    iou = hit / (matrix.sum(0) + matrix.sum(1) - hit)  # NaN for a class that is nowhere
    return {
        "miou": round(float(iou.nanmean()), 5),
        "iou": [None if math.isnan(v) else round(v, 5) for v in iou.tolist()],
        "accuracy": round(float(hit.sum() / matrix.sum()), 5),
    }
