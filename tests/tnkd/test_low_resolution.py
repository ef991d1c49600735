"""The kernel that upsamples on the way, against the reference on logits upsampled in float64 beforehand."""

import math
import sys
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dsct_kernels import backends, dsct_loss, tnkd_loss
from dsct_kernels.dtypes import acc_dtype
from dsct_kernels.tnkd import native, reference, upsample
from dsct_kernels.tnkd.objective import MEAN, NONE, SUM, Objective

from ..helpers import LAYOUTS, check_nothing_is_read_past_the_end, pairs, strided_copy
from ..oracle import assert_as_good_as_reference, learnt, relative_error
from .test_native import DEFAULTS, FLOATS, LABELS, labels, logits, packed, weighted_as

pytestmark = pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))

INF, NAN = float("inf"), float("nan")
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def upstream(loss: Tensor) -> Tensor:
    """What comes in for a loss, or for each pixel of a map: there of either sign, and here and there 0."""
    if loss.dim() == 0:
        return torch.ones_like(loss)
    values = torch.randn(loss.shape, generator=torch.Generator().manual_seed(7)).clamp(min=-1)
    return values.where(values.abs() > 0.1, 0).to(loss)


def low(student: Tensor, teacher: Tensor, target: Tensor | None, align_corners: bool = False, **options: Any):
    """(loss, parts, gradient in the accumulation dtype) of the op; for a map, of the op that takes its gradient."""
    args = packed({**DEFAULTS, **options})
    op = torch.ops.dsct_kernels.tnkd_upsampled
    loss, parts, grad, scale = op(student, teacher, target, *args, align_corners, True)
    if args[-1] == NONE:
        assert grad.shape == (0,)
        grad, scale = of_map(student, teacher, target, upstream(loss), align_corners, **options), torch.ones_like(scale)
    return loss, parts, grad.to(scale.dtype) * scale


def of_map(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    grad_output: Tensor,
    align_corners: bool = False,
    **options: Any,
) -> Tensor:
    *args, _ = packed({**DEFAULTS, **options})
    op = torch.ops.dsct_kernels.tnkd_upsampled_backward
    return op(student, teacher, target, *args, align_corners, grad_output)


def walked(x: Tensor, size: list[int], align_corners: bool) -> Tensor:
    """Upsampled such that a tap of weight 0 takes no part."""
    for dim in (-2, -1):
        x = x if x.shape[dim] == size[dim] else upsample.lerp(x, dim, size[dim], align_corners)
    return x


def eager(student: Tensor, teacher: Tensor, target: Tensor | None, align_corners: bool, up: Any, **options: Any):
    args = {**DEFAULTS, **options}
    size = [max(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:])] if target is None else target.shape[1:]

    def full_size(student: Tensor) -> tuple[Tensor, Tensor]:
        full = [x if list(x.shape[2:]) == list(size) else up(x, list(size), align_corners) for x in (student, teacher)]
        return reference.tnkd(*full, target, Objective(**args))

    return learnt(full_size, student, upstream)


def interpolated(x: Tensor, size: list[int], align_corners: bool) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return F.interpolate(wide, size=size, mode="bilinear", align_corners=align_corners)


def compare(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    align_corners: bool = False,
    layout: str = "contiguous",
    up: Any = interpolated,
    run: Any = low,
    **options: Any,
) -> None:
    """The error rule, on loss, parts and gradient. run: the op, as `low` calls it."""
    acc, (own, double) = acc_dtype(student, teacher), weighted_as(options, student, teacher)
    got = run(strided_copy(student, layout), strided_copy(teacher, layout), target, align_corners, **own)
    same = eager(student, teacher, target, align_corners, up, **own)
    truth = eager(student.double(), teacher.double(), target, align_corners, up, **double)
    args = {**DEFAULTS, **options}
    pixels = truth[0].numel() if target is None else target.numel()
    per_pixel = 3 * torch.finfo(acc).eps * args["temperature"] ** 2  # as in test_native.compare
    for name, *values in zip(("loss", "parts", "grad"), got, same, truth):
        count = {NONE: pixels if name == "parts" else pixels**0.5, MEAN: 1, SUM: pixels}[args["reduction"]]
        what = f"{name} of {tuple(student.shape)}, {tuple(teacher.shape)} {student.dtype} {layout} {options}"
        assert_as_good_as_reference(*values, what, floor=0 if name == "grad" else per_pixel * count)


