"""The run: train the teacher, train the student once per arm with everything else the same, evaluate, report.

`train` is the loop to read. A run folder holds all there is to go on from: config.json, one model folder per finished
phase, results.json, metrics.jsonl and, while a phase is under way, checkpoint.pt.
"""

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dsct_kernels import DSCTLosses, dsct_loss

from . import checkpoint, data, models
from .config import Config, Loss, arm_loss, phase_folder
from .datasets import dataset_of, tiles_of
from .files import DataError, read_json, read_metrics, replace_file, write_json

PARTS = ("total", "ce", "tckd", "nckd", "cafd", "matched", "jaccard")
RESULT: dict[str, tuple[type, ...]] = {
    "miou": (float, int, type(None)),
    "iou": (list,),
    "accuracy": (float, int, type(None)),
    "parameters": (int,),
    "gflops": (float, int),
    "images_per_s": (float, int),
    "train_seconds": (float, int),
}


def unwrapped(accelerator: Any, model: nn.Module) -> nn.Module:
    """The model as it was before `prepare`. accelerate's own undoing of mixed precision takes the decorators of
    transformers' forward with it, without which SegFormer hands its head no hidden states; so the class's forward is
    put back instead."""
    model = accelerator.unwrap_model(model)
    for name in ("forward", "_original_forward"):
        model.__dict__.pop(name, None)
    return model


class Interrupted(Exception):
    """Ctrl-C came and the checkpoint is written."""


def classes_of(cfg: Config) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]]:
    """Names and colours of the classes."""
    one = dataset_of(cfg)
    return one.classes, one.palette


def load_pixels(cfg: Config, device: torch.device) -> tuple[data.Pixels, data.Pixels]:
    """Training tiles, on the device if they fit the cache, and validation tiles."""
    train, val = data.split(tiles_of(cfg), list(cfg.val_tiles) if cfg.val_tiles else None)
    normalisation = data.statistics(train) if dataset_of(cfg).own_statistics else models.IMAGENET
    return data.Pixels(train, cfg.cache_mb, device, normalisation), data.Pixels(val, cfg.cache_mb, "cpu", normalisation)


def make_accelerator(cfg: Config) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    cuda = torch.cuda.is_available() and cfg.device != "cpu"
    if cfg.device == "cuda" and not cuda:
        raise DataError("--device cuda: torch sees no CUDA device here")
    precision = cfg.precision if cfg.precision != "auto" else ("bf16" if cuda else "no")
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # heads that a loaded model may not use
    return Accelerator(cpu=not cuda, mixed_precision=precision, kwargs_handlers=[unused])


