"""Times whole training steps of a SegFormer that learns from another: the losses done the usual way against dsct_loss.

The usual way is plain PyTorch, eager: F.interpolate of the logits to the labels' size, F.cross_entropy, and the
reference of the same objective. Both ways take turns, on the same models and crops, so that the step around the loss
is the same; the optimiser's part is not in it.

Examples:
    python benchmarks/train_step.py                                     # about 3 minutes on 2 cores
    python benchmarks/train_step.py --classes 19 --objective lowres --json step.json --markdown
    python benchmarks/train_step.py --crop 128 --steps 1                # seconds: does it run?
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

if __package__ in (None, ""):  # run as a script: find benchmarks, and dsct_kernels where it isn't installed
    sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that counts allocations, else chats on stderr

import torch
from torch import Tensor, nn

from benchmarks.candidates import backend_loss, reference_loss
from benchmarks.cases import IGNORE_INDEX, IGNORED_SHARE, Inputs
from benchmarks.machine import describe
from benchmarks.measure import Loss, OthersLoad, cpu_peak_bytes, interleave
from benchmarks.report import number

OBJECTIVES = {"lowres": "cross-entropy + TNKD", "lowres-dsct": "dsct_loss as it is"}
USUAL, OURS = "usual", "dsct_loss"
MIB = 1 << 20


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="segformer-b0", help="a preset of dsct-distill")
    parser.add_argument("--teacher", default="segformer-b1", help="a preset of dsct-distill")
    parser.add_argument("--classes", nargs="+", type=int, default=[19, 150])
    parser.add_argument("--objective", nargs="+", choices=tuple(OBJECTIVES), default=list(OBJECTIVES))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each way; the median counts")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads, default: torch's")
    parser.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write every measurement")
    parser.add_argument("--markdown", action="store_true", help="print the rows of docs/speed.md")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.batch < 1:
        parser.error("--steps and --batch: expected at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA GPU here")
    return options


class Step:
    """Student and teacher of so many classes, one batch of crops, and a training step of them with any loss."""

    def __init__(self, options: argparse.Namespace, classes: int):
        from dsct_kernels.distill import models

        torch.manual_seed(0)
        self.device, self.forward = torch.device(options.device), models.forward
        names = tuple(f"class {i}" for i in range(classes))
        self.student: nn.Module = models.build(options.student, names).to(self.device).train()
        self.teacher = models.build(options.teacher, names).to(self.device).eval().requires_grad_(False)
        size = (options.batch, options.crop, options.crop)
        self.images = torch.rand(options.batch, 3, options.crop, options.crop, device=self.device)
        self.target = torch.randint(0, classes, size, device=self.device)
        self.target[torch.rand(size, device=self.device) < IGNORED_SHARE] = IGNORE_INDEX

    def run(self, loss: Loss | None) -> tuple[float, float]:
        """Seconds of a step, and of the loss within it: forward and its gradient in the student's logits."""
        self.student.zero_grad(set_to_none=True)
        start = self._now()
        with torch.no_grad():
            teacher = self.forward(self.teacher, self.images).logits
        student = self.forward(self.student, self.images).logits
        before = self._now()
        gradient = self._gradient(loss, student, teacher)
        after = self._now()
        student.backward(gradient)
        return self._now() - start, after - before

    def _gradient(self, loss: Loss | None, student: Tensor, teacher: Tensor) -> Tensor:
        if loss is None:
            return torch.ones_like(student)
        leaf = student.detach().requires_grad_()
        return torch.autograd.grad(loss(Inputs(leaf, teacher, self.target, None, None)), leaf)[0]

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def peak(self, loss: Loss | None) -> int:
        """Most bytes that a step allocates over what was there before it. The gradients are there already."""
        self.run(None)
        if self.device.type == "cpu":
            return cpu_peak_bytes(lambda: self.run(loss))
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.run(loss)
        return torch.cuda.max_memory_allocated(self.device) - before


