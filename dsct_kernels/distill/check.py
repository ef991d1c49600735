"""Every setting of a run, checked before anything is trained or written: one error that names the option."""

import math
import re
from collections.abc import Iterable
from dataclasses import fields, replace
from functools import cache, partial
from typing import Any

import torch

from . import data, models
from .config import CHOICES, DEFAULTS, Config, Loss, arm_loss, flag, phase_folder
from .datasets import check_choices, tiles_of
from .datasets.unlabelled import unlabelled_tiles
from .teacher import AUTO, pair

# Smallest and largest value; the kind of number is that of the default.
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),  # numpy takes no other
    "teacher_seed": (0, 2**32 - 1),
    "crop": (1, 2**16),
    "batch": (1, 2**20),
    "teacher_steps": (1, 2**40),
    "student_steps": (1, 2**40),
    "teacher_lr": (math.ulp(0.0), 1e30),
    "student_lr": (math.ulp(0.0), 1e30),
    "power": (0, 100),
    "weight_decay": (0, 1e30),
    "ema": (0, 1 - 2**-40),
    "distill_warmup": (0, 1),
    "accumulate": (1, 2**20),
    "unlabelled_weight": (0, 1e30),
    "scale_jitter": (0, 4),
    "colour_jitter": (0, 4),
    "scenes": (2, 2**20),  # one to train on, one to validate on
    "scene_size": (32, 2**16),
    "downscale": (1, 2**16),
    "window": (32, 2**16),
    "cache_mb": (0, 1e12),
    "log_every": (1, 2**40),
    "eval_every": (0, 2**40),
    "checkpoint_every": (1, 2**40),
    "keep": (1, 2**20),
}


def everything(cfg: Config) -> None:
    """Settings, then data, then models. Raises ValueError or DataError."""
    from .engine import make_accelerator

    settings(cfg)
    device = make_accelerator(cfg).device
    losses(cfg, device)
    train, val = data.split(tiles_of(cfg), list(cfg.val_tiles) if cfg.val_tiles else None)
    unlabelled_tiles(cfg, train[0])
    networks(cfg, data.classes_of(cfg)[0], val)


def settings(cfg: Config) -> None:
    """What can be said of the settings alone."""
    for name, value in values(cfg):
        number(name, value)
    for name, choices in {**CHOICES, "data": tuple(DEFAULTS)}.items():
        if getattr(cfg, name) not in choices:
            raise ValueError(f"{flag(name)}: expected one of {', '.join(choices)}, got {getattr(cfg, name)!r}")
    for name, option in (
        ("pictures", "--no-pictures"),
        ("deterministic", "--deterministic"),
        ("compile_teacher", "--compile-teacher"),
    ):
        if type(getattr(cfg, name)) is not bool:
            raise ValueError(f"{option}: expected true or false for {name}, got {getattr(cfg, name)!r}")
    if cfg.ema and cfg.parallel == "fsdp":
        raise ValueError(f"--ema {cfg.ema}: expected 0 with --parallel fsdp, whose weights no process has whole")
    for name, texts in (("teacher", (cfg.teacher,)), ("student", (cfg.student,)), ("arms", cfg.arms)):
        strings(name, texts)
    if cfg.val_tiles is not None:
        strings("val_tiles", cfg.val_tiles)
    for name, text in (("bands", cfg.bands), ("labels", cfg.labels), ("unlabelled", cfg.unlabelled)):
        if text is not None:
            strings(name, (text,))
    check_choices(cfg)
    if cfg.root is not None:
        strings("root", (cfg.root,))
        if cfg.data == "synthetic":
            raise ValueError(f"--root {cfg.root}: --data synthetic reads no folder; give --data dubai as well")
    if cfg.data == "synthetic" and cfg.scene_size % 2:
        raise ValueError(f"--scene-size: expected an even number, got {cfg.scene_size}")
    if cfg.precision == "fp16" and (cfg.device == "cpu" or not torch.cuda.is_available()):
        raise ValueError("--precision fp16: expected a CUDA device; on a CPU use no or bf16")
    arms(cfg)


