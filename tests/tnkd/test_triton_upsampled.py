"""The Triton kernels that read logits smaller than the labels as they are, by the rule and the reference of
test_low_resolution.py. Shapes are tiny: the interpreter takes tens of milliseconds for a label row of a tile."""

# mypy: ignore-errors

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsct_kernels import backends, kd_loss, tnkd_loss
from dsct_kernels.tnkd import triton_upsampled, upsample
from dsct_kernels.tnkd.objective import MEAN, NONE, SUM
from dsct_kernels.tnkd.plan import UpsampledConfig, choose_upsampled
from dsct_kernels.triton_common import launch
from tests.conftest import DEVICES

triton = pytest.importorskip("triton", reason="the package triton is not installed")
if DEVICES[-1] == "cuda" or backends.NATIVE_MISSING is not None:  # whose helpers test_low_resolution has
    pytest.skip("the interpreter's tests: its numbers lie on the CPU", allow_module_level=True)

import triton.language as tl  # noqa: E402

from dsct_kernels.tnkd.triton_upsampled_kernels import axis_of, first_of, taps  # noqa: E402
from tests.tnkd.test_low_resolution import compare, eager, interpolated, problem, walked  # noqa: E402
from tests.tnkd.test_native import DEFAULTS, packed  # noqa: E402

INF, NAN = float("inf"), float("nan")
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
QUICK = UpsampledConfig(64, 8, 1, 4, 1, 4)  # eight classes at a time: fewer operations to interpret


def low(student: Tensor, teacher: Tensor, target: Tensor | None, align_corners: bool = False, **options: Any):
    """(loss, parts, gradient in float32) of the op."""
    config, by_pointer = options.pop("config", QUICK), options.pop("by_pointer", None)
    args = packed({**DEFAULTS, **options})
    result = triton_upsampled.forward(student, teacher, target, *args, align_corners, True, config, by_pointer)
    loss, parts, grad, scale = result
    assert grad.dtype == student.dtype and grad.shape == student.shape
    return loss, parts, grad.to(scale.dtype) * scale


