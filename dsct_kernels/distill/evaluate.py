"""What a network is worth: class maps of whole tiles by windows, IoU over all of them, and how fast it is."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import data, models
from .config import Arm, Config


def window_starts(length: int, size: int, overlap: int | None = None) -> list[int]:
    """Evenly spread starts of windows that cover `length` and overlap by so many pixels or more, or by a quarter."""
    if length <= size:
        return [0]
    count = math.ceil((length - size) / (0.75 * size if overlap is None else size - overlap)) + 1
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


def strips(acc: Any, model: nn.Module, val: data.Pixels, i: int, cfg: Config, classes: int) -> Any:
    """Class maps of a validation tile, strip by strip, each with its first row; in the run's precision."""

    def logits(image: torch.Tensor) -> torch.Tensor:
        with acc.autocast():
            return models.forward(model, image).logits

    return predicted(val, i, cfg.window, classes, acc.device, logits)


@torch.no_grad()
def scores(acc: Any, model: nn.Module, val: data.Pixels, cfg: Config, classes: int) -> dict[str, Any]:
    """IoU over the validation tiles, each process its share of them."""
    from torchmetrics.classification import MulticlassConfusionMatrix

    model.eval()
    if acc.num_processes > 1:  # the running statistics of the last step: those that are saved
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)
    confusion = MulticlassConfusionMatrix(classes, ignore_index=data.IGNORE, validate_args=False).to(acc.device)
    for i in range(acc.process_index, len(val.tiles), acc.num_processes):
        for y, found in strips(acc, model, val, i, cfg, classes):
            label = data.labels(val.window(i, y, 0, *found.shape)).to(acc.device).long()
            confusion.update(found[None], label[None])
    matrix = confusion.compute().double()
    hit = matrix.diag()
    iou = hit / (matrix.sum(0) + matrix.sum(1) - hit)  # NaN for a class that is nowhere
    return {
        "miou": finite(float(iou.nanmean())),
        "iou": [finite(v) for v in iou.tolist()],
        "accuracy": finite(float(hit.sum() / matrix.sum())),
        "confusion": matrix.long().tolist(),  # rows: labels, columns: what was said
    }


def final(
    arm: Arm, result: dict[str, Any], model: nn.Module, cfg: Config, device: torch.device, diverged: bool
) -> tuple[dict[str, Any], str]:
    """Scores of a network that is done, with what it costs; and what has to be said aloud about them, if anything."""
    warning, state = "", model.state_dict().values()
    result["diverged"] = diverged or not all(v.isfinite().all() for v in state if v.is_floating_point())
    if result["diverged"]:  # what its NaNs were taken for says nothing
        result.update(miou=None, iou=[None] * len(result["iou"]), accuracy=None)
        rate, why = "--teacher-lr" if arm.is_teacher else "--student-lr", "its loss or weights are not finite"
        warning = f"{arm.phase} DIVERGED: {why}, so it has no score; try a lower {rate}"
    elif result["miou"] is None:
        why = "no validation pixel has a label; validate on other tiles (--val-tiles)"
        warning = f"{arm.phase} has NO SCORE: {why}"
    result["parameters"], result["gflops"] = models.parameters(model), models.gflops(model, cfg.crop)
    result["images_per_s"] = images_per_second(model, cfg, device)
    return result, warning


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
