"""What a run says as it goes: metrics.jsonl, TensorBoard, the progress bar and warnings; one process says it all."""

import json
import math
import sys
from pathlib import Path
from typing import Any

from .config import Arm
from .evaluate import finite
from .files import read_metrics, replace_file

PARTS = ("total", "ce", "tckd", "nckd", "cafd", "matched", "jaccard")
Rows = list[tuple[bytes, dict[str, Any]]]


class Log:
    """The log of one run folder, read when it is made, written from `start` on, both by the main process alone."""

    def __init__(self, folder: Path, main: bool, progress: Any = None, every: int = 10):
        self.folder, self.main, self.progress, self.every = folder, main, progress, every
        self.metrics = folder / "metrics.jsonl"
        self.rows = read_metrics(self.metrics)
        self.diverged = diverged(self.rows)
        self.warnings: list[str] = []
        self.writer: Any = None
        self.bar: Any = None

    def mend(self) -> None:
        """Leave out a last line that a kill tore."""
        if self.main and self.metrics.is_file():
            replace_file(self.metrics, b"".join(line for line, _ in self.rows))

    def size(self) -> int:
        """Bytes that are logged."""
        return self.metrics.stat().st_size if self.metrics.is_file() else 0

    def start(self, arm: Arm, step: int, steps: int, metrics_bytes: int | None) -> None:
        """Drop what was logged after the checkpoint, or, without one, of this phase: those steps are made again."""
        if not self.main:
            return
        if self.metrics.is_file():
            rows, end = [], 0
            for line, row in read_metrics(self.metrics):
                end += len(line)
                if (row["phase"] != arm.phase) if metrics_bytes is None else (end <= metrics_bytes):
                    rows.append((line, row))
            replace_file(self.metrics, b"".join(line for line, _ in rows))
            self.diverged = diverged(rows)
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        self.writer = SummaryWriter(str(self.folder / "tensorboard" / arm.folder), purge_step=step + 1)
        self.bar = self.progress and self.progress.add_task(arm.phase, total=steps, completed=step, losses="")

    def record(self, phase: str, step: int, values: dict[str, float | None]) -> None:
        if not self.main:
            return
        values = {k: finite(v) for k, v in values.items()}
        with open(self.metrics, "a") as file:
            file.write(json.dumps({"phase": phase, "step": step, **values}, allow_nan=False) + "\n")
        for key, value in values.items():
            if value is not None:
                self.writer.add_scalar(key, value, step)

    def losses(self, arm: Arm, step: int, steps: int, parts: list[float], lr: float) -> None:
        """Means of the parts of the loss since the last line."""
        values = dict(zip(PARTS, parts, strict=True))
        if not arm.taught:  # plain cross-entropy has no other parts
            values = {"total": values["total"]}
        self.record(arm.phase, step, {**values, "lr": lr})
        if not math.isfinite(values["total"]) and arm.phase not in self.diverged:
            self.diverged.add(arm.phase)
            self.warn(f"{arm.phase}: the loss is {values['total']} at step {step}: training diverged")
        if self.progress is not None and self.main:
            shown = "  ".join(f"{k} {v:.3f}" for k, v in values.items())
            self.progress.update(self.bar, completed=step, losses=shown)
            if not self.progress.console.is_terminal and (step == steps or step % (10 * self.every) == 0):
                self.say(f"{arm.phase} {step}/{steps}  {shown}")

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


def diverged(rows: Rows) -> set[str]:
    """Phases whose loss was not finite, by their log."""
    return {row["phase"] for _, row in rows if "total" in row and row["total"] is None}
