"""What a data set is made of: tiles that are read by windows, the files behind them, and how labels become classes."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import DataError
from ..images import read_bands, read_rgb, read_valid, shape_of

if TYPE_CHECKING:
    from ..config import Config

IGNORE = 255
_UNKNOWN = 254
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Tile:
    """One image with its label map, read by windows of (height, width, bands + 1) whose last channel is the class."""

    name: str
    group: str  # tiles of one group touch each other, so they fall on the same side of the split
    height: int
    width: int
    side: str = field(default="", kw_only=True)  # of the owners' split: "train", "val", or "" where they have none
    bands: int = field(default=3, kw_only=True)
    samples: str = field(default="uint8", kw_only=True)  # or uint16

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        raise NotImplementedError


# --------------------------------------------------------------------------------------------- labels


@dataclass(frozen=True)
class Key:
    """How the pixels of a label file become classes: by their colours, or by their numbers."""

    classes: Mapping[int, int]  # what stands in the file (0xRRGGBB, or a number) to a class, or to IGNORE
    colours: bool
    strict: bool = True  # what is neither class nor ignored is an error; else it is ignored
    rounded: bool = False  # every channel to 0 or 255 first: for files that were saved with loss

    def read(self, path: Path, y: int, x: int, height: int, width: int) -> np.ndarray:
        """What stands in a window, as it is looked up in `classes`."""
        if self.colours:
            rgb = read_rgb(path, y, x, height, width)
            if self.rounded:
                rgb = np.where(rgb < 128, 0, 255)
            rgb = rgb.astype(np.int32)
            return (rgb[..., 0] << 16) | (rgb[..., 1] << 8) | rgb[..., 2]
        values = read_bands(path, (1,), y, x, height, width)[..., 0]
        if values.dtype != np.uint8:
            raise DataError(f"{path}: samples are {values.dtype}, expected class numbers as uint8")
        return values

    @cached_property
    def table(self) -> np.ndarray:
        table = np.full(2**24 if self.colours else 2**8, _UNKNOWN, np.uint8)
        for value, k in self.classes.items():
            table[value] = k
        return table

    def named(self, value: int) -> str:
        return f"#{value:06X}" if self.colours else str(value)

    def decode(self, path: Path, y: int, x: int, height: int, width: int) -> np.ndarray:
        values = self.read(path, y, x, height, width)
        label = self.table[values]
        unknown = label == _UNKNOWN
        if not self.strict:
            label[unknown] = IGNORE
        elif unknown.any():
            row, column = (int(v) for v in np.argwhere(unknown)[0])
            raise DataError(
                f"{path}: unknown {'colour' if self.colours else 'class number'} "
                f"{self.named(int(values[row, column]))} at row {y + row}, column {x + column}; "
                f"known: {', '.join(map(self.named, self.classes))}; dsct-distill check counts all that are not"
            )
        return label


def code(colour: Colour) -> int:
    return colour[0] << 16 | colour[1] << 8 | colour[2]


def colours(palette: Iterable[Colour], ignored: Iterable[Colour] = (), rounded: bool = False) -> Key:
    """Class k has the k-th colour."""
    classes = {code(colour): k for k, colour in enumerate(palette)}
    return Key({**classes, **{code(colour): IGNORE for colour in ignored}}, True, rounded=rounded)


def from_one(count: int) -> Key:
    """Class numbers 1 to `count`, and 0 or 255 for what is ignored: mmsegmentation's `reduce_zero_label`."""
    return Key({0: IGNORE, **{k + 1: k for k in range(count)}, IGNORE: IGNORE}, False)


