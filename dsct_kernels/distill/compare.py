"""`dsct-distill compare`: does a loss help, and does it beat the others? Methods x folds x seeds, one table.

Every method trains the same student from the same weights on the same crops for the same number of steps. The teacher
is trained once per fold, and what it says of the crops of a seed is kept, so that a method with a teacher costs little
more than the student alone. Every finished run is a line of `runs.jsonl` in the output folder under all the settings
it depends on: the same command again, or a larger one, does only what is missing.
"""

import argparse
import copy
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dsct_kernels import cafd_loss, dsct_loss, jaccard_loss, matched_cafd_loss, tnkd_loss

from . import adapter, candidates, data, models, rivals
from . import check as settings_check
from .config import DEFAULTS, Config, flag
from .datasets import identity, tiles_of
from .files import DataError, only_writer, replace_file
from .loop import classes_of, load_pixels, predicted, schedule, seed_everything

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


def _shipped(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda b, **settings: loss(
        b.student.logits, b.teacher.logits, b.target, ignore_index=data.IGNORE, **settings
    )


def _dsct(*logits_and_target: torch.Tensor, **settings: Any) -> torch.Tensor:
    return dsct_loss(*logits_and_target, ce_weight=0.0, **settings).total


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
    "uniform": Term(
        lambda b, **s: rivals.uniform(b.student.features, **s), rivals.uniform, features=True, teacher=False
    ),
    "tnkd": Term(_shipped(tnkd_loss), tnkd_loss),
    "cafd": Term(_features(cafd_loss), cafd_loss, features=True),
    "dsct": Term(_shipped(_dsct), dsct_loss),
    "condensed": Term(_condensed, _condensed, weight=3.0),
    "matched": Term(_shipped(matched_cafd_loss), matched_cafd_loss, weight=3.0),
    "over_positions": Term(_labelled(candidates.over_positions), candidates.over_positions, weight=3.0),
    "rows": Term(_logits(candidates.rows_kl), candidates.rows_kl, weight=3.0),
    "centred": Term(_logits(candidates.centred), candidates.centred, weight=3.0),
    "local": Term(_logits(candidates.local), candidates.local, weight=3.0),
    "jaccard": Term(_shipped(jaccard_loss), jaccard_loss, weight=3.0),
    "jaccard_labels": Term(
        lambda b, **s: rivals.jaccard_labels(b.student.logits, b.target, **s),
        rivals.jaccard_labels,
        weight=3.0,
        teacher=False,
    ),
    "regress": Term(
        lambda b, **s: candidates.regress(b.student.logits, b.teacher.logits, b.target, b.frequency, **s),
        candidates.regress,
        weight=3.0,
    ),
    "aligned": Term(_labelled(candidates.aligned), candidates.aligned, weight=3.0),
    "affinity": Term(_features(candidates.affinity), candidates.affinity, features=True),
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


NOT_SETTINGS = ("ignore_index", "backend", "reduction", "align_corners", "ce_weight", "class_weight", "cafd_weight",
                "spatial_temperature")  # fmt: skip


def method_settings(name: str) -> dict[str, Any]:
    """What may be set in a method's part, with the defaults."""
    if name == "alone":
        return {}
    if name == "balanced":
        return {"power": 0.5}
    keywords = inspect.signature(TERMS[name].reads).parameters.values()
    known = {p.name: p.default for p in keywords if p.kind is p.KEYWORD_ONLY}
    known = {k: v for k, v in known.items() if k not in NOT_SETTINGS}
    return {"weight": TERMS[name].weight, "anneal": "no", **known}


def method(text: str) -> Method:
    parts: list[Part] = []
    balance = 0.0
    for piece in text.split("+"):
        name, *changes = piece.split(":")
        pairs = dict(change.partition("=")[::2] for change in changes)
        if name not in ("alone", "balanced", *TERMS):
            names = ", ".join(("alone", "balanced", *TERMS))
            raise ValueError(f"method {text!r}: {name!r} is none of {names}")
        known = method_settings(name)
        for key, value in pairs.items():
            if key not in known:
                raise ValueError(
                    f"method {text!r}: {name} has no setting {key!r}; it has: {', '.join(known) or 'none'}"
                )
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
        self.frequency: torch.Tensor
        self.class_weight: torch.Tensor | None
        self.register_buffer("frequency", frequency)
        weight = frequency.clamp(min=1e-6).pow(-method.balance)
        self.register_buffer("class_weight", weight / weight.mean() if method.balance else None)
        self.project = nn.ModuleList()
        if teacher is not None and any(part.term == "cwd_features" for part in method.parts):
            pairs = zip(student.features, teacher.features, strict=True)
            self.project.extend(nn.Conv2d(s.shape[1], t.shape[1], 1, bias=False) for s, t in pairs)

    def forward(
        self, student: models.Output, teacher: models.Output | None, target: torch.Tensor, done: float
    ) -> torch.Tensor:
        logits = rivals.at_labels(student.logits, target)
        labels = target.long()
        if self.class_weight is None:
            valid = (target != data.IGNORE).sum().clamp(min=1)
            total = F.cross_entropy(logits, labels, ignore_index=data.IGNORE, reduction="sum") / valid
        else:
            total = F.cross_entropy(logits, labels, weight=self.class_weight, ignore_index=data.IGNORE)
        batch = Batch(student, teacher or student, target, self.frequency)
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


# ------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Difference:
    """One method against another on the same folds and seeds."""

    pairs: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.pairs)

    @property
    def error(self) -> float:
        """Standard error of the mean; NaN for a single pair."""
        return statistics.stdev(self.pairs) / len(self.pairs) ** 0.5 if len(self.pairs) > 1 else math.nan

    @property
    def clear(self) -> bool:
        """Larger than twice its standard error, of three pairs at least."""
        return len(self.pairs) >= 3 and abs(self.mean) > 2 * self.error

    def __str__(self) -> str:
        if not self.pairs:
            return "-"
        error = f" ± {self.error:.4f}" if len(self.pairs) > 1 else ""
        return f"{self.mean:+.4f}{error}" + (" **clear**" if self.clear else "")