class Run:
    """One run folder on one set of tiles."""

    def __init__(
        self,
        cfg: Config,
        folder: Path,
        progress: Any = None,
        pixels: tuple[data.Pixels, data.Pixels] | None = None,
    ):
        self.folder, self.progress = folder, progress
        self.accelerator = make_accelerator(cfg)
        # As it was decided: a run that goes on elsewhere keeps its precision.
        self.cfg = replace(cfg, precision=str(self.accelerator.mixed_precision))
        self.device = self.accelerator.device
        self.main = self.accelerator.is_main_process
        self.classes, self.palette = classes_of(cfg)
        self.train_pixels, self.val_pixels = pixels or load_pixels(cfg, self.device)
        self.normalisation = self.train_pixels.normalisation
        self.stop = False  # set by Ctrl-C, looked at between two steps
        self.writer: Any = None
        self.warnings: list[str] = []
        self.checkpoint = folder / "checkpoint.pt"
        self.metrics = folder / "metrics.jsonl"
        # Everything is read before anything is written.
        self.saved = checkpoint.read(self.checkpoint)
        if self.saved is not None:
            self.check_saved(self.saved)
        self.results = self.read_results()
        rows = read_metrics(self.metrics)
        if self.main:
            folder.mkdir(parents=True, exist_ok=True)
            self.cfg.save(folder / "config.json")
            if self.metrics.is_file():
                replace_file(self.metrics, b"".join(line for line, _ in rows))
        self.diverged = diverged(rows)

    # ------------------------------------------------------------------------------------------- the whole run

    def phases(self) -> list[str]:
        return ["teacher", *self.cfg.arms]

    def check_saved(self, saved: dict[str, Any]) -> None:
        if saved["phase"] not in self.phases():
            raise DataError(
                f"{self.checkpoint}: phase {saved['phase']!r} is not of this run: {', '.join(self.phases())}"
            )
        steps = self.cfg.teacher_steps if saved["phase"] == "teacher" else self.cfg.student_steps
        if not 0 <= saved["step"] <= steps or saved["metrics_bytes"] < 0:
            raise DataError(
                f"{self.checkpoint}: step {saved['step']} of {steps}, {saved['metrics_bytes']} bytes logged"
            )

    def read_results(self) -> dict[str, dict[str, Any]]:
        path = self.folder / "results.json"
        if not path.is_file():
            return {}
        results = read_json(path)
        for phase, result in results.items():
            if phase not in self.phases():
                raise DataError(f"{path}: {phase!r} is no phase of this run, which has {', '.join(self.phases())}")
            for key, kinds in RESULT.items():
                if not isinstance(result, dict) or key not in result:
                    raise DataError(f"{path}: {phase}: {key} is missing")
                if not isinstance(result[key], kinds) or isinstance(result[key], bool):
                    raise DataError(f"{path}: {phase}: {key}: got {result[key]!r}, expected {kinds[0].__name__}")
            scores = [v for v in result["iou"] if v is not None]
            if len(result["iou"]) != len(self.classes) or not all(type(v) in (int, float) for v in scores):
                raise DataError(f"{path}: {phase}: iou: got {result['iou']!r}, expected a number or null per class")
        return results

    def all(self) -> dict[str, nn.Module]:
        """Every phase in turn; phases that an earlier process finished are read from their folders."""
        trained = {}
        teacher = None
        for phase in self.phases():
            model = self.phase(phase, teacher)
            teacher = teacher or model
            trained[phase] = model
        return trained

    def phase(self, phase: str, teacher: nn.Module | None) -> nn.Module:
        cfg, is_teacher = self.cfg, phase == "teacher"
        folder = self.folder / phase_folder(phase)
        if phase in self.results:
            return models.load(folder, self.classes, normalisation=self.normalisation).to(self.device)
        seed = cfg.teacher_seed if is_teacher else cfg.seed  # every student: same weights, same crops
        seed_everything(seed)
        name = cfg.teacher if is_teacher else cfg.student
        model = models.build(name, self.classes, is_teacher, self.normalisation).to(self.device)
        started = time.perf_counter()
        steps = cfg.teacher_steps if is_teacher else cfg.student_steps
        if not (is_teacher and cfg.teacher not in models.PRESETS):  # a teacher loaded from a folder is ready
            seed_everything(seed)
            loss = arm_loss("alone" if is_teacher else phase, cfg.loss)
            if not loss.teaches:
                teacher = None
            lr = cfg.teacher_lr if is_teacher else cfg.student_lr
            model = self.train(phase, model, teacher, loss, steps, lr, seed)
        self.finish(phase, model, folder, time.perf_counter() - started)
        return model

    def finish(self, phase: str, model: nn.Module, folder: Path, seconds: float) -> None:
        result = self.evaluate(model)
        state = model.state_dict().values()
        result["diverged"] = phase in self.diverged or not all(
            v.isfinite().all() for v in state if v.is_floating_point()
        )
        if result["diverged"]:  # what its NaNs were taken for says nothing
            result.update(miou=None, iou=[None] * len(self.classes), accuracy=None)
            rate = "--teacher-lr" if phase == "teacher" else "--student-lr"
            self.warn(f"{phase} DIVERGED: its loss or weights are not finite, so it has no score; try a lower {rate}")
        elif result["miou"] is None:
            self.warn(f"{phase} has NO SCORE: no validation pixel has a label; validate on other tiles (--val-tiles)")
        result["parameters"], result["gflops"] = models.parameters(model), models.gflops(model, self.cfg.crop)
        result["images_per_s"] = images_per_second(model, self.cfg, self.device)
        result["train_seconds"] = round(seconds, 1)
        self.results[phase] = result
        if self.main:
            models.save(model, folder)
            write_json(self.folder / "results.json", self.results)
            self.checkpoint.unlink(missing_ok=True)
        self.saved = None
        score = "no mIoU" if result["miou"] is None else f"mIoU {result['miou']:.3f}"
        self.say(f"{phase}: {score} in {seconds:.0f} s")

    # ------------------------------------------------------------------------------------------- training

    def train(
        self,
        phase: str,
        model: nn.Module,
        teacher: nn.Module | None,
        loss: Loss,
        steps: int,
        lr: float,
        seed: int,
    ) -> nn.Module:
        """Train one network: with the DSCT loss if it has a teacher, else with cross-entropy."""
        cfg, acc = self.cfg, self.accelerator
        crops = data.Crops(
            self.train_pixels, cfg.crop, cfg.batch, seed, cfg.scale_jitter, cfg.colour_jitter, acc.process_index
        )
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=lr, weight_decay=cfg.weight_decay, fused=self.device.type == "cuda"
        )
        model, optimizer = acc.prepare(model, optimizer)
        strides = loss.compared if teacher is not None else ()
        if teacher is not None:
            teacher.eval().requires_grad_(False)
        start, sums = self.restore(phase, model, optimizer)
        bar = self.bar(phase, start, steps)
        model.train()

        for step, batch in enumerate(crops.loader(start, steps), start):
            images, target = self.inputs(batch)
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(step, steps)
            with acc.autocast():
                student_out = models.forward(model, images, strides)
            if teacher is not None:
                with acc.autocast(), torch.no_grad():
                    teacher_out = models.forward(teacher, images, strides)
                losses: tuple[torch.Tensor, ...] = distillation(student_out, teacher_out, target, loss, cfg.backend)
            else:
                losses = (cross_entropy(student_out, target, cfg.backend),)
            acc.backward(losses[0])
            acc.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            sums[: len(losses)] += torch.stack([part.detach().float() for part in losses])
            sums[-1] += 1
            done = step + 1
            if done % cfg.log_every == 0 or done == steps:
                self.log(phase, done, steps, sums[:-1] / sums[-1], lr * schedule(step, steps), bar)
                sums.zero_()
            if cfg.eval_every and done % cfg.eval_every == 0 and done < steps:
                self.record(phase, done, {"miou": self.evaluate(acc.unwrap_model(model))["miou"]})
                model.train()
            stop = self.should_stop()
            if done < steps and (stop or done % cfg.checkpoint_every == 0):
                self.save(phase, done, model, optimizer, sums)
            if stop:
                self.close()
                raise Interrupted
        return unwrapped(acc, model).eval()

    def inputs(self, batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (N, bands, H, W) in 0..1 with colour jitter, and labels (N, H, W) uint8, on the device."""
        moved = tuple(part.to(self.device, non_blocking=True) for part in batch)
        return data.images(moved, self.normalisation.maximum)

    # ------------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        """IoU over the validation tiles, each process its share of them."""
        from torchmetrics.classification import MulticlassConfusionMatrix

        model.eval()
        if self.accelerator.num_processes > 1:  # the running statistics of the last step: those that are saved
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)
        confusion = MulticlassConfusionMatrix(len(self.classes), ignore_index=data.IGNORE, validate_args=False).to(
            self.device
        )
        for i in range(self.accelerator.process_index, len(self.val_pixels.tiles), self.accelerator.num_processes):
            for y, classes in self.strips(model, i):
                label = data.labels(self.val_pixels.window(i, y, 0, *classes.shape)).to(self.device).long()
                confusion.update(classes[None], label[None])
        matrix = confusion.compute().double()
        hit = matrix.diag()
        iou = hit / (matrix.sum(0) + matrix.sum(1) - hit)  # NaN for a class that is nowhere
        return {
            "miou": finite(float(iou.nanmean())),
            "iou": [finite(v) for v in iou.tolist()],
            "accuracy": finite(float(hit.sum() / matrix.sum())),
        }

    def predict(self, model: nn.Module, i: int) -> torch.Tensor:
        """Class map of a whole validation tile, uint8."""
        return torch.cat([classes.byte() for _, classes in self.strips(model, i)])

    def strips(self, model: nn.Module, i: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Class maps of a validation tile, strip by strip, each with its first row."""

        def logits(image: torch.Tensor) -> torch.Tensor:
            with self.accelerator.autocast():
                return models.forward(model, image).logits

        return predicted(self.val_pixels, i, self.cfg.window, len(self.classes), self.device, logits)

    # ------------------------------------------------------------------------------------------- checkpoint

    def save(self, phase: str, step: int, model: nn.Module, optimizer: Any, sums: torch.Tensor) -> None:
        """Everything the next step depends on; `sums` ends with the number of steps it holds."""
        if not self.main:
            return
        scaler = self.accelerator.scaler
        state = {
            "phase": phase,
            "step": step,
            "model": self.accelerator.unwrap_model(model).state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "sums": sums,
            "rng": checkpoint.rng_state(),
            "metrics_bytes": self.metrics_size(),
        }
        checkpoint.write(self.checkpoint, state)

    def restore(self, phase: str, model: nn.Module, optimizer: Any) -> tuple[int, torch.Tensor]:
        """Step to start at and the loss sums of an unfinished log line."""
        saved = self.saved
        if saved is None or saved["phase"] != phase:
            self.open_logs(phase, 0, None)
            return 0, torch.zeros(len(PARTS) + 1, device=self.device)
        try:
            self.accelerator.unwrap_model(model).load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            if self.accelerator.scaler:
                self.accelerator.scaler.load_state_dict(saved["scaler"])
            sums = saved["sums"].to(self.device).reshape(len(PARTS) + 1)
            checkpoint.set_rng_state(saved["rng"])
        except Exception as error:  # of the many kinds that torch and numpy have for a value that does not fit
            raise DataError(f"{self.checkpoint}: does not fit this run ({error})") from error
        self.open_logs(phase, saved["step"], saved["metrics_bytes"])
        return saved["step"], sums

    def should_stop(self) -> bool:
        if self.accelerator.num_processes == 1:
            return self.stop
        flag = torch.tensor(float(self.stop), device=self.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    # ------------------------------------------------------------------------------------------- logs

    def metrics_size(self) -> int:
        return self.metrics.stat().st_size if self.metrics.is_file() else 0

    def open_logs(self, phase: str, step: int, metrics_bytes: int | None) -> None:
        """Drop what was logged after the checkpoint: those steps are made again."""
        if not self.main:
            return
        if self.metrics.is_file():
            rows, end = [], 0
            for line, row in read_metrics(self.metrics):
                end += len(line)
                if (row["phase"] != phase) if metrics_bytes is None else (end <= metrics_bytes):
                    rows.append((line, row))
            replace_file(self.metrics, b"".join(line for line, _ in rows))
            self.diverged = diverged(rows)
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        self.writer = SummaryWriter(str(self.folder / "tensorboard" / phase_folder(phase)), purge_step=step + 1)

    def record(self, phase: str, step: int, values: dict[str, float | None]) -> None:
        if not self.main:
            return
        values = {k: finite(v) for k, v in values.items()}
        with open(self.metrics, "a") as file:
            file.write(json.dumps({"phase": phase, "step": step, **values}, allow_nan=False) + "\n")
        for key, value in values.items():
            if value is not None:
                self.writer.add_scalar(key, value, step)

    def log(self, phase: str, step: int, steps: int, parts: torch.Tensor, lr: float, bar: Any) -> None:
        values = dict(zip(PARTS, parts.tolist(), strict=True))
        if "alone" in phase or phase == "teacher":  # plain cross-entropy has no other parts
            values = {"total": values["total"]}
        self.record(phase, step, {**values, "lr": lr})
        if not math.isfinite(values["total"]) and phase not in self.diverged:
            self.diverged.add(phase)
            self.warn(f"{phase}: the loss is {values['total']} at step {step}: training diverged")
        if self.progress is not None and self.main:
            shown = "  ".join(f"{k} {v:.3f}" for k, v in values.items())
            self.progress.update(bar, completed=step, losses=shown)
            if not self.progress.console.is_terminal and (step == steps or step % (10 * self.cfg.log_every) == 0):
                self.say(f"{phase} {step}/{steps}  {shown}")

    def bar(self, phase: str, start: int, steps: int) -> Any:
        return self.progress and self.progress.add_task(phase, total=steps, completed=start, losses="")

    def say(self, text: str) -> None:
        if self.progress is not None and self.main:
            self.progress.console.print(text, markup=False, emoji=False, highlight=False)

    def warn(self, text: str) -> None:
        """Loud: on stderr at once, and again when the run ends."""
        if self.main:
            self.warnings.append(text)
            print(f"WARNING: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    def stop_on_ctrl_c(self) -> None:
        """The first Ctrl-C stops after the step under way; a second one kills at once."""

        def handler(_signal: int, _frame: Any) -> None:
            self.stop = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self.say("stopping after this step, checkpoint follows (Ctrl-C again: stop at once)")

        signal.signal(signal.SIGINT, handler)


# ----------------------------------------------------------------------------------------------- losses and helpers


UNTAUGHT = Loss(matched_weight=0.0, jaccard_weight=0.0)


def cross_entropy(student: models.Output, target: torch.Tensor, backend: str) -> torch.Tensor:
    """Mean over the labelled pixels, 0 without any: `dsct_loss` less all that a teacher has a part in. It reads smaller
    logits as they are, where F.cross_entropy would have them upsampled."""
    return distillation(student, student, target, UNTAUGHT, backend).total


def distillation(
    student: models.Output, teacher: models.Output, target: torch.Tensor, loss: Loss, backend: str
) -> DSCTLosses:
    keywords = {name: value for name, value in asdict(loss).items() if name != "strides"}
    return dsct_loss(
        student.logits,
        teacher.logits,
        target,
        student.features if loss.compared else None,
        teacher.features if loss.compared else None,
        **keywords,
        ignore_index=data.IGNORE,
        backend=backend,
    )


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over the first 5%, then a cosine down to 1%."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def window_starts(length: int, size: int) -> list[int]:
    """Evenly spread starts of windows that cover `length` and overlap by at least a quarter."""
    if length <= size:
        return [0]
    count = math.ceil((length - size) / (0.75 * size)) + 1
    return [round(k * (length - size) / (count - 1)) for k in range(count)]


@torch.no_grad()
def predicted(
    pixels: data.Pixels,
    i: int,
    size: int,
    classes: int,
    device: torch.device,
    logits: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[tuple[int, torch.Tensor]]:
    """First row and class map of every strip of a tile, top to bottom: windows overlap by a quarter and their
    probabilities are averaged. Only the rows that windows are still to come for are kept, whatever the tile's size."""
    tile = pixels.tiles[i]
    starts = window_starts(tile.height, size)
    scores = torch.zeros(classes, min(size, tile.height), tile.width, device=device)
    for y, following in zip(starts, [*starts[1:], tile.height], strict=True):
        for x in window_starts(tile.width, size):
            window = pixels.window(i, y, x, size, size).to(device)
            h, w = window.shape[:2]
            image = data.scaled(window, pixels.normalisation.maximum).permute(2, 0, 1)[None]
            image = F.pad(image, (0, -w % 32, 0, -h % 32), mode="replicate")
            found = F.interpolate(logits(image).float(), size=image.shape[-2:], mode="bilinear", align_corners=False)
            scores[:, :h, x : x + w] += found[0, :, :h, :w].softmax(0)
        done = following - y
        yield y, scores[:, :done].argmax(0)
        kept = scores[:, done:].clone()
        scores.zero_()
        scores[:, : kept.shape[1]] = kept


def seed_everything(seed: int) -> None:
    from accelerate.utils import set_seed

    set_seed(seed)


def diverged(rows: list[tuple[bytes, dict[str, Any]]]) -> set[str]:
    """Phases whose loss was not finite, by their log."""
    return {row["phase"] for _, row in rows if "total" in row and row["total"] is None}


def finite(value: float | None) -> float | None:
    """None for what JSON has no number for."""
    return value if value is not None and math.isfinite(value) else None


@torch.no_grad()
def images_per_second(model: nn.Module, cfg: Config, device: torch.device, seconds: float = 0.5) -> float:
    """Forward throughput on batches of crops, in the precision the model is stored in."""
    images = torch.zeros(cfg.batch, models.bands_of(model), cfg.crop, cfg.crop, device=device)
    model.eval()
    models.forward(model, images)
    count, start = 0, time.perf_counter()
    while True:
        float(models.forward(model, images).logits.flatten()[0])  # waits for the device
        count += cfg.batch
        spent = time.perf_counter() - start
        if spent > seconds:
            return count / spent
