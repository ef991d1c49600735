"""What a comparison shows: paired differences with their standard error, as a table and as a chart."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Difference:
    """One method against another on the same folds and seeds."""

    pairs: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.pairs)

    @property
    def error(self) -> float:
        """Standard error of the mean; NaN for a single pair."""
        return statistics.stdev(self.pairs) / len(self.pairs) ** 0.5 if len(self.pairs) > 1 else math.nan

    @property
    def clear(self) -> bool:
        """Larger than twice its standard error, of three pairs at least."""
        return len(self.pairs) >= 3 and abs(self.mean) > 2 * self.error

    def __str__(self) -> str:
        if not self.pairs:
            return "-"
        error = f" ± {self.error:.4f}" if len(self.pairs) > 1 else ""
        return f"{self.mean:+.4f}{error}" + (" **clear**" if self.clear else "")


Rows = list[dict[str, Any]]


def paired(rows: Rows, mine: str, other: str, value: Callable[[dict[str, Any]], float | None]) -> Difference:
    """By fold and seed. The rows have one teacher, or none."""
    found = {(r["method"], (r["student"], r["fold"], r["seed"], r["steps"])): value(r) for r in rows}
    pairs = []
    for (name, where), v in found.items():
        base = found.get((other, where))
        if name == mine and v is not None and base is not None:
            pairs.append(v - base)
    return Difference(tuple(pairs))


def table(rows: Rows, names: list[str], against: list[str], classes: tuple[str, ...]) -> str:
    """Markdown: each method's mean, spread and cost, and its paired differences."""
    heads = ("cross-entropy and", "runs", "mean mIoU", "spread over seeds", *(f"against {a}" for a in against))
    heads = (*heads, "better in", "ms / step", "MiB kept")
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for name in names:
        mine = [r for r in rows if r["method"] == name]
        if not mine:
            continue
        by_seed = [[r["miou"] for r in mine if r["seed"] == seed] for seed in sorted({r["seed"] for r in mine})]
        whole = [statistics.fmean(v) for v in by_seed if len(v) == max(map(len, by_seed))]
        spread = f"{statistics.stdev(whole):.4f}" if len(whole) > 1 else "-"
        differences = [paired(rows, name, other, lambda r: r["miou"]) for other in against]
        first = differences[0].pairs if differences else ()
        better = f"{sum(d > 0 for d in first)} of {len(first)}" if first and name != against[0] else "-"
        cells = ["-" if other == name else str(d) for other, d in zip(against, differences, strict=True)]
        cost = {key: [r[key] for r in mine if r.get(key) is not None] for key in ("ms_per_step", "kept_mb")}
        ms, mb = (f"{statistics.median(v):.0f}" if v else "-" for v in cost.values())
        mean = statistics.fmean(r["miou"] for r in mine)
        lines.append(f"| {name} | {len(mine)} | {mean:.4f} | {spread} | {' | '.join(cells)} | {better} | {ms} | {mb} |")
    lines += [
        "",
        "Against: the mean of the paired differences (same fold, same seed, same crops, same first weights) and its "
        "standard error.",
        "**clear**: three pairs or more and beyond twice the error; all else is within the spread.",
        "",
        f"IoU per class, against {against[0]}:",
        "",
        "| | " + " | ".join(classes) + " |",
        "| --- |" + " ---: |" * len(classes),
    ]
    for name in names:
        if name != against[0] and any(r["method"] == name for r in rows):
            cells = [str(paired(rows, name, against[0], lambda r, k=k: r["iou"][k])) for k in range(len(classes))]  # type: ignore[misc]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def chart(rows: Rows, names: list[str], against: str) -> Any:
    """A figure with every paired difference as a point, its mean and twice its standard error as a bar; None without
    any."""
    from .pictures import pyplot

    shown = [(n, d) for n in names if n != against and (d := paired(rows, n, against, lambda r: r["miou"])).pairs]
    if not shown:
        return None
    figure, axis = pyplot().subplots(figsize=(8, 1.1 + 0.36 * len(shown)), layout="constrained")
    for y, (_, d) in enumerate(reversed(shown)):
        axis.plot(d.pairs, [y] * len(d.pairs), "o", color="#8a8f98", markersize=3.5)
        error = 2 * d.error if len(d.pairs) > 1 else 0
        axis.errorbar([d.mean], [y], xerr=[error], fmt="s", color="#2f8fd0" if d.clear else "#d98a00", capsize=3)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(shown)), [n for n, _ in reversed(shown)])
    axis.set_xlabel(f"mIoU against {against}: each pair, the mean and twice its standard error (blue: clear)")
    axis.grid(axis="x", alpha=0.3)
    return figure
