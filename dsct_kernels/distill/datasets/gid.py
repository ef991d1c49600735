"""GID, Gaofen-2 scenes of 6800 x 7200: 150 of them with 5 classes, 10 with 15 classes."""

from dataclasses import replace
from typing import TYPE_CHECKING

from ..files import DataError
from .dubai import LARGE
from .tile import (
    Colour,
    Dataset,
    Pair,
    Tile,
    by_stem,
    choose,
    colours,
    converted,
    folder_of,
    from_one,
    nothing,
    opened,
)

if TYPE_CHECKING:
    from ..config import Config

CLASSES = ("Built-up", "Farmland", "Forest", "Meadow", "Water")
PALETTE: tuple[Colour, ...] = ((255, 0, 0), (0, 255, 0), (0, 255, 255), (255, 255, 0), (0, 0, 255))

CLASSES_15 = ("Industrial land", "Urban residential", "Rural residential", "Traffic land", "Paddy field",
              "Irrigated land", "Dry cropland", "Garden plot", "Arbor woodland", "Shrub land", "Natural grassland",
              "Artificial grassland", "River", "Lake", "Pond")  # fmt: skip
PALETTE_15: tuple[Colour, ...] = (
    (200, 0, 0), (250, 0, 150), (200, 150, 150), (250, 150, 150), (0, 200, 0), (150, 250, 0), (150, 200, 150),
    (200, 0, 200), (150, 0, 250), (150, 150, 250), (250, 200, 0), (200, 200, 0), (0, 0, 200), (0, 150, 200),
    (0, 200, 250),
)  # fmt: skip
UNLABELLED: Colour = (0, 0, 0)

# The owners' folders of images, with the order of the bands in their files.
FOLDERS = {"image_RGB": ("R", "G", "B"), "image_NirRGB": ("IR", "R", "G", "B")}
BANDS = ("RGB", "IRRG", "RGBIR")


def only_rgb(cfg: "Config") -> None:
    if cfg.bands not in (None, "RGB"):
        raise DataError(f"--bands {cfg.bands}: the images in {cfg.root} are RGB; image_NirRGB of the owners has IR too")


def pairs(cfg: "Config") -> list[Pair]:
    root = folder_of(cfg.root, "gid", "image_RGB and label_5classes")
    # mmsegmentation's converter knows no forest: its table has that class in water's colour, and the owners' cyan
    # becomes 0, others, with all that is unlabelled.
    chips = converted(root, from_one(len(CLASSES)), lambda name: "_".join(name.split("_")[:-4]))
    if chips is not None:
        only_rgb(cfg)
        return chips
    return owners(cfg, "label_5classes", PALETTE)


def pairs_15(cfg: "Config") -> list[Pair]:
    root = folder_of(cfg.root, "gid15", "GID/img_dir and GID/ann_dir, or image_RGB and label_15classes")
    numbers = from_one(len(CLASSES_15))
    scenes = converted(root, numbers, lambda name: name, "_15label", "*.tif")
    if scenes is not None:
        only_rgb(cfg)
        return scenes
    return owners(cfg, "label_15classes", PALETTE_15)


def owners(cfg: "Config", folder: str, palette: tuple[Colour, ...]) -> list[Pair]:
    """`image_RGB/GF2_...-MSS1.tif` or `image_NirRGB/...` with `label_5classes/GF2_...-MSS1_label.tif`."""
    root = folder_of(cfg.root, "gid", folder)
    wanted = cfg.bands or BANDS[0]
    source = "image_RGB" if wanted == "RGB" and any(root.rglob("image_RGB/GF2_*.tif")) else "image_NirRGB"
    images = {k: p for k, p in by_stem(root, "GF2_*.tif", (source,)).items() if p.parent.name == source}
    labels = {k: p for k, p in by_stem(root, "GF2_*_label.tif", (folder,), "_label").items() if folder in p.parts}
    if not images:
        raise nothing(root, f"{'image_RGB' if wanted == 'RGB' else source}/GF2_PMS1__L1A0000564539-MSS1.tif")
    if not labels:
        raise nothing(root, f"{folder}/GF2_PMS1__L1A0000564539-MSS1_label.tif")
    key, bands = colours(palette, (UNLABELLED,)), choose(wanted, FOLDERS[source], source)
    found = []
    for name in sorted({*images, *labels}):
        image, label = images.get(name), labels.get(name)
        if label is None and folder == "label_15classes" and len(images) > len(labels):
            continue  # 10 of the 150 scenes have fine labels
        lacks = root / source / f"{name}.tif" if image is None else root / folder / f"{name}_label.tif"
        found.append(Pair(name, name, image, label, key, "", bands, lacks, alpha=False))
    return found


def tiles(cfg: "Config") -> list[Tile]:
    return opened(pairs(cfg))


def tiles_15(cfg: "Config") -> list[Tile]:
    return opened(pairs_15(cfg))


DATASET = Dataset(
    name="gid",
    classes=CLASSES,
    palette=PALETTE,
    tiles=tiles,
    pairs=pairs,
    split="no list in the owners' archives: every third scene validates, or --val-tiles",
    ignored="black, which is unlabelled: it holds whatever is none of the five classes",
    bands=BANDS,
    layout="image_RGB or image_NirRGB with label_5classes; or mmsegmentation's img_dir and ann_dir",
    follows="the owners: five classes. mmsegmentation counts the unlabelled as a class of its own, others, and its "
    "converter turns forest into others; torchgeo has the 15 classes only",
    defaults=LARGE,
)

DATASET_15 = replace(
    DATASET,
    name="gid15",
    classes=CLASSES_15,
    palette=PALETTE_15,
    tiles=tiles_15,
    pairs=pairs_15,
    split="img_dir/train and img_dir/val of gid-15.zip (the labels of test are the owners'); of the other layout every "
    "third scene validates",
    ignored="0, or black: background, none of the fifteen classes",
    layout="gid-15.zip, unpacked: GID/img_dir/{train,val}/*.tif with GID/ann_dir/{train,val}/*_15label.png; "
    "or image_RGB or image_NirRGB with label_15classes",
    follows="the owners: 0 is ignored. torchgeo has it as a class, background, before the others; mmsegmentation has "
    "no such set",
)
