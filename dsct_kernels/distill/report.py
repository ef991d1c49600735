"""What a run leaves to look at: the table, training curves, predictions side by side, and the attention maps."""

import io
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from rich.text import Text
from torch import nn

from dsct_kernels import channel_attention_map

from . import data, models
from .config import arm_loss
from .files import read_metrics, replace_file
from .teacher import pair

SHOWN = 2200  # pixels of a tile's longer side in a picture, at most
PARTS_SHOWN = ("total", "ce", "matched", "jaccard", "tckd", "nckd", "cafd")


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


def label(phase: str) -> str:
    if phase == "teacher":
        return "teacher"
    name, _, rest = phase.partition(":")
    names = {"alone": "alone", "cafd": "+ CAFD", "jaccard": "+ Jaccard", "tnkd": "+ TNKD", "dsct": "+ DSCT"}
    named = f"student {names[name]}"
    return f"{named} ({rest})" if rest else named


def curves(folder: Path) -> None:
    """training_curves.png: one panel per part of the loss, and validation mIoU where it was taken on the way."""
    plt = pyplot()
    series: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for _, row in read_metrics(folder / "metrics.jsonl"):
        for key in (*PARTS_SHOWN, "miou"):
            if key in row:
                value = float("nan") if row[key] is None else row[key]  # a gap in the curve
                series[key][row["phase"]].append((row["step"], value))
    if "total" in series:  # plain cross-entropy is both the total and the cross-entropy of its phase
        for phase, points in series["total"].items():
            series["ce"].setdefault(phase, points)
    keys = [k for k in (*PARTS_SHOWN, "miou") if any(v for points in series[k].values() for _, v in points)]
    if not keys:
        return
    figure, axes = plt.subplots(1, len(keys), figsize=(3.6 * len(keys), 3.2), squeeze=False, layout="constrained")
    names = {
        "total": "loss",
        "ce": "cross-entropy",
        "tckd": "TCKD",
        "nckd": "NCKD",
        "cafd": "CAFD",
        "matched": "matched CAFD",
        "jaccard": "Jaccard",
        "miou": "mIoU",
    }
    for axis, key in zip(axes[0], keys, strict=True):
        for k, phase in enumerate(series["total"]):
            if phase in series[key]:
                axis.plot(*np.array(series[key][phase]).T, label=label(phase), color=f"C{k}", linewidth=1.2)
        axis.set_title(names[key])
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    save(figure, folder / "training_curves.png", 110)


def predictions(run: Any, trained: dict[str, nn.Module], rows: int = 3) -> None:
    """predictions.png: image, label and every network's class map on validation tiles."""
    plt = pyplot()
    from matplotlib.patches import Patch

    palette = np.array([*run.palette, (0, 0, 0)], np.uint8)
    tiles = sample_tiles(run, rows)
    titles = ["image", "label", *map(label, trained)]
    figure, axes = plt.subplots(
        len(tiles), len(titles), figsize=(2.9 * len(titles), 2.9 * len(tiles)), squeeze=False, layout="constrained"
    )
    for row, i in zip(axes, tiles, strict=True):
        tile = run.val_pixels.tiles[i]
        thin = math.ceil(max(tile.height, tile.width) / SHOWN)
        pixels = thinned(run.val_pixels, i, thin)
        truth = data.labels(pixels).numpy()
        pictures = [data.picture(pixels, run.normalisation.maximum)]
        pictures += [palette[np.where(truth == data.IGNORE, len(run.classes), truth)]]
        pictures += [palette[run.predict(model, i)[::thin, ::thin].cpu().numpy()] for model in trained.values()]
        for axis, picture, title in zip(row, pictures, titles, strict=True):
            axis.imshow(picture)
            axis.set_title(title if i == tiles[0] else "", fontsize=10)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(tile.name, fontsize=8)
    handles = [Patch(facecolor=palette[k] / 255, edgecolor="0.5", label=name) for k, name in enumerate(run.classes)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    save(figure, run.folder / "predictions.png", 90)


@torch.no_grad()
def attention(run: Any, trained: dict[str, nn.Module], rows: int = 2) -> None:
    """attention.png: where the networks look, one column per network, one row per tile and stride that CAFD compares,
    or for the logits, whose classes matched CAFD compares one by one.

    Colours are stretched per map, so each says how far it is from "everywhere alike": a teacher's map of 0.00 nats has
    nothing to teach, and matching it only flattens the student (a lower spatial_temperature sharpens both).
    """
    plt = pyplot()
    loss = arm_loss(list(trained)[-1], run.cfg.loss)
    black = torch.zeros(1, len(run.normalisation.mean), run.cfg.crop, run.cfg.crop, device=run.device)
    teacher, *students = trained.values()
    pairs = [pair(student, teacher, black, loss.compared, loss.tapped) for student in students]
    asked = [pairs[-1].teacher, *(one.student for one in pairs)]
    grid = [(i, k) for i in sample_tiles(run, rows) for k in range(len(pairs[-1].labels) or 1)]
    titles = ["image", *map(label, trained)]
    figure, axes = plt.subplots(
        len(grid), len(titles), figsize=(2.6 * len(titles), 2.6 * len(grid)), squeeze=False, layout="constrained"
    )
    for row, (i, k) in zip(axes, grid, strict=True):
        size = run.cfg.window // 32 * 32
        pixels = run.val_pixels.window(i, 0, 0, size, size)
        h, w = (max(32, v // 32 * 32) for v in pixels.shape[:2])
        pixels = pixels[:h, :w]
        image = data.scaled(pixels.to(run.device), run.normalisation.maximum).permute(2, 0, 1)[None]
        image = F.pad(image, (0, w - image.shape[3], 0, h - image.shape[2]), mode="replicate")  # a tile below 32
        maps = []
        for model, features in zip(trained.values(), asked, strict=True):
            out = models.forward(model.eval(), image, features)
            maps.append(
                channel_attention_map(
                    out.features[k] if out.features else out.logits,
                    channel_temperature=loss.channel_temperature,
                    spatial_temperature=loss.spatial_temperature if out.features else loss.matched_temperature,
                )[0]
                .float()
                .cpu()
            )
        row[0].imshow(data.picture(pixels, run.normalisation.maximum))
        row[0].set_ylabel(pairs[-1].labels[k] if pairs[-1].labels else "logits", fontsize=9)
        for axis, values in zip(row[1:], maps, strict=True):
            axis.imshow(values, cmap="magma")
            nats = float(torch.special.xlogy(values, values * values.numel()).sum())  # KL(map || uniform)
            axis.set_xlabel(f"{nats:.2f} nats from uniform", fontsize=8)
        for axis, title in zip(row, titles, strict=True):
            axis.set_title(title if (i, k) == grid[0] else "", fontsize=10)
            axis.set_xticks([])
            axis.set_yticks([])
    save(figure, run.folder / "attention.png", 90)
    for one in pairs:
        one.remove()


def thinned(pixels: data.Pixels, i: int, thin: int) -> torch.Tensor:
    """Every `thin`-th row and column of a tile, read by strips."""
    tile = pixels.tiles[i]
    step = thin * 64
    strips = [pixels.window(i, y, 0, step, tile.width)[::thin, ::thin] for y in range(0, tile.height, step)]
    return torch.cat(strips)


def sample_tiles(run: Any, count: int) -> list[int]:
    tiles = len(run.val_pixels.tiles)
    return sorted({round(k * (tiles - 1) / max(1, count - 1)) for k in range(count)})


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
