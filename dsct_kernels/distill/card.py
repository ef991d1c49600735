"""dsct.json: what a trained model folder says of its data, beside the weights, so that it can be used on its own.

Classes stand in its config.json and the normalisation in preprocessor_config.json, where transformers looks for them.
Here is the rest: how an image file becomes the network's input, and what colours its answers have.
"""

import importlib.metadata
import json
import platform
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from . import models
from .config import Config
from .datasets import dataset_of
from .datasets.tile import DownscaledTile, RasterTile, Tile
from .files import DataError, read_json, write_json
from .images import shape_of

FILE = "dsct.json"
PACKAGES = ("dsct-kernels", "torch", "transformers", "accelerate", "rasterio", "numpy")
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Card:
    """Of a folder without one (any other of transformers' models): the first bands, and colours of no meaning."""

    palette: tuple[Colour, ...]  # one a class
    data: str = ""  # name of the data set
    bands: tuple[int, ...] | None = None  # of an image file, counted from 1; None: what it shows as RGB
    file_bands: int = 0  # how many bands of those files are data: a band after them that calls itself alpha is one
    samples: str = "uint8"  # or uint16
    downscale: int = 1  # images are averaged over squares of so many pixels first
    window: int = 256  # side of a window at evaluation, after that
    trained_with: dict[str, str] = field(default_factory=dict)  # versions


def of_run(cfg: Config, tile: Tile) -> Card:
    """The card of the networks that a run trains, by one of its tiles."""
    inner = tile.tile if isinstance(tile, DownscaledTile) else tile
    card = Card(
        palette=dataset_of(cfg).palette, data=cfg.data, samples=tile.samples, downscale=cfg.downscale,
        window=cfg.window, trained_with=versions(),
    )  # fmt: skip
    if not isinstance(inner, RasterTile) or inner.chosen is None:
        return card
    shape = shape_of(inner.image)
    return replace(card, bands=inner.chosen, file_bands=shape.bands - (shape.mask == "alpha" and inner.masked))


def write(folder: Path, card: Card) -> None:
    colours = [f"#{r:02X}{g:02X}{b:02X}" for r, g, b in card.palette]
    write_json(folder / FILE, {**asdict(card), "palette": colours})


def read(folder: Path) -> Card | None:
    """None where there is none. Raises DataError for one that is damaged."""
    path = folder / FILE
    if not path.is_file():
        return None
    saved = read_json(path)

    def wrong(key: str, expected: str) -> DataError:
        return DataError(f"{path}: {key}: expected {expected}, got {json.dumps(saved.get(key))[:80]}")

    def whole(value: Any, low: int, high: int = 2**16) -> bool:
        return type(value) is int and low <= value <= high

    palette = saved.get("palette")
    if not isinstance(palette, list) or not all(re.fullmatch("#[0-9A-Fa-f]{6}", str(c)) for c in palette):
        raise wrong("palette", 'a list of colours as "#FF8800"')
    bands = saved.get("bands")
    if bands is not None and not (isinstance(bands, list) and bands and all(whole(b, 1) for b in bands)):
        raise wrong("bands", "null or a list of whole numbers from 1")
    for key, low in (("file_bands", 0), ("downscale", 1), ("window", 32)):
        if not whole(saved.get(key), low):
            raise wrong(key, f"a whole number from {low}")
    if saved.get("samples") not in ("uint8", "uint16"):
        raise wrong("samples", "uint8 or uint16")
    with_ = saved.get("trained_with")
    return Card(
        palette=tuple((int(c[1:3], 16), int(c[3:5], 16), int(c[5:], 16)) for c in palette),
        data=str(saved.get("data", "")),
        bands=None if bands is None else tuple(bands),
        file_bands=saved["file_bands"],
        samples=saved["samples"],
        downscale=saved["downscale"],
        window=saved["window"],
        trained_with={str(k): str(v) for k, v in with_.items()} if isinstance(with_, dict) else {},
    )


def open_model(folder: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, Card, tuple[str, ...]]:
    """A model folder by what it says itself: the network in evaluation mode, its card, the names of its classes.

    Raises DataError for a folder that holds no model that can be read.
    """
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: no model folder, it has no config.json")
    models.refuse_code(folder)
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        classes = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    except Exception as error:  # of many kinds, all about this folder
        raise DataError(f"{folder / 'config.json'}: cannot be read as a model's ({error})") from error
    count = models._bands(SimpleNamespace(config=config))
    preprocessor = folder / "preprocessor_config.json"
    factor = read_json(preprocessor).get("rescale_factor", 1 / 255) if preprocessor.is_file() else 1 / 255
    if type(factor) not in (int, float) or not 0 < factor <= 1:
        raise DataError(f"{preprocessor}: rescale_factor: expected a number above 0, got {factor!r}")
    maximum = round(1 / factor)
    if count != 3 and not preprocessor.is_file():
        raise DataError(f"{folder}: reads {count} bands, but has no preprocessor_config.json with their mean and std")
    normalisation = models.Normalisation((0.0,) * count, (1.0,) * count, float(maximum))
    model = models.load(folder, classes, normalisation=normalisation)
    card = read(folder)
    if card is None:
        bands = tuple(range(1, count + 1))
        card = Card(
            colours(len(classes)), bands=bands, file_bands=count, samples="uint8" if maximum == 255 else "uint16"
        )
    if len(card.palette) != len(classes):
        raise DataError(f"{folder / FILE}: palette: {len(card.palette)} colours, but {len(classes)} classes")
    if card.bands is not None and len(card.bands) != count:
        raise DataError(f"{folder / FILE}: bands: {len(card.bands)}, but the network reads {count}")
    return model.to(device).eval(), card, classes


def colours(count: int) -> tuple[Colour, ...]:
    """Different colours for classes that have none of their own: hues by the golden ratio."""
    from colorsys import hsv_to_rgb

    found = (hsv_to_rgb(k * 0.618034 % 1, 0.75 - 0.25 * (k % 2), 0.95 - 0.25 * (k % 3)) for k in range(count))
    return tuple((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in found)


def with_bands(card: Card, bands: tuple[int, ...]) -> Card:
    """The card for images whose bands lie in another order, or have others between them."""
    return replace(card, bands=bands, file_bands=max(card.file_bands, *bands))


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """What this process runs on."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return {**found, "device": device, "system": platform.platform(terse=True)}
