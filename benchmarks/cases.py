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
# Of logits smaller than the labels, which come first: what a segmenter's training step calls. TNKD with cross-entropy,
# TNKD alone, dsct_loss with its defaults, and plain KD.
LOWRES = ("lowres", "lowres-tnkd", "lowres-dsct", "lowres-kd")
LOSSES = (*LOWRES, "tnkd", "kd", "cafd", "matched", "jaccard", "dsct")
# Who is timed (benchmarks/candidates.py).
EAGER, MASK_TRICK, COMPILE = "eager", "mask-trick", "compile"
BEFOREHAND, CROSS_ENTROPY, FULL_SIZE = "beforehand", "cross-entropy", "full-size"
BASELINES = (EAGER, MASK_TRICK, COMPILE, BEFOREHAND, CROSS_ENTROPY, FULL_SIZE)
BACKENDS = ("native", "triton")
IGNORE_INDEX = 255
IGNORED_SHARE = 0.05

LOWRES_LABELS = (512, 512)  # unless the shape ends in "@HxW"
LOWRES_SMALL = "1x6x16x16@64x64"
LOWRES_SHAPES = [
    shape
    for batch in ("4x6", "2x19", "1x150")
    for shape in (f"{batch}x128x128", f"{batch}x64x64", f"{batch}x128x128+{batch}x64x64", f"{batch}x129x129")
]