# classes, student, teacher, labels: whole ratios; one network at full size; ratios that are none, and differ; one row
# or cell for everything; logits hardly smaller, with rows shorter than a vector; wider than a tile, many strips, which
# here and there begin within a row of logits.
SIZES = [
    (6, (8, 8), (4, 4), (32, 32)), (19, (8, 9), (32, 36), (32, 36)), (19, (32, 36), (8, 9), (32, 36)),
    (5, (7, 5), (3, 11), (20, 33)), (4, (1, 1), (3, 1), (40, 70)), (3, (4, 6), (5, 7), (5, 7)),
    (2, (33, 9), (9, 33), (40, 45)), (150, (5, 20), (9, 37), (70, 140)), (150, (1, 1), (2, 2), (50, 9)),
    (33, (61, 70), (64, 3), (64, 75)), (300, (2, 3), (3, 2), (9, 5)),
]  # fmt: skip


def problem(
    sizes: tuple[Any, ...], dtype: torch.dtype = torch.float32, batch: int = 2, seed: int = 0, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    classes, small_s, small_t, size = sizes
    student = logits(batch, classes, *small_s, dtype=dtype, seed=seed)
    teacher = logits(batch, classes, *small_t, dtype=dtype, seed=seed + 2)
    return student, teacher, labels(batch, *size, classes=classes, **options)


@pytest.mark.parametrize(
    ("sizes", "dtype", "layout", "align_corners"), pairs(SIZES, FLOATS, LAYOUTS, (False, True)), ids=str
)
def test_sizes_dtypes_layouts(sizes: tuple[Any, ...], dtype: torch.dtype, layout: str, align_corners: bool) -> None:
    ignore = 255 if sizes[0] <= 255 else -1
    student, teacher, target = problem(sizes, dtype, ignore_index=ignore)
    compare(student, teacher, target, align_corners, layout, ignore_index=ignore)


@pytest.mark.parametrize("temperature", (0.5, 1.0, 2.0, 5.0))
@pytest.mark.parametrize("reduction", (NONE, MEAN, SUM))
@pytest.mark.parametrize("ce_weight", (None, 0.0, 0.7))
@pytest.mark.parametrize("align_corners", (False, True))
def test_temperature_reduction_ce(
    temperature: float, reduction: int, ce_weight: float | None, align_corners: bool
) -> None:
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 3.0, 1.0])
    options = dict(temperature=temperature, reduction=reduction, ce_weight=ce_weight)
    for sizes in ((6, (5, 8), (3, 9), (9, 32)), (6, (3, 4), (9, 16), (9, 16)), (6, (9, 16), (5, 3), (9, 16))):
        student, teacher, target = problem(sizes)
        compare(student, teacher, target, align_corners, **options)
        compare(student, teacher, target, align_corners, class_weight=weight, **options)
        compare(student, teacher, None, align_corners, class_weight=weight, **options)
        compare(student, teacher, None, align_corners, "channels_last", **options)


