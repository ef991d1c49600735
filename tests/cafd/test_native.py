"""The native CPU kernels of CAFD against the reference, called as the ops."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsct_kernels import backends, values
from dsct_kernels.cafd import native as native_cafd
from dsct_kernels.cafd import op as cafd_op
from dsct_kernels.cafd import reference
from dsct_kernels.dtypes import acc_dtype

from ..helpers import strided_copy
from ..oracle import assert_as_good_as_reference, assert_cafd_as_good_as_reference, learnt

pytestmark = pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))

INF, NAN = float("inf"), float("nan")
NONE, MEAN, SUM = 0, 1, 2
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# "tokens" skips a class token, "expanded" repeats one sample, the crops are windows of a larger picture: rows and
# channels are dense but not one after the other.
LAYOUTS = (
    "contiguous", "channels_last", "sliced", "transposed", "tokens", "expanded", "crop", "crop_channels_last",
)  # fmt: skip


def packed(channel_t: float, spatial_t: float) -> Tensor:
    return values.packed((channel_t, spatial_t), torch.device("cpu"))


def laid_out(x: Tensor, layout: str) -> Tensor:
    n, c, h, w = x.shape
    if layout == "tokens":
        tokens = x.new_full((n, h * w + 1, c), NAN)
        tokens[:, 1:] = x.flatten(2).transpose(1, 2)
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (h, w))
    if layout == "expanded":
        return x[:1].expand(n, c, h, w)
    if layout.startswith("crop"):
        big = x.new_full((n, c, h + 3, w + 2), NAN)
        if layout == "crop_channels_last":
            big = big.contiguous(memory_format=torch.channels_last)
        view = big[:, :, 1 : 1 + h, 2 : 2 + w]
        view.copy_(x)
        return view
    return strided_copy(x, layout)


def native(
    student: Tensor, teacher: Tensor, channel_t: float = 1.0, spatial_t: float = 1.0, reduction: int = MEAN
) -> tuple[Tensor, Tensor]:
    """(loss, gradient at upstream 1) of the ops."""
    ops = torch.ops.dsct_kernels
    loss, grad_map, stats = ops.cafd(student, teacher, packed(channel_t, spatial_t), reduction, True)
    return loss, ops.attention_map_backward(student, grad_map, stats, packed(channel_t, spatial_t))


def eager(
    student: Tensor, teacher: Tensor, channel_t: float = 1.0, spatial_t: float = 1.0, reduction: int = MEAN
) -> tuple[Tensor, Tensor]:
    """The same of the reference."""
    return learnt(lambda s: reference.cafd(s, teacher, channel_t, spatial_t, reduction), student)


def compare(student: Tensor, teacher: Tensor, layout: str = "contiguous", **options: Any) -> None:
    """The error rule, on loss and gradient."""
    student, teacher = laid_out(student, layout), laid_out(teacher, layout)
    got = native(student, teacher, **options)
    same = eager(student, teacher, **options)
    truth = eager(student.double(), teacher.double(), **options)
    what = f"of {tuple(student.shape)} {student.dtype} {layout} {options}"
    assert_cafd_as_good_as_reference(got, same, truth, student, teacher, what, **options)
    assert got[1].dtype == student.dtype and got[0].dtype == acc_dtype(student, teacher)


def features(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    # Channels that speak at different strengths, and places that many of them look at: as in a network.
    x = x * (0.2 + torch.rand((shape[1], 1, 1), generator=generator)) + torch.randn(shape[2:], generator=generator)
    return (x * scale).to(dtype)


# student C H W, teacher C H W. (64, 16, 16): whole vectors; (37, 7, 9): none whole; 300 x 65 x 67: several blocks, and
# rows longer than a chunk; 4099 channels; one channel; one position; sizes that differ in both, one or either
# direction, with pooling cells that overlap; long thin maps.
SHAPES = [
    (64, 16, 16, 96, 16, 16),
    (37, 7, 9, 5, 7, 9),
    (300, 65, 67, 30, 65, 67),
    (4099, 3, 3, 17, 3, 3),
    (1, 8, 8, 1, 8, 8),
    (2, 130, 131, 3, 130, 131),
    (8, 13, 11, 9, 6, 14),
    (8, 6, 14, 9, 13, 11),
    (16, 32, 32, 24, 16, 16),
    (5, 7, 9, 6, 7, 4),
    (20, 1, 50, 3, 1, 50),
    (6, 41, 1, 3, 10, 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_dtypes_layouts(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    if shape[0] * shape[1] * shape[2] > 1e5 and layout not in ("contiguous", "channels_last"):
        shape = (30, *shape[1:3], 7, *shape[1:3])
    student, teacher = features(2, *shape[:3], dtype=dtype), features(2, *shape[3:], dtype=dtype, seed=1)
    compare(student, teacher, layout)


@pytest.mark.parametrize("shape", [(8, 13, 11, 9, 6, 14), (4, 8, 8, 5, 4, 4), (3, 4, 5, 3, 8, 10)], ids=str)
@pytest.mark.parametrize("reduction", (NONE, MEAN))
@pytest.mark.parametrize("near", (False, True))
def test_maps_of_two_sizes_pooled_outside_of_the_kernels_as_on_cuda(
    shape: tuple[int, ...], reduction: int, near: bool
) -> None:
    """With the kernels of the CPU, which is all that the composition asks for."""
    student, teacher = features(2, *shape[:3]), features(2, *shape[3:], seed=1)
    if near:
        teacher = torch.nn.functional.interpolate(student, shape[4:])
    options = 0.7, 0.5, reduction
    got = learnt(lambda s: cafd_op.cafd_pooled(native_cafd._ops, s, teacher, *options), student)
    truth = eager(student.double(), teacher.double(), *options)
    own = eager(student, teacher, *options)
    assert_cafd_as_good_as_reference(got, own, truth, student, teacher, f"of {shape}", *options)
    assert got[0].dtype == torch.float32


def test_the_cuda_kernels_take_16_and_32_bits() -> None:
    half, wide = torch.zeros(1, 2, 2, 2).half(), torch.zeros(1, 2, 2, 2).double()
    assert native_cafd.why_not_cuda(half, half.float()) is None
    assert "not float64" in (native_cafd.why_not_cuda(half, wide) or ""), "the teacher counts too"


@pytest.mark.parametrize("channel_t", (0.01, 0.3, 1.0, 10.0))
@pytest.mark.parametrize("spatial_t", (0.01, 0.3, 1.0, 10.0))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_temperatures(channel_t: float, spatial_t: float, layout: str, dtype: torch.dtype) -> None:
    student, teacher = features(3, 40, 12, 13, dtype=dtype), features(3, 24, 12, 13, dtype=dtype, seed=1)
    for reduction in (NONE, MEAN, SUM):
        compare(student, teacher, layout, channel_t=channel_t, spatial_t=spatial_t, reduction=reduction)


@pytest.mark.parametrize("student_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("teacher_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("teacher_size", [(8, 9), (5, 12)], ids=str)
def test_mixed_dtypes_and_layouts(
    student_dtype: torch.dtype, teacher_dtype: torch.dtype, teacher_size: tuple[int, int]
) -> None:
    student, teacher = features(2, 20, 8, 9, dtype=student_dtype), features(2, 33, *teacher_size, dtype=teacher_dtype)
    compare(student, teacher)
    loss, grad = native(student, teacher)
    for layout_s in ("contiguous", "channels_last", "sliced", "tokens", "crop"):
        for layout_t in ("contiguous", "channels_last", "transposed", "crop_channels_last"):
            other = native(laid_out(student, layout_s), laid_out(teacher, layout_t))
            torch.testing.assert_close(other[0], loss, rtol=2e-6, atol=1e-7)
            tolerance = 2e-5 if student_dtype in (torch.float32, torch.float64) else 1e-2
            torch.testing.assert_close(other[1], grad, rtol=tolerance, atol=1e-8)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradient_has_the_students_dtype_and_strides(dtype: torch.dtype) -> None:
    for layout in LAYOUTS:
        student = laid_out(features(3, 6, 4, 5, dtype=dtype), layout)
        grad = native(student, student)[1]
        like = torch.empty_like(student)
        assert grad.dtype == like.dtype and grad.shape == like.shape and grad.stride() == like.stride()


def test_without_gradient_the_loss_is_the_same() -> None:
    student, teacher = features(2, 64, 32, 32), features(2, 64, 32, 32, seed=1)
    for layout in ("contiguous", "channels_last"):
        for reduction in (NONE, MEAN, SUM):
            args = laid_out(student, layout), laid_out(teacher, layout), packed(1.0, 1.0), reduction
            loss, grad_map, _ = torch.ops.dsct_kernels.cafd(*args, False)
            assert torch.equal(loss, torch.ops.dsct_kernels.cafd(*args, True)[0]) and grad_map.shape == (0,)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.1, 0.3)], ids=str)
def test_map_and_its_backward_for_any_upstream(
    layout: str, dtype: torch.dtype, temperatures: tuple[float, float]
) -> None:
    x = laid_out(features(2, 37, 11, 13, dtype=dtype), layout)
    acc = acc_dtype(x)
    upstream = torch.randn(2, 11, 13, generator=torch.Generator().manual_seed(3)).to(acc)

    def autograd(x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().clone().requires_grad_()
        a = reference.attention_map(x, *temperatures)
        return a.detach(), torch.autograd.grad(a, x, upstream)[0]

    same, truth = autograd(x, upstream), autograd(x.double(), upstream.double())
    ops = torch.ops.dsct_kernels
    a, stats = ops.attention_map(x, packed(*temperatures))
    assert a.is_contiguous() and a.dtype == acc
    assert_as_good_as_reference(a, same[0], truth[0], "map")
    for given_map in (upstream, upstream.transpose(1, 2).contiguous().transpose(1, 2)):
        grad = ops.attention_map_backward(x, given_map, stats, packed(*temperatures))
        assert_as_good_as_reference(grad, same[1], truth[1], "its backward")
    # A constant added to D changes nothing, for A sums to 1: sum().backward() on a map gives 0, through stride 0 too.
    grad = ops.attention_map_backward(x, torch.ones((), dtype=acc).expand(2, 11, 13), stats, packed(*temperatures))
    assert grad.double().abs().max() < 1e-12


# --- the edge cases of the specification ---


@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "sliced"))
@pytest.mark.parametrize(
    ("dtype", "magnitude"),
    [(torch.float32, 1e4), (torch.bfloat16, 1e4), (torch.float16, 6e4), (torch.float64, 1e6)],
    ids=str,
)
@pytest.mark.parametrize("spatial_t", (0.01, 1.0, 100.0))
@pytest.mark.parametrize("channel_t", (0.01, 1.0))
def test_extreme_magnitudes(
    layout: str, dtype: torch.dtype, magnitude: float, spatial_t: float, channel_t: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        ((torch.rand(2, 20, 9, 12, generator=generator) * 2 - 1) * magnitude).to(dtype) for _ in range(2)
    )
    compare(student, teacher, layout, channel_t=channel_t, spatial_t=spatial_t)
    loss, grad = native(student, teacher, channel_t, spatial_t)
    assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_one_hot_attention(layout: str, dtype: torch.dtype) -> None:
    student, teacher = torch.zeros(1, 6, 8, 8, dtype=dtype), torch.zeros(1, 6, 8, 8, dtype=dtype)
    student[:, :, 2, 3] = teacher[:, :, 5, 6] = 200.0
    teacher[:, 3, 5, 6] = 12.0  # D is about 1e8 at (5, 6), where the student has nothing
    compare(student, teacher, layout)
    student[:, 3, 5, 6] = 195.0
    compare(student, teacher, layout)
    compare(teacher, student, layout)


def test_features_as_low_as_they_go() -> None:
    x = features(1, 5, 6, 7)
    x[:, 2, 3] = torch.finfo(torch.float32).min / 1e6  # "masked": far below, not -inf
    for layout in ("contiguous", "channels_last"):
        for spatial_t in (0.01, 1.0):
            student, teacher = laid_out(x, layout), laid_out(features(1, 5, 6, 7, seed=1), layout)
            loss, grad = native(student, teacher, spatial_t=spatial_t)
            assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_zero_features(dtype: torch.dtype, layout: str) -> None:
    zero, other = torch.zeros(2, 7, 5, 6, dtype=dtype), features(2, 9, 5, 6, dtype=dtype)
    a, _ = torch.ops.dsct_kernels.attention_map(laid_out(zero, layout), packed(1.0, 1.0))
    torch.testing.assert_close(a, torch.full_like(a, 1 / 30))
    loss, grad = native(laid_out(zero, layout), laid_out(zero, layout))
    assert loss == 0 and (grad == 0).all()
    compare(zero, other, layout)
    compare(other, zero, layout)
    other[:, 3] = 0  # one silent channel: sign(0) = 0
    compare(other, features(2, 4, 5, 6, dtype=dtype, seed=1), layout)


@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (2, 20, 1, 1), (3, 1, 5, 4)], ids=str)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_single_channels_and_positions(shape: tuple[int, ...], layout: str) -> None:
    student, teacher = features(*shape), features(*shape, seed=1)
    if shape[2:] != (1, 1):
        return compare(student, teacher, layout)
    loss, grad = native(laid_out(student, layout), laid_out(teacher, layout))
    assert loss.abs() < 1e-12 and grad.double().abs().max() < 1e-12
    larger = features(shape[0], 3, 6, 7, seed=1)  # pooled to one position: nothing can differ
    for a, b in ((student, larger), (larger, student)):
        loss, grad = native(laid_out(a, layout), laid_out(b, layout))
        assert loss.abs() < 1e-12 and grad.double().abs().max() < 1e-12


@pytest.mark.parametrize("reduction", (NONE, MEAN, SUM))
@pytest.mark.parametrize("teacher_size", [(8, 8), (4, 4)], ids=str)
def test_empty_batch(reduction: int, teacher_size: tuple[int, int]) -> None:
    student, teacher = torch.empty(0, 5, 8, 8), torch.empty(0, 3, *teacher_size)
    loss, grad = native(student, teacher, reduction=reduction)
    assert loss.shape == ((0,) if reduction == NONE else ()) and (loss == 0).all() and grad.shape == student.shape
    a, _ = torch.ops.dsct_kernels.attention_map(student, packed(1.0, 1.0))
    assert a.shape == (0, 8, 8)


@pytest.mark.parametrize("bad", (NAN, INF, -INF))
@pytest.mark.parametrize("which", (0, 1))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("teacher_size", [(9, 13), (4, 5)], ids=str)
def test_nan_and_inf_are_never_hidden(bad: float, which: int, layout: str, teacher_size: tuple[int, int]) -> None:
    for dtype in FLOATS:
        for at in ((0, 0, 0), (17, 3, 12), (18, 8, 4)) if teacher_size == (9, 13) else ((0, 0, 0), (18, 3, 4)):
            both = [features(2, 19, 9, 13, dtype=dtype), features(2, 19, *teacher_size, dtype=dtype, seed=1)]
            both[which][(0, *at)] = bad
            student, teacher = (laid_out(x, layout) for x in both)
            losses = native(student, teacher, reduction=NONE)[0]
            assert losses[0].isnan()
            assert losses[1].isnan() == (layout == "expanded")
            assert native(student, teacher)[0].isnan()


def test_inf_in_every_channel_or_position() -> None:
    for bad in (INF, -INF):
        for layout in ("contiguous", "channels_last"):
            for index in ((slice(None), slice(None), 3, 4), (slice(None), 5), (slice(None),)):
                x = features(2, 19, 9, 13)
                x[index] = bad
                assert native(laid_out(x, layout), laid_out(features(2, 19, 9, 13, seed=1), layout))[0].isnan()
                assert native(laid_out(x, layout), laid_out(x, layout))[0].isnan()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_networks_have_nothing_to_learn(dtype: torch.dtype, layout: str) -> None:
    for shape in ((2, 64, 16, 16), (1, 300, 33, 35)):
        x = laid_out(features(*shape, dtype=dtype), layout)
        loss, grad = native(x, x, 0.1, 0.3)
        assert loss == 0 and grad.double().abs().max() < 1e-12


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_order_of_channels_does_not_matter(layout: str) -> None:
    student, teacher = features(2, 130, 12, 12), features(2, 70, 12, 12, seed=1)
    order = torch.randperm(130, generator=torch.Generator().manual_seed(0))
    loss, grad = native(laid_out(student, layout), laid_out(teacher, layout))
    other = native(laid_out(student[:, order], layout), laid_out(teacher.flip(1), layout))
    torch.testing.assert_close(other[0], loss, rtol=2e-6, atol=0)
    torch.testing.assert_close(other[1], grad[:, order], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(student=torch.zeros(2, 3, 4)), "student_features: expected"),
        (dict(teacher=torch.zeros(2, 3, 4, 4, dtype=torch.int32)), "teacher_features: expected"),
        (dict(teacher=torch.zeros(3, 3, 4, 4)), "teacher_features: expected a batch of 2"),
        (dict(student=torch.zeros(2, 0, 4, 4)), "student_features: "),
        (dict(channel_t=0.0), "channel_temperature: expected"),
        (dict(spatial_t=-1.0), "spatial_temperature: expected"),
        (dict(reduction=3), "reduction: expected"),
    ],
    ids=str,
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    good = dict(student=torch.zeros(2, 3, 4, 4), teacher=torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match=message):
        native(**{**good, **change})


def test_backward_refuses_what_is_not_its_own() -> None:
    x = features(2, 3, 4, 4)
    a, stats = torch.ops.dsct_kernels.attention_map(x, packed(1.0, 1.0))
    back = torch.ops.dsct_kernels.attention_map_backward
    with pytest.raises(ValueError, match="grad_map: expected"):
        back(x, a[:1], stats, packed(1.0, 1.0))
    with pytest.raises(ValueError, match="stats: expected"):
        back(x, a, stats[:, :-1], packed(1.0, 1.0))


# --- how it runs ---


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("shape", [(5, 64, 64, 64), (3, 600, 70, 70)], ids=str)  # all at once; several steps
def test_same_bits_every_time_and_for_any_number_of_threads(layout: str, shape: tuple[int, ...]) -> None:
    student, teacher = laid_out(features(*shape), layout), laid_out(features(*shape, seed=1), layout)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 2, 3):
            torch.set_num_threads(n)
            results.append(native(student, teacher))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_inputs_are_left_as_they_are() -> None:
    student, teacher = features(2, 20, 9, 9), features(2, 20, 9, 9, seed=1)
    before = student.clone(), teacher.clone()
    _, grad_map, stats = torch.ops.dsct_kernels.cafd(student, teacher, packed(1.0, 1.0), MEAN, True)
    saved = grad_map.clone(), stats.clone()
    first = torch.ops.dsct_kernels.attention_map_backward(student, grad_map, stats, packed(1.0, 1.0))
    again = torch.ops.dsct_kernels.attention_map_backward(student, grad_map, stats, packed(1.0, 1.0))
    for a, b in zip((student, teacher, grad_map, stats, first), (*before, *saved, again)):
        assert torch.equal(a, b)


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 3),
    student_channels=st.integers(1, 70),
    teacher_channels=st.integers(1, 40),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    teacher_size=st.none() | st.tuples(st.integers(1, 20), st.integers(1, 20)),
    dtype=st.sampled_from(FLOATS),
    layout=st.sampled_from(LAYOUTS),
    scale=st.sampled_from((0.0, 1e-3, 1.0, 30.0, 1e4)),
    channel_t=st.sampled_from((0.05, 0.5, 1.0, 4.0)),
    spatial_t=st.sampled_from((0.05, 0.5, 1.0, 4.0)),
    reduction=st.sampled_from((NONE, MEAN, SUM)),
    seed=st.integers(0, 2**16),
)
def test_anything(
    n: int,
    student_channels: int,
    teacher_channels: int,
    size: tuple[int, int],
    teacher_size: tuple[int, int] | None,
    dtype: torch.dtype,
    layout: str,
    scale: float,
    channel_t: float,
    spatial_t: float,
    reduction: int,
    seed: int,
) -> None:
    student = features(n, student_channels, *size, dtype=dtype, scale=scale, seed=seed)
    teacher = features(n, teacher_channels, *(teacher_size or size), dtype=dtype, scale=scale, seed=seed + 1)
    if size == (1, 1) or teacher_size == (1, 1):
        loss, grad = native(laid_out(student, layout), laid_out(teacher, layout), channel_t, spatial_t, reduction)
        assert loss.abs().max() < 1e-12 and grad.double().abs().max() < 1e-9
        return
    compare(student, teacher, layout, channel_t=channel_t, spatial_t=spatial_t, reduction=reduction)
