"""What a run or a comparison leaves to read: the table on the console, pictures, and one page, report.html."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from . import card as cards
from . import data, models, pictures
from .config import Config, phase_folder
from .datasets import dataset_of, tiles_of
from .engine import device_of
from .files import DataError, read_json, replace_file
from .pictures import Seen, label

FILE = "report.html"


def table(results: dict[str, dict[str, Any]], classes: tuple[str, ...], crop: int, batch: int) -> Table:
    out = Table(title="Validation tiles", caption=f"GFLOPs and images/s: forward, {crop} x {crop}, batches of {batch}")
    out.add_column("")
    timed = any("teacher_ms" in r for r in results.values())
    for name in ("mIoU", *classes, "parameters", "GFLOPs", "images/s", *["teacher, ms a step"] * timed):
        out.add_column(Text(name), justify="right")
    scores = [r["miou"] for name, r in results.items() if name != "teacher" and r["miou"] is not None]
    for name, r in results.items():
        best = name != "teacher" and scores and r["miou"] == max(scores)
        out.add_row(
            Text(label(name)),  # a Text, here and below: text is never markup
            Text("-" if r["miou"] is None else f"{r['miou']:.3f}", style="bold green" if best else ""),
            *("-" if v is None else f"{v:.3f}" for v in r["iou"]),
            f"{r['parameters']:,}",
            f"{r['gflops']:.2f}",
            f"{r['images_per_s']:.0f}",
            *([f"{r['teacher_ms']:.1f} ({r['teacher_share']:.0%})" if "teacher_ms" in r else ""] if timed else []),
        )
    return out


def seen_of(folder: Path, cfg: Config, results: dict[str, Any], device: str = "auto") -> Seen:
    """The networks and validation tiles of a run. Raises DataError where either cannot be read."""
    on = device_of(device)
    one = dataset_of(cfg)
    _, val = data.split(tiles_of(cfg), list(cfg.val_tiles) if cfg.val_tiles else None)
    networks = {phase: cards.open_model(folder / phase_folder(phase), on)[0] for phase in results}
    first = next(iter(networks.values()))
    maximum = float(first.get_buffer("pixel_maximum"))
    shown = models.Normalisation((0.0,) * val[0].bands, (1.0,) * val[0].bands, maximum)  # each network has its own
    return Seen(folder, cfg, one.classes, one.palette, data.Pixels(val, cfg.cache_mb, "cpu", shown), networks, on)


def of_run(folder: Path, root: str | None = None, device: str = "auto") -> list[str]:
    """Writes training_curves.png, predictions.png, attention.png and report.html of a run; gives what it had to leave
    out and why, where the images or networks are no longer there."""
    from . import run_page

    cfg = Config.load(folder / "config.json")
    cfg = cfg if root is None else replace(cfg, root=root)
    if not (folder / "results.json").is_file():
        raise DataError(f"{folder}: no network of this run is finished, so there is nothing to report")
    results = read_json(folder / "results.json")
    missing, tiles, attention = [], [], []
    seen = None
    pictures.curves(folder)
    try:
        seen = seen_of(folder, cfg, results, device)
        tiles = pictures.tiles_shown(seen)
        attention = pictures.attention_maps(seen)
        pictures.predictions(seen, tiles)
        pictures.attention(seen, attention)
    except DataError as error:
        missing.append(f"no predictions and no attention maps: {error}")
    versions = cards.read(folder / phase_folder(list(results)[-1]))
    page = run_page.build(folder, cfg, results, seen, tiles, attention, versions, missing)
    replace_file(folder / FILE, page)
    return missing


def of_comparison(folder: Path) -> list[Path]:
    """Writes report.html: every method on every student and budget that the folder has runs of."""
    from . import comparison_page

    replace_file(folder / FILE, comparison_page.build(folder))
    return [folder / FILE]


def main(argv: list[str]) -> int:
    import sys

    from rich.console import Console
    from transformers.utils import logging

    from .cli import Parser, failed, one_line

    p = Parser(prog="dsct-distill report", description=__doc__, allow_abbrev=False)
    p.add_argument("folder", type=Path, metavar="RUN", help="folder of a run, or of dsct-distill compare")
    p.add_argument("--root", metavar="DIR", help="folder of the data set, if it has moved")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    given = p.parse_args(argv)
    logging.disable_progress_bar()
    try:
        if (given.folder / "runs.jsonl").is_file():
            of_comparison(given.folder)
        elif (given.folder / "config.json").is_file():
            for what in of_run(given.folder, given.root, given.device):
                print(f"WARNING: {one_line(what)}", file=sys.stderr)
        else:
            raise DataError(f"{given.folder}: neither a run (config.json) nor a comparison (runs.jsonl)")
    except (DataError, ValueError, OSError) as error:
        return failed(error)
    Console(markup=False, emoji=False, highlight=False).print(f"report: {given.folder / FILE}", soft_wrap=True)
    return 0
