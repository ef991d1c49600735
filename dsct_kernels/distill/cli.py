"""`dsct-distill`: one command from tiles to a distilled student."""

import argparse
import sys
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from .config import DEFAULTS, Config, Loss, arm_loss

INTERRUPTED = 130


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="dsct-distill",
        description="Train a teacher, a student alone and the student with DSCT, and compare the three.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    p.add_argument("--data", choices=tuple(DEFAULTS), help="embedded synthetic scenes, or the Dubai aerial set")
    p.add_argument("--root", metavar="DIR", help="folder of the data set")
    p.add_argument("--val-tiles", type=commas, metavar="A,B", help="tiles to validate on (default: every third)")
    p.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/DATE)")
    p.add_argument("--resume", type=Path, metavar="RUN", help="go on with an interrupted run; its own settings hold")
    p.add_argument("--teacher", metavar="NAME|DIR", help="preset to train, or a model folder that is used as it is")
    p.add_argument("--student", metavar="NAME|DIR", help="preset, or a model folder to start from")
    p.add_argument(
        "--arms",
        type=commas,
        metavar="A,B",
        help="students to train: alone, cafd, tnkd, dsct, dsct:temperature=4:beta=1",
    )
    p.add_argument("--no-pictures", dest="pictures", action="store_false", help="skip the PNGs")
    for f in fields(Loss):
        p.add_argument(flag(f.name), type=strides if f.name == "strides" else float, help=f"loss (default {f.default})")
    own = {"data", "root", "val_tiles", "teacher", "student", "arms", "pictures", "loss"}
    for f in fields(Config):
        if f.name not in own:
            kind = type(f.default)
            choices = {"precision": ("auto", "no", "bf16", "fp16"), "device": ("auto", "cpu", "cuda")}.get(f.name)
            p.add_argument(flag(f.name), type=kind, choices=choices, help=help_default(f.name, f.default))
    return p


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def commas(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def strides(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def help_default(name: str, default: Any) -> str:
    others = [f"{values[name]} for {data}" for data, values in DEFAULTS.items() if name in values]
    return f"default {default}" + (f", {', '.join(others)}" if others else "")


def config_from(given: dict[str, Any]) -> Config:
    """Class defaults, then the data set's, then what was typed."""
    values = {**DEFAULTS[given.get("data", "synthetic")], **given}
    names = {f.name for f in fields(Loss)}
    loss = replace(values.pop("loss", Loss()), **{k: values.pop(k) for k in names & set(values)})
    cfg = Config(**values, loss=loss)
    for arm in cfg.arms:
        arm_loss(arm, cfg.loss)
    return cfg


def main(argv: list[str] | None = None) -> int:
    typed = sys.argv[1:] if argv is None else argv
    if typed[:1] == ["compare"]:
        from . import compare

        return compare.main(typed[1:])
    p = parser()
    given = vars(p.parse_args(argv))
    resume, out = given.pop("resume", None), given.pop("out", None)
    if resume is not None:
        if given or out:
            p.error("--resume takes its settings from the run; give no others")
        if not (resume / "config.json").is_file():
            p.error(f"--resume {resume}: no config.json there, so it is no run folder")
        folder, cfg = resume, Config.load(resume / "config.json")
    else:
        folder = out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
        if any((folder / name).exists() for name in ("results.json", "checkpoint.pt")):
            p.error(f"--out {folder} holds a run already; go on with --resume {folder}, or name another folder")
        try:
            cfg = config_from(given)
        except ValueError as error:
            p.error(str(error))
    return run(cfg, folder)


def run(cfg: Config, folder: Path) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers.utils import logging

    from . import report
    from .data import DataError
    from .loop import Interrupted, Run

    logging.disable_progress_bar()
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    columns = (
        TextColumn("{task.description:>10}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    )  # fmt: skip
    try:
        with Progress(*columns, console=console) as progress:
            this = Run(cfg, folder, progress)
            this.stop_on_ctrl_c()
            train, val = this.train_pixels.tiles, this.val_pixels.tiles
            this.say(
                f"{cfg.data}: {len(train)} tiles to train on, {len(val)} to validate on "
                f"({', '.join(sorted({t.group for t in val}))}); {this.device}, {this.accelerator.mixed_precision}"
            )
            trained = this.all()
    except DataError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        return 2
    except Interrupted:
        console.print(f"interrupted; go on with: dsct-distill --resume {folder}", highlight=False, soft_wrap=True)
        return INTERRUPTED
    if this.main:
        this.close()
        if cfg.pictures:
            report.curves(folder)
            report.predictions(this, trained)
            report.attention(this, trained)
        console.print(report.table(this.results, this.classes, cfg.crop, cfg.batch))
        console.print(f"run folder: {folder}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
