"""`dsct-distill data`, the table of data sets, and `dsct-distill check`: what of one is on disk, and is it sound."""

import argparse
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import DataError
from ..images import read_bands, read_rgb, shape_of
from . import REGISTRY, check_choices, dataset_of
from .tile import IGNORE, Colour, Dataset, Pair, misplaced

if TYPE_CHECKING:
    from ..config import Config

COLUMNS = (
    "data set",
    "classes, in order",
    "ignored",
    "split",
    "bands",
    "labels",
    "normalisation",
    "on disk",
    "follows",
)
STRIP = 512  # rows that are read at a time
NAMED = 10  # problems of a kind that are named one by one
OVERLAYS, SHOWN = 6, 1024  # how many pictures, and pixels of their longer side


# --------------------------------------------------------------------------------------------- the table


def row(one: Dataset) -> tuple[str, ...]:
    classes = ", ".join(
        f"{k} {name} #{r:02X}{g:02X}{b:02X}"
        for k, (name, (r, g, b)) in enumerate(zip(one.classes, one.palette, strict=True))
    )
    return (
        one.name,
        classes or "those of data.yaml",
        one.ignored,
        one.split,
        ", ".join(one.bands) or "those of data.yaml",
        ", ".join(one.labels) or "one kind",
        "mean and deviation of each band, of the training tiles" if one.own_statistics else "ImageNet's",
        one.layout,
        one.follows,
    )


