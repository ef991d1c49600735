"""What comes out: rows with ratios from raw measurements, the rich table, the table of docs/speed.md, the charts."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any

from benchmarks.cases import (
    BEFOREHAND,
    COMPILE,
    CROSS_ENTROPY,
    DTYPES,
    EAGER,
    FORWARD_BACKWARD,
    FULL_SIZE,
    LAYOUTS,
    LOSSES,
    LOWRES,
    MASK_TRICK,
    PHASES,
    default_shapes,
)

Result = dict[str, Any]  # what the JSON file holds
COLOURS = {
    EAGER: "#4477aa",
    MASK_TRICK: "#aabbcc",
    COMPILE: "#ee7733",
    BEFOREHAND: "#228833",
    CROSS_ENTROPY: "#aa3377",
    FULL_SIZE: "#999933",
}
BUSY = 0.05  # share of the CPUs taken by others that calls for a warning
KEY = ("loss", "shape", "layout", "dtype", "phase")


@dataclasses.dataclass
class Row:
    """One case with every candidate's measurement, and what follows from them."""

    loss: str
    shape: str
    layout: str
    dtype: str
    phase: str
    by_name: dict[str, dict[str, Any]]
    ours_name: str | None  # the backend that "auto" picks, or the only one timed
    cache_bytes: int

    def ms(self, name: str | None) -> float | None:
        measured = self.by_name.get(name or "", {})
        return measured["ms"]["median"] if "ms" in measured else None

    @property
    def ours(self) -> float | None:
        return self.ms(self.ours_name)

    def speedup(self, baseline: str, name: str | None = None) -> float | None:
        """How many times faster than `baseline` ours, or the candidate `name`, is."""
        base, ours = self.ms(baseline), self.ms(name or self.ours_name)
        return base / ours if base and ours else None

    def as_called(self, name: str | None) -> float | None:
        """Milliseconds of a call in a loop; on a GPU the host's share counts where it is the longer one."""
        ms = self.ms(name)
        return None if ms is None else max(ms, self.by_name[name or ""].get("host_ms", 0.0))

    @property
    def speedup_best(self) -> float | None:
        """Over the best of what else computes it, as called: for the small shapes, where overhead rules."""
        ours, bases = self.as_called(self.ours_name), [self.as_called(name) for name in (EAGER, COMPILE, BEFOREHAND)]
        ratios = [base / ours for base in bases if base and ours]
        return min(ratios) if ratios else None

    @property
    def of_full_size(self) -> float | None:
        """Our time as a multiple of that of our own kernel on logits of the labels' size."""
        ratio = self.speedup(FULL_SIZE)
        return 1 / ratio if ratio else None

    def _first(self) -> dict[str, Any]:
        return next(iter(self.by_name.values()))

    @property
    def floor_ms(self) -> float:
        first = self._first()
        return first["floor_bytes"] / first["copy_gb_s"] / 1e6

    @property
    def in_cache(self) -> bool:
        """On a CPU small inputs never leave the cache, and a floor made of memory bandwidth means nothing."""
        return self._first()["device"] == "cpu" and self._first()["floor_bytes"] <= 2 * self.cache_bytes

    def x_floor(self, name: str | None = None) -> float | None:
        ours = self.ms(name or self.ours_name)
        return None if ours is None or self.in_cache else ours / self.floor_ms

    def gb_s(self, name: str | None = None) -> float | None:
        ours = self.ms(name or self.ours_name)
        return None if ours is None else self._first()["floor_bytes"] / ours / 1e6

    def memory(self, name: str | None = None, scratch: int = 0) -> float | None:
        """Peak extra memory in student tensors, less `scratch` bytes that are there at any size."""
        measured = self.by_name.get(name or self.ours_name or "", {})
        extra = measured.get("extra_bytes")
        return None if extra is None else max(extra - scratch, 0) / measured["student_bytes"]


def make_rows(result: Result, phases: Iterable[str] | None = None) -> list[Row]:
    rows: dict[tuple[str, ...], Row] = {}
    for measured in result["measurements"]:
        key = tuple(measured[name] for name in KEY)
        if phases is not None and measured["phase"] not in phases:
            continue
        if key not in rows:
            loss, shape, layout, dtype, phase = key
            rows[key] = Row(loss, shape, layout, dtype, phase, {}, None, result["machine"]["cache_bytes"])
        rows[key].by_name[measured["candidate"]] = measured
    for row in rows.values():
        backends = [name for name, m in row.by_name.items() if m["kind"] == "backend" and "ms" in m]
        auto = next((m["auto"] for m in row.by_name.values()), None)
        row.ours_name = auto if auto in backends else backends[0] if backends else None
    return sorted(rows.values(), key=_order)


def _order(row: Row) -> tuple[Any, ...]:
    """The order of the defaults, whatever order the measurements came in; other shapes last."""
    shapes = default_shapes(row.loss, "cuda", quick=False)
    place = shapes.index(row.shape) if row.shape in shapes else len(shapes)
    others = (LAYOUTS.index(row.layout), list(DTYPES).index(row.dtype), PHASES.index(row.phase))
    return (LOSSES.index(row.loss), place, row.shape, *others)