@dataclasses.dataclass
class Way:
    """What one way of doing the losses makes of a training step."""

    step_ms: float
    loss_ms: float
    images_per_s: float
    loss_share: float
    extra_bytes: int  # peak of the step, over that of the models alone

    @staticmethod
    def of(seconds: list[tuple[float, float]], batch: int, extra_bytes: int) -> Way:
        step, loss = (statistics.median(column) for column in zip(*seconds, strict=True))
        return Way(step * 1e3, loss * 1e3, batch / step, loss / step, extra_bytes)


def measure(step: Step, objective: str, steps: int, batch: int, models_alone: int) -> dict[str, Any]:
    ways: dict[str, Loss] = {USUAL: reference_loss(objective), OURS: backend_loss(objective, "auto")}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    with OthersLoad() as others:
        for name in ways:
            step.run(ways[name])  # untimed: what is set up at the first call
        for name in interleave(dict.fromkeys(ways, steps)):
            seconds[name].append(step.run(ways[name]))
    peaks = {name: step.peak(loss) for name, loss in ways.items()}
    measured = {name: Way.of(seconds[name], batch, max(0, peaks[name] - models_alone)) for name in ways}
    return {
        "objective": objective,
        "others_load": others.share,
        "ways": {name: dataclasses.asdict(way) for name, way in measured.items()},
    }


def run(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = {name: getattr(options, name) for name in ("student", "teacher", "batch", "crop", "steps")}
    result: dict[str, Any] = {"machine": describe(torch.device(options.device)), "settings": settings}
    result["measurements"] = []
    for classes in options.classes:
        step = Step(options, classes)
        models_alone = step.peak(None)
        for objective in options.objective:
            measured = measure(step, objective, options.steps, options.batch, models_alone)
            measured |= {"classes": classes, "models_bytes": models_alone}
            result["measurements"].append(measured)
            say(in_one_line(measured))
    return result


def in_one_line(measured: dict[str, Any]) -> str:
    parts = [
        f"{name}: {number(way['images_per_s'])} images/s, loss {way['loss_share']:.1%} of the step, "
        f"{number(way['extra_bytes'] / MIB)} MiB"
        for name, way in measured["ways"].items()
    ]
    load = measured["others_load"]
    busy = "" if load is None else f" ({load:.0%} of the CPUs taken by others)"
    return f"K = {measured['classes']}, {OBJECTIVES[measured['objective']]}: {'; '.join(parts)}{busy}"


def markdown(result: dict[str, Any]) -> str:
    settings, machine = result["settings"], result["machine"]
    head = ["objective", "K", "batch"]
    right = [f"{what}, {way}" for what in ("images/s", "loss share", "loss MiB") for way in (USUAL, OURS)]
    lines = [head + right + ["x faster"], ["---"] + ["---:"] * (len(head) + len(right))]
    for measured in result["measurements"]:
        usual, ours = measured["ways"][USUAL], measured["ways"][OURS]
        cells = [OBJECTIVES[measured["objective"]], str(measured["classes"]), str(settings["batch"])]
        cells += [number(way["images_per_s"]) for way in (usual, ours)]
        cells += [f"{way['loss_share']:.1%}" for way in (usual, ours)]
        cells += [number(way["extra_bytes"] / MIB) for way in (usual, ours)]
        lines.append([*cells, number(usual["step_ms"] / ours["step_ms"])])
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    crop = f"{settings['crop']} x {settings['crop']}"
    return (
        f"{table}\n\n{settings['student']} learning from {settings['teacher']}, crops {crop}, forward and backward; "
        f"{machine['name']}, {machine['threads']} threads, torch {machine['torch']}, {machine['date'][:10]}; median of "
        f"{settings['steps']} steps each, taken in turns; loss MiB: peak memory of the step above that of the same "
        "step without a loss.\n"
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    start = time.perf_counter()
    result = run(options, lambda text: print(text, file=sys.stderr, flush=True))
    result["settings"]["seconds"] = round(time.perf_counter() - start, 1)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.markdown or not options.json:
        print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