# --------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class Pair:
    """An image and its label as they lie on disk; either may be missing."""

    name: str
    group: str
    image: Path | None
    label: Path | None
    key: Key
    side: str = ""
    bands: tuple[int, ...] | None = None  # of the image's file, counted from 1; None: what it shows as RGB
    expected: Path | str = ""  # where the one that is missing was looked for
    alpha: bool = True  # whether a band that the image calls alpha is one: GDAL takes any fourth band for it

    def problem(self) -> str | None:
        """Why this pair cannot be read, in words that name the file and what to do; None if it can."""
        if self.image is None:
            return f"{self.label}: no image, expected {self.expected}"
        if self.label is None:
            return f"{self.image}: no label, expected {self.expected}"
        image, label = shape_of(self.image), shape_of(self.label)
        if (image.height, image.width) != (label.height, label.width):
            return (
                f"{self.label}: {label.width} x {label.height}, "
                f"but its image {self.image} is {image.width} x {image.height}"
            )
        if self.bands is not None and max(self.bands) > image.bands:
            return (
                f"{self.image}: has {image.bands} bands, so there is no band {max(self.bands)}; "
                "choose others with --bands"
            )
        if self.bands is not None and image.samples not in ("uint8", "uint16"):
            return (
                f"{self.image}: samples are {image.samples}, expected uint8 or uint16; convert it, for one with "
                "gdal_translate -ot UInt16 -scale"
            )
        return None

    def tile(self) -> "RasterTile":
        problem = self.problem()
        if problem is not None:
            raise DataError(problem)
        assert self.image is not None and self.label is not None
        shape = shape_of(self.image)
        says = shape.mask in ("nodata", "mask", "alpha" if self.alpha else "nodata")
        return RasterTile(
            self.name, self.group, shape.height, shape.width,
            image=self.image, label=self.label, key=self.key, chosen=self.bands, side=self.side,
            bands=len(self.bands or "RGB"), samples=shape.samples if self.bands else "uint8",
            masked=self.bands is not None and says,
        )  # fmt: skip


@dataclass(frozen=True)
class RasterTile(Tile):
    """Two files. Where the image holds no data (by its nodata value, alpha or mask) the label is ignored."""

    image: Path
    label: Path
    key: Key
    chosen: tuple[int, ...] | None
    masked: bool  # whether the image says where it holds data

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        window = (y, x, height, width)
        label = self.key.decode(self.label, *window)
        if self.chosen is None:
            return np.dstack([read_rgb(self.image, *window), label])
        pixels = read_bands(self.image, self.chosen, *window)
        if self.masked:
            valid = read_valid(self.image, *window)
            label = np.where(valid, label, np.uint8(IGNORE))
            pixels = np.where(valid[..., None], pixels, pixels.dtype.type(0))
        return np.dstack([pixels, label.astype(pixels.dtype)])


def opened(pairs: Iterable[Pair]) -> list[Tile]:
    """The tiles of pairs that must all be whole, and of one kind of samples."""
    tiles: list[Tile] = [pair.tile() for pair in pairs]
    other = [tile for tile in tiles if tile.samples != tiles[0].samples]
    if other:
        one, two = (tile.image if isinstance(tile, RasterTile) else tile.name for tile in (tiles[0], other[0]))
        raise DataError(
            f"{two}: samples are {other[0].samples}, but those of {one} are {tiles[0].samples}; convert one"
        )
    return tiles


def misplaced(pair: Pair) -> str | None:
    """Image and label that both say where they lie, and lie elsewhere by more than half a pixel."""
    if pair.image is None or pair.label is None:
        return None
    image, label = shape_of(pair.image).place, shape_of(pair.label).place
    if image is None or label is None:
        return None
    pixel = max(abs(v) for v in (image[0], image[1], image[3], image[4]))
    if max(abs(a - b) for a, b in zip(image, label, strict=True)) > pixel / 2:
        return f"{pair.label}: georeferenced elsewhere than its image {pair.image}"
    return None


def folder_of(root: str | None, name: str, holds: str) -> Path:
    """The folder of a data set, from --root."""
    if root is None:
        raise DataError(f"--data {name} needs --root DIR, the folder that holds {holds}")
    if not Path(root).is_dir():
        raise DataError(f"{root}: no such folder")
    return Path(root)


def nothing(root: Path, expected: str) -> DataError:
    """An error for a folder in which nothing was found, perhaps since the owners' archives lie there as they came."""
    archives = sorted(root.rglob("*.zip")) + sorted(root.rglob("*.rar"))
    packed = f"; unpack {archives[0]} there first" if archives else ""
    return DataError(f"{root}: no tiles, expected {expected}{packed}")


def by_stem(root: Path, pattern: str, folders: tuple[str, ...] = (), cut: str = "") -> dict[str, Path]:
    """Files anywhere below `root`, under their stem without `cut`. Of two of one name the one whose folder is named
    first in `folders` is taken: archives of the owners hold some files twice."""

    def rank(path: Path) -> tuple[int, str]:
        names = [i for i, name in enumerate(folders) if name in path.parts]
        return (names[0] if names else len(folders), str(path))

    found: dict[str, Path] = {}
    for path in sorted(root.rglob(pattern), key=rank):
        found.setdefault(path.stem.removesuffix(cut), path)
    return found


