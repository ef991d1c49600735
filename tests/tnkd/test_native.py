"""The native CPU kernel of TNKD + CE against the reference, called as the op."""

import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsct_kernels import backends
from dsct_kernels.dtypes import acc_dtype
from dsct_kernels.tnkd import reference
from dsct_kernels.tnkd.objective import MEAN, NONE, SUM, Objective

from ..helpers import LAYOUTS, check_nothing_is_read_past_the_end, strided_copy
from ..oracle import assert_as_good_as_reference, learnt, relative_error

pytestmark = pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))

INF, NAN = float("inf"), float("nan")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LABELS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
DEFAULTS: dict[str, Any] = dict(
    ce_weight=0.7,
    tckd_weight=1.0,
    nckd_weight=2.0,
    temperature=2.0,
    ignore_index=255,
    reduction=MEAN,
    class_weight=None,
)


def packed(args: dict[str, Any]) -> tuple[Any, ...]:
    """The op's arguments behind the target, where there is one."""
    return Objective(**args).packed(torch.empty(0), torch.device("cpu"))


def native(student: Tensor, teacher: Tensor, target: Tensor | None, needs_grad: bool = True, **options: Any):
    """(loss, parts, gradient in the accumulation dtype) of the op."""
    args = {**DEFAULTS, **options}
    op = torch.ops.dsct_kernels.tnkd
    loss, parts, grad, scale = op(student, teacher, target, *packed(args), needs_grad)
    return loss, parts, grad.to(scale.dtype) * scale


def eager(student: Tensor, teacher: Tensor, target: Tensor | None, **options: Any):
    """The same of the reference."""
    args = {**DEFAULTS, **options}
    return learnt(lambda s: reference.tnkd(s, teacher, target, Objective(**args)), student)


