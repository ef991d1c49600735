"""ISPRS Potsdam: 38 orthophotos of 6000 x 6000 at 5 cm, with labels as colours."""

from typing import TYPE_CHECKING

from ..files import DataError
from .dubai import LARGE
from .tile import Colour, Dataset, Pair, Tile, by_stem, choose, colours, converted, folder_of, from_one, nothing, opened

if TYPE_CHECKING:
    from ..config import Config

# Of both ISPRS sets, in the owners' order.
CLASSES = ("Impervious surfaces", "Building", "Low vegetation", "Tree", "Car", "Clutter")
PALETTE: tuple[Colour, ...] = ((255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0))
BOUNDARY: Colour = (0, 0, 0)
LABELS = ("full", "eroded")

TRAIN = ("2_10", "2_11", "2_12", "3_10", "3_11", "3_12", "4_10", "4_11", "4_12", "5_10", "5_11", "5_12", "6_7", "6_8",
         "6_9", "6_10", "6_11", "6_12", "7_7", "7_8", "7_9", "7_10", "7_11", "7_12")  # fmt: skip
VAL = ("2_13", "2_14", "3_13", "3_14", "4_13", "4_14", "4_15", "5_13", "5_14", "5_15", "6_13", "6_14", "6_15", "7_13")

# The label of 6_7 has most cars in #FCFF00 instead of #FFFF00, and that of 4_12 was saved with loss, in thousands of
# colours. Every channel of both is nearer to the 0 or 255 that was meant than to the other. The labels of all others
# must be exact, so that a wrong file is found out.
ROUNDED = ("6_7", "4_12")

# Which archive holds a choice of bands, best first, with the order of the bands in its files.
SOURCES = {
    "RGB": ("2_Ortho_RGB", ("R", "G", "B")),
    "IRRG": ("3_Ortho_IRRG", ("IR", "R", "G")),
    "RGBIR": ("4_Ortho_RGBIR", ("R", "G", "B", "IR")),
}
ARCHIVES = {"full": "5_Labels_all", "eroded": "5_Labels_all_noBoundary"}
PARTICIPANTS = {"full": "5_Labels_for_participants", "eroded": "5_Labels_for_participants_no_Boundary"}


def not_labelled_twice(cfg: "Config") -> None:
    """mmsegmentation's layout holds one kind of labels, whichever was converted."""
    if cfg.labels is not None:
        raise DataError(
            f"--labels {cfg.labels}: {cfg.root} is in mmsegmentation's layout, which holds the labels that were "
            "converted; leave --labels out, or name the folder of the owners' files"
        )
    if cfg.bands not in (None, "RGB", "IRRG"):
        raise DataError(f"--bands {cfg.bands}: {cfg.root} is in mmsegmentation's layout, which holds three bands")


def pairs(cfg: "Config") -> list[Pair]:
    root = folder_of(cfg.root, "potsdam", "2_Ortho_RGB and 5_Labels_all")
    chips = converted(root, from_one(len(CLASSES)), lambda name: "_".join(name.split("_")[:2]))
    if chips is not None:
        not_labelled_twice(cfg)
        return chips
    wanted, kind = cfg.bands or "RGB", cfg.labels or LABELS[0]
    for source in (wanted, "RGBIR"):  # the files of four bands hold the other two
        archive, there = SOURCES[source]
        images = by_stem(root, f"top_potsdam_*_{source}.tif", (archive,), f"_{source}")
        if images:
            break
    cut = "_label" if kind == "full" else "_label_noBoundary"
    labels = by_stem(root, f"top_potsdam_*{cut}.tif", (ARCHIVES[kind], PARTICIPANTS[kind]), cut)
    if not images:
        raise nothing(root, f"{SOURCES[wanted][0]}/top_potsdam_2_10_{wanted}.tif")
    if not labels:
        raise nothing(root, f"{ARCHIVES[kind]}/top_potsdam_2_10{cut}.tif")
    keys = {rounded: colours(PALETTE, (BOUNDARY,), rounded) for rounded in (False, True)}
    found = []
    for number in (*TRAIN, *VAL):
        name = f"top_potsdam_{number}"
        image, label = images.get(name), labels.get(name)
        if number in VAL and label is None:
            continue  # the owners once kept these labels to themselves: 5_Labels_for_participants has 24
        if image is None and label is None:
            continue
        lacks = f"{archive}/{name}_{source}.tif" if image is None else f"{ARCHIVES[kind]}/{name}{cut}.tif"
        found.append(
            Pair(
                number, number, image, label, keys[number in ROUNDED], "val" if number in VAL else "train",
                choose(wanted, there, archive), root / lacks, alpha=False,
            )
        )  # fmt: skip
    return found


def tiles(cfg: "Config") -> list[Tile]:
    return opened(pairs(cfg))


DATASET = Dataset(
    name="potsdam",
    classes=CLASSES,
    palette=PALETTE,
    tiles=tiles,
    pairs=pairs,
    split="the contest's: 24 tiles train, 14 validate (their labels are in 5_Labels_all, not in the "
    "participants' archive)",
    ignored="black: the boundaries that --labels eroded leaves out, 3 pixels at the edge of every object",
    bands=tuple(SOURCES),
    labels=LABELS,
    layout="2_Ortho_RGB.zip, 3_Ortho_IRRG.zip or 4_Ortho_RGBIR.zip with 5_Labels_all.zip or "
    "5_Labels_all_noBoundary.zip, unpacked; or mmsegmentation's img_dir and ann_dir",
    follows="mmsegmentation: clutter is the last class and black is ignored; torchgeo has clutter first, and counts "
    "black and every unknown colour as clutter. Neither reads the labels of 6_7 (cars in #FCFF00) and 4_12 (saved with "
    "loss) as they were meant; here their channels are rounded to 0 or 255",
    defaults=LARGE,
)