@pytest.mark.parametrize("student_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("teacher_dtype", FLOATS, ids=str)
def test_mixed_dtypes_and_layouts(student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    student, teacher, target = problem((7, (5, 8), (4, 6), (16, 24)))
    student, teacher = student.to(student_dtype), teacher.to(teacher_dtype)
    truth = low(student, teacher, target)
    for layout_s in LAYOUTS:
        for layout_t in LAYOUTS:
            got = low(strided_copy(student, layout_s), strided_copy(teacher, layout_t), target)
            for a, b in zip(got, truth):
                assert torch.equal(a, b)
    compare(student, teacher, target)


@pytest.mark.parametrize("dtype", LABELS, ids=str)
@pytest.mark.parametrize("ignore_index", (0, -1, 255, None))
def test_label_widths_and_ignore_patterns(dtype: torch.dtype, ignore_index: int | None) -> None:
    held = ignore_index is not None and torch.iinfo(dtype).min <= ignore_index <= torch.iinfo(dtype).max
    student, teacher, target = problem((6, (5, 9), (2, 4), (10, 33)), ignore_index=ignore_index if held else None)
    want = low(student, teacher, target, ignore_index=ignore_index)
    for narrow in (target.to(dtype), strided_copy(target.to(dtype), "sliced")):
        for a, b in zip(low(student, teacher, narrow, ignore_index=ignore_index), want):
            assert torch.equal(a, b)
    compare(student, teacher, target.to(dtype), ignore_index=ignore_index)


def test_the_networks_upsampled_beforehand_give_the_same() -> None:
    """On whole quarters no interpolation rounds, and the kernels of both ways are the same."""
    student, teacher, target = problem((6, (8, 8), (4, 16), (16, 32)))
    student, teacher = (x.mul(8).round() for x in (student, teacher))
    full = [upsample.upsample(x, [16, 32], False) for x in (student, teacher)]
    args = packed({**DEFAULTS, "reduction": NONE})
    want = torch.ops.dsct_kernels.tnkd(*full, target, *args, False)
    assert torch.equal(low(student, teacher, target, reduction=NONE)[0], want[0])


def test_one_network_as_its_own_teacher() -> None:
    """Cross-entropy alone: the teacher is the student, and is not looked at twice."""
    for sizes in SIZES[:4]:
        student, _, target = problem(sizes)
        for x in (student, strided_copy(student, "channels_last")):
            got = low(x, x, target, tckd_weight=0.0, nckd_weight=0.0)
            want = low(x, x.clone(), target, tckd_weight=0.0, nckd_weight=0.0)
            assert all(torch.equal(a, b) for a, b in zip(got, want)) and got[1][1:].abs().max() < 1e-6


# --- the edge cases of the specification ---


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("garbage", (NAN, INF, -INF))
@pytest.mark.parametrize("align_corners", (False, True))
def test_whatever_stands_where_only_ignored_pixels_look(layout: str, garbage: float, align_corners: bool) -> None:
    for classes, small, size in ((6, (6, 20), (24, 80)), (20, (7, 9), (24, 80)), (6, (24, 80), (24, 80))):
        student, teacher, target = problem((classes, small, (12, 40), size))
        target[0, 4:20, 8:60] = 255
        target[1, :, 40:] = 255
        leaf = student.double().requires_grad_()
        valid = (target != 255).unsqueeze(1).double()
        full = F.interpolate(leaf, size=size, mode="bilinear", align_corners=align_corners)
        (touched,) = torch.autograd.grad((full * valid).sum(), leaf)
        clean = low(student, teacher, target, align_corners)
        dirty = torch.where(touched == 0, garbage, student)
        assert not torch.equal(dirty, student)
        got = low(strided_copy(dirty, layout), teacher, target, align_corners)
        for a, b in zip(got, clean):
            assert torch.equal(a, b)
        assert (got[2][touched == 0] == 0).all()


@pytest.mark.parametrize("align_corners", (False, True))
@pytest.mark.parametrize("which", (0, 1))
def test_nan_that_a_valid_pixel_touches_shows(align_corners: bool, which: int) -> None:
    for classes in (2, 6, 20):
        student, teacher, target = problem((classes, (4, 5), (3, 7), (16, 35)), ignore_index=None)
        both = [student, teacher]
        both[which][1, classes - 1, 1, 2] = NAN
        looks = torch.zeros(1, 1, *both[which].shape[2:]).double()
        looks[0, 0, 1, 2] = 1
        looks = walked(looks, [16, 35], align_corners)[0, 0] > 0
        for temperature in (1.0, 2.0, 3.0):
            options = dict(temperature=temperature, align_corners=align_corners)
            assert low(*both, target, **options)[0].isnan()
            pixels = low(*both, target, reduction=NONE, **options)[0].isnan()
            assert torch.equal(pixels[1], looks) and not pixels[0].any()


@pytest.mark.parametrize("align_corners", (False, True))
@pytest.mark.parametrize("temperature", (1.0, 2.0, 3.0))
def test_absent_classes(align_corners: bool, temperature: float) -> None:
    """Absent where a cell that has a part is at -inf, nowhere else."""
    for sizes in ((5, (4, 6), (4, 6), (13, 33)), (5, (4, 6), (13, 33), (13, 33)), (20, (3, 3), (3, 3), (9, 9))):
        student, teacher, target = problem(sizes, torch.float64)
        target[target == 3] = 0
        for x in (student, teacher):  # in both alike, wherever they look
            x[:, 3] = -INF
        options = dict(temperature=temperature, ce_weight=None)
        compare(student, teacher, target, align_corners, up=walked, **options)
        compare(student.float(), teacher.float(), target, align_corners, up=walked, **options)
        loss, _, grad = low(student, teacher, target, align_corners, **options)
        assert loss.isfinite() and (grad[:, 3] == 0).all()
    student, teacher, target = problem((5, (3, 4), (3, 4), (9, 16)), torch.float64, ignore_index=None)
    target[:] = 1
    for x in (student, teacher):
        x[0, 3, 1, 2] = x[1, 4, 0, 0] = -INF  # at single cells
    got = low(student, teacher, target, align_corners, reduction=NONE, **options)[0]
    full = [walked(x, [9, 16], align_corners) for x in (student, teacher)]
    want = reference.tnkd(*full, target, Objective(**{**DEFAULTS, **options, "reduction": NONE}))[0]
    torch.testing.assert_close(got, want)
    assert got.isfinite().all()


@pytest.mark.parametrize("reduction", (NONE, MEAN, SUM))
@pytest.mark.parametrize("shape", [(2, 6, 4, 4), (0, 6, 4, 4)], ids=str)
def test_nothing_valid(shape: tuple[int, ...], reduction: int) -> None:
    for layout in ("contiguous", "channels_last"):
        student = strided_copy(torch.full(shape, NAN), layout)
        for teacher in (student, torch.full((shape[0], 6, 9, 9), NAN)):
            target = torch.full((shape[0], 9, 9), 255)
            loss, parts, grad = low(student, teacher, target, reduction=reduction)
            assert (loss == 0).all() and (parts == 0).all() and (grad == 0).all()
            assert grad.shape == shape


@pytest.mark.parametrize("align_corners", (False, True))
@pytest.mark.parametrize("reduction", (MEAN, SUM))
@pytest.mark.parametrize("sizes", [SIZES[0], SIZES[4], SIZES[5]], ids=str)
def test_float16_gradients_neither_overflow_nor_lose_digits(
    sizes: tuple[Any, ...], reduction: int, align_corners: bool
) -> None:
    for scale, temperature, ce_weight in ((1e-3, 1.0, 1e-3), (3.0, 20.0, 1.0), (1e3, 1.0, 1e4)):
        student, teacher, target = problem(sizes)
        target[:] = 1  # all pixels pull a cell the same way
        student, teacher = (student * scale).half(), (teacher * scale).half()
        options = dict(reduction=reduction, temperature=temperature, ce_weight=ce_weight)
        args = packed({**DEFAULTS, **options})
        _, _, grad, factor = torch.ops.dsct_kernels.tnkd_upsampled(student, teacher, target, *args, align_corners, True)
        assert math.log2(factor.item()).is_integer() and grad.abs().max() < 2**15
        truth = eager(student.double(), teacher.double(), target, align_corners, interpolated, **options)[2]
        assert relative_error(grad.float() * factor, truth) < 2**-10


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("magnitude", (1e4, 6e4))
def test_extreme_magnitudes(layout: str, magnitude: float) -> None:
    dtype = torch.float32 if magnitude == 1e4 else torch.float16
    student, teacher = (
        ((torch.rand(2, 6, 4, 5, generator=torch.Generator().manual_seed(s)) * 2 - 1) * magnitude).to(dtype)
        for s in (0, 1)
    )
    target = labels(2, 16, 20, classes=6)
    for temperature in (0.01, 1.0, 7.0):
        loss, _, grad = low(strided_copy(student, layout), teacher, target, temperature=temperature)
        assert loss.isfinite() and grad.isfinite().all()
        # Eighths of whole numbers are exact: no interpolation rounds what is a saturated softmax's knife's edge.
        compare(student.round(), teacher.round(), target, layout=layout, temperature=temperature)


def test_argmax_of_the_upsampled_teacher() -> None:
    """Not the upsampled argmax: between two cells a class may lead that leads in neither."""
    teacher = torch.tensor([[4.0, 0.0], [0.0, 4.0], [3.0, 3.0]]).view(1, 3, 1, 2)
    student = logits(1, 3, 1, 2)
    label = upsample.upsample(teacher, [1, 8], False).argmax(1)
    assert 2 in label
    student = logits(1, 3, 1, 8)  # which sets the size
    want = low(student, teacher, label, ignore_index=None)
    assert all(torch.equal(a, b) for a, b in zip(low(student, teacher, None), want))
    teacher = torch.ones(1, 20, 3, 3)  # the first of equals
    student = logits(1, 20, 9, 40)
    zeros = torch.zeros(1, 9, 40, dtype=torch.long)
    assert torch.equal(low(student, teacher, None)[2], low(student, teacher, zeros)[2])


# --- how it runs ---


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("small", ((1, 1), (3, 5), (25, 24), (70, 60)), ids=str)
def test_same_bits_every_time_and_for_any_number_of_threads(layout: str, small: tuple[int, int]) -> None:
    student, teacher, target = problem((150, small, (9, 9), (100, 96)))
    student, teacher = (strided_copy(x, layout) for x in (student, teacher))
    weight = torch.rand(150)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 2, 3):
            torch.set_num_threads(n)
            results.append(low(student, teacher, target, class_weight=weight))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    compare(student, teacher, target, class_weight=weight)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect through ctypes")
@pytest.mark.parametrize("classes", (6, 19, 33, 150))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nothing_is_read_past_the_end(classes: int, layout: str, dtype: torch.dtype) -> None:
    networks = (strided_copy(logits(1, classes, 5, 23, dtype=dtype, seed=seed), layout) for seed in (0, 2))
    target = labels(1, 10, 50, classes=classes)
    check_nothing_is_read_past_the_end(lambda s, t: low(s, t, target), *networks)


def test_gradient_has_the_students_dtype_and_strides_and_nothing_is_written() -> None:
    for dtype in FLOATS:
        for layout in ("contiguous", "channels_last", "transposed"):
            student, teacher, target = problem((6, (4, 5), (3, 3), (9, 20)), dtype)
            student = strided_copy(student, layout)
            before = [x.clone() for x in (student, teacher, target)]
            grad = torch.ops.dsct_kernels.tnkd_upsampled(student, teacher, target, *packed(DEFAULTS), False, True)[2]
            assert grad.dtype == dtype and grad.stride() == student.stride()
            assert all(torch.equal(a, b) for a, b in zip((student, teacher, target), before))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(teacher=logits(2, 5, 3, 3)), "teacher_logits: expected the batch and the classes"),
        (dict(student=logits(2, 6, 3)), "student_logits: expected shape"),
        (dict(student=logits(2, 6, 3, 10)), "student_logits: .* cannot be upsampled"),
        (dict(target=torch.zeros(2, 4, dtype=torch.long)), "target: expected shape"),
        (dict(target=torch.zeros(1, 9, 9, dtype=torch.long)), "target: expected shape"),
        (dict(target=torch.zeros(2, 9, 9)), "target: expected dtype"),
        (dict(class_weight=torch.ones(5)), "class_weight: expected"),
        (dict(temperature=0.0), "temperature: expected"),
        (dict(nckd_weight=-1.0), "beta: expected a finite number >= 0, got -1"),
        (dict(reduction=3), "reduction: expected"),
    ],
    ids=str,
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    good = dict(student=logits(2, 6, 3, 3), teacher=logits(2, 6, 3, 3), target=torch.zeros(2, 9, 9, dtype=torch.long))
    with pytest.raises(ValueError, match=message):
        low(**{**good, **change})


