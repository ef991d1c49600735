"""`dsct-distill predict`: the class map of a whole raster, by windows that overlap, in memory that its height adds
nothing to.

Windows go row by row. Their probabilities are averaged, each with a weight that falls like a raised cosine towards its
window's border, so that no seam shows where one takes over from another. Of what was said so far only the rows are kept
that windows are still to come for.
"""

import itertools
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from . import card as cards
from . import models
from .card import Card
from .datasets.tile import IGNORE
from .engine import device_of
from .evaluate import window_starts
from .files import DataError
from .images import Shape, open_image, orientation, read_bands, read_rgb, read_valid, shape_of

BLOCK = 512  # side of a block of OUT.tif
Network = Callable[[torch.Tensor], torch.Tensor]

# --------------------------------------------------------------------------------------------- windows and weights


def shares(begins: list[int], size: int, length: int) -> list[np.ndarray]:
    """The weight of each window along one axis, (size,) float32 each. At every pixel they sum to 1: exactly 1 where one
    window is alone, else each its share of raised cosines, sin^2(pi (t + 1/2) / size) at pixel t of a window."""
    size = min(size, length)
    bump = np.sin(np.pi * (np.arange(size) + 0.5) / size) ** 2
    total = np.zeros(length)
    for begin in begins:
        total[begin : begin + size] += bump
    return [(bump / total[begin : begin + size]).astype(np.float32) for begin in begins]


@dataclass(frozen=True)
class Plan:
    """How a raster is cut: all windows have one shape."""

    height: int
    width: int
    window: int
    overlap: int

    @property
    def rows(self) -> list[int]:
        return window_starts(self.height, self.window, self.overlap)

    @property
    def columns(self) -> list[int]:
        return window_starts(self.width, self.window, self.overlap)


Read = Callable[[int, int], tuple[np.ndarray, np.ndarray | None]]
Strip = tuple[int, torch.Tensor, np.ndarray | None]


@torch.inference_mode()
def blended(
    plan: Plan,
    read: Read,
    network: Network,
    classes: int,
    batch: int = 4,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] = lambda windows: None,
) -> Iterator[Strip]:
    """First row, probabilities (classes, rows, width) float32 and validity (rows, width) of strip after strip.

    read: first row and number of rows to pixels (rows, width, bands), and where they hold data (None: everywhere).
    network: pixels (N, h, w, bands) as they were read, on the device, to probabilities (N, classes, h, w).
    """
    rows, columns = plan.rows, plan.columns
    height, width = min(plan.window, plan.height), min(plan.window, plan.width)
    down = [torch.from_numpy(w).to(device) for w in shares(rows, plan.window, plan.height)]
    across = [torch.from_numpy(w).to(device) for w in shares(columns, plan.window, plan.width)]
    deepest = max((y + height - following for y, following in itertools.pairwise(rows)), default=0)
    carry = torch.zeros(classes, deepest, plan.width, device=device)  # rows that the row of windows before has begun
    carried = 0
    for i, y in enumerate(rows):
        done = (rows[i + 1] if i + 1 < len(rows) else plan.height) - y
        pixels, valid = read(y, height)
        finished = torch.zeros(classes, done, plan.width)
        local = torch.zeros(classes, height, width, device=device)  # columns that the window before has begun
        for first in range(0, len(columns), batch):
            some = columns[first : first + batch]
            # Where nothing holds data nothing is said, and the network is not asked.
            asked = [x for x in some if valid is None or valid[:, x : x + width].any()]
            found = {}
            if asked:
                stack = np.stack([pixels[:, x : x + width] for x in asked])
                stack = stack.view(np.int16) if stack.dtype == np.uint16 else stack
                found = dict(zip(asked, network(torch.from_numpy(stack).to(device)), strict=True))
            for j, x in enumerate(some, first):
                if x in found:
                    local += found[x] * (down[i][:, None] * across[j])
                ready = (columns[j + 1] if j + 1 < len(columns) else plan.width) - x
                part = local[:, :, :ready]
                part[:, :carried] += carry[:, :carried, x : x + ready]
                finished[:, :, x : x + ready] = part[:, :done]
                carry[:, : height - done, x : x + ready] = part[:, done:]
                local = F.pad(local[:, :, ready:], (0, ready))
            advance(len(some))
        carried = height - done
        yield y, finished, None if valid is None else valid[:done]


# --------------------------------------------------------------------------------------------- a raster and a model


def reader(raster: Path, card: Card) -> tuple[Read, Shape]:
    """How strips of a raster are read for a network, checked against what it needs."""
    shape = shape_of(raster)
    needs = card.bands or ((1, 2, 3) if shape.bands in (2, 3) and not _grey(raster) else (1,))
    if max(needs) > shape.bands:
        raise DataError(
            f"{raster}: has {shape.bands} bands, but the network reads bands {', '.join(map(str, needs))}; "
            f"say with --bands which {len(needs)} it should read"
        )
    if shape.samples != card.samples:
        convert = "Byte -scale" if card.samples == "uint8" else "UInt16"
        raise DataError(
            f"{raster}: samples are {shape.samples}, but the network was trained on {card.samples}; convert it, for "
            f"one with gdal_translate -ot {convert}"
        )
    masked = shape.mask in ("nodata", "mask") or (shape.mask == "alpha" and shape.bands > card.file_bands)

    def read(y: int, rows: int) -> tuple[np.ndarray, np.ndarray | None]:
        window = (y, 0, rows, shape.width)
        pixels = read_rgb(raster, *window) if card.bands is None else read_bands(raster, card.bands, *window)
        if not masked:
            return pixels, None
        valid = read_valid(raster, *window)
        return np.where(valid[..., None], pixels, pixels.dtype.type(0)), valid  # as in training

    return read, shape


