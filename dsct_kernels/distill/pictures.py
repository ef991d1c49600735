"""What a run leaves to look at: training curves, predictions with their errors, and the attention maps."""

import io
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dsct_kernels import channel_attention_map

from . import data, models
from .config import Config, arm_loss
from .evaluate import predicted
from .files import read_metrics, replace_file
from .teacher import pair

SHOWN = 2200  # pixels of a tile's longer side in a picture, at most
PARTS = {"total": "loss", "ce": "cross-entropy", "matched": "matched CAFD", "jaccard": "Jaccard", "tckd": "TCKD",
         "nckd": "NCKD", "cafd": "CAFD", "miou": "mIoU"}  # fmt: skip

# What the teacher was worth, pixel by pixel; told apart by those who see no red or no green, too.
WORTH = {"both right": (222, 222, 222), "fixed": (0, 114, 178), "broken": (213, 94, 0), "both wrong": (120, 120, 120)}
UNLABELLED = (0, 0, 0)


@dataclass(frozen=True)
class Seen:
    """A run as the pictures need it: its networks, in the order they were trained, and its validation tiles."""

    folder: Path
    cfg: Config
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    pixels: data.Pixels
    networks: dict[str, nn.Module]
    device: torch.device

    def predict(self, model: nn.Module, i: int) -> torch.Tensor:
        """Class map of a validation tile, uint8, as validation makes it."""

        def logits(image: torch.Tensor) -> torch.Tensor:
            return models.forward(model, image).logits

        strips = predicted(self.pixels, i, self.cfg.window, len(self.classes), self.device, logits)
        return torch.cat([classes.byte().cpu() for _, classes in strips])


@dataclass(frozen=True)
class Shown:
    """A validation tile, thinned to what a picture holds."""

    name: str
    picture: np.ndarray  # (H, W, 3) uint8
    truth: np.ndarray  # (H, W) uint8 classes, 255 is ignored
    said: dict[str, np.ndarray]  # of every network


def label(phase: str) -> str:
    if phase == "teacher":
        return "teacher"
    name, _, rest = phase.partition(":")
    names = {"alone": "alone", "cafd": "+ CAFD", "jaccard": "+ Jaccard", "tnkd": "+ TNKD", "dsct": "+ DSCT"}
    named = f"student {names[name]}"
    return f"{named} ({rest})" if rest else named


def taught(phases: list[str]) -> str | None:
    """The student that is set against the student alone: DSCT, else the last of the others."""
    others = [p for p in phases if p not in ("teacher", "alone")]
    return None if "alone" not in phases or not others else "dsct" if "dsct" in others else others[-1]


# --------------------------------------------------------------------------------------------- tiles


def tiles_shown(seen: Seen, rows: int = 3) -> list[Shown]:
    shown = []
    for i in sample_tiles(seen.pixels, rows):
        tile = seen.pixels.tiles[i]
        thin = math.ceil(max(tile.height, tile.width) / SHOWN)
        pixels = thinned(seen.pixels, i, thin)
        said = {phase: seen.predict(model, i)[::thin, ::thin].numpy() for phase, model in seen.networks.items()}
        picture = data.picture(pixels, seen.pixels.normalisation.maximum)
        shown.append(Shown(tile.name, picture, data.labels(pixels).numpy(), said))
    return shown


def thinned(pixels: data.Pixels, i: int, thin: int) -> torch.Tensor:
    """Every `thin`-th row and column of a tile, read by strips."""
    tile = pixels.tiles[i]
    step = thin * 64
    strips = [pixels.window(i, y, 0, step, tile.width)[::thin, ::thin] for y in range(0, tile.height, step)]
    return torch.cat(strips)


def sample_tiles(pixels: data.Pixels, count: int) -> list[int]:
    tiles = len(pixels.tiles)
    return sorted({round(k * (tiles - 1) / max(1, count - 1)) for k in range(count)})


