"""LoveDA: 5987 images of 1024 x 1024 at 30 cm, urban and rural, with labels as numbers."""

from typing import TYPE_CHECKING

from .dubai import LARGE
from .tile import Colour, Dataset, Pair, Tile, converted, folder_of, from_one, nothing, opened

if TYPE_CHECKING:
    from ..config import Config

CLASSES = ("Background", "Building", "Road", "Water", "Barren", "Forest", "Agriculture")
PALETTE: tuple[Colour, ...] = (
    (255, 255, 255), (255, 0, 0), (255, 255, 0), (0, 0, 255), (159, 129, 183), (0, 255, 0), (255, 195, 128)
)  # fmt: skip


def pairs(cfg: "Config") -> list[Pair]:
    root = folder_of(cfg.root, "loveda", "Train and Val")
    key = from_one(len(CLASSES))
    # One group for each side: the numbers of images say nothing of where they were taken.
    chips = converted(root, key, lambda name: "all")
    if chips is not None:
        return chips
    found = []
    for side in ("train", "val"):
        for scene in ("Rural", "Urban"):
            folder = next(iter(sorted(root.rglob(f"{side.title()}/{scene}/images_png"))), None)
            if folder is None:
                continue
            labels = folder.parent / "masks_png"
            names = {p.stem for p in (*folder.glob("*.png"), *labels.glob("*.png"))}
            for name in sorted(names, key=lambda n: (len(n), n)):
                image, label = folder / f"{name}.png", labels / f"{name}.png"
                group = f"{side.title()}/{scene}"
                found.append(
                    Pair(
                        f"{group}/{name}", group, image if image.is_file() else None,
                        label if label.is_file() else None, key, side, (1, 2, 3), label if image.is_file() else image,
                    )
                )  # fmt: skip
    if not found:
        raise nothing(root, "Train/Rural/images_png/0.png with Train/Rural/masks_png/0.png")
    return found


def tiles(cfg: "Config") -> list[Tile]:
    return opened(pairs(cfg))


DATASET = Dataset(
    name="loveda",
    classes=CLASSES,
    palette=PALETTE,
    tiles=tiles,
    pairs=pairs,
    split="the owners': Train and Val (the labels of Test are theirs)",
    ignored="0, no-data: pixels outside the photograph",
    bands=("RGB",),
    layout="Train.zip and Val.zip, unpacked: {Train,Val}/{Rural,Urban}/{images_png,masks_png}; "
    "or mmsegmentation's img_dir and ann_dir",
    follows="mmsegmentation: 0 is ignored and 1 to 7 become classes 0 to 6, background first; torchgeo leaves 0 to 7 "
    "in the labels and names no-data last",
    defaults=LARGE,
)