# logits, of cafd features; dsct names logits and, after "+", features; lowres the student's logits and, after "+", the
# teacher's where they differ
SHAPES = {
    **{loss: [*LOWRES_SHAPES, LOWRES_SMALL] for loss in LOWRES},
    # the kernels of lowres-tnkd
    "lowres-kd": [*(f"{batch}x128x128" for batch in ("4x6", "2x19", "1x150")), LOWRES_SMALL],
    "tnkd": ["4x6x512x512", "2x19x512x512", "1x150x512x512", "128x100x1x1"],
    "kd": ["4x6x512x512", "2x19x512x512", "1x150x512x512"],
    "cafd": ["4x512x64x64", "4x256x128x128", "8x64x32x32"],
    "matched": ["4x6x128x128", "2x19x128x128", "1x150x128x128", "4x64x64x64"],
    "dsct": ["4x6x512x512+4x512x64x64", "2x19x512x512"],
    "jaccard": ["4x6x128x128", "2x19x128x128", "1x150x128x128"],
}
SHAPES_CUDA = {  # added on a GPU: batch 16 of the large ones
    "tnkd": ["16x6x512x512", "16x19x512x512", "16x150x512x512"],
    "kd": [],
    "cafd": ["16x512x64x64", "16x256x128x128"],
    "matched": ["16x6x128x128", "16x150x128x128"],
    "dsct": ["16x19x512x512+16x512x64x64"],
    "jaccard": ["16x19x128x128", "16x150x128x128"],
    **{loss: ["16x6x128x128", "16x19x128x128", "16x150x128x128"] for loss in LOWRES},
}
SHAPES_QUICK = {
    "lowres": ["2x19x128x128", LOWRES_SMALL],
    "lowres-tnkd": ["2x19x128x128"],
    "lowres-dsct": ["2x19x128x128"],
    "lowres-kd": ["2x19x128x128"],
    "tnkd": ["4x6x512x512", "2x19x512x512", "128x100x1x1"],
    "kd": ["2x19x512x512"],
    "cafd": ["4x512x64x64", "8x64x32x32"],
    "matched": ["4x6x128x128"],
    "dsct": ["2x19x512x512"],
    "jaccard": ["2x19x128x128"],
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table: a loss at one shape, layout, dtype and phase."""

    loss: str
    shape: str  # "4x6x512x512", for dsct perhaps "4x6x512x512+4x512x64x64", for lowres perhaps "1x6x16x16@64x64"
    layout: str
    dtype: str
    phase: str

    @property
    def lowres(self) -> bool:
        return self.loss in LOWRES

    @property
    def logits(self) -> tuple[int, ...] | None:
        return None if self.loss == "cafd" else parse_shape(self.shape)[0]

    @property
    def features(self) -> tuple[int, ...] | None:
        shapes = parse_shape(self.shape)
        if self.lowres:
            return None
        return shapes[0] if self.loss == "cafd" else shapes[1] if len(shapes) > 1 else None

    @property
    def teacher_logits(self) -> tuple[int, ...] | None:
        return parse_shape(self.shape)[-1] if self.lowres else self.logits

    @property
    def labels(self) -> tuple[int, ...] | None:
        if not self.logits:
            return None
        return (self.logits[0], *(label_size(self.shape) if self.lowres else self.logits[2:]))

    @property
    def student_bytes(self) -> int:
        """Size of the student's tensors: the unit in which extra memory is told. Of lowres in float32, always."""
        size = torch.float32.itemsize if self.lowres else DTYPES[self.dtype].itemsize
        return sum(math.prod(shape) for shape in (self.logits, self.features) if shape) * size

    @property
    def floor_bytes(self) -> int:
        """Bytes that must move, each tensor once per pass that cannot do without it.

        Logits: forward reads student, teacher and labels (int64), and gradient adds one write; the gradient needs
        nothing that the forward has not read, but for those of matched and jaccard, and so of dsct's defaults: they
        need sums over all positions first, and read both again. Features: forward reads student and teacher; the
        gradient needs the whole map first, so backward reads the student again and writes. That forward needs each
        sample twice (the channel weights first, then the map) is left to the cache and not counted.
        """
        size = DTYPES[self.dtype].itemsize
        backward = self.phase == FORWARD_BACKWARD
        total = 0
        if self.logits and self.teacher_logits and self.labels:
            once = self.loss in ("tnkd", "kd", "lowres", "lowres-tnkd", "lowres-kd")
            student = 1 if not backward else 2 if once else 3
            teacher = 2 if backward and not once else 1
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
    parts, _, labels = text.partition("@")
    shapes, at = [_sizes(part) for part in parts.split("+")], _sizes(labels) if labels else (1, 1)
    if len(shapes) > 2 or len(at) != 2 or any(len(shape) != 4 for shape in shapes) or min(map(min, [*shapes, at])) < 1:
        raise ValueError(
            f"shape: expected NxCxHxW, for dsct perhaps NxKxHxW+NxCxHxW, for lowres perhaps NxKxHxW@HxW, got {text!r}"
        )
    return shapes


def label_size(text: str) -> tuple[int, ...]:
    """Height and width of the labels in a lowres shape: "1x6x16x16@64x64" -> (64, 64)"""
    labels = text.partition("@")[2]
    return _sizes(labels) if labels else LOWRES_LABELS


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) if size.isdecimal() else 0 for size in text.split("x"))


def fits(loss: str, shape: str) -> bool:
    """Whether a shape can be one of this loss."""
    shapes = parse_shape(shape)
    if loss in LOWRES:
        smaller = all(size <= label for sizes in shapes for size, label in zip(sizes[2:], label_size(shape)))
        return smaller and shapes[0][:2] == shapes[-1][:2]
    return "@" not in shape and (len(shapes) == 1 or loss == "dsct")


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
    cases = []
    for loss in losses:
        # dsct and lowres are what a training step calls, always with its gradient
        in_phases = phases or ([FORWARD_BACKWARD] if quick or loss in ("dsct", *LOWRES) else PHASES)
        in_dtypes = dtypes or (["fp32"] if quick or loss in LOWRES else ["fp32", "bf16"])
        for shape in shapes or default_shapes(loss, device, quick):
            if not fits(loss, shape):
                continue
            one_layout = all(height * width == 1 for _, _, height, width in parse_shape(shape))
            for layout in LAYOUTS[:1] if one_layout else layouts:
                cases += [Case(loss, shape, layout, dtype, phase) for dtype in in_dtypes for phase in in_phases]
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