def equal(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@triton.jit
def taps_kernel(interval, cell, near, far, begins, inputs, outputs, never, ALIGN: tl.constexpr):
    """Where the outputs look, and with which output each interval begins."""
    axis = axis_of(inputs, outputs, never, ALIGN)
    i = tl.arange(0, 512)
    found, low, of_low, of_next = taps(i, axis, ALIGN)
    tl.store(interval + i, found)
    tl.store(cell + i, low)
    tl.store(near + i, of_low)
    tl.store(far + i, of_next)
    j = tl.arange(0, 128)
    tl.store(begins + j, first_of(j - (0 if ALIGN else 1), axis, ALIGN))


@settings(max_examples=60, deadline=None)
@given(inputs=st.integers(1, 70), more=st.integers(0, 300), align_corners=st.booleans())
def test_taps_and_intervals_are_those_of_upsample(inputs, more, align_corners):
    """To the last bit of float64's weights, rounded; every output has a lane; the bound of float16's scale holds."""
    outputs = inputs + more
    found = [torch.zeros(512, dtype=dtype) for dtype in (torch.int32, torch.int32, torch.float32, torch.float32)]
    begins = torch.zeros(128, dtype=torch.int32)
    launch(taps_kernel, 1, 1, *found, begins, inputs, outputs, 0, ALIGN=align_corners)
    interval, cell, near, far = (x[:outputs] for x in found)
    at, _, weight = upsample.taps(inputs, outputs, align_corners, torch.device("cpu"))
    assert torch.equal(cell.long(), at) and torch.equal(far, weight.float()) and torch.equal(near, (1 - weight).float())
    wanted = [int((interval < j).sum()) for j in range(0 if align_corners else -1, inputs + 1)]
    assert begins[: len(wanted)].tolist() == wanted
    lengths = [end - begin for begin, end in itertools.pairwise(wanted)]
    if not align_corners:
        lengths[-1] += lengths.pop(0)  # what lies before the first cell goes with the last interval
    config = choose_upsampled(6, (inputs, inputs), (outputs, outputs), align_corners)
    assert max(lengths) <= config.slots * config.parts
    sums = torch.zeros(inputs + 1, dtype=torch.float64).index_add_(0, at, 1 - weight).index_add_(0, at + 1, weight)
    assert sums.max() <= triton_upsampled._gathered(inputs, outputs, align_corners) + 1e-9


# classes, student, teacher, labels; align_corners; dtypes; layout; launch (None: the plan's). Ratios of 4, whole, none,
# 1, and as large as they get; networks that differ; one cell; several strips, tiles and chunks; intervals in parts.
ONE_ROW, PARTS = UpsampledConfig(16, 8, 1, 4, 1, 1), UpsampledConfig(16, 8, 2, 4, 3, 2)
CASES = [
    ((5, (2, 3), (2, 3), (8, 12)), False, ("float32", "float32"), "contiguous", None),
    ((6, (3, 4), (2, 5), (7, 11)), True, ("float32", "bfloat16"), "channels_last", ONE_ROW),
    ((7, (3, 4), (5, 9), (5, 9)), False, ("bfloat16", "float32"), "sliced", ONE_ROW),
    ((19, (3, 5), (1, 2), (3, 5)), False, ("float32", "float16"), "transposed", ONE_ROW),
    ((3, (1, 1), (2, 1), (4, 9)), False, ("float32", "float32"), "contiguous", PARTS),
    ((3, (2, 3), (2, 3), (3, 22)), True, ("bfloat16", "bfloat16"), "channels_last", PARTS),
    ((2, (5, 2), (3, 2), (6, 3)), False, ("float32", "float32"), "contiguous", QUICK),
]  # fmt: skip


@pytest.mark.parametrize("sizes,align_corners,dtypes,layout,config", CASES, ids=str)
def test_sizes_dtypes_layouts(sizes, align_corners, dtypes, layout, config):
    student, teacher, target = problem(sizes, batch=1 if sizes[0] > 5 else 2)
    student, teacher = student.to(getattr(torch, dtypes[0])), teacher.to(getattr(torch, dtypes[1]))
    compare(student, teacher, target, align_corners, layout, run=functools.partial(low, config=config))


@pytest.mark.parametrize(
    "options",
    [
        dict(ce_weight=None, coupled=True, tckd_weight=1.0, nckd_weight=1.0),
        dict(class_weight=torch.tensor([1.0, 0.5, 0.0, 2.0, 3.0])),
        dict(class_weight=torch.tensor([1.0, 0.5, 0.0, 2.0, 3.0]), reduction=SUM, ignore_index=None),
        dict(reduction=SUM, temperature=0.5),
        dict(tckd_weight=0.0, nckd_weight=0.0, temperature=1.0),
    ],
    ids=str,
)
def test_what_is_asked_for(options):
    student, teacher, target = problem(
        (5, (2, 3), (2, 3), (5, 9)), batch=1, ignore_index=options.get("ignore_index", 255)
    )
    compare(student, teacher, target, run=low, **options)


def test_without_labels():
    """The upsampled teacher's argmax, the first of equals, at the larger of both sizes; nothing is ignored."""
    student, teacher, _ = problem((5, (2, 3), (5, 2), (5, 3)), batch=1)
    teacher[:, 3] = teacher[:, 1]
    label = upsample.upsample(teacher, [5, 3], False).argmax(1)
    assert equal(low(student, teacher, None), low(student, teacher, label, ignore_index=None))


def test_the_same_bits_however_the_numbers_come_and_every_time():
    student, teacher, target = problem((5, (2, 3), (3, 2), (4, 9)), ignore_index=0)
    once, *others = (
        low(student, teacher, target.to(dtype), ignore_index=0, by_pointer=by_pointer)
        for dtype, by_pointer in ((torch.int64, False), (torch.int64, False), (torch.uint8, True))
    )
    assert all(equal(once, other) for other in others)


@pytest.mark.parametrize("align_corners", [False, True])
def test_whatever_stands_where_only_ignored_pixels_look(align_corners):
    student, teacher, target = problem((5, (3, 4), (2, 3), (6, 12)), batch=1)
    target[0, 2:, 4:] = 255
    leaf = student.double().requires_grad_()
    full = interpolated(leaf, [6, 12], align_corners)
    (touched,) = torch.autograd.grad((full * (target != 255).unsqueeze(1)).sum(), leaf)
    clean = low(student, teacher, target, align_corners)
    for garbage in (NAN, -INF):
        dirty = torch.where(touched == 0, garbage, student)
        assert not torch.equal(dirty, student)
        assert equal(low(dirty, teacher, target, align_corners), clean)
    assert (clean[2][touched == 0] == 0).all() and clean[2].isfinite().all()
    loss, parts, grad = low(torch.full_like(student, NAN), teacher, torch.full_like(target, 255), align_corners)
    assert loss == 0 and not parts.any() and not grad.any()


def test_what_must_not_be_hidden():
    """NaN that a valid pixel touches, +inf beside -inf, a label that is no class."""
    student, teacher, target = problem((5, (2, 3), (2, 3), (3, 6)), batch=1, ignore_index=None)
    for which in (0, 1):
        both = [student.clone(), teacher.clone()]
        both[which][0, 4, 1, 1] = NAN
        assert low(*both, target)[0].isnan()
        both[which][0, 4, 1, 1], both[which][0, 4, 0, 1] = INF, -INF
        assert low(*both, target)[0].isnan()
    for bad in (5, -1, 2**40):
        wrong = target.clone()
        wrong[0, 1, 2] = bad
        assert low(student, teacher, wrong)[0].isnan()


@pytest.mark.parametrize("align_corners", [False, True])
def test_absent_classes(align_corners):
    """Absent where a cell that has a part is at -inf, nowhere else."""
    student, teacher, target = problem((5, (3, 2), (3, 2), (7, 5)), batch=1, ignore_index=None)
    target[:] = 1
    for x in (student, teacher):
        x[0, 3, 1, 1] = x[0, 4, 0, 0] = x[0, 2] = -INF
    student[0, 3, 2, 0] = teacher[0, 3, 2, 0] = -INF
    compare(student, teacher, target, align_corners, up=walked, run=low, ce_weight=None)
    loss, _, grad = low(student, teacher, target, align_corners, ce_weight=None)
    assert loss.isfinite() and not grad[0, 2].any()


@pytest.mark.parametrize("reduction", [MEAN, SUM])
def test_float16_keeps_a_power_of_two_out_of_the_gradient(reduction):
    for scale, temperature, ce_weight in ((1e-3, 1.0, 1e-3), (1e3, 1.0, 1e4)):
        student, teacher, target = problem((5, (2, 2), (2, 2), (5, 8)), batch=1)
        target[:] = 1  # all pixels pull a cell the same way
        student, teacher = (student * scale).half(), (teacher * scale).half()
        options = dict(reduction=reduction, temperature=temperature, ce_weight=ce_weight)
        args = packed({**DEFAULTS, **options})
        _, _, grad, factor = triton_upsampled.forward(student, teacher, target, *args, False, True, QUICK)
        assert math.log2(factor.item()).is_integer() and grad.abs().max() < 2**15
        truth = eager(student.double(), teacher.double(), target, False, interpolated, **options)[2]
        assert (grad.float() * factor - truth).norm() < 2**-10 * truth.norm()


@pytest.mark.parametrize("needs_grad", [True, False])
def test_opcheck(needs_grad):
    student, teacher, target = problem((3, (2, 2), (1, 2), (2, 4)), torch.float16, batch=1)
    leaf = student.requires_grad_(needs_grad)
    args = packed({**DEFAULTS, "class_weight": torch.rand(3), "coupled": True})
    op = torch.ops.dsct_kernels.tnkd_triton_upsampled.default
    torch.library.opcheck(op, (leaf, teacher, target, *args, True, needs_grad), test_utils=CHECKS)
    empty = op(student[:0].detach(), teacher[:0], target[:0], *args, True, needs_grad)
    assert empty[0] == 0 and empty[2].shape == ((0, 3, 2, 2) if needs_grad else (0,))
    with pytest.raises(ValueError, match="expected a mean or a sum, got none"):
        op(student.detach(), teacher, target, *packed({**DEFAULTS, "reduction": NONE}), True, needs_grad)
    with pytest.raises(ValueError, match="expected tensors of 16 or 32 bits"):
        op(student.detach().double(), teacher, target, *args, True, needs_grad)


def test_what_it_serves(monkeypatch):
    """Through the public functions; the rest is upsampled beforehand, and gives what it did."""
    made: list[int] = []
    own = triton_upsampled._op
    monkeypatch.setattr(triton_upsampled, "_op", lambda *args: (made.append(1), own(*args))[1])
    student, teacher, target = problem((3, (2, 2), (1, 2), (2, 4)), batch=1)
    for served, call in (
        (1, lambda x, backend: tnkd_loss(x, teacher, target, backend=backend)),
        (1, lambda x, backend: kd_loss(x, teacher, target, num_items=7, backend=backend)),
        (0, lambda x, backend: tnkd_loss(x, teacher, target, reduction="none", backend=backend).sum()),
        (0, lambda x, backend: tnkd_loss(x, x.detach().flip(0), target[:, :2, :2], backend=backend)),
    ):
        made.clear()
        results = []
        for backend in ("triton", "reference"):
            leaf = student.clone().requires_grad_()
            loss = call(leaf, backend)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        assert len(made) == served
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
