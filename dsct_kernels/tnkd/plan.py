"""The launch plan of TNKD on a GPU: how pixels and classes are shared out over lanes and warps.

A table for each layout, found by the instructions of compiled kernels (docs/gpu.md): what is done once a pixel, some
190 instructions, is repeated by every lane that holds some of its classes, so that a lane holds as many as registers
allow without a spill. Nothing here needs torch, a GPU or a native build.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

MOST_CLASSES = 1024  # that registers hold; the reference takes the others


@dataclass(frozen=True)
class Config:
    """A tile, all of whose logits are loaded at once, as often as a pixel's classes need."""

    pixels: int
    classes: int
    warps: int

    def held(self, num_classes: int) -> int:
        """Logits of one network that a lane holds."""
        return -(-num_classes // self.classes) * max(1, self.pixels * self.classes // (32 * self.warps))


class Planes(NamedTuple):
    """A row of the table for NCHW, lanes along pixels."""

    most_classes: int
    pixels_of_4: int  # adjacent, that a lane holds of 4 bytes each,
    pixels_of_2: int  # and of 2
    lanes: int  # that share a pixel's classes
    warps: int


def read_planes(path: Path) -> tuple[Planes, ...]:
    """The rows of planes.inc, which csrc/tnkd/plan.h includes."""
    rows = re.findall(r"^{(.*)},$", path.read_text(), re.MULTILINE)
    return tuple(Planes(*map(int, row.split(", "))) for row in rows)


PLANES = read_planes(Path(__file__).with_name("planes.inc"))

# channels_last, lanes along classes: (most classes, pixels and classes of a tile, warps). Lanes next to each other read
# runs of 32 bytes or more where there are classes for them. CUDA has no such table: its lanes run along pixels in both
# layouts.
CHANNELS_LAST = ((8, 64, 2, 1), (32, 32, 4, 1), (64, 16, 16, 1), (160, 8, 16, 1), (320, 4, 32, 1), (640, 2, 64, 1),
                 (1024, 1, 128, 1))  # fmt: skip


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _planes_for(num_classes: int) -> Planes:
    return next(row for row in PLANES if num_classes <= row.most_classes)


def choose(num_classes: int, itemsize: int, pixels_adjacent: bool, inner: int, with_ce: bool = False) -> Config:
    """The launch for K classes of so many bytes.

    pixels_adjacent: NCHW, lanes along pixels; else channels_last, lanes along classes. inner: pixels of a row.
    with_ce: cross-entropy's exponentials stay in registers, too: of 2-byte pixels a lane then has one, if it holds many
    classes.
    """
    if pixels_adjacent:
        row = _planes_for(num_classes)
        vector = 1 if with_ce and row.lanes > 1 else row.pixels_of_4 if itemsize == 4 else row.pixels_of_2
        config = Config(32 * row.warps * vector // row.lanes, row.lanes, row.warps)
    else:
        config = next(Config(*row[1:]) for row in CHANNELS_LAST if num_classes <= row[0])
    least = min(16, config.pixels) if pixels_adjacent else 1
    return Config(max(least, min(config.pixels, next_power_of_2(inner))), config.classes, config.warps)


# Logits smaller than the labels, lanes along the pixels of a row: the same lanes and warps, but a lane holds one pixel,
# whatever the dtype, or two of so few classes: beside a pixel's exponentials it holds six numbers of each class.
TWO_PIXELS = 6
MOST_SLOTS = 32  # pixels between two cells of a row that a warp adds up
STRIP_ROWS = 32  # of labels: the first of a strip fetches its logits anew, and one row of gradients more is written


class UpsampledConfig(NamedTuple):
    pixels: int
    classes: int
    warps: int
    slots: int  # lanes of each interval between two of the student's cells
    parts: int  # times that its pixels need them
    rows: int  # intervals of a strip


def choose_upsampled(
    num_classes: int, cells: tuple[int, int], labels: tuple[int, int], align_corners: bool
) -> UpsampledConfig:
    """The launch for K classes, the student's height and width, and those of the labels."""
    row = _planes_for(num_classes)
    pixels = 32 * row.warps * (2 if num_classes <= TWO_PIXELS else 1) // row.lanes
    ends = 1 if align_corners and cells[1] > 1 else 0  # are cells: one interval fewer
    most = -(-(labels[1] - ends) // (cells[1] - ends))  # pixels of an interval
    slots = min(MOST_SLOTS, pixels, next_power_of_2(most))
    rows = max(1, STRIP_ROWS * cells[0] // labels[0])
    return UpsampledConfig(pixels, row.lanes, row.warps, slots, -(-most // slots), rows)
