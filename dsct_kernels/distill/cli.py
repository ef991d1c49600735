"""`dsct-distill`: one command from tiles to a distilled student."""

import argparse
import signal
import sys
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import check, data
from .config import CHOICES, DEFAULTS, MAY_CHANGE, Config, Loss, arm_loss, flag, phase_folder
from .files import DataError, only_writer
from .models import is_function

if TYPE_CHECKING:
    from .run import Run

INTERRUPTED, DIVERGED = 130, 3
DATA_HELP = "data set; `dsct-distill data` says what each is"
TEACHER_HELP = (
    "a preset, or a function that makes a torch.nn.Module of the number of classes, to be trained; "
    "or a model folder that is used as it is"
)
LOSS_HELP = {
    "strides": ": CAFD compares the deepest features of both networks at these",
    "taps": ": CAFD compares these features: auto, the deepest of equal or nearest stride, or "
    "student.module=teacher.module,...",
}
BANDS_HELP = "bands to read, for sets that have a choice: RGB, IRRG, RGBIR, or A,B,C of your own"
LABELS_HELP = "labels to read, for sets that have a choice: full, or eroded, without the boundaries"


class Parser(argparse.ArgumentParser):
    """Errors are one line, without the usage of fifty options before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def one_line(error: object) -> str:
    return " ".join(str(error).split())


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="dsct-distill",
        description="Train a teacher, a student alone and the student with DSCT, and compare the three.",
        epilog="Also: dsct-distill data (the table of data sets), dsct-distill check DATA --root DIR (what of it is "
        "on disk), dsct-distill compare (losses against each other), dsct-distill predict (a whole raster), "
        "dsct-distill export (a network to ship), dsct-distill report (the page of a run); each has --help.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    p.add_argument("--data", choices=tuple(DEFAULTS), help=DATA_HELP)
    p.add_argument("--root", metavar="DIR", help="folder of the data set")
    p.add_argument(
        "--val-tiles", type=commas, metavar="A,B", help="tiles to validate on (default: the set's own, or every third)"
    )
    p.add_argument("--bands", help=BANDS_HELP)
    p.add_argument("--labels", help=LABELS_HELP)
    p.add_argument(
        "--unlabelled",
        metavar="DIR",
        help="more images, without labels: students with a teacher learn from as many crops of these again, "
        "labelled by the teacher",
    )
    p.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/DATE)")
    anew = ", ".join(map(flag_of, MAY_CHANGE))
    p.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help=f"go on with an interrupted run under its own settings, of which these may be given anew: {anew}",
    )
    p.add_argument("--teacher", metavar="NAME|DIR|PACKAGE.MODULE:FUNCTION", help=TEACHER_HELP)
    p.add_argument("--student", metavar="NAME|DIR|...", help="the same; a folder is where it starts from")
    p.add_argument(
        "--arms",
        type=commas,
        metavar="A,B",
        help="students to train: alone, cafd, jaccard, tnkd, dsct, dsct:temperature=4:beta=1",
    )
    p.add_argument("--no-pictures", dest="pictures", action="store_false", help="skip the PNGs and report.html")
    p.add_argument("--compile-teacher", action="store_true", help="run the teacher through torch.compile")
    p.add_argument(
        "--deterministic", action="store_true", help="refuse operations whose results may differ from call to call"
    )
    for f in fields(Loss):
        parse: Any = {"strides": strides, "taps": commas}.get(f.name, float)
        p.add_argument(flag(f.name), type=parse, help=f"loss (default {f.default}){LOSS_HELP.get(f.name, '')}")
    own = {"data", "root", "val_tiles", "bands", "labels", "unlabelled", "teacher", "student", "arms", "loss"}
    own |= {"pictures", "compile_teacher", "deterministic"}
    for f in fields(Config):
        if f.name not in own:
            kind = type(f.default)
            p.add_argument(flag(f.name), type=kind, choices=CHOICES.get(f.name), help=help_default(f.name, f.default))
    return p


def flag_of(name: str) -> str:
    return "--no-pictures" if name == "pictures" else flag(name)


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


def corrected(cfg: Config, given: dict[str, Any]) -> Config:
    """A run under way with the settings that may change. Raises ValueError for another that differs."""
    loss = {f.name for f in fields(Loss)}
    for name, value in given.items():
        before = getattr(cfg.loss if name in loss else cfg, name)
        if value != before and name not in MAY_CHANGE:
            may = ", ".join(map(flag_of, MAY_CHANGE))
            raise ValueError(f"{flag(name)} cannot change in a run under way, which has {before!r}; these can: {may}")
    return replace(cfg, **{name: value for name, value in given.items() if name in MAY_CHANGE})


def main(argv: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file name need not be valid text
            stream.reconfigure(errors="backslashreplace")
    typed = sys.argv[1:] if argv is None else argv
    if typed[:1] == ["compare"]:
        from . import compare

        return compare.main(typed[1:])
    if typed[:1] == ["predict"]:
        from . import predict

        return predict.main(typed[1:])
    if typed[:1] == ["export"]:
        from . import export

        return export.main(typed[1:])
    if typed[:1] == ["report"]:
        from . import report

        return report.main(typed[1:])
    if typed[:1] == ["data"] or typed[:1] == ["check"]:
        from .datasets import check as data_check

        return (data_check.table_main if typed[0] == "data" else data_check.main)(typed[1:])
    p = parser()
    given = vars(p.parse_args(argv))
    resume, out = given.pop("resume", None), given.pop("out", None)
    where = ""
    try:
        if resume is not None:
            if out is not None:
                p.error(f"--out {out}: a run that goes on stays in its folder, --resume {resume}")
            if not (resume / "config.json").is_file():
                p.error(f"--resume {resume}: no config.json there, so it is no run folder")
            folder, saved = resume, Config.load(resume / "config.json")
            where = f"{resume / 'config.json'}: "
            check.settings(saved)
            where = f"--resume {resume}: "
            for role in ("teacher", "student"):
                name = getattr(saved, role)
                if is_function(name) and role not in given:  # a folder has nothing called, whatever it says
                    p.error(f"{where}its {role} comes of {name}, which is called only where typed: add --{role} {name}")
            cfg = corrected(saved, given)
        else:
            folder = out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
            cfg = config_from(given)
        check.settings(cfg)
        if resume is None:
            for name in ("results.json", "checkpoint.pt", *map(phase_folder, ("teacher", *cfg.arms))):
                if (folder / name).exists():
                    p.error(f"--out {folder} holds a run already ({name}); go on with --resume {folder}, "
                            "or name another folder")  # fmt: skip
    except ValueError as error:
        p.error(where + str(error))
    except DataError as error:
        return failed(error)
    return run(cfg, folder)


def stop_on_ctrl_c(run: "Run") -> None:
    """The first Ctrl-C stops after the step under way; a second one kills at once."""

    def handler(_signal: int, _frame: Any) -> None:
        run.stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run.log.say("stopping after this step, checkpoint follows (Ctrl-C again: stop at once)")

    signal.signal(signal.SIGINT, handler)


def failed(error: Exception) -> int:
    print(f"error: {one_line(error)}", file=sys.stderr)
    return 2


def run(cfg: Config, folder: Path) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers.utils import logging

    from . import report
    from .engine import make_accelerator
    from .loop import Interrupted
    from .run import Run

    logging.disable_progress_bar()
    text: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}  # a path is text, whatever it holds
    console = Console(**text)
    if not console.is_terminal:
        console = Console(width=140, **text)
    columns = (
        TextColumn("{task.description:>10}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[losses]}", markup=False),
    )  # fmt: skip
    try:
        check.everything(cfg)
    except (DataError, ValueError) as error:
        return failed(error)
    try:
        pixels = data.load_pixels(cfg, make_accelerator(cfg).device)
        with only_writer(folder):
            with Progress(*columns, console=console) as progress:
                this = Run(cfg, folder, progress, pixels)
                stop_on_ctrl_c(this)
                train, val = this.train_pixels.tiles, this.val_pixels.tiles
                this.log.say(
                    f"{cfg.data}: {len(train)} tiles to train on, {len(val)} to validate on "
                    f"({', '.join(sorted({t.group for t in val}))}); {this.device}, {this.accelerator.mixed_precision}"
                )
                this.all()
            if this.main:
                this.log.close()
                if cfg.pictures:
                    this.log.warnings += report.of_run(folder, cfg.root, cfg.device)
                console.print(report.table(this.results, this.classes, cfg.crop, cfg.batch))
                console.print(f"run folder: {folder}", soft_wrap=True)
    except (DataError, OSError) as error:  # a full disk, a folder that may not be written
        return failed(error)
    except Interrupted:
        console.print(f"interrupted; go on with: dsct-distill --resume {folder}", soft_wrap=True)
        return INTERRUPTED
    for warning in this.log.warnings:
        print(f"WARNING: {warning}", file=sys.stderr)
    return DIVERGED if any(result.get("diverged") for result in this.results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
