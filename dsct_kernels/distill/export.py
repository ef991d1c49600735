"""`dsct-distill export`: a network to ship, as a `save_pretrained` folder and as ONNX, checked on real images.

The ONNX file takes pixels as they stand in an image file and gives logits at their resolution: normalisation and
upsampling are in the graph, so that nothing about the training has to be known where it runs.
"""

import copy
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from . import card as cards
from . import models
from .card import Card
from .config import Config
from .datasets import tiles_of
from .datasets.tile import Tile
from .files import DataError, write_json
from .images import read_bands, read_rgb, shape_of

AGREEMENT, TOLERANCE = 0.999, 1e-3
DISAGREES = 1
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
Batch = np.ndarray  # (N, bands, H, W) float32, as in the image file


class Deployed(nn.Module):
    """Pixels (N, bands, H, W) float32 as they stand in an image file to logits (N, classes, H, W)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        logits = models.forward(self.model, pixels / self.model.get_buffer("pixel_maximum")).logits
        return F.interpolate(logits, size=pixels.shape[-2:], mode="bilinear", align_corners=False)


# --------------------------------------------------------------------------------------------- the images


def of_files(files: list[Path], card: Card, size: int) -> Iterator[Batch]:
    """Windows of image files, spread along their diagonals."""
    for path in files:
        shape = shape_of(path)
        need = max(card.bands or (1,))
        if shape.samples != card.samples or shape.bands < need:
            raise DataError(
                f"{path}: {shape.bands} bands of {shape.samples}, but the network reads band {need} of {card.samples}"
            )
        side = size * card.downscale
        if min(shape.height, shape.width) < side:
            raise DataError(f"{path}: {shape.width} x {shape.height}, expected {side} x {side} or more")
        for part in (0.0, 0.5, 1.0):
            window = (round(part * (shape.height - side)), round(part * (shape.width - side)), side, side)
            pixels = read_rgb(path, *window) if card.bands is None else read_bands(path, card.bands, *window)
            k = card.downscale
            averaged = np.rint(pixels.reshape(size, k, size, k, -1).mean((1, 3), dtype=np.float32))
            yield np.ascontiguousarray(averaged.transpose(2, 0, 1)[None])


def of_tiles(tiles: list[Tile], size: int) -> Iterator[Batch]:
    """Windows of a few of a run's tiles."""
    large = [tile for tile in tiles if min(tile.height, tile.width) >= size]
    if not large:
        raise DataError(f"--size {size}: no tile of the data set is that large; the first is {tiles[0].width} wide")
    for i in np.unique(np.linspace(0, len(large) - 1, 4).round().astype(int)):
        tile = large[i]
        pixels = tile.read((tile.height - size) // 2, (tile.width - size) // 2, size, size)[..., :-1]
        yield np.ascontiguousarray(pixels.transpose(2, 0, 1)[None].astype(np.float32))


def images_of(model: Path, card: Card, files: list[Path], size: int) -> list[Batch]:
    """From the files that were named, else from the data set of the run that the folder lies in."""
    if files:
        return list(of_files(files, card, size))
    run = model.absolute().parent / "config.json"
    if not run.is_file():
        raise DataError(f"{model}: lies in no run folder, so its data set is unknown; name images with --image FILE")
    return list(of_tiles(tiles_of(Config.load(run)), size))


# --------------------------------------------------------------------------------------------- ONNX


class AveragePool(nn.AdaptiveAvgPool2d):
    """The same as two matrix products, which ONNX can express for any height and width."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = self.output_size if isinstance(self.output_size, tuple) else (self.output_size, self.output_size)
        down, across = (_averages(n or x.shape[d], x.shape[d], x) for d, n in zip((2, 3), size, strict=True))
        return down @ x @ across.T


def _averages(cells: int, length: int, like: torch.Tensor) -> torch.Tensor:
    """(cells, length): row i averages floor(i length / cells) up to, without it, ceil((i + 1) length / cells)."""
    i = torch.arange(cells, device=like.device)[:, None]
    at = torch.arange(length, device=like.device)[None]
    inside = (at >= i * length // cells) & (at < ((i + 1) * length + cells - 1) // cells)
    weight = inside.to(like.dtype)
    return weight / weight.sum(1, keepdim=True)


def for_any_size(model: nn.Module) -> nn.Module:
    """A copy without adaptive pooling, whose regions ONNX would fix at those of one size."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) is nn.AdaptiveAvgPool2d:
            module.__class__ = AveragePool  # and not another module in its place: some networks keep a list beside
    return model


# Which dimensions of (N, bands, H, W) may change, the most useful first.
FREE: dict[str, tuple[int, ...]] = {"batch, height, width": (0, 2, 3), "batch": (0,), "none": ()}


def to_onnx(network: nn.Module, path: Path, bands: int, size: int, free: str, metadata: dict[str, str]) -> None:
    """Writes the file, with the dimensions free that `free` names. Raises whatever the exporter raises."""
    example = torch.zeros(2 if "batch" in free else 1, bands, size, size)  # torch.export takes a 1 for a constant
    program = torch.onnx.export(
        network, (example,), dynamo=True, input_names=["pixels"], output_names=["logits"], verbose=False,
        dynamic_shapes=({d: torch.export.Dim.DYNAMIC for d in FREE[free]},),
    )  # fmt: skip
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces: most of a small file, and full of this machine's paths
    program.model.metadata_props.update(metadata)
    program.save(path, external_data=False)


def session_of(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def batches(images: list[Batch], free: str) -> Iterator[Batch]:
    """What the two are compared on: every image alone, and, where dimensions are free, several at once and other
    heights and widths."""
    yield from images
    if "batch" in free:
        yield np.concatenate([*images, images[0]])
    if "height" in free:
        height, width = images[0].shape[2:]
        yield images[0][:, :, : max(32, height // 64 * 32)]
        yield np.concatenate([images[-1], images[-1]], 3)
        yield images[0][:, :, : height - 5, : width - 11]


@torch.inference_mode()
def compared(network: Deployed, session: Any, images: list[Batch], free: str) -> dict[str, Any]:
    """The largest difference of the logits, and the share of pixels to which both give one class."""
    worst, largest, same, pixels, count = 0.0, 0.0, 0, 0, 0
    for batch in batches(images, free):
        ours = network(torch.from_numpy(batch)).numpy()
        theirs = session.run(None, {"pixels": batch})[0]
        if theirs.shape != ours.shape:
            raise DataError(f"ONNX gives {theirs.shape} where PyTorch gives {ours.shape}")
        difference = np.abs(ours - theirs).max()
        worst = max(worst, float(difference) if np.isfinite(difference) else float("inf"))
        largest = max(largest, float(np.abs(ours).max()))
        same += int((ours.argmax(1) == theirs.argmax(1)).sum())
        pixels, count = pixels + ours[:, 0].size, count + 1
    return {
        "batches": count, "pixels": pixels, "largest_logit": largest, "max_abs_difference": worst,
        "argmax_agreement": same / pixels,
    }  # fmt: skip


def agree(found: dict[str, Any]) -> bool:
    allowed = TOLERANCE * max(1.0, found["largest_logit"])
    return bool(found["max_abs_difference"] <= allowed and found["argmax_agreement"] >= AGREEMENT)


def milliseconds(call: Callable[[], Any], seconds: float = 1.0) -> float:
    """Median of some calls after one to warm up."""
    call()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 50):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return round(1000 * statistics.median(times), 2)


@torch.inference_mode()
def torch_ms(network: nn.Module, image: Batch) -> float:
    tensor = torch.from_numpy(image)
    return milliseconds(lambda: network(tensor))


def megabytes(path: Path) -> float:
    files = sorted(path.glob("model*.safetensors")) if path.is_dir() else [path]
    return round(sum(f.stat().st_size for f in files) / 1e6, 3)


def teacher_beside(model: Path, teacher: Path | None) -> Path | None:
    """The teacher to set latency and size beside: the one that was named, or that of the run."""
    if teacher is not None:
        return teacher
    found = model.absolute().parent / "teacher"
    return found if found != model.absolute() and (found / "config.json").is_file() else None


# --------------------------------------------------------------------------------------------- the whole export


def export(
    model_folder: Path, out: Path, *, images: list[Path], teacher: Path | None, size: int | None, threads: int,
    force: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The folder `out`, and what export.json says in it. Where ONNX and PyTorch disagree, `out` is left as it was and
    the result says `"agrees": False`."""
    check_out(out, model_folder, force)
    for name in ONNX_PACKAGES:
        try:
            __import__(name)
        except ImportError as error:
            raise DataError(f"export needs the package {name} ({error}): pip install 'dsct-kernels[export]'") from error
    torch.set_num_threads(threads)
    model, card, classes = cards.open_model(model_folder)
    size = size or max(32, min(card.window, 512) // 32 * 32)
    if size < 32 or size % 32:
        raise ValueError(f"--size: expected a multiple of 32, got {size}")
    shown = images_of(model_folder, card, images, size)
    network = Deployed(model).eval()
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        models.save(model, temporary)
        cards.write(temporary, card)
        onnx = temporary / "model.onnx"
        colours = [f"#{r:02X}{g:02X}{b:02X}" for r, g, b in card.palette]
        metadata = {
            "classes": json.dumps(classes), "palette": json.dumps(colours),
            "bands": json.dumps(card.bands), "samples": card.samples, "downscale": str(card.downscale),
        }  # fmt: skip
        written = Deployed(for_any_size(model)).eval()
        failures: dict[str, str] = {}
        for free in FREE:
            try:
                to_onnx(written, onnx, models.bands_of(model), size, free, metadata)
                session = session_of(onnx, threads)
                found = compared(network, session, shown, free)
            except DataError:
                raise
            except Exception as error:  # the exporter and the runtime have many kinds for what they cannot do
                failures[free] = next(iter(str(error).strip().splitlines()), repr(error))[:300]
                continue
            if agree(found):
                break
            failures[free] = f"logits differ by {found['max_abs_difference']:.2e}"
        else:
            if "none" in failures and not failures["none"].startswith("logits differ"):
                raise DataError(f"{model_folder}: cannot be exported: {failures['none']}")
        rows = {
            "network, PyTorch": row(model, megabytes(temporary), torch_ms(network, shown[0])),
            "network, ONNX": row(model, megabytes(onnx), milliseconds(lambda: session.run(None, {"pixels": shown[0]}))),
        }
        beside = teacher_beside(model_folder, teacher)
        if beside is not None:
            other, _, _ = cards.open_model(beside)
            if models.bands_of(other) != models.bands_of(model):
                raise DataError(f"{beside}: reads {models.bands_of(other)} bands, the network {models.bands_of(model)}")
            rows["teacher, PyTorch"] = row(other, megabytes(beside), torch_ms(Deployed(other).eval(), shown[0]))
        result = {
            "agrees": agree(found),
            "free_dimensions": free,
            "failed_with_more": failures,
            **found,
            "image": list(shown[0].shape),
            "threads": threads,
            "networks": rows,
            "versions": cards.versions((*cards.PACKAGES, *ONNX_PACKAGES)),
        }
        if result["agrees"]:
            write_json(temporary / "export.json", result)
            if out.exists():
                shutil.rmtree(out)
            os.replace(temporary, out)
        return result
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def row(model: nn.Module, megabytes: float, ms: float) -> dict[str, float]:
    return {"parameters": models.parameters(model), "megabytes": megabytes, "milliseconds": ms}


def check_out(out: Path, model: Path, force: bool) -> None:
    if out.exists():
        if out.absolute() == model.absolute() or model.absolute().is_relative_to(out.absolute()):
            raise DataError(f"{out}: holds the model itself; name another folder")
        if not out.is_dir():
            raise DataError(f"{out}: is a file, expected the name of a folder")
        if any(out.iterdir()):
            if not force:
                raise DataError(f"{out}: exists; put another in its place with --force")
            if not (out / "export.json").is_file():
                raise DataError(f"{out}: is no export of before (no export.json in it), so it is not replaced")
    if not out.absolute().parent.is_dir():
        raise DataError(f"{out}: cannot be written, there is no folder {out.parent}")


def main(argv: list[str]) -> int:
    import warnings
    from logging import getLogger

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
    from transformers.utils import logging

    from .cli import Parser, failed

    p = Parser(prog="dsct-distill export", description=__doc__, allow_abbrev=False)
    p.add_argument("model", type=Path, metavar="MODEL", help="a network's folder: RUN/student-dsct")
    p.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    p.add_argument("--image", type=Path, action="append", default=[], metavar="FILE",
                   help="to check on, again for more (default: tiles of the run that MODEL lies in)")  # fmt: skip
    p.add_argument("--teacher", type=Path, metavar="DIR", help="to set beside it (default: the run's)")
    p.add_argument("--size", type=int, help="side of the images of the check (default: the window of evaluation)")
    p.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads of the timings")
    p.add_argument("--force", action="store_true", help="put it in the place of an export of before")
    given = p.parse_args(argv)
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # of the exporter's, about its own insides
    getLogger("torch.onnx").setLevel("ERROR")
    if given.threads < 1:
        p.error(f"--threads: expected 1 or more, got {given.threads}")
    try:
        result = export(given.model, given.out, images=given.image, teacher=given.teacher, size=given.size,
                        threads=given.threads, force=given.force)  # fmt: skip
    except (DataError, ValueError, OSError) as error:
        return failed(error)
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    console.print(
        f"ONNX against PyTorch on {result['batches']} batches, {result['pixels']:,} pixels: logits differ by "
        f"{result['max_abs_difference']:.2e} at most (the largest is {result['largest_logit']:.1f}), "
        f"{100 * result['argmax_agreement']:.4f}% of the pixels have the same class; "
        f"free dimensions: {result['free_dimensions']}"
    )
    if not result["agrees"]:
        return failed_check(given.out)
    shape = " x ".join(map(str, result["image"]))
    table = Table(caption=f"milliseconds: median, one image of {shape}, {result['threads']} threads")
    for name in ("", "parameters", "MB", "ms"):
        table.add_column(name, justify="right" if name else "left")
    for name, r in result["networks"].items():
        table.add_row(Text(name), f"{r['parameters']:,}", f"{r['megabytes']:.2f}", f"{r['milliseconds']:.1f}")
    console.print(table)
    console.print(f"export: {given.out}")
    return 0


def failed_check(out: Path) -> int:
    import sys

    print(
        f"error: ONNX and PyTorch disagree: by more than {TOLERANCE} of the largest logit, or on the class of more "
        f"than {1 - AGREEMENT:.1%} of the pixels; {out} was not made",
        file=sys.stderr,
    )
    return DISAGREES
