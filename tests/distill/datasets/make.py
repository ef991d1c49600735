"""Small data sets as their owners lay them out, with real georeferenced GeoTIFFs."""

from pathlib import Path

import numpy as np
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin

from dsct_kernels.distill.config import Config
from dsct_kernels.distill.datasets import dubai, gid, potsdam

SIDE = 64


def geotiff(path: Path, pixels: np.ndarray, nodata=None, east=366_000.0, alpha=False, **options) -> Path:
    """(H, W) or (H, W, bands) with a coordinate system and a place, tiled as orthophotos are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    height, width, bands = pixels.shape
    options = {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "deflate", **options}
    with rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, count=bands, dtype=pixels.dtype, nodata=nodata,
        crs="EPSG:32633", transform=from_origin(east, 5_807_000.0, 0.05, 0.05), **options,
    ) as file:  # fmt: skip
        file.write(pixels.transpose(2, 0, 1))
        if alpha:
            file.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha][-bands:]
    return path


def png(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def classes(count: int, seed: int = 0, side: int = SIDE) -> np.ndarray:
    """A map of blocks of 8 pixels with every class in it."""
    rng = np.random.default_rng(seed)
    blocks = rng.permutation(np.arange((side // 8) ** 2) % count).reshape(side // 8, -1)
    return np.kron(blocks, np.ones((8, 8), int)).astype(np.uint8)


def seen(label: np.ndarray, bands: int, dtype=np.uint8, seed: int = 0) -> np.ndarray:
    """An image in which a class can be seen, other in each band."""
    rng = np.random.default_rng(seed + 1)
    pixels = 40 + 20 * label[..., None] + 3 * np.arange(bands) + rng.integers(0, 3, (*label.shape, bands))
    return (pixels * (8 if dtype == np.uint16 else 1)).astype(dtype)


def coloured(label: np.ndarray, palette) -> np.ndarray:
    return np.array(palette, np.uint8)[label]


Written = dict[str, tuple[np.ndarray, np.ndarray]]  # a tile's name to its image, as it should be read, and its label


def potsdam_set(root: Path, source="RGB", eroded=False, numbers=("2_10", "7_7", "2_13"), nested=True) -> Written:
    written = {}
    archive, order = potsdam.SOURCES[source]
    labels = "5_Labels_all_noBoundary" if eroded else "5_Labels_all"
    inner = (lambda name: f"{name}/{name}") if nested else (lambda name: name)  # as some archives unpack
    for k, number in enumerate(numbers):
        label = classes(6, k)
        image = seen(label, len(order), seed=k)
        geotiff(root / inner(archive) / f"top_potsdam_{number}_{source}.tif", image)
        colours = coloured(label, potsdam.PALETTE)
        if eroded:
            colours[::8] = 0
            label = label.copy()
            label[::8] = 255
        suffix = "_label_noBoundary" if eroded else "_label"
        geotiff(root / inner(labels) / f"top_potsdam_{number}{suffix}.tif", colours)
        written[number] = (image, label)
    return written


def vaihingen_set(root: Path, labels="gts_for_participants", numbers=(1, 3, 2)) -> Written:
    written = {}
    suffix = "_noBoundary" if "eroded" in labels else ""
    for k, number in enumerate(numbers):
        label = classes(6, k)
        image = seen(label, 3, seed=k)
        geotiff(root / "top" / f"top_mosaic_09cm_area{number}.tif", image)
        colours = coloured(label, potsdam.PALETTE)
        geotiff(root / labels / f"top_mosaic_09cm_area{number}{suffix}.tif", colours)
        written[f"area{number}"] = (image, label)
    return written


def gid_set(root: Path, fine=False, source="image_RGB", names=("1-MSS1", "2-MSS1", "3-MSS2")) -> Written:
    """The owners' folders; label 255 stands for what they leave black."""
    written = {}
    palette = gid.PALETTE_15 if fine else gid.PALETTE
    for k, name in enumerate(names):
        label = classes(len(palette) + 1, k)
        image = seen(label, 4 if source == "image_NirRGB" else 3, seed=k)
        stem = f"GF2_PMS1__L1A000000000{name}"
        geotiff(root / source / f"{stem}.tif", image)
        folder = "label_15classes" if fine else "label_5classes"
        geotiff(root / folder / f"{stem}_label.tif", coloured(label, (*palette, (0, 0, 0))))
        written[stem] = (image, np.where(label == len(palette), 255, label))
    return written