def painted(classes: np.ndarray, palette: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    """(H, W, 3): the colour of every class, black where there is none."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    return table[classes]


def errors(shown: Shown, phase: str, palette: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    """(H, W, 3): where a network is wrong the colour of what it said, else the image in pale grey."""
    wrong = (shown.said[phase] != shown.truth) & (shown.truth != data.IGNORE)
    grey = 170 + shown.picture.mean(-1, keepdims=True) / 3
    pale = np.repeat(grey.astype(np.uint8), 3, axis=2)
    return np.where(wrong[..., None], painted(shown.said[phase], palette), pale)


def worth(shown: Shown, alone: str, with_teacher: str) -> tuple[np.ndarray, dict[str, int]]:
    """(H, W, 3) and pixels of each kind: what the teacher fixed, and what it broke."""
    known = shown.truth != data.IGNORE
    before, after = (known & (shown.said[phase] == shown.truth) for phase in (alone, with_teacher))
    where = {
        "both right": before & after,
        "fixed": after & ~before,
        "broken": before & ~after,
        "both wrong": known & ~before & ~after,
    }
    picture = np.full((*shown.truth.shape, 3), UNLABELLED, np.uint8)
    for name, mask in where.items():
        picture[mask] = WORTH[name]
    return picture, {name: int(mask.sum()) for name, mask in where.items()}


def predictions(seen: Seen, tiles: list[Shown]) -> None:
    """predictions.png: image, label and every network's class map on validation tiles, and what the teacher was worth:
    the pixels that it fixed in the student and those that it broke."""
    plt = pyplot()
    from matplotlib.patches import Patch

    phases = list(seen.networks)
    other = taught(phases)
    titles = ["image", "label", *map(label, phases), *(["what the teacher was worth"] if other else [])]
    figure, axes = plt.subplots(
        len(tiles), len(titles), figsize=(2.9 * len(titles), 3.1 * len(tiles)), squeeze=False, layout="constrained"
    )
    for row, shown in zip(axes, tiles, strict=True):
        pictures = [shown.picture, painted(shown.truth, seen.palette)]
        pictures += [painted(said, seen.palette) for said in shown.said.values()]
        notes = ["", "", *(f"{wrong_share(shown, phase):.1%} wrong" for phase in phases)]
        if other:
            picture, counts = worth(shown, "alone", other)
            pictures.append(picture)
            total = max(1, sum(counts.values()))
            notes.append(f"{counts['fixed'] / total:.1%} fixed, {counts['broken'] / total:.1%} broken")
        for axis, picture, title, note in zip(row, pictures, titles, notes, strict=True):
            axis.imshow(picture)
            axis.set_title(title if shown is tiles[0] else "", fontsize=10)
            axis.set_xlabel(note, fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(shown.name, fontsize=8)
    colours = dict(zip(seen.classes, seen.palette, strict=True)) | (WORTH if other else {})
    named = [(name, (r / 255, g / 255, b / 255)) for name, (r, g, b) in colours.items()]
    handles = [Patch(facecolor=colour, edgecolor="0.5", label=name) for name, colour in named]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 12), frameon=False)
    save(figure, seen.folder / "predictions.png", 90)


def wrong_share(shown: Shown, phase: str) -> float:
    known = shown.truth != data.IGNORE
    return float((shown.said[phase] != shown.truth)[known].mean()) if known.any() else 0.0


# --------------------------------------------------------------------------------------------- curves


def drawn_curves(folder: Path) -> Any:
    """A figure with one panel per part of the loss, and validation mIoU where it was taken on the way; or None."""
    plt = pyplot()
    series: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for _, row in read_metrics(folder / "metrics.jsonl"):
        for key in PARTS:
            if key in row:
                value = float("nan") if row[key] is None else row[key]  # a gap in the curve
                series[key][row["phase"]].append((row["step"], value))
    if "total" in series:  # plain cross-entropy is both the total and the cross-entropy of its phase
        for phase, points in series["total"].items():
            series["ce"].setdefault(phase, points)
    keys = [k for k in PARTS if any(v for points in series[k].values() for _, v in points)]
    if not keys:
        return None
    columns = min(3, len(keys))
    rows = -(-len(keys) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 2.9 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(keys) :]:
        axis.remove()
    for axis, key in zip(axes.flat, keys, strict=False):
        for k, phase in enumerate(series["total"]):
            if phase in series[key]:
                axis.plot(*np.array(series[key][phase]).T, label=label(phase), color=f"C{k}", linewidth=1.2)
        axis.set_title(PARTS[key])
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7, framealpha=0.0)
    return figure


def curves(folder: Path) -> None:
    """training_curves.png."""
    figure = drawn_curves(folder)
    if figure is not None:
        save(figure, folder / "training_curves.png", 110)


# --------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class Attention:
    """Where the networks look in a window of one tile, by features that are compared, or by their logits."""

    of: str  # which features, in short
    picture: np.ndarray
    maps: dict[str, np.ndarray]

    def nats(self, phase: str) -> float:
        """KL(map || uniform)."""
        values = torch.from_numpy(self.maps[phase]).double()
        return float(torch.special.xlogy(values, values * values.numel()).sum())


@torch.no_grad()
def attention_maps(seen: Seen, rows: int = 2) -> list[Attention]:
    """One per tile and features that CAFD compares, or of the logits, whose classes matched CAFD compares."""
    students = [phase for phase in seen.networks if phase != "teacher"]
    loss = arm_loss((students or seen.cfg.arms)[-1], seen.cfg.loss)
    maximum = seen.pixels.normalisation.maximum
    black = torch.zeros(1, seen.pixels.channels - 1, seen.cfg.crop, seen.cfg.crop, device=seen.device)
    teacher = seen.networks["teacher"]
    pairs = {name: pair(seen.networks[name], teacher, black, loss.compared, loss.tapped) for name in students}
    labels = pairs[students[-1]].labels if students else []
    asked = {name: one.student for name, one in pairs.items()}
    asked["teacher"] = pairs[students[-1]].teacher if students else ()
    found = []
    for i in sample_tiles(seen.pixels, rows):
        size = seen.cfg.window // 32 * 32
        pixels = seen.pixels.window(i, 0, 0, size, size)
        h, w = (max(32, v // 32 * 32) for v in pixels.shape[:2])
        pixels = pixels[:h, :w]
        image = data.scaled(pixels.to(seen.device), maximum).permute(2, 0, 1)[None]
        image = F.pad(image, (0, w - image.shape[3], 0, h - image.shape[2]), mode="replicate")  # a tile below 32
        out = {name: models.forward(model.eval(), image, asked[name]) for name, model in seen.networks.items()}
        for k, of in enumerate(labels or ["logits"]):
            maps = {
                name: channel_attention_map(
                    one.features[k] if labels else one.logits,
                    channel_temperature=loss.channel_temperature,
                    spatial_temperature=loss.spatial_temperature if labels else loss.matched_temperature,
                )[0].float().cpu().numpy()
                for name, one in out.items()
            }  # fmt: skip
            found.append(Attention(of, data.picture(pixels, maximum), maps))
    for one in pairs.values():
        one.remove()
    return found


def attention(seen: Seen, found: list[Attention]) -> None:
    """attention.png: one column per network.

    Colours are stretched per map, so each says how far it is from "everywhere alike": a teacher's map of 0.00 nats has
    nothing to teach, and matching it only flattens the student (a lower spatial_temperature sharpens both).
    """
    plt = pyplot()
    titles = ["image", *map(label, seen.networks)]
    figure, axes = plt.subplots(
        len(found), len(titles), figsize=(2.6 * len(titles), 2.6 * len(found)), squeeze=False, layout="constrained"
    )
    for row, one in zip(axes, found, strict=True):
        row[0].imshow(one.picture)
        row[0].set_ylabel(one.of, fontsize=9)
        for axis, (phase, values) in zip(row[1:], one.maps.items(), strict=True):
            axis.imshow(values, cmap="magma")
            axis.set_xlabel(f"{one.nats(phase):.2f} nats from uniform", fontsize=8)
        for axis, title in zip(row, titles, strict=True):
            axis.set_title(title if one is found[0] else "", fontsize=10)
            axis.set_xticks([])
            axis.set_yticks([])
    save(figure, seen.folder / "attention.png", 90)


# --------------------------------------------------------------------------------------------- matplotlib


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["text.parse_math"] = False  # a tile named $a$ is no formula
    return plt


def save(figure: Any, path: Path, dpi: int) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format="png")
    replace_file(path, buffer.getvalue())
    pyplot().close(figure)