def test_bad_label_is_named_with_its_position() -> None:
    student, teacher, target = problem((6, (4, 5), (3, 3), (9, 20)), ignore_index=None)
    target[1, 7, 3] = 6
    with pytest.raises(ValueError, match=r"target: label 6 at position \(1, 7, 3\) is outside \[0, 6\)"):
        tnkd_loss(student, teacher, target)


def test_a_maps_upstream_has_to_fit() -> None:
    student, teacher, target = problem(SIZES[0])
    for wrong in (torch.ones(2, 32, 31), torch.ones(2, 32, 32, dtype=torch.float64), torch.ones(())):
        with pytest.raises(ValueError, match="grad_output: expected shape"):
            of_map(student, teacher, target, wrong)


# --- the gradient of a map ---


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("temperature", (1.0, 2.0, 3.0))
def test_gradient_of_a_map_through_the_loss(dtype: torch.dtype, temperature: float, calls: list[int]) -> None:
    student, teacher, target = problem((6, (5, 8), (3, 4), (15, 32)), dtype)
    leaf = student.clone().requires_grad_()
    pixels = tnkd_loss(leaf, teacher, target, temperature=temperature, reduction="none")
    assert len(calls) == 1
    for come_in in (upstream(pixels), upstream(pixels.mT).mT, torch.ones(()).to(pixels).expand_as(pixels)):
        (grad,) = torch.autograd.grad(pixels, leaf, come_in, retain_graph=True)
        wide = student.double().requires_grad_()
        full = [interpolated(x, [15, 32], False) for x in (wide, teacher.double())]
        truth = tnkd_loss(*full, target, temperature=temperature, reduction="none", backend="reference")
        (want,) = torch.autograd.grad(truth, wide, come_in.double())
        assert grad.dtype == dtype
        assert relative_error(grad, want) < {torch.float32: 1e-5, torch.float64: 1e-12}.get(
            dtype, torch.finfo(dtype).eps
        )


