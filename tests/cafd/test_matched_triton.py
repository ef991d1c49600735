"""The Triton kernels of matched CAFD: the error rule, every launch choice, every edge.

On CPU under Triton's interpreter, on `cuda` where there is a GPU. Shapes are tiny: the interpreter takes a tenth of a
second a call. The formula itself is tested in test_matched.py.
"""

import pytest
import torch
from torch import Tensor

from dsct_kernels import matched_cafd_loss
from dsct_kernels.cafd import matched_triton as triton
from dsct_kernels.cafd.triton import Config, Network, Tile
from tests.cafd.test_matched import compare, run
from tests.cafd.test_native import features, laid_out
from tests.conftest import DEVICES
from tests.helpers import pairs

WHY_NOT = triton.why_not(torch.zeros(1, device=DEVICES[-1]))
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
INF, NAN = float("inf"), float("nan")
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
LAYOUTS = ("contiguous", "channels_last", "tokens", "crop")
two_layouts = pytest.mark.parametrize("layout", ("contiguous", "channels_last"))


def both(device: str, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    student, teacher = (features(*shape, dtype=dtype, scale=scale, seed=seed) for seed in range(2))
    return student.to(device), teacher.to(device)


def numbers(channel: float = 1.0, spatial: float = 2.0) -> Tensor:
    return torch.tensor([channel, spatial], dtype=torch.float64)


@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "temperature", "channel_temperature"),
    pairs([(2, 5, 7, 9), (1, 37, 3, 5), (3, 1, 1, 1)], FLOATS, LAYOUTS, (0.01, 1.0, 4.0), (0.05, 1.0, None)),
    ids=str,
)
def test_the_error_rule(device, shape, dtype, layout, temperature, channel_temperature):
    student, teacher = both(device, *shape, dtype=dtype)
    options = dict(temperature=temperature, channel_temperature=channel_temperature)
    compare(student, teacher, layout, "triton", **options, reduction="none" if shape[0] == 2 else "mean")


@two_layouts
def test_magnitudes_and_mixed_dtypes(device, layout):
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = both(device, 2, 4, 5, 6, dtype=dtype, scale=5e3)
        compare(student, teacher.half(), layout, "triton", temperature=0.01)
    student, teacher = both(device, 2, 4, 5, 6)
    near = student + 1e-3 * teacher
    compare(student, near, layout, "triton")
    loss, grad = run(laid_out(student, layout), laid_out(student, layout), "triton")
    assert loss == 0 and not grad.any(), "equal networks"
    compare(laid_out(student, "crop"), laid_out(teacher.bfloat16(), layout), layout, "triton")


# Tiles that fill the maps, that end within and after them, walked in one step and in several.
CONFIGS = [
    Config(Tile(1, 4, 1, 2), Tile(1, 4, 1, 2), Tile(2, 16, 1)),
    Config(Tile(2, 4, 1, 1), Tile(2, 4, 1, 1), Tile(4, 8, 2)),
    Config(Tile(8, 16, 2, 4), Tile(8, 16, 2, 4), Tile(1, 64, 4)),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["rows", "small", "large"])
