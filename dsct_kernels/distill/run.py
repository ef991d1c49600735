"""The run: train the teacher, train the student once per arm with everything else the same, evaluate, report.

A run folder holds all there is to go on from: config.json, one model folder per finished phase, results.json,
metrics.jsonl and, while a phase is under way, checkpoint.pt; with --eval-every also the best network of each phase on
the way, PHASE-best. What trains is `loop.train`.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from . import card, checkpoint, data, evaluate, loop, models
from .config import Arm, Config
from .engine import Training, deterministic_or_refused, make_accelerator, seed_everything
from .files import write_json
from .log import Log


class Run:
    """One run folder on one set of tiles: training and validation `pixels`, read as `cfg` says where not given."""

    def __init__(self, cfg: Config, folder: Path, progress: Any = None, pixels: data.TrainAndVal | None = None):
        self.folder = folder
        self.accelerator = make_accelerator(cfg)
        # As it was decided: a run that goes on elsewhere keeps its precision.
        self.cfg = replace(cfg, precision=str(self.accelerator.mixed_precision))
        self.arms = [Arm.teacher(cfg.loss), *(Arm.parse(arm, cfg.loss) for arm in cfg.arms)]
        self.device = self.accelerator.device
        self.main = self.accelerator.is_main_process
        self.classes, self.palette = data.classes_of(cfg)
        self.train_pixels, self.val_pixels = pixels or data.load_pixels(cfg, self.device)
        self.normalisation = self.train_pixels.normalisation
        self.unlabelled = data.unlabelled_pixels(cfg, self.train_pixels, self.device)
        self.teacher_cost: dict[str, float] = {}  # of the phase just trained
        self.stop = False  # set by Ctrl-C, looked at between two steps
        self.checkpoint = folder / "checkpoint.pt"
        # Everything is read before anything is written.
        steps = {arm.phase: cfg.budget(arm)[0] for arm in self.arms}
        self.saved = checkpoint.read(self.checkpoint, steps, self.accelerator.num_processes)
        self.best: float | None = None  # mIoU of the phase under way
        self.kept = 0  # step of the checkpoint that is there
        self.results = checkpoint.read_results(folder / "results.json", self.phases(), len(self.classes))
        self.log = Log(folder, self.main, progress, cfg.log_every)
        if self.main:
            folder.mkdir(parents=True, exist_ok=True)
            self.cfg.save(folder / "config.json")
            self.log.mend()

    def phases(self) -> list[str]:
        return [arm.phase for arm in self.arms]

    def all(self) -> dict[str, nn.Module]:
        """Every phase in turn; phases that an earlier process finished are read from their folders."""
        trained: dict[str, nn.Module] = {}
        for arm in self.arms:
            trained[arm.phase] = self.phase(arm, trained.get("teacher"))
        if self.main:
            checkpoint.remove(self.checkpoint)  # a kill may have left the last phase's, after its results were written
        return trained

    def phase(self, arm: Arm, teacher: nn.Module | None) -> nn.Module:
        """One network: read, if it is done, else trained and evaluated."""
        cfg, folder = self.cfg, self.folder / arm.folder
        name = cfg.teacher if arm.is_teacher else cfg.student
        if arm.phase in self.results:
            return models.finished(name, folder, self.classes, self.normalisation).to(self.device)
        seed_everything(seed := cfg.budget(arm)[2])
        model = models.build(name, self.classes, arm.is_teacher, self.normalisation).to(self.device)
        started = time.perf_counter()
        if not arm.is_teacher or models.starts_afresh(name):  # a teacher loaded from a folder is ready
            seed_everything((seed + self.accelerator.process_index) % 2**32)  # dropout differs from process to process
            with deterministic_or_refused(cfg):
                model = loop.train(self, arm, model, teacher if arm.taught else None)
        self.finish(arm, model, time.perf_counter() - started)
        return model

    def finish(self, arm: Arm, model: nn.Module, seconds: float) -> None:
        diverged = arm.phase in self.log.diverged
        result, warning = evaluate.final(arm, self.scores(model), model, self.cfg, self.device, diverged)
        if warning:
            self.log.warn(warning)
        if self.cfg.eval_every:
            result["best_miou"] = self.keep_best(arm, model, result["miou"])
        result |= {"train_seconds": round(seconds, 1), **self.teacher_cost}
        self.teacher_cost = {}
        self.results[arm.phase] = result
        if self.main:
            self.keep(model, self.folder / arm.folder)
            write_json(self.folder / "results.json", self.results)
            checkpoint.remove(self.checkpoint)
        self.saved = None
        score = "no mIoU" if result["miou"] is None else f"mIoU {result['miou']:.3f}"
        self.log.say(f"{arm.phase}: {score} in {seconds:.0f} s")

    def scores(self, model: nn.Module) -> dict[str, Any]:
        return evaluate.scores(self.accelerator, model, self.val_pixels, self.cfg, len(self.classes))

    def look(self, arm: Arm, step: int, model: nn.Module) -> None:
        """Evaluate a network on the way."""
        miou = self.scores(model)["miou"]
        self.log.record(arm.phase, step, {"miou": miou})
        self.keep_best(arm, model, miou)

    def keep_best(self, arm: Arm, model: nn.Module, miou: float | None) -> float | None:
        """The best mIoU of the phase so far; the network it belongs to lies in PHASE-best."""
        if miou is not None and (self.best is None or miou > self.best):
            self.best = miou
            if self.main:
                self.keep(model, self.folder / f"{arm.folder}-best")
        return self.best

    def keep(self, model: nn.Module, folder: Path) -> None:
        """A network, and what it has to be known by where it is used."""
        models.save(model, folder)
        card.write(folder, card.of_run(self.cfg, self.val_pixels.tiles[0]))

    def save(self, arm: Arm, step: int, training: Training, sums: torch.Tensor) -> None:
        """Everything the next step depends on, of every process, in one file."""
        state = {"phase": arm.phase, "step": step, "sums": sums, "best": self.best, **training.state()}
        state["rng"] = gather_object([checkpoint.rng_state()])
        if self.main:
            state["metrics_bytes"] = self.log.size()
            checkpoint.write(self.checkpoint, state, self.kept, self.cfg.keep)
        self.kept = step

    def restore(self, arm: Arm, training: Training) -> tuple[int, torch.Tensor]:
        """Step to start at and the loss sums of an unfinished log line."""
        saved = self.saved if self.saved and self.saved["phase"] == arm.phase else None
        sums = loop.no_sums(self.device)
        if saved is None and self.main:
            checkpoint.remove(self.checkpoint)  # a kill may have left those of the phase before
        if saved is not None:
            with checkpoint.must_fit(self.checkpoint):
                training.load(saved)
                sums = saved["sums"].to(self.device).reshape(sums.shape)
                checkpoint.set_rng_state(saved["rng"][self.accelerator.process_index])
        self.best = saved["best"] if saved else None
        self.kept, logged = (saved["step"], saved["metrics_bytes"]) if saved else (0, None)
        self.log.start(arm, self.kept, self.cfg.budget(arm)[0], logged)
        return self.kept, sums

    def should_stop(self) -> bool:
        """Whether any process was asked to."""
        if self.accelerator.num_processes == 1:
            return self.stop
        return bool(self.accelerator.reduce(torch.tensor(float(self.stop), device=self.device), "sum") > 0)
