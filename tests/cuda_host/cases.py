"""The cases that the CUDA kernels run on the host, and what the reference says to each."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsct_kernels.cafd import reference as cafd_reference
from dsct_kernels.dtypes import acc_dtype
from dsct_kernels.selftest import relative_error
from dsct_kernels.tnkd import reference as tnkd_reference
from dsct_kernels.tnkd.objective import Objective
from dsct_kernels.triton_common import channels_last, dense
from tests.helpers import strided_copy
from tests.oracle import assert_as_good_as_reference, assert_cafd_as_good_as_reference, learnt
from tools.inspect.cuda_host.harness import Case

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def offset_copy(x: Tensor, offset: int = 1) -> Tensor:
    """Dense, but not on 16 bytes."""
    flat = x.new_zeros(x.numel() + offset)
    return flat[offset:].view(x.shape).copy_(x)


def lay_out(x: Tensor, layout: str) -> Tensor:
    if layout == "stepped":  # every second number of a larger buffer: pixels and classes still at one stride each
        return torch.stack((torch.full_like(x, float("nan")), x), -1)[..., 1]
    if layout == "tokens":  # (N, L, C) behind a class token, viewed as images
        tokens = (
            torch.cat((torch.full_like(x[:, :, :1, 0], float("nan")), x.flatten(2)), 2).transpose(1, 2).contiguous()
        )
        return tokens[:, 1:].transpose(1, 2).unflatten(2, x.shape[2:])
    return offset_copy(x) if layout == "offset" else strided_copy(x, layout)


def served(x: Tensor) -> Tensor:
    """As cafd.cu has it before the launch."""
    _, _, h, w = x.shape
    return x if h == 1 or w == 1 or x.stride(2) == w * x.stride(3) else x.contiguous()


def taken(x: Tensor, last: bool) -> Tensor:
    """Logits as tnkd.cu has them before the launch."""
    x = dense(x, last)
    x = x.movedim(-1, 1) if last else x
    return x if x.data_ptr() % 16 == 0 else x.clone()


@dataclass
class TnkdCase:
    """Shapes, dtypes and layouts of one call of tnkd. `kernel` is the one that must serve it."""

    kernel: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    teacher_dtype: torch.dtype | None = None
    layout: str = "contiguous"
    teacher_layout: str | None = None
    label: torch.dtype | None = torch.uint8
    label_layout: str = "contiguous"
    ignore_index: int | None = 255
    reduction: int = 1
    with_ce: bool = True
    coupled: bool = False  # plain KD
    weighted: bool = False
    only_grad: bool = False  # the loss is a difference of terms of size 1, and next to nothing
    rare: bool = False  # class weights of which one outweighs the others, which are next to nothing
    weights: tuple[float, float, float] = (0.7, 1.0, 2.0)  # cross-entropy, TCKD, NCKD
    temperature: float = 2.0
    scale: float = 2.0
    needs_grad: bool = True
    on_device: str = ""  # which of "values" and "ignore_index" the kernels read from the device's memory
    shared_bytes: int = 232_448  # the most that a block of this device may have: sm_90's
    logits: Any = None  # (student, teacher, target) -> None, edits them in place
    why: str = ""

    def __post_init__(self) -> None:
        if self.layout == "odd":  # planes of which lanes cannot take whole packs
            self.shape, self.layout = (*self.shape[:2], 3, 7), "contiguous"

    def label_size(self) -> tuple[int, ...]:
        return self.shape[2:]

    def teacher_shape(self) -> tuple[int, ...]:
        return self.shape

    def arguments(self) -> tuple[Any, ...]:
        torch.manual_seed(sum(self.shape))
        n, k, *_ = self.shape
        space = self.label_size()
        student = (torch.randn(self.shape).clamp(-3, 3) * self.scale).to(self.dtype)
        teacher = (torch.randn(self.teacher_shape()).clamp(-3, 3) * self.scale).to(self.teacher_dtype or self.dtype)
        target = None
        if self.label is not None:
            target = torch.randint(0, min(k, 127), (n, *space))
            if self.ignore_index is not None and self.reduction != 3:
                target = torch.where(torch.rand(target.shape) < 0.2, self.ignore_index, target)
            target = target.to(self.label)
        if self.logits is not None:
            self.logits(student, teacher, target)
        student = lay_out(student, self.layout)
        teacher = lay_out(teacher, self.teacher_layout or self.layout)
        if target is not None and self.label_layout != "contiguous":
            target = strided_copy(target, self.label_layout)
        weight = torch.rand(k, dtype=acc_dtype(student, teacher)) + 0.5 if self.weighted else None
        if self.rare:
            weight = torch.full((k,), 1e-6, dtype=acc_dtype(student, teacher))
            weight[k - 1] = 40
        return student, teacher, target, self.objective(weight)

    def objective(self, weight: Tensor | None) -> Objective:
        ce, tckd, nckd = self.weights
        return Objective(tckd, nckd, self.temperature, self.ignore_index, self.reduction,
                         ce_weight=ce if self.with_ce else None, class_weight=weight, coupled=self.coupled)  # fmt: skip

    def case(self) -> Case:
        self.args = self.arguments()
        student, teacher, target, objective = self.args
        student, teacher, target = self.taken(student, teacher, target)
        weight, values, _, coupled, reduction = objective.packed(self.args[2], torch.device("cpu"))
        ce, tckd, nckd, temperature = [0.0, *values.tolist()][-4:]
        acc = acc_dtype(student, teacher)
        tensors = {"student": student, "teacher": teacher}
        tensors |= {} if target is None else {"target": target.contiguous()}
        tensors |= {} if weight is None else {"class_weight": weight}
        shape = [student.shape[0], *student.shape[2:]]
        outputs = {"parts": torch.empty(3, dtype=acc), "grad_scale": torch.empty((), dtype=acc)}
        outputs |= (
            {"loss_map": torch.empty(shape, dtype=acc)} if reduction == 0 else {"loss": torch.empty((), dtype=acc)}
        )
        outputs |= {"grad": torch.empty_like(student)} if self.needs_grad else {}
        numbers = {"ce_weight": ce, "tckd_weight": tckd, "nckd_weight": nckd, "temperature": temperature,
                   "reduction": reduction, "with_ce": self.with_ce, "coupled": coupled,
                   "shared_bytes": self.shared_bytes}  # fmt: skip
        numbers |= {} if self.ignore_index is None else {"ignore_index": self.ignore_index}
        if "values" in self.on_device:  # and the numbers that the host would use are none
            tensors["values"] = values
            numbers |= dict.fromkeys(("ce_weight", "tckd_weight", "nckd_weight", "temperature"), float("nan"))
        if self.label is None:  # nothing is ignored then
            numbers.pop("ignore_index", None)
        elif "ignore_index" in self.on_device:
            tensors["ignore_index"] = torch.tensor(numbers.pop("ignore_index"))
        return Case(self.op(), tensors, outputs, numbers | self.more_numbers())

    def taken(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """As tnkd.cu has them before the launch."""
        last = channels_last(student)
        return taken(student, last), taken(teacher, last), teacher.argmax(1) if target is None else target

    def op(self) -> str:
        return "tnkd"

    def more_numbers(self) -> dict[str, float]:
        return {}

    def addressing(self) -> tuple[Any, ...]:
        """What a kernel's addresses depend on: cases that differ only in their numbers touch the same memory."""
        own_exponentials = self.with_ce and self.temperature not in (1.0, 2.0)
        labels = self.label, self.label_layout, self.logits in (all_ignored, bad_label)
        outputs = self.needs_grad, self.reduction == 0, self.weighted or self.rare
        layouts = self.layout, self.teacher_layout, self.dtype, self.teacher_dtype
        return self.kernel, self.shape, *layouts, *labels, *outputs, own_exponentials, self.on_device, self.shared_bytes

    def check(self, kernel: str, got: dict[str, Tensor]) -> None:
        what = f"{self}"
        assert kernel == self.kernel, what
        if kernel == NONE:
            return
        student, teacher, target, objective = self.args

        def reference(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
            weight = objective.class_weight
            if dtype == torch.float64 and weight is not None:
                weight = weight.to(dtype)
            own = self.objective(weight)
            return learnt(lambda s: tnkd_reference.tnkd(s, teacher.to(dtype), target, own), student.to(dtype))

        truth, own = reference(torch.float64), reference(torch.float32)
        loss = got["loss_map"] if "loss_map" in got else got["loss"]
        if not self.only_grad:
            assert_as_good_as_reference(loss, own[0], truth[0], f"loss of {what}")
        if not self.only_grad and truth[0].isfinite().all():
            assert_as_good_as_reference(got["parts"], own[1], truth[1], f"parts of {what}")
        if self.shape[1] == 2 and truth[0].isfinite().all():
            assert got["parts"][2] == 0, f"NCKD {got['parts'][2]} of two classes: {what}"
            if self.weights[:2] == (0, 0):
                assert (got["grad"] == 0).all(), f"gradient of NCKD of two classes: {what}"
        if self.needs_grad:
            grad = got["grad"].double() * got["grad_scale"].double()
            own_grad = own[2] if self.dtype == torch.float16 else own[2].to(self.dtype)
            extra = {torch.float16: 2**-11, torch.bfloat16: 4e-3}.get(self.dtype, 1e-6)  # float16: one rounding
            same = truth[2].isfinite()
            assert torch.equal(grad.isfinite(), same), f"finite gradients of {what}"
            assert_as_good_as_reference(
                torch.where(same, grad, 0), torch.where(same, own_grad, 0), torch.where(same, truth[2], 0),
                f"gradient of {what}", extra,
            )  # fmt: skip


@dataclass
class UpsampledCase(TnkdCase):
    """One call of tnkd_upsampled: shape is the student's, (N, K, h, w); `kernel`: classes, groups and columns of it."""

    size: tuple[int, int] = (0, 0)  # the labels'
    teacher_size: tuple[int, int] | None = None  # as the student's
    align_corners: bool = False

    def label_size(self) -> tuple[int, ...]:
        student, teacher = self.shape[2:], self.teacher_size or self.shape[2:]
        return self.size if self.label else tuple(max(pair) for pair in zip(student, teacher, strict=True))

    def teacher_shape(self) -> tuple[int, ...]:
        return (*self.shape[:2], *(self.teacher_size or self.shape[2:]))

    def objective(self, weight: Tensor | None) -> Objective:
        return super().objective(weight)._replace(align_corners=self.align_corners)

    def taken(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        return taken(student, channels_last(student)), taken(teacher, channels_last(teacher)), target

    def op(self) -> str:
        return "tnkd_upsampled"

    def more_numbers(self) -> dict[str, float]:
        return {"align_corners": self.align_corners}

    def addressing(self) -> tuple[Any, ...]:
        return *super().addressing(), self.size, self.teacher_size, self.align_corners


def nan_where_ignored(student: Tensor, teacher: Tensor, target: Tensor) -> None:
    ignored = (target == 255).unsqueeze(1).expand_as(student)
    student[ignored] = float("nan")
    teacher[ignored] = float("inf")


def nan_at_valid(student: Tensor, teacher: Tensor, target: Tensor) -> None:
    target.view(-1)[3] = 1
    student.movedim(1, -1).reshape(-1, student.shape[1])
    student.flatten(2)[0, 0, 3] = float("nan")


def class_absent(student: Tensor, teacher: Tensor, target: Tensor) -> None:
    student[:, 1] = teacher[:, 1] = -float("inf")


def student_lacks(student: Tensor, teacher: Tensor, target: Tensor) -> None:
    target.view(-1)[5] = 0
    student.flatten(2)[0, 1, 5] = -float("inf")


def one_class_left(student: Tensor, teacher: Tensor, target: Tensor) -> None:
    target.view(-1)[:] = 0
    student[:, 1:] = teacher[:, 1:] = -float("inf")


def first_classes_absent(student: Tensor, teacher: Tensor, target: Tensor) -> None:
    """All that one warp has, in the student, the teacher or both."""
    target.view(-1)[:] = student.shape[1] - 1
    student.flatten(2)[:, :16, ::2] = -float("inf")
    teacher.flatten(2)[:, :16, ::2] = teacher.flatten(2)[:, :16, 1::4] = -float("inf")


def far_apart(student: Tensor, teacher: Tensor, target: Tensor) -> None:
    """Warps whose largest logits are thousands apart, with both signs."""
    k = student.shape[1]
    step = torch.linspace(-3e3, 3e3, k).view(1, k, *[1] * (student.dim() - 2))
    student += step
    teacher += step.roll(k // 3, 1)


def certain_teacher(student: Tensor, teacher: Tensor, target: Tensor | None) -> None:
    """Its other classes are all absent, at most pixels, for which NCKD has nothing to say."""
    k = student.shape[1]
    label = (teacher.argmax(1) if target is None else target.long().clamp(max=k - 1)).unsqueeze(1)
    certain = torch.ones_like(teacher, dtype=torch.bool).scatter_(1, label, False)
    certain.flatten(2)[..., ::3] = False
    teacher.masked_fill_(certain, -float("inf"))


def certain_teacher_lacks_the_target(student: Tensor, teacher: Tensor, target: Tensor) -> None:
    certain_teacher(student, teacher, target)
    teacher.flatten(2)[:, :, 1::6] = -float("inf")
    student.flatten(2)[:, 0, 4::6] = -float("inf")


def infinite_target(network: int) -> Any:
    def edit(student: Tensor, teacher: Tensor, target: Tensor) -> None:
        certain_teacher(student, teacher, target)
        target.view(-1)[3] = 1
        (student, teacher)[network].flatten(2)[0, 1, 3] = float("inf")

    return edit


def all_ignored(student: Tensor, teacher: Tensor, target: Tensor) -> None:
    target.fill_(255)


def sure_of(away: float) -> Any:
    """Both networks put the label so far above or below the other classes; where they differ otherwise is of size 1."""

    def edit(student: Tensor, teacher: Tensor, target: Tensor) -> None:
        label = target.long().clamp(max=student.shape[1] - 1).unsqueeze(1)
        student.scatter_add_(1, label, torch.full_like(student[:, :1], away))
        teacher.copy_(student + teacher)

    return edit


def bad_label(student: Tensor, teacher: Tensor, target: Tensor) -> None:
    target.view(-1)[2] = 200


def teacher_nan(student: Tensor, teacher: Tensor, target: Tensor | None) -> None:
    teacher[:, 1] = float("nan")


def ties(student: Tensor, teacher: Tensor, target: Tensor | None) -> None:
    teacher.round_()


PLANES, PLANES_SPLIT, TILES, TILES_SPLIT, NONE = "planes", "planes_split", "tiles", "tiles_split", "none"
LAST = ("contiguous", "channels_last")
LARGE = {torch.float32: 1e4, torch.float16: 2e4, torch.bfloat16: 1e4}

TNKD = [
    *(TnkdCase(PLANES, (2, k, 6, 8), why="every class count of the whole kernel") for k in (2, 3, 4, 6, 8)),
    *(TnkdCase(PLANES, (1, 5, 100, 16), dtype, weighted=True, why="two blocks, weights") for dtype in DTYPES),
    *(TnkdCase(PLANES, (1, 6, 4, 8), dtype, reduction=r) for dtype in DTYPES for r in (0, 2)),
    *(TnkdCase(PLANES, (1, 6, 4, 8), label=label, ignore_index=i) for label, i in (
        (torch.uint8, 0), (torch.int8, -1), (torch.int16, -100), (torch.int32, 255), (torch.int64, -100),
        (torch.int64, None))),
    TnkdCase(PLANES, (2, 6, 4, 8), label=None, logits=ties, why="the teacher's argmax, ties"),
    *(TnkdCase(PLANES, (1, 7, 4, 8), dtype, temperature=t, why="cross-entropy's own exponentials")
      for dtype in DTYPES for t in (1.0, 3.0)),
    TnkdCase(PLANES, (1, 6, 4, 8), with_ce=False, needs_grad=False),
    *(TnkdCase(kernel, (2, 2, 6, 8), dtype, layout=layout, weights=(0.0, 0.0, 7.0), with_ce=False, scale=scale,
               temperature=1.5, why="two classes have no NCKD")
      for kernel, layout in ((PLANES, "contiguous"), (TILES, "channels_last"), (TILES, "odd")) for dtype in DTYPES
      for scale in (2.0, 1e4)),
    *(TnkdCase(kernel, (1, 2, 4, 8), layout=layout, logits=edit, needs_grad=edit is not student_lacks,
               why="and hide no NaN and no inf (whose gradient nothing defines)")
      for kernel, layout in ((PLANES, "contiguous"), (TILES, "channels_last"), (TILES, "odd"))
      for edit in (nan_at_valid, student_lacks, one_class_left)),
    *(TnkdCase(kernel, shape, dtype, scale=LARGE[dtype], temperature=t, why="magnitude")
      for kernel, shape in ((PLANES, (1, 6, 4, 8)), (PLANES, (1, 19, 4, 8)))
      for dtype in DTYPES for t in (2.0, 0.01)),
    *(TnkdCase(kernel, shape, logits=edit) for edit in (
        nan_where_ignored, nan_at_valid, class_absent, student_lacks, one_class_left, all_ignored, bad_label)
      for kernel, shape in ((PLANES, (1, 6, 4, 8)), (PLANES, (1, 19, 4, 8)))),
    *(TnkdCase(kernel, shape, layout=layout, logits=sure_of(away), weights=(0.0, 1.0, 0.0), temperature=1.0, scale=1.0,
               with_ce=False, why="a target term as small as exp(-|away|) has its digits")
      for kernel, shape, layout in ((PLANES, (1, 6, 8, 8), "contiguous"), (PLANES_SPLIT, (1, 150, 8, 8), "contiguous"),
                                    (TILES, (1, 19, 8, 8), "channels_last"))
      for away in (-40.0, -20.0, -5.0, 0.0, 5.0, 20.0, 40.0)),
    *(TnkdCase(kernel, (2, k, 4, 8), dtype, layout=layout, label=label, logits=certain_teacher, temperature=t,
               reduction=r, with_ce=t != 1.5, why="a certain teacher")
      for kernel, k, layout in ((PLANES, 2, "contiguous"), (PLANES, 6, "contiguous"), (PLANES, 19, "contiguous"),
                                (PLANES_SPLIT, 150, "contiguous"), (TILES, 6, "channels_last"), (TILES, 2, "odd"),
                                (TILES, 6, "odd"))
      for dtype in DTYPES for label, t, r in ((torch.uint8, 2.0, 1), (None, 1.5, 2), (torch.int64, 1.0, 0))),
    *(TnkdCase(kernel, (1, k, 4, 8), layout=layout, logits=edit, ignore_index=None, needs_grad=grad, with_ce=False,
               weights=weights)
      for kernel, k, layout in ((PLANES, 2, "contiguous"), (PLANES, 6, "contiguous"), (TILES, 19, "channels_last"),
                                (TILES, 6, "odd"))
      for edit, grad in ((certain_teacher_lacks_the_target, True), (infinite_target(0), False),
                         (infinite_target(1), False))
      for weights in ((0.0, 1.0, 2.0), (0.0, 0.0, 1.0))),
    *(TnkdCase(TILES, (1, 6, 3, 7), logits=edit) for edit in (
        nan_where_ignored, nan_at_valid, class_absent, student_lacks, one_class_left, all_ignored, bad_label)),
    *(TnkdCase(kernel, (1, k, 4, 16), torch.float16, layout=layout, reduction=r, temperature=t, weights=weights,
               scale=scale, rare=rare, with_ce=with_ce, only_grad=True, why="small gradients, before a GradScaler")
      for kernel, k, layout in ((PLANES, 6, "contiguous"), (TILES, 19, "channels_last"), (TILES, 5, "odd"))
      for r in (0, 1, 2) for t, scale in ((0.01, 1e-4), (20.0, 0.1), (1.0, 1e4))
      for weights, rare, with_ce in (((0.0, 1e-6, 2e-6), False, False), ((0.0, 0.5, 0.0), False, False),
                                     ((1e-3, 1.0, 2.0), True, True), ((1e4, 1.0, 2.0), True, True))),
    *(TnkdCase(kernel, (1, k, 4, 8), torch.float16, weights=(0.0, 0.0, 0.0), logits=edit, why="nothing to scale")
      for kernel, k in ((PLANES, 6), (PLANES, 19)) for edit in (None, all_ignored)),
    TnkdCase(TILES, (2, 6, 4, 8), torch.float16, torch.float32, weights=(1e-3, 1e-6, 2e-6), rare=True),
    *(TnkdCase(PLANES, (1, k, 4, 16), dtype) for k in (9, 13, 19, 20) for dtype in DTYPES),
    *(TnkdCase(PLANES_SPLIT, (1, k, 4, 16), dtype) for k in (21, 40, 41) for dtype in DTYPES),
    *(TnkdCase(PLANES_SPLIT, (2, 150, 3, 24), dtype, reduction=r) for dtype, r in (
        (torch.float32, 1), (torch.bfloat16, 1), (torch.bfloat16, 0))),
    TnkdCase(PLANES, (1, 19, 10, 20), temperature=3.0, weighted=True, why="a tile that is not full"),
    TnkdCase(PLANES, (1, 19, 4, 8), label=None, logits=ties),
    *(TnkdCase(kernel, (1, k, 6, 8), dtype, layout=layout, temperature=t, why="few classes a warp")
      for kernel, k, layout in ((PLANES_SPLIT, 21, "contiguous"), (TILES_SPLIT, 24, "channels_last"))
      for dtype in DTYPES for t in (1.0, 2.0, 0.5)),
    *(TnkdCase(kernel, (1, k, 6, 8), layout=layout, logits=edit, needs_grad=edit is not student_lacks)
      for kernel, k, layout in ((PLANES_SPLIT, 45, "contiguous"), (TILES_SPLIT, 45, "channels_last"))
      for edit in (nan_where_ignored, nan_at_valid, class_absent, student_lacks, one_class_left, all_ignored, bad_label,
                   first_classes_absent, far_apart)),
    *(TnkdCase(kernel, (1, k, 4, 8), layout=layout, label=None, logits=teacher_nan, why="a NaN is never hidden")
      for kernel, k, layout in ((PLANES, 6, "contiguous"), (PLANES, 19, "contiguous"),
                                (PLANES_SPLIT, 150, "contiguous"), (TILES, 6, "odd"))),
    *(TnkdCase(kernel, (3, k, 5, 16), label=label, weighted=True, why="labels counted in packs")
      for kernel, k in ((PLANES, 6), (PLANES, 19)) for label in (torch.uint8, torch.int64)),
    TnkdCase(PLANES, (3, 6, 5, 16), label_layout="sliced", weighted=True, why="labels that are copied"),
    TnkdCase(PLANES, (1, 19, 4, 8), torch.float16, label=None, reduction=0),
    *(TnkdCase(kernel, (1, 320, 2, 4), dtype, layout=layout, shared_bytes=101_376, why="the most classes")
      for kernel, layout in ((PLANES_SPLIT, "contiguous"), (TILES_SPLIT, "channels_last")) for dtype in DTYPES),
    *(TnkdCase(NONE, (1, 321, 2, 4), layout=layout, why="and one more") for layout in ("contiguous", "channels_last")),
    *(TnkdCase(TILES, (2, k, 7, 9), dtype, layout="channels_last", reduction=r, weighted=True)
      for k, r in ((2, 0), (6, 1), (8, 2), (16, 1), (19, 2)) for dtype in DTYPES),
    *(TnkdCase(TILES_SPLIT, (2, k, 3, 24), dtype, layout="channels_last", temperature=3.0)
      for k in (24, 150, 152) for dtype in DTYPES),
    TnkdCase(TILES, (1, 6, 40, 50), torch.bfloat16, layout="channels_last", why="several tiles a block"),
    TnkdCase(TILES, (1, 8, 40, 51), torch.bfloat16, layout="channels_last", why="the same of padded rows"),
    TnkdCase(TILES_SPLIT, (1, 24, 40, 51), layout="channels_last", why="and of split ones"),
    TnkdCase(PLANES, (1, 11, 40, 50), why="several tiles a block"),
    TnkdCase(PLANES_SPLIT, (3, 22, 10, 50), torch.float16, why="several tiles a block, several images"),
    *(TnkdCase(kernel, (2, k, 12, 8), layout=layout, teacher_layout=teacher, why="a transformer teaches a CNN")
      for k, *kernels in ((6, PLANES, TILES), (32, PLANES_SPLIT, TILES_SPLIT))
      for kernel, layout, teacher in zip(kernels, LAST, reversed(LAST), strict=True)),
    *(TnkdCase(PLANES, (2, k, 4, 8), torch.float32, teacher, why="autocast") for k in (3, 6, 8, 19)
      for teacher in (torch.bfloat16, torch.float16)),
    *(TnkdCase(PLANES_SPLIT, (2, 40, 4, 8), torch.float32, teacher) for teacher in (torch.bfloat16, torch.float16)),
    *(TnkdCase(kernel, (2, k, 4, 8), *dtypes, layout=layout, why="dtypes of every pair")
      for kernel, k, layout, dtypes in (
          (TILES, 6, "contiguous", (torch.bfloat16, torch.float32)), (TILES, 6, "channels_last", DTYPES[:2]),
          (TILES, 16, "channels_last", DTYPES[1:]),
          (TILES_SPLIT, 32, "channels_last", (torch.float32, torch.bfloat16)),
          (TILES_SPLIT, 40, "contiguous", DTYPES[1:]))),
    *(TnkdCase(TILES, (2, k, 5, 7), dtype, why="an odd size") for k in (6, 19) for dtype in DTYPES[1:]),
    *(TnkdCase(TILES, (2, k, 5, 7), why="an odd size of which lanes take four") for k in (6, 8)),
    TnkdCase(PLANES, (2, 19, 5, 7), why="and one"),
    TnkdCase(PLANES, (2, 6, 4, 8), layout="offset", why="not on 16 bytes: copied first"),
    TnkdCase(TILES, (2, 6, 4, 8), layout="tokens", why="channels_last with gaps: copied first"),
    TnkdCase(TILES, (2, 6, 5, 7), torch.float16, layout="channels_last", label=None, logits=ties),
    TnkdCase(TILES, (7, 5), why="no space at all"),
    TnkdCase(TILES, (1, 4, 1, 1), why="one pixel"),
    *(TnkdCase(TILES, (2, 6, 5, 7), layout=layout, why="copied first") for layout in ("sliced", "transposed")),
    TnkdCase(PLANES, (2, 6, 4, 8), label_layout="transposed"),
    TnkdCase(PLANES, (2, 6, 3, 4, 5), reduction=0, layout="transposed", why="copied first"),
    TnkdCase(PLANES, (0, 5, 2, 2), why="empty batch"),
    *(TnkdCase(kernel, (2, k, 4, 8), dtype, layout=layout, label=label, reduction=r, weights=(0.7, w, w), with_ce=ce,
               temperature=t, logits=edit, coupled=True, why="plain KD")
      for kernel, k, layout in ((PLANES, 2, "contiguous"), (PLANES, 6, "contiguous"), (TILES, 19, "channels_last"),
                                (PLANES_SPLIT, 150, "contiguous"), (TILES_SPLIT, 24, "channels_last"),
                                (TILES, 2, "odd"), (TILES, 6, "odd"))
      for dtype, label, r, w, ce, t, edit in (
          (torch.float32, torch.uint8, 1, 1.0, False, 1.0, None), (torch.float16, None, 2, 0.5, False, 4.0, None),
          (torch.bfloat16, torch.int64, 0, 1.0, True, 3.0, None), (torch.float32, None, 1, 1.0, True, 2.0, ties),
          (torch.float32, torch.uint8, 0, 1.0, False, 2.0, certain_teacher),
          (torch.float32, torch.uint8, 0, 1.0, False, 2.0, student_lacks),
          (torch.float32, torch.uint8, 1, 1.0, False, 2.0, nan_at_valid))),
    *(TnkdCase(kernel, (2, k, 4, 8), weights=(0.7, 0.5, 2.0), coupled=True, why="of unequal weights")
      for kernel, k in ((PLANES, 19), (PLANES_SPLIT, 21))),
]  # fmt: skip


def cells_of_ignored(student: Tensor, teacher: Tensor, target: Tensor) -> None:
    """Cells that only ignored pixels touch, in columns of four labels; they hold anything."""
    target[..., :12] = 255
    student[..., :2], teacher[..., :2] = float("nan"), float("inf")


def cell_absent(student: Tensor, teacher: Tensor, target: Tensor) -> None:
    """A class that is nowhere near one cell: where that has a part, whatever its weight, and nowhere else."""
    target[target == 2] = 1
    student[:, 2, 1, 1] = teacher[:, 2, 1, 1] = -float("inf")


def cell_nan(network: int) -> Any:
    def edit(student: Tensor, teacher: Tensor, target: Tensor) -> None:
        (student, teacher)[network][0, -1, 1, 1] = (float("nan"), float("inf"))[network]

    return edit


def bad_labels(student: Tensor, teacher: Tensor, target: Tensor) -> None:
    target[0, 6, 6:8] = 200


# K, the kernel that serves it, and columns of labels: every variant.
UPSAMPLED_BY_K = ((2, "6_1"), (6, "6_1"), (8, "8_1"), (11, "12_1"), (16, "19_1"), (19, "19_1"), (20, "19_2"),
                  (33, "19_2"), (150, "19_8"))  # fmt: skip
UPSAMPLED = [
    *(UpsampledCase(f"upsampled_{kernel}_32", (1, k, 5, 6), dtype, size=(20, 24), temperature=t, why="every variant")
      for (k, kernel), dtype, t in zip(UPSAMPLED_BY_K, DTYPES * 3, (1.0, 2.0, 3.0, 2.0, 0.5) * 2)),
    *(UpsampledCase(f"upsampled_{kernel}_32", (2, k, 4, 5), dtype, teacher, size=(16, 20), with_ce=False, coupled=True,
                    weights=(0.0, 1.0, 1.0), label=label, why="plain KD, dtypes of every pair")
      for (k, kernel), (dtype, teacher), label in zip(
          UPSAMPLED_BY_K[:8], ((torch.float32, torch.bfloat16), (torch.float32, torch.float16),
                               (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)) * 2,
          (torch.int64, torch.int32, torch.int16, torch.uint8) * 2)),
    *(UpsampledCase(kernel, (1, k, *student), size=size, teacher_size=teacher, align_corners=align,
                    why="any ratio, networks of two sizes")
      for kernel, k in (("upsampled_6_1_64", 6), ("upsampled_19_2_32", 21)) for align in (False, True)
      for student, teacher, size in (((7, 9), (13, 11), (31, 40)), ((5, 40), (19, 5), (19, 40)),
                                     ((1, 1), (2, 36), (9, 36)), ((5, 33), (5, 33), (15, 33)),
                                     ((11, 33), (1, 33), (11, 33)), ((4, 34), (2, 17), (5, 35)))),
    UpsampledCase("upsampled_6_1_128", (3, 6, 9, 70), size=(36, 280), weighted=True, why="several tiles a block"),
    UpsampledCase("upsampled_6_1_128", (1, 5, 19, 45), torch.float16, size=(39, 135), align_corners=True, reduction=2),
    UpsampledCase("upsampled_19_2_32", (5, 38, 4, 9), torch.bfloat16, size=(17, 65), why="several tiles a block"),
    UpsampledCase("upsampled_19_1_96", (1, 19, 3, 24), teacher_size=(30, 96), label=None, logits=ties, weighted=True,
                  why="a strip that sees few rows, the teacher's labels"),
    *(UpsampledCase("upsampled_6_1_32", (1, 6, *student), dtype, teacher_size=teacher, label=None, logits=ties,
                    align_corners=align, weighted=align, coupled=not align, why="the upsampled teacher's labels")
      for student, teacher in (((12, 16), (4, 32)), ((24, 32), (6, 8))) for align, dtype in zip((False, True), DTYPES)),
    *(UpsampledCase(kernel, (1, k, 3, 5), size=(11, 19), shared_bytes=bytes, label=label, why="narrower tiles")
      for k, kernel, bytes, label in ((150, "upsampled_19_8_16", 166_912, torch.int16),
                                      (150, "upsampled_19_8_8", 101_376, torch.uint8),
                                      (40, "upsampled_19_4_8", 40_000, torch.int8),
                                      (300, "upsampled_19_16_16", 232_448, torch.int16),
                                      (320, "upsampled_19_20_8", 101_376, torch.int64))),
    *(UpsampledCase("upsampled_6_1_32", (2, 6, 6, 8), torch.bfloat16, layout=layout, teacher_layout=teacher,
                    size=(24, 32), label_layout="sliced", why="any strides")
      for layout, teacher in (("channels_last", "sliced"), ("sliced", "transposed"), ("transposed", "offset"))),
    *(UpsampledCase(kernel, (1, k, 6, 8), size=size, logits=edit, align_corners=align, needs_grad=grad)
      for kernel, k in (("upsampled_6_1_32", 6), ("upsampled_19_2_32", 33))
      for size, edit, align, grad in (
          ((24, 32), cells_of_ignored, False, True), ((24, 32), cell_absent, False, True),
          ((18, 24), cell_absent, False, True), ((26, 29), cell_absent, True, True),
          ((24, 32), cell_nan(0), False, False), ((24, 32), cell_nan(1), False, False),
          ((24, 32), bad_labels, False, True), ((24, 32), all_ignored, False, True),
          ((24, 32), class_absent, False, True))),
    *(UpsampledCase("upsampled_6_1_32", (1, 6, 6, 8), torch.float16, size=(24, 32), reduction=r, temperature=t,
                    weights=weights, scale=scale, rare=rare, with_ce=rare, only_grad=True, why="small gradients")
      for r in (1, 2) for t, scale, weights, rare in (
          (0.01, 1e-4, (0.0, 1e-6, 2e-6), False), (20.0, 0.1, (0.0, 0.5, 0.0), False),
          (1.0, 1e4, (1e4, 1.0, 2.0), True))),
    *(UpsampledCase(kernel, (1, k, 6, 8), dtype, size=(24, 32), scale=LARGE[dtype], temperature=t, why="magnitude")
      for kernel, k in (("upsampled_6_1_32", 6), ("upsampled_19_2_32", 33)) for dtype in DTYPES for t in (2.0, 0.01)),
    *(UpsampledCase(kernel, (1, k, 4, 8), size=(16, 32), on_device="values ignore_index", ignore_index=-100,
                    label=torch.int32, temperature=3.0, why="numbers in device memory")
      for kernel, k in (("upsampled_6_1_32", 6), ("upsampled_19_2_32", 33))),
    UpsampledCase("upsampled_6_1_32", (1, 6, 4, 8), size=(16, 32), needs_grad=False),
    UpsampledCase("upsampled_6_1_64", (0, 6, 4, 9), size=(16, 36), why="empty batch"),
    UpsampledCase(NONE, (1, 321, 2, 4), size=(4, 8)),
]  # fmt: skip


# The numbers in device memory: every kernel and dtype, and what is compiled or chosen otherwise for numbers elsewhere.
LAYOUTS_OF_KERNELS = ((PLANES, (2, 6, 4, 8), "contiguous"), (PLANES_SPLIT, (2, 21, 4, 8), "contiguous"),
                      *((kernel, shape, "channels_last")
                        for kernel, shape in ((TILES, (2, 6, 4, 8)), (TILES_SPLIT, (1, 24, 3, 7)))))  # fmt: skip
ON_DEVICE = [
    *(TnkdCase(kernel, shape, dtype, layout=layout, temperature=t, reduction=r, with_ce=ce, weighted=weighted,
               on_device=where)
      for kernel, shape, layout in LAYOUTS_OF_KERNELS for dtype in DTYPES
      for where, t, r, ce, weighted in (("values ignore_index", 1.0, 1, True, True), ("values", 2.0, 0, True, False),
                                        ("values", 0.01, 2, False, False), ("ignore_index", 3.0, 1, False, False))),
    *(TnkdCase(kernel, shape, layout=layout, label=label, ignore_index=i, on_device="ignore_index", weighted=True)
      for kernel, shape, layout in LAYOUTS_OF_KERNELS
      for label, i in ((torch.uint8, 0), (torch.int8, -1), (torch.int16, -100), (torch.int32, 255),
                       (torch.int64, -100))),
    *(TnkdCase(PLANES, (2, 6, 4, 8), label=torch.int64, ignore_index=i, on_device="ignore_index",
               why="an index that no narrow label may hold") for i in (2**40, 2**32 + 1, -(2**40))),
    *(TnkdCase(kernel, shape, layout=layout, logits=student_lacks, weights=(0.0, 0.0, 0.0), needs_grad=False,
               reduction=r, on_device="values", why="weights that turn out 0 take no part: 0 * inf is 0")
      for kernel, shape, layout in LAYOUTS_OF_KERNELS for r in (0, 1)),
    *(TnkdCase(kernel, (2, 2, 4, 8), layout=layout, label=None, logits=ties, on_device="values")
      for kernel, layout in ((PLANES, "contiguous"), (TILES, "channels_last"), (TILES, "odd"))),
]  # fmt: skip


@dataclass
class CafdCase:
    """Shapes, dtypes and layouts of one call of cafd, or (teacher None) of attention_map and its backward.

    `kernels`: how the maps lie, and whether backward holds a row or reads it twice.
    """

    kernels: str
    shape: tuple[int, int, int, int]
    teacher: tuple[int, int, int, int] | None = None
    dtype: torch.dtype = torch.float32
    teacher_dtype: torch.dtype | None = None
    layout: str = "contiguous"
    teacher_layout: str | None = None
    reduction: int = 1
    channel_temperature: float = 1.0
    spatial_temperature: float = 1.0
    scale: float = 1.0
    fill: float | None = None
    near: float | None = None  # the teacher is the student, and so much noise
    on_device: bool = False  # the kernels read the temperatures from the device's memory
    shared_bytes: int = 232_448
    why: str = ""

    def case(self) -> Case:
        torch.manual_seed(sum(self.shape))

        def make(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
            x = (
                (torch.randn(shape) * self.scale).to(dtype)
                if self.fill is None
                else torch.full(shape, self.fill, dtype=dtype)
            )
            return served(lay_out(x, layout))

        self.student = make(self.shape, self.dtype, self.layout)
        n, _, h, w = self.shape
        numbers = {"channel_temperature": self.channel_temperature, "spatial_temperature": self.spatial_temperature}
        numbers["shared_bytes"] = self.shared_bytes
        more = {}
        if self.on_device:  # and the numbers that the host would use are none
            more["temperatures"] = torch.tensor([*numbers.values()][:2], dtype=torch.float64)
            numbers |= dict.fromkeys([*numbers][:2], float("nan"))
        acc = acc_dtype(self.student)
        outputs = {"grad": torch.empty_like(self.student)}
        if self.teacher is None:
            self.map_grad = torch.randn(n, h, w, dtype=acc)
            outputs["map"] = torch.empty(n, h, w, dtype=acc)
            return Case("map", {"features": self.student, "map_grad": self.map_grad} | more, outputs, numbers)
        self.teacher_features = make(self.teacher, self.teacher_dtype or self.dtype, self.teacher_layout or self.layout)
        if self.near is not None:
            self.teacher_features = (self.student + self.near * self.teacher_features).to(self.teacher_features.dtype)
        acc_both = acc_dtype(self.student, self.teacher_features)
        outputs["loss"] = torch.empty([n] if self.reduction == 0 else [], dtype=acc_both)
        outputs["grad_map"] = torch.empty(n, h, w, dtype=acc)
        numbers["reduction"] = self.reduction
        return Case("cafd", {"student": self.student, "teacher": self.teacher_features} | more, outputs, numbers)

    def addressing(self) -> tuple[Any, ...]:
        layouts = self.layout, self.teacher_layout, self.dtype, self.teacher_dtype
        return self.kernels, self.shape, self.teacher, *layouts, self.reduction == 0, self.on_device, self.shared_bytes

    def check(self, kernels: str, got: dict[str, Tensor]) -> None:
        assert kernels == self.kernels, self
        temperatures = self.channel_temperature, self.spatial_temperature

        def reference(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            student = self.student.to(dtype)
            if self.teacher is None:
                return learnt(lambda s: cafd_reference.attention_map(s, *temperatures), student, self.map_grad.to)
            teacher = self.teacher_features.to(dtype)
            return learnt(lambda s: cafd_reference.cafd(s, teacher, *temperatures, self.reduction), student)

        truth, own = reference(torch.float64), reference(torch.float32)
        result = got["map"] if self.teacher is None else got["loss"]
        if truth[0].isnan().any():
            assert torch.equal(result.isnan(), truth[0].isnan()), self
            return
        own_grad = own[1].to(self.dtype)
        extra = {torch.float16: 1e-3, torch.bfloat16: 4e-3}.get(self.dtype, 1e-6)
        if self.near is None and self.teacher is not None:
            assert_cafd_as_good_as_reference(
                (result, got["grad"]), (own[0], own_grad), truth, self.student, self.teacher_features, f"of {self}",
                *temperatures, self.reduction, extra)  # fmt: skip
            return
        assert_as_good_as_reference(result, own[0], truth[0], f"{self}")  # near the teacher: with no allowance
        assert_as_good_as_reference(got["grad"], own_grad, truth[1], f"gradient of {self}", extra)


CAFD = [
    *(CafdCase("rows rows held", (2, 5, 4, 8), (2, 7, 4, 8), dtype, reduction=r)
      for dtype in DTYPES for r in (0, 1, 2)),
    *(CafdCase("columns columns twice", (2, 24, 3, 5), (2, 40, 3, 5), dtype, layout="channels_last")
      for dtype in DTYPES),
    CafdCase("columns rows twice", (2, 8, 4, 4), (2, 3, 4, 4), layout="channels_last", teacher_layout="contiguous",
             why="a CNN taught by tokens, and the reverse"),
    CafdCase("rows columns held", (2, 3, 4, 4), (2, 300, 4, 4), teacher_layout="channels_last", why="channel tiles"),
    *(CafdCase("any any held", (2, 5, 3, 5), (2, 3, 3, 5), layout=layout) for layout in (
        "contiguous", "sliced", "transposed", "stepped")),
    *(CafdCase("columns columns twice", (2, 5, 3, 5), (2, 67, 3, 5), dtype, layout=layout)
      for layout in ("channels_last", "tokens") for dtype in DTYPES[:2]),
    CafdCase("any any held", (2, 4, 4, 4), (2, 4, 4, 4), layout="offset"),
    *(CafdCase(kernels, (2, c, 4, 4), (2, 2 * c, 4, 4), *dtypes, layout=layout, why="dtypes of a pair")
      for kernels, c, layout in (("rows rows held", 3, "contiguous"), ("columns columns twice", 8, "channels_last"))
      for dtypes in ((torch.float32, torch.bfloat16), (torch.float16, torch.float32))),
    CafdCase("any any held", (2, 3, 7, 5), (2, 3, 7, 5), torch.float16),
    *(CafdCase("rows rows held", (2, 3, 5, 4), (2, 2, 5, 4), layout=layout, why="runs of eight, and four positions")
      for layout in ("contiguous",)),
    CafdCase("columns columns twice", (2, 12, 3, 5), (2, 20, 3, 5), layout="channels_last",
             why="eight channels, and four"),
    CafdCase("rows rows held", (1, 1, 4, 4), (1, 1, 4, 4), why="one channel"),
    CafdCase("columns columns twice", (2, 4, 1, 1), (2, 4, 1, 1), why="one position"),
    CafdCase("rows rows held", (2, 4, 4, 4), (2, 4, 4, 4), fill=0.0, why="all-zero features"),
    CafdCase("rows rows held", (2, 4, 4, 4), (2, 4, 4, 4), fill=float("nan")),
    *(CafdCase("rows rows held", shape, shape, near=near, why="a small loss is exact, too")
      for shape in ((2, 16, 8, 8), (1, 8, 64, 64)) for near in (0.1, 1e-3, 1e-5)),
    *(CafdCase("columns columns twice", shape, shape, layout="channels_last", near=near, why="the same by columns")
      for shape in ((2, 24, 8, 8), (1, 40, 24, 24)) for near in (0.1, 1e-3, 1e-5)),
    CafdCase("columns columns twice", (2, 4, 3, 4), (2, 4, 3, 4), fill=float("inf"), layout="channels_last"),
    *(CafdCase("rows rows held", (2, 4, 4, 8), (2, 4, 4, 8), dtype, scale=LARGE[dtype] / 4, channel_temperature=0.1,
               spatial_temperature=0.01) for dtype in DTYPES),
    *(CafdCase("rows held", (1, 3, 64, size), why="rows of one to several packs a thread") 
      for size in (8, 32, 96, 400)),
    CafdCase("columns twice", (1, 24, 20, 20), dtype=torch.bfloat16, layout="channels_last", why="chunks"),
    CafdCase("rows held", (2, 70, 2, 4), spatial_temperature=0.5, why="more channels than threads share"),
    *(CafdCase("rows twice", (1, 3, 64, size), shared_bytes=49_152, why="a row that finds no room")
      for size in (100, 400)),
]  # fmt: skip

# Every kernel, either accumulation dtype, and networks that do not share their launches.
CAFD_ON_DEVICE = [
    partial(CafdCase, *case, on_device=True) for case in (
        ("rows rows held", (2, 5, 4, 8), (2, 7, 4, 8)),
        ("rows rows held", (2, 5, 4, 8), (2, 7, 4, 8), torch.bfloat16),
        ("columns columns twice", (2, 24, 3, 5), (2, 40, 3, 5), torch.float16, None, "channels_last"),
        ("rows columns held", (2, 3, 4, 4), (2, 300, 4, 4), torch.float32, None, "contiguous", "channels_last"),
        ("any any held", (2, 5, 3, 5), (2, 3, 3, 5), torch.float32, None, "sliced"),
        ("rows rows held", (2, 4, 4, 4), (2, 6, 4, 4), torch.float32, torch.bfloat16),
        ("rows held", (1, 3, 64, 32)),
        ("columns twice", (1, 24, 20, 20), None, torch.bfloat16, None, "channels_last"),
    )
]  # fmt: skip


@dataclass
class MatchedCase:
    """Shapes, dtypes and layouts of one call of matched_cafd and its backward."""

    kernels: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32
    teacher_dtype: torch.dtype | None = None
    layout: str = "contiguous"
    teacher_layout: str | None = None
    reduction: int = 1
    channel_temperature: float | None = 1.0
    temperature: float = 4.0
    scale: float = 2.0
    masked: float | None = None  # so much of the positions, where the logits hold NaN
    near: float | None = None  # the teacher is the student, and so much noise
    upstream: float = 1.0
    maps: Any = None  # (student, teacher) -> None, edits them in place
    on_device: bool = False
    why: str = ""

    def case(self) -> Case:
        torch.manual_seed(sum(self.shape))
        student, teacher = (torch.randn(self.shape) * self.scale for _ in range(2))
        if self.near is not None:
            teacher = student + self.near * teacher
        student, teacher = student.to(self.dtype), teacher.to(self.teacher_dtype or self.dtype)
        if self.maps is not None:
            self.maps(student, teacher)
        n, _, h, w = self.shape
        self.mask = None
        if self.masked is not None:
            self.mask = torch.rand(n, 1, h, w) >= self.masked
            for x in (student, teacher):
                x.masked_fill_(~self.mask, float("nan"))
        self.student = served(lay_out(student, self.layout))
        self.teacher = served(lay_out(teacher, self.teacher_layout or self.layout))
        tensors = {"student": self.student, "teacher": self.teacher}
        tensors["upstream"] = torch.full([n] if self.reduction == 0 else [], self.upstream)
        tensors |= {} if self.mask is None else {"mask": self.mask}
        tau_c = 1.0 if self.channel_temperature is None else self.channel_temperature
        numbers = {"channel_temperature": tau_c, "spatial_temperature": self.temperature}
        if self.on_device:  # and the numbers that the host would use are none
            tensors["temperatures"] = torch.tensor([*numbers.values()], dtype=torch.float64)
            numbers = dict.fromkeys(numbers, float("nan"))
        numbers |= {"uniform": self.channel_temperature is None, "reduction": self.reduction}
        outputs = {"loss": torch.empty([n] if self.reduction == 0 else []), "grad": torch.empty_like(self.student)}
        return Case("matched", tensors, outputs, numbers)

    def addressing(self) -> tuple[Any, ...]:
        layouts = self.layout, self.teacher_layout, self.dtype, self.teacher_dtype
        return self.kernels, self.shape, *layouts, self.reduction == 0, self.masked is None, self.on_device

    def check(self, kernels: str, got: dict[str, Tensor]) -> None:
        """The error rule, and two roundings: of 1, of which KL is a difference where the networks are near each other,
        of the temperature, and, of a channel's strength, in the exponent of its weight."""
        assert kernels == self.kernels, self

        def reference(dtype: torch.dtype, nudge: float = 1.0) -> tuple[Tensor, Tensor]:
            teacher, temperature = self.teacher.to(dtype), self.temperature * nudge
            rest = teacher, self.mask, self.channel_temperature, temperature, self.reduction
            loss_of = partial(cafd_reference.matched_cafd, **dict(zip(MATCHED_ARGUMENTS, rest, strict=True)))
            return learnt(loss_of, self.student.to(dtype), lambda loss: torch.full_like(loss, self.upstream))

        eps = torch.finfo(torch.float32).eps
        truth, own = reference(torch.float64), reference(torch.float32)
        own = own[0], own[1].to(self.dtype)
        extra = 1e-6 + (0.0 if self.channel_temperature is None else 2 * eps / self.channel_temperature)
        floor = 2 * eps * self.temperature**2 * (1 if self.reduction == 1 else len(self.student))
        half = {torch.float16: 2**-11, torch.bfloat16: 4e-3}.get(self.dtype, 0.0)
        if self.temperature < 1 and truth[0].isfinite().all():  # else next to nothing
            moved = reference(torch.float64, 1 + 2 * eps)
            extra += max(relative_error(x, y) for x, y in zip(moved, truth, strict=True))
        assert_as_good_as_reference(got["loss"], own[0], truth[0], f"loss of {self}", extra, floor)
        what = f"gradient of {self}"
        assert_as_good_as_reference(got["grad"], own[1], truth[1], what, extra + half, 1e-12 * self.upstream)
        if self.mask is not None:
            assert not got["grad"].masked_select(~self.mask).any(), f"a gradient where nothing counts: {self}"
        if self.near == 0:
            assert not got["loss"].any() and not got["grad"].any(), self


MATCHED_ARGUMENTS = "teacher", "mask", "channel_temperature", "temperature", "reduction"


def minus_inf(*where: Any) -> Any:
    """-inf there, in the student, the teacher or both; -1: in that network's whole channel."""

    def edit(student: Tensor, teacher: Tensor) -> None:
        for network, channel, position in where:
            for x in {"student": (student,), "teacher": (teacher,), "both": (student, teacher)}[network]:
                x.flatten(2)[:, channel, position] = -float("inf")

    return edit


def bad_number(network: int, value: float, others: float | None = None) -> Any:
    def edit(student: Tensor, teacher: Tensor) -> None:
        if others is not None:
            teacher[0, 1] = others  # the row has no mass in the teacher
        (student, teacher)[network].flatten(2)[0, 1, -1] = value

    return edit


ALL, SOME = slice(None), slice(0, 40)
# Kernels, shape, layout: long rows that several blocks share, rows of one block, channels side by side in one tile and
# in several, neither.
MATCHED_LAYOUTS = (
    ("rows rows", (1, 2, 96, 96), "contiguous"), ("rows rows", (2, 5, 8, 12), "contiguous"),
    ("columns columns", (2, 19, 13, 9), "channels_last"), ("columns columns", (1, 6, 40, 51), "channels_last"),
    ("columns columns", (1, 150, 5, 7), "channels_last"), ("any any", (2, 5, 13, 7), "contiguous"),
)  # fmt: skip
MATCHED = [
    *(MatchedCase(*at[:2], dtype, layout=at[2], reduction=r, channel_temperature=tau_c, masked=masked)
      for at in MATCHED_LAYOUTS for dtype in DTYPES
      for r, tau_c, masked in ((1, 1.0, None), (0, None, 0.3))),
    *(MatchedCase(*at[:2], layout=at[2], temperature=tau, channel_temperature=tau_c, reduction=2)
      for at in MATCHED_LAYOUTS[1:4] for tau, tau_c in ((0.3, 0.3), (10.0, 10.0), (0.01, 1.0))),
    *(MatchedCase(*at[:2], layout=at[2], near=near, reduction=0, why="the networks agree")
      for at in MATCHED_LAYOUTS for near in (0.0, 0.1, 1e-3)),
    *(MatchedCase(*at[:2], dtype, layout=at[2], scale=LARGE[dtype] / 4, temperature=t)
      for at in MATCHED_LAYOUTS[1:3] for dtype in DTYPES for t in (1.0, 100.0)),
    *(MatchedCase(*at[:2], torch.float16, layout=at[2], upstream=65536.0, why="comes in before halves are rounded")
      for at in MATCHED_LAYOUTS),
    *(MatchedCase(*at[:2], layout=at[2], reduction=0, maps=edit) for at in MATCHED_LAYOUTS[:4] for edit in (
        minus_inf(("both", ALL, SOME)), minus_inf(("teacher", 0, ALL)), minus_inf(("both", 1, ALL)),
        minus_inf(("student", 1, 5)), minus_inf(("student", 1, ALL)), minus_inf(("teacher", ALL, SOME)),
        minus_inf(("teacher", 1, ALL), ("student", 1, SOME)))),
    *(MatchedCase(*at[:2], layout=at[2], reduction=0, maps=bad_number(network, bad, others))
      for at in MATCHED_LAYOUTS[1:4] for network in (0, 1) for bad in (float("nan"), float("inf"))
      for others in (None, -float("inf"))),
    *(MatchedCase(*at[:2], layout=at[2], masked=1.0, why="nothing counts") for at in MATCHED_LAYOUTS[:4]),
    *(MatchedCase(kernels, (2, 6, 4, 6), *dtypes, *layouts, masked=0.2, why="every pair")
      for kernels, *layouts in (("rows columns", "contiguous", "channels_last"), ("any rows", "offset", "contiguous"),
                                ("columns rows", "channels_last", "contiguous"), ("rows rows", "sliced", "transposed"),
                                ("any columns", "stepped", "tokens"))
      for dtypes in ((torch.float32, torch.bfloat16), (torch.float16, torch.float32))),
    *(MatchedCase("rows rows", (2, 6, 4, 6), *dtypes, masked=0.2) for dtypes in (
        (torch.float32, torch.bfloat16), (torch.float16, torch.float32), (torch.bfloat16, torch.float16))),
    MatchedCase("columns columns", (3, 4, 1, 1), why="one position"),
    MatchedCase("rows rows", (2, 1, 8, 8), why="one channel"),
    MatchedCase("rows rows", (1, 2, 4, 4), scale=0.0, why="nobody speaks"),
    *(MatchedCase(*at[:2], layout=at[2], on_device=True, channel_temperature=tau_c, reduction=r)
      for at in MATCHED_LAYOUTS[1:4] for tau_c, r in ((0.7, 1), (None, 0))),
]  # fmt: skip

# For ThreadSanitizer, whose threads are slow: every kernel and every barrier once.
SMALL_TNKD = [
    TnkdCase(PLANES, (2, 5, 4, 8), weighted=True),
    TnkdCase(PLANES, (2, 5, 4, 8), torch.float16, weighted=True, why="the largest class weight"),
    TnkdCase(PLANES, (1, 6, 50, 48), torch.bfloat16, why="several tiles a block"),
    TnkdCase(PLANES, (1, 19, 10, 40), torch.bfloat16, why="several tiles a block"),
    TnkdCase(PLANES_SPLIT, (1, 60, 10, 30), torch.bfloat16, why="several tiles a block"),
    TnkdCase(TILES, (1, 19, 5, 7), layout="channels_last", label=None, logits=ties),
    TnkdCase(TILES, (1, 16, 20, 40), torch.float16, layout="channels_last", why="several tiles a block"),
    TnkdCase(TILES_SPLIT, (1, 40, 10, 20), layout="channels_last", temperature=3.0, why="several tiles a block"),
    TnkdCase(TILES, (1, 6, 3, 7), reduction=0),
    TnkdCase(PLANES, (1, 19, 5, 7), on_device="values ignore_index"),
]
SMALL_UPSAMPLED = [
    UpsampledCase("upsampled_6_1_64", (17, 5, 2, 9), torch.float16, size=(7, 36), weighted=True, why="two tiles"),
    UpsampledCase("upsampled_19_2_32", (9, 21, 2, 9), torch.bfloat16, teacher_size=(5, 36), label=None, why="the same"),
    UpsampledCase("upsampled_19_4_8", (1, 40, 2, 3), size=(7, 9), shared_bytes=40_000, temperature=3.0),
]  # fmt: skip
SMALL_CAFD = [
    CafdCase("rows rows held", (2, 5, 4, 8), (2, 7, 4, 8)),
    CafdCase("rows held", (1, 3, 32, 96), why="several warps a row"),
    CafdCase("columns columns twice", (1, 24, 3, 5), (1, 40, 3, 5), torch.bfloat16, layout="channels_last"),
    CafdCase("any any held", (1, 3, 7, 5), (1, 3, 7, 5)),
    CafdCase("rows rows held", (2, 5, 4, 8), (2, 7, 4, 8), on_device=True),
]
SMALL_MATCHED = [
    MatchedCase("rows rows", (1, 2, 40, 96), torch.bfloat16, masked=0.2),
    MatchedCase("columns columns", (2, 19, 8, 9), layout="channels_last", on_device=True),
]