def markdown() -> str:
    """The table as docs/data-sets.md has it. The first of several bands or labels is the default."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(row(one)) + " |" for one in REGISTRY.values()]
    return "\n".join(lines) + "\n"


def table_main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(prog="dsct-distill data", description="Every data set, and how each is read.")
    p.add_argument("--markdown", action="store_true", help="as docs/data-sets.md has it")
    if p.parse_args(argv).markdown:
        print(markdown(), end="")
        return 0
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(markup=False, emoji=False, highlight=False)
    for one in REGISTRY.values():  # one below the other: nine columns do not fit a terminal
        table = Table(title=Text(one.name), title_justify="left", show_header=False)
        for column, cell in zip(COLUMNS[1:], row(one)[1:], strict=True):
            table.add_row(Text(column), Text(cell))
        console.print(table)
    return 0


# --------------------------------------------------------------------------------------------- one on disk


@dataclass
class Unknown:
    """A colour or number that no class has."""

    pixels: int = 0
    files: set[Path] = field(default_factory=set)
    example: str = ""


@dataclass
class Findings:
    """What there is to say of a data set on disk."""

    pairs: list[Pair]
    broken: list[str] = field(default_factory=list)
    misplaced: list[str] = field(default_factory=list)
    whole: list[Pair] = field(default_factory=list)
    sizes: Counter[tuple[int, int, int, str]] = field(default_factory=Counter)  # width, height, bands, samples
    pixels: Counter[int] = field(default_factory=Counter)  # per class, and IGNORE
    unknown: dict[str, Unknown] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        return not (self.broken or self.misplaced or self.unknown)


def look(pairs: list[Pair], step: Any = lambda: None) -> Findings:
    """Reads every file, whole; `step` is called once a pair."""
    found = Findings(pairs)
    for pair in pairs:
        try:
            problem = pair.problem()
            if problem is None:
                place = misplaced(pair)
                if place is not None:
                    found.misplaced.append(place)
                count(pair, found)
                found.whole.append(pair)
            else:
                found.broken.append(problem)
        except DataError as error:
            found.broken.append(str(error))
        step()
    return found


def count(pair: Pair, found: Findings) -> None:
    assert pair.image is not None and pair.label is not None
    image = shape_of(pair.image)
    for y in range(0, image.height, STRIP):
        window = (y, 0, min(STRIP, image.height - y), image.width)
        read_rgb(pair.image, *window) if pair.bands is None else read_bands(pair.image, pair.bands, *window)
        values = pair.key.read(pair.label, *window)
        for value, pixels in zip(*(v.tolist() for v in np.unique(values, return_counts=True)), strict=True):
            if value in pair.key.classes:
                found.pixels[pair.key.classes[value]] += pixels
                continue
            one = found.unknown.setdefault(pair.key.named(value), Unknown())
            one.pixels += pixels
            one.files.add(pair.label)
            if not one.example:
                r, c = (int(v) for v in np.argwhere(values == value)[0])
                one.example = f"{pair.label}, row {y + r}, column {c}"
    found.sizes[image.width, image.height, image.bands, image.samples] += 1


def report(found: Findings, classes: tuple[str, ...]) -> list[str]:
    """The findings in lines."""
    sides = Counter(pair.side for pair in found.whole)
    split = ", ".join(f"{n} {side}" for side, n in sorted(sides.items()) if side)
    lines = [f"pairs: {len(found.whole)} found{f' ({split})' if split else ''}, {len(found.broken)} missing or broken"]
    lines += some(found.broken)
    lines.append("sizes:")
    for (width, height, bands, samples), n in found.sizes.most_common(NAMED):
        lines.append(f"  {n} x {width} x {height}, {bands} bands of {samples}")
    if len(found.sizes) > NAMED:
        lines.append(f"  and {len(found.sizes) - NAMED} sizes more")
    total = sum(found.pixels.values()) + sum(one.pixels for one in found.unknown.values())
    lines.append("classes:")
    for k, name in [*enumerate(classes), (IGNORE, "(ignored)")]:
        pixels = found.pixels[k]
        lines.append(f"  {name:24} {pixels:14,d} {100 * pixels / max(1, total):7.3f}%")
    if found.unknown:
        lines.append(f"unknown colours or numbers: {len(found.unknown)}")
        ranked = sorted(found.unknown.items(), key=lambda item: -item[1].pixels)
        for name, one in ranked[:NAMED]:
            lines.append(f"  {name}: {one.pixels:,d} pixels in {len(one.files)} files, for one {one.example}")
        if len(ranked) > NAMED:
            lines.append(f"  and {len(ranked) - NAMED} more")
    if found.misplaced:
        lines.append(f"georeferenced elsewhere: {len(found.misplaced)}")
        lines += some(found.misplaced)
    return lines


def some(problems: list[str]) -> list[str]:
    more = [f"  and {len(problems) - NAMED} more"] if len(problems) > NAMED else []
    return [f"  {problem}" for problem in problems[:NAMED]] + more


def overlay(pair: Pair, palette: tuple[Colour, ...]) -> np.ndarray:
    """Image, label and the one over the other, side by side: (H, 3 W, 3) uint8. What is ignored or unknown is black in
    the label and shows the image in the last."""
    assert pair.image is not None and pair.label is not None
    pair = replace(pair, key=replace(pair.key, strict=False))  # unknown pixels are to be looked at
    tile = pair.tile()
    thin = -(-max(tile.height, tile.width) // SHOWN)
    step = 64 * thin
    starts = range(0, tile.height, step)
    pixels = np.concatenate([tile.read(y, 0, min(step, tile.height - y), tile.width)[::thin, ::thin] for y in starts])
    bands, label = pixels[..., :-1].astype(np.float32), pixels[..., -1].astype(np.uint8)
    low, high = np.percentile(bands, (1, 99)) if pixels.dtype != np.uint8 else (0, 255)
    shown = np.clip(255 * (bands - low) / max(high - low, 1), 0, 255)
    shown = shown[..., :3] if shown.shape[-1] >= 3 else np.repeat(shown[..., :1], 3, axis=2)
    colours = np.zeros((256, 3), np.float32)
    colours[: len(palette)] = palette
    painted = colours[label]
    over = np.where((label == IGNORE)[..., None], shown, (shown + painted) / 2)
    return np.concatenate([shown, painted, over], axis=1).round().astype(np.uint8)


def save_overlays(found: Findings, palette: tuple[Colour, ...], out: Path) -> list[Path]:
    from PIL import Image

    chosen = {round(k * (len(found.whole) - 1) / (OVERLAYS - 1)) for k in range(OVERLAYS)} if found.whole else set()
    out.mkdir(parents=True, exist_ok=True)
    saved = []
    for i in sorted(chosen):
        pair = found.whole[i]
        path = out / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', pair.name)}.png"
        Image.fromarray(overlay(pair, palette)).save(path)
        saved.append(path)
    return saved


def main(argv: list[str]) -> int:
    from ..cli import BANDS_HELP, LABELS_HELP, failed
    from ..config import Config

    p = argparse.ArgumentParser(
        prog="dsct-distill check",
        description="What of a data set is on disk: pairs, sizes, classes, unknown colours; and pictures of labels "
        "over images. Every file is read, whole. Exit status 1 if something is wrong with it.",
    )
    p.add_argument("data", choices=[name for name, one in REGISTRY.items() if one.pairs is not None])
    p.add_argument("--root", required=True, metavar="DIR", help="folder of the data set")
    p.add_argument("--bands", help=BANDS_HELP)
    p.add_argument("--labels", help=LABELS_HELP)
    p.add_argument("--out", type=Path, metavar="DIR", help="for the pictures (default: check-DATA)")
    given = p.parse_args(argv)
    cfg = Config(data=given.data, root=given.root, bands=given.bands, labels=given.labels)
    try:
        return checked(cfg, given.out or Path(f"check-{given.data}"))
    except (DataError, ValueError, OSError) as error:
        return failed(error)


def checked(cfg: "Config", out: Path) -> int:
    from rich.console import Console
    from rich.progress import Progress

    check_choices(cfg)
    one = dataset_of(cfg)
    assert one.pairs is not None
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    pairs = one.pairs(cfg)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("pairs", total=len(pairs))
        found = look(pairs, lambda: progress.advance(bar))
    for line in report(found, one.classes):
        console.print(line)
    for path in save_overlays(found, one.palette, out):
        console.print(f"picture: {path}")
    console.print("nothing wrong" if found.sound else "something is wrong, see above")
    return 0 if found.sound else 1