def number(value: float | None) -> str:
    """Three figures, or a dash."""
    if value is None:
        return "-"
    text = f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    return text if value >= 0.1 or value == 0 else f"{value:.4f}"


def timing(measured: dict[str, Any] | None) -> str:
    """Median and half the interquartile range, in milliseconds."""
    if measured is None:
        return ""
    if "ms" not in measured:
        return "-"
    ms = measured["ms"]
    spread = (ms["p75"] - ms["p25"]) / 2 / ms["median"] if ms["median"] else 0
    text = f"{ms['median']:.4f}" if ms["median"] < 1 else number(ms["median"])
    return f"{text} ±{spread:.0%}"


def print_tables(result: Result, console: Any) -> None:
    """One rich table per loss; every backend timed gets its columns."""
    from rich.table import Table

    machine = result["machine"]
    on_gpu = machine["device"] != "cpu"
    for loss in LOSSES:
        rows = [row for row in make_rows(result) if row.loss == loss]
        if not rows:
            continue
        kinds = {name: m["kind"] for row in rows for name, m in row.by_name.items()}
        baselines = [name for name, kind in kinds.items() if kind == "baseline"]
        backends = [name for name in kinds if name not in baselines and any(row.ms(name) for row in rows)]
        table = Table(title=f"{loss} on {machine['name']}, milliseconds: median ± half the interquartile range")
        for column in ("shape", "layout", "dtype", "phase"):
            table.add_column(column, no_wrap=True)
        ratios = [f"x {baseline}" for baseline in baselines]
        for column in [*baselines, *backends]:
            table.add_column(column, justify="right", no_wrap=True)
        for backend in backends:
            suffix = f"\n{backend}" if len(backends) > 1 else ""
            for column in [*ratios, *(["GB/s", "of copy"] if on_gpu else ["x floor"]), "memory"]:
                table.add_column(column + suffix, justify="right")
        for row in rows:
            cells = [row.shape, row.layout, row.dtype, "fwd+bwd" if row.phase == FORWARD_BACKWARD else "fwd"]
            cells += [timing(row.by_name.get(name)) for name in [*baselines, *backends]]
            for backend in backends:
                cells += [number(row.speedup(baseline, backend)) for baseline in baselines]
                x_floor = row.x_floor(backend)
                if on_gpu:
                    cells += [number(row.gb_s(backend)), f"{1 / x_floor:.0%}" if x_floor else "-"]
                else:
                    cells.append("in cache" if row.in_cache and row.ms(backend) else number(x_floor))
                cells.append(number(row.memory(backend)))
            table.add_row(*cells)
        console.print(table)
        _print_ranges(rows, kinds, console)
    copies = sorted(m["copy_gb_s"] for m in result["measurements"])
    loads = [m["others_load"] for m in result["measurements"] if m.get("others_load") is not None]
    if loads and max(loads) > BUSY:
        console.print(
            f"others took up to {max(loads):.0%} of the CPUs meanwhile: repeat on a quiet machine", style="bold yellow"
        )
    for line in (
        f"copy bandwidth: {copies[0]:.1f} to {copies[-1]:.1f} GB/s, read + written, timed between the candidates: "
        f"{result['settings']['copy']}",
        "floor: bytes that must move / copy bandwidth: logits and labels read once, gradient written; "
        "features read once forward, the student's read again and its gradient written backward",
        f"memory: peak extra of forward+backward, in student tensors: {result['settings']['memory']}",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_ranges(rows: list[Row], names: Iterable[str], console: Any) -> None:
    """Under a table: memory of every candidate, first calls of what compiles, and why something was not timed."""
    for name in names:
        parts = []
        memory = [value for row in rows if (value := row.memory(name)) is not None]
        if memory:
            parts.append(f"peak extra memory {number(min(memory))} to {number(max(memory))} student tensors")
        entries = [row.by_name[name] for row in rows if name in row.by_name]
        firsts = [m["first_call_s"] for m in entries if "first_call_s" in m]
        if firsts and name in (COMPILE, "triton"):
            parts.append(f"first call {min(firsts):.2f} to {max(firsts):.2f} s")
        if starved := sum(not m.get("queued", True) for m in entries):
            parts.append(f"the GPU may have waited for the host in {starved} of {len(entries)} rows")
        parts += [f"not timed: {reason}" for reason in sorted({m["reason"] for m in entries if "reason" in m})]
        if parts:
            console.print(f"{name}: {'; '.join(parts)}", markup=False, highlight=False, soft_wrap=True)


def markdown(result: Result) -> str:
    """The tables of docs/speed.md, forward+backward: figures in a document are generated, never typed.

    Losses of logits smaller than the labels come first, in a table of their own, with baselines of their own.
    """
    rows = make_rows(result, [FORWARD_BACKWARD])
    on_gpu = result["machine"]["device"] != "cpu"
    lowres = [row for row in rows if row.loss in LOWRES]
    others = [row for row in rows if row.loss not in LOWRES]
    tables = []
    if lowres:
        times = (COMPILE, BEFOREHAND, CROSS_ENTROPY, FULL_SIZE)
        tables.append(_table(lowres, on_gpu, times, (COMPILE, BEFOREHAND, CROSS_ENTROPY, FULL_SIZE)))
    if others:
        tables.append(_table(others, on_gpu, (EAGER, MASK_TRICK, COMPILE), (EAGER, COMPILE)))
    return "\n\n".join([*tables, _note(result, rows)]) + "\n"


def _table(rows: list[Row], on_gpu: bool, times: tuple[str, ...], ratios: tuple[str, ...]) -> str:
    ours = ["backend", "ms", "host ms"] if on_gpu else ["ours ms"]
    shares = ["GB/s", "of copy"] if on_gpu else ["x floor"]
    left = ["loss", "shape", "layout", "dtype"]
    right = [*(f"{name} ms" for name in times), *ours, *(f"x {name}" for name in ratios), *shares, "memory"]
    lines = [_line([*left, *right]), _line(["---"] * len(left) + ["---:"] * len(right))]
    for row in rows:
        case = [row.loss, row.shape.replace("x", " x ").replace("+", " + ").replace("@", " @ "), row.layout, row.dtype]
        case += [number(row.ms(name)) for name in times]
        for name in _backends(row) if on_gpu else [row.ours_name]:
            x_floor = row.x_floor(name)
            cells = [number(row.ms(name))]
            if on_gpu:
                cells = [name or "-", *cells, number(row.by_name.get(name or "", {}).get("host_ms"))]
            cells += [number(row.speedup(ratio, name)) for ratio in ratios]
            if on_gpu:
                cells += [number(row.gb_s(name)), f"{1 / x_floor:.0%}" if x_floor else "-"]
            else:
                cells.append("in cache" if row.in_cache and row.ours else number(x_floor))
            lines.append(_line([*case, *cells, number(row.memory(name))]))
    return "\n".join(lines)


def _note(result: Result, rows: list[Row]) -> str:
    machine = result["machine"]
    on_gpu = machine["device"] != "cpu"
    copies = sorted(m["copy_gb_s"] for m in result["measurements"])
    where = machine["name"] if on_gpu else f"{machine['name']}, {machine['threads']} threads"
    backends = sorted({row.ours_name for row in rows if row.ours_name})
    if on_gpu:
        ours_are, explained = "", "GB/s: of the bytes that must move; host ms: what a call takes the host"
    else:
        ours_are = f"ours: {', '.join(backends) or 'none'}; "
        explained = "x floor: times the time in which the bytes that must move could be copied"
    return (
        f"{where}, torch {machine['torch']}, {machine['date'][:10]}; {ours_are}"
        f"median of interleaved repeats; copy bandwidth {copies[0]:.0f} to {copies[-1]:.0f} GB/s in the same run; "
        f"{explained}; memory: peak extra, in student tensors."
    )


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _backends(row: Row) -> list[str | None]:
    """The backends that were timed, the one that "auto" picks first."""
    timed = [name for name, m in row.by_name.items() if m["kind"] == "backend" and "ms" in m]
    return sorted(timed, key=lambda name: name != row.ours_name) or [None]


def draw_charts(result: Result, path: pathlib.Path) -> list[pathlib.Path]:
    """One chart per loss: how many times faster, forward+backward, than each baseline. Several losses: PATH-LOSS."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    machine, paths = result["machine"], []
    by_loss = {loss: [r for r in make_rows(result, [FORWARD_BACKWARD]) if r.loss == loss and r.ours] for loss in LOSSES}
    losses = [loss for loss in LOSSES if by_loss[loss]]
    for loss in losses:
        rows = by_loss[loss]
        baselines = [name for name in COLOURS if any(row.speedup(name) for row in rows)]
        height = 1.1 + 0.24 * (len(baselines) + 0.8) * len(rows)
        figure, axes = plt.subplots(figsize=(8.5, height), layout="constrained")
        for place, row in enumerate(rows):
            for turn, name in enumerate(baselines):
                ratio = row.speedup(name)
                if ratio is None:
                    continue
                y = place * (len(baselines) + 0.8) + turn
                axes.barh(y, ratio, height=0.9, color=COLOURS[name], label=f"over {name}" if place == 0 else None)
                axes.annotate(
                    f"{number(ratio)}x", (ratio, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8
                )
        centres = [place * (len(baselines) + 0.8) + (len(baselines) - 1) / 2 for place in range(len(rows))]
        axes.set_yticks(centres, [f"{r.shape}\n{r.layout}, {r.dtype}".replace("+", "\n+ ") for r in rows], fontsize=8)
        axes.invert_yaxis()
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlim(right=max(row.speedup(name) or 1 for row in rows for name in baselines) * 1.5)
        axes.set_xlabel("times faster, forward + backward (log scale)")
        axes.set_title(f"{loss}: {machine['name']}, torch {machine['torch']}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False, loc="lower right")
        target = path if len(losses) == 1 else path.with_name(f"{path.stem}-{loss}{path.suffix or '.png'}")
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=150)
        plt.close(figure)
        paths.append(target)
    return paths
