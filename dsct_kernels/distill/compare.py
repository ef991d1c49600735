"""`dsct-distill compare`: does a loss help, and does it beat the others? Methods x folds x seeds, one table.

Every method trains the same student from the same weights on the same crops for the same number of steps. The teacher
is trained once per fold, and what it says of the crops of a seed is kept, so that a method with a teacher costs little
more than the student alone. Every finished run is a line of `runs.jsonl` in the output folder under all the settings
it depends on: the same command again, or a larger one, does only what is missing.
"""

import argparse
import json
import math
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import check as settings_check
from . import models
from .config import DEFAULTS, Config, flag
from .data import classes_of
from .datasets import tiles_of
from .files import DataError, only_writer, replace_file
from .methods import ANNEAL, TERMS, Objective, method, method_settings
from .pictures import save
from .table import Rows, chart, table
from .trial import FOLDS, Job, ask_teacher, build, run, train_teacher

TEACHER_PRESETS = ("efficientnet-lite0", *models.PRESETS)


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
        f"setting. unlabelled+METHOD (weight=1.0): see --labelled. {terms}. anneal: {', '.join(ANNEAL)}.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the runs of any teachers, students and steps, a table and a chart for each; again: it goes on",
    )
    p.add_argument(
        "--methods", type=commas, default=DEFAULT_METHODS, metavar="A,B", help=f"default {','.join(DEFAULT_METHODS)}"
    )
    p.add_argument(
        "--against", type=commas, default=("alone",), metavar="A,B", help="methods the others are set against"
    )
    p.add_argument("--folds", type=numbers, default=(0, 1, 2), help="of 0,1,2: every third tile group is held out")
    p.add_argument("--seeds", type=numbers, default=(0, 1, 2), metavar="A,B", help="default 0,1,2")
    p.add_argument(
        "--labelled",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="share of the training images whose labels anybody sees, the teacher too (1); methods that start with "
        "unlabelled+ learn from as many crops again of the other images, labelled by the teacher",
    )
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
OWN = ("out", "methods", "against", "folds", "seeds", "labelled", "strides", "jobs", "threads", "minutes")
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
    if not 0 < own.labelled <= 1:
        raise ValueError(f"--labelled: expected a share above 0 and up to 1, got {own.labelled}")
    chosen = {name: method(name) for name in own.methods}
    without = next((name for name, m in chosen.items() if m.unlabelled and own.labelled == 1), None)
    if without is not None:
        raise ValueError(f"--methods: {without!r} needs images without labels; say with --labelled how many have some")
    same = {(m.parts, m.balance, m.unlabelled): name for name, m in chosen.items()}
    for name, m in chosen.items():
        if same[m.parts, m.balance, m.unlabelled] != name:
            raise ValueError(f"--methods: {name!r} and {same[m.parts, m.balance, m.unlabelled]!r} are the same")
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
    own = argparse.Namespace(**{k: given.pop(k) for k in OWN})
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
    from .report import of_comparison

    file = own.out / "runs.jsonl"
    jobs = [
        Job(replace(cfg, val_tiles=folds[fold], seed=seed), text, strides_read(own), own.out, own.labelled)
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
        # One job asks for all that the methods of its seed read.
        answers = {job.answers_file(): job for job in sorted(taught, key=lambda job: len(job.answers_files()))}
        unasked = [job for job in answers.values() if not all(path.is_file() for path in job.answers_files())]
        workers.carry_out("answers", ask_teacher, [job for job in unasked if job.teacher_file.is_file()])
        workers.carry_out("run", run, [job for job in todo if all(path.is_file() for path in job.answers_files())])
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
        parts = ("comparison", cfg.teacher, cfg.student, str(cfg.student_steps))
        name = "-".join(re.sub(r"[^A-Za-z0-9.-]+", "-", part) for part in parts)
        if own.labelled < 1:
            name += f"-labelled-{own.labelled:g}"
        replace_file(own.out / f"{name}.md", f"{text}\n`{command}`\n".encode())
        figure = chart(rows, list(own.methods), own.against[0])
        if figure is not None:
            save(figure, own.out / f"{name}.png", 110)
        of_comparison(own.out)
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
