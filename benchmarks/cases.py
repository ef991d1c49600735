"""What is timed: shapes, layouts, dtypes, the inputs made from them, and the bytes each loss must move."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
LAYOUTS = ("contiguous", "channels_last")
FORWARD, FORWARD_BACKWARD = "forward", "forward+backward"
PHASES = (FORWARD, FORWARD_BACKWARD)
LOSSES = ("tnkd", "cafd", "matched", "jaccard", "dsct", "lowres")
IGNORE_INDEX = 255
IGNORED_SHARE = 0.05

LOWRES_LABELS = 512  # lowres: height and width of the labels

# logits, of cafd features; dsct names logits and, after "+", features; lowres, TNKD and cross-entropy of logits smaller
# than the labels, the student's logits and, after "+", the teacher's where they differ
SHAPES = {
    "tnkd": ["4x6x512x512", "2x19x512x512", "1x150x512x512", "128x100x1x1"],
    "cafd": ["4x512x64x64", "4x256x128x128", "8x64x32x32"],
    "matched": ["4x6x128x128", "2x19x128x128", "1x150x128x128", "4x64x64x64"],
    "dsct": ["4x6x512x512+4x512x64x64", "2x19x512x512"],
    "jaccard": ["4x6x128x128", "2x19x128x128", "1x150x128x128"],
    "lowres": [
        shape
        for batch in ("4x6", "2x19", "1x150")
        for shape in (f"{batch}x128x128", f"{batch}x64x64", f"{batch}x128x128+{batch}x64x64", f"{batch}x129x129")
    ],
}
SHAPES_CUDA = {  # added on a GPU: batch 16 of the large ones
    "tnkd": ["16x6x512x512", "16x19x512x512", "16x150x512x512"],
    "cafd": ["16x512x64x64", "16x256x128x128"],
    "matched": [],
    "dsct": ["16x19x512x512+16x512x64x64"],
    "jaccard": [],
    "lowres": [],
}
SHAPES_QUICK = {
    "tnkd": ["4x6x512x512", "2x19x512x512", "128x100x1x1"],
    "cafd": ["4x512x64x64", "8x64x32x32"],
    "matched": ["4x6x128x128"],
    "dsct": ["2x19x512x512"],
    "jaccard": ["2x19x128x128"],
    "lowres": ["2x19x128x128"],
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table: a loss at one shape, layout, dtype and phase."""

    loss: str
    shape: str  # "4x6x512x512", for dsct perhaps "4x6x512x512+4x512x64x64"
    layout: str
    dtype: str
    phase: str

    @property
    def logits(self) -> tuple[int, ...] | None:
        return None if self.loss == "cafd" else parse_shape(self.shape)[0]

    @property
    def features(self) -> tuple[int, ...] | None:
        shapes = parse_shape(self.shape)
        if self.loss == "lowres":
            return None
        return shapes[0] if self.loss == "cafd" else shapes[1] if len(shapes) > 1 else None

    @property
    def teacher_logits(self) -> tuple[int, ...] | None:
        return parse_shape(self.shape)[-1] if self.loss == "lowres" else self.logits

    @property
    def labels(self) -> tuple[int, ...] | None:
        if not self.logits:
            return None
        size = (LOWRES_LABELS, LOWRES_LABELS) if self.loss == "lowres" else self.logits[2:]
        return (self.logits[0], *size)

    @property
    def student_bytes(self) -> int:
        """Size of the student's tensors: the unit in which extra memory is told."""
        return sum(math.prod(shape) for shape in (self.logits, self.features) if shape) * DTYPES[self.dtype].itemsize

    @property
    def floor_bytes(self) -> int:
        """Bytes that must move, each tensor once per pass that cannot do without it.

        Logits: forward reads student, teacher and labels (int64), and gradient adds one write; the gradient needs
        nothing that the forward has not read, but for those of matched and jaccard, and so of dsct: they need sums over
        all positions first, and read both again. Features: forward reads student and teacher; the gradient needs the
        whole map first, so backward reads the student again and writes. That forward needs each sample twice (the
        channel weights first, then the map) is left to the cache and not counted.
        """
        size = DTYPES[self.dtype].itemsize
        backward = self.phase == FORWARD_BACKWARD
        total = 0
        if self.logits and self.teacher_logits and self.labels:
            student = 1 if not backward else 2 if self.loss in ("tnkd", "lowres") else 3
            teacher = 2 if backward and self.loss not in ("tnkd", "lowres") else 1
            total += math.prod(self.logits) * size * student + math.prod(self.teacher_logits) * size * teacher
            total += math.prod(self.labels) * torch.int64.itemsize
        if self.features:
            total += math.prod(self.features) * size * (4 if backward else 2)
        return total