def values(cfg: Config) -> Iterable[tuple[str, Any]]:
    return [(name, getattr(cfg, name)) for name in RANGES]


def number(name: str, value: Any) -> None:
    whole = isinstance(getattr(Config(), name), int)
    low, high = RANGES[name]
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        bounds = f"from {low:g} to {high:g}" if low != math.ulp(0.0) else f"> 0 and up to {high:g}"
        raise ValueError(f"{flag(name)}: expected a {'whole ' if whole else ''}number {bounds}, got {value!r}")


def strings(name: str, texts: Any) -> None:
    if not isinstance(texts, tuple) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{flag(name)}: expected names that are not empty, got {texts!r}")
    twice = [text for text in texts if texts.count(text) > 1]
    if twice:
        raise ValueError(f"{flag(name)}: {twice[0]!r} stands there twice")


def arms(cfg: Config) -> None:
    folders: dict[str, str] = {}
    for arm in cfg.arms:
        loss = arm_loss(arm, cfg.loss)
        one = folders.setdefault(phase_folder(arm), arm)
        if one != arm:
            raise ValueError(f"--arms: {one!r} and {arm!r} would share the folder {phase_folder(arm)}")
        if not loss.teaches and loss.ce_weight == 0:
            raise ValueError(f"--arms {arm}: every weight is 0, so there is nothing to learn from")
    if cfg.unlabelled is not None and not any(arm_loss(arm, cfg.loss).teaches for arm in cfg.arms):
        raise ValueError(f"--unlabelled {cfg.unlabelled}: expected an arm that learns from the teacher, got {cfg.arms}")


def losses(cfg: Config, device: torch.device) -> None:
    """The losses themselves say what they take: each arm's is called once, on two pixels."""
    from .objective import distillation

    x = torch.zeros(1, 2, 1, 2, device=device)
    out = models.Output(x, [x])
    target = torch.zeros(1, 1, 2, dtype=torch.uint8, device=device)
    everywhere = {"": cfg.loss, **{f"--arms {arm}: ": arm_loss(arm, cfg.loss) for arm in cfg.arms}}
    for where, loss in everywhere.items():
        for name in (f.name for f in fields(Loss)):
            value = getattr(loss, name)
            if name == "strides":
                if not isinstance(value, tuple) or not all(type(s) is int and s > 0 for s in value):
                    raise ValueError(f"{where}{flag(name)}: expected whole numbers >= 1, got {value!r}")
            elif name == "taps":
                sides = isinstance(value, tuple) and [s.split("=") for s in value if isinstance(s, str)]
                if value not in ((), (AUTO,)) and not (sides and all(len(s) == 2 and all(s) for s in sides)):
                    raise ValueError(
                        f"{where}--taps: expected auto, or student.module=teacher.module each, got {value!r}"
                    )
                if value and loss.strides:
                    raise ValueError(f"{where}--taps: expected none with --strides {loss.strides}, got {value!r}")
            elif isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{where}{flag(name)}: expected a number, got {value!r}")
        # CAFD's weight is checked as it is, its features go along whatever it is.
        for weight in {loss.cafd_weight, 1.0}:
            try:
                distillation(out, out, target, replace(loss, cafd_weight=weight, strides=(1,), taps=()), cfg.backend)
            except (ValueError, TypeError, RuntimeError) as error:
                text = re.sub(r"^(\w+)(?=[:=])", lambda m: flag(m[1]), str(error))
                raise ValueError(where + text) from error