@two_layouts
def test_every_launch_gives_the_same_numbers_and_the_same_bits_twice(device, config, layout, monkeypatch):
    """Also with the temperatures read by the kernels, and of rows put together in several steps."""
    student, teacher = (laid_out(x, layout) for x in both(device, 2, 3, 3, 6, scale=20.0))
    mask = (torch.rand(2, 1, 3, 6, generator=torch.Generator().manual_seed(0)) > 0.2).to(device)
    mask[1, :, 2:] = False
    leaf = student.detach().requires_grad_()
    upstream = torch.tensor([2.0, 0.5], device=device)
    want = triton.forward(student, teacher, mask, numbers(), False, 0)[0]
    (want_grad,) = torch.autograd.grad(triton.matched_cafd(leaf, teacher, mask, 1.0, 2.0, 0), leaf, upstream)
    monkeypatch.setattr(triton, "JOINED", 16)
    splits = Network(student, config).splits
    assert splits > 1 or config is CONFIGS[2]
    results = []
    for by_pointer in (False, True):
        at = numbers().to(device)
        loss, stats = triton.forward(student, teacher, mask, at, False, 0, config, by_pointer)
        grad = triton.backward(student, teacher, mask, stats, at, upstream, 0, config, by_pointer)
        results.append((loss, stats, grad))
    torch.testing.assert_close(results[0][0], want, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(results[0][2], want_grad, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@two_layouts
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_mask_gives_the_bits_of_minus_inf_in_both(device, layout, dtype):
    """Whatever stands in the masked cells, and whatever comes in for them."""
    student, teacher = both(device, 2, 3, 5, 6, dtype=dtype)
    mask = (torch.rand(2, 1, 5, 6, generator=torch.Generator().manual_seed(0)) > 0.3).to(device)
    dead = [laid_out(x.masked_fill(~mask, -INF), layout) for x in (student, teacher)]
    rubbish = [laid_out(x.masked_fill(~mask, value), layout) for x, value in ((student, NAN), (teacher, INF))]
    loss, stats = triton.forward(*dead, None, numbers(), False, 1)
    grad = triton.backward(*dead, None, stats, numbers(), torch.ones_like(loss), 1)
    got, got_stats = triton.forward(*rubbish, mask, numbers(), False, 1)
    assert torch.equal(got, loss) and torch.equal(got_stats, stats) and loss.isfinite()
    assert torch.equal(triton.backward(*rubbish, mask, stats, numbers(), torch.ones_like(loss), 1), grad)
    for upstream in (NAN, INF):
        grad = triton.backward(*rubbish, mask, stats, numbers(), torch.full_like(loss, upstream), 1)
        assert not grad.masked_select(~mask).any() and not grad.masked_select(mask).isfinite().any()
    nothing = torch.zeros_like(mask)
    loss, stats = triton.forward(*rubbish, nothing, numbers(), False, 1)
    assert loss == 0 and not triton.backward(*rubbish, nothing, stats, numbers(), loss + 1, 1).any()


@two_layouts
def test_infinities_and_nan(device, layout):
    options = dict(reduction="none", channel_temperature=1e-4, backend="triton")
    student, teacher = both(device, 2, 3, 4, 5)
    teacher[1, 0] += 100  # hardly a weight for the others
    for row in (False, True):  # the teacher looks where the student cannot
        far = student.clone()
        far[1, 2, 3, 4 if not row else slice(None)] = -INF
        if row:
            far[1, 2] = -INF
        loss, grad = run(laid_out(far, layout), laid_out(teacher, layout), **options)
        assert loss[0].isfinite() and loss[1] == INF and grad.isfinite().all()
    silent = teacher.clone()
    silent[:, 1] = -INF  # a row of the teacher without mass adds nothing
    loss, grad = run(laid_out(student, layout), laid_out(silent, layout), **{**options, "channel_temperature": None})
    rest = run(student[:, ::2], teacher[:, ::2], **{**options, "channel_temperature": None})[0] * 2 / 3
    torch.testing.assert_close(loss, rest)
    assert not grad[:, 1].any() and grad[:, 0].any()
    for bad, which, at in ((NAN, 0, 0), (INF, 0, 1), (NAN, 1, 2), (INF, 1, 1)):
        pair = [student.clone(), silent.clone()]
        pair[which][0, at, 3, 4] = bad
        loss = matched_cafd_loss(*(laid_out(x, layout) for x in pair), **options)
        assert loss[0].isnan() and loss[1].isfinite()


def test_empty_and_silent(device):
    empty = torch.empty(0, 5, 4, 4, device=device)
    for reduction in ("none", "mean", "sum"):
        loss, grad = run(empty, empty, "triton", reduction=reduction)
        assert loss.numel() == (0 if reduction == "none" else 1) and not loss.any() and grad.shape == empty.shape
    student = both(device, 2, 7, 5, 6)[0]
    silent = torch.zeros_like(student)
    got, want = (run(student, silent, "triton", channel_temperature=tau_c) for tau_c in (1.0, None))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_upstream_factors_come_in_before_halves_are_rounded(device, dtype):
    student, teacher = (x * 1e-3 for x in both(device, 2, 3, 16, 16, dtype=dtype))
    got = run(student, teacher, "triton", 65536.0)[1]
    truth = run(student.double(), teacher.double(), "reference", 65536.0)[1]
    assert (got.double() - truth).norm() / truth.norm() < torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("bad", [NAN, INF, -1.0, 0.0])
def test_temperatures_that_nobody_could_refuse_make_everything_nan(device, bad):
    student, teacher = both(device, 2, 3, 3, 4)
    for which in (0, 1):
        at = numbers().to(device)
        at[which] = bad
        assert triton.forward(student, teacher, None, at, False, 0, None, True)[0].isnan().all()


@two_layouts
def test_everything_is_written(device, layout):
    """Memory that torch.empty hands out is filled with NaN here: what a kernel forgets to write shows."""
    student, teacher = (laid_out(x, layout) for x in both(device, 2, 5, 3, 7))
    torch.use_deterministic_algorithms(True)
    try:
        loss, stats = triton.forward(student, teacher, None, numbers(), False, 1)
        grad = triton.backward(student, teacher, None, stats, numbers(), loss, 1)
        assert all(x.isfinite().all() for x in (loss, stats, grad)) and grad.stride() == student.stride()
    finally:
        torch.use_deterministic_algorithms(False)


def test_opcheck(device):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    ops = torch.ops.dsct_kernels
    student, teacher = both(device, 2, 3, 3, 4)
    mask = (torch.rand(2, 1, 3, 4, generator=torch.Generator().manual_seed(0)) > 0.3).to(device)
    arguments = (laid_out(student, "channels_last").requires_grad_(), teacher, mask, numbers(), False, 1)
    torch.library.opcheck(ops.matched_cafd_triton.default, arguments, test_utils=checks)
    loss, stats = ops.matched_cafd_triton(student, teacher, None, numbers(), True, 0)
    backward = (student, teacher, None, stats, numbers(), torch.randn_like(loss), 0)
    torch.library.opcheck(ops.matched_cafd_backward_triton.default, backward, test_utils=checks)
