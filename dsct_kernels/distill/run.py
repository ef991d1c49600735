"""The run: train the teacher, train the student once per arm with everything else the same, evaluate, report.

A run folder holds all there is to go on from: config.json, one model folder per finished phase, results.json,
metrics.jsonl and, while a phase is under way, checkpoint.pt. What trains is `loop.train`.
"""

import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checkpoint, data, evaluate, loop, models
from .config import Arm, Config
from .engine import Training, make_accelerator, seed_everything
from .files import write_json
from .log import Log


class Run:
    """One run folder on one set of tiles."""

    def __init__(
        self,
        cfg: Config,
        folder: Path,
        progress: Any = None,
        pixels: tuple[data.Pixels, data.Pixels] | None = None,
    ):
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
        self.teacher_cost: dict[str, float] = {}  # of the phase just trained
        self.stop = False  # set by Ctrl-C, looked at between two steps
        self.checkpoint = folder / "checkpoint.pt"
        # Everything is read before anything is written.
        self.saved = checkpoint.read(self.checkpoint, {arm.phase: self.budget(arm)[0] for arm in self.arms})
        self.results = checkpoint.read_results(folder / "results.json", self.phases(), len(self.classes))
        self.log = Log(folder, self.main, progress, cfg.log_every)
        if self.main:
            folder.mkdir(parents=True, exist_ok=True)
            self.cfg.save(folder / "config.json")
            self.log.mend()

    def phases(self) -> list[str]:
        return [arm.phase for arm in self.arms]

    def budget(self, arm: Arm) -> tuple[int, float, int]:
        """Steps, highest learning rate and seed: every student has the same first weights and the same crops."""
        if arm.is_teacher:
            return self.cfg.teacher_steps, self.cfg.teacher_lr, self.cfg.teacher_seed
        return self.cfg.student_steps, self.cfg.student_lr, self.cfg.seed

    def all(self) -> dict[str, nn.Module]:
        """Every phase in turn; phases that an earlier process finished are read from their folders."""
        trained: dict[str, nn.Module] = {}
        for arm in self.arms:
            trained[arm.phase] = self.phase(arm, trained.get("teacher"))
        return trained

    def phase(self, arm: Arm, teacher: nn.Module | None) -> nn.Module:
        cfg = self.cfg
        name = cfg.teacher if arm.is_teacher else cfg.student
        if arm.phase in self.results:
            return models.finished(name, self.folder / arm.folder, self.classes, self.normalisation).to(self.device)
        seed = self.budget(arm)[2]
        seed_everything(seed)
        model = models.build(name, self.classes, arm.is_teacher, self.normalisation).to(self.device)
        started = time.perf_counter()
        if not arm.is_teacher or models.starts_afresh(name):  # a teacher loaded from a folder is ready
            seed_everything(seed)
            model = loop.train(self, arm, model, teacher if arm.taught else None)
        self.finish(arm, model, time.perf_counter() - started)
        return model

    def finish(self, arm: Arm, model: nn.Module, seconds: float) -> None:
        phase, result = arm.phase, self.scores(model)
        state = model.state_dict().values()
        result["diverged"] = phase in self.log.diverged or not all(
            v.isfinite().all() for v in state if v.is_floating_point()
        )
        if result["diverged"]:  # what its NaNs were taken for says nothing
            result.update(miou=None, iou=[None] * len(self.classes), accuracy=None)
            rate = "--teacher-lr" if arm.is_teacher else "--student-lr"
            why = "its loss or weights are not finite, so it has no score"
            self.log.warn(f"{phase} DIVERGED: {why}; try a lower {rate}")
        elif result["miou"] is None:
            why = "no validation pixel has a label; validate on other tiles (--val-tiles)"
            self.log.warn(f"{phase} has NO SCORE: {why}")
        result["parameters"], result["gflops"] = models.parameters(model), models.gflops(model, self.cfg.crop)
        result["images_per_s"] = evaluate.images_per_second(model, self.cfg, self.device)
        result["train_seconds"] = round(seconds, 1)
        result |= self.teacher_cost
        self.teacher_cost = {}
        self.results[phase] = result
        if self.main:
            models.save(model, self.folder / arm.folder)
            write_json(self.folder / "results.json", self.results)
            self.checkpoint.unlink(missing_ok=True)
        self.saved = None
        score = "no mIoU" if result["miou"] is None else f"mIoU {result['miou']:.3f}"
        self.log.say(f"{phase}: {score} in {seconds:.0f} s")

    def scores(self, model: nn.Module) -> dict[str, Any]:
        return evaluate.scores(self.accelerator, model, self.val_pixels, self.cfg, len(self.classes))

    def predict(self, model: nn.Module, i: int) -> torch.Tensor:
        """Class map of a whole validation tile, uint8."""
        strips = evaluate.strips(self.accelerator, model, self.val_pixels, i, self.cfg, len(self.classes))
        return torch.cat([classes.byte() for _, classes in strips])

    def save(self, arm: Arm, step: int, training: Training, sums: torch.Tensor) -> None:
        """Everything the next step depends on."""
        if self.main:
            own = {"phase": arm.phase, "step": step, "sums": sums, "metrics_bytes": self.log.size()}
            checkpoint.write(self.checkpoint, {**training.state(), **own, "rng": checkpoint.rng_state()})

    def restore(self, arm: Arm, training: Training) -> tuple[int, torch.Tensor]:
        """Step to start at and the loss sums of an unfinished log line."""
        saved = self.saved if self.saved and self.saved["phase"] == arm.phase else None
        sums = loop.no_sums(self.device)
        if saved is not None:
            with checkpoint.must_fit(self.checkpoint):
                training.load(saved)
                sums = saved["sums"].to(self.device).reshape(sums.shape)
                checkpoint.set_rng_state(saved["rng"])
        step, logged = (saved["step"], saved["metrics_bytes"]) if saved else (0, None)
        self.log.start(arm, step, self.budget(arm)[0], logged)
        return step, sums

    def should_stop(self) -> bool:
        if self.accelerator.num_processes == 1:
            return self.stop
        flag = torch.tensor(float(self.stop), device=self.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def stop_on_ctrl_c(self) -> None:
        """The first Ctrl-C stops after the step under way; a second one kills at once."""

        def handler(_signal: int, _frame: Any) -> None:
            self.stop = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self.log.say("stopping after this step, checkpoint follows (Ctrl-C again: stop at once)")

        signal.signal(signal.SIGINT, handler)