def gid15_zip(root: Path) -> Written:
    """GID/img_dir and GID/ann_dir of gid-15.zip: class numbers from 1, 0 is background; test has no labels."""
    written = {}
    for k, side in enumerate(("train", "train", "val", "test")):
        number = classes(16, k)
        image, stem = seen(number, 3, seed=k), f"GF2_PMS1__L1A000000000{k}-MSS1"
        geotiff(root / "GID/img_dir" / side / f"{stem}.tif", image)
        if side != "test":
            png(root / "GID/ann_dir" / side / f"{stem}_15label.png", number)
            written[f"{side}/{stem}"] = (image, np.where(number == 0, 255, number.astype(int) - 1))
    return written


def loveda_set(root: Path) -> Written:
    written = {}
    k = 0
    for side in ("Train", "Val", "Test"):
        for scene in ("Rural", "Urban"):
            number = classes(8, k)
            image = seen(number, 3, seed=k)
            png(root / side / scene / "images_png" / f"{k}.png", image)
            if side != "Test":
                png(root / side / scene / "masks_png" / f"{k}.png", number)
                written[f"{side}/{scene}/{k}"] = (image, np.where(number == 0, 255, number.astype(int) - 1))
            k += 1
    return written


def converted_set(
    root: Path, count: int, names=("2_10_0_0_64_64", "2_11_0_0_64_64"), val=("2_13_0_0_64_64",)
) -> Written:
    """mmsegmentation's img_dir and ann_dir: 0 is ignored and classes count from 1."""
    written = {}
    for k, (side, name) in enumerate([*(("train", n) for n in names), *(("val", n) for n in val)]):
        number = classes(count + 1, k)
        image = seen(number, 3, seed=k)
        png(root / "img_dir" / side / f"{name}.png", image)
        png(root / "ann_dir" / side / f"{name}.png", number)
        written[f"{side}/{name}"] = (image, np.where(number == 0, 255, number.astype(int) - 1))
    return written


def dubai_set(root: Path) -> Written:
    written = {}
    for k in range(3):
        label = classes(6, k)
        image = seen(label, 3, seed=k)
        png(root / f"Tile {k}" / "images" / "image_part_001.png", image)
        png(root / f"Tile {k}" / "masks" / "image_part_001.png", coloured(label, (*dubai.PALETTE, dubai.IGNORED[0])))
        written[f"Tile {k}/image_part_001"] = (image, np.where(label == 5, 255, label))
    return written


YAML = """\
image: images/{name}.tif
label: labels/{name}_mask.tif
classes:
  - {name: roof, colour: "#FF0000", value: 3}
  - {name: grass, colour: [0, 255, 0], value: 7}
  - {name: water, colour: "#0000FF", value: 12}
ignored: [0]
bands: [R, G, B, IR]
val: [c]
"""


def folder_set(root: Path, yaml: str = YAML, nodata: int | None = 0) -> Written:
    """One's own: 16 bits, four bands, class numbers, a corner without data."""
    written = {}
    values = np.array([3, 7, 12, 0], np.uint8)
    for k, name in enumerate("abc"):
        label = classes(4, k)
        image = seen(label, 4, np.uint16, k)
        image[:8, :8] = 0
        geotiff(root / "images" / f"{name}.tif", image, nodata=nodata)
        geotiff(root / "labels" / f"{name}_mask.tif", values[label])
        expected = np.where(label == 3, 255, label)
        if nodata is not None:
            expected[:8, :8] = 255
        written[name] = (image, expected)
    (root / "data.yaml").write_text(yaml)
    return written


def tiny(data: str, root: Path, **settings) -> Config:
    """Settings of a run that takes a second."""
    small = {
        "teacher": "segformer-tiny",
        "student": "upernet-tiny",
        "crop": 32,
        "batch": 2,
        "window": 64,
        "log_every": 1,
    }
    small |= {"teacher_steps": 2, "student_steps": 2, "device": "cpu", "arms": ("dsct",), "pictures": False}
    return Config(data=data, root=str(root), **{**small, **settings})
