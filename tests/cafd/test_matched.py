"""Matched CAFD: the kernels against the reference, both against the formula, and every edge from first principles."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dsct_kernels import MatchedCAFDLoss, backends, matched_cafd_loss
from dsct_kernels.dtypes import acc_dtype

from ..helpers import before_a_forbidden_page, pairs
from ..oracle import assert_as_good_as_reference, learnt, relative_error, three
from .test_native import FLOATS, LAYOUTS, features, laid_out

INF, NAN = float("inf"), float("nan")
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
SERVING = ["reference"] + ([] if backends.NATIVE_MISSING else ["native"])
each_backend = pytest.mark.parametrize("backend", SERVING)
needs_native = pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))
two_layouts = pytest.mark.parametrize("layout", ("contiguous", "channels_last"))


def run(
    student: Tensor, teacher: Tensor, backend: str = "auto", upstream: Tensor | float = 1.0, **options: Any
) -> tuple[Tensor, Tensor]:
    """(loss, gradient)."""
    loss_of = partial(matched_cafd_loss, teacher_logits=teacher, backend=backend, **options)
    return learnt(loss_of, student, lambda loss: torch.ones_like(loss) * upstream)


def compare(
    student: Tensor, teacher: Tensor, layout: str = "contiguous", backend: str = "native", **options: Any
) -> None:
    """The error rule, on loss and gradient.

    The reference may hit a number by luck. What is always allowed: two roundings of 1, of which KL is a difference
    where the networks are near each other; and what two roundings of the temperature do, and one of
    the channels' strength, which is a lot where the temperatures are small.
    """
    student, teacher = laid_out(student, layout), laid_out(teacher, layout)
    got, same, truth = three(run, student, teacher, backend, **options)
    what = f"of {tuple(student.shape)} {student.dtype} {layout} {options}"
    acc = acc_dtype(student, teacher)
    assert got[0].dtype == acc and got[1].dtype == student.dtype
    floor = 2 * torch.finfo(acc).eps * options.get("temperature", 4.0) ** 2
    if options.get("reduction") in ("sum", "none"):
        floor *= len(student)
    eps = torch.finfo(acc).eps
    beside = {"temperature": options.get("temperature", 4.0) * (1 + 2 * eps)}
    tau_c = options.get("channel_temperature", 1.0)
    strength = 0.0 if tau_c is None else eps / tau_c  # one rounding of r_c, of size 1, in the exponent of w
    moved = run(student.double(), teacher.double(), backend="reference", **{**options, **beside})
    for name, absolute, *numbers in zip(("loss", "gradient"), (floor, 1e-12), got, same, truth, moved, strict=True):
        extra = 1e-6 + strength + (relative_error(numbers[3], numbers[2]) if numbers[2].isfinite().all() else 0)
        assert_as_good_as_reference(*numbers[:3], f"{name} {what}", extra, absolute)


def cwd(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """Channel-wise distillation as its authors wrote it, per sample: the mean over channels of tau^2 KL."""
    n, c = student.shape[:2]
    q = F.log_softmax(student.reshape(n * c, -1) / tau, -1)
    p = F.softmax(teacher.reshape(n * c, -1) / tau, -1)
    return F.kl_div(q, p, reduction="none").sum(-1).view(n, c).sum(1) * tau**2 / c


# --- the formula ---


@each_backend
@two_layouts
def test_without_a_channel_temperature_it_is_cwd(backend: str, layout: str) -> None:
    student, teacher = (laid_out(features(3, 6, 8, 9, scale=3, seed=i), layout) for i in range(2))
    leaf = student.double().requires_grad_()
    want = cwd(leaf, teacher.double(), 2.5)
    options = dict(channel_temperature=None, temperature=2.5, backend=backend)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        s, t = student.to(dtype), teacher.to(dtype)
        for reduction, value in (("none", want), ("mean", want.mean()), ("sum", want.sum())):
            got, grad = run(s, t, reduction=reduction, **options)
            (wanted,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
            torch.testing.assert_close(got.double(), value.detach(), rtol=tolerance, atol=0)
            torch.testing.assert_close(grad.double(), wanted, rtol=10 * tolerance, atol=tolerance)


@each_backend
@two_layouts
def test_channels_weigh_what_they_do_in_the_teachers_attention_map(backend: str, layout: str) -> None:
    student, teacher = (laid_out(features(2, 5, 4, 6, dtype=torch.float64, seed=i), layout) for i in range(2))
    for tau_c in (0.2, 1.0, 7.0):
        g = teacher.abs().mean((2, 3))
        w = (g / g.mean(1, keepdim=True) / tau_c).softmax(1)
        want = sum(
            w[:, c] * cwd(student[:, c : c + 1], teacher[:, c : c + 1], 4.0)
            for c in range(5)  # one channel at a time
        )
        got = matched_cafd_loss(student, teacher, channel_temperature=tau_c, reduction="none", backend=backend)
        torch.testing.assert_close(got, want)


@each_backend
def test_the_gradient_is_tau_w_times_the_difference(backend: str) -> None:
    student, teacher = (features(2, 5, 4, 6, dtype=torch.float64, seed=i) for i in range(2))
    grad = run(student, teacher, temperature=3.0, channel_temperature=None, reduction="sum", backend=backend)[1]
    p_s, p_t = ((x.flatten(2) / 3).softmax(-1).view_as(x) for x in (student, teacher))
    torch.testing.assert_close(grad, 3.0 / 5 * (p_s - p_t))


@each_backend
@pytest.mark.parametrize("channel_temperature", (0.5, None))
@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
@two_layouts
def test_gradcheck(backend: str, channel_temperature: float | None, reduction: str, layout: str) -> None:
    student, teacher = (laid_out(features(2, 5, 3, 5, dtype=torch.float64, seed=i), layout) for i in range(2))
    options = dict(channel_temperature=channel_temperature, temperature=0.7, reduction=reduction, backend=backend)
    assert torch.autograd.gradcheck(lambda s: matched_cafd_loss(s, teacher, **options), student.requires_grad_())
    larger = features(2, 5, 4, 3, dtype=torch.float64, seed=2)
    assert torch.autograd.gradcheck(lambda s: matched_cafd_loss(s, larger, **options), student)


@each_backend
def test_sizes_meet_at_the_smaller_of_each_axis(backend: str) -> None:
    for dtype in FLOATS:
        student, teacher = features(2, 5, 13, 6, dtype=dtype), features(2, 5, 9, 8, dtype=dtype, seed=1)
        acc = acc_dtype(student)
        leaf = student.detach().requires_grad_()
        pooled = [F.adaptive_avg_pool2d(x.to(acc), (9, 6)) for x in (leaf, teacher)]
        want = matched_cafd_loss(*pooled, backend=backend)
        got, grad = run(student, teacher, backend=backend)
        torch.testing.assert_close(got, want.detach())
        torch.testing.assert_close(grad, torch.autograd.grad(want, leaf)[0])
        assert grad.dtype == dtype


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 3),
    channels=st.integers(1, 70),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    layout=st.sampled_from(LAYOUTS),
    scale=st.sampled_from((0.0, 1e-3, 1.0, 30.0)),
    tau=st.sampled_from((0.5, 1.0, 4.0)),
    channel_temperature=st.sampled_from((0.05, 1.0, None)),
    backend=st.sampled_from(SERVING),
    seed=st.integers(0, 2**16),
)
def test_what_holds_for_any_maps(
    n: int,
    channels: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    layout: str,
    scale: float,
    tau: float,
    channel_temperature: float | None,
    backend: str,
    seed: int,
) -> None:
    student, teacher = (
        laid_out(features(n, channels, *size, dtype=dtype, scale=scale, seed=seed + i), layout) for i in range(2)
    )
    options = dict(temperature=tau, channel_temperature=channel_temperature, reduction="none", backend=backend)
    eps = torch.finfo(dtype).eps
    loss, grad = run(student, teacher, **options)
    assert (loss >= -8 * eps * tau**2).all()
    assert (grad.flatten(2).sum(-1).abs() <= 16 * eps * tau).all()  # both distributions sum to 1
    shift = torch.randn(n, channels, 1, 1, generator=torch.Generator().manual_seed(seed)).to(dtype)
    moved, moved_grad = run(student + shift, teacher, **options)
    tolerance = 64 * eps * max(1.0, scale) / tau
    torch.testing.assert_close(moved, loss, rtol=tolerance, atol=tolerance * tau**2)
    torch.testing.assert_close(moved_grad, grad, rtol=tolerance, atol=tolerance * tau)
    loss, grad = run(teacher, teacher, **options)
    assert loss.abs().max() <= 8 * eps * tau**2 and grad.abs().max() <= 8 * eps * tau
    if backend == "native":
        assert not loss.any() and not grad.any()
    if channel_temperature is None:
        want = cwd(student.double(), teacher.double(), tau)
        got = matched_cafd_loss(student, teacher, **options).double()
        torch.testing.assert_close(got, want, rtol=64 * eps * max(1.0, scale), atol=8 * eps * tau**2)


# --- the error rule ---

# (N, C, H, W): whole vectors and none, fewer channels than lanes, one channel, more than a tile of them, one position,
# one class more than a power of two, several blocks in either direction, rows that end inside a vector.
SHAPES = [
    (2, 64, 16, 16),
    (2, 37, 7, 9),
    (3, 6, 65, 67),
    (1, 1, 130, 131),
    (2, 19, 50, 51),
    (1, 150, 33, 34),
    (1, 300, 17, 19),
    (2, 4099, 3, 3),
    (3, 20, 1, 1),
    (2, 1, 1, 1),
    (1, 65, 41, 1),
    (1, 2, 1, 2050),
]


@needs_native
@pytest.mark.parametrize(("shape", "dtype", "layout"), pairs(SHAPES, FLOATS, LAYOUTS), ids=str)
def test_shapes_dtypes_layouts(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    student, teacher = features(*shape, dtype=dtype, scale=2), features(*shape, dtype=dtype, scale=2, seed=1)
    compare(student, teacher, layout, temperature=1.0)
    compare(student, teacher, layout, temperature=1.0, channel_temperature=None, reduction="none")
    near = (student + 0.1 * teacher).to(dtype)
    compare(student, near, layout, reduction="sum")


@needs_native
@pytest.mark.parametrize("temperature", (0.01, 0.3, 1.0, 10.0))
@pytest.mark.parametrize("channel_temperature", (0.01, 0.3, 10.0, None))
@two_layouts
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_temperatures(temperature: float, channel_temperature: float | None, layout: str, dtype: torch.dtype) -> None:
    student, teacher = features(3, 21, 12, 13, dtype=dtype), features(3, 21, 12, 13, dtype=dtype, seed=1)
    for reduction in ("none", "mean", "sum"):
        options = dict(temperature=temperature, channel_temperature=channel_temperature, reduction=reduction)
        compare(student, teacher, layout, **options)


@needs_native
@two_layouts
@pytest.mark.parametrize(
    ("dtype", "magnitude"),
    [(torch.float32, 1e4), (torch.bfloat16, 1e4), (torch.float16, 6e4), (torch.float64, 1e6)],
    ids=str,
)
@pytest.mark.parametrize("temperature", (0.01, 1.0, 100.0))
def test_extreme_magnitudes(layout: str, dtype: torch.dtype, magnitude: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        ((torch.rand(2, 20, 9, 12, generator=generator) * 2 - 1) * magnitude).to(dtype) for _ in range(2)
    )
    compare(student, teacher, layout, temperature=temperature)
    loss, grad = run(student, teacher, temperature=temperature, backend="native")
    assert loss.isfinite() and grad.isfinite().all()


@needs_native
@pytest.mark.parametrize("student_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("teacher_dtype", FLOATS, ids=str)
def test_mixed_dtypes_and_layouts(student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    student, teacher = features(2, 20, 8, 9, dtype=student_dtype), features(2, 20, 8, 9, dtype=teacher_dtype, seed=1)
    compare(student, teacher)
    compare(student, teacher, "channels_last")
    loss, grad = run(student, teacher, backend="native")
    for layout_s in LAYOUTS:
        for layout_t in LAYOUTS:
            if "expanded" in (layout_s, layout_t):
                continue
            other = run(laid_out(student, layout_s), laid_out(teacher, layout_t), backend="native")
            torch.testing.assert_close(other[0], loss, rtol=2e-6, atol=1e-6)
            tolerance = 1e-4 if student_dtype in (torch.float32, torch.float64) else 2e-2
            torch.testing.assert_close(other[1], grad, rtol=tolerance, atol=1e-7)


@needs_native
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("reduction", ("mean", "none"))
@two_layouts
def test_upstream_factors_come_in_before_halves_are_rounded(dtype: torch.dtype, reduction: str, layout: str) -> None:
    """A mean over 2^16 positions lies below the smallest float16; a GradScaler's factor has to save it."""
    student, teacher = (laid_out(features(2, 3, 256, 256, dtype=dtype, seed=i), layout) for i in range(2))
    upstream = torch.tensor([1.0, 0.5]) * 65536 if reduction == "none" else torch.tensor(65536.0)
    options = dict(reduction=reduction, upstream=upstream)
    got = run(student, teacher, backend="native", **options)[1]
    truth = run(student.double(), teacher.double(), backend="reference", **options)[1]
    error = (got.double() - truth).norm() / truth.norm()
    assert error < torch.finfo(dtype).eps / 2, error
    plain = run(student, teacher, backend="native", reduction=reduction)[1]
    if dtype == torch.float16:
        # Else this test tests nothing.
        assert (plain.double() * 65536 - truth).norm() / truth.norm() > 5 * error


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_what_is_ignored_gets_0_whatever_comes_from_upstream(backend: str, layout: str, reduction: str) -> None:
    student, teacher = (laid_out(features(2, 3, 5, 7, seed=i), layout) for i in range(2))
    target = torch.zeros(2, 5, 7, dtype=torch.uint8)
    target[0, 1:3], target[1, 4, 2:] = 255, 255
    for upstream in (NAN, INF, torch.tensor([1.0, NAN])):
        if reduction == "mean" and isinstance(upstream, Tensor):
            continue
        grad = run(student, teacher, backend, upstream, target=target, reduction=reduction)[1]
        assert (grad.movedim(1, -1)[target == 255] == 0).all()
        assert grad.isnan().any(), "what counts must show it"


