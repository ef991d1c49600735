"""Images without labels, `--unlabelled DIR`: the student learns on them what the teacher sees there."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..files import DataError
from ..images import read_bands, read_rgb, read_valid, shape_of
from .tile import IGNORE, DownscaledTile, RasterTile, Tile, downscaled

if TYPE_CHECKING:
    from ..config import Config

SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class ImageTile(Tile):
    """An image alone. Its last channel is 0 where it holds data, for the teacher to label, and ignored elsewhere."""

    image: Path
    chosen: tuple[int, ...] | None
    masked: bool

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        window = (y, x, height, width)
        pixels = read_rgb(self.image, *window) if self.chosen is None else read_bands(self.image, self.chosen, *window)
        label = np.zeros((height, width), pixels.dtype)
        if self.masked:
            valid = read_valid(self.image, *window)
            label[~valid] = IGNORE
            pixels = np.where(valid[..., None], pixels, pixels.dtype.type(0))
        return np.dstack([pixels, label])


def unlabelled_tiles(cfg: "Config", like: Tile) -> list[Tile]:
    """Every JPEG, PNG and TIFF below --unlabelled, read as the training tile `like` is: same bands, same samples."""
    if cfg.unlabelled is None:
        return []
    root = Path(cfg.unlabelled)
    if not root.is_dir():
        raise DataError(f"--unlabelled {root}: no such folder")
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise DataError(f"--unlabelled {root}: no image below it, expected {', '.join(SUFFIXES)}")
    base = like.tile if isinstance(like, DownscaledTile) else like
    chosen = base.chosen if isinstance(base, RasterTile) else None
    return downscaled([_tile(path, root, chosen, base) for path in files], cfg.downscale)


def _tile(path: Path, root: Path, chosen: tuple[int, ...] | None, like: Tile) -> ImageTile:
    shape = shape_of(path)
    if chosen is not None and max(chosen) > shape.bands:
        raise DataError(f"{path}: has {shape.bands} bands, but labelled ones are read from band {max(chosen)} too")
    if shape.samples != like.samples:
        raise DataError(f"{path}: samples are {shape.samples}, but those of the labelled images are {like.samples}")
    name = str(path.relative_to(root))
    return ImageTile(
        name, name, shape.height, shape.width, path, chosen, bool(shape.mask),
        bands=like.bands, samples=like.samples,
    )  # fmt: skip
