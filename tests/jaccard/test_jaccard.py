"""The soft Jaccard loss: the formula from first principles, the kernels by the error rule, and every edge case."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dsct_kernels import JaccardLoss, backends, jaccard_loss
from dsct_kernels.dtypes import acc_dtype
from dsct_kernels.pool import averaged

from ..helpers import LAYOUTS, strided_copy
from ..oracle import assert_as_good_as_reference, learnt, three

INF, NAN = float("inf"), float("nan")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LABELS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))
)
both_backends = pytest.mark.parametrize("backend", ["reference", NATIVE])
needs_native = pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))


def logits(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 2.0, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def labels(*shape: int, classes: int = 5, ignored: float = 0.3, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, shape, generator=generator)
    y[torch.rand(shape, generator=generator) < ignored] = 255
    return y


def run(
    student: Tensor, teacher: Tensor, target: Tensor | None = None, backend: str = "auto", **options: Any
) -> tuple[Tensor, Tensor]:
    """(loss, gradient)."""
    return learnt(lambda s: jaccard_loss(s, teacher, target, backend=backend, **options), student)


def by_hand(student: Tensor, teacher: Tensor, share: Tensor | None = None, temperature: float = 1.0):
    """Loss and gradient by the formulas of docs/derivations.md, with loops, in float64."""
    s, t = (x.detach().double().movedim(1, -1).flatten(0, -2) for x in (student, teacher))
    v = torch.ones(len(s), dtype=torch.float64) if share is None else share.double().flatten()
    p, q = torch.zeros_like(s), torch.zeros_like(s)
    for i in range(len(s)):
        if v[i] != 0:
            for z, out in ((s[i], p), (t[i], q)):
                e = ((z - z.max()) / temperature).exp()
                out[i] = e / e.sum()
    a, b, per_class = torch.zeros(s.shape[1]).double(), torch.zeros(s.shape[1]).double(), []
    there = [c for c in range(s.shape[1]) if (v * q[:, c]).sum() > 0.5]
    for c in there:
        both, apart = (v * (p[:, c] + q[:, c])).sum(), (v * (p[:, c] - q[:, c]).abs()).sum()
        per_class.append(1 - (both - apart) / (both + apart))
        a[c] = -2 * apart / (len(there) * (both + apart) ** 2)
        b[c] = 2 * both / (len(there) * (both + apart) ** 2)
    by_p = v[:, None] * (a + b * (p - q).sign())
    grad = p * (by_p - (p * by_p).sum(1, keepdim=True)) / temperature
    loss = sum(per_class) / len(per_class) if per_class else torch.zeros(()).double()
    return loss, grad.unflatten(0, (student.shape[0], *student.shape[2:])).movedim(-1, 1)


def apart_from_kinks(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Positions where no rounding can flip the sign of a p - q that matters."""
    p, q = ((x.double() / temperature).softmax(1) for x in (student, teacher))
    near = ((p - q).abs() < 1e-4 * (p + q)) & (p + q > 1e-12)
    return ~near.any(1, keepdim=True)