# --- edges ---


@each_backend
@two_layouts
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("channels", (3, 70))
@pytest.mark.parametrize("size", [(4, 5), (50, 60)], ids=str)
class TestInfinities:
    def both(self, dtype: torch.dtype, channels: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return features(2, channels, *size, dtype=dtype), features(2, channels, *size, dtype=dtype, seed=1)

    def test_where_both_are_minus_inf_the_position_is_not_there(
        self, backend: str, layout: str, dtype: torch.dtype, channels: int, size: tuple[int, int]
    ) -> None:
        student, teacher = self.both(dtype, channels, size)
        gone = torch.zeros(size, dtype=torch.bool)
        gone[1] = gone[:, 2] = True
        cut_s, cut_t = (x[:, :, ~gone].unsqueeze(2) for x in (student, teacher))
        options = dict(channel_temperature=None, backend=backend)
        want, want_grad = run(cut_s, cut_t, **options)
        student[:, :, gone], teacher[:, :, gone] = -INF, -INF
        loss, grad = run(laid_out(student, layout), laid_out(teacher, layout), **options)
        torch.testing.assert_close(loss, want)
        assert not grad[:, :, gone].any()
        tolerance = dict(rtol=1e-4, atol=1e-6) if want_grad.dtype == torch.float32 else {}
        torch.testing.assert_close(grad[:, :, ~gone].unsqueeze(2), want_grad, **tolerance)
        # With weights as well: what is -inf counts as 0 in the mean of |z|.
        weighted = run(laid_out(student, layout), laid_out(teacher, layout), backend=backend)[0]
        zeroed = teacher.double().masked_fill(gone, 0).abs().mean((2, 3))
        w = (zeroed / zeroed.mean(1, keepdim=True)).softmax(1)
        kl = cwd(cut_s.double().flatten(0, 1)[:, None], cut_t.double().flatten(0, 1)[:, None], 4.0).view_as(w)
        torch.testing.assert_close(weighted.double(), (w * kl).sum(1).mean(), rtol=1e-5, atol=1e-6)

    def test_a_teachers_row_without_mass_adds_nothing(
        self, backend: str, layout: str, dtype: torch.dtype, channels: int, size: tuple[int, int]
    ) -> None:
        student, teacher = self.both(dtype, channels, size)
        options = dict(channel_temperature=None, reduction="sum", backend=backend)
        rest = run(student[:, 1:], teacher[:, 1:], **options)[0] * (channels - 1) / channels
        teacher[:, 0] = -INF
        for fill in (None, -INF):
            if fill is not None:
                student[:, 0] = fill
            loss, grad = run(laid_out(student, layout), laid_out(teacher, layout), **options)
            torch.testing.assert_close(loss, rest)
            assert not grad[:, 0].any() and grad[:, 1:].isfinite().all() and grad[:, 1].any()
        student[1, 0, 2, 3] = NAN
        losses = run(laid_out(student, layout), laid_out(teacher, layout), **{**options, "reduction": "none"})[0]
        assert losses[0].isfinite() and losses[1].isnan()

    def test_a_teacher_that_looks_where_the_student_cannot_is_infinitely_far(
        self, backend: str, layout: str, dtype: torch.dtype, channels: int, size: tuple[int, int]
    ) -> None:
        for whole in (False, True):
            student, teacher = self.both(dtype, channels, size)
            student[1, 2, 3, 4] = -INF
            if whole:
                student[1, 2] = -INF
            options = dict(reduction="none", channel_temperature=None, temperature=2.0, backend=backend)
            loss, grad = run(laid_out(student, layout), laid_out(teacher, layout), **options)
            assert loss[0].isfinite() and loss[1] == INF
            p = (teacher[1, 2].double() / 2).flatten().softmax(0)[3 * size[1] + 4]
            torch.testing.assert_close(grad[1, 2, 3, 4].double(), -2.0 / channels * p, rtol=1e-2, atol=1e-6)
            assert grad.isfinite().all()
            # Nor is it hidden by a weight that is rounded to 0.
            teacher[1, 0] += 100
            loss, grad = run(
                laid_out(student, layout), laid_out(teacher, layout), reduction="none", channel_temperature=1e-4,
                backend=backend,
            )  # fmt: skip
            assert loss[0].isfinite() and loss[1] == INF and grad.isfinite().all()

    def test_a_student_that_looks_where_the_teacher_does_not_is_finitely_far(
        self, backend: str, layout: str, dtype: torch.dtype, channels: int, size: tuple[int, int]
    ) -> None:
        student, teacher = self.both(dtype, channels, size)
        teacher[:, :, 1] = -INF
        options = dict(channel_temperature=None, temperature=2.0, backend=backend)
        loss, grad = run(laid_out(student, layout), laid_out(teacher, layout), **options)
        q = (student.double() / 2).flatten(2).log_softmax(-1)
        p = (teacher.double() / 2).flatten(2).softmax(-1)
        seen = p > 0
        want = torch.where(seen, p * (p.log() - q), 0).sum((1, 2)).mean() * 4 / channels
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
        wanted = 2.0 / channels / 2 * (q.exp() - p).view_as(student)
        torch.testing.assert_close(grad.double(), wanted, rtol=1e-2, atol=1e-6)

    def test_nan_and_inf_are_never_hidden(
        self, backend: str, layout: str, dtype: torch.dtype, channels: int, size: tuple[int, int]
    ) -> None:
        for bad in (NAN, INF):
            for which in (0, 1):
                for at in ((0, 0, 0), (1, 3, 4), (channels - 1, size[0] - 1, size[1] - 1)):
                    for others in (None, -INF):
                        both = self.both(dtype, channels, size)
                        if others is not None:
                            both[1][0, at[0]] = others  # the row has no mass in the teacher
                        both[1][:, (at[0] + 1) % channels] *= 50  # and hardly a weight
                        both[which][(0, *at)] = bad
                        student, teacher = (laid_out(x, layout) for x in both)
                        for tau_c in (1e-3, None):
                            options = dict(channel_temperature=tau_c, backend=backend)
                            losses = matched_cafd_loss(student, teacher, reduction="none", **options)
                            assert losses[0].isnan() and losses[1].isfinite()
                            assert matched_cafd_loss(student, teacher, **options).isnan()


@each_backend
@two_layouts
def test_a_row_of_which_one_block_is_minus_inf(backend: str, layout: str) -> None:
    """A whole block without mass in one network or both, before and after others that have some."""
    student, teacher = features(1, 6, 80, 80, dtype=torch.float64), features(1, 6, 80, 80, dtype=torch.float64, seed=1)
    for rows in (slice(0, 40), slice(30, 79)):
        for dtype in FLOATS:
            s, t = student.to(dtype, copy=True), teacher.to(dtype, copy=True)
            t[:, :, rows] = -INF
            want = torch.zeros((), dtype=torch.float64)
            for masked in (False, True):
                if masked:
                    s[:, :, rows] = -INF
                q = (s.double() / 4).flatten(2).log_softmax(-1)
                p = (t.double() / 4).flatten(2).softmax(-1)
                want = torch.where(p > 0, p * (p.log() - q), 0).sum((1, 2)).mean() * 16 / 6
                loss = matched_cafd_loss(
                    laid_out(s, layout), laid_out(t, layout), channel_temperature=None, backend=backend
                )
                torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
            assert matched_cafd_loss(laid_out(s, layout), laid_out(student, layout), backend=backend) == INF


@each_backend
def test_a_mask_that_is_a_large_number_has_no_mass(backend: str) -> None:
    for dtype in FLOATS:
        student, teacher = features(1, 6, 80, 80, dtype=dtype), features(1, 6, 80, 80, dtype=dtype, seed=1)
        student[:, :, :40] = teacher[:, :, :40] = -INF
        want = matched_cafd_loss(student, teacher, channel_temperature=None, backend=backend)
        teacher[:, :, :40] = -6e4
        for fmt in (torch.contiguous_format, torch.channels_last):
            s, t = student.contiguous(memory_format=fmt), teacher.contiguous(memory_format=fmt)
            got = matched_cafd_loss(s, t, channel_temperature=None, backend=backend)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


@each_backend
@two_layouts
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_silent_teacher_weighs_every_channel_the_same(backend: str, layout: str, dtype: torch.dtype) -> None:
    student = laid_out(features(2, 7, 5, 6, dtype=dtype), layout)
    silent = torch.zeros_like(student)
    got = run(student, silent, backend=backend)
    want = run(student, silent, channel_temperature=None, backend=backend)
    torch.testing.assert_close(got, want)


@each_backend
@two_layouts
@pytest.mark.parametrize("channels", (1, 20))
def test_one_position_has_nothing_to_learn(backend: str, layout: str, channels: int) -> None:
    student, teacher = features(3, channels, 1, 1), features(3, channels, 1, 1, seed=1)
    loss, grad = run(laid_out(student, layout), laid_out(teacher, layout), backend=backend)
    assert loss == 0 and not grad.any()
    loss, grad = run(features(3, channels, 6, 7), teacher, backend=backend)
    assert loss == 0 and not grad.any()


@each_backend
@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
@pytest.mark.parametrize("teacher_size", [(8, 8), (4, 4)], ids=str)
def test_empty_batch(backend: str, reduction: str, teacher_size: tuple[int, int]) -> None:
    student, teacher = torch.empty(0, 5, 8, 8), torch.empty(0, 5, *teacher_size)
    loss, grad = run(student, teacher, reduction=reduction, backend=backend)
    assert loss.shape == ((0,) if reduction == "none" else ()) and not loss.any() and grad.shape == student.shape


# --- arguments, autograd, compiler ---


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(student_logits=torch.zeros(3)), ValueError, r"student_logits: expected shape \(N, K\) or .*, got \(3,\)"),
        (
            dict(teacher_logits=torch.zeros(2, 3, 4, 4, dtype=torch.int32)),
            TypeError,
            "teacher_logits: expected dtype .* got int32",
        ),
        (
            dict(teacher_logits=torch.zeros(3, 3, 4, 4)),
            ValueError,
            r"teacher_logits: expected .* \(2, 3, 4, 4\), got \(3, 3, 4, 4\)",
        ),
        (
            dict(teacher_logits=torch.zeros(2, 4, 4, 4)),
            ValueError,
            r"teacher_logits: expected .* \(2, 3, 4, 4\), got \(2, 4, 4, 4\)",
        ),
        (dict(student_logits=torch.zeros(2, 0, 4, 4)), ValueError, "expected the batch, classes"),
        (dict(teacher_logits=None), TypeError, "teacher_logits: expected a Tensor, got NoneType"),
        (dict(temperature=0.0), ValueError, "temperature: expected a finite number > 0, got 0"),
        (dict(temperature=None), TypeError, "temperature: expected a number, got NoneType"),
        (dict(channel_temperature=-1), ValueError, "channel_temperature: expected a finite number > 0, got -1"),
        (dict(reduction="all"), ValueError, "reduction: expected 'none', 'mean' or 'sum', got 'all'"),
        (dict(backend="fast"), ValueError, "backend: expected one of"),
    ],
    ids=str,
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = dict(student_logits=torch.zeros(2, 3, 4, 4), teacher_logits=torch.zeros(2, 3, 4, 4))
    with pytest.raises(error, match=message):
        matched_cafd_loss(**{**good, **change})


