"""What must hold: the thresholds, one table, and the check of a result against it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from benchmarks.cases import (
    BEFOREHAND,
    COMPILE,
    CROSS_ENTROPY,
    EAGER,
    FORWARD_BACKWARD,
    LOWRES_SHAPES,
    LOWRES_SMALL,
)
from benchmarks.report import Result, Row, make_rows

AT_LEAST, AT_MOST = "at least", "at most"
ONE_TENSOR = 1.05  # one tensor of the student's size; the rest is for attention maps, counts and scalars
SCRATCH = 64 << 10  # bytes that may come on top at any size of image


@dataclasses.dataclass(frozen=True)
class Threshold:
    """A figure that every row it names must reach, forward+backward, in both layouts."""

    device: str
    loss: str
    shapes: tuple[str, ...]
    dtypes: tuple[str, ...]
    figure: str  # a name in FIGURES
    relation: str
    value: float


FIGURES: dict[str, Callable[[Row], float | None]] = {
    "x eager": lambda row: row.speedup(EAGER),
    "x compile": lambda row: row.speedup(COMPILE),
    "x beforehand": lambda row: row.speedup(BEFOREHAND),
    "x cross-entropy": lambda row: row.speedup(CROSS_ENTROPY),
    "of full size": lambda row: row.of_full_size,
    "x best": lambda row: row.speedup_best,
    "x floor": lambda row: row.x_floor(),
    "share of copy bandwidth": lambda row: None if row.x_floor() is None else 1 / (row.x_floor() or 1),
    "extra memory in student tensors": lambda row: row.memory(),
    "extra memory in student tensors, less scratch": lambda row: row.memory(scratch=SCRATCH),
}

FEW = ("4x6x512x512", "2x19x512x512")
MANY = ("1x150x512x512",)
CAFD = ("4x512x64x64", "4x256x128x128")
MATCHED = ("4x6x128x128", "2x19x128x128", "1x150x128x128", "4x64x64x64")
CAFD_16 = ("16x512x64x64", "16x256x128x128")
TNKD_16 = ("16x6x512x512", "16x19x512x512", "16x150x512x512")
SMALL = (("tnkd", "128x100x1x1"), ("cafd", "8x64x32x32"))

JACCARD = ("4x6x128x128", "2x19x128x128", "1x150x128x128")
LOWRES_FEW = tuple(shape for shape in LOWRES_SHAPES if not shape.startswith("1x150"))
LOWRES_MANY = tuple(shape for shape in LOWRES_SHAPES if shape.startswith("1x150"))

THRESHOLDS = [
    # 2-core CPU with AVX-512 and with AVX2, fp32, logits smaller than the labels
    *(
        Threshold("cpu", loss, shapes, ("fp32",), figure, relation, value)
        for loss in ("lowres", "lowres-tnkd", "lowres-kd")
        for shapes, figure, relation, value in [
            (LOWRES_FEW, "x beforehand", AT_LEAST, 5),
            (LOWRES_MANY, "x beforehand", AT_LEAST, 10),
            (LOWRES_FEW, "x compile", AT_LEAST, 15),
            (LOWRES_MANY, "x compile", AT_LEAST, 25),
            (LOWRES_FEW + LOWRES_MANY, "x cross-entropy", AT_LEAST, 5),
            (LOWRES_FEW + LOWRES_MANY, "of full size", AT_MOST, 1.2),
            (LOWRES_FEW + LOWRES_MANY, "extra memory in student tensors, less scratch", AT_MOST, 2),
            ((LOWRES_SMALL,), "x best", AT_LEAST, 1),
        ]
    ),
    # The same of dsct_loss's defaults: of their time matched CAFD and Jaccard, at the logits' own size, are the same
    # either way; and three gradients of the student's size are there at once when autograd adds them up, with the
    # shares of labels, and an average of the student where the teacher is smaller.
    *(
        Threshold("cpu", "lowres-dsct", shapes, ("fp32",), figure, relation, value)
        for shapes, figure, relation, value in [
            (LOWRES_FEW, "x beforehand", AT_LEAST, 3),
            (LOWRES_MANY, "x beforehand", AT_LEAST, 6),
            (LOWRES_FEW, "x compile", AT_LEAST, 12),
            (LOWRES_MANY, "x compile", AT_LEAST, 25),
            (LOWRES_FEW + LOWRES_MANY, "x cross-entropy", AT_LEAST, 5),
            (LOWRES_FEW + LOWRES_MANY, "of full size", AT_MOST, 1.2),
            (LOWRES_FEW + LOWRES_MANY, "extra memory in student tensors, less scratch", AT_MOST, 3.5),
            ((LOWRES_SMALL,), "x best", AT_LEAST, 1),
        ]
    ),
    # 2-core CPU with AVX-512, fp32
    Threshold("cpu", "tnkd", FEW, ("fp32",), "x eager", AT_LEAST, 15),
    Threshold("cpu", "tnkd", FEW, ("fp32",), "x compile", AT_LEAST, 10),
    Threshold("cpu", "tnkd", MANY, ("fp32",), "x eager", AT_LEAST, 40),
    Threshold("cpu", "tnkd", MANY, ("fp32",), "x compile", AT_LEAST, 12),
    Threshold("cpu", "tnkd", MANY, ("fp32",), "x floor", AT_MOST, 4),
    Threshold("cpu", "tnkd", FEW + MANY, ("fp32",), "extra memory in student tensors", AT_MOST, ONE_TENSOR),
    Threshold("cpu", "kd", FEW, ("fp32",), "x eager", AT_LEAST, 5),  # F.kl_div is lighter than TNKD's reference
    Threshold("cpu", "kd", FEW, ("fp32",), "x compile", AT_LEAST, 3),
    Threshold("cpu", "kd", MANY, ("fp32",), "x eager", AT_LEAST, 10),
    Threshold("cpu", "kd", MANY, ("fp32",), "x compile", AT_LEAST, 6),
    Threshold("cpu", "kd", FEW + MANY, ("fp32",), "extra memory in student tensors", AT_MOST, ONE_TENSOR),
    Threshold("cpu", "cafd", CAFD, ("fp32",), "x eager", AT_LEAST, 10),
    Threshold("cpu", "cafd", CAFD, ("fp32",), "x compile", AT_LEAST, 4),
    Threshold("cpu", "cafd", CAFD, ("fp32",), "extra memory in student tensors", AT_MOST, ONE_TENSOR),
    Threshold("cpu", "matched", MATCHED, ("fp32",), "x eager", AT_LEAST, 10),
    Threshold("cpu", "matched", MATCHED, ("fp32",), "x compile", AT_LEAST, 4),
    Threshold("cpu", "matched", MATCHED, ("fp32",), "extra memory in student tensors", AT_MOST, ONE_TENSOR),
    Threshold("cpu", "jaccard", JACCARD, ("fp32",), "x compile", AT_LEAST, 1),
    # H100 and H200
    *(
        Threshold("cuda", "tnkd", FEW + MANY + TNKD_16, ("fp32", "bf16"), figure, relation, value)
        for figure, relation, value in [
            ("share of copy bandwidth", AT_LEAST, 0.85),
            ("x eager", AT_LEAST, 8),
            ("x compile", AT_LEAST, 2),
            ("extra memory in student tensors", AT_MOST, ONE_TENSOR),
        ]
    ),
    *(
        Threshold("cuda", "cafd", CAFD + CAFD_16, ("fp32", "bf16"), figure, relation, value)
        for figure, relation, value in [
            ("share of copy bandwidth", AT_LEAST, 0.60),
            ("x compile", AT_LEAST, 1.5),
            ("extra memory in student tensors", AT_MOST, ONE_TENSOR),
        ]
    ),
    # where overhead rules, on both
    *(
        Threshold(device, loss, (shape,), dtypes, "x best", AT_LEAST, 1)
        for device, dtypes in (("cpu", ("fp32",)), ("cuda", ("fp32", "bf16")))
        for loss, shape in SMALL
    ),
]


@dataclasses.dataclass(frozen=True)
class Verdict:
    row: Row
    threshold: Threshold
    value: float | None  # None: nothing was measured, which is a miss

    @property
    def passed(self) -> bool:
        if self.value is None:
            return False
        if self.threshold.relation == AT_LEAST:
            return self.value >= self.threshold.value
        return self.value <= self.threshold.value

    def __str__(self) -> str:
        row, threshold = self.row, self.threshold
        value = "not measured" if self.value is None else f"{self.value:.2f}"
        return (
            f"{'pass' if self.passed else 'MISS'}  {row.loss} {row.shape} {row.layout} {row.dtype}: {threshold.figure} "
            f"{value}, required {threshold.relation} {threshold.value:g}"
        )


def check(result: Result) -> list[Verdict]:
    """One verdict per threshold and measured row it names. Rows that were not run are not judged."""
    device = result["machine"]["device"]
    return [
        Verdict(row, threshold, FIGURES[threshold.figure](row))
        for row in make_rows(result, [FORWARD_BACKWARD])
        for threshold in THRESHOLDS
        if threshold.device == device
        and row.loss == threshold.loss
        and row.shape in threshold.shapes
        and row.dtype in threshold.dtypes
    ]