def terms(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """The norm of what a gradient's elements are before they cancel, p (|h_c| + sum_k p_k |h_k|) / tau with |h| <= 2 b,
    where a p counts as often as its exponent is large: a rounding of x is x roundings of exp(x)."""
    z = student.double() / temperature
    p, q = ((x.double() / temperature).softmax(1) for x in (student, teacher))
    pixels = [d for d in range(p.dim()) if d != 1]
    there = q.sum(pixels) > 0.5
    b = there / there.sum().clamp(min=1) * 2 / (p + q).sum(pixels).clamp(min=0.5)
    h = 2 * b.view(-1, *[1] * (p.dim() - 2))
    rounded = p * (1 + (z - z.amax(1, keepdim=True)).abs())
    own, all_ = rounded * h + rounded * (p * h).sum(1, keepdim=True), p * (rounded * h).sum(1, keepdim=True)
    return float((own + all_).norm()) / temperature


def compare(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    layout: str = "contiguous",
    temperature: float = 1.0,
    backend: str = "native",
) -> None:
    """The error rule, on loss and gradient."""
    arguments = dict(temperature=temperature, ignore_index=255)
    laid_out = [strided_copy(x, layout) for x in (student, teacher)]
    got, same, truth = three(run, *laid_out, target, backend, **arguments)
    assert got[1].dtype == student.dtype
    assert layout == "sliced" or got[1].stride() == laid_out[0].stride()
    what = f"of {tuple(student.shape)} {student.dtype} {layout} {arguments}"
    numbers = torch.finfo(acc_dtype(student, teacher))
    rounding = numbers.eps
    # A handful of roundings of the sums, for where the reference hits a small loss by luck.
    assert_as_good_as_reference(got[0], same[0], truth[0], f"loss {what}", floor=4 * rounding)
    if student.shape[2:] == teacher.shape[2:]:
        smooth = apart_from_kinks(student, teacher, temperature)
        got, same, truth = ((x[0], torch.where(smooth, x[1], 0)) for x in (got, same, truth))
    # It is p times a difference, where the reference may hit by luck what is left; and numbers end: float16 at 2^-24.
    floor = 4 * rounding * terms(student, teacher, temperature) if student.shape[2:] == teacher.shape[2:] else 0.0
    floor += (2.0**-24 if student.dtype == torch.float16 else 8 * numbers.tiny) * student.numel() ** 0.5
    assert_as_good_as_reference(got[1], same[1], truth[1], f"gradient {what}", floor=floor)


# --- the formula -----------------------------------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("shape", [(2, 5, 4, 6), (7, 3), (2, 2, 9), (1, 19, 2, 3, 2), (3, 40, 3, 3)], ids=str)
def test_the_formula(backend: str, shape: tuple[int, ...], temperature: float) -> None:
    student, teacher = (logits(*shape, dtype=torch.float64, seed=seed) for seed in (0, 2))
    target = labels(shape[0], *shape[2:], classes=min(shape[1], 5))
    for y, share in ((None, None), (target, target != 255)):
        got = run(student, teacher, y, temperature=temperature, backend=backend)
        for a, b in zip(got, by_hand(student, teacher, share, temperature), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@both_backends
def test_labels_larger_than_the_logits_count_by_their_share(backend: str) -> None:
    student, teacher = (logits(2, 5, 3, 4, dtype=torch.float64, seed=seed) for seed in (0, 2))
    target = labels(2, 12, 12)
    target[:, :4, :3] = 255  # a whole cell
    share = (target != 255).double().unflatten(1, (3, 4)).unflatten(3, (4, 3)).mean((2, 4))
    student[0, 0, 0, 0], teacher[1, :, 0, 0] = NAN, INF
    assert (share[:, 0, 0] == 0).all() and ((share > 0) & (share < 1)).any()
    got = run(student, teacher, target, backend=backend)
    for a, b in zip(got, by_hand(student, teacher, share), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    assert (got[1][:, :, 0, 0] == 0).all()


@both_backends
@pytest.mark.parametrize("sizes", [((8, 8), (4, 4)), ((3, 5), (6, 4)), ((7, 9), (5, 9))], ids=str)
def test_the_larger_network_is_averaged_to_the_smaller(backend: str, sizes: tuple[tuple[int, int], ...]) -> None:
    student, teacher = (logits(2, 5, *size, dtype=torch.float64, seed=i) for i, size in enumerate(sizes))
    size = tuple(min(a, b) for a, b in zip(*sizes))
    target = labels(2, *size)
    small = [averaged(x, list(size), torch.float64, target, 255) for x in (student, teacher)]
    got = run(student, teacher, target, backend=backend)
    loss, grad = by_hand(*small, target != 255)
    leaf = student.clone().requires_grad_()
    (grad,) = torch.autograd.grad(averaged(leaf, list(size), torch.float64, target, 255), leaf, grad)
    torch.testing.assert_close(got, (loss, grad), rtol=1e-10, atol=1e-13)
    half = run(student.half(), teacher.half(), target, backend=backend)
    assert half[0].dtype == torch.float32 and half[1].dtype == torch.float16


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_gradcheck(backend: str) -> None:
    for shape in ((2, 4, 3, 3), (3, 2), (1, 20, 2, 3)):
        student, teacher = (logits(*shape, dtype=torch.float64, seed=seed) for seed in (0, 2))
        target = labels(shape[0], *shape[2:], classes=2)
        assert apart_from_kinks(student, teacher, 1.5).all()
        criterion = JaccardLoss(temperature=1.5, backend=backend)
        for y in (None, target):
            torch.autograd.gradcheck(criterion, (student.requires_grad_(), teacher, y))


# --- the error rule --------------------------------------------------------------------------------------------------

# Classes around a vector and a tile, rows shorter than a vector, more pixels than a block or a chunk, one long row.
SHAPES = [
    (2, 6, 16, 24), (2, 19, 13, 11), (1, 150, 8, 9), (1, 300, 3, 7), (70, 21), (128, 100), (1, 2, 333), (3, 5, 7),
    (2, 3, 2, 3, 4), (1, 33, 1, 1), (1, 17, 65, 3), (2, 6, 100, 96), (1, 64, 40, 40), (1, 1100, 40),
]  # fmt: skip


@needs_native
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_dtypes_layouts(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    student, teacher = logits(*shape, dtype=dtype), logits(*shape, dtype=dtype, seed=2)
    compare(student, teacher, None, layout)
    compare(student, teacher, labels(shape[0], *shape[2:], classes=2), layout, temperature=2.0)


@needs_native
@pytest.mark.parametrize("classes", [2, 3, 4, 5, 8, 9, 16, 31, 48, 56, 257])
def test_any_number_of_classes(classes: int) -> None:
    student, teacher = logits(2, classes, 5, 23), logits(2, classes, 5, 23, seed=2)
    for layout in LAYOUTS:
        compare(student, teacher, labels(2, 5, 23, classes=2), layout)


@needs_native
@pytest.mark.parametrize("student_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("teacher_dtype", FLOATS, ids=str)
def test_mixed_dtypes_and_layouts(student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    student, teacher = logits(2, 7, 8, 8, dtype=student_dtype), logits(2, 7, 8, 8, dtype=teacher_dtype, seed=2)
    target = labels(2, 8, 8)
    want = run(student, teacher, target, backend="native")
    for layout_s in LAYOUTS:
        for layout_t in LAYOUTS:
            got = run(strided_copy(student, layout_s), strided_copy(teacher, layout_t), target, backend="native")
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    compare(student, teacher, target)


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e4), (torch.float16, 6e4), (torch.float64, 1e6)], ids=str)
@pytest.mark.parametrize("temperature", [0.01, 1.0, 7.0])
def test_extreme_magnitudes(layout: str, dtype: torch.dtype, size: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (((torch.rand(2, 6, 8, 8, generator=generator) * 2 - 1) * size).to(dtype) for _ in range(2))
    compare(student, teacher, labels(2, 8, 8), layout, temperature=temperature)
    loss, grad = run(student, teacher, temperature=temperature, backend="native")
    assert loss.isfinite() and grad.isfinite().all()


@needs_native
def test_small_float16_gradients_survive_a_grad_scaler() -> None:
    student, teacher = logits(4, 6, 64, 64, dtype=torch.float16), logits(4, 6, 64, 64, seed=2)
    leaf = student.clone().requires_grad_()
    (jaccard_loss(leaf, teacher) * 2.0**16).backward()
    truth = run(student.double(), teacher)[1] * 2.0**16
    smooth = apart_from_kinks(student, teacher, 1.0)
    error = torch.where(smooth, leaf.grad.double() - truth, 0).norm() / truth.norm()
    assert error < 2**-11  # one rounding
    (small,) = torch.autograd.grad(jaccard_loss(student.requires_grad_(), teacher), student)
    assert small.abs().max() < 6e-5  # where float16 runs out of digits: what the scaler is for


@needs_native
def test_large_gradients_take_the_streaming_path() -> None:
    for classes, size, dtype in ((6, 608, torch.float32), (17, 512, torch.bfloat16), (40, 336, torch.float64)):
        student, teacher = (logits(1, classes, size, size, seed=seed, dtype=dtype) for seed in (0, 2))
        want = run(student, teacher, backend="reference")
        for layout in ("contiguous", "channels_last"):
            got = run(*(strided_copy(x, layout) for x in (student, teacher)), backend="native")
            torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=0)
            close = torch.isclose(got[1].double(), want[1].double(), rtol=0.02, atol=1e-9)
            assert (close | ~apart_from_kinks(student, teacher, 1.0)).all()


# --- edge cases ------------------------------------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cells_that_do_not_count_contribute_exactly_nothing(backend: str, garbage: float, layout: str) -> None:
    student, teacher, target = logits(2, 6, 9, 40), logits(2, 6, 9, 40, seed=2), labels(2, 9, 40)
    target[0, 2:6] = 255  # whole blocks too
    ignored = (target == 255).unsqueeze(1)
    want = run(student, teacher, target, backend=backend)
    dirty = [strided_copy(torch.where(ignored, garbage, x), layout) for x in (student, teacher)]
    got = run(*dirty, target, backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)
    assert (got[1].movedim(1, -1)[target == 255] == 0).all()
    for upstream in (NAN, INF):
        leaf = dirty[0].detach().requires_grad_()
        (grad,) = torch.autograd.grad(
            jaccard_loss(leaf, dirty[1], target, backend=backend), leaf, torch.tensor(upstream)
        )
        assert (grad.movedim(1, -1)[target == 255] == 0).all()


@both_backends
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("garbage", [NAN, INF])
def test_nan_and_inf_at_a_cell_that_counts_are_never_hidden(backend: str, which: int, garbage: float) -> None:
    for classes in (2, 6, 20):
        for share in (True, False):
            both = [logits(2, classes, 3, 20), logits(2, classes, 3, 20, seed=2)]
            for x in both:
                x[:, -1] -= 100  # a class that the teacher does not see
            both[which][1, -1, 2, 19] = garbage
            target = torch.zeros(2, 3, 20, dtype=torch.uint8) if share else None
            assert run(*both, target, backend=backend)[0].isnan()
    tiny = [torch.zeros(1, 3, 1, 1), torch.zeros(1, 3, 1, 1)]  # no class is there at all
    assert run(*tiny, backend=backend)[0] == 0
    tiny[which][0, 1] = garbage
    assert run(*tiny, backend=backend)[0].isnan()


@both_backends
def test_absent_classes(backend: str) -> None:
    for classes in (3, 6, 20):
        student, teacher = (logits(2, classes, 3, 20, dtype=torch.float64, seed=seed) for seed in (0, 2))
        student[:, 1], teacher[:, 1] = -INF, -INF
        student[0, 0, 0, :7] = -INF  # in one network alone
        teacher[1, 2, 1, :9] = -INF
        got = run(student, teacher, backend=backend)
        torch.testing.assert_close(got, by_hand(student, teacher), rtol=1e-10, atol=1e-13)
        assert (got[1][:, 1] == 0).all() and got[1].isfinite().all()
    for x in (student, teacher):
        nothing = x.clone()
        nothing[1, :, 2, 3] = -INF  # every class: no distribution
        pair = (nothing, teacher) if x is student else (student, nothing)
        assert run(*pair, backend=backend)[0].isnan()


@both_backends
def test_equal_networks(backend: str) -> None:
    for dtype in FLOATS:
        for shape in ((2, 6, 9, 9), (1, 150, 5, 7), (3, 19)):
            x = logits(*shape, dtype=dtype)
            for layout in LAYOUTS:
                for target in (None, labels(shape[0], *shape[2:])):
                    loss, grad = run(strided_copy(x, layout), x, target, temperature=1.7, backend=backend)
                    assert loss == 0 and grad.isfinite().all() and grad.abs().max() == 0


@both_backends
@pytest.mark.parametrize("shape", [(2, 6, 8, 8), (0, 6, 8, 8), (2, 6, 0, 8), (0, 6)], ids=str)
def test_nothing_that_counts(backend: str, shape: tuple[int, ...]) -> None:
    student = torch.full(shape, NAN)
    target = torch.full((shape[0], *shape[2:]), 255)
    loss, grad = run(student, student, target, backend=backend)
    assert loss == 0 and (grad == 0).all() and grad.shape == shape
    if 0 in shape:
        assert run(student, student, backend=backend)[0] == 0
    if shape == (0, 6, 8, 8):  # an empty batch of other sizes
        loss, grad = run(student, torch.zeros(0, 6, 4, 16), torch.zeros(0, 16, 16, dtype=torch.uint8), backend=backend)
        assert loss == 0 and grad.shape == shape


@both_backends
def test_a_class_that_the_teacher_does_not_see_takes_no_part(backend: str) -> None:
    student, teacher = logits(1, 3, 4, 4, dtype=torch.float64), logits(1, 3, 4, 4, dtype=torch.float64, seed=2)
    teacher[:, 2] = -10.0
    student[:, 2] = 3.0
    q = teacher.softmax(1).sum((0, 2, 3))
    assert q[2] < 0.5 < q[:2].min()
    got = run(student, teacher, backend=backend)
    torch.testing.assert_close(got, by_hand(student, teacher), rtol=1e-10, atol=1e-13)
    p, q = student.softmax(1), teacher.softmax(1)
    iou = torch.minimum(p, q).sum((0, 2, 3)) / torch.maximum(p, q).sum((0, 2, 3))
    torch.testing.assert_close(got[0], 1 - iou[:2].mean())


@both_backends
@pytest.mark.parametrize("dtype", LABELS, ids=str)
@pytest.mark.parametrize("ignore_index", [0, -1, -100, 255, None])
def test_label_widths_and_ignore_patterns(backend: str, dtype: torch.dtype, ignore_index: int | None) -> None:
    student, teacher = (logits(2, 6, 5, 7, dtype=torch.float64, seed=seed) for seed in (0, 2))
    limits = torch.iinfo(dtype)
    target = torch.randint(0, 6, (2, 5, 7), generator=torch.Generator().manual_seed(3))
    target[0, :2] = 1 if ignore_index is None or not limits.min <= ignore_index <= limits.max else ignore_index
    target[1, 0] = -1 if limits.min < 0 else 255  # what another width may take for one another
    share = torch.ones(2, 5, 7) if ignore_index is None else target != ignore_index
    got = run(student, teacher, target.to(dtype), ignore_index=ignore_index, backend=backend)
    torch.testing.assert_close(got, by_hand(student, teacher, share), rtol=1e-10, atol=1e-13)


# --- properties ------------------------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    classes = draw(st.one_of(st.integers(2, 40), st.sampled_from([64, 65, 150, 300])))
    spatial = draw(st.lists(st.integers(1, 9), max_size=3))
    shape = (draw(st.integers(1, 5)), classes, *spatial)
    dtype, seed = draw(st.sampled_from(FLOATS)), draw(st.integers(0, 2**20))
    scale = 10.0 ** draw(st.integers(-2, 3))
    student, teacher = (logits(*shape, dtype=dtype, scale=scale, seed=seed + i) for i in (0, 1))
    ignored = draw(st.sampled_from([None, 0.0, 0.3, 1.0]))
    target = None if ignored is None else labels(shape[0], *spatial, classes=2, ignored=ignored, seed=seed)
    temperature = draw(st.sampled_from([0.3, 1.0, 2.0, 4.0]))
    return dict(student=student, teacher=teacher, target=target, temperature=temperature)


@needs_native
@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(LAYOUTS))
def test_property_the_error_rule(problem: dict[str, Any], layout: str) -> None:
    compare(**problem, layout=layout)


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_properties(backend: str, problem: dict[str, Any]) -> None:
    student, teacher, target = (problem[name] for name in ("student", "teacher", "target"))
    options = dict(temperature=problem["temperature"], ignore_index=255, backend=backend)
    loss, grad = run(student, teacher, target, **options)
    assert -1e-6 <= loss <= 1 + 1e-6 and grad.isfinite().all()
    # A softmax does not see what all classes share, so the gradient has none of it. Its terms are 4 / tau at most.
    double = run(student.double(), teacher.double(), target, **options)[1]
    assert (double.sum(1).abs() <= 1e-13 / problem["temperature"]).all()
    assert run(teacher, teacher, target, **options)[0] == 0
    shift = torch.randn(student[:, :1].shape, generator=torch.Generator().manual_seed(7)).double() * 3
    moved = jaccard_loss(student.double() + shift, teacher.double() - shift, target, **options)
    same = jaccard_loss(student.double(), teacher.double(), target, **options)
    torch.testing.assert_close(moved, same, rtol=1e-9, atol=1e-9)


# --- how it runs -----------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_same_bits_every_time_and_for_any_number_of_threads(layout: str) -> None:
    student, teacher = (strided_copy(logits(2, 19, 100, 96, seed=seed), layout) for seed in (0, 2))
    target = labels(2, 200, 192)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 2, 3):
            torch.set_num_threads(n)
            results.append(run(student, teacher, target, backend="native"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("needs_grad", [True, False])
def test_opcheck(dtype: torch.dtype, needs_grad: bool) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    teacher = logits(2, 5, 4, 6, dtype=dtype, seed=2)
    share = torch.rand(2, 4, 6, dtype=acc_dtype(teacher))
    temperature = torch.tensor([1.5], dtype=torch.float64)
    for layout in ("contiguous", "channels_last"):
        for v in (None, share):
            student = strided_copy(logits(2, 5, 4, 6, dtype=dtype), layout)
            op = torch.ops.dsct_kernels.jaccard.default
            backward = torch.ops.dsct_kernels.jaccard_backward.default
            leaf = student.clone().requires_grad_(needs_grad)
            torch.library.opcheck(op, (leaf, teacher, v, temperature), test_utils=checks)
            coefficients = op(student, teacher, v, temperature)[1]
            torch.library.opcheck(backward, (student, teacher, v, temperature, coefficients), test_utils=checks)


@both_backends
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(backend: str, dynamic: bool) -> None:
    def step(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return jaccard_loss(student, teacher, target, backend=backend) * 3

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for size in (8, 12) if dynamic else (8,):
        student, teacher, target = logits(2, 6, size, size), logits(2, 6, size, size, seed=2), labels(2, 24, 24)
        student.requires_grad_()
        got, want = compiled(student, teacher, target), step(student, teacher, target)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (got, want)), rtol=1e-4, atol=1e-7)


@both_backends
def test_values_are_not_constants_of_a_compiled_graph(backend: str) -> None:
    student, teacher, target = logits(2, 6, 8, 8).requires_grad_(), logits(2, 6, 8, 8, seed=2), labels(2, 8, 8)
    torch._dynamo.reset()
    frames = CompileCounterWithBackend("aot_eager")
    criterion = JaccardLoss(backend=backend)
    compiled = torch.compile(criterion, backend=frames, fullgraph=True)
    for i in range(6):
        criterion.temperature, criterion.ignore_index = 1 + 0.3 * i, i % 5
        want = jaccard_loss(student, teacher, target, temperature=1 + 0.3 * i, ignore_index=i % 5, backend=backend)
        torch.testing.assert_close(compiled(student, teacher, target), want)
        as_tensors = dict(temperature=torch.tensor(1 + 0.3 * i).double(), ignore_index=torch.tensor(i % 5))
        torch.testing.assert_close(jaccard_loss(student, teacher, target, **as_tensors, backend=backend), want)
    assert frames.frame_count <= 2


@needs_native
def test_autograd_as_anyone_may_use_it() -> None:
    student, teacher, target = logits(2, 6, 8, 8).requires_grad_(), logits(2, 6, 8, 8, seed=2), labels(2, 8, 8)
    before = [x.detach().clone() for x in (student, teacher, target)]
    teacher.requires_grad_()
    loss = jaccard_loss(student, teacher, target)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    first, again = first.clone(), torch.autograd.grad(loss, student, retain_graph=True)[0]
    assert torch.equal(first, again)
    upstream = torch.tensor([1.0, -2.0])
    (rows,) = torch.autograd.grad(loss, student, upstream, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(rows, upstream.view(2, 1, 1, 1, 1) * first)
    loss.backward()
    assert teacher.grad is None and all(torch.equal(a, b) for a, b in zip((student, teacher, target), before))
    (grad,) = torch.autograd.grad(jaccard_loss(student, teacher), student, create_graph=True)
    with pytest.raises(RuntimeError, match="jaccard_loss has a first derivative only"):
        grad.sum().backward()
    assert jaccard_loss(student.detach(), teacher.detach()).requires_grad is False
    assert torch.func.grad(lambda x: jaccard_loss(x, teacher))(student.detach()).isfinite().all()
    kept = [x for x in jaccard_loss(student, teacher).grad_fn.saved_tensors if x is not None]
    assert {x.data_ptr() for x in kept if x.numel() > 64} == {student.data_ptr(), teacher.data_ptr()}


def test_module_and_defaults() -> None:
    student, teacher, target = logits(2, 6, 8, 8), logits(2, 6, 8, 8, seed=2), labels(2, 8, 8)
    want = jaccard_loss(student, teacher, target)
    assert torch.equal(JaccardLoss()(student, teacher, target), want)
    assert repr(JaccardLoss(temperature=2.0)) == "JaccardLoss(temperature=2.0, ignore_index=255, backend='auto')"
    with pytest.raises(ValueError, match="temperature: expected a finite number > 0, got 0"):
        JaccardLoss(temperature=0)
    assert want.dtype == torch.float32 and jaccard_loss(student, teacher.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(student_logits=1), TypeError, "student_logits: expected a Tensor, got int"),
        (dict(student_logits=torch.ones(2, 6, 8, 8, dtype=torch.int32)), TypeError, "student_logits: expected dtype"),
        (dict(teacher_logits=torch.ones(2, 5, 8, 8)), ValueError, "teacher_logits: expected the batch, classes"),
        (dict(student_logits=torch.ones(2, 6, 8), teacher_logits=torch.ones(2, 6, 9), target=None), ValueError,
         "teacher_logits: expected the size of student_logits"),
        (dict(teacher_logits=torch.ones(2, 6, 0, 8), target=None), ValueError, "an empty map has no average"),
        (dict(student_logits=torch.ones(2, 1, 8, 8), teacher_logits=torch.ones(2, 1, 8, 8)), ValueError, "at least 2"),
        (dict(target=torch.zeros(2, 8, 8)), TypeError, "target: expected dtype uint8"),
        (dict(target=torch.zeros(2, 8, 7, dtype=torch.long)), ValueError,
         r"target: expected shape \(2, 8, 8\) or larger, .*, got \(2, 8, 7\)"),
        (dict(target=torch.zeros(3, 8, 8, dtype=torch.long)), ValueError, "target: expected shape"),
        (dict(temperature=-1.0), ValueError, "temperature: expected a finite number > 0, got -1.0"),
        (dict(temperature="1"), TypeError, "temperature: expected a number, got str"),
        (dict(ignore_index=0.5), TypeError, "ignore_index: expected an int or None, got float"),
        (dict(backend="cuda"), ValueError, "backend: expected one of"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = dict(student_logits=logits(2, 6, 8, 8), teacher_logits=logits(2, 6, 8, 8), target=labels(2, 8, 8))
    with pytest.raises(error, match=message):
        jaccard_loss(**{**good, **change})


def test_with_many_classes_ignore_index_has_to_be_given() -> None:
    student, teacher = logits(1, 300, 3, 3), logits(1, 300, 3, 3, seed=2)
    target = torch.full((1, 3, 3), 255)
    with pytest.raises(ValueError, match="ignore_index: with 300 classes the default, 255, is a class"):
        jaccard_loss(student, teacher, target)
    assert jaccard_loss(student, teacher, target, ignore_index=255) == 0


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(student=logits(2, 6, 3).int()), "student_logits: expected dtype"),
        (dict(teacher=logits(2, 5, 3)), "teacher_logits: expected the shape of student_logits"),
        (dict(share=torch.ones(2, 4)), "share: expected a contiguous"),
        (dict(share=torch.ones(2, 3, dtype=torch.float64)), "share: expected a contiguous"),
        (dict(temperature=torch.zeros(1, dtype=torch.float64)), "temperature: expected a finite number > 0"),
        (dict(temperature=torch.ones(2, dtype=torch.float64)), "temperature: expected a contiguous"),
    ],
    ids=str,
)
def test_what_the_ops_refuse(change: dict[str, Tensor], message: str) -> None:
    good: dict[str, Any] = dict(
        student=logits(2, 6, 3), teacher=logits(2, 6, 3), share=None, temperature=torch.ones(1, dtype=torch.float64)
    )
    arguments = tuple({**good, **change}.values())
    with pytest.raises(ValueError, match=message):
        torch.ops.dsct_kernels.jaccard(*arguments)
    with pytest.raises(ValueError, match=message):
        torch.ops.dsct_kernels.jaccard_backward(*arguments, torch.ones(2, 6, dtype=torch.float64))
    for wrong in (torch.ones(2, 5, dtype=torch.float64), torch.ones(2, 6)):
        with pytest.raises(ValueError, match=r"coefficients: expected a contiguous \(2, 6\) tensor of float64"):
            torch.ops.dsct_kernels.jaccard_backward(*good.values(), wrong)


def test_the_kernels_say_where_they_do_not_run() -> None:
    from dsct_kernels.jaccard import native

    if backends.NATIVE_MISSING is None:
        assert native.why_not(torch.zeros(1, device="meta")) == (
            "the native kernels of jaccard run on cpu alone so far, not on meta"
        )
