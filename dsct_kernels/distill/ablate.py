"""Which part of the loss helps, and by how much: folds x seeds x arms, several processes at a time.

`python -m dsct_kernels.distill.ablate --data dubai --root DIR --seeds 3 --out DIR` trains one teacher per fold, then
every arm with every seed on every fold. All else that `dsct-distill` takes is taken too. Every result is written when
its run ends, and the same command again does only what is missing.
"""

import multiprocessing
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from . import check, data, models
from .cli import Parser, config_from, failed, one_line, parser
from .config import Config, phase_folder
from .files import DataError, only_writer, replace_file, write_json

FOLDS = 3


def folds_of(cfg: Config) -> list[tuple[str, ...]]:
    """Validation groups of each fold: every third group, starting at the first, second and third."""
    from .loop import load_tiles

    groups = sorted({tile.group for tile in load_tiles(cfg)})
    return [tuple(groups[k::FOLDS]) for k in range(FOLDS)]


def pixel_config(cfg: Config) -> Config:
    """The settings that pixels depend on, so that a worker decodes a fold's tiles once."""
    kept = ("data", "root", "val_tiles", "cache_mb", "scenes", "scene_size", "downscale", "device", "precision")
    return replace(Config(), **{name: getattr(cfg, name) for name in kept})


@lru_cache(maxsize=FOLDS)
def _pixels(cfg: Config) -> "tuple[data.Pixels, data.Pixels]":
    from .loop import load_pixels, make_accelerator

    return load_pixels(cfg, make_accelerator(cfg).device)


def run_one(job: "Job", threads: int) -> dict[str, Any]:
    """One training in a worker process. A run cut short goes on from its checkpoint."""
    import torch
    from transformers.utils import logging

    from .loop import Run

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    started = time.perf_counter()
    pixels = _pixels(pixel_config(job.cfg))
    with only_writer(job.folder):
        run = Run(job.cfg, job.folder, pixels=pixels)
        if job.arm not in run.results:
            teacher = None
            if job.arm not in ("teacher", "alone"):
                teacher = models.load(job.teacher, run.classes).to(run.device)
            run.phase(job.arm, teacher)
            run.close()
    return {**run.results[job.arm], "seconds": round(time.perf_counter() - started, 1)}


@dataclass(frozen=True)
class Job:
    fold: str
    arm: str
    seed: int
    cfg: Config
    folder: Path
    teacher: Path


def jobs_of(cfg: Config, out: Path, folds: list[tuple[str, ...]], seeds: int, teachers: Path | None) -> list[Job]:
    """The teachers, then a whole seed of everything before the next seed."""
    jobs = []
    for fold in folds:
        name = "+".join(fold).replace(" ", "-")
        here = replace(cfg, val_tiles=fold, pictures=False)
        teacher = (teachers or out) / name / "teacher"
        if cfg.teacher not in models.PRESETS:
            teacher = Path(cfg.teacher)
        elif not (teacher / "config.json").is_file():
            teacher = out / name / "teacher"
        if teacher.parent == out / name:
            jobs.append(Job(name, "teacher", -1, here, out / name, teacher))
        for seed in range(seeds):
            for arm in cfg.arms:
                folder = out / name / f"{phase_folder(arm)}-seed{seed}"
                jobs.append(Job(name, arm, seed, replace(here, seed=seed, arms=(arm,)), folder, teacher))
    return sorted(jobs, key=lambda job: job.seed)


def summary(rows: list[dict[str, Any]], arms: tuple[str, ...]) -> str:
    """Markdown: mean and spread of mIoU per arm, and the paired difference to the student alone."""
    score = {(r["arm"], r["fold"], r["seed"]): r["miou"] for r in rows if r["miou"] is not None}
    folds = sorted({r["fold"] for r in rows})
    lines = ["| | " + " | ".join(folds) + " | mean mIoU | spread over seeds | against alone | better in |"]
    lines.append("| --- |" + " --- |" * (len(folds) + 4))
    for arm in ("teacher", *arms):
        mine = {key[1:]: v for key, v in score.items() if key[0] == arm}
        if not mine:
            continue
        cells = []
        for fold in folds:
            values = [f"{v:.3f}" for (f, _), v in sorted(mine.items()) if f == fold]
            cells.append(" ".join(values) or "-")
        seeds = sorted({seed for _, seed in mine})
        per_seed = [[v for (_, s), v in mine.items() if s == seed] for seed in seeds]
        whole = [statistics.fmean(v) for v in per_seed if len(v) == len(folds)]
        spread = f"{statistics.stdev(whole):.3f}" if len(whole) > 1 else "-"
        paired = [v - score[("alone", *key)] for key, v in mine.items() if ("alone", *key) in score]
        against, better = "-", "-"
        if arm not in ("teacher", "alone") and paired:
            error = statistics.stdev(paired) / len(paired) ** 0.5 if len(paired) > 1 else float("nan")
            against = f"{statistics.fmean(paired):+.4f} ± {error:.4f}"
            better = f"{sum(d > 0 for d in paired)} of {len(paired)}"
        mean = statistics.fmean(mine.values())
        lines.append(f"| {arm} | {' | '.join(cells)} | {mean:.4f} | {spread} | {against} | {better} |")
    note = (
        "\nCells: mIoU per seed. Against alone: mean paired difference (same fold, same seed) and its standard error."
    )
    return "\n".join(lines) + "\n" + note + "\n"


