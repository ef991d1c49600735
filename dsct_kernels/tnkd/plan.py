"""The launch plan of TNKD on a GPU: how pixels and classes are shared out over lanes and warps.

A table for each layout, found by the instructions of compiled kernels (docs/gpu.md): what is done once a pixel, some
190 instructions, is repeated by every lane that holds some of its classes, so that a lane holds as many as registers
allow without a spill. Nothing here needs torch, a GPU or a native build.
"""

import re
from dataclasses import dataclass
from pathlib import Path

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


def read_planes(path: Path) -> tuple[tuple[int, int, int, int], ...]:
    """The rows of planes.inc, which csrc/tnkd/plan.h includes."""
    rows = re.findall(r"^{(\d+), (\d+), (\d+), (\d+)},$", path.read_text(), re.MULTILINE)
    return tuple((int(most), int(lane_bytes), int(lanes), int(warps)) for most, lane_bytes, lanes, warps in rows)


# NCHW, lanes along pixels: (most classes, bytes of adjacent pixels a lane holds, lanes that share a pixel's classes,
# warps).
PLANES = read_planes(Path(__file__).with_name("planes.inc"))

# channels_last, lanes along classes: (most classes, pixels and classes of a tile, warps). Lanes next to each other read
# runs of 32 bytes or more where there are classes for them. CUDA has no such table: its lanes run along pixels in both
# layouts.
CHANNELS_LAST = ((8, 64, 2, 1), (32, 32, 4, 1), (64, 16, 16, 1), (160, 8, 16, 1), (320, 4, 32, 1), (640, 2, 64, 1),
                 (1024, 1, 128, 1))  # fmt: skip


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def choose(num_classes: int, itemsize: int, pixels_adjacent: bool, inner: int, with_ce: bool = False) -> Config:
    """The launch for K classes of so many bytes.

    pixels_adjacent: NCHW, lanes along pixels; else channels_last, lanes along classes. inner: pixels of a row.
    with_ce: cross-entropy's exponentials stay in registers, too: of 2-byte pixels a lane then has one, if it holds many
    classes.
    """
    if pixels_adjacent:
        lane_bytes, share, warps = next(row[1:] for row in PLANES if num_classes <= row[0])
        vector = 1 if with_ce and share > 1 else max(1, lane_bytes // itemsize)
        config = Config(32 * warps * vector // share, share, warps)
    else:
        config = next(Config(*row[1:]) for row in CHANNELS_LAST if num_classes <= row[0])
    least = min(16, config.pixels) if pixels_adjacent else 1
    return Config(max(least, min(config.pixels, next_power_of_2(inner))), config.classes, config.warps)


# Logits smaller than the labels, lanes along the pixels of a row: the same lanes and warps, but a lane holds one pixel,
# whatever the dtype, or two of so few classes: beside a pixel's exponentials it holds six numbers of each class.
TWO_PIXELS = 6
MOST_SLOTS = 32  # pixels between two cells of a row that a warp adds up
STRIP_ROWS = 32  # of labels: the first of a strip fetches its logits anew, and one row of gradients more is written


@dataclass(frozen=True)
class UpsampledConfig:
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
    share, warps = next(row[2:] for row in PLANES if num_classes <= row[0])
    pixels = 32 * warps * (2 if num_classes <= TWO_PIXELS else 1) // share
    ends = 1 if align_corners and cells[1] > 1 else 0  # are cells: one interval fewer
    most = -(-(labels[1] - ends) // (cells[1] - ends))  # pixels of an interval
    slots = min(MOST_SLOTS, pixels, next_power_of_2(most))
    rows = max(1, STRIP_ROWS * cells[0] // labels[0])
    return UpsampledConfig(pixels, share, warps, slots, -(-most // slots), rows)
