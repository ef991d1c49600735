"""The aerial tiles of Dubai (Humans in the Loop): JPEG photographs, labels as colours, some of them palette PNGs."""

from typing import TYPE_CHECKING

from .tile import Dataset, Pair, Tile, colours, folder_of, nothing, opened

if TYPE_CHECKING:
    from ..config import Config

CLASSES = ("Building", "Land", "Road", "Vegetation", "Water")
PALETTE = ((0x3C, 0x10, 0x98), (0x84, 0x29, 0xF6), (0x6E, 0xC1, 0xE4), (0xFE, 0xDD, 0x3A), (0xE2, 0xA9, 0x29))
IGNORED = ((0x9B, 0x9B, 0x9B), (0, 0, 0))
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")


def pairs(root: str | None) -> list[Pair]:
    """`Tile N/images/*.jpg` with `Tile N/masks/*.png` of the same name and size."""
    base = folder_of(root, "dubai", "'Tile 1', 'Tile 2', ...")
    key = colours(PALETTE, IGNORED)
    found = []
    for folder in sorted(p.parent for p in base.glob("*/images") if p.is_dir()):
        for image in sorted((folder / "images").iterdir()):
            if image.suffix.lower() in SUFFIXES:
                mask = folder / "masks" / f"{image.stem}.png"
                label = mask if mask.is_file() else None
                found.append(Pair(f"{folder.name}/{image.stem}", folder.name, image, label, key, expected=mask))
    if not found:
        raise nothing(base, "folders like 'Tile 1/images/image_part_001.jpg'")
    return found


def tiles(root: str | None) -> list[Tile]:
    return opened(pairs(root))


# Found on this set.
DEFAULTS = {
    "teacher": "segformer-b0",
    "student": "upernet-small",
    "crop": 256,
    "batch": 16,
    "teacher_steps": 4000,
    "student_steps": 1500,
    "teacher_lr": 6e-4,
    "student_lr": 2e-3,
    "scale_jitter": 0.5,
    "colour_jitter": 0.15,
    "window": 512,
    "log_every": 50,
    "checkpoint_every": 500,
}

# Where the others start from: with rasters of 6000 x 6000 a process stays below 2 GB on a CPU.
LARGE = {**DEFAULTS, "batch": 8, "cache_mb": 256}


def _tiles(cfg: "Config") -> list[Tile]:
    return tiles(cfg.root)


def _pairs(cfg: "Config") -> list[Pair]:
    return pairs(cfg.root)


DATASET = Dataset(
    name="dubai",
    classes=CLASSES,
    palette=PALETTE,
    tiles=_tiles,
    split="none by the owners: every third tile folder validates",
    ignored="grey #9B9B9B, which the owners call unlabeled, and black, which is no class of theirs",
    bands=("RGB",),
    layout="Tile N/images/*.jpg with Tile N/masks/*.png",
    defaults=DEFAULTS,
    own_statistics=False,
    pairs=_pairs,
)