def networks(cfg: Config, classes: tuple[str, ...], val: list[data.Tile]) -> None:
    """Both networks exist, take the crops and windows of this run, and have features where CAFD asks for them.

    On the meta device, where shapes are computed and numbers are not: no weight of a preset is made for this.
    """
    strides = {s: arm for arm in cfg.arms for s in arm_loss(arm, cfg.loss).compared}
    taps = {taps: arm for arm in cfg.arms if (taps := arm_loss(arm, cfg.loss).tapped)}
    built = []
    bands = val[0].bands
    fresh = models.Normalisation((0.0,) * bands, (1.0,) * bands)  # of a network of which only shapes are asked
    windows = sorted({tuple(math.ceil(min(cfg.window, n) / 32) * 32 for n in (t.height, t.width)) for t in val})
    for role, name in (("teacher", cfg.teacher), ("student", cfg.student)):
        trained = role == "student" or models.starts_afresh(name)
        try:
            if name in models.PRESETS:
                widths = partial(_widths_of_preset, name, classes, fresh)
            else:
                widths = partial(_widths, models.build(name, classes, role == "teacher", fresh).to("meta"))
        except data.DataError as error:
            raise data.DataError(f"--{role}: {error}") from error
        built.append(partial(_on_meta, name, classes, role == "teacher", fresh))
        batch = (cfg.batch, bands, cfg.crop, cfg.crop)
        asked: list[tuple[str, bool, tuple[int, ...]]] = [(f"--crop {cfg.crop}, --batch {cfg.batch}", trained, batch)]
        asked += [(f"--window {cfg.window}", False, (1, bands, *size)) for size in {windows[0], windows[-1]}]
        found = []
        for option, training, shape in asked:
            try:
                found.append(widths(training, shape))
            except (ValueError, RuntimeError) as error:
                if shape[0] == 1 and "more than 1 value per channel" in str(error):
                    why = "normalises over the batch, expected --batch 2 or more"
                else:
                    why = "cannot take such a batch"
                raise ValueError(f"{option}: {role} {name} {why} ({error})") from error
        side = asked[-1][2][-1]  # a multiple of 32, so that widths tell strides exactly
        have = sorted({round(side / width) for width in found[-1]})
        for stride, arm in sorted(strides.items()):
            # The nearest map is taken, so "about" the stride will do; another octave is another map.
            if not any(2**-0.5 < one / stride < 2**0.5 for one in have):
                there = ", ".join(map(str, have)) or "none"
                where = "--strides" if stride in cfg.loss.strides else f"--arms {arm}"
                raise ValueError(f"{where}: {role} {name} has no feature map at stride {stride}; it has: {there}")

    for names, arm in taps.items():
        where = "--taps" if names == cfg.loss.taps else f"--arms {arm}"
        try:
            teacher, student = (build() for build in built)
            pair(student, teacher, torch.empty(1, bands, cfg.crop, cfg.crop, device="meta"), (), names).remove()
        except NotImplementedError:  # as in _widths
            continue
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{where}: {error}") from error


def _on_meta(name: str, classes: tuple[str, ...], whole: bool, fresh: models.Normalisation) -> torch.nn.Module:
    with torch.device("meta" if name in models.PRESETS else "cpu"):
        return models.build(name, classes, whole, fresh).to("meta")


@cache
def _widths_of_preset(
    name: str, classes: tuple[str, ...], fresh: models.Normalisation, training: bool, shape: tuple[int, ...]
) -> list[int]:
    return _widths(_on_meta(name, classes, True, fresh), training, shape)


def _widths(model: torch.nn.Module, training: bool, shape: tuple[int, ...]) -> list[int]:
    """Widths of the feature maps of a batch of this shape, by a network on the meta device."""
    images = torch.empty(shape, device="meta")
    try:
        with torch.no_grad():
            return [one.shape[-1] for _, one in models.feature_maps(model.train(training), images)]
    except data.DataError:  # it has none to show, which matters where some are asked for
        models.forward(model, images)
        return []
    except NotImplementedError:  # an operation that the meta device does not know: nothing can be said beforehand
        return [max(1, shape[-1] // 2**k) for k in range(8)]
