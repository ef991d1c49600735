"""Splits by tile, normalisation, random crops and windows of tiles.

Pixels travel as (height, width, bands + 1), for most sets red, green, blue and the class: as uint8, or, where a data
set has 16 bits, as int16 that holds the bits of uint16, which torch moves but cannot compute with.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from .config import Config
from .datasets import dataset_of, tiles_of
from .datasets.tile import IGNORE, Tile, unlabelled
from .datasets.unlabelled import unlabelled_tiles
from .files import DataError
from .models import IMAGENET, Normalisation

# --------------------------------------------------------------------------------------------- split and pixels


def split(tiles: list[Tile], val_tiles: list[str] | None) -> tuple[list[Tile], list[Tile]]:
    """Training and validation tiles. Default: the owners' split, if there is one, else every third group validates."""
    groups = sorted({tile.group for tile in tiles})
    if val_tiles is None and any(tile.side for tile in tiles):
        train, val = ([tile for tile in tiles if tile.side == side] for side in ("train", "val"))
        for side, found in (("training", train), ("validation", val)):
            if not found:
                raise DataError(
                    f"--root: no tile of the data set's own {side} split is there; choose with --val-tiles "
                    f"from those that are: {', '.join(groups)}"
                )
        return train, val
    if val_tiles is None:
        val_tiles = groups[::3]
    for name in val_tiles:
        if name not in groups:
            raise DataError(f"--val-tiles: no tile {name!r}; there are: {', '.join(groups)}")
    train = [tile for tile in tiles if tile.group not in val_tiles]
    val = [tile for tile in tiles if tile.group in val_tiles]
    if not train or not val:
        raise DataError(f"--val-tiles: {len(train)} tiles to train on and {len(val)} to validate on; both need one")
    return train, val


def share(tiles: list[Tile], labelled: float) -> tuple[list[Tile], list[Tile]]:
    """Every 1 / labelled-th image with its label, and the others without, whatever their files hold."""
    count = max(1, round(labelled * len(tiles)))
    known = {int((k + 0.5) * len(tiles) / count) for k in range(count)}
    return (
        [tile for i, tile in enumerate(tiles) if i in known],
        [unlabelled(tile) for i, tile in enumerate(tiles) if i not in known],
    )