def test_other_devices_have_the_reference() -> None:
    x = torch.zeros(2, 3, 4, 4, device="meta")
    assert matched_cafd_loss(x, x).shape == ()
    with pytest.raises(RuntimeError, match="native kernels run on cpu and cuda, not on meta"):
        matched_cafd_loss(x, x, backend="native")


@needs_native
def test_ops_refuse_what_is_not_theirs() -> None:
    ops, x, pair = torch.ops.dsct_kernels, features(2, 3, 4, 4), torch.tensor([1.0, 4.0], dtype=torch.float64)
    loss, stats = ops.matched_cafd(x, x, None, pair, False, 1)
    for arguments, message in [
        ((x, x[:, :2], None, pair, False, 1), "teacher: expected the shape of student"),
        ((x, x, None, pair, False, 3), "reduction: expected"),
        ((x, x, None, -pair, False, 1), "temperature: expected a finite number"),
        ((x, x, None, pair.float(), False, 1), "temperatures: expected"),
        ((x.int(), x, None, pair, False, 1), "student: expected"),
        ((x, x, torch.ones(2, 3, 4, 4) > 0, pair, False, 1), "mask: expected"),
        ((x, x, torch.ones(2, 1, 4, 4), pair, False, 1), "mask: expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.matched_cafd(*arguments)
    for arguments, message in [
        ((x, x, None, stats[:1], pair, loss, 1), "stats: expected what the forward returned"),
        ((x, x, None, stats, pair, loss, 0), "grad_output: expected the shape and dtype of the loss"),
        ((x, x, None, stats, pair, loss.double(), 1), "grad_output: expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.matched_cafd_backward(*arguments)


@each_backend
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradient_has_the_students_dtype_and_strides_and_the_teacher_none(backend: str, dtype: torch.dtype) -> None:
    for layout in LAYOUTS:
        student, teacher = laid_out(features(3, 6, 4, 5, dtype=dtype), layout), features(3, 6, 4, 5, seed=1)
        teacher.requires_grad_()
        assert not matched_cafd_loss(student, teacher, backend=backend).requires_grad
        grad = run(student, teacher, backend=backend)[1]
        assert grad.dtype == dtype and grad.shape == student.shape and teacher.grad is None
        if backend == "native":
            assert grad.stride() == torch.empty_like(student).stride()


@each_backend
def test_backward_twice_gives_the_same_and_writes_nothing(backend: str) -> None:
    student, teacher = features(2, 5, 7, 9).requires_grad_(), features(2, 5, 7, 9, seed=1)
    before = student.detach().clone(), teacher.clone()
    loss = matched_cafd_loss(student, teacher, backend=backend)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, student)
    assert torch.equal(second, kept) and torch.equal(student, before[0]) and torch.equal(teacher, before[1])


@needs_native
@pytest.mark.parametrize("compiled", [False, True])
def test_a_second_derivative_is_an_error_never_a_gap(compiled: bool) -> None:
    torch._dynamo.reset()
    teacher = features(2, 4, 3, 3, seed=1)
    loss = lambda x: matched_cafd_loss(x, teacher, backend="native")  # noqa: E731
    call = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    for upstream in (lambda leaf: leaf, lambda leaf: leaf * 2):
        leaf = features(2, 4, 3, 3).requires_grad_()
        (g,) = torch.autograd.grad(call(upstream(leaf)), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=r"first derivative only|double backward"):
            torch.autograd.grad(g.pow(2).sum(), leaf)


@needs_native
def test_transforms_and_forward_mode_go_through_the_reference() -> None:
    student, teacher = features(2, 5, 4, 4), features(2, 5, 4, 4, seed=1)
    loss = lambda x: matched_cafd_loss(x, teacher)  # noqa: E731
    want = run(student, teacher, backend="reference")[1]
    torch.testing.assert_close(torch.func.grad(loss)(student), want)
    tangent = torch.func.jvp(loss, (student,), (student,))[1]
    torch.testing.assert_close(tangent, (want * student).sum())


@needs_native
@pytest.mark.parametrize(
    ("dtype", "reduction", "uniform", "needs_grad", "layout"),
    pairs((torch.float32, torch.bfloat16, torch.float64), (0, 1), (False, True), (False, True), LAYOUTS[:2]),
    ids=str,
)
def test_opcheck(dtype: torch.dtype, reduction: int, uniform: bool, needs_grad: bool, layout: str) -> None:
    pair = torch.tensor([0.5, 2.0], dtype=torch.float64)
    ops = torch.ops.dsct_kernels
    student, teacher = (laid_out(features(2, 5, 4, 6, dtype=dtype, seed=i), layout) for i in range(2))
    mask = torch.rand(2, 1, 4, 6) > 0.3 if uniform else None
    arguments = (student.clone().requires_grad_(needs_grad), teacher, mask, pair, uniform, reduction)
    torch.library.opcheck(ops.matched_cafd.default, arguments, test_utils=CHECKS)
    loss, stats = ops.matched_cafd(student, teacher, mask, pair, uniform, reduction)
    backward = (student, teacher, mask, stats, pair, torch.randn_like(loss), reduction)
    torch.library.opcheck(ops.matched_cafd_backward.default, backward, test_utils=CHECKS)


@each_backend
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("channel_temperature", [1.0, None])
def test_a_schedule_compiles_once(backend: str, as_tensor: bool, channel_temperature: float | None) -> None:
    torch._dynamo.reset()
    frames = CompileCounterWithBackend("aot_eager")
    student, teacher = features(2, 5, 8, 8).requires_grad_(), features(2, 5, 8, 6, seed=1)

    def step(tau: Any, tau_c: Any) -> Tensor:
        return matched_cafd_loss(student, teacher, temperature=tau, channel_temperature=tau_c, backend=backend)

    compiled = torch.compile(step, backend=frames, fullgraph=True)
    for i in range(8):
        given: list[Any] = [1 + 0.3 * i, None if channel_temperature is None else channel_temperature + 0.1 * i]
        want = torch.autograd.grad(step(*given), student)
        if as_tensor:
            given = [None if v is None else torch.tensor(v) for v in given]
        got = torch.autograd.grad(compiled(*given), student)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert frames.frame_count <= (1 if as_tensor else 2)  # of plain numbers the first is taken for a constant


@needs_native
def test_inductor_gives_the_same() -> None:
    torch._dynamo.reset()
    student, teacher = features(2, 5, 8, 8).requires_grad_(), features(2, 5, 8, 8, seed=1)
    compiled = torch.compile(matched_cafd_loss, fullgraph=True)
    torch.testing.assert_close(run(student, teacher), (compiled(student, teacher).detach(), run(student, teacher)[1]))
    (grad,) = torch.autograd.grad(compiled(student, teacher), student)
    torch.testing.assert_close(grad, run(student, teacher)[1])


def test_the_module_is_the_function_and_its_attributes_are_values() -> None:
    student, teacher = features(2, 5, 8, 8), features(2, 5, 8, 8, seed=1)
    module = MatchedCAFDLoss(reduction="sum")
    assert not list(module.parameters())
    for tau, tau_c in ((4.0, 1.0), (1.0, 0.3), (2.0, None), (torch.tensor(3.0), torch.tensor(0.5))):
        module.temperature, module.channel_temperature = tau, tau_c
        want = matched_cafd_loss(student, teacher, temperature=tau, channel_temperature=tau_c, reduction="sum")
        assert torch.equal(module(student, teacher), want)
    with pytest.raises(ValueError, match="channel_temperature: expected a finite number > 0"):
        module.channel_temperature = 0
    assert "channel_temperature=0.5" in repr(MatchedCAFDLoss(channel_temperature=0.5))
    torch._dynamo.reset()
    for tau_c in (0.5, 0.7, None):
        module = MatchedCAFDLoss(channel_temperature=tau_c)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(student, teacher), module(student, teacher))


# --- how it runs ---


@needs_native
@two_layouts
@pytest.mark.parametrize("shape", [(5, 64, 64, 64), (1, 6, 300, 301), (2, 600, 30, 30)], ids=str)
def test_same_bits_every_time_and_for_any_number_of_threads(layout: str, shape: tuple[int, ...]) -> None:
    student, teacher = laid_out(features(*shape), layout), laid_out(features(*shape, seed=1), layout)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 2, 3):
            torch.set_num_threads(n)
            results.append(run(student, teacher, backend="native"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


# --- where nothing is labelled ---


@each_backend
@two_layouts
@pytest.mark.parametrize("channels", (1, 6, 19, 150))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_ignored_cells_have_no_part_whatever_they_hold(
    backend: str, layout: str, channels: int, dtype: torch.dtype
) -> None:
    """As if they did not exist: the loss of the other cells alone, as a map of one row."""
    student, teacher = (features(2, channels, 7, 9, dtype=dtype, seed=i) for i in range(2))
    target = torch.zeros(2, 28, 36, dtype=torch.uint8)
    target[:, 8:16, 12:] = 255
    target[:, :4, :3] = 255  # most of a cell: what is labelled of it counts
    gone = torch.zeros(2, 7, 9, dtype=torch.bool)
    gone[:, 2:4, 3:] = True
    kept = [m.permute(0, 2, 3, 1)[~gone].view(2, -1, channels).movedim(2, 1) for m in (student, teacher)]
    for m, value in ((student, torch.nan), (teacher, torch.inf)):
        m.permute(0, 2, 3, 1)[gone] = value
    arguments = {"reduction": "none", "backend": backend}
    loss, grad = run(laid_out(student, layout), laid_out(teacher, layout), target=target, **arguments)
    want, want_grad = run(*kept, reduction="none", backend="reference")
    torch.testing.assert_close(loss, want, rtol=2e-5, atol=1e-7)
    assert not grad.permute(0, 2, 3, 1)[gone].any()
    rows = grad.permute(0, 2, 3, 1)[~gone].view(2, -1, channels).movedim(2, 1)
    torch.testing.assert_close(rows, want_grad, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-7)


@needs_native
@pytest.mark.parametrize("shape", [*SHAPES, (1, 7, 60, 70), (1, 100, 11, 13)], ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "transposed", "crop"))
def test_a_mask_gives_the_bits_of_minus_inf_in_both(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    """Whatever the masked cells hold; and the mask is not read beyond its end."""
    n, _, height, width = shape
    mask = torch.rand(n, 1, height, width, generator=torch.Generator().manual_seed(0)) > 0.05
    mask[-1, 0, height // 2 :] = False  # whole blocks of it where the map has several
    mask = before_a_forbidden_page(mask)
    plain = [laid_out(features(*shape, dtype=dtype, seed=i), layout) for i in range(2)]
    dead, rubbish = ([laid_out(x.masked_fill(~mask, value), layout) for x in plain] for value in (-INF, NAN))
    ops, pair = torch.ops.dsct_kernels, torch.tensor([1.0, 2.0], dtype=torch.float64)
    loss, stats = ops.matched_cafd(*dead, None, pair, False, 0)
    grad = ops.matched_cafd_backward(*dead, None, stats, pair, torch.ones_like(loss), 0)
    for maps in (plain, rubbish):
        got, got_stats = ops.matched_cafd(*maps, mask, pair, False, 0)
        assert torch.equal(got, loss) and torch.equal(got_stats, stats)
        assert torch.equal(ops.matched_cafd_backward(*maps, mask, stats, pair, torch.ones_like(loss), 0), grad)


@each_backend
def test_nothing_labelled_is_nothing_learnt(backend: str) -> None:
    student, teacher = torch.full((2, 3, 4, 4), torch.nan), torch.full((2, 3, 4, 4), torch.nan)
    loss, grad = run(student, teacher, target=torch.full((2, 4, 4), 255), backend=backend)
    assert loss == 0 and not grad.any()
    loss, _ = run(student, teacher, target=torch.full((2, 4, 4), 255), ignore_index=None, backend=backend)
    assert loss.isnan()