Rows = list[dict[str, Any]]


def paired(rows: Rows, mine: str, other: str, value: Callable[[dict[str, Any]], float | None]) -> Difference:
    found: dict[tuple[str, Any], float | None] = {
        (r["method"], (r["student"], r["teacher"], r["fold"], r["seed"], r["steps"])): value(r) for r in rows
    }
    pairs = []
    for (name, where), v in found.items():
        base = found.get((other, where))
        if name == mine and v is not None and base is not None:
            pairs.append(v - base)
    return Difference(tuple(pairs))


def table(rows: Rows, names: list[str], against: list[str], classes: tuple[str, ...]) -> str:
    """Markdown: each method's mean, spread and cost, and its paired differences."""
    heads = ("cross-entropy and", "runs", "mean mIoU", "spread over seeds", *(f"against {a}" for a in against))
    heads = (*heads, "better in", "ms / step", "MiB kept")
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for name in names:
        mine = [r for r in rows if r["method"] == name]
        if not mine:
            continue
        by_seed = [[r["miou"] for r in mine if r["seed"] == seed] for seed in sorted({r["seed"] for r in mine})]
        whole = [statistics.fmean(v) for v in by_seed if len(v) == max(map(len, by_seed))]
        spread = f"{statistics.stdev(whole):.4f}" if len(whole) > 1 else "-"
        differences = [paired(rows, name, other, lambda r: r["miou"]) for other in against]
        first = differences[0].pairs if differences else ()
        better = f"{sum(d > 0 for d in first)} of {len(first)}" if first and name != against[0] else "-"
        cells = ["-" if other == name else str(d) for other, d in zip(against, differences, strict=True)]
        cost = {key: [r[key] for r in mine if r.get(key) is not None] for key in ("ms_per_step", "kept_mb")}
        ms, mb = (f"{statistics.median(v):.0f}" if v else "-" for v in cost.values())
        mean = statistics.fmean(r["miou"] for r in mine)
        lines.append(f"| {name} | {len(mine)} | {mean:.4f} | {spread} | {' | '.join(cells)} | {better} | {ms} | {mb} |")
    lines += [
        "",
        "Against: the mean of the paired differences (same fold, same seed, same crops, same first weights) and its "
        "standard error.",
        "**clear**: three pairs or more and beyond twice the error; all else is within the spread.",
        "",
        f"IoU per class, against {against[0]}:",
        "",
        "| | " + " | ".join(classes) + " |",
        "| --- |" + " ---: |" * len(classes),
    ]
    for name in names:
        if name != against[0] and any(r["method"] == name for r in rows):
            cells = [str(paired(rows, name, against[0], lambda r, k=k: r["iou"][k])) for k in range(len(classes))]  # type: ignore[misc]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def chart(path: Path, rows: Rows, names: list[str], against: str) -> None:
    """Every paired difference as a point, its mean and twice its standard error as a bar."""
    from .report import pyplot

    plt = pyplot()
    shown = [(n, d) for n in names if n != against and (d := paired(rows, n, against, lambda r: r["miou"])).pairs]
    figure, axis = plt.subplots(figsize=(7.5, 0.9 + 0.34 * len(shown)), layout="constrained")
    for y, (_, d) in enumerate(reversed(shown)):
        axis.plot(d.pairs, [y] * len(d.pairs), "o", color="0.65", markersize=3)
        error = 2 * d.error if len(d.pairs) > 1 else 0
        axis.errorbar([d.mean], [y], xerr=[error], fmt="s", color="C0" if d.clear else "C1", markersize=5, capsize=3)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(shown)), [n for n, _ in reversed(shown)], fontsize=8)
    axis.set_xlabel(
        f"mIoU against {against}: each pair, the mean and twice its standard error (blue: clear)", fontsize=8
    )
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------ the command