def pseudo_labels(target: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Labels of unlabelled crops (N, H, W): what the teacher says, but for what lies outside of the images."""
    size = (target.shape[-2], target.shape[-1])
    logits = F.interpolate(teacher_logits.float(), size=size, mode="bilinear", align_corners=False)
    return torch.where(target == IGNORE, IGNORE, logits.argmax(1).to(torch.uint8))


# How many windows the statistics of a data set are taken from, at least, and how large they are.
SAMPLES, SAMPLE_SIDE = 64, 512


def statistics(tiles: list[Tile]) -> Normalisation:
    """Mean and deviation of each band, from windows spread over the tiles; where an image holds no data counts not.

    Samples of 16 bits are divided by the smallest 2^k - 1 that none of them is above: a camera of 11 bits fills 0..1.
    """
    rng = np.random.default_rng(0)
    count, total, squares, top = 0, np.zeros(tiles[0].bands), np.zeros(tiles[0].bands), 0
    chosen = np.unique(np.linspace(0, len(tiles) - 1, SAMPLES).round().astype(int))
    for tile in (tiles[i] for i in chosen for _ in range(-(-SAMPLES // len(chosen)))):
        height, width = min(SAMPLE_SIDE, tile.height), min(SAMPLE_SIDE, tile.width)
        y, x = (int(rng.integers(n + 1)) for n in (tile.height - height, tile.width - width))
        pixels = tile.read(y, x, height, width)
        values, ignored = pixels[..., :-1], pixels[..., -1] == IGNORE
        values = values[values.any(-1) | ~ignored].astype(np.float64)
        count, total, squares = count + len(values), total + values.sum(0), squares + (values**2).sum(0)
        top = max(top, int(values.max(initial=0)))
    if count == 0:
        raise DataError(f"{tiles[0].name}: no pixel of {len(tiles)} training tiles holds data; look at the images")
    maximum = 255 if tiles[0].samples == "uint8" else max(255, 2 ** top.bit_length() - 1)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return Normalisation(
        tuple(round(float(v) / maximum, 6) for v in mean),
        tuple(max(round(float(v) / maximum, 6), 1e-3) for v in deviation),
        float(maximum),
    )


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.view(np.int16) if pixels.dtype == np.uint16 else pixels)


def scaled(pixels: torch.Tensor, maximum: float) -> torch.Tensor:
    """Bands of pixels, (..., bands + 1), as float32 in 0..1."""
    bands = pixels[..., :-1]
    return (bands if bands.dtype == torch.uint8 else bands.int() & 0xFFFF).float() / maximum


def labels(pixels: torch.Tensor) -> torch.Tensor:
    """Classes of pixels as uint8; a view where pixels are uint8."""
    return pixels[..., -1].to(torch.uint8)


def images(batch: tuple[torch.Tensor, ...], maximum: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, bands, H, W) in 0..1 with colour jitter, and labels (N, H, W) uint8, of a batch of `Crops`."""
    pixels, gain, shift = batch
    found = scaled(pixels, maximum).permute(0, 3, 1, 2)
    return (found - 0.5) * gain[:, :, None, None] + 0.5 + shift[:, :, None, None], labels(pixels)


def picture(pixels: torch.Tensor, maximum: float) -> np.ndarray:
    """(H, W, 3) uint8 to look at: the first three bands, or the first in grey."""
    shown = (255 * scaled(pixels, maximum)).round().clamp(0, 255).byte().numpy()
    return shown[..., :3] if shown.shape[-1] >= 3 else np.repeat(shown[..., :1], 3, axis=2)


class Pixels:
    """Pixels of some tiles: decoded once into one flat buffer if they fit the budget, else read by windows."""

    def __init__(
        self,
        tiles: list[Tile],
        cache_mb: float,
        device: str | torch.device = "cpu",
        normalisation: Normalisation = IMAGENET,
    ):
        self.tiles, self.normalisation = tiles, normalisation
        self.channels = tiles[0].bands + 1
        sizes = [tile.height * tile.width for tile in tiles]
        self.offsets = np.cumsum([0, *sizes])
        self.heights = np.array([tile.height for tile in tiles])
        self.widths = np.array([tile.width for tile in tiles])
        self.flat: torch.Tensor | None = None
        kind = torch.uint8 if tiles[0].samples == "uint8" else torch.int16
        if kind.itemsize * self.channels * self.offsets[-1] <= cache_mb * 2**20:
            flat = torch.empty((int(self.offsets[-1]), self.channels), dtype=kind)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda i: self._decode(flat, i), range(len(tiles))))
            self.flat = flat.to(device)

    def _decode(self, flat: torch.Tensor, i: int) -> None:
        tile = self.tiles[i]
        pixels = tile.read(0, 0, tile.height, tile.width)
        flat[self.offsets[i] : self.offsets[i + 1]] = as_tensor(pixels.reshape(-1, self.channels))

    def window(self, i: int, y: int, x: int, height: int, width: int) -> torch.Tensor:
        """(height, width, bands + 1), clipped at the tile's border."""
        tile = self.tiles[i]
        height, width = min(height, tile.height - y), min(width, tile.width - x)
        if self.flat is None:
            return as_tensor(tile.read(y, x, height, width))
        whole = self.flat[self.offsets[i] : self.offsets[i + 1]].view(tile.height, tile.width, self.channels)
        return whole[y : y + height, x : x + width]

    def crops(self, boxes: "Boxes", size: int) -> torch.Tensor:
        """(batch, size, size, bands + 1): every box scaled to size (nearest), flipped, turned; 255 outside the tile."""
        steps = np.floor((np.arange(size) + 0.5) * boxes.scale[:, None]).astype(np.int64)  # (batch, size)
        rows, columns = boxes.y[:, None] + steps, boxes.x[:, None] + steps
        rows = np.where(boxes.flip_y[:, None], rows[:, ::-1], rows)
        columns = np.where(boxes.flip_x[:, None], columns[:, ::-1], columns)
        height, width = self.heights[boxes.tile][:, None], self.widths[boxes.tile][:, None]
        inside = (rows < height)[:, :, None] & (columns < width)[:, None, :]
        rows, columns = np.minimum(rows, height - 1), np.minimum(columns, width - 1)
        if self.flat is None:
            out = torch.stack(
                [self._read_crop(int(i), r, c) for i, r, c in zip(boxes.tile, rows, columns, strict=True)]
            )
        else:
            starts = self.offsets[boxes.tile][:, None] + rows * width
            to = self.flat.device
            index = torch.from_numpy(starts).to(to)[:, :, None] + torch.from_numpy(columns).to(to)[:, None, :]
            out = self.flat[index]
        if not inside.all():
            out[torch.from_numpy(~inside).to(out.device)] = IGNORE
        turn = torch.from_numpy(boxes.turn).to(out.device)[:, None, None, None]
        return torch.where(turn, out.transpose(1, 2), out)

    def _read_crop(self, i: int, rows: np.ndarray, columns: np.ndarray) -> torch.Tensor:
        y, x = rows.min(), columns.min()
        pixels = self.tiles[i].read(int(y), int(x), int(rows.max() - y + 1), int(columns.max() - x + 1))
        return as_tensor(pixels[(rows - y)[:, None], (columns - x)[None, :]])