def _grey(raster: Path) -> bool:
    """Two bands, of which the second says where the first holds data."""
    shape = shape_of(raster)
    return shape.bands == 2 and shape.mask == "alpha"


def network_of(model: torch.nn.Module, card: Card, classes: int) -> Network:
    """Pixels (N, h, w, bands) as they are stored to probabilities (N, classes, h, w), as validation makes them."""
    maximum = float(model.get_buffer("pixel_maximum"))

    def network(pixels: torch.Tensor) -> torch.Tensor:
        images = (pixels if pixels.dtype == torch.uint8 else pixels.int() & 0xFFFF).float().permute(0, 3, 1, 2)
        k = card.downscale
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % (32 * k), 0, -height % (32 * k)), mode="replicate")
        size = images.shape[-2:]
        if k > 1:
            images = F.avg_pool2d(images, k).round()
        logits = models.forward(model, images / maximum).logits.float()
        full = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return full[..., :height, :width].softmax(1)

    return network


# --------------------------------------------------------------------------------------------- the file


class Writer:
    """OUT.tif: written beside under another name, block row by block row, and renamed when it is whole."""

    def __init__(self, out: Path, raster: Path, shape: Shape, card: Card, classes: tuple[str, ...], chances: bool):
        self.out, self.temporary = out, out.with_name(f".{out.name}.{os.getpid()}.tmp")
        self.shape, self.chances = shape, chances
        bands = len(classes) if chances else 1
        self.fill = np.float32("nan") if chances else np.uint8(IGNORE)
        self.rows = np.full((bands, BLOCK, shape.width), self.fill)
        self.sums: list[int] = []  # of what each block row held
        self.begun = 0  # of the raster's rows, how many are in the file or in `rows`
        import rasterio

        with open_image(raster) as source:
            place: dict[str, Any] = {} if source.transform.is_identity else {"transform": source.transform}
            gcps, gcps_crs = source.gcps
            self.file: Any = rasterio.open(
                self.temporary, "w", driver="GTiff", width=shape.width, height=shape.height, count=bands,
                dtype=self.rows.dtype, nodata=self.fill, crs=source.crs or (gcps_crs if gcps else None), **place,
                tiled=True, blockxsize=BLOCK, blockysize=BLOCK, compress="deflate", BIGTIFF="IF_SAFER",
                **({"predictor": 3} if chances else {"photometric": "palette"}),
            )  # fmt: skip
            try:
                if gcps and not place:
                    self.file.gcps = (gcps, gcps_crs)
                if source.rpcs is not None:
                    self.file.rpcs = source.rpcs
                if "AREA_OR_POINT" in source.tags():
                    self.file.update_tags(AREA_OR_POINT=source.tags()["AREA_OR_POINT"])
                if chances:
                    self.file.descriptions = classes
                else:
                    table = {k: (*colour, 255) for k, colour in enumerate(card.palette)}
                    self.file.write_colormap(1, {**table, IGNORE: (0, 0, 0, 0)})
                    self.file.set_band_description(1, "class")
                    self.file.update_tags(1, **{f"CLASS_{k}": name for k, name in enumerate(classes)})
            except BaseException:
                self.drop()
                raise

    def add(self, probabilities: torch.Tensor, valid: np.ndarray | None) -> None:
        """The rows that follow those added before."""
        found = probabilities.numpy() if self.chances else probabilities.argmax(0, keepdim=True).byte().numpy()
        if valid is not None:
            found = np.where(valid, found, self.fill)
        at = 0
        while at < found.shape[1]:
            here = self.begun % BLOCK
            n = min(BLOCK - here, found.shape[1] - at)
            self.rows[:, here : here + n] = found[:, at : at + n]
            at, self.begun = at + n, self.begun + n
            if self.begun % BLOCK == 0 or self.begun == self.shape.height:
                self.write_block_row(here + n)

    def write_block_row(self, rows: int) -> None:
        self.file.write(self.rows[:, :rows], window=self.window(self.begun - rows, rows))
        self.sums.append(zlib.crc32(self.rows[:, :rows].tobytes()))

    def window(self, y: int, rows: int) -> Any:
        from rasterio.windows import Window

        return Window(0, y, self.shape.width, rows)

    def close(self) -> None:
        """GDAL says nothing of what it could not write, so the file is read back before it gets its name."""
        import rasterio
        from rasterio.errors import RasterioError

        self.file.close()
        try:
            with rasterio.open(self.temporary, driver="GTiff") as file:
                for i, kept in enumerate(self.sums):
                    window = self.window(i * BLOCK, min(BLOCK, self.shape.height - i * BLOCK))
                    if zlib.crc32(file.read(window=window).tobytes()) != kept:
                        raise DataError(f"{self.out}: could not be written whole; is the disk full?")
        except RasterioError as error:
            raise DataError(f"{self.out}: could not be written whole; is the disk full? ({error})") from error
        with open(self.temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(self.temporary, self.out)

    def drop(self) -> None:
        self.file.close()
        self.temporary.unlink(missing_ok=True)


def check_out(out: Path, raster: Path, force: bool) -> None:
    """Raises DataError where OUT cannot be, or should not be, written to."""
    if out.exists() and raster.exists() and out.samefile(raster):
        raise DataError(f"{out}: is the raster itself, which is never written to; name another file")
    if out.is_dir():
        raise DataError(f"{out}: is a folder, expected the name of a file to write")
    if not out.parent.is_dir():
        raise DataError(f"{out}: cannot be written, there is no folder {out.parent}")
    if out.exists() and not force:
        raise DataError(f"{out}: exists; write over it with --force")


def predict(
    model_folder: Path,
    raster: Path,
    out: Path,
    *,
    window: int | None = None,
    overlap: int | None = None,
    batch: int = 4,
    device: str = "auto",
    bands: tuple[int, ...] | None = None,
    probabilities: bool = False,
    force: bool = False,
    progress: Any = None,
) -> None:
    """The class map of a raster as a GeoTIFF: uint8, 255 where the raster holds no data; or every class's probability.

    window, overlap: in pixels of the raster; by default the window that the model was evaluated with, and a quarter.
    Raises DataError or ValueError, and then, as on Ctrl-C, `out` is as it was before.
    """
    check_out(out, raster, force)
    on = device_of(device)
    model, card, classes = cards.open_model(model_folder, on)
    if bands is not None:
        reads = models.bands_of(model)
        if len(bands) != reads or min(bands) < 1:
            raise ValueError(f"--bands: expected {reads} numbers from 1, got {','.join(map(str, bands))}")
        card = cards.with_bands(card, bands)
    read, shape = reader(raster, card)
    if orientation_of(raster) != 1 and shape.place is not None:
        raise DataError(f"{raster}: is georeferenced and has an EXIF orientation, which contradict each other")
    window = card.window * card.downscale if window is None else window
    overlap = window // 4 if overlap is None else overlap
    for option, value, low, high in (
        ("--window", window, 32, 2**16), ("--overlap", overlap, 0, window - 1), ("--batch", batch, 1, 2**16),
    ):  # fmt: skip
        if not low <= value <= high:
            raise ValueError(f"{option}: expected a whole number from {low} to {high}, got {value}")
    plan = Plan(shape.height, shape.width, window, overlap)
    bar = progress and progress.add_task(raster.name, total=len(plan.rows) * len(plan.columns))
    advance = (lambda n: progress.advance(bar, n)) if progress else (lambda n: None)
    network = network_of(model, card, len(classes))
    writer = Writer(out, raster, shape, card, classes, probabilities)
    try:
        for _, said, valid in blended(plan, read, network, len(classes), batch, on, advance):
            writer.add(said, valid)
        writer.close()
    except BaseException:
        writer.drop()
        raise


def orientation_of(raster: Path) -> int:
    with open_image(raster) as image:
        return orientation(raster, image.driver, image.tags())


# --------------------------------------------------------------------------------------------- the command


def main(argv: list[str]) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from transformers.utils import logging

    from .cli import INTERRUPTED, Parser, failed, strides

    p = Parser(prog="dsct-distill predict", description=__doc__, allow_abbrev=False)
    p.add_argument("model", type=Path, metavar="MODEL", help="a network's folder: RUN/student-dsct, or any export")
    p.add_argument("raster", type=Path, metavar="RASTER", help="GeoTIFF, PNG or JPEG")
    p.add_argument("out", type=Path, metavar="OUT.tif", help="tiled, compressed GeoTIFF with the classes' colours")
    p.add_argument("--window", type=int, help="side of a window in pixels (default: that of the model's evaluation)")
    p.add_argument("--overlap", type=int, help="of neighbouring windows, in pixels (default: a quarter of a window)")
    p.add_argument("--batch", type=int, default=4, help="windows at a time (4)")
    p.add_argument("--bands", type=strides, metavar="1,2,3", help="bands of RASTER to read (default: as in training)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--probabilities", action="store_true", help="a float32 band for each class instead of the class")
    p.add_argument("--force", action="store_true", help="write over OUT.tif")
    given = vars(p.parse_args(argv))
    logging.disable_progress_bar()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(markup=False, emoji=False, highlight=False, stderr=True)
    try:
        with Progress(*columns, console=console) as progress:
            predict(given.pop("model"), given.pop("raster"), given.pop("out"), progress=progress, **given)
    except (DataError, ValueError, OSError) as error:
        return failed(error)
    except KeyboardInterrupt:
        console.print("interrupted; nothing was written")
        return INTERRUPTED
    return 0
