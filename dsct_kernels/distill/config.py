"""Every knob of a run, with the defaults of each data set; saved as config.json in the run folder."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from .datasets import REGISTRY
from .files import DataError, read_json, write_json


@dataclass(frozen=True)
class Loss:
    """Arguments of `dsct_loss`, with its defaults, and the features that CAFD matches: at strides, or by taps ("auto",
    or "student.module=teacher.module" each). None by default."""

    ce_weight: float = 1.0
    matched_weight: float = 3.0
    jaccard_weight: float = 3.0
    tnkd_weight: float = 0.0
    cafd_weight: float = 1.0
    matched_temperature: float = 4.0
    alpha: float = 1.0
    beta: float = 0.5
    temperature: float = 1.0
    channel_temperature: float = 1.0
    spatial_temperature: float = 1.0
    strides: tuple[int, ...] = ()
    taps: tuple[str, ...] = ()

    @property
    def teaches(self) -> bool:
        """Whether anything is learnt from the teacher."""
        return bool(self.matched_weight or self.jaccard_weight or self.tnkd_weight or self.compared or self.tapped)

    @property
    def compared(self) -> tuple[int, ...]:
        """Strides of the features that are compared."""
        return self.strides if self.cafd_weight > 0 else ()

    @property
    def tapped(self) -> tuple[str, ...]:
        """Taps of the features that are compared."""
        return self.taps if self.cafd_weight > 0 else ()

    def warmed(self, factor: float) -> "Loss":
        """With this much of the weight of all that is learnt from the teacher."""
        weights = ("matched_weight", "jaccard_weight", "tnkd_weight", "cafd_weight")
        return self if factor == 1 else replace(self, **{name: factor * getattr(self, name) for name in weights})


@dataclass(frozen=True)
class Config:
    data: str = "synthetic"
    root: str | None = None
    val_tiles: tuple[str, ...] | None = None
    bands: str | None = None
    labels: str | None = None
    unlabelled: str | None = None
    unlabelled_weight: float = 1.0
    teacher: str = "segformer-tiny"
    student: str = "upernet-tiny"
    teacher_dtype: str = "auto"
    compile_teacher: bool = False
    arms: tuple[str, ...] = ("alone", "dsct")
    loss: Loss = Loss()
    seed: int = 0
    teacher_seed: int = 0
    crop: int = 128
    batch: int = 8
    teacher_steps: int = 1200
    student_steps: int = 300
    teacher_lr: float = 1e-3
    student_lr: float = 3e-3
    schedule: str = "cosine"
    power: float = 0.9
    weight_decay: float = 0.01
    ema: float = 0.0
    distill_warmup: float = 0.0
    accumulate: int = 1
    parallel: str = "ddp"
    deterministic: bool = False
    scale_jitter: float = 0.0
    colour_jitter: float = 0.1
    scenes: int = 24
    scene_size: int = 384
    downscale: int = 1
    window: int = 256
    cache_mb: float = 4096
    precision: str = "auto"
    device: str = "auto"
    backend: str = "auto"
    log_every: int = 10
    eval_every: int = 0
    checkpoint_every: int = 200
    keep: int = 1
    pictures: bool = True

    def budget(self, arm: "Arm") -> tuple[int, float, int]:
        """Steps, highest learning rate and seed: every student has the same first weights and the same crops."""
        if arm.is_teacher:
            return self.teacher_steps, self.teacher_lr, self.teacher_seed
        return self.student_steps, self.student_lr, self.seed

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))

    @staticmethod
    def load(path: Path) -> "Config":
        """What `save` wrote. Values are for `check.settings` to judge, here it is only the shape that counts."""
        saved = {**LATER, **read_json(path)}
        _same_keys(path, "", saved, Config)
        if not isinstance(saved["loss"], dict):
            raise DataError(f"{path}: loss: expected an object, got {saved['loss']!r}")
        saved["loss"] = {"taps": (), **saved["loss"]}  # which earlier versions lack
        _same_keys(path, "loss.", saved["loss"], Loss)
        loss = Loss(**_tuples(saved.pop("loss")))
        return Config(**_tuples(saved), loss=loss)


def _tuples(saved: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}


def _same_keys(path: Path, prefix: str, saved: dict[str, Any], kind: type[Any]) -> None:
    expected = [f.name for f in fields(kind)]
    for name in expected:
        if name not in saved:
            raise DataError(f"{path}: the setting {prefix}{name} is missing")
    for name in saved:
        if name not in expected:
            raise DataError(f"{path}: unknown setting {prefix + name!r}")


# Settings that run folders of earlier versions lack, with what those runs had.
LATER = {
    "bands": None,
    "labels": None,
    "unlabelled": None,
    "unlabelled_weight": 1.0,
    "teacher_dtype": "auto",
    "compile_teacher": False,
    "schedule": "cosine",
    "power": 0.9,
    "ema": 0.0,
    "distill_warmup": 0.0,
    "accumulate": 1,
    "parallel": "ddp",
    "deterministic": False,
    "keep": 1,
}

# What differs from the class defaults above, per data set.
DEFAULTS: dict[str, dict[str, Any]] = {name: dict(one.defaults) for name, one in REGISTRY.items()}

CHOICES = {
    "precision": ("auto", "no", "bf16", "fp16"),
    "teacher_dtype": ("auto", "float32", "bfloat16", "float16"),
    "device": ("auto", "cpu", "cuda"),
    "backend": ("auto", "reference", "native", "triton"),
    "schedule": ("cosine", "poly"),
    "parallel": ("ddp", "fsdp"),
}

# What a run under way may change, since no number depends on it.
MAY_CHANGE = (
    "device",
    "backend",
    "pictures",
    "root",
    "cache_mb",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep",
)

ARMS: dict[str, dict[str, Any]] = {
    "alone": {"matched_weight": 0.0, "jaccard_weight": 0.0, "tnkd_weight": 0.0, "cafd_weight": 0.0},
    "cafd": {"jaccard_weight": 0.0, "tnkd_weight": 0.0},
    "jaccard": {"matched_weight": 0.0, "tnkd_weight": 0.0, "cafd_weight": 0.0},
    "tnkd": {"matched_weight": 0.0, "jaccard_weight": 0.0, "cafd_weight": 0.0},
    "dsct": {},
}


LISTS: dict[str, Callable[[str], tuple[Any, ...]]] = {
    "strides": lambda text: tuple(int(part) for part in text.split("+")),
    "taps": lambda text: tuple(text.split("+")),
}


@dataclass(frozen=True)
class Arm:
    """One network of a run and what it learns by."""

    phase: str  # as it was typed, and as results.json has it
    name: str  # `teacher`, or which of ARMS
    loss: Loss

    @property
    def is_teacher(self) -> bool:
        return self.name == "teacher"

    @property
    def taught(self) -> bool:
        """Whether a teacher has a part in its loss, which else is cross-entropy."""
        return self.loss.teaches

    @property
    def folder(self) -> str:
        return phase_folder(self.phase)

    @staticmethod
    def teacher(base: Loss) -> "Arm":
        return Arm("teacher", "teacher", replace(base, **ARMS["alone"]))

    @staticmethod
    def parse(text: str, base: Loss) -> "Arm":
        """A student: `dsct`, or with changes for a search, `dsct:temperature=4:strides=16+32`."""
        name, *changes = text.split(":")
        if name not in ARMS:
            raise ValueError(f"--arms {text}: {name!r} is not one of {', '.join(ARMS)}")
        loss = replace(base, **ARMS[name])
        if name == "tnkd" and loss.tnkd_weight == 0:  # its default: an arm of its name has it all the same
            loss = replace(loss, tnkd_weight=1.0)
        for change in changes:
            key, _, value = change.partition("=")
            if key not in {f.name for f in fields(Loss)}:
                raise ValueError(
                    f"--arms {text}: no loss setting {key!r}; there are: {', '.join(f.name for f in fields(Loss))}"
                )
            try:
                parsed: Any = LISTS[key](value) if key in LISTS else float(value)
            except ValueError as error:
                expected = "whole numbers joined by +" if key in LISTS else "a number"
                raise ValueError(f"--arms {text}: {key}: expected {expected}, got {value!r}") from error
            loss = replace(loss, **{key: parsed})
        return Arm(text, name, loss)


def arm_loss(arm: str, base: Loss) -> Loss:
    return Arm.parse(arm, base).loss


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def phase_folder(phase: str) -> str:
    return "teacher" if phase == "teacher" else "student-" + phase.replace(":", "_").replace("=", "")