def converted(
    root: Path, key: Key, group: Callable[[str], str], suffix: str = "", pattern: str = "*.png"
) -> list[Pair] | None:
    """mmsegmentation's layout: `img_dir/{train,val}` and `ann_dir/{train,val}`, with the same names but for `suffix`.

    None where there is no such layout below `root`."""
    base = next(iter(sorted(p.parent for p in root.rglob("img_dir") if p.is_dir())), None)
    if base is None:
        return None
    pairs = []
    for side in ("train", "val"):
        images = {p.stem: p for p in sorted((base / "img_dir" / side).glob(pattern))}
        folder = base / "ann_dir" / side
        labels = {p.stem.removesuffix(suffix): p for p in sorted(folder.glob(f"*{suffix}.png"))}
        for name in sorted({*images, *labels}):
            image, label = images.get(name), labels.get(name)
            missing = folder / f"{name}{suffix}.png" if label is None else base / "img_dir" / side / pattern
            pairs.append(Pair(f"{side}/{name}", f"{side}/{group(name)}", image, label, key, side, (1, 2, 3), missing))
    if not pairs:
        raise nothing(base, f"img_dir/train/{pattern} and ann_dir/train/*{suffix}.png")
    return pairs


# --------------------------------------------------------------------------------------------- bands


def band_names(text: str) -> tuple[str, ...]:
    """RGB, IRRG, RGBIR; or any names with commas between them."""
    if "," in text:
        return tuple(part.strip() for part in text.split(","))
    names, rest = [], text
    while rest:
        name = next((n for n in ("IR", "R", "G", "B") if rest.startswith(n)), rest)
        names.append(name)
        rest = rest[len(name) :]
    return tuple(names)


def choose(text: str | None, there: tuple[str, ...], name: str) -> tuple[int, ...]:
    """Which bands of a file are meant, counted from 1."""
    chosen = there if text is None else band_names(text)
    for band in chosen:
        if band not in there:
            raise DataError(f"--bands {text}: {name} has no band {band!r} there; it has {', '.join(there)}")
    return tuple(there.index(band) + 1 for band in chosen)


# --------------------------------------------------------------------------------------------- the record


@dataclass(frozen=True)
class Dataset:
    """A data set: what it is, in words that the table shows, and how its tiles are found."""

    name: str
    classes: tuple[str, ...]
    palette: tuple[Colour, ...]
    tiles: Callable[["Config"], list[Tile]]
    split: str
    ignored: str
    bands: tuple[str, ...]  # what --bands takes, the default first
    layout: str
    follows: str = "-"
    defaults: Mapping[str, Any] = field(default_factory=dict)  # settings of a run that differ from Config's
    labels: tuple[str, ...] = ()  # what --labels takes, the default first
    own_statistics: bool = True  # normalised by mean and deviation of its training tiles; else by ImageNet's
    pairs: Callable[["Config"], list[Pair]] | None = None  # the files, for `dsct-distill check`
    at: Callable[["Config"], "Dataset"] | None = None  # for a set that only its folder describes


@dataclass(frozen=True)
class DownscaledTile(Tile):
    """A tile seen from farther away: colours averaged over squares of `factor` pixels, the label of their middle."""

    tile: Tile
    factor: int

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        k = self.factor
        pixels = self.tile.read(k * y, k * x, k * height, k * width).reshape(height, k, width, k, self.bands + 1)
        colours = np.rint(pixels[..., :-1].mean((1, 3), dtype=np.float32)).astype(pixels.dtype)
        return np.dstack([colours, pixels[:, k // 2, :, k // 2, -1]])


@dataclass(frozen=True)
class UnlabelledTile(Tile):
    """A tile of which only the image is read: every pixel of it has class 0, which nobody may take for a label."""

    tile: Tile

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        pixels = self.tile.read(y, x, height, width).copy()
        pixels[..., -1] = 0
        return pixels


def unlabelled(tile: Tile) -> Tile:
    return UnlabelledTile(
        tile.name, tile.group, tile.height, tile.width, tile, side=tile.side, bands=tile.bands, samples=tile.samples
    )


def downscaled(tiles: list[Tile], factor: int) -> list[Tile]:
    """Every tile at 1/factor of its resolution; what is left over at the right and bottom border is dropped."""
    if factor < 1:
        raise DataError(f"--downscale: expected 1 or more, got {factor}")
    if factor == 1:
        return tiles
    small = [tile for tile in tiles if min(tile.height, tile.width) < factor]
    if small:
        raise DataError(f"--downscale {factor}: {small[0].name} is only {small[0].width} x {small[0].height}")
    return [
        DownscaledTile(
            t.name, t.group, t.height // factor, t.width // factor, t, factor,
            side=t.side, bands=t.bands, samples=t.samples,
        )
        for t in tiles
    ]  # fmt: skip
