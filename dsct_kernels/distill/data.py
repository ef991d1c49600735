"""Tiles, splits by tile, random crops and whole-tile windows.

A tile is one image with its label map. Pixels travel as uint8 (height, width, 4): red, green, blue, class.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from . import scenes
from .files import DataError
from .images import image_size, read_rgb

IGNORE = 255


@dataclass(frozen=True)
class Tile:
    """One image with its label map, read by windows."""

    name: str
    group: str  # tiles of one group touch each other, so they fall on the same side of the split
    height: int
    width: int

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        raise NotImplementedError


# --------------------------------------------------------------------------------------------- synthetic scenes


@dataclass(frozen=True)
class SceneTile(Tile):
    seed: int

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        image, label = scenes.draw_scene(self.seed, self.height)
        return np.dstack([image, label])[y : y + height, x : x + width]


def synthetic(count: int, size: int, seed: int = 0) -> list[Tile]:
    return [SceneTile(f"scene {i:02d}", f"scene {i:02d}", size, size, seed=1000 * seed + i) for i in range(count)]


# --------------------------------------------------------------------------------------------- Dubai aerial set

DUBAI_CLASSES = ("Building", "Land", "Road", "Vegetation", "Water")
DUBAI_PALETTE = ((0x3C, 0x10, 0x98), (0x84, 0x29, 0xF6), (0x6E, 0xC1, 0xE4), (0xFE, 0xDD, 0x3A), (0xE2, 0xA9, 0x29))
DUBAI_IGNORED = ((0x9B, 0x9B, 0x9B), (0, 0, 0))


def _code(rgb: np.ndarray) -> np.ndarray:
    rgb = rgb.astype(np.int32)
    return (rgb[..., 0] << 16) | (rgb[..., 1] << 8) | rgb[..., 2]


_DUBAI_CODES = [(int(_code(np.array(c))), k) for k, c in enumerate(DUBAI_PALETTE)]
_DUBAI_CODES += [(int(_code(np.array(c))), IGNORE) for c in DUBAI_IGNORED]


@dataclass(frozen=True)
class DubaiTile(Tile):
    image: Path
    mask: Path

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        rgb = read_rgb(self.image, y, x, height, width)
        code = _code(read_rgb(self.mask, y, x, height, width))
        label, known = np.full(code.shape, IGNORE, np.uint8), np.zeros(code.shape, bool)
        for colour, k in _DUBAI_CODES:
            here = code == colour
            label[here] = k
            known |= here
        if not known.all():
            row, column = (int(v) for v in np.argwhere(~known)[0])
            raise DataError(
                f"{self.mask}: unknown colour #{code[row, column]:06X} at row {y + row}, column {x + column}; "
                "known: " + ", ".join(f"#{colour:06X}" for colour, _ in _DUBAI_CODES)
            )
        return np.dstack([rgb, label])


def dubai(root: str | Path | None) -> list[Tile]:
    """`Tile N/images/*.jpg` with `Tile N/masks/*.png` of the same name and size."""
    if root is None:
        raise DataError("--data dubai needs --root DIR, the folder that holds 'Tile 1', 'Tile 2', ...")
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    tiles: list[Tile] = []
    for folder in sorted(p.parent for p in root.glob("*/images") if p.is_dir()):
        for image in sorted((folder / "images").iterdir()):
            if image.suffix.lower() not in (".jpg", ".jpeg", ".png", ".tif", ".tiff"):
                continue
            mask = folder / "masks" / f"{image.stem}.png"
            if not mask.is_file():
                raise DataError(f"{image}: no label, expected {mask}")
            size, labelled = image_size(image), image_size(mask)
            if size != labelled:
                raise DataError(
                    f"{mask}: {labelled[1]} x {labelled[0]}, but its image {image} is {size[1]} x {size[0]}"
                )
            tiles.append(DubaiTile(f"{folder.name}/{image.stem}", folder.name, *size, image=image, mask=mask))
    if not tiles:
        raise DataError(f"{root}: no tiles, expected folders like 'Tile 1/images/image_part_001.jpg'")
    return tiles


@dataclass(frozen=True)
class DownscaledTile(Tile):
    """A tile seen from farther away: colours averaged over squares of `factor` pixels, the label of their middle."""

    tile: Tile
    factor: int

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        k = self.factor
        pixels = self.tile.read(k * y, k * x, k * height, k * width).reshape(height, k, width, k, 4)
        colours = np.rint(pixels[..., :3].mean((1, 3), dtype=np.float32)).astype(np.uint8)
        return np.dstack([colours, pixels[:, k // 2, :, k // 2, 3]])


def downscaled(tiles: list[Tile], factor: int) -> list[Tile]:
    """Every tile at 1/factor of its resolution; what is left over at the right and bottom border is dropped."""
    if factor < 1:
        raise DataError(f"--downscale: expected 1 or more, got {factor}")
    if factor == 1:
        return tiles
    small = [tile for tile in tiles if min(tile.height, tile.width) < factor]
    if small:
        raise DataError(f"--downscale {factor}: {small[0].name} is only {small[0].width} x {small[0].height}")
    return [DownscaledTile(t.name, t.group, t.height // factor, t.width // factor, t, factor) for t in tiles]


# --------------------------------------------------------------------------------------------- split and pixels


def split(tiles: list[Tile], val_tiles: list[str] | None) -> tuple[list[Tile], list[Tile]]:
    """Training and validation tiles. Default: every third group validates."""
    groups = sorted({tile.group for tile in tiles})
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


class Pixels:
    """Pixels of some tiles: decoded once into one flat uint8 buffer if they fit the budget, else read by windows."""

    def __init__(self, tiles: list[Tile], cache_mb: float, device: str | torch.device = "cpu"):
        self.tiles = tiles
        sizes = [tile.height * tile.width for tile in tiles]
        self.offsets = np.cumsum([0, *sizes])
        self.heights = np.array([tile.height for tile in tiles])
        self.widths = np.array([tile.width for tile in tiles])
        self.flat: torch.Tensor | None = None
        if 4 * self.offsets[-1] <= cache_mb * 2**20:
            flat = torch.empty((int(self.offsets[-1]), 4), dtype=torch.uint8)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda i: self._decode(flat, i), range(len(tiles))))
            self.flat = flat.to(device)

    def _decode(self, flat: torch.Tensor, i: int) -> None:
        tile = self.tiles[i]
        pixels = tile.read(0, 0, tile.height, tile.width)
        flat[self.offsets[i] : self.offsets[i + 1]] = torch.from_numpy(pixels.reshape(-1, 4))

    def window(self, i: int, y: int, x: int, height: int, width: int) -> torch.Tensor:
        """(height, width, 4), clipped at the tile's border."""
        tile = self.tiles[i]
        height, width = min(height, tile.height - y), min(width, tile.width - x)
        if self.flat is None:
            return torch.from_numpy(tile.read(y, x, height, width))
        whole = self.flat[self.offsets[i] : self.offsets[i + 1]].view(tile.height, tile.width, 4)
        return whole[y : y + height, x : x + width]

    def crops(self, boxes: "Boxes", size: int) -> torch.Tensor:
        """(batch, size, size, 4): every box scaled to size x size (nearest), flipped, turned; 255 outside the tile."""
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
        return torch.from_numpy(pixels[(rows - y)[:, None], (columns - x)[None, :]])


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
    gain: np.ndarray  # (batch, 3) colour gain
    shift: np.ndarray  # (batch, 1) brightness


