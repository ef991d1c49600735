"""ISPRS Vaihingen: 33 orthophotos at 9 cm, near infrared, red and green, with labels as colours."""

from pathlib import Path
from typing import TYPE_CHECKING

from .dubai import LARGE
from .potsdam import BOUNDARY, CLASSES, LABELS, PALETTE, not_labelled_twice
from .tile import Dataset, Pair, Tile, colours, converted, folder_of, from_one, nothing, opened

if TYPE_CHECKING:
    from ..config import Config

TRAIN = (1, 3, 5, 7, 11, 13, 15, 17, 21, 23, 26, 28, 30, 32, 34, 37)
VAL = (2, 4, 6, 8, 10, 12, 14, 16, 20, 22, 24, 27, 29, 31, 33, 35, 38)

COMPLETE = "ISPRS_semantic_labeling_Vaihingen_ground_truth_COMPLETE"
FOLDERS = {
    "full": (COMPLETE, "gts_for_participants"),
    "eroded": (COMPLETE.replace("truth_", "truth_eroded_"), "gts_eroded_for_participants"),
}


def pairs(cfg: "Config") -> list[Pair]:
    root = folder_of(cfg.root, "vaihingen", "top and gts_for_participants")
    chips = converted(root, from_one(len(CLASSES)), lambda name: name.split("_")[0])
    if chips is not None:
        not_labelled_twice(cfg)
        return chips
    kind = cfg.labels or LABELS[0]
    suffix = "" if kind == "full" else "_noBoundary"
    images: dict[str, Path] = {}
    labels: dict[str, Path] = {}
    for path in sorted(root.rglob("top_mosaic_09cm_area*.tif")):
        if path.parent.name == "top":  # a full label has the same name as its image
            images[path.stem] = path
        elif path.stem.endswith("_noBoundary") == (kind == "eroded"):
            name = path.stem.removesuffix("_noBoundary")
            if name not in labels or rank(path, kind) < rank(labels[name], kind):
                labels[name] = path
    if not images:
        raise nothing(root, "top/top_mosaic_09cm_area1.tif")
    if not labels:
        raise nothing(root, f"{FOLDERS[kind][0]}/top_mosaic_09cm_area1{suffix}.tif")
    key = colours(PALETTE, (BOUNDARY,))
    found = []
    for number in (*TRAIN, *VAL):
        name = f"top_mosaic_09cm_area{number}"
        image, label = images.get(name), labels.get(name)
        if (number in VAL and label is None) or (image is None and label is None):
            continue
        lacks = root / "top" / f"{name}.tif" if image is None else root / FOLDERS[kind][0] / f"{name}{suffix}.tif"
        side = "val" if number in VAL else "train"
        found.append(Pair(f"area{number}", f"area{number}", image, label, key, side, (1, 2, 3), lacks))
    return found


def rank(path: Path, kind: str) -> int:
    """Labels of the complete archive before those of the participants', which hold 16 of the same."""
    return next((i for i, folder in enumerate(FOLDERS[kind]) if folder in path.parts), len(FOLDERS[kind]))


def tiles(cfg: "Config") -> list[Tile]:
    return opened(pairs(cfg))


DATASET = Dataset(
    name="vaihingen",
    classes=CLASSES,
    palette=PALETTE,
    tiles=tiles,
    pairs=pairs,
    split="the contest's: 16 tiles train, 17 validate (their labels are in ..._ground_truth_COMPLETE.zip)",
    ignored="black: the boundaries that --labels eroded leaves out",
    bands=("IRRG",),
    labels=LABELS,
    layout="ISPRS_semantic_labeling_Vaihingen.zip (top, gts_for_participants) with "
    "..._ground_truth_COMPLETE.zip or ..._ground_truth_eroded_COMPLETE.zip, each unpacked into a folder of its name; "
    "or mmsegmentation's img_dir and ann_dir",
    follows="mmsegmentation: clutter is the last class and black is ignored; torchgeo has clutter first, and counts "
    "black as clutter",
    defaults=LARGE,
)