def read_rows(path: Path) -> Rows:
    """Finished runs. A last line that a kill cut short is cut off the file, so that what follows starts a line."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        replace_file(path, whole)
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not a finished run ({error})") from error
    return rows


def append_row(path: Path, row: dict[str, Any]) -> None:
    with open(path, "ab") as file:
        file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def parser() -> argparse.ArgumentParser:
    from .cli import BANDS_HELP, DATA_HELP, LABELS_HELP, commas, help_default, strides

    terms = "; ".join(
        f"{name} ({', '.join(f'{k}={v}' for k, v in method_settings(name).items())})" for name in ("balanced", *TERMS)
    )
    p = argparse.ArgumentParser(
        prog="dsct-distill compare",
        description=__doc__,
        epilog="methods: alone is cross-entropy; anything else joins it, with + between several and :KEY=VALUE for a "
        f"setting. {terms}. anneal: {', '.join(ANNEAL)}.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the runs of any students and steps, and of a table and a chart for each; again: it goes on",
    )
    p.add_argument(
        "--methods", type=commas, default=DEFAULT_METHODS, metavar="A,B", help=f"default {','.join(DEFAULT_METHODS)}"
    )
    p.add_argument(
        "--against", type=commas, default=("alone",), metavar="A,B", help="methods the others are set against"
    )
    p.add_argument("--folds", type=numbers, default=(0, 1, 2), help="of 0,1,2: every third tile group is held out")
    p.add_argument("--seeds", type=numbers, default=(0, 1, 2), metavar="A,B", help="default 0,1,2")
    p.add_argument("--strides", type=strides, default=(16, 32), help="of the features that a method compares (16,32)")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time (1); each takes --threads threads")
    p.add_argument("--threads", type=int, default=1, help="CPU threads of a run (1)")
    p.add_argument("--minutes", type=float, default=math.inf, help="start no run after that; the same command goes on")
    p.add_argument("--data", choices=tuple(DEFAULTS), help=DATA_HELP)
    p.add_argument("--root", metavar="DIR", help="folder of the data set")
    p.add_argument("--bands", help=BANDS_HELP)
    p.add_argument("--labels", help=LABELS_HELP)
    p.add_argument("--teacher", metavar="NAME|DIR|PACKAGE.MODULE:FUNCTION", help=TEACHER_HELP)
    p.add_argument("--student", metavar="NAME|DIR|...", help="the same; a folder is where it starts from")
    for name in CONFIG_FLAGS:
        default = getattr(Config(), name)
        choices = ("auto", "cpu", "cuda") if name == "device" else None
        p.add_argument(flag(name), type=type(default), choices=choices, help=help_default(name, default))
    return p


TEACHER_HELP = (
    f"to train: {', '.join(TEACHER_PRESETS)}, or a function that makes a torch.nn.Module, given the number of classes; "
    "as it is: a model folder (default efficientnet-lite0)"
)
DEFAULT_METHODS = ("alone", "balanced", "kd", "at", "dkd", "cwd", "dsct")
CONFIG_FLAGS = (
    "teacher_seed", "crop", "batch", "teacher_steps", "student_steps", "teacher_lr", "student_lr", "weight_decay",
    "scale_jitter", "colour_jitter", "scenes", "scene_size", "downscale", "window", "cache_mb", "device",
)  # fmt: skip


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def folds_of(cfg: Config) -> list[tuple[str, ...]]:
    """Validation groups of each fold: every third group, starting at the first, second and third."""
    groups = sorted({tile.group for tile in tiles_of(cfg)})
    if len(groups) < FOLDS:
        raise DataError(f"--data {cfg.data}: {len(groups)} groups of tiles, of which no {FOLDS} folds can be made")
    return [tuple(groups[k::FOLDS]) for k in range(FOLDS)]


def check(own: argparse.Namespace, cfg: Config) -> None:
    """Everything that can be known before anything is trained: ValueError or DataError that names the setting."""
    for name, values in (("--folds", own.folds), ("--seeds", own.seeds), ("--methods", own.methods)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name}: expected different values, got {','.join(map(str, values))}")
    if not set(own.folds) <= set(range(FOLDS)):
        raise ValueError(f"--folds: expected some of 0,1,2, got {','.join(map(str, own.folds))}")
    settings_check.settings(replace(cfg, arms=("alone",)))  # a comparison has methods in their place
    for name, number in (("--jobs", own.jobs), ("--threads", own.threads), *(("--strides", s) for s in own.strides)):
        if number < 1:
            raise ValueError(f"{name}: expected 1 or more, got {number}")
    if cfg.crop % 32:
        raise ValueError(f"--crop: expected a multiple of 32, got {cfg.crop}")
    if min(own.seeds) < 0:
        raise ValueError(f"--seeds: expected 0 or more, got {min(own.seeds)}")
    chosen = {name: method(name) for name in own.methods}
    same = {(m.parts, m.balance): name for name, m in chosen.items()}
    for name, m in chosen.items():
        if same[m.parts, m.balance] != name:
            raise ValueError(f"--methods: {name!r} and {same[m.parts, m.balance]!r} are the same")
    missing = [name for name in own.against if name not in chosen]
    if missing:
        raise ValueError(f"--against: {missing[0]!r} is not one of --methods")
    classes, _ = classes_of(cfg)
    bands = tiles_of(cfg)[0].bands
    fresh = models.Normalisation((0.0,) * bands, (1.0,) * bands)  # of networks that only look at black
    images = torch.zeros(2, bands, cfg.crop, cfg.crop)
    target = torch.zeros(2, cfg.crop, cfg.crop, dtype=torch.uint8)
    try:
        student = build(cfg.student, classes, torch.device("cpu"), fresh)
        with_teacher = any(m.teacher for m in chosen.values())
        teacher = build(cfg.teacher, classes, torch.device("cpu"), fresh).eval() if with_teacher else None
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"--teacher {cfg.teacher} or --student {cfg.student}: {error}") from error
    with torch.no_grad():
        strides = strides_read(own)
        said = models.forward(teacher, images, strides) if teacher is not None else None
        for who, network in (("--teacher", teacher), ("--student", student)):
            found = models.forward(network, images).logits.shape[1] if network is not None else len(classes)
            if found != len(classes):
                raise ValueError(f"{who}: expected logits of {len(classes)} classes, got {found}")
    for name, one in chosen.items():  # one step of everything, on nothing, so that no setting fails hours later
        out = models.forward(student, images, own.strides if one.features else ())
        objective = Objective(one, torch.full((len(classes),), 1 / len(classes)), out, said)
        try:
            loss = objective(out, said, target, 0.0)
            loss.backward()
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"method {name!r}: {error}") from error
        if not loss.isfinite():
            raise ValueError(f"method {name!r}: its loss is {loss.item()} on a black image; is a temperature 0?")


def strides_read(own: argparse.Namespace) -> tuple[int, ...]:
    """None, unless a method compares features: a network without taps has none to give."""
    return own.strides if any(method(text).features for text in own.methods) else ()


def work(stage: Callable[[Job], Any], job: Job, threads: int) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    return stage(job)


def _die_quietly() -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches the workers too; the main process says what is left


class Workers:
    """Carries jobs out, `jobs` at a time, and writes each finished run at once."""

    def __init__(self, own: argparse.Namespace, file: Path):
        self.own, self.file, self.started, self.failed = own, file, time.perf_counter(), 0
        self.pool = ProcessPoolExecutor(own.jobs, multiprocessing.get_context("spawn"), _die_quietly)

    def in_time(self) -> bool:
        return time.perf_counter() - self.started < 60 * float(self.own.minutes)

    def carry_out(self, stage: str, function: Callable[[Job], Any], waiting: list[Job]) -> None:
        running: dict[Future[Any], Job] = {}
        while running or (waiting and self.in_time()):
            while waiting and len(running) < self.own.jobs and self.in_time():
                job = waiting.pop(0)
                running[self.pool.submit(work, function, job, self.own.threads)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                self.finish(stage, running.pop(future), future)

    def finish(self, stage: str, job: Job, future: "Future[Any]") -> None:
        place = f"{'+'.join(job.cfg.val_tiles or ())} seed {job.cfg.seed}"
        head = f"[{time.perf_counter() - self.started:5.0f} s] {place} {job.method if stage == 'run' else stage}:"
        try:
            value = future.result()
        except BrokenProcessPool:
            raise
        except Exception as error:
            self.failed += 1
            print(f"{head} FAILED: {error!r}", flush=True)
            return
        print(f"{head} " + (f"mIoU {value['miou']:.4f}" if value else "kept"), flush=True)
        if stage == "run":
            append_row(self.file, {**row_of(job), **value})


def main(argv: list[str] | None = None) -> int:
    from .cli import config_from, failed

    typed = sys.argv[1:] if argv is None else argv
    given = vars(parser().parse_args(typed))
    own = argparse.Namespace(**{k: given.pop(k) for k in
          ("out", "methods", "against", "folds", "seeds", "strides", "jobs", "threads", "minutes")})  # fmt: skip
    try:
        cfg = replace(
            config_from({"teacher": "efficientnet-lite0", "student": "upernet-tiny", **given}), arms=(), pictures=False
        )
        folds = folds_of(cfg)
        check(own, cfg)
        with only_writer(own.out):
            return compare(own, cfg, folds, "dsct-distill compare " + " ".join(typed))
    except (DataError, ValueError) as error:
        return failed(error)


def compare(own: argparse.Namespace, cfg: Config, folds: list[tuple[str, ...]], command: str) -> int:
    """What is missing of folds x seeds x methods, then the table of all."""
    from .cli import INTERRUPTED

    file = own.out / "runs.jsonl"
    jobs = [
        Job(replace(cfg, val_tiles=folds[fold], seed=seed), text, strides_read(own), own.out)
        for seed in own.seeds
        for fold in own.folds
        for text in own.methods
    ]
    wanted = {job.key: job for job in jobs}
    finished = {row["key"] for row in read_rows(file)}
    todo = [job for job in jobs if job.key not in finished]
    print(f"{len(jobs)} runs, {len(jobs) - len(todo)} of them finished before")
    workers = Workers(own, file)
    taught = [job for job in todo if method(job.method).teacher]
    died = False
    try:
        teachers = {job.teacher_file: job for job in taught if not job.teacher_file.is_file()}
        workers.carry_out("teacher", train_teacher, list(teachers.values()))
        answers = {job.answers_file: job for job in taught if not job.answers_file.is_file()}
        workers.carry_out("answers", ask_teacher, [job for job in answers.values() if job.teacher_file.is_file()])
        workers.carry_out("run", run, [j for j in todo if not method(j.method).teacher or j.answers_file.is_file()])
    except BrokenProcessPool:
        died = True
        print("error: a worker was killed, perhaps for want of memory; the same command goes on", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    finally:
        workers.pool.shutdown(cancel_futures=True)
    rows = [{**row, "method": wanted[row["key"]].method} for row in read_rows(file) if row["key"] in wanted]
    if rows:
        text = table(rows, list(own.methods), list(own.against), classes_of(cfg)[0])
        name = f"comparison-{re.sub(r'[^A-Za-z0-9.-]+', '-', cfg.student)}-{cfg.student_steps}"
        replace_file(own.out / f"{name}.md", f"{text}\n`{command}`\n".encode())
        chart(own.out / f"{name}.png", rows, list(own.methods), own.against[0])
        print(text)
    if len(rows) < len(jobs):
        print(f"{len(jobs) - len(rows)} runs to go; the same command goes on")
    return 1 if workers.failed or died else 0


def row_of(job: Job) -> dict[str, Any]:
    cfg = job.cfg
    return {
        "key": job.key,
        "method": job.method,
        "fold": "+".join(cfg.val_tiles or ()),
        "seed": cfg.seed,
        "student": cfg.student,
        "teacher": cfg.teacher,
        "steps": cfg.student_steps,
        "settings": job.settings(),
    }
