"""kd_loss: plain per-pixel KD by the kernels of TNKD, against F.kl_div of the whole softmax in float64."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dsct_kernels import KDLoss, backends, kd_loss, tnkd_loss
from dsct_kernels.distill import rivals
from dsct_kernels.selftest import relative_error

from ..helpers import LAYOUTS, pairs, skip_unless_tnkd_serves, strided_copy
from ..oracle import assert_as_good_as_reference

INF, NAN = float("inf"), float("nan")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")
needs_native = pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))


def logits(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 3.0, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def labels(*shape: int, classes: int, ignored: float = 0.2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, shape, generator=generator)
    y[torch.rand(shape, generator=generator) < ignored] = 255
    return y


def at_size(x: Tensor, size: Any, align_corners: bool) -> Tensor:
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


def formula(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    reduction: str = "mean",
    align_corners: bool = False,
) -> Tensor:
    """tau^2 KL(softmax(z^T / tau) || softmax(z^S / tau)) with F.kl_div, in the dtype that comes in."""
    size = target.shape[1:] if target is not None else torch.Size(map(max, student.shape[2:], teacher.shape[2:]))
    log_s, log_t = (at_size(x, size, align_corners).div(temperature).log_softmax(1) for x in (student, teacher))
    absent = log_t == -INF  # 0 log 0 = 0
    pixels = F.kl_div(log_s.masked_fill(absent, 0), log_t.masked_fill(absent, 0), reduction="none", log_target=True)
    pixels = temperature**2 * pixels.masked_fill(absent, 0).sum(1)
    if target is not None:
        pixels = pixels.masked_fill(target == 255, 0)
    if reduction == "mean":
        return pixels.sum() / (pixels.numel() if target is None else int((target != 255).sum()))
    return pixels if reduction == "none" else pixels.sum()


def upstream(loss: Tensor) -> Tensor:
    """What comes in: for each pixel of a map of either sign."""
    if loss.dim() == 0:
        return torch.ones_like(loss)
    return torch.randn(loss.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(loss)


def run(loss: Any, student: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """(loss, gradient)"""
    leaf = student.detach().requires_grad_()
    value = loss(leaf, *rest, **options)
    return value.detach(), torch.autograd.grad(value, leaf, upstream(value))[0]


def compare(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    backend: str,
    layout: str = "contiguous",
    **options: Any,
) -> None:
    """The error rule on loss and gradient, against F.kl_div in float64."""
    wide = {torch.float64: torch.float64}.get(student.dtype, torch.float32)
    truth = run(formula, student.double(), teacher.double(), target, **options)
    same = run(kd_loss, student.to(wide), teacher.to(wide), target, backend="reference", **options)
    given = strided_copy(student, layout), strided_copy(teacher, layout), target
    got = run(kd_loss, *given, backend=backend, **options)
    assert got[0].dtype == wide and got[1].dtype == student.dtype
    assert layout == "sliced" or got[1].stride() == given[0].stride()
    pixels = got[0].numel() ** 0.5 if got[0].dim() else {"mean": 1, "sum": student[:, 0].numel()}[options["reduction"]]
    floor = 3 * torch.finfo(wide).eps * options["temperature"] ** 2 * pixels
    what = f"{tuple(student.shape)} {student.dtype} {layout} {options}"
    assert_as_good_as_reference(got[0], same[0], truth[0], f"loss of {what}", floor=floor)
    extra = 1e-6 + (0 if student.dtype == wide else torch.finfo(student.dtype).eps)
    assert_as_good_as_reference(got[1], same[1], truth[1], f"gradient of {what}", extra=extra)


SHAPES = [(2, 6, 16, 24), (2, 19, 13, 11), (1, 150, 8, 9), (1, 48, 5, 21), (70, 21), (1, 2, 333), (2, 3, 2, 3, 4)]


@needs_native
@pytest.mark.parametrize(
    "shape,dtype,layout,temperature,reduction,labelled",
    pairs(SHAPES, FLOATS, LAYOUTS, (0.5, 1.0, 4.0), REDUCTIONS, (True, False)),
    ids=str,
)
def test_shapes_dtypes_layouts(
    shape: Any, dtype: torch.dtype, layout: str, temperature: float, reduction: str, labelled: bool
) -> None:
    student, teacher = logits(*shape, dtype=dtype), logits(*shape, dtype=dtype, seed=2)
    target = labels(shape[0], *shape[2:], classes=shape[1]) if labelled else None
    compare(student, teacher, target, "native", layout, temperature=temperature, reduction=reduction)


# classes, student, teacher, labels
SIZES = [(6, (5, 7), (5, 7), (20, 28)), (19, (4, 5), (8, 3), (9, 23)), (150, (6, 6), (3, 4), (12, 13)),
         (2, (4, 4), (16, 16), (16, 16)), (6, (16, 20), (5, 5), (16, 20))]  # fmt: skip


@needs_native
@pytest.mark.parametrize(
    "sizes,dtype,layout,temperature,reduction,labelled,align",
    pairs(SIZES, FLOATS, LAYOUTS, (1.0, 4.0), REDUCTIONS, (True, False), (False, True)),
    ids=str,
)
def test_low_resolution_logits_are_read_as_they_are(
    sizes: Any, dtype: torch.dtype, layout: str, temperature: float, reduction: str, labelled: bool, align: bool
) -> None:
    classes, size_s, size_t, size = sizes
    student, teacher = logits(2, classes, *size_s, dtype=dtype), logits(2, classes, *size_t, dtype=dtype, seed=2)
    target = labels(2, *size, classes=classes) if labelled else None
    options: dict[str, Any] = dict(temperature=temperature, reduction=reduction, align_corners=align)
    compare(student, teacher, target, "native", layout, **options)


@pytest.mark.parametrize("classes", [2, 5, 33])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_backend(device: str, backend: str, classes: int, reduction: str) -> None:
    student, teacher, target = (
        logits(2, classes, 3, 4),
        logits(2, classes, 3, 4, seed=2),
        labels(2, 3, 4, classes=classes),
    )
    small = logits(2, classes, 2, 2, seed=3)
    for t, y in ((teacher, target), (teacher, None), (small, target)):
        options: dict[str, Any] = dict(temperature=2.0, reduction=reduction)
        got = run(
            kd_loss, student.to(device), t.to(device), None if y is None else y.to(device), backend=backend, **options
        )
        want = run(formula, student.double(), t.double(), y, **options)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.cpu().double(), b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_it_is_the_target_term_and_the_others_share_of_the_non_target_term(
    device: str, backend: str, temperature: float
) -> None:
    """KD = TCKD + (1 - b^T) NCKD at every pixel, whatever its label (Zhao et al. 2022)."""
    student, teacher, target = (
        x.to(device) for x in (logits(2, 7, 5, 4), logits(2, 7, 5, 4, seed=2), labels(2, 5, 4, classes=7))
    )
    options: dict[str, Any] = dict(temperature=temperature, reduction="none", backend=backend)
    tckd = tnkd_loss(student, teacher, target, alpha=1.0, beta=0.0, **options)
    nckd = tnkd_loss(student, teacher, target, alpha=0.0, beta=1.0, **options)
    b = (teacher / temperature).softmax(1).gather(1, target.where(target != 255, 0).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(
        kd_loss(student, teacher, target, **options), tckd + (1 - b) * nckd, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("size", [(12, 10), (24, 20)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_it_is_the_published_formula_of_the_rivals(size: tuple[int, int], temperature: float) -> None:
    student, teacher, target = logits(2, 6, 12, 10), logits(2, 6, 6, 5, seed=2), labels(2, *size, classes=6)
    got = run(kd_loss, student, teacher, target, temperature=temperature)
    want = run(rivals.kd, student, teacher, target, temperature=temperature)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


# --- the edge cases of the specification ---


@needs_native
@pytest.mark.parametrize(
    "dtype,magnitude",
    [(torch.float32, 1e4), (torch.bfloat16, 1e4), (torch.float16, 6e4), (torch.float64, 1e6)],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.01, 1.0, 7.0])
@pytest.mark.parametrize("small", [False, True])
def test_extreme_magnitudes(dtype: torch.dtype, magnitude: float, temperature: float, small: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (((torch.rand(2, 6, 8, 8, generator=generator) * 2 - 1) * magnitude).to(dtype) for _ in range(2))
    target = labels(2, 16, 16, classes=6) if small else labels(2, 8, 8, classes=6)
    compare(student, teacher, target, "native", temperature=temperature, reduction="mean")
    for y in (target, None):
        loss, grad = run(kd_loss, student, teacher, y, temperature=temperature)
        assert loss.isfinite() and grad.isfinite().all()


@needs_native
@pytest.mark.parametrize("margin", [0.0, 15.0, 40.0, 60.0])
@pytest.mark.parametrize("labelled", [False, True])
def test_what_a_sure_teacher_leaves_has_its_digits(margin: float, labelled: bool) -> None:
    """Where both networks are sure the loss is exp(-margin) times something: a difference of logs would have none."""
    student, teacher = logits(1, 6, 8, 8, scale=1.0), logits(1, 6, 8, 8, scale=1.0, seed=2)
    target = labels(1, 8, 8, classes=6, ignored=0)
    sure = F.one_hot(target, 6).movedim(-1, 1) * margin
    student, teacher = student + sure, teacher + sure
    truth = run(to_the_last_digit, student.double(), teacher.double())
    got = run(kd_loss, student, teacher, target if labelled else None, reduction="sum")
    assert relative_error(got[0], truth[0]) < 1e-5 and relative_error(got[1], truth[1]) < 1e-5


def to_the_last_digit(student: Tensor, teacher: Tensor) -> Tensor:
    """The sum of KL, which loses nothing where both are sure: log-softmax by log1p of what the largest class leaves."""

    def log_p(z: Tensor) -> Tensor:
        top = z.argmax(1, keepdim=True)
        rest = (z - z.gather(1, top)).exp().scatter(1, top, 0).sum(1, keepdim=True)
        return z - z.gather(1, top) - rest.log1p()

    a, b = log_p(teacher), log_p(student)
    # sum p = 1 in both: p^T log(p^T / p^S) - p^T + p^S, of which no term cancels against another
    return (a.exp() * ((b - a).expm1() - (b - a))).sum()


@pytest.mark.parametrize("classes,temperature", [(2, 2.0), (4, 1.0)])
def test_absent_classes(device: str, backend: str, classes: int, temperature: float) -> None:
    """-inf in both: as if the class were not there. In the teacher alone: 0 log 0. In the student alone: inf, and still
    tau (p^S - p^T). Whatever the label is."""
    student, teacher = logits(3, classes + 1, 4, 2), logits(3, classes + 1, 4, 2, seed=2)
    student[0, 1] = teacher[0, 1] = -INF
    teacher[1, 1] = -INF
    student[2, 0] = -INF
    p_s, p_t = ((x.double() / temperature).softmax(1) for x in (student, teacher))
    options: dict[str, Any] = dict(temperature=temperature, reduction="none", backend=backend)
    want = formula(student.double(), teacher.double(), temperature=temperature, reduction="none")
    without = torch.cat([torch.cat([x[:1, :1], x[:1, 2:]], 1) for x in (student, teacher)]).double()
    torch.testing.assert_close(want[:1], formula(without[:1], without[1:], temperature=temperature, reduction="none"))
    assert want[:2].isfinite().all() and (want[2] == INF).all()
    for target in (None, *(torch.full((3, 4, 2), k) for k in range(classes + 1))):
        y = None if target is None else target.to(device)
        leaf = student.to(device).requires_grad_()
        loss = kd_loss(leaf, teacher.to(device), y, **options)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        torch.testing.assert_close(loss.detach().cpu().double(), want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad.cpu().double(), temperature * (p_s - p_t), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("small", [False, True])
def test_a_certain_teacher_is_cross_entropy(device: str, backend: str, small: bool) -> None:
    student = logits(2, 5, 4, 4).to(device)
    sure = torch.randint(0, 5, (2, 4, 4), generator=torch.Generator().manual_seed(3)).to(device)
    teacher = torch.full((2, 5, 4, 4), -INF, device=device).scatter_(1, sure.unsqueeze(1), 2.0)
    if small:  # the larger of the two sizes, where a cell that has a part brings all its classes
        teacher, sure = teacher[:, :, :1, :1], sure[:, :1, :1].expand(2, 4, 4)
    got, grad = run(kd_loss, student, teacher, backend=backend)
    want, want_grad = run(F.cross_entropy, student, sure)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
@pytest.mark.parametrize("small", [False, True])
def test_ignored_pixels_add_nothing_and_a_valid_nan_shows(
    device: str, backend: str, garbage: float, small: bool
) -> None:
    student, teacher = logits(2, 6, 4, 40), logits(2, 6, 4, 40, seed=2)
    target = labels(2, 4, 40, classes=6)
    if small:
        target = target.repeat_interleave(2, 1).repeat_interleave(2, 2)
        target[:, :, :20] = 255
    else:
        target[:, :, :9] = 255
    dirty = [x.clone() for x in (student, teacher)]
    for x in dirty:
        x[:, :, :, :8] = garbage
    student, teacher, target, *dirty = (x.to(device) for x in (student, teacher, target, *dirty))
    want = run(kd_loss, student, teacher, target, temperature=2.0, backend=backend)
    got = run(kd_loss, *dirty, target, temperature=2.0, backend=backend)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert not got[1][..., :8].any()
    if garbage > -INF:
        cases = [(which, k, labelled) for labelled in (True, False) for which in (0, 1) for k in (0, 5)]
        for which, k, labelled in cases if backend != "triton" else cases[1::5]:  # whose interpreter is slow
            both = [student.clone(), teacher.clone()]
            both[which][1, k, 2, 39] = garbage
            y = target.clone()
            y[1, 2 * (1 + small), 39 * (1 + small)] = 3
            assert kd_loss(*both, y if labelled else None, backend=backend).isnan()


@pytest.mark.parametrize("shape", [(2, 6, 8, 8), (0, 6, 8, 8), (2, 6, 0, 8), (0, 6)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_valid(device: str, backend: str, shape: tuple[int, ...], reduction: str) -> None:
    student = torch.full(shape, NAN, device=device)
    target = torch.full((shape[0], *shape[2:]), 255, device=device)
    loss, grad = run(kd_loss, student, student, target, reduction=reduction, backend=backend)
    assert (loss == 0).all() and (grad == 0).all() and grad.shape == shape


@needs_native
def test_small_float16_gradients_survive_until_they_are_scaled() -> None:
    student, teacher = (logits(2, 19, 64, 64, dtype=torch.float16, scale=0.1, seed=seed) for seed in (0, 2))
    for size in (64, 128):
        target = labels(2, size, size, classes=19)
        leaf = student.clone().requires_grad_()
        (2.0**14 * kd_loss(leaf, teacher, target)).backward()
        _, truth = run(formula, student.double(), teacher.double(), target)
        assert relative_error(leaf.grad.double() / 2**14, truth) < 2**-10


# --- properties ---


@needs_native
@settings(deadline=None, max_examples=40)
@given(st.data())
def test_properties(data: st.DataObject) -> None:
    draw = data.draw
    classes, pixels, seed = draw(st.integers(2, 70)), draw(st.integers(1, 40)), draw(st.integers(0, 2**31))
    temperature = draw(st.sampled_from([0.1, 1.0, 2.0, 5.0]))
    scale, layout = draw(st.sampled_from([0.1, 3.0, 50.0])), draw(st.sampled_from(LAYOUTS))
    student, teacher = (strided_copy(logits(2, classes, pixels, scale=scale, seed=seed + i), layout) for i in (0, 1))
    target = labels(2, pixels, classes=classes, seed=seed)
    options: dict[str, Any] = dict(temperature=temperature, reduction="none")
    loss, grad = run(kd_loss, student, teacher, target, **options)
    close: dict[str, Any] = dict(rtol=2e-5, atol=4e-6 * temperature**2)

    want = run(formula, student.double(), teacher.double(), target, **options)
    torch.testing.assert_close(loss.double(), want[0], **close)
    torch.testing.assert_close(grad.double(), want[1], rtol=1e-4, atol=2e-5 * temperature)
    assert (loss >= -4e-6 * temperature**2).all()
    # whatever the label, and whichever way the classes are numbered
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    back = torch.empty_like(order).scatter_(0, order, torch.arange(classes))
    renumbered = torch.where(target == 255, 255, back[target.clamp(max=classes - 1)])
    other = torch.where(target == 255, 255, (target + 1) % classes)
    for s, t, y in ((student[:, order], teacher[:, order], renumbered), (student, teacher, other)):
        torch.testing.assert_close(kd_loss(s, t, y, **options), loss, **close)
    everywhere = kd_loss(student, teacher, **options)
    torch.testing.assert_close(everywhere.masked_fill(target == 255, 0), loss, **close)
    same, none = run(kd_loss, student, student, target, **options)
    assert same.abs().max() <= 1e-6 * temperature**2 and none.abs().max() <= 1e-6 * temperature


# --- as a function of torch ---


def test_gradcheck(device: str, backend: str) -> None:
    student, teacher = (logits(1, 3, 2, 2, dtype=torch.float64, seed=s).to(device) for s in (0, 2))
    student.requires_grad_()
    skip_unless_tnkd_serves(backend, student)
    if backend == "triton" and device == "cpu":
        pytest.skip("minutes under the interpreter; its float64 gradients are compared with the reference's elsewhere")
    for size in ((2, 2), (3, 5)):
        target = labels(1, *size, classes=3).to(device)
        for reduction in REDUCTIONS:
            options: dict[str, Any] = dict(temperature=1.5, reduction=reduction, backend=backend)
            assert torch.autograd.gradcheck(lambda x: kd_loss(x, teacher, target, **options), (student,))  # noqa: B023
            assert torch.autograd.gradcheck(lambda x: kd_loss(x, teacher, **options), (student,))  # noqa: B023


@needs_native
def test_one_graph_serves_every_temperature_and_number_of_items() -> None:
    student, teacher, target = (
        logits(2, 5, 4, 4).requires_grad_(),
        logits(2, 5, 4, 4, seed=2),
        labels(2, 8, 8, classes=5),
    )
    step = lambda tau, items: kd_loss(student, teacher, target, temperature=tau, num_items=items)  # noqa: E731
    torch._dynamo.reset()
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=frames, fullgraph=True)
    for i in range(4):
        given = torch.tensor(1 + 0.5 * i), torch.tensor(20 + i)
        got, want = compiled(*given), step(1 + 0.5 * i, 20 + i)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (got, want)))
    assert frames.frame_count == 1


def test_micro_batches_divided_by_their_common_count_add_up(device: str, backend: str) -> None:
    student, teacher, target = (
        x.to(device) for x in (logits(3, 5, 4, 4), logits(3, 5, 4, 4, seed=2), labels(3, 4, 4, classes=5))
    )
    target[0, :3] = 255
    want = kd_loss(student, teacher, target, backend=backend)
    items = (target != 255).sum()
    parts = [kd_loss(student[i : i + 1], teacher[i : i + 1], target[i : i + 1], num_items=items, backend=backend)
             for i in range(3)]  # fmt: skip
    torch.testing.assert_close(sum(parts), want)


@needs_native
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_names_kd(reduction: str) -> None:
    for size in ((4, 4), (8, 8)):
        leaf = logits(2, 5, 4, 4).requires_grad_()
        loss = kd_loss(leaf, logits(2, 5, 4, 4, seed=2), labels(2, *size, classes=5), reduction=reduction)
        (grad,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="kd_loss has a first derivative only"):
            grad.sum().backward()


def test_the_module_is_the_function() -> None:
    student, teacher, target = logits(2, 5, 4, 4), logits(2, 5, 4, 4, seed=2), labels(2, 4, 4, classes=5)
    module = KDLoss(temperature=3.0, ignore_index=1, reduction="sum")
    target = target.clamp(max=4)
    assert torch.equal(
        module(student, teacher, target),
        kd_loss(student, teacher, target, temperature=3.0, ignore_index=1, reduction="sum"),
    )
    assert "temperature=3.0" in repr(module)
    assert torch.equal(KDLoss()(student, teacher, target, num_items=7), kd_loss(student, teacher, target, num_items=7))


def test_what_does_not_fit_is_named() -> None:
    student, teacher, target = logits(2, 5, 4, 4), logits(2, 5, 4, 4, seed=2), labels(2, 4, 4, classes=5)
    for bad in (0, -1.0, NAN, INF):
        with pytest.raises(ValueError, match="temperature: expected a finite number > 0"):
            kd_loss(student, teacher, target, temperature=bad)
        with pytest.raises(ValueError, match="temperature"):
            KDLoss(temperature=bad)
    with pytest.raises(ValueError, match="target: label 7 at position"):
        kd_loss(student, teacher, torch.full_like(target, 7))
    with pytest.raises(ValueError, match="reduction: expected"):
        kd_loss(student, teacher, target, reduction="avg")
    wide = logits(4, 300)
    with pytest.raises(ValueError, match="ignore_index"):
        kd_loss(wide, wide, torch.zeros(4, dtype=torch.long))
    assert math.isfinite(kd_loss(wide, wide.flip(0)))  # without labels nothing is ignored