class Crops(Dataset):
    """Item i is the batch of step i, a function of (seed, step, process) alone: any step can be made again."""

    def __init__(self, pixels: Pixels, size: int, batch: int, seed: int, scale: float, colour: float, rank: int = 0):
        self.pixels, self.size, self.batch, self.seed, self.rank = pixels, size, batch, seed, rank
        self.scale, self.colour = scale, colour
        weight = np.sqrt(pixels.heights * pixels.widths.astype(float))  # between "every tile" and "every pixel" alike
        self.chance = weight / weight.sum()

    def boxes(self, step: int) -> Boxes:
        rng, n = np.random.default_rng((self.seed, step, self.rank)), self.batch
        tile = rng.choice(len(self.chance), n, p=self.chance)
        height, width = self.pixels.heights[tile], self.pixels.widths[tile]
        scale = np.exp(rng.uniform(-self.scale, self.scale, n))
        scale = np.minimum(scale, np.maximum(np.minimum(height, width) / self.size, 1))
        side = np.ceil(self.size * scale).astype(int)
        y = (rng.random(n) * (np.maximum(height - side, 0) + 1)).astype(int)
        x = (rng.random(n) * (np.maximum(width - side, 0) + 1)).astype(int)
        flip_y, flip_x, turn = rng.random((3, n)) < 0.5
        gain = np.exp(rng.normal(0, self.colour, (n, 1)) + rng.normal(0, self.colour / 2, (n, 3)))
        return Boxes(tile, y, x, scale, flip_y, flip_x, turn, gain, rng.normal(0, self.colour / 2, (n, 1)))

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pixels (batch, size, size, 4) uint8, colour gain (batch, 3) and brightness shift (batch, 1)."""
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