@pytest.mark.parametrize("come_in", (INF, -INF, NAN))
@pytest.mark.parametrize("alone", (False, True))
def test_an_ignored_pixel_gets_nothing_of_what_comes_in(come_in: float, alone: bool) -> None:
    for sizes in (SIZES[0], SIZES[1], SIZES[2], (150, (5, 20), (9, 37), (30, 140))):
        student, teacher, target = problem(sizes)
        options = dict(tckd_weight=0.0, nckd_weight=0.0) if alone else {}
        values = torch.rand(target.shape)
        want = of_map(student, teacher, target, values, **options)
        got = of_map(student, teacher, target, values.where(target != 255, come_in), **options)
        assert (target == 255).any() and torch.equal(got, want) and want.isfinite().all()


def test_a_map_takes_many_upstreams_no_second_derivative_and_no_change_of_its_inputs() -> None:
    student, teacher, target = problem(SIZES[0])
    leaf = student.requires_grad_()
    pixels = tnkd_loss(leaf, teacher, target, reduction="none")
    several = torch.stack([upstream(pixels), torch.ones_like(pixels)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # slow, says torch's vmap
        (rows,) = torch.autograd.grad(pixels, leaf, several, is_grads_batched=True, retain_graph=True)
    for row, one in zip(rows, several):
        assert torch.equal(row, torch.autograd.grad(pixels, leaf, one, retain_graph=True)[0])
    (grad,) = torch.autograd.grad(pixels, leaf, several[0], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative only"):
        grad.sum().backward()
    teacher.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        pixels.sum().backward()


def test_a_map_of_float16_keeps_what_comes_in_until_it_rounds() -> None:
    """A GradScaler's factor, and gradients that float16 does not hold before it."""
    student, teacher, target = problem(SIZES[0], torch.float16)
    values = torch.full(target.shape, 2.0**-24)
    want = of_map(student.float(), teacher.float(), target, values) * 2**16
    assert relative_error(of_map(student, teacher, target, values * 2**16), want) < 1e-3


# --- cross-entropy alone: the weights of TNKD are 0 ---


@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "sliced"))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_cross_entropy_alone(layout: str, dtype: torch.dtype) -> None:
    for sizes in SIZES:
        ignore = 255 if sizes[0] <= 255 else -1
        student, _, target = problem(sizes, dtype, ignore_index=ignore)
        student = strided_copy(student, layout)
        weight = torch.linspace(0, 2, sizes[0], dtype=acc_dtype(student))
        options = dict(tckd_weight=0.0, nckd_weight=0.0, temperature=3.0, ignore_index=ignore, class_weight=weight)
        for reduction in (NONE, MEAN, SUM):
            loss, parts, grad = low(student, student, target, reduction=reduction, **options)
            assert (parts[1:] == 0).all()
            results = []
            for own, acc in ((dtype, weight.dtype), (torch.float64, torch.float64)):
                leaf = student.detach().to(own).clone().requires_grad_()
                full = leaf.to(acc)
                full = full if full.shape[2:] == target.shape[1:] else interpolated(full, list(target.shape[1:]), False)
                how = ("none", "mean", "sum")[reduction]
                pixels = F.cross_entropy(full, target, weight.to(acc), ignore_index=ignore, reduction=how) * 0.7
                results.append((pixels.detach(), torch.autograd.grad(pixels, leaf, upstream(pixels))[0]))
            assert_as_good_as_reference(loss, results[0][0], results[1][0], f"loss of {sizes}")
            assert_as_good_as_reference(grad, results[0][1], results[1][1], f"gradient of {sizes}")


@pytest.mark.parametrize("garbage", (NAN, INF))
def test_a_teacher_that_is_not_asked_for_hides_no_nan(garbage: float) -> None:
    for classes in (2, 6, 20, 48):
        for full in (False, True):
            student, teacher, target = problem((classes, (16, 35) if full else (4, 5), (16, 35), (16, 35)))
            for layout in ("contiguous", "channels_last"):
                for at in (0, classes - 1):
                    dirty = teacher.clone()
                    dirty[1, at, 3, 7] = garbage
                    target[1, 3, 7:9] = classes - 1
                    pair = [strided_copy(x, layout) for x in (student, dirty)]
                    options = dict(tckd_weight=0.0, nckd_weight=0.0, reduction=NONE)
                    pixels = low(*pair, target, **options)[0].isnan()
                    assert pixels.sum() == 1 and pixels[1, 3, 7]
                    target[1, 3, 7] = 255
                    loss, _, grad = low(*pair, target, **options)
                    assert loss.isfinite().all() and grad.isfinite().all()


def test_cross_entropy_alone_learns_from_the_teachers_argmax() -> None:
    student, teacher, _ = problem((7, (5, 9), (4, 6), (20, 27)))
    label = upsample.upsample(teacher, [5, 9], False).argmax(1)
    options = dict(tckd_weight=0.0, nckd_weight=0.0)
    got = low(student, teacher, None, **options)
    for a, b in zip(got, low(student, student, label, ignore_index=None, **options)):
        assert torch.equal(a, b)
    for a, b in zip(low(student, student, None, **options), low(student, student, student.argmax(1), **options)):
        assert torch.equal(a, b)


# --- through the public functions ---


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for every call that the kernel serves."""
    made: list[int] = []
    own = native.tnkd_upsampled
    monkeypatch.setattr(native, "tnkd_upsampled", lambda *args: (made.append(1), own(*args))[1])
    return made


def test_what_it_serves(calls: list[int]) -> None:
    student, teacher, target = problem(SIZES[0])
    leaf = student.clone().requires_grad_()
    tnkd_loss(leaf, teacher, target).backward()
    tnkd_loss(leaf, teacher, None)
    tnkd_loss(student, teacher, target, reduction="none")
    options = dict(matched_weight=0, jaccard_weight=0)
    dsct_loss(leaf, teacher, target, **options).total.backward()
    tnkd_loss(leaf, teacher, target, reduction="none").sum().backward()
    assert len(calls) == 5
    tnkd_loss(leaf, leaf.detach(), target[:, :8, :8])
    tnkd_loss(leaf, teacher, target, backend="reference")
    torch.func.grad(lambda x: tnkd_loss(x, teacher, target))(student)
    assert len(calls) == 5


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_way_gives_the_same(dtype: torch.dtype, calls: list[int]) -> None:
    student, teacher, target = problem((6, (5, 8), (3, 4), (15, 32)), dtype)
    options = dict(matched_weight=0.0, jaccard_weight=0.0, class_weight=torch.rand(6))
    for tnkd_weight in (0.0, 0.7):
        results = []
        for backend in ("native", "reference"):
            leaf = student.clone().requires_grad_()
            losses = dsct_loss(leaf, teacher, target, tnkd_weight=tnkd_weight, backend=backend, **options)
            (losses.total * 512).backward()
            results.append((losses.total, losses.ce, losses.tckd, losses.nckd, leaf.grad))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-4)
    assert len(calls) == 2


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("align_corners", (False, True))
def test_gradcheck(reduction: str, align_corners: bool) -> None:
    student, teacher, target = problem((3, (2, 3), (3, 2), (5, 7)), torch.float64)
    student.requires_grad_()
    options = dict(temperature=1.7, reduction=reduction, align_corners=align_corners)
    assert torch.autograd.gradcheck(lambda x: tnkd_loss(x, teacher, target, **options), student)
    assert torch.autograd.gradcheck(lambda x: tnkd_loss(x, teacher, None, **options), student)


def test_backward_twice_and_second_derivatives(calls: list[int]) -> None:
    student, teacher, target = problem(SIZES[0])
    leaf = student.requires_grad_()
    loss = tnkd_loss(leaf, teacher, target) * 3
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, leaf)[0])
    loss = tnkd_loss(leaf, teacher, target)
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative only"):
        grad.sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_opcheck(dtype: torch.dtype, reduction: int, needs_grad: bool) -> None:
    student, teacher, target = problem((5, (4, 5), (3, 6), (9, 20)), dtype)
    weight = torch.rand(5, dtype=acc_dtype(student))
    for layout, label, class_weight in (("contiguous", target, None), ("channels_last", None, weight)):
        leaf = strided_copy(student, layout).requires_grad_(needs_grad)
        coupled = layout == "channels_last"
        args = packed({**DEFAULTS, "class_weight": class_weight, "reduction": reduction, "coupled": coupled})
        arguments = (leaf, teacher, label, *args, True, needs_grad)
        torch.library.opcheck(torch.ops.dsct_kernels.tnkd_upsampled.default, arguments, test_utils=CHECKS)
        if reduction == NONE:
            size = (4, 6) if label is None else (9, 20)
            options = leaf.detach(), teacher, label, *args[:-1], True
            grad_output = torch.rand(2, *size, dtype=weight.dtype)
            op = torch.ops.dsct_kernels.tnkd_upsampled_backward.default
            torch.library.opcheck(op, (*options, grad_output), test_utils=CHECKS)


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("dynamic", (False, True))
def test_compiles(dynamic: bool, reduction: str) -> None:
    frames = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    total = lambda x, t, y: tnkd_loss(x, t, y, temperature=2.0, align_corners=True, reduction=reduction)  # noqa: E731
    compiled = torch.compile(total, fullgraph=True, backend=frames, dynamic=dynamic)
    # Sizes that all differ: of equal ones the compiler makes one.
    several = (6, (7, 8), (4, 5), (13, 29)), (6, (5, 9), (3, 4), (10, 24)), (6, (11, 7), (5, 8), (31, 40))
    for sizes in several[: 3 if dynamic else 1]:
        student, teacher, target = problem(sizes)
        student.requires_grad_()
        losses = [run(student, teacher, target) for run in (compiled, total)]
        grads = [torch.autograd.grad(loss, student, upstream(loss))[0] for loss in losses]
        torch.testing.assert_close(*grads)
    assert frames.frame_count == 1


# --- any ---


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    classes = draw(st.one_of(st.integers(2, 40), st.sampled_from([65, 150])))
    size = [draw(st.integers(1, 40)), draw(st.integers(1, 150))]
    small = [[draw(st.integers(1, n)) for n in size] for _ in range(2)]
    batch, seed = draw(st.integers(1, 3)), draw(st.integers(0, 2**20))
    dtype = draw(st.sampled_from(FLOATS))
    scale = 10.0 ** draw(st.integers(-2, 1))
    student, teacher = (
        logits(batch, classes, *s, dtype=dtype, scale=scale, seed=seed + i) for i, s in enumerate(small)
    )
    ignored = draw(st.sampled_from([0.0, 0.3, 1.0]))
    return dict(
        student=student,
        teacher=teacher,
        target=labels(batch, *size, classes=classes, ignored=ignored, seed=seed),
        align_corners=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        temperature=draw(st.sampled_from([0.3, 1.0, 2.0, 4.0])),
        reduction=draw(st.integers(0, 2)),
        ce_weight=draw(st.sampled_from([None, 0.0, 0.7])),
        class_weight=draw(st.sampled_from([None, torch.linspace(0, 2, classes)])),
    )


@settings(max_examples=100, deadline=None)
@given(problems())
def test_any_problem(problem: dict[str, Any]) -> None:
    compare(**problem)
