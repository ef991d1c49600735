"""Every knob of a run, with the defaults of each data set; saved as config.json in the run folder."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Loss:
    """Arguments of `dsct_loss`, and the strides at which CAFD matches features."""

    ce_weight: float = 1.0
    tnkd_weight: float = 1.0
    cafd_weight: float = 1.0
    alpha: float = 1.0
    beta: float = 0.5
    temperature: float = 1.0
    channel_temperature: float = 1.0
    spatial_temperature: float = 1.0
    strides: tuple[int, ...] = (16, 32)


@dataclass(frozen=True)
class Config:
    data: str = "synthetic"
    root: str | None = None
    val_tiles: tuple[str, ...] | None = None
    teacher: str = "segformer-tiny"
    student: str = "upernet-tiny"
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
    weight_decay: float = 0.01
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
    pictures: bool = True

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def load(path: Path) -> "Config":
        saved: dict[str, Any] = json.loads(path.read_text())
        saved = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
        loss: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.pop("loss").items()}
        return Config(**saved, loss=Loss(**loss))


# What differs from the class defaults above, per data set.
DEFAULTS: dict[str, dict[str, Any]] = {
    "synthetic": {"tnkd_weight": 3.0},
    "dubai": {
        "teacher": "segformer-b0",
        "student": "upernet-small",
        "crop": 256,
        "batch": 16,
        "teacher_steps": 4000,
        "student_steps": 1500,
        "teacher_lr": 6e-4,
        "student_lr": 2e-3,
        "scale_jitter": 0.5,
        "colour_jitter": 0.15,
        "window": 512,
        "log_every": 50,
        "checkpoint_every": 500,
    },
}

ARMS: dict[str, dict[str, Any]] = {
    "alone": {"tnkd_weight": 0.0, "cafd_weight": 0.0},
    "cafd": {"tnkd_weight": 0.0},
    "tnkd": {"cafd_weight": 0.0},
    "dsct": {},
}


def arm_loss(arm: str, base: Loss) -> Loss:
    """`dsct`, or with changes for a search: `dsct:temperature=4:strides=16+32`."""
    name, *changes = arm.split(":")
    if name not in ARMS:
        raise ValueError(f"arm {arm!r}: {name!r} is not one of {', '.join(ARMS)}")
    loss = replace(base, **ARMS[name])
    for change in changes:
        key, _, value = change.partition("=")
        if key not in {f.name for f in fields(Loss)}:
            raise ValueError(
                f"arm {arm!r}: no loss setting {key!r}; there are: {', '.join(f.name for f in fields(Loss))}"
            )
        parsed: Any = tuple(map(int, value.split("+"))) if key == "strides" else float(value)
        loss = replace(loss, **{key: parsed})
    return loss


def phase_folder(phase: str) -> str:
    return "teacher" if phase == "teacher" else "student-" + phase.replace(":", "_").replace("=", "")