@dataclasses.dataclass
class Inputs:
    """The tensors of one call. Absent ones are None."""

    student_logits: Tensor | None
    teacher_logits: Tensor | None
    target: Tensor | None
    student_features: Tensor | None
    teacher_features: Tensor | None

    @property
    def differentiable(self) -> list[Tensor]:
        return [tensor for tensor in (self.student_logits, self.student_features) if tensor is not None]

    @property
    def nbytes(self) -> int:
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return sum(tensor.nbytes for tensor in values if tensor is not None)


def parse_shape(text: str) -> list[tuple[int, ...]]:
    """ "4x6x512x512+4x512x64x64" -> [(4, 6, 512, 512), (4, 512, 64, 64)]"""
    try:
        shapes = [tuple(int(size) for size in part.split("x")) for part in text.split("+")]
    except ValueError:
        shapes = []
    if not shapes or len(shapes) > 2 or any(len(shape) != 4 or min(shape) < 1 for shape in shapes):
        raise ValueError(f"shape: expected NxCxHxW, for dsct perhaps NxKxHxW+NxCxHxW, got {text!r}")
    return shapes


def default_shapes(loss: str, device: str, quick: bool) -> list[str]:
    if quick:
        return SHAPES_QUICK[loss]
    return SHAPES[loss] + (SHAPES_CUDA[loss] if device == "cuda" else [])


def make_cases(
    losses: Sequence[str],
    device: str,
    quick: bool = False,
    shapes: Sequence[str] | None = None,
    layouts: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    phases: Sequence[str] | None = None,
) -> list[Case]:
    """Every case asked for, quick or full; what is named explicitly overrides the default.

    A shape that is named once serves every loss it fits. 1 x 1 maps have one layout only.
    """
    layouts = layouts or (LAYOUTS[:1] if quick else LAYOUTS)
    dtypes = dtypes or (["fp32"] if quick else ["fp32", "bf16"])
    cases = []
    for loss in losses:
        if loss in ("matched", "jaccard", "lowres") and device == "cuda" and not shapes:
            continue  # no kernel there: nothing to compare
        # dsct and lowres are what a training step calls, always with its gradient
        in_phases = phases or ([FORWARD_BACKWARD] if quick or loss in ("dsct", "lowres") else PHASES)
        for shape in shapes or default_shapes(loss, device, quick):
            parsed = parse_shape(shape)
            if len(parsed) > 1 and loss not in ("dsct", "lowres"):
                continue
            if loss == "lowres" and any(sizes[2] > LOWRES_LABELS or sizes[3] > LOWRES_LABELS for sizes in parsed):
                continue
            one_layout = all(height * width == 1 for _, _, height, width in parsed)
            for layout in LAYOUTS[:1] if one_layout else layouts:
                cases += [Case(loss, shape, layout, dtype, phase) for dtype in dtypes for phase in in_phases]
    return cases


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Random inputs of a case; the student requires a gradient in the backward phase."""
    generator = torch.Generator(device).manual_seed(seed)
    requires_grad = case.phase == FORWARD_BACKWARD

    def tensor(shape: tuple[int, ...] | None, scale: float, student: bool) -> Tensor | None:
        if shape is None:
            return None
        values = torch.randn(shape, generator=generator, device=device).mul_(scale).to(DTYPES[case.dtype])
        if case.layout == "channels_last":
            values = values.contiguous(memory_format=torch.channels_last)
        return values.requires_grad_(student and requires_grad)

    target = None
    if case.logits and case.labels:
        size, classes = case.labels, case.logits[1]
        if classes > IGNORE_INDEX:
            raise ValueError(f"shape: at most {IGNORE_INDEX} classes, as {IGNORE_INDEX} is ignored; got {classes}")
        target = torch.randint(0, classes, size, generator=generator, device=device)
        ignored = torch.rand(size, generator=generator, device=device) < IGNORED_SHARE
        target[ignored] = IGNORE_INDEX
    return Inputs(
        tensor(case.logits, 2.0, True),
        tensor(case.teacher_logits, 3.0, False),
        target,
        tensor(case.features, 1.0, True),
        tensor(case.features, 1.0, False),
    )