def weighted_as(options: dict[str, Any], *networks: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options with their class weights as a call of these networks takes them, and in float64."""
    weight = options.pop("class_weight", None)
    return tuple(
        {**options, "class_weight": None if weight is None else weight.to(dtype)}
        for dtype in (acc_dtype(*networks), torch.float64)
    )


def compare(
    student: Tensor, teacher: Tensor, target: Tensor | None, layout: str = "contiguous", **options: Any
) -> None:
    """The error rule, on loss, parts and gradient."""
    acc, (own, double) = acc_dtype(student, teacher), weighted_as(options, student, teacher)
    got = native(strided_copy(student, layout), strided_copy(teacher, layout), target, **own)
    same = eager(student, teacher, target, **own)
    truth = eager(student.double(), teacher.double(), target, **double)
    # A divergence is a difference of logs of order 1. Over a handful of pixels the reference may hit it by luck, so a
    # few roundings of such a log, times tau^2, are allowed to each pixel.
    args = {**DEFAULTS, **options}
    pixels = student[:, 0].numel()
    per_pixel = 3 * torch.finfo(acc).eps * args["temperature"] ** 2
    for name, *values in zip(("loss", "parts", "grad"), got, same, truth):
        count = {NONE: pixels if name == "parts" else pixels**0.5, MEAN: 1, SUM: pixels}[args["reduction"]]
        what = f"{name} of {tuple(student.shape)} {student.dtype} {layout} {options}"
        assert_as_good_as_reference(*values, what, floor=0 if name == "grad" else per_pixel * count)


def logits(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 3.0, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def labels(*shape: int, classes: int, ignored: float = 0.2, ignore_index: int | None = 255, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, shape, generator=generator)
    if ignore_index is not None:
        y[torch.rand(shape, generator=generator) < ignored] = ignore_index
    return y


# (2, 6, ..) and (2, 19, ..): chunks of 8 and 16 + 4 classes; 150 and 1000: several tiles, several partial sums;
# (70, 21) and (128, 100): no spatial dimensions; (3, 5, 7): rows shorter than a vector; 4 spatial dimensions merge.
SHAPES = [
    (2, 6, 16, 24), (2, 19, 13, 11), (1, 150, 8, 9), (1, 1000, 3, 7), (70, 21), (128, 100), (1, 2, 333), (3, 5, 7),
    (2, 3, 2, 3, 4), (1, 33, 1, 1),
]  # fmt: skip


ALONE: dict[str, Any] = dict(tckd_weight=0.0, nckd_weight=0.0, temperature=3.0)  # cross-entropy alone


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reduction", (NONE, MEAN, SUM))
def test_cross_entropy_alone(layout: str, dtype: torch.dtype, reduction: int) -> None:
    for shape in (2, 6, 5, 24), (1, 48, 3, 21), (2, 150, 40), (33, 7):
        student, target = logits(*shape, dtype=dtype), labels(shape[0], *shape[2:], classes=shape[1])
        acc = acc_dtype(student)
        weight = torch.linspace(0, 2, shape[1], dtype=acc)
        own = strided_copy(student, layout)
        got = native(own, own, target, class_weight=weight, reduction=reduction, **ALONE)
        other = native(own, strided_copy(-student, layout), target, class_weight=weight, reduction=reduction, **ALONE)
        assert all(torch.equal(a, b) for a, b in zip(got, other)) and (got[1][1:] == 0).all()
        results = []
        for leaf in (student.to(acc).requires_grad_(), student.double().requires_grad_()):
            how = ("none", "mean", "sum")[reduction]
            pixels = 0.7 * F.cross_entropy(leaf, target, weight.to(leaf), ignore_index=255, reduction=how)
            results.append((pixels.detach(), torch.autograd.grad(pixels.sum(), leaf)[0].to(dtype).to(leaf)))
        for name, a, b, c in zip(("loss", "grad"), (got[0], got[2]), *results):
            extra = 1e-6 if name == "loss" else 1e-6 + torch.finfo(dtype).eps
            assert_as_good_as_reference(a, b, c, f"{name} of {shape} {dtype} {layout}", extra=extra)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("garbage", (NAN, INF))
@pytest.mark.parametrize("which", (0, 1))
def test_cross_entropy_alone_hides_no_nan_of_either_network(layout: str, garbage: float, which: int) -> None:
    for classes in (2, 6, 19, 48, 150):
        both = [logits(2, classes, 40, seed=seed) for seed in (0, 2)]
        target = labels(2, 40, classes=classes, ignore_index=None)
        weight = torch.zeros(classes)  # of a class that weighs nothing, too
        for at in (0, classes - 1):
            dirty = [x.clone() for x in both]
            dirty[which][1, at, 3] = dirty[which][0, at, 35] = garbage
            target[0, 35] = 255
            got = native(
                *(strided_copy(x, layout) for x in dirty), target, class_weight=weight, reduction=NONE, **ALONE
            )
            assert got[0].isnan().nonzero().tolist() == [[1, 3]] and (got[2][0] == 0).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_dtypes_layouts(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    student, teacher = logits(*shape, dtype=dtype), logits(*shape, dtype=dtype, seed=2)
    ignore = 255 if shape[1] <= 255 else -1
    target = labels(shape[0], *shape[2:], classes=shape[1], ignore_index=ignore)
    compare(student, teacher, target, layout, ignore_index=ignore)
    compare(student, teacher, None, layout, reduction=NONE)


@pytest.mark.parametrize("temperature", (0.5, 1.0, 2.0, 5.0))
@pytest.mark.parametrize("reduction", (NONE, MEAN, SUM))
@pytest.mark.parametrize("ce_weight", (None, 0.0, 0.7))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_temperature_reduction_ce(temperature: float, reduction: int, ce_weight: float | None, layout: str) -> None:
    # Cross-entropy shares TNKD's exponentials at 1, squares them at 2 and takes its own elsewhere.
    student, teacher, target = logits(2, 6, 9, 16), logits(2, 6, 9, 16, seed=2), labels(2, 9, 16, classes=6)
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 3.0, 1.0])
    options = dict(temperature=temperature, reduction=reduction, ce_weight=ce_weight)
    compare(student, teacher, target, layout, **options)
    compare(student, teacher, target, layout, class_weight=weight, **options)
    compare(student, teacher, None, layout, class_weight=weight, **options)


@pytest.mark.parametrize("student_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("teacher_dtype", FLOATS, ids=str)
def test_mixed_dtypes_and_layouts(student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    student, teacher = logits(2, 7, 8, 8, dtype=student_dtype), logits(2, 7, 8, 8, dtype=teacher_dtype, seed=2)
    target = labels(2, 8, 8, classes=7)
    truth = native(student, teacher, target)
    for layout_s in LAYOUTS:
        for layout_t in LAYOUTS:
            got = native(strided_copy(student, layout_s), strided_copy(teacher, layout_t), target)
            for a, b in zip(got, truth):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    compare(student, teacher, target)


@pytest.mark.parametrize("dtype", LABELS, ids=str)
@pytest.mark.parametrize("ignore_index", (0, -1, -100, 255, None))
@pytest.mark.parametrize("strided", (False, True))
def test_label_widths_and_ignore_patterns(dtype: torch.dtype, ignore_index: int | None, strided: bool) -> None:
    student, teacher = logits(2, 6, 5, 33), logits(2, 6, 5, 33, seed=2)
    held = ignore_index is not None and torch.iinfo(dtype).min <= ignore_index <= torch.iinfo(dtype).max
    target = labels(2, 5, 33, classes=6, ignore_index=ignore_index if held else None)
    want = native(student, teacher, target, ignore_index=ignore_index)
    narrow = target.to(dtype)
    if strided:
        narrow = strided_copy(narrow, "sliced")
    got = native(student, teacher, narrow, ignore_index=ignore_index)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    compare(student, teacher, narrow, ignore_index=ignore_index)


def test_gradient_has_the_students_dtype_and_strides() -> None:
    op, args = torch.ops.dsct_kernels.tnkd, packed(DEFAULTS)
    for dtype in FLOATS:
        for layout in ("contiguous", "channels_last", "transposed"):
            student = strided_copy(logits(3, 6, 4, 5, dtype=dtype), layout)
            grad = op(student, student, None, *args, True)[2]
            assert grad.dtype == dtype and grad.stride() == student.stride()
    assert op(student, student, None, *args, False)[2].shape == (0,)


def test_without_gradient_the_loss_is_the_same() -> None:
    student, teacher, target = logits(2, 6, 9, 16), logits(2, 6, 9, 16, seed=2), labels(2, 9, 16, classes=6)
    for reduction in (NONE, MEAN, SUM):
        for got, want in zip(
            native(student, teacher, target, needs_grad=False, reduction=reduction)[:2],
            native(student, teacher, target, reduction=reduction)[:2],
        ):
            assert torch.equal(got, want)


def test_float16_keeps_its_digits_whatever_the_count() -> None:
    student, teacher = logits(4, 6, 64, 64, dtype=torch.float16), logits(4, 6, 64, 64, seed=2)
    target = labels(4, 64, 64, classes=6)
    _, _, grad, scale = torch.ops.dsct_kernels.tnkd(student, teacher, target, *packed(DEFAULTS), True)
    assert math.log2(scale.item()).is_integer()  # a power of two: rounds once
    assert 2**10 < grad.abs().max() < 2**15  # divided by the count it would be subnormal
    weight = torch.arange(1.0, 7.0)
    compare(student, teacher, target, class_weight=weight)


@pytest.mark.parametrize("reduction", (NONE, MEAN, SUM))
@pytest.mark.parametrize("scale,temperature", ((1e-4, 0.01), (0.1, 20.0), (1e4, 1.0)))
def test_small_float16_gradients_survive_until_they_are_scaled(
    reduction: int, scale: float, temperature: float
) -> None:
    """Below 6e-5 float16 runs out of digits, and a GradScaler multiplies only after the gradient was stored."""
    student, teacher = (logits(2, 19, 5, 7, dtype=torch.float16, scale=scale, seed=seed) for seed in (0, 2))
    target = labels(2, 5, 7, classes=19)
    weight = torch.rand(19, generator=torch.Generator().manual_seed(3)) * 40
    for options in (
        dict(ce_weight=None, tckd_weight=0.5, nckd_weight=0.0),
        dict(ce_weight=None),
        dict(class_weight=weight, ce_weight=1e-3),
        dict(class_weight=weight, ce_weight=1e4),
    ):
        options = dict(options, reduction=reduction, temperature=temperature)
        *_, got = native(student, teacher, target, **options)
        assert got.isfinite().all()
        doubles = student.double(), teacher.double(), target
        weight_64 = None if options.get("class_weight") is None else weight.double()
        *_, truth = eager(*doubles, **dict(options, class_weight=weight_64))
        assert relative_error(got, truth) < 2**-11  # one rounding


# --- the edge cases of the specification ---


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "magnitude"),
    [(torch.float32, 1e4), (torch.bfloat16, 1e4), (torch.float16, 6e4), (torch.float64, 1e6)],
    ids=str,
)
@pytest.mark.parametrize("temperature", (0.01, 1.0, 2.0, 7.0))
def test_extreme_magnitudes(layout: str, dtype: torch.dtype, magnitude: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (((torch.rand(2, 6, 8, 8, generator=generator) * 2 - 1) * magnitude).to(dtype) for _ in range(2))
    target = labels(2, 8, 8, classes=6)
    compare(student, teacher, target, layout, temperature=temperature)
    loss, _, grad = native(student, teacher, target, temperature=temperature)
    assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("margin", (18.0, 110.0, 1000.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_a_dominating_target_does_not_hide_the_others(margin: float, dtype: torch.dtype) -> None:
    student, teacher = logits(2, 6, 8, 8), logits(2, 6, 8, 8, seed=2)
    target = labels(2, 8, 8, classes=6, ignore_index=None)
    bump = torch.nn.functional.one_hot(target, 6).movedim(-1, 1) * margin
    student, teacher = (student + bump).to(dtype), (teacher + bump).to(dtype)
    compare(student, teacher, target)
    assert native(student, teacher, target)[1][2] > 0.1  # NCKD


@pytest.mark.parametrize("reduction", (NONE, MEAN, SUM))
@pytest.mark.parametrize("shape", [(2, 6, 8, 8), (0, 6, 8, 8), (2, 6, 0, 8), (0, 6)], ids=str)
def test_nothing_valid(shape: tuple[int, ...], reduction: int) -> None:
    for layout in ("contiguous", "channels_last"):
        student = strided_copy(torch.full(shape, NAN), layout)
        target = torch.full((shape[0], *shape[2:]), 255)
        loss, parts, grad = native(student, student, target, reduction=reduction)
        assert (loss == 0).all() and (parts == 0).all() and (grad == 0).all() and grad.shape == shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("garbage", (NAN, INF, -INF))
@pytest.mark.parametrize("temperature", (1.0, 2.0, 3.0))
def test_whatever_stands_at_ignored_pixels(layout: str, garbage: float, temperature: float) -> None:
    student, teacher = logits(2, 6, 9, 40), logits(2, 6, 9, 40, seed=2)
    target = labels(2, 9, 40, classes=6)
    target[0, 2:6] = 255  # whole blocks too
    for reduction in (NONE, MEAN):
        want = native(student, teacher, target, reduction=reduction, temperature=temperature)
        dirty = [torch.where((target == 255).unsqueeze(1), garbage, x) for x in (student, teacher)]
        got = native(*(strided_copy(x, layout) for x in dirty), target, reduction=reduction, temperature=temperature)
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
        assert (got[2].movedim(1, -1)[target == 255] == 0).all()


@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "sliced"))
@pytest.mark.parametrize("which", (0, 1))
@pytest.mark.parametrize("at_target", (False, True))
def test_nan_at_a_valid_pixel_is_never_hidden(layout: str, which: int, at_target: bool) -> None:
    for classes in (2, 6, 20):
        both = [logits(2, classes, 3, 20), logits(2, classes, 3, 20, seed=2)]
        target = labels(2, 3, 20, classes=classes, ignore_index=None)
        label = int(target[1, 2, 19])
        both[which][1, label if at_target else (label + 1) % classes, 2, 19] = NAN
        student, teacher = (strided_copy(x, layout) for x in both)
        for temperature in (1.0, 2.0, 3.0):
            assert native(student, teacher, target, temperature=temperature)[0].isnan()
            pixel = native(student, teacher, target, temperature=temperature, reduction=NONE)[0].isnan()
            assert pixel[1, 2, 19] and pixel.sum() == 1


@pytest.mark.parametrize("temperature", (1.0, 2.0, 3.0))
@pytest.mark.parametrize("classes", (3, 6, 20))
def test_a_class_absent_in_both(classes: int, temperature: float) -> None:
    student, teacher = logits(2, classes, 3, 20), logits(2, classes, 3, 20, seed=2)
    target = labels(2, 3, 20, classes=classes - 1)
    absent = [torch.cat([x[:, :-1], torch.full_like(x[:, :1], -INF)], 1) for x in (student, teacher)]
    got = native(*absent, target, temperature=temperature)
    want = native(student[:, :-1], teacher[:, :-1], target, temperature=temperature)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])
    torch.testing.assert_close(got[2][:, :-1], want[2])
    assert (got[2][:, -1] == 0).all()


def test_absent_target_and_absent_others() -> None:
    student, teacher = logits(1, 4, 3), logits(1, 4, 3, seed=2)
    target = torch.tensor([[2, 2, 2]])
    for x in (student, teacher):
        x[0, 2, 0] = -INF  # the target is absent: nothing to say about it, the others compare as ever
        x[0, [0, 1, 3], 1] = -INF  # nothing but the target is there
    loss, parts, grad = native(student, teacher, target, ce_weight=None, reduction=NONE)
    truth = eager(student.double(), teacher.double(), target, ce_weight=None, reduction=NONE)[0]
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    assert loss.isfinite().all() and loss[0, 1] == 0 and grad.isfinite().all() and (grad[0, :, 1] == 0).all()
    assert parts.isfinite().all()


def test_student_without_a_class_the_teacher_has() -> None:
    student, teacher = logits(1, 5, 40), logits(1, 5, 40, seed=2)
    target = torch.ones(1, 40, dtype=torch.long)
    student[0, 3, 7] = -INF  # another class
    student[0, 1, 9] = -INF  # the target
    student[0, [0, 2, 3, 4], 11] = -INF  # every class but the target
    loss, _, grad = native(student, teacher, target, reduction=NONE)
    assert loss[0].isinf().nonzero().flatten().tolist() == [7, 9, 11] and (loss[0, [7, 9, 11]] > 0).all()
    assert grad.isfinite().all()
    assert native(student, teacher, target)[0] == INF
    # A part that is infinite but has weight 0 takes no part.
    assert native(student, teacher, target, nckd_weight=0.0, tckd_weight=0.0, ce_weight=0.0)[0] == 0
    # The closed form of the specification.
    z_s, z_t = student.double()[0, :, 7] / 2, teacher.double()[0, :, 7] / 2
    others = torch.tensor([0, 2, 3, 4])
    b_s, b_t = (torch.sigmoid(z[1] - z[others].logsumexp(0)) for z in (z_s, z_t))
    q_s, q_t = z_s[others].softmax(0), z_t[others].softmax(0)
    want = 2 * ((2 - (b_s - b_t)) * q_s - 2 * q_t)
    got = native(student, teacher, target, reduction=NONE, ce_weight=None)[2][0, others, 7]
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_two_classes_have_no_nckd() -> None:
    for scale in (1.0, 1e4):
        student, teacher = logits(2, 2, 9, 9, scale=scale), logits(2, 2, 9, 9, scale=scale, seed=2)
        target = labels(2, 9, 9, classes=2)
        assert native(student, teacher, target)[1][2] == 0
        compare(student, teacher, target)


def test_equal_networks_have_nothing_to_learn() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for classes in (6, 150):
            x, target = logits(2, classes, 9, 9, dtype=dtype), labels(2, 9, 9, classes=classes)
            loss, _, grad = native(x, x, target, ce_weight=None)
            assert loss.abs() < 1e-6 and grad.abs().max() < 1e-8


@pytest.mark.parametrize("layout", LAYOUTS)
def test_argmax_takes_the_first_of_equals(layout: str) -> None:
    teacher = torch.zeros(2, 20, 3, 17)
    teacher[:, 5] = teacher[:, 11] = 1.0
    teacher[0, 3, 1] = teacher[0, 18, 1] = 2.0
    student = logits(2, 20, 3, 17)
    want = native(student, teacher, teacher.argmax(1), ignore_index=None)
    got = native(strided_copy(student, layout), strided_copy(teacher, layout), None, ignore_index=None)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    # ignore_index is about given labels: a teacher that says class 5 is not told to be quiet.
    again = native(student, teacher, None, ignore_index=5)
    assert torch.equal(again[0], native(student, teacher, None, ignore_index=None)[0])


@pytest.mark.parametrize("dtype", LABELS, ids=str)
@pytest.mark.parametrize("label", (6, 100, -1, -100))
def test_bad_label_is_named_with_its_position(dtype: torch.dtype, label: int) -> None:
    target = torch.zeros(2, 5, 40, dtype=torch.int64)
    target[1, 3, 33] = target[1, 4, 0] = label
    target = target.to(dtype)
    x = logits(2, 6, 5, 40)
    shown = int(target[1, 3, 33])
    for layout in ("contiguous", "sliced", "transposed"):
        with pytest.raises(ValueError) as error:
            native(x, x, strided_copy(target, layout), ignore_index=254)
        message = f"target: label {shown} at position (1, 3, 33) is outside [0, 6) and is not ignore_index=254"
        assert str(error.value) == message
    with pytest.raises(ValueError, match="is not ignore_index=None"):
        native(x, x, target, ignore_index=None)


def test_labels_wider_than_float_are_checked_exactly() -> None:
    x = logits(1, 6, 3)
    for label in (2**32 + 1, 2**53 + 1, -(2**63)):
        with pytest.raises(ValueError, match=f"label {label} at position"):
            native(x, x, torch.tensor([[0, label, 1]]))
    compare(x, logits(1, 6, 3, seed=2), torch.tensor([[0, 2**62, 1]]), ignore_index=2**62)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(teacher=logits(2, 5, 3)), "teacher_logits: expected the shape of student_logits"),
        (dict(target=torch.zeros(2, 4, dtype=torch.long)), "target: expected shape"),
        (dict(target=torch.zeros(2, 3)), "target: expected dtype"),
        (dict(student=logits(2, 6, 3).to(torch.int32)), "student_logits: expected dtype"),
        (dict(class_weight=torch.ones(5)), "class_weight: expected"),
        (dict(class_weight=torch.ones(6, dtype=torch.float64)), "class_weight: expected"),
        (dict(temperature=0.0), "temperature: expected"),
        (dict(temperature=NAN), "temperature: expected"),
        (dict(nckd_weight=-1.0), "beta: expected a finite number >= 0, got -1"),
        (dict(ce_weight=INF), "ce_weight: expected a finite number >= 0, got inf"),
        (dict(reduction=3), "reduction: expected"),
    ],
    ids=str,
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    good = dict(student=logits(2, 6, 3), teacher=logits(2, 6, 3), target=torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=message):
        native(**{**good, **change})


def test_numbers_that_are_no_such_tensors_are_named() -> None:
    student, target = logits(2, 6, 3), torch.zeros(2, 3, dtype=torch.long)
    op, (weight, values, index, *rest) = torch.ops.dsct_kernels.tnkd, packed(DEFAULTS)
    for wrong in (values[:2], values.float(), values[:1].expand(4)):
        with pytest.raises(ValueError, match=r"values: expected a contiguous \(4,\) tensor of float64 on cpu"):
            op(student, student, target, weight, wrong, index, *rest, True)
    for wrong in (index.view(1), index.int()):
        with pytest.raises(ValueError, match=r"ignore_index: expected a contiguous \(\) tensor of int64 on cpu"):
            op(student, student, target, weight, values, wrong, *rest, True)


# --- how it runs ---


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_same_bits_every_time_and_for_any_number_of_threads(layout: str) -> None:
    student, teacher = (strided_copy(logits(2, 19, 100, 96, seed=s), layout) for s in (0, 2))
    target = labels(2, 100, 96, classes=19)
    weight = torch.rand(19)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 2, 3):
            torch.set_num_threads(n)
            results.append(native(student, teacher, target, class_weight=weight))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_large_gradients_take_the_streaming_path() -> None:
    # 8 MiB and more is written past the caches, in either layout; the numbers must not care.
    for classes, size, dtype in ((6, 608, torch.float32), (17, 512, torch.bfloat16), (40, 336, torch.float64)):
        student, teacher = (
            logits(1, classes, size, size, dtype=dtype),
            logits(1, classes, size, size, seed=2, dtype=dtype),
        )
        target = labels(1, size, size, classes=classes)
        whole = native(student, teacher, target, reduction=SUM)
        half = size // 2
        parts = [native(student[:, :, rows], teacher[:, :, rows], target[:, rows], reduction=SUM)
                 for rows in (slice(0, half), slice(half, size))]  # fmt: skip
        torch.testing.assert_close(whole[2], torch.cat([p[2] for p in parts], 2))
        last = native(*(strided_copy(x, "channels_last") for x in (student, teacher)), target, reduction=SUM)
        torch.testing.assert_close(last[2], whole[2])
        torch.testing.assert_close(last[0], whole[0])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("classes", (48, 56, 150, 257))
@pytest.mark.parametrize("temperature", (1.0, 2.0, 3.0))
def test_many_classes_channels_last(classes: int, dtype: torch.dtype, temperature: float) -> None:
    # A lane is a class there. The last vector of a pixel, the last pixel of the tensor, ignored pixels between valid
    # ones, a target that dominates, classes that are absent, classes that are a slice of more.
    shape = (2, classes, 5, 23)
    student, teacher = logits(*shape, dtype=dtype), logits(*shape, dtype=dtype, seed=2)
    target = labels(2, 5, 23, classes=classes, ignored=0.4, ignore_index=-1)
    target[1, 4, 20:], target[0, 3, 3] = classes - 1, 2
    for x in (student, teacher):
        x[:, 0, 1], x[:, 3, 2] = 1000.0, -INF
        x[0, :, 3, 3] = -INF
        x[0, 2, 3, 3] = 1.0
        x.movedim(1, -1)[target < 0] = NAN
    target[target == 3] = 4
    weight = torch.linspace(0.1, 2, classes)
    for layout in ("channels_last", "sliced"):
        for options in (dict(ce_weight=None), dict(class_weight=weight), dict(reduction=NONE)):
            compare(student, teacher, target, layout, ignore_index=-1, temperature=temperature, **options)
    wide = [torch.cat([x, torch.full_like(x, NAN)], 1).contiguous(memory_format=torch.channels_last)
            for x in (student, teacher)]  # fmt: skip
    options = dict(ignore_index=-1, temperature=temperature)
    got = native(*(x[:, :classes] for x in wide), target, **options)
    same = native(*(strided_copy(x, "channels_last") for x in (student, teacher)), target, **options)
    for a, b in zip(got, same):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect through ctypes")
@pytest.mark.parametrize("classes", (6, 19, 33, 56, 150))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nothing_is_read_past_the_end(classes: int, layout: str, dtype: torch.dtype) -> None:
    networks = (strided_copy(logits(1, classes, 5, 23, dtype=dtype, seed=seed), layout) for seed in (0, 2))
    target = labels(1, 5, 23, classes=classes)
    check_nothing_is_read_past_the_end(lambda s, t: native(s, t, target), *networks)


def test_expanded_inputs() -> None:
    student, teacher = logits(1, 6, 1, 40), logits(1, 6, 1, 1, seed=2)
    target = labels(2, 3, 40, classes=6)
    wide_s, wide_t = student.expand(2, 6, 3, 40), teacher.expand(2, 6, 3, 40)
    got, want = native(wide_s, wide_t, target), native(wide_s.contiguous(), wide_t.contiguous(), target)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)
    one_label = torch.tensor(3).expand(2, 3, 40)
    compare(wide_s, wide_t, one_label)


def test_offsets_beyond_2_to_the_31() -> None:
    # A view of 40 pixels over a little more than 2^31 elements of memory, hardly any of it touched, hence resident.
    big = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    student = big.as_strided((1, 3, 40), (1, 2**30, 1))
    source = logits(1, 3, 40, dtype=torch.bfloat16)
    student.copy_(source)
    teacher = logits(1, 3, 40, dtype=torch.bfloat16, seed=2)
    got, want = native(student, teacher, None, ce_weight=None), native(source, teacher, None, ce_weight=None)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_inputs_are_never_written() -> None:
    for layout in LAYOUTS:
        student, teacher = (strided_copy(logits(2, 6, 9, 16, seed=s), layout) for s in (0, 2))
        target = labels(2, 9, 16, classes=6)
        before = [x.clone() for x in (student, teacher, target)]
        native(student, teacher, target)
        assert all(torch.equal(a, b) for a, b in zip((student, teacher, target), before))


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    classes = draw(st.one_of(st.integers(2, 40), st.sampled_from([64, 65, 150, 300])))
    spatial = draw(st.lists(st.integers(1, 9), max_size=3))
    shape = (draw(st.integers(1, 5)), classes, *spatial)
    dtype = draw(st.sampled_from(FLOATS))
    scale = 10.0 ** draw(st.integers(-2, 4))
    seed = draw(st.integers(0, 2**20))
    ignore_index = draw(st.sampled_from([0, -1, -100, 255 if classes <= 255 else -7, None]))
    given_target = draw(st.booleans())
    target = None
    if given_target:
        target = labels(shape[0], *spatial, classes=classes, ignore_index=ignore_index, seed=seed,
                        ignored=draw(st.sampled_from([0.0, 0.3, 1.0])))  # fmt: skip
    student, teacher = (
        logits(*shape, dtype=dtype, scale=scale, seed=seed),
        logits(*shape, dtype=dtype, scale=scale, seed=seed + 1),
    )
    return dict(
        student=student,
        teacher=teacher,
        target=target,
        layout=draw(st.sampled_from(LAYOUTS)),
        ignore_index=ignore_index,
        temperature=draw(st.sampled_from([0.01, 0.3, 1.0, 2.0, 4.0, 10.0])),
        reduction=draw(st.integers(0, 2)),
        ce_weight=draw(st.sampled_from([None, 0.0, 0.7])),
        class_weight=draw(st.sampled_from([None, torch.linspace(0, 2, classes)])),
    )


@settings(max_examples=60, deadline=None)
@given(problems())
def test_any_problem(problem: dict[str, Any]) -> None:
    compare(**problem)


@pytest.mark.parametrize("reduction", [NONE, MEAN])
@pytest.mark.parametrize("classes", [33, 300])
def test_networks_that_nearly_agree_over_many_classes(classes: int, reduction: int) -> None:
    """The divergence is then far smaller than log K: it must not be left of a difference of two such logs, nor drown
    in the rounding of long sums."""
    for seed in range(100):
        student, teacher = (logits(2, classes, 3, scale=0.01, seed=2 * seed + i) for i in (0, 1))
        compare(student, teacher, None, temperature=10.0, ce_weight=None, reduction=reduction)


def test_parts_add_up_to_the_loss() -> None:
    student, teacher, target = logits(2, 6, 9, 16), logits(2, 6, 9, 16, seed=2), labels(2, 9, 16, classes=6)
    for reduction in (MEAN, SUM):
        loss, parts, _ = native(student, teacher, target, reduction=reduction)
        want = 0.7 * parts[0] + 1.0 * parts[1] + 2.0 * parts[2]
        assert math.isclose(loss, want, rel_tol=1e-6)
    per_pixel = native(student, teacher, target, reduction=NONE)
    torch.testing.assert_close(per_pixel[0].sum(), loss)
    torch.testing.assert_close(per_pixel[1], parts)