def write(out: Path, rows: list[dict[str, Any]], cfg: Config, command: list[str]) -> None:
    write_json(out / "ablation.json", {"command": command, "config": asdict(cfg), "runs": rows}, indent=1)
    replace_file(out / "ablation.md", summary(rows, cfg.arms).encode())


def check_own(own: Any, given: dict[str, Any]) -> None:
    for name in ("seeds", "jobs", "threads"):
        if getattr(own, name) < 1:
            raise ValueError(f"--{name}: expected a whole number >= 1, got {getattr(own, name)}")
    if not own.minutes > 0:
        raise ValueError(f"--minutes: expected a number > 0, got {own.minutes}")
    if len(set(own.folds)) != len(own.folds) or not set(own.folds) <= set(range(FOLDS)):
        raise ValueError(f"--folds: expected some of 0,1,2, each once, got {','.join(map(str, own.folds))}")
    if own.teachers is not None and not own.teachers.is_dir():
        raise ValueError(f"--teachers {own.teachers}: no such folder")
    for name in ("resume", "val_tiles"):
        if name in given:
            raise ValueError(f"--{name.replace('_', '-')}: not for an ablation, which goes by itself over its folds")


def main(argv: list[str] | None = None) -> int:
    p = Parser(prog="python -m dsct_kernels.distill.ablate", description=__doc__, allow_abbrev=False)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--jobs", type=int, default=1, help="processes at a time; they share the GPU or the cores")
    p.add_argument("--folds", type=lambda s: [int(k) for k in s.split(",")], default=[0], help="of 0,1,2")
    p.add_argument("--teachers", type=Path, help="an earlier --out whose teachers are used where a fold has one")
    p.add_argument("--minutes", type=float, default=float("inf"), help="stop then; the same command later goes on")
    p.add_argument("--threads", type=int, default=1, help="CPU threads per process")
    own, rest = p.parse_known_args(argv)
    given = vars(parser().parse_args(rest))
    given.setdefault("arms", ("alone", "cafd", "tnkd", "dsct"))
    try:
        check_own(own, given)
        cfg = config_from(given)
        check.settings(cfg)
        folds = [folds_of(cfg)[k] for k in own.folds]
        for fold in folds:
            if not fold:
                raise ValueError(f"--folds: too few groups of tiles for {FOLDS} folds, one would be empty")
            check.everything(replace(cfg, val_tiles=fold))
        with only_writer(own.out):
            return ablate(own, cfg, folds, argv)
    except (DataError, ValueError) as error:
        return failed(error)


def ablate(own: Any, cfg: Config, folds: list[tuple[str, ...]], argv: list[str] | None) -> int:
    todo = jobs_of(cfg, own.out, folds, own.seeds, own.teachers)
    trained = {job.teacher for job in todo} - {job.teacher for job in todo if job.arm == "teacher"}
    command = ["python", "-m", "dsct_kernels.distill.ablate", *(argv if argv is not None else sys.argv[1:])]
    rows: list[dict[str, Any]] = []
    running: list[tuple[Job, Any]] = []
    failed = 0
    started = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(own.jobs) as pool:
        while (todo or running) and time.perf_counter() - started < 60 * own.minutes:
            for job in [job for job in todo if job.arm in ("teacher", "alone") or job.teacher in trained]:
                todo.remove(job)
                running.append((job, pool.apply_async(run_one, (job, own.threads))))
            for job, result in [(job, result) for job, result in running if result.ready()]:
                running.remove((job, result))
                head = f"[{time.perf_counter() - started:4.0f} s] {job.fold} {job.arm} seed {job.seed}:"
                try:
                    value = result.get()
                except Exception as error:
                    failed += 1
                    print(f"{head} FAILED: {type(error).__name__}: {one_line(error)}", flush=True)
                    if job.arm == "teacher":
                        todo = [other for other in todo if other.teacher != job.teacher]
                    continue
                if job.arm == "teacher":
                    trained.add(job.teacher)
                rows.append({"fold": job.fold, "arm": job.arm, "seed": job.seed, **value})
                write(own.out, rows, cfg, command)
                score = "no mIoU" if value["miou"] is None else f"mIoU {value['miou']:.4f}"
                print(f"{head} {score} in {value['seconds']:.0f} s", flush=True)
            time.sleep(0.1)
    if todo or running:
        print(f"stopped after {own.minutes} minutes with {len(todo) + len(running)} runs to go")
    print((own.out / "ablation.md").read_text() if rows else "no run finished")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