def classes_of(cfg: Config) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]]:
    """Names and colours of the classes."""
    one = dataset_of(cfg)
    return one.classes, one.palette


TrainAndVal = tuple[Pixels, Pixels]


def load_pixels(cfg: Config, device: torch.device) -> TrainAndVal:
    """Training tiles, on the device if they fit the cache, and validation tiles."""
    train, val = split(tiles_of(cfg), list(cfg.val_tiles) if cfg.val_tiles else None)
    normalisation = statistics(train) if dataset_of(cfg).own_statistics else IMAGENET
    return Pixels(train, cfg.cache_mb, device, normalisation), Pixels(val, cfg.cache_mb, "cpu", normalisation)


def unlabelled_pixels(cfg: Config, train: Pixels, device: torch.device) -> Pixels | None:
    """The images of --unlabelled, normalised as the training tiles are; None without it."""
    tiles = unlabelled_tiles(cfg, train.tiles[0])
    return Pixels(tiles, cfg.cache_mb, device, train.normalisation) if tiles else None


# --------------------------------------------------------------------------------------------- random crops


@dataclass(frozen=True)
class Boxes:
    """Where each crop of a batch is cut and how it is augmented; one array entry per crop."""

    tile: np.ndarray
    y: np.ndarray
    x: np.ndarray
    scale: np.ndarray
    flip_y: np.ndarray
    flip_x: np.ndarray
    turn: np.ndarray
    gain: np.ndarray  # (batch, bands) colour gain
    shift: np.ndarray  # (batch, 1) brightness


class Crops(Dataset):
    """Item i is the batch of step i, a function of (seed, step, stream) alone: any step can be made again.

    Streams of one seed are other crops. Of several processes each has its own part of a batch: two of 4 crops have the
    crops that one of 8 has.
    """

    def __init__(
        self,
        pixels: Pixels,
        size: int,
        batch: int,
        seed: int,
        scale: float,
        colour: float,
        process: int = 0,
        processes: int = 1,
        stream: int = 0,
    ):
        self.pixels, self.size, self.seed, self.stream = pixels, size, seed, stream
        self.total, self.part = batch * processes, slice(batch * process, batch * (process + 1))
        self.scale, self.colour = scale, colour
        weight = np.sqrt(pixels.heights * pixels.widths.astype(float))  # between "every tile" and "every pixel" alike
        self.chance = weight / weight.sum()

    def boxes(self, step: int) -> Boxes:
        rng, n = np.random.default_rng((self.seed, step, self.stream)), self.total
        bands = self.pixels.channels - 1
        tile = rng.choice(len(self.chance), n, p=self.chance)
        height, width = self.pixels.heights[tile], self.pixels.widths[tile]
        scale = np.exp(rng.uniform(-self.scale, self.scale, n))
        scale = np.minimum(scale, np.maximum(np.minimum(height, width) / self.size, 1))
        side = np.ceil(self.size * scale).astype(int)
        y = (rng.random(n) * (np.maximum(height - side, 0) + 1)).astype(int)
        x = (rng.random(n) * (np.maximum(width - side, 0) + 1)).astype(int)
        flip_y, flip_x, turn = rng.random((3, n)) < 0.5
        gain = np.exp(rng.normal(0, self.colour, (n, 1)) + rng.normal(0, self.colour / 2, (n, bands)))
        shift = rng.normal(0, self.colour / 2, (n, 1))
        return Boxes(*(v[self.part] for v in (tile, y, x, scale, flip_y, flip_x, turn, gain, shift)))

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pixels (batch, size, size, bands + 1), colour gain (batch, bands) and brightness shift (batch, 1)."""
        boxes = self.boxes(step)
        pixels = self.pixels.crops(boxes, self.size)
        return pixels, torch.from_numpy(boxes.gain).float(), torch.from_numpy(boxes.shift).float()

    def loader(self, start: int, stop: int) -> DataLoader:
        """Batches of the steps start..stop-1, in order. Windowed reads run in worker processes."""
        return DataLoader(
            self,
            batch_size=None,
            sampler=range(start, stop),
            num_workers=0 if self.pixels.flat is not None else min(4, os.cpu_count() or 1),
            worker_init_fn=_ignore_ctrl_c,
            generator=torch.Generator(),  # else starting it would draw from the global one, and resuming would differ
        )


def _ignore_ctrl_c(_worker: int) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides when to stop
